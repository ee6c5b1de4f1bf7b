"""Frames to a stream of padded batches, by Grain: shuffled, packed to a budget, resumable."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Float

from equizoo.data.corruption import Corruptor, untouched
from equizoo.graph import Budget, ForcesOn, Frame, Graph, Labels, batch_frames, batch_labels


@dataclasses.dataclass(frozen=True, eq=False)
class Packing:
    """How frames become batches of one static shape."""

    budget: Budget
    reference_energies: Float[np.ndarray, " species"]  # [eV]
    dtype: type = np.float32
    forces_on: ForcesOn = ForcesOn.ALL

    def __call__(self, frames: Sequence[Frame]) -> tuple[Graph, Labels]:
        graph = batch_frames(frames, self.budget, self.dtype)
        return graph, batch_labels(
            frames, self.budget, self.reference_energies, self.dtype, self.forces_on
        )


def training_stream(
    frames: Sequence[Frame], packing: Packing, seed: int, corruptor: Corruptor | None = None
) -> grain.DatasetIterator:
    """An endless iterator of ``(graph, labels)``; every pass is a new shuffle of all frames.

    Batches are filled in order up to the budget and run on across passes, so no frame is left
    out. ``get_state()`` is a small JSON-able dictionary; ``set_state`` continues with the very
    batch that would have come next. Raises ``ValueError`` when a frame does not fit alone.

    A ``corruptor`` puts noise on the atoms of some batches, and on none in the others, which are
    of the same form, so that one program takes all. A frame for whose displaced atoms no batch has
    room, in ten attempts, is left as it is.
    """
    for frame in frames:
        if not packing.budget.fits([frame]):
            raise ValueError(
                f"Structure {frame.structure.name or '(unnamed)'} with {frame.num_nodes} atoms and "
                f"{frame.num_edges} edges does not fit {packing.budget}; raise the batch size."
            )
    source = grain.MapDataset.source(frames).seed(seed).shuffle().repeat(None)
    # of the place in the stream alone, so that a resumed stream draws the same
    source = source.random_map(lambda frame, rng: (frame, int(rng.integers(2**63))))
    # A batch needs several frames at once; reading ahead by threads would only delay the state.
    stream = source.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=1))
    return iter(_PackToBudget(stream, packing, corruptor))


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
    def __init__(
        self, parent: grain.IterDataset, packing: Packing, corruptor: Corruptor | None = None
    ):
        super().__init__(parent)
        self._packing, self._corruptor = packing, corruptor

    def __iter__(self) -> grain.DatasetIterator:
        return _PackingIterator(self._parent.__iter__(), self._packing, self._corruptor)


class _PackingIterator(grain.DatasetIterator):
    """Takes frames until the next does not fit; that one is read again for the next batch."""

    def __init__(
        self, parent: grain.DatasetIterator, packing: Packing, corruptor: Corruptor | None
    ):
        super().__init__(parent)
        self._packing, self._corruptor = packing, corruptor

    def __next__(self) -> tuple[Graph, Labels]:
        held: list[Frame] = []
        heads = False
        while True:
            before = self._parent.get_state()
            frame, drawn = next(self._parent)
            if self._corruptor is not None:
                heads = heads if held else self._corruptor.heads(drawn)
                frame = self._corrupted(frame, drawn) if heads else untouched(frame)
            if held and not self._packing.budget.fits([*held, frame]):
                self._parent.set_state(before)
                return self._packing(held)
            held.append(frame)

    def _corrupted(self, frame: Frame, drawn: int) -> Frame:
        """Noise may bring more neighbours than a batch has room for; it is then drawn again."""
        assert self._corruptor is not None
        for attempt in range(10):
            corrupted = self._corruptor.corrupted(frame, drawn, attempt)
            if self._packing.budget.fits([corrupted]):
                return corrupted
        return untouched(frame)

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state)
