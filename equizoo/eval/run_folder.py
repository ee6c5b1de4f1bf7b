"""Folders of finished pieces of a run, so that a run can stop and go on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from equizoo.whole_files import written_whole


def open_run_folder(folder: Path, facts: Mapping[str, Any]) -> None:
    """Creates the folder with ``run.json``, or makes sure that an existing one is the same run.

    Raises ``ValueError`` naming the facts that differ: pieces of two runs do not belong together.
    """
    path, text = folder / "run.json", json.dumps(facts, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with written_whole(path) as partial:
            partial.write_text(text)
        return
    before, now = json.loads(path.read_text()), json.loads(text)
    if before != now:
        differ = [
            f"{key}: {before.get(key)} there, {now.get(key)} now"
            for key in {**before, **now}
            if before.get(key) != now.get(key)
        ]
        raise ValueError(
            f"{folder} holds parts of another run ({'; '.join(differ)}). Remove it to start anew, "
            "or write to another place."
        )


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An ``.npz`` file, there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
