"""A recipe (one JSON file) to a trained potential: data, reference energies, model, fit, report."""

import dataclasses
import functools
import json
import operator
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float

from equizoo.config import from_dict, parse_json, to_dict
from equizoo.data.catalyst_frames import Target
from equizoo.data.datasets import load_dataset
from equizoo.data.doctor_findings import Finding
from equizoo.data.pipeline import THREADS, LazyFrames, Packing, Reading, typical_budget
from equizoo.data.prepared import chain, is_lazy, selection
from equizoo.data.readers import Dataset, LabelKeys
from equizoo.data.reference_energies import IsolatedAtoms, ReferenceEnergies, require_elements
from equizoo.data.statistics import Counting, NeighborRule, Sizes, Statistics
from equizoo.eval.evaluate import evaluate
from equizoo.eval.plots import learning_curve, parity_plot
from equizoo.eval.potential import Potential, load
from equizoo.graph import Budget, ForcesOn, Frame, make_frame
from equizoo.neighbors import Neighbors
from equizoo.structure import EnergyReference, Structure, symbols
from equizoo.train.config import TrainConfig
from equizoo.train.data_checks import DataChecks, check_data, without
from equizoo.train.hosts import is_first, on_first, stoppable
from equizoo.train.loop import Fitted, fit, make_corruptor
from equizoo.train.progress import BOARDS, Board, read_rows
from equizoo.train.report_page import write_report_page
from equizoo.train.run_folder import FRAMES, data_facts, open_run_folder, require_usable
from equizoo.whole_files import written_whole
from equizoo.zoo._base import ArchitectureConfig

_CORRUPTED_SAMPLE = 1000  # frames of prepared data that show what room noise takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which frames to train on, to choose the best weights by, and to report."""

    train: str  # name of a data set, or a pattern of names, or a file
    valid: str | None = None  # likewise; None: split off from train
    num_valid: int | None = None  # frames to split off; None: a tenth
    without: tuple[str, ...] = ()  # sets whose frames, also by symmetry, are left out of train
    num_train: int | None = None  # of those left, at random: fewer are among more; None: all
    split_seed: int = 0
    test: tuple[str, ...] = ()  # neither trained on nor chosen by
    num_test: int | None = None  # at most, of each of these, at random; None: all
    keys: LabelKeys | None = None  # None: those of the named data set, or the usual ones
    energy_reference: EnergyReference | None = None  # None: that of the data; else converted to it
    data_energy_reference: EnergyReference | None = None  # of files that do not say it
    adsorption_references: str | None = None  # oc20_ref.pkl, for what converting needs
    target: Target | None = None  # of data of OC20 and OC22; None: that of the named data set
    reference_energies: ReferenceEnergies = IsolatedAtoms()
    checks: DataChecks = DataChecks.REFUSE  # when the doctor finds errors in these data

    def __post_init__(self):
        if self.valid is not None and self.num_valid is not None:
            raise ValueError(
                "Give either valid (a data set) or num_valid (frames split off from train); got "
                f"valid={self.valid!r} and num_valid={self.num_valid}."
            )
        for name in ("num_valid", "num_train", "num_test"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} is {count}, expected at least 1.")


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
    """Data of a run, split; in memory, or opened where they were prepared."""

    train: Dataset
    valid: Dataset
    test: Mapping[str, Dataset]
    replayed: Dataset | None = None  # also trained on, under a head of its own

    @property
    def elements(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.train.elements) | set(self.valid.elements)))

    @property
    def reported(self) -> Mapping[str, Dataset]:
        """The sets that errors are reported on, by name."""
        return {"valid": self.valid, **self.test}

    @property
    def parts(self) -> Mapping[str, Dataset]:
        """All of them, by what they are for or by name."""
        replayed = {} if self.replayed is None else {"replayed": self.replayed}
        return {"train": self.train, **replayed, **self.reported}


