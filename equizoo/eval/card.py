"""The card of a released model: front matter and sections written from measurements.

Beside a card ``<name>.md`` lies a folder ``<name>/`` with what it is made from:
``evaluations.json``, ``certificate.json``, images, the log of training. Generated sections are
replaced as a whole; prose in other sections is left as it is.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ase.data import chemical_symbols
from flax import nnx

from equizoo.config import to_dict
from equizoo.eval.certificate import Certificate
from equizoo.eval.evaluate import Evaluation
from equizoo.eval.potential import Potential
from equizoo.eval.speed import Speed
from equizoo.hub import join_front_matter, split_front_matter
from equizoo.registry import ARCHITECTURES, MODELS
from equizoo.structure import Structure

EVALUATIONS, CERTIFICATE = "evaluations.json", "certificate.json"
_SHOWN = (
    "energy_mae_meV_per_atom",
    "energy_mae_meV",
    "energy_rmse_meV",
    "forces_mae_meV_per_A",
    "forces_rmse_meV_per_A",
    "stress_mae_meV_per_A3",
    "stress_rmse_meV_per_A3",
)
_BY_ELEMENT = "forces_rmse_meV_per_A_by_element"
_ORDER = ("Use", "Errors", "Speed", "Certificate", "Intended use and limits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a card says that cannot be measured from the weights."""

    training_data: Sequence[Mapping[str, str]]  # name, license, citation
    training_hardware: str
    training_hours: float  # [h]
    license_weights: str
    license_data: str
    datasets: Sequence[str]
    limits: str  # intended use and limits, prose
    license_code: str = "Apache-2.0"
    recipe: str = ""  # how to train it again: a command
    seeds: Sequence[int] = ()  # of the weights, and of further runs that `spread` is from
    spread: Sequence[Mapping[str, float | str]] = ()  # errors of the same recipe by seed
    citation: str = ""  # how to cite the model


def make_card(
    potential: Potential,
    evaluations: Sequence[Evaluation],
    provenance: Provenance,
    weights: bytes,
    images: Mapping[str, str],  # caption to relative address
    certificate: Certificate | None = None,
) -> str:
    """The text of ``model_cards/<name>.md``; every figure comes from the arguments.

    ``weights`` are the bytes of ``model.safetensors``; each evaluation's data set is written as
    ``set/split``.
    """
    facts = potential.describe()
    fields = to_dict(potential.config)
    rows = [evaluation.to_dict() for evaluation in evaluations]
    front = {
        "name": potential.name,
        "license": provenance.license_weights.lower(),
        "library_name": "equizoo",
        "tags": ["interatomic-potential", "equivariant", "jax", facts["architecture"]],
        "datasets": list(provenance.datasets),
        "architecture": ARCHITECTURES.name_of(potential.config),
        "tensor_product": fields.get("tensor_product", {}).get("name", "none"),
        "elements": [chemical_symbols[z] for z in potential.config.atomic_numbers],
        "cutoff": potential.config.cutoff,
        "level_of_theory": potential.level_of_theory,
        "energy_reference": str(potential.energy_reference),
        "license_code": provenance.license_code,
        "license_weights": provenance.license_weights,
        "license_data": provenance.license_data,
        "training_data": [dict(row) for row in provenance.training_data],
        "training_hardware": provenance.training_hardware,
        "training_hours": round(provenance.training_hours, 2),
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(potential.model, nnx.Param))),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "metrics": [_metrics_row(row) for row in rows],
    }
    if certificate is not None:
        front["certificate"] = certificate.front_matter()
    data = ", ".join(row["name"] for row in provenance.training_data)
    opening = (
        f"# {potential.name}\n\n{type(potential.model).__name__} for "
        f"{', '.join(front['elements'])}, {front['parameters']:,} parameters, cutoff "
        f"{front['cutoff']} Å, trained on {data} "
        f"({front['level_of_theory']}) in {front['training_hours']} h on "
        f"{front['training_hardware']}.\n"
    )
    body = _with_section(opening, "Use", _use(potential.name))
    body = _with_section(body, "Errors", errors_section(rows, images))
    if certificate is not None:
        body = _with_section(body, "Certificate", certificate.markdown())
    body = _with_section(body, "Intended use and limits", provenance.limits.strip() + "\n")
    body = _with_section(body, "Training", _training(provenance))
    options = "".join(f"- `{name}`: `{value}`\n" for name, value in fields.items())
    described = (
        f"`{facts['architecture']}`, invariant under {facts['symmetry']}, "
        f"{'smooth' if facts['smooth'] else 'not smooth'} at the cutoff. Options:\n\n{options}"
    )
    return join_front_matter(front, _with_section(body, "Architecture", described))


