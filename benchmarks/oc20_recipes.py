"""Does the loss fall? Every recipe for OC20, for some hundred steps on the sample of relaxations.

    python benchmarks/oc20_recipes.py --runs /tmp/oc20 --small

The sample (`oc20_relax`, found by EQUIZOO_DATA) has total energies: reference energies are fitted
by least squares, and the normalisers' mean is left out. Those for IS2RE are fitted to all frames of
the relaxations, since 23 relaxed energies alone can be fitted exactly. Batches and sizes are made
small with `--small`, for a CPU; loss, normalisers' scales, optimiser and the rule for neighbours
stay those of the recipe. One row a recipe, in ``results/oc20_recipes.csv``: training loss of the
first and of the last epoch (with noise where the recipe denoises); on the training frames without
noise the loss of the trained model, next to that of one which knows reference energies alone and
predicts no force; and whether all its predictions there are finite. Frames with a force above
5 eV/Å are left out: a mean over some hundred frames would be theirs.
"""

import csv
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from ase.data import chemical_symbols
from flax import nnx

from equizoo.data.catalyst_frames import Target
from equizoo.data.datasets import load_dataset
from equizoo.data.readers import write_structures
from equizoo.data.reference_energies import Given, LeastSquares, interaction_energy
from equizoo.eval.benchmark_timing import environment
from equizoo.graph import ForcesOn
from equizoo.structure import Structure
from equizoo.train.config import Errors, LossWeights
from equizoo.train.recipe import DataConfig, Recipe, load_recipe, train

