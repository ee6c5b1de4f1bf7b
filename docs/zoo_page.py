"""Writes docs/zoo.html from the model cards: all models, and accuracy against cost. `make readme`.

One file that needs no network: search and sorting are a few lines of script, plots are drawings.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from equizoo.registry import BUNDLED, MODELS, ModelEntry, shown_elements

PAGE = Path(__file__).parent / "zoo.html"
# Okabe and Ito's colours, told apart with any kind of colour vision; a mark of its own for each.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKS = ("circle", "square", "triangle", "diamond", "circle", "square")
FORCES = "forces_mae_meV_per_A"
ENERGY = "energy_mae_meV_per_atom"


class Point(NamedTuple):
    """A model in a plot."""

    x: float
    y: float
    name: str
    group: str
    note: str


def page(models: Mapping[str, ModelEntry]) -> str:
    """The whole page as HTML."""
    # ours first: those that need nothing else
    entries = sorted(models.values(), key=lambda entry: (entry.checkpoint is not None, entry.name))
    sections = [_summary(entries), _table(entries), _accuracy(entries), _products(entries)]
    return (
        "<!doctype html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>The equizoo</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _summary(entries: Sequence[ModelEntry]) -> str:
    here = sum(_source(entry) == "package" for entry in entries)
    evaluated = sum(bool(entry.metrics) for entry in entries)
    architectures = sorted({entry.architecture for entry in entries})
    return (
        "<header><h1>The equizoo</h1><p>Equivariant interatomic potentials in JAX, loaded by name: "
        '<code>equizoo.load("mace-3bpa")</code>. '
        f"{len(entries)} models of {len(architectures)} architectures, {here} in the package, "
        f"{evaluated} with errors measured here. Errors are mean absolute ones, from the model "
        "cards; energies compare only within one level of theory. Converted models are other "
        "people's checkpoints, fetched and converted when first used.</p></header>"
    )


def _table(entries: Sequence[ModelEntry]) -> str:
    columns = (
        ("model", ""), ("architecture", ""), ("product", ""), ("elements", ""),
        ("level of theory", ""), ("parameters", "n"), ("force MAE", "n"), ("licence", ""),
        ("weights", ""),
    )  # fmt: skip
    head = "".join(
        f'<th scope="col" class="{kind}"><button type="button">{name}</button></th>'
        for name, kind in columns
    )
    rows = "".join(_rows(entry) for entry in entries)
    return (
        '<section><h2>Models</h2><p><label>Search <input id="search" type="search" '
        'placeholder="name, element, licence, level of theory"></label> '
        f'<span id="count">{len(entries)} models</span></p>'
        f'<div class="wide"><table id="models"><thead><tr>{head}</tr></thead>{rows}</table></div>'
        "</section>"
    )


def _rows(entry: ModelEntry) -> str:
    best = min((float(row[FORCES]) for row in entry.metrics if FORCES in row), default=None)
    cells = (
        f'<th scope="row"><details><summary>{_text(entry.name)}</summary></details></th>',
        _cell(entry.architecture),
        _cell(entry.tensor_product.replace("_", " ")),
        _cell(_elements(entry), " ".join(entry.elements)),
        _cell(entry.level_of_theory),
        _number(entry.parameters, "" if entry.parameters is None else f"{entry.parameters:,}"),
        _number(best, "" if best is None else f"{best:.1f} meV/Å"),
        _cell(entry.license_weights),
        _cell(_source(entry)),
    )
    words = " ".join(
        (entry.name, entry.architecture, entry.tensor_product, entry.level_of_theory,
         entry.license_weights, _source(entry), *entry.elements)
    )  # fmt: skip
    return (
        f'<tbody data-words="{_text(words.lower())}"><tr>{"".join(cells)}</tr>'
        f'<tr class="more" hidden><td colspan="{len(cells)}">{_details(entry)}</td></tr></tbody>'
    )


def _details(entry: ModelEntry) -> str:
    parts = [f'<pre>equizoo.load("{_text(entry.name)}")</pre>']
    if entry.metrics:
        rows = [
            (f"{row['dataset']} {row['split']}", _error(row, ENERGY, "meV/atom"),
             _error(row, FORCES, "meV/Å"))
            for row in entry.metrics
        ]  # fmt: skip
        parts.append(_plain_table(("data", "energy MAE", "force MAE"), rows))
    if entry.certificate:
        verdicts = [f"{row['check']}: {row['verdict']}" for row in entry.certificate]
        parts.append(f"<p>Certificate: {_text('; '.join(verdicts))}.</p>")
    facts = [
        f"cutoff {entry.cutoff:g} Å",
        f"{entry.energy_reference} energies",
        *(f"trained {entry.training_hours:g} h on {entry.training_hardware}"
          for _ in [0] if entry.training_hours is not None),
        *(f"sha256 {entry.sha256[:16]}…" for _ in [0] if entry.sha256),
        *(f"hf-hub:{entry.hub_repo}" for _ in [0] if entry.hub_repo),
    ]  # fmt: skip
    parts.append(f"<p>{_text(', '.join(facts))}.</p>")
    data = "; ".join(f"{d.name} ({d.license}): {d.citation}" for d in entry.training_data)
    card = f'<a href="../model_cards/{entry.name}.md">card</a>'
    parts.append(f"<p>Trained on {_text(data)}. {card}</p>")
    return "".join(parts)


def _accuracy(entries: Sequence[ModelEntry]) -> str:
    """For each data set a plot: force error against time, or parameters where no time is known."""
    figures = []
    for dataset in _datasets(entries):
        stated = [
            (entry, float(row[FORCES]))
            for entry in entries
            for row in entry.metrics
            if f"{row['dataset']}/{row['split']}" == dataset and FORCES in row
        ]
        devices = sorted({str(row["device"]) for entry, _ in stated for row in entry.speed})
        for device in devices:
            points = [
                Point(float(row["ms_per_atom"]), error, entry.name, entry.architecture,
                      f"{row['dtype']}")
                for entry, error in stated
                for row in entry.speed
                if row["device"] == device and "ms_per_atom" in row
            ]  # fmt: skip
            title = f"{dataset}, energy and forces on {device}"
            figures.append(_figure(title, points, "time [ms per atom]", "force MAE [meV/Å]"))
        if not devices:
            points = [
                Point(float(entry.parameters), error, entry.name, entry.architecture, "")
                for entry, error in stated
                if entry.parameters
            ]
            title = f"{dataset} (no speeds measured yet)"
            figures.append(_figure(title, points, "parameters", "force MAE [meV/Å]"))
    body = "".join(figures) or "<p>No model has been evaluated yet.</p>"
    return f'<section><h2>Accuracy against speed</h2><div class="figures">{body}</div></section>'


def _products(entries: Sequence[ModelEntry]) -> str:
    """Models by tensor product on data that several products have seen, and what products cost."""
    tables = []
    for dataset in _datasets(entries):
        stated = [
            (entry, row)
            for entry in entries
            for row in entry.metrics
            if f"{row['dataset']}/{row['split']}" == dataset and FORCES in row
        ]
        rows = sorted(
            (
                entry.tensor_product.replace("_", " "), entry.name,
                "" if entry.parameters is None else f"{entry.parameters:,}",
                _error(row, ENERGY, "meV/atom"), _error(row, FORCES, "meV/Å"),
            )
            for entry, row in stated
        )  # fmt: skip
        header = ("product", "model", "parameters", "energy MAE", "force MAE")
        tables.append(f"<h3>{_text(dataset)}</h3>" + _plain_table(header, rows))
    cost = (
        '<figure><img src="images/products-cost.png" alt="Time of tensor products against the '
        'highest degree, forward and with derivatives"><figcaption>What one product costs, by '
        'highest degree: see <a href="choosing-a-tensor-product.md">choosing a tensor product</a>.'
        "</figcaption></figure>"
    )
    return f"<section><h2>Tensor products</h2>{''.join(tables)}{cost}</section>"


# ---- drawing -----------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 460, 320, 62, 52, 18, 18


def _figure(title: str, points: Sequence[Point], x_label: str, y_label: str) -> str:
    """A scatter plot with logarithmic axes; every point has its name, and a tooltip."""
    if not points:
        return ""
    groups = sorted({point.group for point in points})
    x_axis, y_axis = _Axis([p.x for p in points]), _Axis([p.y for p in points])

    def place(point: Point) -> tuple[float, float]:
        return (
            LEFT + x_axis.share(point.x) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - y_axis.share(point.y) * (HEIGHT - BOTTOM - TOP),
        )

    drawn = []
    for value in x_axis.ticks:
        x = LEFT + x_axis.share(value) * (WIDTH - LEFT - RIGHT)
        drawn.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" '
                     f'y2="{HEIGHT - BOTTOM}"/>'
                     f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
                     f"{_tick(value)}</text>")  # fmt: skip
    for value in y_axis.ticks:
        y = HEIGHT - BOTTOM - y_axis.share(value) * (HEIGHT - BOTTOM - TOP)
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" '
                     f'y2="{y:.1f}"/><text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
                     f"{_tick(value)}</text>")  # fmt: skip
    taken: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (p.y, p.x)):
        index = groups.index(point.group) % len(COLORS)
        x, y = place(point)
        side, anchor = (-9, "end") if x > 0.6 * WIDTH else (9, "start")
        label = y + 4
        while any(abs(label - other) < 12 and abs(x - at) < 140 for at, other in taken):
            label -= 12
        taken.append((x, label))
        tip = f"{point.name}: {point.y:.3g}, {point.x:.3g} {point.note}".strip()
        drawn.append(
            f'<g>{_mark(MARKS[index], x, y, COLORS[index])}<title>{_text(tip)}</title>'
            f'<text class="name" x="{x + side:.1f}" y="{label:.1f}" text-anchor="{anchor}">'
            f"{_text(point.name)}</text></g>"
        )  # fmt: skip
    drawn.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 12}" '
        f'text-anchor="middle">{_text(x_label)}</text>'
        f'<text class="axis" transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) '
        f'rotate(-90)" text-anchor="middle">{_text(y_label)}</text>'
    )
    legend = "".join(
        f'<span><svg width="14" height="14" aria-hidden="true">'
        f"{_mark(MARKS[i % len(MARKS)], 7, 7, COLORS[i % len(COLORS)])}</svg>{_text(group)}</span>"
        for i, group in enumerate(groups)
    )
    return (
        f'<figure><figcaption>{_text(title)}</figcaption><svg role="img" '
        f'aria-label="{_text(title)}: {_text(y_label)} against {_text(x_label)}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(drawn)}</svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


class _Axis:
    """A logarithmic axis around some values, with ticks at round numbers, three if it can be."""

    def __init__(self, values: Sequence[float]):
        low, high = math.log10(min(values)), math.log10(max(values))
        margin = max(0.12 * (high - low), 0.15)
        self.low, self.high = low - margin, high + margin
        powers = range(math.floor(self.low) - 1, math.ceil(self.high) + 1)
        for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            ticks = [m * 10.0**power for power in powers for m in steps]
            self.ticks = [t for t in ticks if self.low <= math.log10(t) <= self.high]
            if len(self.ticks) > 2:
                break

    def share(self, value: float) -> float:
        return (math.log10(value) - self.low) / (self.high - self.low)


def _mark(kind: str, x: float, y: float, color: str) -> str:
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{color}"/>'
    corners = {
        "square": ((-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)),
        "triangle": ((0, -6), (5.5, 4), (-5.5, 4)),
        "diamond": ((0, -6), (6, 0), (0, 6), (-6, 0)),
    }[kind]
    placed = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{placed}" fill="{color}"/>'


def _tick(value: float) -> str:
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


# ---- shared ------------------------------------------------------------------------------------


def _source(entry: ModelEntry) -> str:
    """Where the weights are for everybody, whatever lies in the cache of this machine."""
    if (BUNDLED / entry.name / "model.safetensors").is_file():
        return "package"
    return "converted" if entry.checkpoint is not None else "Hub"


def _elements(entry: ModelEntry) -> str:
    if len(entry.elements) > 12:
        return f"{len(entry.elements)}: {entry.elements[0]}–{entry.elements[-1]}"
    return shown_elements(entry.elements)


def _datasets(entries: Sequence[ModelEntry]) -> list[str]:
    return sorted({f"{r['dataset']}/{r['split']}" for e in entries for r in e.metrics})


def _error(row: Mapping[str, str | float], key: str, unit: str) -> str:
    return f"{float(row[key]):.3g} {unit}" if key in row else "–"


def _plain_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str, title: str = "") -> str:
    tip = f' title="{_text(title)}"' if title and title != text else ""
    return f"<td{tip}>{_text(text)}</td>"


def _number(value: float | None, text: str) -> str:
    return f'<td class="n" data-value="{"" if value is None else value}">{_text(text)}</td>'


def _text(text: str) -> str:
    return html.escape(text)


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6672; --line: #d9dee3;
  --paper: #ffffff; --tint: #f4f6f8; --link: #0063a5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa5b1; --line: #333c45;
  --paper: #14181c; --tint: #1d2329; --link: #6cb4ee; } }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 2rem; margin: 0 0 .3rem; } h2 { margin: 2.5rem 0 .6rem; font-size: 1.35rem; }
h3 { margin: 1.4rem 0 .4rem; font-size: 1.05rem; } header p { max-width: 46rem; }
a { color: var(--link); } code, pre { font: .92em ui-monospace, Menlo, Consolas, monospace; }
pre { background: var(--tint); padding: .5rem .8rem; border-radius: 6px; display: inline-block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93rem; }
#models { width: 100%; font-size: .88rem; } #models th, #models td { padding: .35rem .45rem; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
thead button { all: unset; cursor: pointer; } thead button:focus-visible, summary:focus-visible {
  outline: 2px solid var(--link); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " ↑"; }
th[aria-sort=descending] button::after { content: " ↓"; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
#models td:nth-child(5) { min-width: 10rem; }
tbody th { font-weight: 600; white-space: nowrap; } summary { cursor: pointer; }
tr.more td { background: var(--tint); padding: .8rem 1.2rem; }
input { font: inherit; padding: .35rem .6rem; width: 20rem; max-width: 70vw; color: inherit;
  background: var(--tint); border: 1px solid var(--line); border-radius: 6px; }
#count { color: var(--soft); margin-left: .6rem; }
.figures { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: .3rem; }
figure img { max-width: 100%; background: #fff; border-radius: 6px; margin-top: 1.5rem; }
figure img + figcaption { font-weight: 400; color: var(--soft); }
.figures svg[role=img] { width: 100%; max-width: 560px; height: auto; }
svg text { font-size: 11px; fill: var(--soft); } svg .name { fill: var(--ink); font-size: 12px; }
svg .axis { font-size: 12px; } svg .grid { stroke: var(--line); stroke-width: 1; }
.legend { display: flex; gap: 1rem; font-size: .88rem; color: var(--soft); flex-wrap: wrap; }
.legend svg { vertical-align: -2px; margin-right: .3rem; }
"""

