"""What a run tells while it goes on: a JSONL file, boards, and a live progress bar."""

import dataclasses
import importlib.util
import json
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

# Figures that no two runs share.
MEASURED = frozenset({"seconds", "peak_memory_GB", "idle_share", "structures_per_s"})


@runtime_checkable
class Scalars(Protocol):
    """An open board: figures by name, at a step."""

    def write(self, figures: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class Board(Protocol):
    """Where the figures of a run are shown while it goes on."""

    def open(self, folder: Path, title: str, resume_step: int) -> Scalars:
        """Of the run in ``folder``, from the step after ``resume_step`` on."""
        ...


class TensorBoard:
    """Event files in the run's folder, under ``tensorboard``."""

    def open(self, folder: Path, title: str, resume_step: int) -> Scalars:
        return _EventFiles(folder / "tensorboard", resume_step)


class _EventFiles:
    def __init__(self, folder: Path, resume_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def write(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


@dataclasses.dataclass(frozen=True)
class WeightsAndBiases:
    """A project of https://wandb.ai, also offline (``WANDB_MODE=offline``, later ``wandb sync``).

    A resumed run goes on under the identifier that its folder holds in ``wandb.json``. Raises
    ``ValueError`` where the package is not installed.
    """

    project: str

    def __post_init__(self):
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(
                "The package wandb, which shows runs on Weights & Biases, is not installed: "
                "pip install 'equizoo[wandb]'"
            )

    def open(self, folder: Path, title: str, resume_step: int) -> Scalars:
        return _WandbRun(self.project, folder, title)


class _WandbRun:
    def __init__(self, project: str, folder: Path, title: str):
        import wandb

        known = folder / "wandb.json"
        if not known.exists():
            known.write_text(json.dumps({"project": project, "id": uuid.uuid4().hex}) + "\n")
        facts = folder / "run.json"
        self._run = wandb.init(
            **json.loads(known.read_text()),
            name=title,
            dir=folder,
            config=json.loads(facts.read_text()) if facts.exists() else None,
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )

    def write(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class RunLog:
    """Rows of metrics, appended to ``metrics.jsonl``, their figures to boards."""

    def __init__(
        self, folder: Path, resume_step: int = 0, title: str = "", boards: Sequence[Board] = ()
    ):
        self.path = folder / "metrics.jsonl"
        rows = [row for row in read_rows(self.path) if row["step"] <= resume_step]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(self.path)
        self._boards = [board.open(folder, title, resume_step) for board in boards]

    def write(self, row: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(dict(row)) + "\n")
        figures = {
            name: value
            for name, value in row.items()
            if isinstance(value, (int, float)) and name not in ("step", "epoch")
        }
        for board in self._boards:
            board.write(figures, row["step"])

    def close(self) -> None:
        for board in self._boards:
            board.close()


BOARDS: tuple[Board, ...] = (TensorBoard(),)  # of every run, unless told otherwise


class NoLog:
    """Of a process that leaves writing to the first."""

    def write(self, row: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics file; a last line cut by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


_SHOWN = (
    ("E", "energy_rmse_meV_per_atom", 2, "meV/atom"),
    ("F", "forces_rmse_meV_per_A", 1, "meV/Å"),
)


class LiveProgress:
    """A rich progress bar over steps on stderr, with the last epoch's figures below it; one line
    per epoch where that is no terminal."""

    def __init__(self, total_steps: int, first_step: int, title: str, quiet: bool = False):
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        self._console = Console(stderr=True, quiet=quiet)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        self._task = self._progress.add_task(
            title, total=total_steps, completed=first_step, rate=""
        )
        self._figures = Text()
        self._live = Live(Group(self._progress, self._figures), console=self._console)
        if self._console.is_terminal:
            self._live.start()
        self._structures, self._started = 0, time.monotonic()

    def advance(self, structures: int) -> None:
        self._structures += structures
        rate = self._structures / (time.monotonic() - self._started)
        self._progress.update(self._task, advance=1, rate=f"{rate:.0f} structures/s")

    def report(self, row: Mapping[str, Any]) -> None:
        figures = (
            f"epoch {row['epoch']:4d}  step {row['step']:6d}  "
            f"loss {row.get('train_loss', math.nan):.3e}"
        )
        for part in ("train", "valid"):
            errors = [
                f"{letter} {row[f'{part}_{key}']:.{digits}f} {unit}"
                for letter, key, digits, unit in _SHOWN
                if f"{part}_{key}" in row
            ]
            if errors:
                figures += f"  {part} {', '.join(errors)}"
        figures += (
            f"  padding {row['padding_nodes']:.0%} of atoms, {row['padding_edges']:.0%} of edges"
        )
        if "idle_share" in row:
            figures += f"  device idle {row['idle_share']:.1%}"
        if row["skipped_steps"]:
            figures += f"  {row['skipped_steps']} steps not finite, left out"
        if "peak_memory_GB" in row:
            figures += f"  {row['peak_memory_GB']:.1f} GB"
        if self._console.is_terminal:
            self._figures.plain = figures
        else:
            self._console.print(figures, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._console.is_terminal:
            self._live.stop()
