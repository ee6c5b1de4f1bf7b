"""What a run tells while it goes on: a JSONL file, TensorBoard, and a live progress bar."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MEASURED = frozenset({"seconds", "peak_memory_GB"})  # figures that no two runs share


class RunLog:
    """Rows of metrics, appended to ``metrics.jsonl`` and to TensorBoard event files."""

    def __init__(self, folder: Path, resume_step: int = 0):
        from tensorboardX import SummaryWriter

        self.path = folder / "metrics.jsonl"
        rows = [row for row in read_rows(self.path) if row["step"] <= resume_step]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(self.path)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(dict(row)) + "\n")
        for key, value in row.items():
            if isinstance(value, (int, float)) and key not in ("step", "epoch"):
                self._board.add_scalar(key, value, row["step"])

    def close(self) -> None:
        self._board.close()


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
            f"epoch {row['epoch']:4d}  step {row['step']:6d}  loss {row['train_loss']:.3e}  "
            f"train F {row.get('train_forces_rmse_meV_per_A', math.nan):.1f} meV/Å  "
            f"valid E {row.get('valid_energy_rmse_meV_per_atom', math.nan):.2f} meV/atom, "
            f"F {row.get('valid_forces_rmse_meV_per_A', math.nan):.1f} meV/Å  padding "
            f"{row['padding_nodes']:.0%} of atoms, {row['padding_edges']:.0%} of edges"
        )
        if "peak_memory_GB" in row:
            figures += f"  {row['peak_memory_GB']:.1f} GB"
        if self._console.is_terminal:
            self._figures.plain = figures
        else:
            self._console.print(figures, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._console.is_terminal:
            self._live.stop()
