"""Which way of fine-tuning is worth it, with how many frames, and what does each forget?

A released model of one molecule is taken to other molecules, at other levels of theory, and to a
crystal of an element it has not seen, with 10 to some hundred frames of each, and compared with the
same architecture trained from scratch. Every run makes the same number of steps on new frames;
replay makes others besides, on as many old frames (100 at most). A fifth of the frames chooses the
best weights, as a user would have to do.

    python benchmarks/finetuning_curves.py --runs runs/curves
    python benchmarks/finetuning_curves.py --plot-only
    python benchmarks/finetuning_curves.py --methods naive --frames 10 50 --budget 1600

Rows are added to ``results/finetuning_curves.csv`` as soon as they are measured, and rows that are
there are not measured again; ``results/finetuning_curves.png`` is drawn at the end. Errors on old
data are those on ``mace-3bpa/replay``, whose labels are the base model's own: what was forgotten,
and nothing else. Needs the data sets (``EQUIZOO_DATA``).
"""

import csv
import dataclasses
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import tyro

from equizoo.compile_cache import use_compile_cache
from equizoo.config import to_dict
from equizoo.data.datasets import load_dataset
from equizoo.data.reference_energies import LeastSquares, RefitFromModel
from equizoo.eval.benchmark_timing import environment
from equizoo.eval.plots import _STYLE, BLACK, BLUE, GREY, VERMILION
from equizoo.eval.potential import Potential, load
from equizoo.train.config import TrainConfig
from equizoo.train.data_checks import DataChecks
from equizoo.train.finetune import finetune
from equizoo.train.finetune_settings import FinetuneSettings
from equizoo.train.parametrization import LowRank
from equizoo.train.recipe import DataConfig, Recipe, train
from equizoo.train.replay import Replay

RESULTS = Path(__file__).parent / "results" / "finetuning_curves.csv"
BASE = "mace-3bpa"
OLD = "mace-3bpa/replay"


@dataclasses.dataclass(frozen=True)
class Case:
    """New data: where they are, and elements that the base model lacks."""

    train: str
    test: str
    title: str
    new_elements: Mapping[str, str] = dataclasses.field(default_factory=dict)
    checks: DataChecks = DataChecks.REFUSE


CASES = (
    Case("acac/train_300K", "acac/test_MD_300K", "acetylacetone"),
    Case("ethanol_extrap/train", "ethanol_extrap/test_MD", "ethanol"),
    Case("rmd17/toluene_train_01", "rmd17/toluene_test_01", "toluene (rMD17)"),
    # 3 of the 25 published test frames are images of training frames, of which the doctor warns
    Case(
        *("mlearn/Si_train", "mlearn/Si_test", "silicon (mlearn), new element"),
        new_elements={"Si": "C"},
        checks=DataChecks.WARN,
    ),
)
Method = Literal["scratch", "naive", "frozen", "low_rank", "replay"]
METHODS: tuple[Method, ...] = get_args(Method)
LABELS: dict[Method, tuple[str, str]] = {
    "scratch": ("from scratch", GREY),
    "naive": ("all weights", BLUE),
    "frozen": ("first layer frozen", "#009E73"),
    "low_rank": ("low rank 8 (LoRA)", "#CC79A7"),
    "replay": ("replay of as many old ones", VERMILION),
}
TEST_FRAMES = 200  # of each test set, at random; silicon has 25
FROZEN = ("embedding", "layers.0.*")
REPLAYED = "3bpa/train_300K"
MOST_REPLAYED = 100
BUDGET = 400  # steps; the figure shows these runs
BATCH = 2  # frames


