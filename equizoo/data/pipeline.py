"""Frames to a stream of padded batches, by Grain: shuffled, packed to a budget, resumable."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, SupportsIndex, overload

import grain
import numpy as np
from jaxtyping import Float

from equizoo.data.corruption import Corruptor, untouched
from equizoo.data.prepared import with_stored_neighbors
from equizoo.data.statistics import NeighborRule, Sizes
from equizoo.graph import (
    Budget,
    ForcesOn,
    Frame,
    Graph,
    Labels,
    batch_frames,
    batch_labels,
    round_up,
)
from equizoo.neighbors import Neighbors
from equizoo.structure import Structure

WINDOW = 16  # frames of which the next one of a batch may be chosen
_SLACK = 1.03  # edges of a batch over those of as many mean atoms


@dataclasses.dataclass(frozen=True, eq=False)
class Packing:
    """How frames become batches of one static shape."""

    budget: Budget
    reference_energies: Float[np.ndarray, "*heads species"]  # [eV]
    dtype: type = np.float32
    forces_on: ForcesOn = ForcesOn.ALL

    def __call__(self, frames: Sequence[Frame]) -> tuple[Graph, Labels]:
        graph = batch_frames(frames, self.budget, self.dtype)
        return graph, batch_labels(
            frames, self.budget, self.reference_energies, self.dtype, self.forces_on
        )


def typical_budget(
    sizes: Sizes, batch_size: int, cost_of_flat: float = Budget.COST_OF_FLAT
) -> Budget:
    """A budget for about ``batch_size`` structures of mean size, that holds any one of them.

    Small structures may come up to twice as many to a batch. Where rows for the most neighbours of
    any atom would be more than ``cost_of_flat`` times what atoms have on average, edges are stored
    flat.
    """
    mean = sizes.nodes / sizes.frames
    nodes = round_up(max(round(batch_size * mean), sizes.most_nodes) + 1)
    edges = int(np.ceil(_SLACK * nodes * sizes.mean_neighbors))
    return Budget.cheaper(
        max_in=sizes.max_in,
        max_out=sizes.max_out,
        nodes=nodes,
        graphs=round_up(2 * batch_size) + 1,
        edges=max(edges, sizes.most_edges),
        num_species=len(sizes.elements),
        cost_of_flat=cost_of_flat,
    )


class LazyFrames(Sequence[Frame]):
    """Structures that lie on a disk, as frames that are made when asked for.

    ``make`` is given the structure and its neighbours, where these are stored by ``rule``.
    """

    def __init__(
        self,
        structures: Sequence[Structure],
        make: Callable[[Structure, Neighbors | None], Frame],
        rule: NeighborRule,
    ):
        self._structures, self._make, self._rule = structures, make, rule

    def __len__(self) -> int:
        return len(self._structures)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Frame: ...
    @overload
    def __getitem__(self, index: slice) -> "LazyFrames": ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return LazyFrames(self._structures[index], self._make, self._rule)
        return self._make(*with_stored_neighbors(self._structures, int(index), self._rule))


@dataclasses.dataclass(frozen=True)
class Reading:
    """Who makes frames ahead of the batch that they are for; batches do not depend on it.

    ``threads`` of this process, or ``workers``, processes of their own, which pay where making
    frames is most of the work. Frames that are in memory are taken as they are unless there are
    workers.
    """

    threads: int = 4
    workers: int = 0

    def __post_init__(self):
        if self.threads < 0 or self.workers < 0:
            raise ValueError(
                f"threads ({self.threads}) and workers ({self.workers}) must not be negative."
            )


THREADS = Reading()


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of a stream that one host takes: of so many ``hosts``, every so-many-th frame."""

    host: int = 0
    hosts: int = 1


WHOLE = Share()


def training_stream(
    frames: Sequence[Frame],
    packing: Packing,
    seed: int,
    corruptor: Corruptor | None = None,
    *,
    reading: Reading = THREADS,
    share: Share = WHOLE,
) -> "BatchStream":
    """An endless iterator of ``(graph, labels)``; every pass is a new shuffle of all frames.

    Batches are filled up to the budget and run on across passes, so no frame is left out and none
    is seen again before all have been. Frames come in the order of the shuffle, except that one
    which does not fit waits while one of the next ones does.

    ``get_state()`` is a small JSON-able dictionary; ``set_state`` continues with the very batch
    that would have come next, with any number of threads and workers. Raises ``ValueError`` when a
    frame does not fit alone: now for frames in memory, else when it is read.

    A ``corruptor`` puts noise on the atoms of some batches, and on none in the others, which are
    of the same form, so that one program takes all. A frame for whose displaced atoms no batch has
    room, in ten attempts, is left as it is.
    """
    if not len(frames):
        raise ValueError("There are no frames to train on; expected at least one.")
    if not isinstance(frames, LazyFrames):
        for frame in frames:
            _require_fit(frame, packing.budget)
    return BatchStream(frames, packing, seed, corruptor, reading, share)