SCRIPT = """
const table = document.getElementById("models");
const bodies = () => [...table.tBodies];
for (const body of bodies()) {
  const details = body.querySelector("details");
  details.addEventListener("toggle", () => { body.rows[1].hidden = !details.open; });
}
document.getElementById("search").addEventListener("input", event => {
  const words = event.target.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  for (const body of bodies()) {
    const known = body.dataset.words.split(" ");
    body.hidden = !words.every(word => word.length < 3
      ? known.includes(word) : body.dataset.words.includes(word));
    shown += !body.hidden;
  }
  document.getElementById("count").textContent = shown + (shown === 1 ? " model" : " models");
});
[...table.tHead.rows[0].cells].forEach((head, column) => {
  head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = body => {
      const cell = body.rows[0].cells[column];
      if (!head.classList.contains("n")) return cell.textContent.toLowerCase();
      return cell.dataset.value === "" ? null : Number(cell.dataset.value);
    };
    const sorted = bodies().sort((one, other) => {
      const a = key(one), b = key(other);
      if (a === null || b === null) return (a === null) - (b === null);
      return (a < b ? -1 : a > b ? 1 : 0) * (down ? -1 : 1);
    });
    table.append(...sorted);
  });
});
"""


if __name__ == "__main__":
    PAGE.write_text(page(MODELS), "utf-8")
