"""Frames to a stream of padded batches, by Grain: shuffled, packed to a budget, resumable."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Float

from equizoo.graph import Budget, Frame, Graph, Labels, batch_frames, batch_labels


@dataclasses.dataclass(frozen=True, eq=False)
class Packing:
    """How frames become batches of one static shape."""

    budget: Budget
    reference_energies: Float[np.ndarray, " species"]  # [eV]
    dtype: type = np.float32

    def __call__(self, frames: Sequence[Frame]) -> tuple[Graph, Labels]:
        graph = batch_frames(frames, self.budget, self.dtype)
        return graph, batch_labels(frames, self.budget, self.reference_energies, self.dtype)


def training_stream(frames: Sequence[Frame], packing: Packing, seed: int) -> grain.DatasetIterator:
    """An endless iterator of ``(graph, labels)``; every pass is a new shuffle of all frames.

    Batches are filled in order up to the budget and run on across passes, so no frame is left
    out. ``get_state()`` is a small JSON-able dictionary; ``set_state`` continues with the very
    batch that would have come next. Raises ``ValueError`` when a frame does not fit alone.
    """
    for frame in frames:
        if not packing.budget.fits([frame]):
            raise ValueError(
                f"Structure {frame.structure.name or '(unnamed)'} with {frame.num_nodes} atoms and "
                f"{frame.num_edges} edges does not fit {packing.budget}; raise the batch size."
            )
    source = grain.MapDataset.source(frames).seed(seed).shuffle().repeat(None)
    # A batch needs several frames at once; reading ahead by threads would only delay the state.
    stream = source.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=1))
    return iter(_PackToBudget(stream, packing))


def sequential_batches(
    frames: Sequence[Frame], packing: Packing
) -> Iterator[tuple[list[Frame], Graph, Labels]]:
    """All frames once, in order, as ``(frames of the batch, graph, labels)``."""
    held: list[Frame] = []
    for frame in frames:
        if held and not packing.budget.fits([*held, frame]):
            yield held, *packing(held)
            held = []
        held.append(frame)
    if held:
        yield held, *packing(held)


class _PackToBudget(grain.IterDataset):
    def __init__(self, parent: grain.IterDataset, packing: Packing):
        super().__init__(parent)
        self._packing = packing

    def __iter__(self) -> grain.DatasetIterator:
        return _PackingIterator(self._parent.__iter__(), self._packing)


class _PackingIterator(grain.DatasetIterator):
    """Takes frames until the next does not fit; that one is read again for the next batch."""

    def __init__(self, parent: grain.DatasetIterator, packing: Packing):
        super().__init__(parent)
        self._packing = packing

    def __next__(self) -> tuple[Graph, Labels]:
        held: list[Frame] = []
        while True:
            before = self._parent.get_state()
            frame = next(self._parent)
            if held and not self._packing.budget.fits([*held, frame]):
                self._parent.set_state(before)
                return self._packing(held)
            held.append(frame)

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state)