def sequential_batches(
    frames: Sequence[Frame], packing: Packing, reading: Reading = THREADS
) -> Iterator[tuple[list[Frame], Graph, Labels]]:
    """All frames once, in order, as ``(frames of the batch, graph, labels)``."""
    held: list[Frame] = []
    for frame in _read_in_order(frames, reading):
        if held and not packing.budget.fits([*held, frame]):
            yield held, *packing(held)
            held = []
        held.append(frame)
    if held:
        yield held, *packing(held)


def _read_in_order(frames: Sequence[Frame], reading: Reading) -> Iterator[Frame]:
    if not isinstance(frames, LazyFrames):
        return iter(frames)
    return iter(grain.MapDataset.source(frames).to_iter_dataset(_ahead(reading)))


class Waste(NamedTuple):
    """The parts of padded batches that hold nothing, over one pass."""

    nodes: float
    edges: float
    batches: int


def padding_waste(frames: Sequence[Frame], packing: Packing, seed: int = 0) -> Waste:
    """How much of the batches of a pass over ``frames`` is padding; no batch is made.

    In the layout of rows, edges are counted as all the room of all rows.
    """
    stream = training_stream(frames, packing, seed)
    held: list[list[Frame]] = []
    while sum(map(len, held)) < len(frames):
        held.append(stream.take())
    budget, batches = packing.budget, len(held)
    nodes, edges = (
        sum(getattr(frame, kind) for batch in held for frame in batch)
        for kind in ("num_nodes", "num_edges")
    )
    return Waste(
        1 - nodes / (batches * budget.nodes), 1 - edges / (batches * budget.edges), batches
    )


class _Waiting(NamedTuple):
    """A frame that has been read and is in no batch yet."""

    position: int  # in the stream of this host
    frame: Frame
    drawn: int  # a number of its own for noise


class _Peeked(NamedTuple):
    """The batch that comes next, with the stream's state before it."""

    state: dict[str, Any]
    frames: list[Frame]
    batch: tuple[Graph, Labels]


