"""The card of a released model: front matter and tables written from measurements."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ase.data import chemical_symbols
from flax import nnx

from equizoo.config import to_dict
from equizoo.eval.evaluate import Evaluation
from equizoo.eval.potential import Potential
from equizoo.hub import join_front_matter
from equizoo.registry import ARCHITECTURES

_SHOWN = (
    "energy_mae_meV_per_atom",
    "energy_mae_meV",
    "energy_rmse_meV",
    "forces_mae_meV_per_A",
    "forces_rmse_meV_per_A",
    "stress_mae_meV_per_A3",
    "stress_rmse_meV_per_A3",
)


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


def make_card(
    potential: Potential,
    evaluations: Sequence[Evaluation],
    provenance: Provenance,
    weights: bytes,
    images: Mapping[str, str],  # caption to relative address
) -> str:
    """The text of ``model_cards/<name>.md``; every figure comes from the arguments.

    ``weights`` are the bytes of ``model.safetensors``; each evaluation's data set is written as
    ``set/split``.
    """
    facts = potential.describe()
    fields = to_dict(potential.config)
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
        "metrics": [_metrics_row(evaluation) for evaluation in evaluations],
    }
    body = "\n".join(
        [
            f"# {potential.name}",
            "",
            f"{type(potential.model).__name__} for {', '.join(front['elements'])}, "
            f"{front['parameters']:,} parameters, cutoff {front['cutoff']} Å, trained on "
            f"{', '.join(row['name'] for row in front['training_data'])} "
            f"({front['level_of_theory']}) in {front['training_hours']} h on "
            f"{front['training_hardware']}.",
            "",
            "## Errors",
            "",
            f"Evaluated in {', '.join(sorted({e.dtype for e in evaluations}))}.",
            "",
            *_table(evaluations),
            "",
            "Force RMSE by element [meV/Å]:",
            "",
            *_element_table(evaluations),
            "",
            *[f"![{caption}]({address})\n" for caption, address in images.items()],
            "## Intended use and limits",
            "",
            provenance.limits.strip(),
            "",
            "## Architecture",
            "",
            f"`{facts['architecture']}`, invariant under {facts['symmetry']}, "
            f"{'smooth' if facts['smooth'] else 'not smooth'} at the cutoff. Options:",
            "",
            *[f"- `{name}`: `{value}`" for name, value in fields.items()],
            "",
        ]
    )
    return join_front_matter(front, body)


def _metrics_row(evaluation: Evaluation) -> dict[str, Any]:
    dataset, _, split = evaluation.dataset.partition("/")
    numbers = {k: round(float(v), 4) for k, v in evaluation.metrics.items() if k in _SHOWN}
    return {"dataset": dataset, "split": split or "all"} | numbers


def _table(evaluations: Sequence[Evaluation]) -> list[str]:
    shown = [key for key in _SHOWN if any(key in e.metrics for e in evaluations)]
    header = ["data", "structures", *(key.replace("_", " ") for key in shown)]
    rows = [header, ["---"] * len(header)]
    for evaluation in evaluations:
        cells = [f"{evaluation.metrics[k]:.2f}" if k in evaluation.metrics else "" for k in shown]
        rows.append([evaluation.dataset, str(evaluation.metrics["num_structures"]), *cells])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _element_table(evaluations: Sequence[Evaluation]) -> list[str]:
    key = "forces_rmse_meV_per_A_by_element"
    having = [e for e in evaluations if key in e.metrics]
    elements = list(dict.fromkeys(symbol for e in having for symbol in e.metrics[key]))
    rows = [["data", *elements], ["---"] * (len(elements) + 1)]
    for e in having:
        cells = [f"{e.metrics[key][s]:.2f}" if s in e.metrics[key] else "" for s in elements]
        rows.append([e.dataset, *cells])
    return ["| " + " | ".join(row) + " |" for row in rows]
