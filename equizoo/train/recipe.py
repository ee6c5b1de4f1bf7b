"""A recipe (one JSON file) to a trained potential: data, reference energies, model, fit, report."""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float

from equizoo.config import format_json, from_dict, parse_json, to_dict
from equizoo.data.catalyst_frames import Target
from equizoo.data.datasets import load_dataset
from equizoo.data.doctor_findings import Finding
from equizoo.data.pipeline import Packing
from equizoo.data.readers import Dataset, LabelKeys
from equizoo.data.reference_energies import IsolatedAtoms, ReferenceEnergies
from equizoo.eval.evaluate import evaluate
from equizoo.eval.plots import learning_curve, parity_plot
from equizoo.eval.potential import Potential
from equizoo.graph import Budget, ForcesOn, Frame
from equizoo.structure import EnergyReference, Structure
from equizoo.train.config import TrainConfig
from equizoo.train.data_checks import DataChecks, check_data
from equizoo.train.loop import Fitted, fit, make_corruptor
from equizoo.train.progress import read_rows
from equizoo.train.report_page import write_report_page
from equizoo.zoo._base import Architecture, ArchitectureConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which frames to train on, to choose the best weights by, and to report."""

    train: str  # name of a data set, or a pattern of names, or a file
    valid: str | None = None  # likewise; None: split off from train
    num_valid: int | None = None  # frames to split off; None: a tenth
    split_seed: int = 0
    test: tuple[str, ...] = ()  # neither trained on nor chosen by
    keys: LabelKeys | None = None  # None: those of the named data set, or the usual ones
    energy_reference: EnergyReference | None = None  # None: that of the data; else converted to it
    target: Target | None = None  # of data of OC20 and OC22; None: that of the named data set
    reference_energies: ReferenceEnergies = IsolatedAtoms()
    checks: DataChecks = DataChecks.REFUSE  # when the doctor finds errors in these data

    def __post_init__(self):
        if self.valid is not None and self.num_valid is not None:
            raise ValueError(
                "Give either valid (a data set) or num_valid (frames split off from train); got "
                f"valid={self.valid!r} and num_valid={self.num_valid}."
            )
        if self.num_valid is not None and self.num_valid < 1:
            raise ValueError(f"num_valid is {self.num_valid}, expected at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. ``model`` may leave out what the data decide: elements, neighbours, scale."""

    name: str
    model: Mapping[str, Any]
    data: DataConfig
    training: TrainConfig


