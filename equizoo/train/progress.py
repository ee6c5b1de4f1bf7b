"""What a run tells while it goes on: a JSONL file, TensorBoard, and a live progress bar."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
    """A rich progress bar over steps on stderr; one line per epoch where that is no terminal."""

    def __init__(self, total_steps: int, first_step: int, title: str):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[errors]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(
            title, total=total_steps, completed=first_step, errors=""
        )
        self._progress.start()

    def advance(self) -> None:
        self._progress.advance(self._task)

    def report(self, row: Mapping[str, Any]) -> None:
        errors = (
            f"valid E {row.get('valid_energy_rmse_meV_per_atom', math.nan):.2f} meV/atom, "
            f"F {row.get('valid_forces_rmse_meV_per_A', math.nan):.1f} meV/Å"
        )
        self._progress.update(self._task, errors=errors)
        if not self._console.is_terminal:
            self._console.print(
                f"epoch {row['epoch']:4d}  step {row['step']:6d}  loss {row['train_loss']:.3e}  "
                f"train F {row.get('train_forces_rmse_meV_per_A', math.nan):.1f} meV/Å  {errors}",
                highlight=False,
            )

    def close(self) -> None:
        self._progress.stop()
