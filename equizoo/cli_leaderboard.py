"""The commands ``equizoo leaderboard ...``: files for OC20 and OC22, their check, local scores."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from equizoo.cli import DataReference, DType, Json, _emit, _escape, _print_facts
from equizoo.compile_cache import use_compile_cache
from equizoo.eval.leaderboard_tasks import TASKS, Kind, Layout, Task
from equizoo.structure import EnergyReference

Part = Annotated[
    Literal["test", "val"], tyro.conf.arg(help="which splits of the data, and which counts")
]
Counts = Annotated[
    Path | None,
    tyro.conf.arg(help='JSON {"id": 10, ...}: sizes of another arrangement than the official one'),
]
LayoutOption = Annotated[
    Annotated[Layout, tyro.conf.EnumChoicesFromValues] | None,
    tyro.conf.arg(
        help="space: order of the data, all atoms; evalai: sorted ids, free atoms (default: space "
        "for OC20, evalai for OC22)"
    ),
]


@dataclasses.dataclass(frozen=True)
class Run:
    """What all predictions for leaderboards take."""

    out: Annotated[
        Path, tyro.conf.arg(help="the .npz file; its parts are kept beside it, in OUT.parts")
    ]
    layout: LayoutOption = None
    part: Part = "test"
    counts: Counts = None
    data_energy_reference: DataReference = None
    references: Annotated[
        Path | None,
        tyro.conf.arg(help="oc20_ref.pkl, to turn a model's total energies into adsorption ones"),
    ] = None
    share: Annotated[
        tuple[int, int],
        tyro.conf.arg(help="i n: only every n-th part from the i-th on, for n processes"),
    ] = (0, 1)
    part_size: Annotated[
        int | None,
        tyro.conf.arg(
            help="systems in a part, which are lost when a run is killed in it (default: 1024; "
            "for relaxations ten batches)"
        ),
    ] = None
    batch_nodes: Annotated[int, tyro.conf.arg(help="atoms in a batch, padding included")] = 512
    dtype: DType = "float32"
    json: Json = None


def _s2ef(task: Task) -> Callable[..., None]:
    def command(
        name: tyro.conf.Positional[str], data: tyro.conf.Positional[Path], run: Run
    ) -> None:
        from equizoo.eval.leaderboard_parts import SinglePoint
        from equizoo.eval.potential import load

        predictor = SinglePoint(
            load(name), forces=True, dtype=run.dtype, batch_nodes=run.batch_nodes
        )
        _predict(task, predictor, data, run)

    command.__doc__ = f"""The file for {task.name}: energies and forces of all frames.

    A run that was stopped goes on where it was: give the same command again.

    Args:
        name: a model of the zoo, or a model folder.
        data: folder with one folder for each of the splits {", ".join(task.splits)}, named so or
            test_..., val_...; in any layout that OC20 and OC22 were released in.
    """
    return command


@dataclasses.dataclass(frozen=True)
class Relaxation:
    """How structures are relaxed."""

    optimizer: Annotated[
        Literal["lbfgs", "fire"], tyro.conf.arg(help="L-BFGS, or FIRE, which is slower and safer")
    ] = "lbfgs"
    fmax: Annotated[
        float, tyro.conf.arg(help="largest force on a free atom at the end, in eV/Å")
    ] = 0.02
    max_steps: int = 300
    skin: Annotated[
        float | None,
        tyro.conf.arg(
            help="in Å: neighbours are found anew after half of it (default: 0 on a CPU, else 0.5)"
        ),
    ] = None


def _is2re(task: Task) -> Callable[..., None]:
    def command(
        name: tyro.conf.Positional[str],
        data: tyro.conf.Positional[Path],
        run: Run,
        relaxation: Relaxation,
        by: Literal["relaxation", "direct"] = "relaxation",
    ) -> None:
        from equizoo.eval.leaderboard_parts import Predictor, SinglePoint
        from equizoo.eval.potential import load

        potential = load(name)
        predictor: Predictor
        if by == "direct":
            predictor = SinglePoint(
                potential, forces=False, dtype=run.dtype, batch_nodes=run.batch_nodes
            )
        else:
            predictor = _by_relaxation(potential, run, relaxation, positions=False)
        _predict(task, predictor, data, run)

    command.__doc__ = f"""The file for {task.name}: relaxed energies of initial structures.

    A run that was stopped goes on where it was: give the same command again.

    Args:
        name: a model of the zoo, or a model folder.
        data: folder with one folder for each of the splits {", ".join(task.splits)}, named so or
            test_..., val_...; in any layout that OC20 and OC22 were released in.
        by: relaxation with the model, or its energy of the initial structure, for a model that was
            trained on relaxed energies.
    """
    return command


def _is2rs(task: Task) -> Callable[..., None]:
    def command(
        name: tyro.conf.Positional[str],
        data: tyro.conf.Positional[Path],
        run: Run,
        relaxation: Relaxation,
    ) -> None:
        from equizoo.eval.potential import load

        predictor = _by_relaxation(load(name), run, relaxation, positions=True)
        _predict(task, predictor, data, run)

    command.__doc__ = f"""The file for {task.name}: relaxed structures, to score on this machine.

    No server takes them today. A run that was stopped goes on where it was: give the same command
    again.

    Args:
        name: a model of the zoo, or a model folder.
        data: folder with one folder for each of the splits {", ".join(task.splits)}, named so or
            test_..., val_...; in any layout that OC20 and OC22 were released in.
    """
    return command


def _by_relaxation(potential, run: Run, relaxation: Relaxation, positions: bool):
    from equizoo.eval.leaderboard_relax import ByRelaxation
    from equizoo.eval.optimizers import FIRE, LBFGS
    from equizoo.eval.relax import Relaxer

    relaxer = Relaxer(
        potential,
        optimizer={"lbfgs": LBFGS(), "fire": FIRE()}[relaxation.optimizer],
        fmax=relaxation.fmax,
        max_steps=relaxation.max_steps,
        dtype=run.dtype,
        batch_nodes=run.batch_nodes,
        skin=relaxation.skin,
    )
    return ByRelaxation(relaxer, positions=positions)


def check(
    file: tyro.conf.Positional[Path],
    task: Literal[tuple(TASKS)] | None = None,  # type: ignore[valid-type]
    part: Part = "test",
    counts: Counts = None,
    json: Json = None,
) -> None:
    """Look for all that a server would refuse in a leaderboard file.

    Args:
        file: the .npz file.
        task: what it is for, where its arrays do not tell.
    """
    _report(file, TASKS[task] if task else None, part, counts, json)


def score(
    task: tyro.conf.Positional[Literal[tuple(TASKS)]],  # type: ignore[valid-type]
    file: tyro.conf.Positional[Path],
    data: tyro.conf.Positional[Path],
    layout: LayoutOption = None,
    part: Part = "val",
    counts: Counts = None,
    data_energy_reference: DataReference = None,
    energy_reference: Annotated[
        Annotated[EnergyReference, tyro.conf.EnumChoicesFromValues] | None,
        tyro.conf.arg(help="of the energies in the file, where it is not the leaderboard's"),
    ] = None,
    json: Json = None,
) -> None:
    """Metrics of a leaderboard file on data with labels, beside published results.

    Args:
        task: the leaderboard.
        file: the .npz file.
        data: as for the command that wrote it; test splits have no labels.
    """
    from equizoo.eval.leaderboard_file import score_file
    from equizoo.eval.leaderboard_published import comparisons

    chosen = TASKS[task]
    sources = _sources(chosen, data, part, counts, data_energy_reference)
    scores = score_file(file, chosen, layout or chosen.layout, sources, energy_reference)
    if _emit({"task": task, "file": str(file), "part": part, "splits": scores}, json):
        return
    console = Console()
    for comparison in comparisons(chosen, part, scores, file.stem):
        table = Table(title=comparison.title, title_justify="left")
        for index, heading in enumerate(comparison.header):
            is_number = 1 < index < len(comparison.header) - 1
            table.add_column(_escape(heading), justify="right" if is_number else "left")
        for row in comparison.rows:
            table.add_row(*map(_escape, row))
        console.print(table)
        for number, source in enumerate(comparison.sources, 1):
            console.print(_escape(f"[{number}] {source}"), highlight=False, soft_wrap=True)
    if counts is not None or energy_reference is not None:
        console.print("Other data or energies than the official ones: not comparable.")


_COMMANDS: dict[Kind, Callable[[Task], Callable[..., None]]] = {
    Kind.S2EF: _s2ef,
    Kind.IS2RE: _is2re,
    Kind.IS2RS: _is2rs,
}
_SUBCOMMANDS = [
    Annotated[None, tyro.conf.subcommand(task.name, constructor=_COMMANDS[task.kind](task))]
    for task in TASKS.values()
] + [
    Annotated[None, tyro.conf.subcommand("check", constructor=check)],
    Annotated[None, tyro.conf.subcommand("score", constructor=score)],
]
_Subcommand = _SUBCOMMANDS[0]
for _other in _SUBCOMMANDS[1:]:
    _Subcommand = _Subcommand | _other


def leaderboard(
    what: Annotated[_Subcommand, tyro.conf.OmitSubcommandPrefixes],  # type: ignore[valid-type]
) -> None:
    """Write, check and score files for the leaderboards of OC20 and OC22."""


def _predict(task: Task, predictor, data: Path, run: Run) -> None:
    from equizoo.eval.leaderboard_file import write_file
    from equizoo.eval.leaderboard_parts import plan_parts, predict_parts

    use_compile_cache()
    if run.out.suffix != ".npz":
        raise ValueError(f"The output {run.out} must end in .npz.")
    if run.out.exists():
        raise ValueError(f"The output {run.out} exists; choose another name.")
    sources = _sources(task, data, run.part, run.counts, run.data_energy_reference)
    references = None
    if run.references is not None:
        from equizoo.data.catalyst_references import read_adsorption_references

        references = read_adsorption_references(run.references)
    parts = run.out.with_name(run.out.name + ".parts")
    part_size = predictor.part_size if run.part_size is None else run.part_size
    total = sum(len(source) for source in sources.values())
    with _progress(total, shown=run.json != Path("-")) as advance:
        missing = predict_parts(
            task,
            predictor,
            sources,
            parts,
            part_size=part_size,
            share=run.share,
            references=references,
            advance=advance,
        )
    if missing:
        facts = {"parts": str(parts), "missing_parts": len(missing)}
        if not _emit(facts, run.json):
            Console().print(
                f"{len(missing)} parts are left to other processes; the last one to end writes "
                f"{run.out}",
                highlight=False,
                soft_wrap=True,
            )
        return
    write_file(run.out, task, run.layout or task.layout, plan_parts(sources, parts, part_size))
    _report(run.out, task, run.part, run.counts, run.json)


def _report(
    file: Path, task: Task | None, part: str, counts: Path | None, json: Path | None
) -> None:
    from equizoo.eval.leaderboard_file import check_file

    given = None
    if task is not None:
        given = _expected(task, part, counts)
    elif counts is not None or part != "test":
        raise ValueError("--counts and --part need to know the leaderboard: give --task.")
    checked = check_file(file, task, given)
    facts = {
        "file": str(file),
        "task": checked.task.name,
        "systems": checked.systems,
        "rows": checked.rows,
        "dtypes": sorted(set(checked.dtypes.values())),
    }
    if not _emit(facts, json):
        shown = {"systems": " ".join(f"{s}: {n:,}" for s, n in checked.systems.items())}
        _print_facts(facts | shown | {"rows": sum(checked.rows.values())})
        Console().print("nothing in it that a server is known to refuse", highlight=False)


def _expected(task: Task, part, counts: Path | None):
    from equizoo.eval.leaderboard_tasks import read_counts

    return task.counts[part] if counts is None else read_counts(counts, task)


def _sources(task: Task, data: Path, part, counts: Path | None, reference):
    from equizoo.eval.leaderboard_tasks import open_splits

    return open_splits(task, data, part, _expected(task, part, counts), reference)


@contextlib.contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    if not shown:
        yield lambda systems: None
        return
    with Progress(console=Console(stderr=True)) as bar:
        row = bar.add_task("systems", total=total)
        yield lambda systems: bar.advance(row, systems)