def require_card(
    name: str, sha256: str | None, folder: Path | None = None
) -> tuple[dict[str, Any], str]:
    """Front matter and body of the card. Raises ``ValueError`` where there is none of that name in
    ``folder`` (that of the released models unless given), and where it describes other weights
    than those of ``sha256``."""
    card = (MODELS.folder if folder is None else folder) / f"{name}.md"
    if not card.is_file():
        raise ValueError(f"{name} has no card; expected {card}. Only released models do.")
    fields, body = split_front_matter(card.read_text("utf-8"), str(card))
    described = fields.get("sha256")
    if None not in (sha256, described) and sha256 != described:
        raise ValueError(
            f"The weights have SHA-256 {sha256}, the card of {name} describes {described}; take "
            "the released model."
        )
    return fields, body


def update_card(
    potential: Potential,
    *,
    evaluation: Evaluation | None = None,
    certificate: Certificate | None = None,
    speed: Speed | None = None,
    folder: Path | None = None,
) -> Path:
    """The card of a released model with new measurements in front matter, sections and folder.

    An evaluation takes the place of an earlier one of the same data set; with it comes a parity
    plot. Raises ``ValueError`` as :func:`require_card` does, as far as a certificate tells what
    weights these are.
    """
    folder = MODELS.folder if folder is None else folder
    card, beside = folder / f"{potential.name}.md", folder / potential.name
    certified = None if certificate is None else str(certificate.sha256)
    fields, body = require_card(potential.name, certified, folder)
    beside.mkdir(exist_ok=True)
    if evaluation is not None:
        rows = [row for row in read_evaluations(beside) if row["dataset"] != evaluation.dataset]
        rows.append(evaluation.to_dict())
        _write(beside / EVALUATIONS, rows)
        kept = [row for row in fields["metrics"] if _dataset(row) != evaluation.dataset]
        fields["metrics"] = [*kept, _metrics_row(rows[-1])]
        _draw_parity(evaluation, beside)
        body = _with_section(body, "Errors", errors_section(rows, _parity_images(beside)))
    if certificate is not None:
        certificate.save(beside / CERTIFICATE)
        fields["certificate"] = certificate.front_matter()
        body = _with_section(body, "Certificate", certificate.markdown())
    if speed is not None:
        row = speed.front_matter()
        kept = [
            other
            for other in fields.get("speed", ())
            if (other["device"], other["dtype"]) != (row["device"], row["dtype"])
        ]
        fields["speed"] = [*kept, row]
        body = _with_section(body, "Speed", speed_section(fields["speed"]))
    card.write_text(join_front_matter(fields, body), "utf-8")
    return card


def read_evaluations(beside: Path) -> list[dict[str, Any]]:
    """The evaluations that a card was made from; none where there is no such file."""
    file = beside / EVALUATIONS
    return json.loads(file.read_text("utf-8")) if file.is_file() else []


def write_evaluations(beside: Path, evaluations: Sequence[Evaluation]) -> None:
    """Writes what :func:`read_evaluations` reads."""
    _write(beside / EVALUATIONS, [evaluation.to_dict() for evaluation in evaluations])


def known_data(name: str) -> list[str]:
    """Registered data of the kind a model was made for: those on its card, and what it replays."""
    from equizoo.data.datasets import DATASETS

    on_card = [_dataset(row) for row in MODELS[name].metrics] if name in MODELS else []
    return [found for found in [*on_card, f"{name}/replay"] if found in DATASETS]


def structures_for(name: str, structures: str | None) -> tuple[str, list[Structure]]:
    """Where structures to certify a model with come from, and they: a data set or file, or the
    first on the model's card that is here or can be downloaded, or those it replays; none where
    there is no such thing."""
    from equizoo.data.datasets import load_dataset

    if structures is not None:
        return structures, list(load_dataset(structures, require=()).structures)
    for candidate in known_data(name):
        if not _within_reach(candidate):
            continue
        try:
            return candidate, list(load_dataset(candidate).structures)
        except ConnectionError:  # out of reach
            continue
    return "", []


def _within_reach(dataset: str) -> bool:
    from equizoo.data.datasets import list_datasets

    return list_datasets(dataset)[0].where != "missing"


# ---- sections ----------------------------------------------------------------------------------


def errors_section(rows: Sequence[Mapping[str, Any]], images: Mapping[str, str]) -> str:
    """Tables of errors by data set and by element, of evaluations as ``evaluations.json`` has them.

    A large data set has a second row, for a few of its frames: what a test computes again.
    """
    if not rows:
        return "Not evaluated yet.\n"
    shown = [key for key in _SHOWN if any(key in row["metrics"] for row in rows)]
    table = [["data", "structures", *(key.replace("_", " ") for key in shown)]]
    for row in rows:
        named = [(row["dataset"], row["metrics"])]
        if sample := row.get("sample"):
            label = f"{row['dataset']}, every {_ordinal(sample['every'])} frame"
            named.append((label, sample["metrics"]))
        for label, metrics in named:
            cells = [f"{metrics[key]:.2f}" if key in metrics else "" for key in shown]
            table.append([label, str(metrics["num_structures"]), *cells])
    having = [row for row in rows if _BY_ELEMENT in row["metrics"]]
    elements = list(dict.fromkeys(s for row in having for s in row["metrics"][_BY_ELEMENT]))
    by_element = [["data", *elements]]
    for row in having:
        of = row["metrics"][_BY_ELEMENT]
        by_element.append([row["dataset"], *(f"{of[s]:.2f}" if s in of else "" for s in elements)])
    lines = [f"Evaluated in {', '.join(sorted({row['dtype'] for row in rows}))}.", ""]
    lines += [*_markdown(table), ""]
    if having:
        lines += ["Force RMSE by element [meV/Å]:", "", *_markdown(by_element), ""]
    for caption, address in images.items():
        lines += [f"![{caption}]({address})", ""]
    return "\n".join(lines)