@dataclasses.dataclass(frozen=True)
class Baseline:
    """What the report of a fine-tuning compares its model with."""

    before: Mapping[str, Mapping[str, Any]]  # the base model's metrics, by data set
    remembered: Mapping[str, Dataset]  # of the base model's kind: where forgetting shows
    on_remembered: Callable[[Potential], Potential]  # the fitted model as it answers on those


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What :func:`train` and fine-tuning return."""

    potential: Potential
    fitted: Fitted
    metrics: Mapping[str, Mapping[str, Any]]  # by data set, those remembered included
    folder: Path


@stoppable
def train(
    recipe: Recipe,
    folder: str | Path,
    *,
    resume: bool = False,
    reading: Reading = THREADS,
    boards: Sequence[Board] = BOARDS,
) -> RunResult | None:
    """Trains from scratch into ``folder``; ``None`` when stopped by SIGTERM (resume later).

    The folder holds the resolved recipe, checkpoints, metrics, plots, a report, and under
    ``model`` what :func:`equizoo.load` reads. Raises ``ValueError`` for an existing folder without
    ``resume``, for other settings or data than the folder's with it
    (:mod:`equizoo.train.run_folder`), for a folder that cannot be written, and for unusable data,
    also such in which the doctor finds errors (unless ``recipe.data.checks`` says otherwise).

    Of several processes (:mod:`equizoo.train.hosts`) all call this, and the first writes.
    """
    folder = Path(folder)
    on_first(lambda: require_usable(folder, resume))
    data = prepare_data(recipe.data)
    start = untrained(recipe, data)

    def begin() -> None:
        if not resume:
            examine_run(data, recipe.data, start.config.cutoff)
        # Only now: a mistake in the recipe leaves no folder behind.
        frames = data_facts({"train": data.train, "valid": data.valid})
        open_run_folder(folder, {"recipe": to_dict(recipe), FRAMES: frames}, resume)

    on_first(begin)
    return run_fit(start, data, recipe.training, folder, reading, boards)


def untrained(recipe: Recipe, data: Prepared) -> Potential:
    """The recipe's model with random weights, and the data's energies of atoms.

    Raises ``ValueError`` for elements of the model without such an energy, and for elements of a
    named set that no frame to train on has; those of frames split off are warned of. (Of prepared
    data the elements are those of the whole folder.)
    """
    _require_trained_elements(data, named=recipe.data.valid is not None)
    e0 = recipe.data.reference_energies.resolve(_joined(data))
    config = complete_config(recipe.model, data)
    require_elements(e0, config.atomic_numbers, "the model", " Leave out its atomic_numbers.")
    return Potential(
        config.build(rngs=nnx.Rngs(recipe.training.seed)),
        reference_energies={z: e0[z] for z in config.atomic_numbers},
        energy_reference=data.train.energy_reference,
        level_of_theory=data.train.level_of_theory,
        name=recipe.name,
    )


def _require_trained_elements(data: Prepared, named: bool) -> None:
    for part, dataset in data.reported.items():
        unseen = sorted(set(dataset.elements) - set(data.train.elements))
        if not unseen:
            continue
        message = f"{symbols(unseen)}: in {part} data, but in no frame to train on. "
        if part == "valid" and not named:
            warnings.warn(
                f"{message}Weights of such elements stay random, and errors on them count in the "
                "choice of the best; another split_seed may divide the frames better.",
                stacklevel=5,
            )
            continue
        raise ValueError(
            f"{message}Neither weights nor reference energies of such elements can be learned: "
            f"train on frames that have them, or leave {dataset.name or part}'s out."
        )


def prepare_data(config: DataConfig) -> Prepared:
    """All sets of a configuration, the validation set split off at random where none is named."""

    def load(name: str) -> Dataset:
        return load_dataset(
            name,
            config.keys,
            energy_reference=config.energy_reference,
            data_energy_reference=config.data_energy_reference,
            adsorption_references=config.adsorption_references,
            target=config.target,
        )

    train = load(config.train)
    named = {name: load(name) for name in dict.fromkeys((*config.test, *config.without))}
    train = without(train, [named[name] for name in config.without])
    if config.valid is None:
        train, valid = _split(train, config.num_valid, config.split_seed)
    else:
        valid = load(config.valid)
    if config.num_train is not None and config.num_train > len(train):
        raise ValueError(
            f"num_train is {config.num_train}, but {train.name} has {len(train)} frames to train "
            "on; ask for fewer, or leave it out for all."
        )
    train = _sample(train, config.num_train, config.split_seed)
    test = {name: _sample(named[name], config.num_test, config.split_seed) for name in config.test}
    return Prepared(train, valid, test)


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
    train, valid = (selection(dataset.structures, part) for part in np.split(order, [cut]))
    return (
        dataclasses.replace(dataset, structures=train),
        dataclasses.replace(dataset, structures=valid),
    )


def _sample(dataset: Dataset, count: int | None, seed: int) -> Dataset:
    """At most ``count`` frames at random, in a fixed order of which fewer are the beginning."""
    if count is None:
        return dataset
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:count]
    return dataclasses.replace(dataset, structures=selection(dataset.structures, chosen))


def complete_config(fields: Mapping[str, Any], data: Prepared) -> ArchitectureConfig:
    """The architecture with what the recipe leaves to the data.

    Elements are those of the data, ``avg_num_neighbors`` is the mean over the training set, and
    ``scale`` (where the architecture has one) the root mean square force of it. Of prepared data
    they are those of the whole folder, validation frames split off from it included.
    """
    stand_ins = {"atomic_numbers": list(data.elements), "avg_num_neighbors": 1.0}
    config = from_dict(ArchitectureConfig, stand_ins | dict(fields), "model")
    measured: dict[str, Any] = {}
    if "avg_num_neighbors" not in fields:
        measured["avg_num_neighbors"] = max(_sizes(data.train, config).mean_neighbors, 1.0)
    scale = _forces_rms(data.train)
    if "scale" not in fields and hasattr(config, "scale") and scale is not None:
        measured["scale"] = scale
    return dataclasses.replace(config, **measured)


def run_fit(
    start: Potential,
    data: Prepared,
    training: TrainConfig,
    folder: Path,
    reading: Reading = THREADS,
    boards: Sequence[Board] = BOARDS,
    baseline: Baseline | None = None,
) -> RunResult | None:
    """Fits a model on prepared data, then saves, evaluates, plots and reports; see :func:`train`.

    With a ``baseline`` errors before and after stand side by side in the report.
    """
    name = start.name
    frames, valid, packing = packed(start, data, training)
    fitted = fit(start.model, frames, valid, packing, training, folder, name, reading, boards)
    if not fitted.finished:
        return None
    potential = start.with_parameters(fitted.params, name)
    if is_first():
        _save(potential, folder / "model")
    evaluations = {where: evaluate(potential, dataset) for where, dataset in data.reported.items()}
    metrics = {where: dict(evaluation.metrics) for where, evaluation in evaluations.items()}
    remembered: dict[str, dict[str, Any]] = {}
    if baseline is not None:
        remembered = errors_on(baseline.on_remembered(potential), baseline.remembered)
    run = RunResult(potential, fitted, metrics | remembered, folder)
    if not is_first():
        return run
    learning_curve(read_rows(folder / "metrics.jsonl"), folder / "learning_curve.png")
    parity_plot(list(evaluations.values()), folder / "parity.png")
    report = {
        "name": name,
        "metrics": metrics,
        "best_epoch": fitted.best_epoch,
        "epochs": fitted.epochs,
        "hours": round(fitted.seconds / 3600, 3),
    }
    if baseline is None:
        write_report_page(folder, name, fitted, data.parts, {"": metrics})
    else:
        errors = {"before": baseline.before, "after": run.metrics}
        report |= {stage: dict(found) for stage, found in errors.items()}
        datasets = {**data.parts, **baseline.remembered}
        write_report_page(folder, name, fitted, datasets, errors, baseline.remembered)
    with written_whole(folder / "report.json") as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return run


def _save(potential: Potential, folder: Path) -> None:
    """Written, unless the very model is there; that of a shorter run makes room."""
    if folder.exists():
        if load(folder, check_golden=False).model_sha256() == potential.model_sha256():
            return
        shutil.rmtree(folder)
    potential.save(folder)


def errors_on(potential: Potential, datasets: Mapping[str, Dataset]) -> dict[str, dict[str, Any]]:
    """Metrics by data set."""
    return {name: dict(evaluate(potential, dataset).metrics) for name, dataset in datasets.items()}


def packed(
    start: Potential, data: Prepared, training: TrainConfig
) -> tuple[Sequence[Frame], Sequence[Frame], Packing]:
    """Frames to train on and to validate on, and how batches of either are packed."""
    config = start.config
    parts = [data.train] if data.replayed is None else [data.train, data.replayed]
    frames = _frames(chain([part.structures for part in parts]), config)
    valid = _frames(data.valid.structures, config)
    if isinstance(frames, LazyFrames) or isinstance(valid, LazyFrames):
        every = (_sizes(part, config) for part in (*parts, data.valid))
        sizes = functools.reduce(operator.add, every)
    else:  # made already
        sizes = Sizes.of([*frames, *valid])
    packing = make_packing(
        sizes + Sizes.of(_corrupted(frames, config, training)),
        training.batch_size // training.microbatches,
        start.isolated_energies,
        training.loss.forces_on,
        config.cost_of_flat,
    )
    return frames, valid, packing


def make_packing(
    frames: Sequence[Frame] | Sizes,
    batch_size: int,
    reference_energies: Float[np.ndarray, "*heads species"],  # [eV]
    forces_on: ForcesOn = ForcesOn.ALL,
    cost_of_flat: float = Budget.COST_OF_FLAT,  # see ArchitectureConfig.cost_of_flat
) -> Packing:
    """A :func:`typical_budget` for frames of these sizes, that holds any one of them."""
    sizes = frames if isinstance(frames, Sizes) else Sizes.of(frames)
    budget = typical_budget(sizes, batch_size, cost_of_flat)
    return Packing(budget, reference_energies, forces_on=forces_on)


def _frames(structures: Sequence[Structure], config: ArchitectureConfig) -> Sequence[Frame]:
    if is_lazy(structures):
        make = functools.partial(_frame, config)
        return LazyFrames(structures, make, NeighborRule(config.cutoff, config.limit))
    return [_frame(config, structure) for structure in structures]


def _frame(
    config: ArchitectureConfig, structure: Structure, neighbors: Neighbors | None = None
) -> Frame:
    head = structure.head if len(config.heads) > 1 else None
    return config.frame(structure, head, neighbors=neighbors)


def _sizes(dataset: Dataset, config: ArchitectureConfig) -> Sizes:
    """Sizes of the frames that the model sees, from the statistics of prepared data where those
    are for its neighbours."""
    rule, known = NeighborRule(config.cutoff, config.limit), dataset.statistics
    if known is not None and known.rule == rule:
        return known.sizes
    if known is not None:
        return _counted_sizes(dataset, rule)
    return Sizes.of(_frames(dataset.structures, config))


@functools.lru_cache(maxsize=8)  # a data set is itself alone
def _counted_sizes(dataset: Dataset, rule: NeighborRule) -> Sizes:
    assert dataset.statistics is not None
    limit = "" if rule.limit is None else f" --max-neighbors {rule.limit.count}"
    warnings.warn(
        f"{dataset.name} was prepared with neighbours {dataset.statistics.rule}; the model's are "
        f"those {rule}. All {len(dataset)} frames are gone through to count them. To save that, "
        f"prepare the data with --cutoff {rule.cutoff:g}{limit}.",
        stacklevel=2,
    )
    structures = dataset.structures
    return Sizes.of(
        make_frame(structure, rule.cutoff, dataset.elements, limit=rule.limit)
        for structure in structures
    )


def _forces_rms(dataset: Dataset) -> float | None:  # [eV/Å]
    if dataset.statistics is not None:
        return dataset.statistics.forces_rms
    forces = [s.forces for s in dataset.structures if s.forces is not None]
    return float(np.sqrt(np.mean(np.concatenate(forces) ** 2))) if forces else None


def _corrupted(
    frames: Sequence[Frame], config: ArchitectureConfig, training: TrainConfig
) -> list[Frame]:
    """Frames with noise, where the run denoises: batches must have room for such. Of frames on a
    disk a sample."""
    corruptor = make_corruptor(config, training)
    if corruptor is None:
        return []
    every = -(-len(frames) // _CORRUPTED_SAMPLE) if isinstance(frames, LazyFrames) else 1
    return [corruptor.corrupted(frame, seed) for seed, frame in enumerate(frames[::every])]


def _joined(data: Prepared) -> Dataset:
    """Training and validation data together, for reference energies."""
    both = data.train, data.valid
    structures = chain([part.structures for part in both])
    known = [part.statistics for part in both if part.statistics is not None]
    if not known:
        return dataclasses.replace(data.train, structures=structures)
    statistics = known[0]
    split_off = len(known) == 2 and known[1] is known[0]  # then they are of both already
    if not split_off:
        first, second = (_statistics(part, known[0].rule) for part in both)
        statistics = first + second
    return dataclasses.replace(data.train, structures=structures, statistics=statistics)


def _statistics(dataset: Dataset, rule: NeighborRule) -> Statistics:
    """Those of prepared data, or counted; whose neighbours they are does not matter here."""
    if dataset.statistics is not None:
        return dataclasses.replace(dataset.statistics, rule=rule)
    counting = Counting(rule)
    for structure in dataset.structures:
        counting.add(make_frame(structure, rule.cutoff, dataset.elements, limit=rule.limit))
    return counting.result()
