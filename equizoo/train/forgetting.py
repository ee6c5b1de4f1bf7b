"""Data on which a fine-tuned model shows what it has forgotten."""

import dataclasses

from equizoo.data.datasets import list_datasets, load_dataset
from equizoo.data.readers import Dataset
from equizoo.eval.card import known_data
from equizoo.eval.potential import Potential
from equizoo.structure import spread
from equizoo.train.replay import Replay

FRAMES = 200  # at most, of data that were not asked for


def old_data(
    base: Potential, names: tuple[str, ...] | None, replay: Replay | None
) -> dict[str, Dataset]:
    """The named data sets, as they are; for ``None`` the first of these that there is:

    data that the base model's card has errors on, or that it was released with, as far as they are
    on this machine; frames that could be replayed and are not, with the base model's labels. Of
    either at most :data:`FRAMES`, evenly from first to last, which their name says. Nothing is
    downloaded.
    """
    if names is not None:
        return {name: load_dataset(name) for name in names}
    for name in known_data(base.name):
        (row,) = list_datasets(name)
        if row.where not in ("bundled", "local", "cached"):
            continue
        dataset = load_dataset(name)
        if set(dataset.elements) <= set(base.config.atomic_numbers):
            return _some(name, dataset)
    if replay is not None and len(rest := replay.rest(base, FRAMES)):
        return {f"{replay.data}, {len(rest)} frames not replayed": rest}
    return {}


def _some(name: str, dataset: Dataset) -> dict[str, Dataset]:
    if len(dataset) <= FRAMES:
        return {name: dataset}
    chosen = tuple(spread(dataset.structures, FRAMES))
    few = dataclasses.replace(dataset, structures=chosen, statistics=None)
    return {f"{name}, {FRAMES} of {len(dataset)} frames": few}