def speed_section(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of what energies and forces cost."""
    numbers = list(dict.fromkeys(key for row in rows for key in row))
    table = [[key.replace("_", " ") for key in numbers]]
    table += [[_cell(row.get(key, "")) for key in numbers] for row in rows]
    return (
        "Energies and forces of one compiled batch, fastest of several calls; neighbour lists not "
        "included.\n\n" + "\n".join(_markdown(table)) + "\n"
    )


def _use(name: str) -> str:
    return (
        "```python\n"
        "import equizoo\n\n"
        f'potential = equizoo.load("{name}")\n'
        "result = potential.predict(atoms)  # ase.Atoms: energy [eV], forces [eV/Å], stress\n"
        "atoms.calc = potential.calculator()\n"
        "```\n"
    )


def _training(provenance: Provenance) -> str:
    lines = [f"{provenance.training_hours:.2f} h on {provenance.training_hardware}."]
    if provenance.recipe:
        lines += ["", f"    {provenance.recipe}"]
    if provenance.seeds:
        lines += ["", f"Seeds: {', '.join(map(str, provenance.seeds))}."]
    if provenance.spread:
        keys = list(dict.fromkeys(key for row in provenance.spread for key in row))
        table = [[key.replace("_", " ") for key in keys]]
        table += [[_cell(row.get(key, "")) for key in keys] for row in provenance.spread]
        lines += ["", "The same recipe from other seeds:", "", *_markdown(table)]
    lines += ["", "Data:", ""]
    lines += [
        f"- {row['name']} ({row['license']}): {row['citation']}" for row in provenance.training_data
    ]
    if provenance.citation:
        lines += ["", f"To cite the model: {provenance.citation}"]
    return "\n".join(lines) + "\n"


def _with_section(body: str, title: str, content: str) -> str:
    """The body with a section of that title, in place of an earlier one or where it belongs."""
    parts = re.split(r"(?m)^(?=## )", body)
    new = f"## {title}\n\n{content.rstrip()}\n\n"
    titles = [part.partition("\n")[0].removeprefix("## ").strip() for part in parts]
    titles[0] = ""  # what stands above all sections
    if title in titles[1:]:
        parts[titles.index(title, 1)] = new
    else:
        order = {name: index for index, name in enumerate(_ORDER)}
        after = [
            index
            for index, name in enumerate(titles[1:], 1)
            if order.get(name, len(_ORDER)) > order.get(title, len(_ORDER))
        ]
        place = after[0] if after else len(parts)
        parts[place - 1] = parts[place - 1].rstrip() + "\n\n"
        parts.insert(place, new)
    return "".join(parts).rstrip() + "\n"


def _metrics_row(row: Mapping[str, Any]) -> dict[str, Any]:
    dataset, _, split = row["dataset"].partition("/")
    numbers = {k: round(float(v), 4) for k, v in row["metrics"].items() if k in _SHOWN}
    return {"dataset": dataset, "split": split or "all"} | numbers


def _dataset(row: Mapping[str, Any]) -> str:
    """``set/split`` of a row of front matter."""
    return str(row["dataset"]) if row["split"] == "all" else f"{row['dataset']}/{row['split']}"


def _draw_parity(evaluation: Evaluation, beside: Path) -> None:
    from equizoo.eval.plots import parity_plot

    name = re.sub(r"[^\w.-]+", "-", evaluation.dataset)
    old = beside / "parity.png"
    if old.is_file() and len(read_evaluations(beside)) == 1:
        old.unlink()  # of the same data set, by the name it had when there was one
    parity_plot(evaluation, beside / f"parity-{name}.png")


def _parity_images(beside: Path) -> dict[str, str]:
    images = {
        f"Predicted against reference, {file.stem.removeprefix('parity-')}": file
        for file in sorted(beside.glob("parity*.png"))
    }
    curve = beside / "learning_curve.png"
    if curve.is_file():
        images["Errors during training"] = curve
    return {caption: f"{beside.name}/{file.name}" for caption, file in images.items()}


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _ordinal(number: int) -> str:
    special = {1: "st", 2: "nd", 3: "rd"} if number % 100 not in (11, 12, 13) else {}
    return f"{number}{special.get(number % 10, 'th')}"


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
