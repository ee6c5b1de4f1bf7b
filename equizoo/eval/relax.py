"""Relaxation of many structures at once: positions, memory of the optimiser and forces on device.

A batch holds as many structures as it has room for. Each takes its own steps, ends when its own
forces are small, and makes room for the next one. The host finds neighbours and moves structures
in and out; with a skin it is asked again only when an atom has moved by half of it. Of several
batches the host serves one while the others are computed.
"""

import collections
import copy
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from jaxtyping import Array, Bool, Float, Int

from equizoo.data.catalyst_frames import CatalystFrame
from equizoo.eval.optimizers import LBFGS, Memory, PositionOptimizer, all_finite, largest_force
from equizoo.eval.packing import MAX_GRAPHS, BudgetSet
from equizoo.eval.potential import BATCH_NODES, DTYPES, Potential, numerics
from equizoo.eval.relax_progress import LaneProgress, Progress, trajectory_arrays, trajectory_of
from equizoo.eval.run_folder import open_run_folder, write_arrays
from equizoo.graph import Budget, Frame, Graph, batch_frames, unbatch_nodes, within_cutoff
from equizoo.structure import Structure
from equizoo.zoo._base import Prediction

_STEPS_PER_VISIT = 50  # of the host, at most, with a skin
_LANES_ON_CPU = 3  # small batches side by side keep two cores busier than one large
_LBFGS = LBFGS()
_PROGRESS = "under-way.npz"


class Relaxed(NamedTuple):
    """Where a relaxation ended; energy and forces are those of its last positions."""

    positions: Float[np.ndarray, "nodes 3"]  # [Å]
    energy: float  # [eV] with reference energies
    forces: Float[np.ndarray, "nodes 3"]  # [eV/Å] on fixed atoms too
    steps: int
    converged: bool  # else it ended at the limit of steps, or with numbers that are not finite
    trajectory: tuple[Structure, ...] = ()  # with energies and forces, the last positions included


class State(NamedTuple):
    """Of a batch on the device. ``forces`` and ``node_energies`` are of the last evaluation."""

    displacement: Float[Array, "nodes 3"]  # [Å] from the initial positions
    forces: Float[Array, "nodes 3"]  # [eV/Å]
    node_energies: Float[Array, " nodes"]  # [eV]
    steps: Int[Array, " graphs"]
    done: Bool[Array, " graphs"]
    converged: Bool[Array, " graphs"]
    memory: Memory


@dataclasses.dataclass(eq=False)
class _Item:
    """A structure on its way."""

    index: int
    initial: Structure
    free: Bool[np.ndarray, " nodes"]
    displacement: Float[np.ndarray, "nodes 3"]
    trajectory: list[Structure] = dataclasses.field(default_factory=list)

    @property
    def present(self) -> Structure:
        positions = self.initial.positions + self.displacement
        return dataclasses.replace(  # labels of the start are not the model's
            self.initial, positions=positions, energy=None, forces=None, stress=None
        )


@dataclasses.dataclass(eq=False)
class _Lane:
    """A batch on its way, and what is being computed of it."""

    active: list[_Item] = dataclasses.field(default_factory=list)
    frames: list[Frame] = dataclasses.field(default_factory=list)
    held: tuple[list[_Item], Budget] | None = None  # what the state is of
    state: State | None = None
    computing: Future[State] | None = None

    def progress(self) -> LaneProgress | None:
        if self.computing is None or self.held is None:
            return None
        return LaneProgress(
            indices=[item.index for item in self.active],
            nodes=[item.initial.num_nodes for item in self.active],
            budget=self.held[1],
            displacement=np.concatenate([item.displacement for item in self.active]),
            state=[np.asarray(leaf) for leaf in jax.tree.leaves(self.computing.result())],
            trajectories=[item.trajectory for item in self.active],
        )


@dataclasses.dataclass
class _Run:
    """Relaxations under way."""

    waiting: collections.deque[_Item]
    lanes: list[_Lane]
    budgets: BudgetSet

    @property
    def pending(self) -> set[int]:
        """The structures that have not ended."""
        active = (item.index for lane in self.lanes for item in lane.active)
        return {*active, *(item.index for item in self.waiting)}

    def progress(self) -> Progress:
        """Where all is; waits for what is being computed."""
        return Progress(
            [item.index for item in self.waiting],
            list(self.budgets.budgets),
            [lane.progress() for lane in self.lanes],
        )