@dataclasses.dataclass(frozen=True)
class Row:
    """One run: errors of the test data before (with reference energies refitted) and after."""

    train: str
    method: str
    frames: int  # labelled ones in all
    valid_frames: int  # of them, to choose the best weights by
    steps: int  # all of them
    budget: int  # those asked for, on new frames
    batch_size: int
    seed: int
    forces_rmse_before: float | None  # [meV/Å]
    forces_rmse: float  # [meV/Å]
    energy_rmse_per_atom_before: float | None  # [meV]
    energy_rmse_per_atom: float  # [meV]
    old_forces_rmse: float | None  # [meV/Å], forgotten
    old_energy_rmse_per_atom: float | None  # [meV]
    seconds: float  # compilation included
    device: str
    cores: int
    jax: str
    commit: str

    @property
    def key(self) -> tuple[str, str, int, int, int, int]:
        return (
            *(self.train, self.method, self.frames),
            *(self.seed, self.budget, self.batch_size),
        )


def batches(frames: int, batch_size: int) -> int:
    """In an epoch."""
    return -(-frames // batch_size)


def training(method: Method, frames: int, seed: int, budget: int, batch_size: int) -> TrainConfig:
    """``budget`` steps on ``frames``; from scratch the optimiser is the same but for its rate."""
    return FinetuneSettings(
        epochs=max(1, round(budget / batches(frames, batch_size))),
        learning_rate=0.012 if method == "scratch" else None,
        batch_size=batch_size,
        frozen=FROZEN if method == "frozen" else (),
        low_rank=LowRank(rank=8) if method == "low_rank" else None,
        seed=seed,
    ).for_frames(frames)


def measure(base: Potential, case: Case, method: Method, frames: int, seed: int, budget: int,
            batch_size: int, folder: Path) -> Row:  # fmt: skip
    """One run in ``folder``."""
    valid = max(2, frames // 5)
    data = DataConfig(
        train=case.train,
        num_valid=valid,
        num_train=frames - valid,
        split_seed=seed,
        test=(case.test,),
        num_test=TEST_FRAMES,
        checks=case.checks,
        reference_energies=LeastSquares(minimum_norm=True)
        if method == "scratch"
        else RefitFromModel(),
    )
    config = training(method, frames - valid, seed, budget, batch_size)
    replayed = min(frames - valid, MOST_REPLAYED) if method == "replay" else 0
    before: Mapping[str, Mapping[str, Any]] = {}
    started = time.perf_counter()
    if method == "scratch":
        fields = to_dict(base.config)
        for decided_by_data in ("atomic_numbers", "avg_num_neighbors", "scale"):
            fields.pop(decided_by_data, None)
        run = train(Recipe(name="scratch", model=fields, data=data, training=config), folder)
        after = None if run is None else run.metrics
    else:
        tuned = finetune(
            base,
            data,
            folder,
            training=config,
            old=(OLD,),
            replay=Replay(data=REPLAYED, count=replayed) if replayed else None,
            new_elements=case.new_elements,
        )
        after = None if tuned is None else tuned.after
        before = {} if tuned is None else tuned.before
    if after is None:
        sys.exit("stopped")
    machine = environment()
    forces, energy = "forces_rmse_meV_per_A", "energy_rmse_meV_per_atom"
    return Row(
        train=case.train,
        method=method,
        frames=frames,
        valid_frames=valid,
        steps=config.epochs * batches(frames - valid + replayed, batch_size),
        budget=budget,
        batch_size=batch_size,
        seed=seed,
        forces_rmse_before=before.get(case.test, {}).get(forces),
        forces_rmse=after[case.test][forces],
        energy_rmse_per_atom_before=before.get(case.test, {}).get(energy),
        energy_rmse_per_atom=after[case.test][energy],
        old_forces_rmse=after.get(OLD, {}).get(forces),
        old_energy_rmse_per_atom=after.get(OLD, {}).get(energy),
        seconds=round(time.perf_counter() - started, 1),
        device=machine.device,
        cores=machine.cores,
        jax=machine.jax,
        commit=machine.commit,
    )


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file that :func:`main` wrote."""
    if not path.exists():
        return
    types = {field.name: field.type for field in dataclasses.fields(Row)}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            yield Row(**{key: _parsed(value, types[key]) for key, value in row.items()})


def _parsed(text: str, kind: Any) -> Any:
    if kind in (str, int):
        return kind(text)
    return float(text) if text else None


def draw(rows: list[Row], path: Path) -> None:
    """Force errors on new data above, on old data below, against the number of frames."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in rows if (row.budget, row.batch_size) == (BUDGET, BATCH)]
    cases = [case for case in CASES if any(row.train == case.train for row in rows)]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.1 * len(cases), 5.4), layout="constrained")
        axes = figure.subplots(2, len(cases), squeeze=False, sharex="col", height_ratios=(3, 2))
        for case, (above, below) in zip(cases, axes.T, strict=True):
            mine = [row for row in rows if row.train == case.train]
            for method in METHODS:
                label, color = LABELS[method]
                runs = sorted((r for r in mine if r.method == method), key=lambda r: r.frames)
                style: Any = dict(color=color, marker="o", markersize=4, linewidth=1.3)
                above.plot([r.frames for r in runs], [r.forces_rmse for r in runs],
                           label=label, **style)  # fmt: skip
                old = [r for r in runs if r.old_forces_rmse is not None]
                if old:
                    below.plot([r.frames for r in old], [r.old_forces_rmse for r in old], **style)
            before = next((r.forces_rmse_before for r in mine if r.forces_rmse_before), None)
            if before is not None:
                above.axhline(before, color=BLACK, linewidth=0.9, linestyle=":", label="before")
            for ax in (above, below):
                ax.set(xscale="log", yscale="log")
                ax.set_xticks(sorted({row.frames for row in mine}))
                ax.xaxis.set_major_formatter("{x:g}")
                ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
                ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
                ax.yaxis.set_major_formatter("{x:g}")
                ax.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
            above.set_title(case.title)
            below.set_xlabel("labelled frames")
        axes[0, 0].set_ylabel("force RMSE, new data [meV/Å]")
        axes[1, 0].set_ylabel("forgotten: force RMSE,\nold data [meV/Å]")
        lines = {line.get_label(): line for line in axes[0, 0].get_lines()}
        figure.legend(lines.values(), lines, loc="outside upper center", ncols=len(lines))
        figure.savefig(path)