class BatchStream(Iterator[tuple[Graph, Labels]]):
    """See :func:`training_stream`."""

    def __init__(
        self,
        frames: Sequence[Frame],
        packing: Packing,
        seed: int,
        corruptor: Corruptor | None,
        reading: Reading,
        share: Share,
    ):
        self._packing, self._corruptor, self._share = packing, corruptor, share
        self._num_frames, self._reading = len(frames), reading
        self._read_ahead = isinstance(frames, LazyFrames)
        source = grain.MapDataset.source(frames).seed(seed).shuffle().repeat(None)
        # of the place in the stream alone, so that a resumed stream draws the same
        source = source.random_map(lambda frame, rng: (frame, int(rng.integers(2**63))))
        self._source = source[share.host :: share.hosts]
        self._waiting: list[_Waiting] = []
        self._next = 0  # position of the frame that will be read next
        self._elements: grain.DatasetIterator | None = None
        self.frames: list[Frame] = []  # of the batch that came last
        self._peeked: _Peeked | None = None

    def __next__(self) -> tuple[Graph, Labels]:
        (_, self.frames, batch), self._peeked = self._ahead(), None
        return batch

    def peek(self) -> tuple[Graph, Labels]:
        """The next batch, which stays the next one."""
        return self._ahead().batch

    def _ahead(self) -> _Peeked:
        if self._peeked is None:
            state, frames = self.get_state(), self.take()
            self._peeked = _Peeked(state, frames, self._packing(frames))
        return self._peeked

    def take(self) -> list[Frame]:
        """The frames of the next batch, which is then used up."""
        budget = self._packing.budget
        batch: list[Frame] = []
        self._fill_window()
        noisy = self._corruptor is not None and self._corruptor.heads(self._waiting[0].drawn)
        room, place = budget.nodes - 1, 0
        while place < len(self._waiting):
            waiting = self._waiting[place]
            if batch and waiting.frame.num_nodes > room:  # seen without drawing noise
                place += 1
                continue
            frame = self._with_noise(waiting, noisy)
            if not batch:
                _require_fit(frame, budget)
            if budget.fits([*batch, frame]):
                batch.append(frame)
                room -= frame.num_nodes
                del self._waiting[place]
                self._fill_window()
            else:
                place += 1
        return batch

    def _fill_window(self) -> None:
        """Reads on, but not into the next pass while frames of this one wait."""
        while len(self._waiting) < WINDOW:
            if self._waiting and self._pass(self._waiting[0].position) != self._pass(self._next):
                return
            if self._elements is None:
                self._elements = self._start(self._next)
            frame, drawn = next(self._elements)
            self._waiting.append(_Waiting(self._next, frame, drawn))
            self._next += 1

    def _pass(self, position: int) -> int:
        return (self._share.host + self._share.hosts * position) // self._num_frames

    def _start(self, position: int) -> grain.DatasetIterator:
        if self._reading.workers:
            _allow_worker_processes()
            rest = self._source[position:].to_iter_dataset(
                grain.ReadOptions(num_threads=1, prefetch_buffer_size=WINDOW)
            )
            options = grain.MultiprocessingOptions(
                num_workers=self._reading.workers, per_worker_buffer_size=WINDOW
            )
            return iter(rest.mp_prefetch(options))
        # frames that are in memory: reading ahead by threads would only cost
        ahead = _ahead(self._reading) if self._read_ahead else _ahead(Reading(threads=0))
        elements = iter(self._source.to_iter_dataset(ahead))
        elements.set_state({"next_index": position})
        return elements

    def _with_noise(self, waiting: _Waiting, noisy: bool) -> Frame:
        """Noise may bring more neighbours than a batch has room for; it is then drawn again."""
        if self._corruptor is None:
            return waiting.frame
        if noisy:
            for attempt in range(10):
                frame = self._corruptor.corrupted(waiting.frame, waiting.drawn, attempt)
                if self._packing.budget.fits([frame]):
                    return frame
        return untouched(waiting.frame)

    def get_state(self) -> dict[str, Any]:
        """Where the stream is; nothing in it depends on threads and workers."""
        if self._peeked is not None:
            return self._peeked.state
        return {
            "next": self._next,
            "waiting": [waiting.position for waiting in self._waiting],
            "frames": self._num_frames,
            "share": [self._share.host, self._share.hosts],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there; ``ValueError`` when that was another data set or number of hosts."""
        if "waiting" not in state:
            raise ValueError(
                f"The checkpoint has {state!r} for the place in the data, of an older version of "
                "equizoo that packed batches otherwise. Finish the run with that version."
            )
        if state["frames"] != self._num_frames:
            raise ValueError(
                f"The run to resume had {state['frames']} frames to train on, now there are "
                f"{self._num_frames}. Restore the data as they were, or begin a new run."
            )
        if state["share"] != [self._share.host, self._share.hosts]:
            host, hosts = state["share"]
            raise ValueError(
                f"The run to resume was host {host} of {hosts}, this is host {self._share.host} of "
                f"{self._share.hosts}. Each host has its own part of the data: resume on {hosts} "
                "hosts, or begin a new run (finetune) from the saved weights."
            )
        self.close()
        self._peeked, self._next = None, int(state["next"])
        self._waiting = [_Waiting(p, *self._source[p]) for p in map(int, state["waiting"])]

    def close(self) -> None:
        """Ends threads and worker processes; the stream can go on, and starts them anew."""
        if self._elements is not None:
            self._elements.close()
            self._elements = None


def _ahead(reading: Reading) -> grain.ReadOptions:
    buffered = max(1, WINDOW * reading.threads)
    return grain.ReadOptions(num_threads=reading.threads, prefetch_buffer_size=buffered)


def _allow_worker_processes() -> None:
    """Grain asks flags of a program that parses its arguments by absl, which ours do not."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _require_fit(frame: Frame, budget: Budget) -> None:
    if not budget.fits([frame]):
        raise ValueError(
            f"Structure {frame.structure.name or '(unnamed)'} with {frame.num_nodes} atoms and "
            f"{frame.num_edges} edges does not fit {budget}; raise the batch size."
        )
