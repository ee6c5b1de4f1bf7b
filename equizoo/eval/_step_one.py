"""Step one of a conversion: another Python, which can open the checkpoint, writes plain files."""

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from equizoo.zoo._convert.dump import Dump


@dataclasses.dataclass(frozen=True)
class CheckpointKind:
    """What it takes to open one kind of checkpoint."""

    program: Path  # run as ``python program CHECKPOINT FOLDER [options]``
    expected: str  # the file, for messages
    needs: str  # what the Python that runs it must have
    install: str  # the command for that


def run_step_one(
    kind: CheckpointKind,
    file: str | Path,
    folder: str | Path,
    *,
    options: Sequence[str] = (),
    python: str | Path | None = None,
    before: Callable[[], None] = lambda: None,  # asked when the paths are fine
) -> None:
    """Writes the dump of ``file`` to a new ``folder``.

    ``python`` is by default the one that ``EQUIZOO_TORCH_PYTHON`` names, else this one. Raises
    ``ValueError`` for paths that cannot be, and with the program's own message when it fails.
    """
    file, folder = Path(file).expanduser(), Path(folder).expanduser()
    if not file.is_file():
        raise ValueError(f"{file} is not a file; expected {kind.expected}.")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; choose another name.")
    before()
    interpreter = str(python or os.environ.get("EQUIZOO_TORCH_PYTHON") or sys.executable)
    command = [interpreter, str(kind.program.resolve()), str(file.resolve())]
    command += [str(folder.resolve()), *options]
    try:
        run = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise ValueError(
            f"{interpreter} could not be started ({error}); expected a Python."
        ) from error
    if run.returncode:
        lines = run.stderr.strip().splitlines() or ["no message"]
        missing = "ModuleNotFoundError" in run.stderr or "ImportError" in run.stderr
        hint = (
            f" That Python lacks what the checkpoint needs: give one that has {kind.needs} "
            f"(--python, or EQUIZOO_TORCH_PYTHON; '{kind.install}' makes one), or run "
            f"equizoo/zoo/_convert/{kind.program.name} there and give its folder here."
        )
        raise ValueError(
            f"{file} could not be opened: {lines[-1].rstrip('.')}.{hint if missing else ''}"
        )


def read_or_dump(source: Path, read: Callable[[Path], Dump], write: Callable[[Path], None]) -> Dump:
    """The dump in ``source``, a folder, or the one that ``write`` makes of it, a checkpoint."""
    if source.is_dir():
        return read(source)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "dump"
        write(folder)
        return read(folder)