class Relaxer:
    """Relaxes structures with a potential until the largest force on a free atom is below ``fmax``.

    Forces are lengths of vectors, as ASE compares them. ``skin`` [Å] trades neighbours that are too
    far, which are computed and dropped, for visits of the host: 0 suits CPUs, where the model takes
    nearly all the time, and models that see only the nearest neighbours; without it, it is 0.5
    where that is possible and the device is no CPU. ``lanes`` batches are under way at once, by
    default three on CPUs and one elsewhere, and share the room for ``batch_nodes`` atoms. Programs
    are compiled for few shapes, and kept for later calls.

    Raises ``ValueError`` for settings that are not positive, and a skin that the model cannot have.
    """

    def __init__(
        self,
        potential: Potential,
        *,
        optimizer: PositionOptimizer = _LBFGS,
        fmax: float = 0.02,  # [eV/Å]
        max_steps: int = 300,
        dtype: str = "float32",
        batch_nodes: int = BATCH_NODES,
        skin: float | None = None,  # [Å]
        lanes: int | None = None,
    ):
        if lanes is None:
            lanes = _LANES_ON_CPU if jax.default_backend() == "cpu" else 1
        if not fmax > 0 or max_steps < 0 or batch_nodes < 2 or lanes < 1:
            raise ValueError(
                f"fmax is {fmax}, max_steps {max_steps}, batch_nodes {batch_nodes}, lanes {lanes}; "
                "expected a positive force, no negative number of steps, 2 or more atoms, and at "
                "least one lane."
            )
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
        nearest_only = potential.config.limit is not None
        if skin is None:
            skin = 0.0 if nearest_only or jax.default_backend() == "cpu" else 0.5
        if skin < 0 or (skin > 0 and nearest_only):
            raise ValueError(
                f"skin is {skin} Å; expected 0 or more, and 0 for a model that sees only the "
                "nearest neighbours."
            )
        self.potential, self.optimizer = potential, optimizer
        self.fmax, self.max_steps = fmax, max_steps
        self.dtype, self.batch_nodes, self.skin = dtype, batch_nodes, skin
        self.lanes = lanes
        self._network, self._params = potential.network(dtype)
        self._budgets = BudgetSet.of(potential.config)
        self._program = jax.jit(self._advance, static_argnames=("visit_steps",))

    @property
    def _room(self) -> int:
        """Atoms in each of the batches that are under way."""
        return max(self.batch_nodes // self.lanes, 2)

    @property
    def facts(self) -> dict[str, Any]:
        """All that results depend on beside weights and structures, JSON-able."""
        return {
            "optimizer": repr(self.optimizer),
            "fmax": self.fmax,
            "max_steps": self.max_steps,
            "dtype": self.dtype,
            "batch_nodes": self.batch_nodes,
            "skin": self.skin,
            "lanes": self.lanes,
        }

    def __call__(
        self,
        structures: Iterable[Atoms | Structure | CatalystFrame],
        *,
        record: bool = False,
        folder: Path | None = None,
        save_every: float = 300.0,  # [s]
        budgets: BudgetSet | None = None,
        advance: Callable[[int], None] = lambda structures: None,
    ) -> list[Relaxed]:
        """The relaxed structures, in the order given.

        Atoms do not move that ``FixAtoms`` holds, or ``fixed`` of a frame or of a structure's
        ``info``. With ``record`` every step is kept. With ``folder`` what is finished is written
        there, and from time to time where the others are; a later call with the same structures
        and settings goes on from there, and ends with the very numbers of a run that was never
        stopped. ``budgets`` as in :meth:`Potential.predict_stream`. ``advance`` is told of
        structures finished.

        Raises ``ValueError`` for structures that the potential refuses, and a folder of other ones.
        """
        items = [_item(i, s) for i, s in enumerate(structures)]
        chosen = self._budgets if budgets is None else copy.deepcopy(budgets)
        run = _Run(collections.deque(), [_Lane() for _ in range(self.lanes)], chosen)
        results: dict[int, Relaxed] = {}
        if folder is not None:
            open_run_folder(folder, self._run_facts(items, record))
        if folder is None or not self._resumed(run, folder, items):
            run.waiting = self._queue(items)
        if folder is not None:
            for item in items:
                if item.index not in run.pending:
                    results[item.index] = _read(_path(folder, item.index), item.initial)
        advance(len(results))

        def finished(item: _Item, relaxed: Relaxed) -> None:
            results[item.index] = relaxed
            if folder is not None:
                _write(_path(folder, item.index), relaxed)
            advance(1)

        saved = time.monotonic()
        with ThreadPoolExecutor(self.lanes) as threads:
            while run.pending:
                self._round(run, record, finished, threads)
                if folder is not None and time.monotonic() - saved >= save_every:
                    run.progress().write(folder / _PROGRESS)
                    saved = time.monotonic()
        if folder is not None:
            (folder / _PROGRESS).unlink(missing_ok=True)
        return [results[index] for index in range(len(items))]

    def plan_budgets(self, structures: Iterable[Structure]) -> BudgetSet:
        """The shapes of batches that suit ``structures`` at first, for ``budgets``."""
        budgets = BudgetSet.of(self.potential.config)
        waiting = self._queue([_item(i, s) for i, s in enumerate(structures)])
        while waiting:
            frames = [self._frame(item) for item in self._taken(waiting, [])]
            budgets.choose(frames, self._room, remainder=False)
        return budgets

    # ---- on the host

    def _round(
        self,
        run: "_Run",
        record: bool,
        finished: Callable[[_Item, Relaxed], None],
        threads: ThreadPoolExecutor,
    ) -> None:
        """A visit to every lane, always in this order, so that the same ones share a batch."""
        for lane in run.lanes:
            if lane.computing is not None:
                lane.state = lane.computing.result()
                lane.active = self._visited(lane, record, finished)
                lane.computing = None
            lane.active = lane.active + self._taken(run.waiting, lane.active)
            if lane.active:
                lane.computing = self._next_visit(lane, run.budgets, record, threads)

    def _resumed(self, run: "_Run", folder: Path, items: Sequence[_Item]) -> bool:
        """Takes in where ``folder`` says that the run was, or that it is over; whether it does."""
        if all(_path(folder, item.index).exists() for item in items):
            return True
        if not (folder / _PROGRESS).exists():
            return False
        progress = Progress.read(folder / _PROGRESS, [item.initial for item in items])
        run.waiting = collections.deque(items[index] for index in progress.waiting)
        run.budgets.budgets[:] = progress.budgets
        for lane, saved in zip(run.lanes, progress.lanes, strict=True):
            if saved is None:
                continue
            lane.active = [items[index] for index in saved.indices]
            ends = np.cumsum([item.initial.num_nodes for item in lane.active])[:-1]
            moved = np.split(saved.displacement, ends)
            for item, displacement, steps in zip(
                lane.active, moved, saved.trajectories, strict=True
            ):
                item.displacement, item.trajectory = displacement, steps
            lane.frames = [self._frame(item) for item in lane.active]
            lane.held = lane.active, saved.budget
            with numerics(self.dtype):
                like = jax.tree.structure(self._begin(saved.budget))
                state = jax.tree.unflatten(like, [jnp.asarray(leaf) for leaf in saved.state])
            lane.computing = Future()
            lane.computing.set_result(state)
        return True

    def _next_visit(
        self, lane: _Lane, budgets: BudgetSet, record: bool, threads: ThreadPoolExecutor
    ) -> Future[State]:
        lane.frames = [self._frame(item) for item in lane.active]
        budget = budgets.choose(lane.frames, self._room, remainder=False)
        with numerics(self.dtype):
            if lane.state is None or lane.held is None:
                state = self._begin(budget)
            elif lane.held != (lane.active, budget):
                state = _regrouped(lane.state, lane.held[0], lane.active, budget)
            else:
                state = lane.state
        lane.held = lane.active, budget
        graph = batch_frames(lane.frames, budget, np.dtype(self.dtype).type)
        free = np.zeros(budget.nodes, bool)
        free[: sum(len(item.free) for item in lane.active)] = np.concatenate(
            [item.free for item in lane.active]
        )
        visit_steps = 1 if record or not self.skin else _STEPS_PER_VISIT

        def compute() -> State:
            with numerics(self.dtype):
                return jax.block_until_ready(
                    self._program(self._params, graph, free, state, visit_steps=visit_steps)
                )

        return threads.submit(compute)

    def _visited(
        self, lane: _Lane, record: bool, finished: Callable[[_Item, Relaxed], None]
    ) -> list[_Item]:
        """Takes in what the device did; the structures that go on."""
        active, frames, state = lane.active, lane.frames, lane.state
        assert state is not None
        displacement, steps, done, converged = jax.device_get(
            (state.displacement, state.steps, state.done, state.converged)
        )
        moved = unbatch_nodes(np.asarray(displacement, np.float64), frames)
        results = None
        if record or done[: len(active)].any():
            results = self.potential.results(
                frames, Prediction(state.node_energies, state.forces, None, state.node_energies)
            )
        going = []
        for place, item in enumerate(active):
            if results is not None and record:
                result = results[place]
                item.trajectory.append(
                    dataclasses.replace(item.present, energy=result.energy, forces=result.forces)
                )
            item.displacement = moved[place]
            if done[place] and results is not None:
                relaxed = Relaxed(
                    positions=item.initial.positions + item.displacement,
                    energy=results[place].energy,
                    forces=results[place].forces,
                    steps=int(steps[place]),
                    converged=bool(converged[place]),
                    trajectory=tuple(item.trajectory),
                )
                finished(item, relaxed)
            else:
                going.append(item)
        return going

    def _queue(self, items: Sequence[_Item]) -> collections.deque[_Item]:
        """The densest first: what shares a batch needs about the same room for neighbours."""
        density = {item.index: -self._frame(item).max_in for item in items}
        return collections.deque(sorted(items, key=lambda item: (density[item.index], item.index)))

    def _taken(self, waiting: collections.deque[_Item], active: Sequence[_Item]) -> list[_Item]:
        """The next ones that fit beside ``active``, or one that fits nowhere."""
        taken: list[_Item] = []
        room = self._room - 1 - sum(item.initial.num_nodes for item in active)
        for item in list(waiting):
            fits = item.initial.num_nodes <= room or not (active or taken)
            if fits and len(active) + len(taken) < MAX_GRAPHS:
                taken.append(item)
                room -= item.initial.num_nodes
                waiting.remove(item)
        return taken

    def _frame(self, item: _Item) -> Frame:
        return self.potential.frame(item.present, f"structures[{item.index}]", self.skin)

    def _begin(self, budget: Budget) -> State:
        dtype = jnp.dtype(self.dtype)
        nodes, graphs = budget.nodes, budget.graphs
        return State(
            displacement=jnp.zeros((nodes, 3), dtype),
            forces=jnp.zeros((nodes, 3), dtype),
            node_energies=jnp.zeros(nodes, dtype),
            steps=jnp.zeros(graphs, jnp.int32),
            done=jnp.zeros(graphs, bool),
            converged=jnp.zeros(graphs, bool),
            memory=self.optimizer.start(nodes, graphs, dtype),
        )

    def _run_facts(self, items: Sequence[_Item], record: bool) -> dict[str, Any]:
        digest = hashlib.sha256()
        for item in items:
            start = item.initial
            for array in (start.atomic_numbers, start.positions, start.cell, item.free):
                digest.update(np.ascontiguousarray(array).tobytes())
            digest.update(repr((start.pbc, start.charge, start.spin, start.head)).encode())
        return {
            "model_sha256": self.potential.model_sha256(),
            "structures_sha256": digest.hexdigest(),
            "record": record,
            **self.facts,
        }

    # ---- on the device

    def _advance(
        self,
        params: Any,
        graph: Graph,
        free: Bool[Array, " nodes"],
        state: State,
        *,
        visit_steps: int,
    ) -> State:
        """At most ``visit_steps`` evaluations, fewer where neighbours could be out of date."""
        first = state.displacement

        def evaluate_and_step(state: State) -> State:
            here = graph._replace(positions=graph.positions + (state.displacement - first))
            if self.skin:
                here = within_cutoff(here, self.potential.config.cutoff)
            prediction = self._network(params, here)
            forces = jnp.where(free[:, None], prediction.forces, 0)
            finite = all_finite(forces, graph)
            forces = jnp.where(finite[graph.node_graph][:, None], forces, 0)
            active = graph.graph_mask & ~state.done
            converged = finite & (largest_force(forces, graph) < self.fmax)
            stuck = ~finite | (state.steps >= self.max_steps)
            done = active & (converged | stuck)
            moving = active & ~done
            step, memory = self.optimizer.step(state.memory, forces, graph)
            evaluated = active[graph.node_graph]
            return State(
                displacement=jnp.where(
                    (free & moving[graph.node_graph])[:, None],
                    state.displacement + step,
                    state.displacement,
                ),
                forces=jnp.where(evaluated[:, None], prediction.forces, state.forces),
                node_energies=jnp.where(evaluated, prediction.node_energies, state.node_energies),
                steps=state.steps + moving.astype(jnp.int32),
                done=state.done | done,
                converged=state.converged | (active & converged),
                memory=memory,
            )

        if visit_steps == 1:
            return evaluate_and_step(state)

        def goes_on(carry: tuple[Array, State]) -> Array:
            count, state = carry
            moved = jnp.sqrt(jnp.max(jnp.sum((state.displacement - first) ** 2, axis=1)))
            # one that is done makes room for another
            return (count < visit_steps) & ~jnp.any(state.done) & (2 * moved < self.skin)

        def body(carry: tuple[Array, State]) -> tuple[Array, State]:
            count, state = carry
            return count + 1, evaluate_and_step(state)

        return jax.lax.while_loop(goes_on, body, (jnp.int32(0), state))[1]


def _item(index: int, structure: Any) -> _Item:
    if isinstance(structure, CatalystFrame):
        initial, fixed = structure.structure, structure.fixed
    elif isinstance(structure, Atoms):
        from ase.constraints import FixAtoms

        from equizoo.data.catalyst_s2ef import fixed_atoms
        from equizoo.data.frames import Frame as AtomsFrame

        others = [c for c in structure.constraints if not isinstance(c, FixAtoms)]
        if others:
            raise ValueError(
                f"structures[{index}] has the constraint {type(others[0]).__name__}; only FixAtoms "
                "can be kept. Remove it, or relax with ase.optimize and potential.calculator()."
            )
        initial = Structure.from_atoms(structure, f"structures[{index}]")
        fixed = fixed_atoms(AtomsFrame("", structure))
    elif isinstance(structure, Structure):
        initial = structure
        given = structure.info.get("fixed")
        fixed = np.zeros(initial.num_nodes, bool) if given is None else np.asarray(given, bool)
    else:
        raise ValueError(
            f"structures[{index}] is a {type(structure).__name__}, expected ase.Atoms, a Structure "
            "or a CatalystFrame."
        )
    if fixed.shape != (initial.num_nodes,):
        raise ValueError(
            f"structures[{index}]: fixed has shape {fixed.shape}, expected one truth value for "
            f"each of {initial.num_nodes} atoms."
        )
    return _Item(index, initial, ~fixed, np.zeros_like(initial.positions))


def _regrouped(
    state: State, before: Sequence[_Item], after: Sequence[_Item], budget: Budget
) -> State:
    """The state of the batch of ``after``: rows of those that stay, zeros of those that begin."""
    old_nodes, old_graphs = state.displacement.shape[0], state.steps.shape[0]
    starts = np.cumsum([0, *(item.initial.num_nodes for item in before)])
    place = {id(item): number for number, item in enumerate(before)}
    nodes = np.full(budget.nodes, old_nodes, np.int32)  # beyond the end: zero
    graphs = np.full(budget.graphs, old_graphs, np.int32)
    first = 0
    for number, item in enumerate(after):
        count = item.initial.num_nodes
        if (old := place.get(id(item))) is not None:
            nodes[first : first + count] = np.arange(starts[old], starts[old] + count)
            graphs[number] = old
        first += count
    every = Memory(
        (state.displacement, state.forces, state.node_energies, state.memory.nodes),
        (state.steps, state.done, state.converged, state.memory.graphs),
    ).regrouped(jnp.asarray(nodes), jnp.asarray(graphs))
    displacement, forces, node_energies, of_nodes = every.nodes
    steps, done, converged, of_graphs = every.graphs
    memory = Memory(of_nodes, of_graphs)
    return State(displacement, forces, node_energies, steps, done, converged, memory)


# ---- finished ones on disk


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.npz"


def _write(path: Path, relaxed: Relaxed) -> None:
    write_arrays(
        path,
        {
            "positions": relaxed.positions,
            "energy": np.array(relaxed.energy),
            "forces": relaxed.forces,
            "steps": np.array(relaxed.steps),
            "converged": np.array(relaxed.converged),
            **trajectory_arrays(relaxed.trajectory, len(relaxed.positions)),
        },
    )


def _read(path: Path, initial: Structure) -> Relaxed:
    with np.load(path, allow_pickle=False) as arrays:
        return Relaxed(
            positions=arrays["positions"],
            energy=float(arrays["energy"]),
            forces=arrays["forces"],
            steps=int(arrays["steps"]),
            converged=bool(arrays["converged"]),
            trajectory=tuple(trajectory_of(arrays, initial)),
        )
