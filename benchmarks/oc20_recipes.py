"""Does the loss fall? Every recipe for OC20, for some hundred steps on the sample of relaxations.

    python benchmarks/oc20_recipes.py --out /tmp/oc20 --steps 300 --small

The sample (`oc20_relax`, found by EQUIZOO_DATA) has total energies: reference energies are fitted
by least squares, and the normalisers' mean is left out. Batches and sizes are made small with
`--small`, for a CPU; loss, normalisers' scales, optimiser and the rule for neighbours stay those of
the recipe. One row a recipe: mean training loss of the first and last tenth of the steps, the loss
of a model that knows reference energies alone and predicts no force, and whether all predictions on
the validation frames are finite.
"""

import csv
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from equizoo.data.catalyst_frames import Target
from equizoo.data.datasets import load_dataset
from equizoo.data.readers import Dataset, write_structures
from equizoo.data.reference_energies import LeastSquares, interaction_energy
from equizoo.graph import ForcesOn
from equizoo.train.config import Errors
from equizoo.train.recipe import DataConfig, Recipe, load_recipe, train

RECIPES = Path(__file__).parents[1] / "recipes"
COLUMNS = ("recipe", "epochs", "first_loss", "last_loss", "loss_of_references", "finite")
SMALL: Mapping[str, Mapping[str, Any]] = {
    "mace": {"channels": 8, "l_max": 2, "correlation": 2},
    "equiformer": {
        "irreps": "16x0e+8x1e",
        "head_irreps": "8x0e+4x1e",
        "ffn_irreps": "32x0e+16x1e",
        "output_channels": 32,
        "num_layers": 2,
        "num_heads": 2,
    },
    "equiformer_v2": {
        "channels": 8,
        "hidden_channels": 8,
        "ffn_channels": 8,
        "alpha_channels": 8,
        "value_channels": 4,
        "edge_channels": 8,
        "num_layers": 2,
        "num_heads": 2,
        "l_max": 2,
        "grid_points": 8,
        "num_basis": 32,
    },
    "tdn": {"channels": 8, "num_layers": 2, "num_heads": 2, "num_basis": 16},
}


def on_sample(
    recipe: Recipe,
    folder: Path,
    steps: int,
    small: bool,
    channels: int | None,
    split: Literal["train", "val"],
    most_atoms: int,
) -> Recipe:
    """The recipe with the sample for data, for about ``steps`` steps."""
    relaxed = recipe.data.target == Target.RELAXED
    name = f"oc20_relax/{'is2re_train' if relaxed else f's2ef_{split}'}"
    dataset = load_dataset(name)
    kept = [
        s
        for s in dataset.structures
        if s.num_nodes < most_atoms and (s.forces is None or np.abs(s.forces).max() < 20)
    ][:: 1 if relaxed else 4]
    file = folder / f"{Path(name).name}.xyz"
    if not file.exists():
        write_structures(file, [dataclasses.replace(s, info=_plain(s.info)) for s in kept])
    model = dict(recipe.model)
    for mean in ("offset", "shift"):
        model.pop(mean, None)
    if small:
        model |= SMALL[model["architecture"]]
    if channels is not None:
        model["channels"] = channels
    batch = 2 if small else min(recipe.training.batch_size, 8)
    valid = max(1, len(kept) // 10)
    per_epoch = max(1, (len(kept) - valid) // batch)
    optimizer = dataclasses.replace(recipe.training.optimizer, ema_decay=0.9)
    return dataclasses.replace(
        recipe,
        model=model,
        data=DataConfig(
            train=str(file),
            num_valid=valid,
            reference_energies=LeastSquares(minimum_norm=True),
        ),
        training=dataclasses.replace(
            recipe.training,
            epochs=max(2, steps // per_epoch),
            batch_size=batch,
            optimizer=optimizer,
        ),
    )


def _plain(info: Mapping[str, Any]) -> dict[str, Any]:
    return {key: np.asarray(info[key]) for key in ("fixed", "tags")}


def loss_of_references(recipe: Recipe) -> float:
    """Of the energies that least squares leave over, and of all forces that the loss asks for."""
    dataset, weights = load_dataset(recipe.data.train), recipe.training.loss
    assert weights.errors == Errors.NORMS
    e0 = recipe.data.reference_energies.resolve(dataset, None)
    energies = [interaction_energy(s, e0) for s in dataset.structures]
    parts = [weights.energy * np.mean(np.abs(energies))]
    if weights.forces:
        forces = np.concatenate([
            s.forces[s.free] if weights.forces_on == ForcesOn.FREE else s.forces
            for s in dataset.structures
        ])  # fmt: skip
        parts.append(weights.forces * np.mean(np.linalg.norm(forces, axis=1)))
    return float(sum(parts))


def losses(folder: Path) -> tuple[float, float]:
    """Mean training loss over the first and the last tenth of the epochs (one at least)."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [row["train_loss"] for row in rows]
    part = max(1, len(found) // 10)
    return float(np.mean(found[:part])), float(np.mean(found[-part:]))


def main(
    out: Path,
    steps: int = 300,
    small: bool = False,
    channels: int | None = None,
    split: Literal["train", "val"] = "val",
    most_atoms: int = 80,
    recipes: tuple[str, ...] = (),
) -> None:
    """Tries recipes, and writes what became of each to standard output and OUT/results.csv.

    Args:
        out: folder for the runs; must not exist.
        steps: of training, about.
        small: few channels and layers, batches of two structures.
        channels: as many instead, of architectures that have such a field.
        split: of the frames for S2EF; ``train`` has all elements of the sample.
        most_atoms: larger structures are left out.
        recipes: names; by default all for OC20.
    """
    out.mkdir(parents=True)
    names = recipes or tuple(sorted(path.stem for path in RECIPES.glob("*-oc20-*.json")))
    with open(out / "results.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for name in names:
            recipe = load_recipe(RECIPES / f"{name}.json")
            recipe = on_sample(recipe, out, steps, small, channels, split, most_atoms)
            result = train(recipe, out / name)
            if result is None:
                sys.exit("stopped")
            valid: Dataset = load_dataset(recipe.data.train)
            predictions = result.potential.predict(list(valid.structures[:8]))
            finite = all(np.isfinite(p.energy) and np.isfinite(p.forces).all() for p in predictions)
            both = (*losses(out / name), loss_of_references(recipe))
            row = (name, recipe.training.epochs, *both, finite)
            writer.writerow(row)
            file.flush()
            print(*row, flush=True)


if __name__ == "__main__":
    tyro.cli(main)