RECIPES = Path(__file__).parents[1] / "recipes"
RESULTS = Path(__file__).parent / "results" / "oc20_recipes.csv"
COLUMNS = ("recipe", "architecture", "parameters", "frames", "steps", "batch")
COLUMNS += ("loss_first_epoch", "loss_last_epoch", "loss_of_references", "loss_after", "finite")
COLUMNS += ("device", "jax", "commit")
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
        "channels": 32,
        "hidden_channels": 32,
        "ffn_channels": 32,
        "alpha_channels": 16,
        "value_channels": 16,
        "edge_channels": 32,
        "num_layers": 2,
        "num_heads": 2,
        "l_max": 2,
        "grid_points": 8,
        "num_basis": 32,
    },
    "tdn": {"channels": 32, "num_layers": 2, "num_heads": 2, "num_basis": 16},
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
        if s.num_nodes < most_atoms and (s.forces is None or _largest(s.forces) < 5)
    ]
    parts = divided(kept if relaxed else kept[::4])
    files = [folder / f"{Path(name).name}_{part}.xyz" for part in ("train", "valid")]
    for file, structures in zip(files, parts, strict=True):
        if not file.exists():
            write_structures(
                file, [dataclasses.replace(s, info=_plain(s.info)) for s in structures]
            )
    model = dict(recipe.model)
    for mean in ("offset", "shift"):
        model.pop(mean, None)
    if small:
        model |= SMALL[model["architecture"]]
    if channels is not None:
        model["channels"] = channels
    batch = 2 if small else min(recipe.training.batch_size, 8)
    per_epoch = max(1, len(parts[0]) // batch)
    optimizer = dataclasses.replace(recipe.training.optimizer, ema_decay=0.9)
    return dataclasses.replace(
        recipe,
        model=model,
        data=DataConfig(
            train=str(files[0]),
            valid=str(files[1]),
            reference_energies=of_all_frames() if relaxed else LeastSquares(minimum_norm=True),
        ),
        training=dataclasses.replace(
            recipe.training,
            epochs=max(2, steps // per_epoch),
            batch_size=batch,
            optimizer=optimizer,
        ),
    )


def divided(structures: Sequence[Structure]) -> tuple[list[Structure], list[Structure]]:
    """Frames to train on, and a tenth to validate by, whose elements are all among the others'."""
    train, valid = list(structures), []
    for structure in structures:
        others = [s for s in train if s is not structure]
        seen = {z for s in others for z in s.atomic_numbers.tolist()}
        if len(valid) < len(structures) // 10 and seen.issuperset(structure.atomic_numbers):
            train, valid = others, [*valid, structure]
    return train, valid


def of_all_frames() -> Given:
    """Reference energies by least squares on every frame of the sample."""
    dataset = load_dataset("oc20_relax/s2ef_*")
    energies = LeastSquares(minimum_norm=True).resolve(dataset)
    return Given({chemical_symbols[z]: energy for z, energy in energies.items()})


def _largest(forces: np.ndarray) -> float:
    return float(np.linalg.norm(forces, axis=1).max())


def _plain(info: Mapping[str, Any]) -> dict[str, Any]:
    return {key: np.asarray(info[key]) for key in ("fixed", "tags")}


def loss_of(
    weights: LossWeights,
    structures: Sequence[Structure],
    energies: Sequence[float],
    forces: Sequence[np.ndarray],
) -> float:
    """The loss, in norms, of energies [eV] and forces [eV/Å] predicted for labelled structures."""
    assert weights.errors == Errors.NORMS
    errors = [e - s.energy for s, e in zip(structures, energies, strict=True)]
    value = weights.energy * np.mean(np.abs(errors))
    if weights.forces:
        differences = [
            (f - s.forces)[s.free if weights.forces_on == ForcesOn.FREE else slice(None)]
            for s, f in zip(structures, forces, strict=True)
        ]
        norms = np.linalg.norm(np.concatenate(differences), axis=1)
        value += weights.forces * np.mean(norms)
    return float(value)


def tried(name: str, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Trains, and says what became of it."""
    result = train(recipe, folder)
    if result is None:
        sys.exit("stopped")
    dataset, weights = load_dataset(recipe.data.train), recipe.training.loss
    structures = dataset.structures
    predictions = result.potential.predict(structures)
    e0 = recipe.data.reference_energies.resolve(dataset, None)
    alone = [s.energy - interaction_energy(s, e0) for s in structures]
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    machine = environment()
    values = (
        name,
        recipe.model["architecture"],
        sum(leaf.size for leaf in jax.tree.leaves(nnx.state(result.potential.model, nnx.Param))),
        len(structures),
        history[-1]["step"],
        recipe.training.batch_size,
        history[0]["train_loss"],
        history[-1]["train_loss"],
        loss_of(weights, structures, alone, [np.zeros_like(s.positions) for s in structures]),
        loss_of(
            weights, structures, [p.energy for p in predictions], [p.forces for p in predictions]
        ),
        all(np.isfinite(p.energy) and np.isfinite(p.forces).all() for p in predictions),
        machine.device,
        machine.jax,
        machine.commit,
    )
    return dict(zip(COLUMNS, values, strict=True))


def main(
    runs: Path,
    steps: int = 1000,
    small: bool = False,
    channels: int | None = None,
    split: Literal["train", "val"] = "val",
    most_atoms: int = 80,
    recipes: tuple[str, ...] = (),
    out: Path = RESULTS,
) -> None:
    """Tries recipes, and writes a row for each as soon as it is there.

    Args:
        runs: folder for the runs; must not exist.
        steps: of training, about.
        small: few channels and layers, batches of two structures.
        channels: as many instead, of architectures that have such a field.
        split: of the frames for S2EF; ``train`` has all elements of the sample.
        most_atoms: larger structures are left out.
        recipes: names; by default all for OC20.
        out: table; written anew.
    """
    runs.mkdir(parents=True)
    names = recipes or tuple(sorted(path.stem for path in RECIPES.glob("*-oc20-*.json")))
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for name in names:
            recipe = load_recipe(RECIPES / f"{name}.json")
            recipe = on_sample(recipe, runs, steps, small, channels, split, most_atoms)
            row = tried(name, recipe, runs / name)
            shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(shown)
            file.flush()
            print(*shown.values(), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