def load_recipe(path: str | Path) -> Recipe:
    """The recipe in a JSON file; ``ValueError`` lists every unknown or mistyped field."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no recipe {path}; expected a JSON file.")
    return from_dict(Recipe, parse_json(path.read_text(), str(path)), str(path))


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Data of a run in memory, split."""

    train: Dataset
    valid: Dataset
    test: Mapping[str, Dataset]

    @property
    def elements(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.train.elements) | set(self.valid.elements)))

    @property
    def reported(self) -> Mapping[str, Dataset]:
        """The sets that errors are reported on, by name."""
        return {"valid": self.valid, **self.test}


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What :func:`train` and fine-tuning return."""

    potential: Potential
    fitted: Fitted
    metrics: Mapping[str, Mapping[str, Any]]  # by data set
    folder: Path


def train(recipe: Recipe, folder: str | Path, *, resume: bool = False) -> RunResult | None:
    """Trains from scratch into ``folder``; ``None`` when stopped by SIGTERM (resume later).

    The folder holds the resolved recipe, checkpoints, metrics, plots, a report, and under
    ``model`` what :func:`equizoo.load` reads. Raises ``ValueError`` for an existing folder without
    ``resume``, for a recipe other than the folder's with it, and for unusable data, also such in
    which the doctor finds errors (unless ``recipe.data.checks`` says otherwise).
    """
    folder = Path(folder)
    data = prepare_data(recipe.data)
    e0 = recipe.data.reference_energies.resolve(_joined(data))
    config = complete_config(recipe.model, data)
    model = config.build(rngs=nnx.Rngs(recipe.training.seed))
    if not resume:
        examine_run(data, recipe.data, config.cutoff)
    # Only now: a mistake in the recipe leaves no folder behind.
    open_run_folder(folder, {"recipe": to_dict(recipe)}, resume)
    return run_fit(model, data, e0, recipe.training, folder, recipe.name)


def open_run_folder(folder: Path, facts: Mapping[str, Any], resume: bool) -> None:
    """Creates a run's folder with ``run.json``, or checks that an existing one is the same run.

    A folder with nothing else in it is that of a run that failed before it began, and free.
    """
    text, path = format_json(facts), folder / "run.json"
    if folder.exists() and any(file != path for file in folder.iterdir()):
        if not resume:
            raise ValueError(
                f"The output folder {folder} exists and is not empty. Choose another, or continue "
                "the run in it with resume."
            )
        if not path.is_file():
            raise ValueError(f"{folder} holds no run ({path.name} is missing); cannot resume it.")
        before = path.read_text()
        if before != text:
            lines = difflib.unified_diff(
                before.splitlines(),
                text.splitlines(),
                "run in the folder",
                "asked for",
                lineterm="",
            )
            raise ValueError(
                f"Resuming {folder} with other settings would not continue the same run:\n"
                + "\n".join(lines)
            )
        return
    if resume:
        raise ValueError(f"There is no run to resume in {folder}.")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def prepare_data(config: DataConfig) -> Prepared:
    """All sets of a configuration, the validation set split off at random where none is named."""

    def load(name: str) -> Dataset:
        return load_dataset(
            name, config.keys, energy_reference=config.energy_reference, target=config.target
        )

    train = load(config.train)
    if config.valid is None:
        train, valid = _split(train, config.num_valid, config.split_seed)
    else:
        valid = load(config.valid)
    return Prepared(train, valid, {name: load(name) for name in config.test})


def examine_run(
    data: Prepared,
    config: DataConfig,
    cutoff: float,  # [Å]
    more: Iterable[Finding] = (),
) -> None:
    """The doctor's checks of a run's data, and ``more``; see :func:`check_data`.

    Frames split off for validation are looked at together with those trained on.
    """
    dataset = data.train if config.valid is not None else _joined(data)
    named = [data.valid] if config.valid is not None else []
    check_data(
        dataset,
        [*named, *data.test.values()],
        config.checks,
        keys=config.keys,
        cutoff=cutoff,
        more=more,
    )


def _split(dataset: Dataset, num_valid: int | None, seed: int) -> tuple[Dataset, Dataset]:
    if num_valid is None:
        num_valid = max(1, len(dataset) // 10)
    cut = len(dataset) - num_valid
    if cut < 1:
        raise ValueError(
            f"num_valid is {num_valid}, but {dataset.name} has {len(dataset)} frames; leave some "
            "to train on."
        )
    order = np.random.default_rng(seed).permutation(len(dataset))
    train, valid = (tuple(dataset.structures[i] for i in part) for part in np.split(order, [cut]))
    return (
        dataclasses.replace(dataset, structures=train),
        dataclasses.replace(dataset, structures=valid),
    )


def complete_config(fields: Mapping[str, Any], data: Prepared) -> ArchitectureConfig:
    """The architecture with what the recipe leaves to the data.

    Elements are those of the data, ``avg_num_neighbors`` is the mean over the training set, and
    ``scale`` (where the architecture has one) the root mean square force of it.
    """
    stand_ins = {"atomic_numbers": list(data.elements), "avg_num_neighbors": 1.0}
    config = from_dict(ArchitectureConfig, stand_ins | dict(fields), "model")
    measured: dict[str, Any] = {}
    if "avg_num_neighbors" not in fields:
        frames = _frames(data.train.structures, config)
        mean = sum(f.num_edges for f in frames) / sum(f.num_nodes for f in frames)
        measured["avg_num_neighbors"] = max(mean, 1.0)
    forces = [s.forces for s in data.train.structures if s.forces is not None]
    if "scale" not in fields and hasattr(config, "scale") and forces:
        measured["scale"] = float(np.sqrt(np.mean(np.concatenate(forces) ** 2)))
    return dataclasses.replace(config, **measured)


def run_fit(
    model: Architecture,
    data: Prepared,
    reference_energies: Mapping[int, float],  # [eV]
    training: TrainConfig,
    folder: Path,
    name: str,
) -> RunResult | None:
    """Fits a model on prepared data, then saves, evaluates and plots; see :func:`train`."""
    config = model.config
    frames = {
        split: _frames(dataset.structures, config)
        for split, dataset in (("train", data.train), ("valid", data.valid))
    }
    packing = make_packing(
        [*frames["train"], *frames["valid"], *_corrupted(frames["train"], config, training)],
        training.batch_size // training.microbatches,
        np.array([reference_energies[z] for z in config.atomic_numbers]),
        training.loss.forces_on,
    )
    fitted = fit(model, frames["train"], frames["valid"], packing, training, folder, name)
    if not fitted.finished:
        return None
    potential = Potential(
        nnx.merge(nnx.graphdef(model), fitted.params),
        reference_energies={z: reference_energies[z] for z in config.atomic_numbers},
        energy_reference=data.train.energy_reference,
        level_of_theory=data.train.level_of_theory,
        name=name,
    )
    if not (folder / "model").exists():
        potential.save(folder / "model")
    evaluations = {where: evaluate(potential, dataset) for where, dataset in data.reported.items()}
    metrics = {where: dict(evaluation.metrics) for where, evaluation in evaluations.items()}
    learning_curve(read_rows(folder / "metrics.jsonl"), folder / "learning_curve.png")
    parity_plot(list(evaluations.values()), folder / "parity.png")
    report = {
        "name": name,
        "metrics": metrics,
        "best_epoch": fitted.best_epoch,
        "epochs": fitted.epochs,
        "hours": round(fitted.seconds / 3600, 3),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    datasets = {"train": data.train, **data.reported}
    write_report_page(folder, name, fitted, datasets, {"": metrics})
    return RunResult(potential, fitted, metrics, folder)


def make_packing(
    frames: Sequence[Frame],
    batch_size: int,
    reference_energies: Float[np.ndarray, " species"],  # [eV]
    forces_on: ForcesOn = ForcesOn.ALL,
) -> Packing:
    """A budget for about ``batch_size`` structures of mean size, that holds any one of ``frames``.

    Small structures may come up to twice as many to a batch.
    """
    nodes = round(batch_size * sum(f.num_nodes for f in frames) / len(frames))
    budget = Budget.of(frames, nodes=nodes, graphs=2 * batch_size)
    return Packing(budget, reference_energies, forces_on=forces_on)


def _frames(structures: Sequence[Structure], config: ArchitectureConfig) -> list[Frame]:
    return [config.frame(structure) for structure in structures]


def _corrupted(
    frames: Sequence[Frame], config: ArchitectureConfig, training: TrainConfig
) -> list[Frame]:
    """Each frame with noise, where the run denoises: batches must have room for such."""
    corruptor = make_corruptor(config, training)
    if corruptor is None:
        return []
    return [corruptor.corrupted(frame, seed) for seed, frame in enumerate(frames)]


def _joined(data: Prepared) -> Dataset:
    return dataclasses.replace(
        data.train, structures=(*data.train.structures, *data.valid.structures)
    )
