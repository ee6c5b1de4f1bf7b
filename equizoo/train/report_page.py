"""A run on one page: ``report.html``, which needs no other file and no network."""

import base64
import html
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ase.data import atomic_numbers, chemical_symbols

from equizoo.data.readers import Dataset
from equizoo.eval.benchmark_timing import environment
from equizoo.eval.plots import BY_ELEMENT, errors_by_element
from equizoo.registry import shown_elements
from equizoo.train.loop import Fitted
from equizoo.whole_files import written_whole

Metrics = Mapping[str, Any]  # of one evaluation

_ERROR = re.compile(r"(energy|forces|stress)_(mae|rmse)_(meV(?:_per_(?:atom|A3?))?)")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 }
main { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 1.5rem }
th, td { padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid #e5e5e5 }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
td.worse { color: #b34a00 }
img { max-width: 100%; height: auto }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto }
summary { cursor: pointer }
"""


def write_report_page(
    folder: Path,
    name: str,
    fitted: Fitted,
    datasets: Mapping[str, Dataset],
    errors: Mapping[str, Mapping[str, Metrics]],
    base_data: Collection[str] = (),
) -> Path:
    """The page written: errors, curves, parity, errors by element, data, settings and hardware.

    ``errors`` are metrics by data set, under a heading each; with two headings (before and after)
    the changes stand beside them, and data sets among ``base_data`` show what was forgotten. Images
    and settings are those in the folder of the run.
    """
    last = list(errors.values())[-1]
    images = [("Learning curve", "learning_curve.png"), ("Parity", "parity.png")]
    if any(found.get("num_force_components") for found in last.values()):
        errors_by_element(last, folder / "errors_by_element.png")
        images.append(("Errors by element", "errors_by_element.png"))
    hours = (
        f"{fitted.seconds / 3600:.2f} hours" if fitted.seconds > 600 else f"{fitted.seconds:.0f} s"
    )
    sections = [
        f"<h1>{html.escape(name)}</h1>",
        f"<p>{fitted.epochs} epochs in {hours}; the weights are those of epoch "
        f"{fitted.best_epoch}, the best on the validation set.</p>",
        "<h2>Errors</h2>",
        *([_forgetting(base_data)] if len(errors) > 1 else []),
        _error_table(errors),
        "<h2>Force errors by element</h2>",
        _element_table(errors),
        *(f"<h2>{title}</h2>\n{_image(folder / file, title)}" for title, file in images),
        "<h2>Data</h2>",
        _data_table(datasets),
        "<h2>Where</h2>",
        _table(("", ""), environment()._asdict().items()),
        "<details><summary>Settings of the run</summary>"
        f"<pre>{html.escape((folder / 'run.json').read_text('utf-8'))}</pre></details>",
    ]
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{html.escape(name)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )
    path = folder / "report.html"
    with written_whole(path) as partial:
        partial.write_text(text, "utf-8")
    return path


def _error_table(errors: Mapping[str, Mapping[str, Metrics]]) -> str:
    columns = list(errors)
    rows = []
    for where in dict.fromkeys(where for found in errors.values() for where in found):
        found = [errors[column].get(where, {}) for column in columns]
        for key in dict.fromkeys(key for metrics in found for key in metrics):
            match = _ERROR.fullmatch(key)
            if match is None or (match[1] == "energy" and not key.endswith("per_atom")):
                continue
            values = [metrics.get(key) for metrics in found]
            label = f"{match[1]} {match[2].upper()} [{_unit(match[3])}]"
            rows.append((where, label, *map(_number, values), *_change(values)))
    heading = (*columns, "change") if len(columns) > 1 else columns
    return _table(("data", "error", *heading), rows, numbers=2)


def _forgetting(base_data: Collection[str]) -> str:
    names = html.escape(", ".join(base_data))
    if not names:
        return (
            "<p>What was forgotten is not known: no data of the base model's kind were given "
            "(<code>--old</code>).</p>"
        )
    return f"<p>What was forgotten shows on data of the base model's kind: {names}.</p>"


def _element_table(errors: Mapping[str, Mapping[str, Metrics]]) -> str:
    columns, rows = list(errors), []
    for where in dict.fromkeys(where for found in errors.values() for where in found):
        found = [errors[column].get(where, {}).get(BY_ELEMENT, {}) for column in columns]
        elements = {element for by_element in found for element in by_element}
        for element in sorted(elements, key=lambda symbol: atomic_numbers[symbol]):
            values = [by_element.get(element) for by_element in found]
            rows.append((where, element, *map(_number, values), *_change(values)))
    if not rows:
        return "<p>There are no forces in the data.</p>"
    heading = ["RMSE [meV/Å]"] if len(columns) == 1 else [f"RMSE {c} [meV/Å]" for c in columns]
    changes = ["change"] if len(columns) > 1 else []
    return _table(("data", "element", *heading, *changes), rows, numbers=2)


def _unit(words: str) -> str:
    return words.replace("_per_A3", "/Å³").replace("_per_A", "/Å").replace("_per_", "/")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _change(values: Sequence[float | None]) -> tuple[str, ...]:
    if len(values) < 2:
        return ()
    first, last = values[0], values[-1]
    return ("–",) if not first or last is None else (f"{100 * (last / first - 1):+.0f} %",)


def _data_table(datasets: Mapping[str, Dataset]) -> str:
    return _table(
        ("part", "data set", "frames", "elements", "energies", "level of theory"),
        [
            (
                part,
                dataset.name,
                str(len(dataset)),
                shown_elements([chemical_symbols[z] for z in dataset.elements]),
                dataset.energy_reference.value,
                dataset.level_of_theory,
            )
            for part, dataset in datasets.items()
        ],
    )


def _table(
    header: Sequence[str], rows: Iterable[Sequence[object]], numbers: int | None = None
) -> str:
    """Columns from ``numbers`` on are aligned to the right."""

    def cells(tag: str, values: Sequence[object]) -> str:
        return "".join(
            f"<{tag}{_class(i, str(value), numbers)}>{html.escape(str(value))}</{tag}>"
            for i, value in enumerate(values)
        )

    lines = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table>\n<tr>{cells('th', header)}</tr>\n{lines}\n</table>"


def _class(column: int, text: str, numbers: int | None) -> str:
    if numbers is None or column < numbers:
        return ""
    worse = text.startswith("+") and text.endswith("%") and text != "+0 %"
    return ' class="n worse"' if worse else ' class="n"'


def _image(path: Path, title: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{title}" src="data:image/png;base64,{data}">'