def main(
    runs: Path = Path("runs/finetuning_curves"),
    budget: int = BUDGET,
    batch_size: int = BATCH,
    frames: tuple[int, ...] = (10, 50, 200, 500),
    cases: tuple[str, ...] = (),
    methods: tuple[Method, ...] = METHODS,
    seed: int = 0,
    out: Path = RESULTS,
    plot_only: bool = False,
) -> None:
    """Measures what is missing, then draws.

    Raises ``ValueError`` for ``cases`` that are none.

    Args:
        runs: folder for runs; each is removed when its row has been written.
        budget: steps of every run on new frames.
        batch_size: frames in a step.
        frames: labelled frames in all; sets that have fewer give all they have.
        cases: training sets, by default all.
        methods: ways to train.
        seed: of the choice of frames, of shuffling and of weights from scratch.
        out: table; the figure is written beside it.
        plot_only: draw what has been measured.
    """
    use_compile_cache()
    known = [case.train for case in CASES]
    if unknown := set(cases) - set(known):
        raise ValueError(f"cases {sorted(unknown)} are unknown, expected some of {known}.")
    rows = list(read_rows(out))
    base = load(BASE)
    for case in () if plot_only else CASES:
        if cases and case.train not in cases:
            continue
        available = len(load_dataset(case.train))
        for count in sorted({min(count, available) for count in frames}):
            for method in methods:
                key = (case.train, method, count, seed, budget, batch_size)
                if key in {row.key for row in rows}:
                    continue
                folder = runs / "-".join(map(str, key)).replace("/", "_")
                shutil.rmtree(folder, ignore_errors=True)
                row = measure(base, case, method, count, seed, budget, batch_size, folder)
                rows.append(row)
                _append(out, row)
                shutil.rmtree(folder)
                print(*row.key, f"{row.forces_rmse:.1f} meV/Å in {row.seconds:.0f} s", flush=True)
    draw(rows, out.with_suffix(".png"))


def _append(path: Path, row: Row) -> None:
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, dataclasses.asdict(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(dataclasses.asdict(row))


if __name__ == "__main__":
    tyro.cli(main)
