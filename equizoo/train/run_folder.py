"""The folder of a run: begun once, and gone on with by the same run on the same data alone."""

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from equizoo.config import format_json, parse_json
from equizoo.data.fingerprint import fingerprint
from equizoo.data.readers import Dataset
from equizoo.whole_files import written_whole

FACTS = "run.json"
FRAMES = "frames"  # among the facts: what data_facts says
# Settings that may change when a run is resumed: on no step do they have an effect but rounding.
HARMLESS = (
    "training.checkpoint_every",
    "training.early_stop",
    "training.kernels",
    "training.when_too_large",
    "data.checks",
    "data.test",
    "old",
)
EPOCHS = "training.epochs"  # likewise, where no schedule is spread over them


def data_facts(
    parts: Mapping[str, Dataset], unlabelled: Mapping[str, Dataset] | None = None
) -> dict[str, dict[str, Any]]:
    """What ``run.json`` says of the frames of a run, by which others are told from them; of the
    ``unlabelled`` without their labels."""
    return {
        part: {"frames": len(dataset), "sha256": fingerprint(dataset.structures, labels=labels)}
        for group, labels in ((parts, True), (unlabelled or {}, False))
        for part, dataset in group.items()
    }


def require_usable(folder: Path, resume: bool) -> None:
    """Raises ``ValueError`` for a folder that a run could not be written to, before it takes time.

    A folder with nothing but ``run.json`` in it is that of a run that failed before it began: free,
    and to be resumed as well.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(
            f"The output folder {folder} cannot be made: {there} is a file. Choose another."
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(_unwritable(folder, f"{there} is not writable"))
    if resume:
        if not (folder / FACTS).is_file():
            raise ValueError(f"There is no run to resume in {folder}: it has no {FACTS}.")
    elif folder.exists() and any(file.name != FACTS for file in folder.iterdir()):
        raise ValueError(
            f"The output folder {folder} exists and is not empty. Choose another, or continue the "
            "run in it with resume."
        )


def open_run_folder(folder: Path, facts: Mapping[str, Any], resume: bool) -> None:
    """Creates a run's folder with ``run.json``, or checks that an existing one is the same run.

    Settings that are :data:`HARMLESS` may have changed: the differences are printed, and
    ``run.json`` has those of the last session. Raises ``ValueError`` for other differences, for
    other frames, and as :func:`require_usable` does.
    """
    require_usable(folder, resume)
    path, text = folder / FACTS, format_json(facts)
    if resume:
        before, now = (parse_json(t, str(path)) for t in (path.read_text("utf-8"), text))
        _require_same_settings(folder, before, now)
        _require_same_frames(folder, before.get(FRAMES, {}), now.get(FRAMES, {}))
        if before == now:
            return
        Console(stderr=True).print(
            "\n".join([f"Resuming {folder} with other settings:", *_differences(before, now)]),
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as partial:
            partial.write_text(text, "utf-8")
    except OSError as error:
        raise ValueError(_unwritable(folder, str(error))) from error


def _unwritable(folder: Path, why: str) -> str:
    return (
        f"The output folder {folder} cannot be written: {why}. Choose another, or change its "
        "permissions."
    )


def _require_same_settings(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    old, new = _flat(_settings(before)), _flat(_settings(now))
    allowed = (*HARMLESS, EPOCHS) if _is_open_ended(old) else HARMLESS
    changed = {path for path in {*old, *new} if old.get(path) != new.get(path)}
    refused = changed.difference(allowed)
    if not refused:
        return
    raise ValueError(
        f"Resuming {folder} with other settings would not continue the same run:\n"
        + "\n".join(_differences(_settings(before), _settings(now)))
        + (
            "\nThe number of epochs is in the learning rate or the loss of every step. To train "
            f"on, begin a new run from the weights in {folder / 'model'} (finetune)."
            if refused == {EPOCHS}
            else ""
        )
    )


def _require_same_frames(
    folder: Path, before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]
) -> None:
    others = [
        f"{part}: {_frames(before.get(part))} then, {_frames(now.get(part))} now"
        for part in dict.fromkeys([*before, *now])
        if before.get(part) != now.get(part)
    ]
    if others:
        raise ValueError(
            f"The run in {folder} was begun with other data than there are now ("
            + "; ".join(others)
            + "). Restore them as they were, or begin a new run (finetune) from the saved weights."
        )


def _frames(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return "not known"
    return f"{facts['frames']} frames with SHA-256 {facts['sha256'][:12]}…"


def _settings(facts: dict[str, Any]) -> dict[str, Any]:
    """Without the frames, and without the level that a recipe is on."""
    settings = {key: value for key, value in facts.items() if key != FRAMES}
    return settings.pop("recipe", {}) | settings


def _is_open_ended(settings: Mapping[str, Any]) -> bool:
    """Whether steps do not depend on the number of epochs: constant or plateau, and one stage."""
    spread = ("training.second_stage", "training.auxiliary")
    return settings.get("training.optimizer.schedule") in ("constant", "plateau") and not any(
        path.startswith(spread) and value is not None for path, value in settings.items()
    )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    old, new = (format_json(facts).splitlines() for facts in (before, now))
    return difflib.unified_diff(old, new, "run in the folder", "asked for", lineterm="")


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves by path, with dots; a list is one."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    below = (_flat(item, f"{path}.{key}" if path else key) for key, item in value.items())
    return {name: leaf for leaves in below for name, leaf in leaves.items()}
