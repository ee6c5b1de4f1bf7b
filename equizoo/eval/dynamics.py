"""Molecular dynamics of many replicas in one batch, on the device between neighbour lists."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ase import units
from ase.data import atomic_masses, covalent_radii
from jaxtyping import Array, Float, Int

from equizoo.eval.potential import Potential, numerics
from equizoo.graph import Budget, Graph, batch_frames, edge_vectors, sum_graphs, within_cutoff
from equizoo.structure import Structure

SKIN = 0.4  # [Å] over the cutoff: lists hold until an atom has moved half of it
HEADROOM = 1.25  # of neighbours, so that lists change without compiling anew
CHUNK = 100  # steps on the device at a time, at most
BONDED = 1.25  # times the sum of covalent radii
HBAR = units._hbar * units.J * units.s  # in ASE's units


@dataclasses.dataclass(frozen=True)
class NVE:
    """Constant energy: velocity Verlet, started from velocities at ``temperature``."""

    temperature: float = 300.0  # [K]

    friction: float = dataclasses.field(default=0.0, init=False)  # [1/ps]


@dataclasses.dataclass(frozen=True)
class Langevin:
    """Constant temperature: Langevin dynamics, integrated by BAOAB.

    Reference: Leimkuhler & Matthews 2013, https://arxiv.org/abs/1203.5428.
    """

    temperature: float = 300.0  # [K]
    friction: float = 10.0  # [1/ps]


class Trajectory(NamedTuple):
    """What became of every replica; the first row is the start."""

    time: Float[np.ndarray, " samples"]  # [ps]
    energy: Float[np.ndarray, "samples replicas"]  # [eV] kinetic and potential, up to a constant
    temperature: Float[np.ndarray, "samples replicas"]  # [K]
    closest: Float[np.ndarray, "samples replicas"]  # shortest distance over sum of covalent radii
    stretch: Float[np.ndarray, "samples replicas"]  # longest of the first bonds over its length
    # [ħ] about the center of mass: conserved where energies do not change under rotations, so not
    # under periodic boundaries
    angular_momentum: Float[np.ndarray, "samples replicas 3"]
    finished: bool  # False: an atom left the range of its neighbour list within one step
    num_lists: int  # neighbour lists made


class _State(NamedTuple):
    """Positions are relative to where each structure's mean was when the list was made."""

    positions: Float[Array, "nodes 3"]  # [Å]
    velocities: Float[Array, "nodes 3"]  # in ASE's unit of time
    forces: Float[Array, "nodes 3"]  # [eV/Å]
    potential: Float[Array, " graphs"]  # [eV]
    step: Int[Array, ""]


class _Constants(NamedTuple):
    """What does not change between neighbour lists."""

    graph: Graph
    masses: Float[Array, " nodes"]  # [u]
    radii: Float[Array, " nodes"]  # [Å] covalent
    bonds: Int[Array, "bonds 2"]
    bond_lengths: Float[Array, " bonds"]  # [Å] at the start
    bond_graph: Int[Array, " bonds"]
    start: Float[Array, "nodes 3"]  # [Å] positions when the list was made


def simulate(
    potential: Potential,
    structures: Sequence[Structure],
    ensemble: NVE | Langevin,
    *,
    timestep: float = 0.5,  # [fs]
    picoseconds: float = 1.0,
    dtype: str = "float32",
    seed: int = 0,
    skin: float = SKIN,  # [Å]
    progress: Callable[[int, int], None] = lambda done, steps: None,
) -> Trajectory:
    r"""The trajectories of all ``structures`` at once, each a replica of its own.

    A step of length :math:`h` is half a kick, half a drift, a rotation towards the thermostat
    (nothing for :class:`NVE`), half a drift, new forces, half a kick. Forces are evaluated in
    ``dtype``; positions, velocities and sums of energies are float64. Lists of neighbours within
    cutoff and skin are made on the host, and on the device every step drops the pairs beyond the
    cutoff, so the dynamics is that of the potential itself. Replicas do not interact.

    The same arguments give the same trajectory on the same device. Raises ``ValueError`` for
    sizes that are not positive, and as :meth:`Potential.predict` does.
    """
    steps = round(1e3 * picoseconds / timestep) if timestep > 0 else 0
    if steps < 1 or not structures or not skin > 0:
        raise ValueError(
            f"timestep {timestep} fs, {picoseconds} ps, skin {skin} Å, {len(structures)} "
            "structures: expected all of them positive, and at least one step."
        )
    with numerics("float64"):  # of the integrator; the network stays in dtype
        run = _Run(potential, structures, ensemble, timestep, dtype, seed, skin)
        while run.done < steps and run.advance(min(CHUNK, steps - run.done)):
            progress(run.done, steps)
        return run.trajectory()


class _Run:
    """A simulation under way: the host's side."""

    def __init__(self, potential, structures, ensemble, timestep, dtype, seed, skin):
        self.potential, self.dtype, self.ensemble = potential, dtype, ensemble
        self.skin = skin if potential.config.limit is None else 0.0
        self.timestep, self.done, self.num_lists, self.intact = timestep, 0, 0, True
        self.structures = [dataclasses.replace(s, name=s.name or "replica") for s in structures]
        self.sizes = np.cumsum([s.num_nodes for s in structures])[:-1]
        self.network, self.params = potential.network(dtype)
        self._budget: Budget | None = None
        self._fresh = True
        self.key = jax.random.key(seed)
        self.program = jax.jit(self._chunk)
        self.evaluated = jax.jit(self._evaluated)
        self.rows: list[tuple[np.ndarray, ...]] = []
        rng = np.random.default_rng(seed)
        self._list(self.structures)
        nodes = self.budget.nodes
        velocities = np.zeros((nodes, 3))
        velocities[: len(self.masses)] = np.concatenate(
            [_velocities(s, ensemble.temperature, rng) for s in self.structures]
        )
        state = _State(
            self.constants.start,
            jnp.asarray(velocities),
            jnp.zeros((nodes, 3)),
            jnp.zeros(self.budget.graphs),
            jnp.asarray(0),
        )
        self.state = self.evaluated(self.params, self.constants, state)
        self.rows.append(self._row(*jax.jit(self._observe)(self.constants, self.state)))

    @property
    def masses(self) -> Float[np.ndarray, " nodes"]:
        return np.concatenate([atomic_masses[s.atomic_numbers] for s in self.structures])

    def advance(self, steps: int) -> bool:
        """Goes on by at most ``steps``; whether it could go on at all."""
        if self.skin == 0:
            return self._advance_one()
        state, count, rows = self.program(
            self.params, self.constants, self.state, jnp.asarray(steps)
        )
        count = int(count)
        columns = [np.asarray(column) for column in rows]
        self.rows += [self._row(*(column[index] for column in columns)) for index in range(count)]
        self.state, self.done = state, self.done + count
        if count < steps:
            # A list that is fresh and yet too short: an atom flew off, or a number is not finite.
            if count == 0 and self._fresh:
                self.intact = False
                return False
            self._relist()
        else:
            self._fresh = False
        return True

    def _advance_one(self) -> bool:
        """A step with a list made for its very end, where the set of neighbours has a limit."""
        moved = jax.jit(self._move)(self.constants, self.state)
        if not np.isfinite(np.asarray(moved.positions)).all():
            self.intact = False
            return False
        self.state = moved
        self._relist()
        self.state = jax.jit(self._finish)(
            self.constants, self.evaluated(self.params, self.constants, self.state)
        )
        self.rows.append(self._row(*jax.jit(self._observe)(self.constants, self.state)))
        self.done += 1
        return True

    def _relist(self) -> None:
        """A new neighbour list around the positions of now."""
        moved = np.asarray(self.state.positions - self.constants.start)[: len(self.masses)]
        pieces = np.split(moved, self.sizes)
        old = self.budget
        self._list(
            [
                dataclasses.replace(s, positions=s.positions + piece)
                for s, piece in zip(self.structures, pieces, strict=True)
            ]
        )
        assert self.budget.nodes == old.nodes and self.budget.graphs == old.graphs
        self.state = self.state._replace(positions=self.constants.start)

    def _list(self, structures: Sequence[Structure]) -> None:
        frames = [self.potential.frame(s, skin=self.skin) for s in structures]
        if self._budget is None or not self._budget.fits(frames):
            self._budget = Budget.sized(
                frames,
                nodes=sum(f.num_nodes for f in frames) + 1,
                graphs=len(frames) + 1,
                edges=sum(f.num_edges for f in frames),
                num_species=len(self.potential.config.atomic_numbers),
                step=HEADROOM,
                headroom=HEADROOM,
                cost_of_flat=self.potential.config.cost_of_flat,
            )
        if self.num_lists == 0:
            self.bonds, self.lengths, self.bond_graph = _bonds(structures)
        self.structures, self.num_lists, self._fresh = list(structures), self.num_lists + 1, True
        graph = jax.tree.map(jnp.asarray, batch_frames(frames, self.budget, np.float64))
        padding = (0, self.budget.nodes - len(self.masses))
        radii = covalent_radii[np.concatenate([s.atomic_numbers for s in structures])]
        self.constants = _Constants(
            graph=graph,
            masses=jnp.asarray(np.pad(self.masses, padding, constant_values=1.0)),
            radii=jnp.asarray(np.pad(radii, padding, constant_values=1.0)),
            bonds=jnp.asarray(self.bonds),
            bond_lengths=jnp.asarray(self.lengths),
            bond_graph=jnp.asarray(self.bond_graph),
            start=graph.positions,
        )

    @property
    def budget(self) -> Budget:
        assert self._budget is not None  # since the first list
        return self._budget

    def _row(self, *columns: Any) -> tuple[np.ndarray, ...]:
        return tuple(np.asarray(column)[: len(self.structures)] for column in columns)

    def trajectory(self) -> Trajectory:
        columns = [np.stack(column) for column in zip(*self.rows, strict=True)]
        time = 1e-3 * self.timestep * np.arange(len(self.rows))
        degrees = np.array([max(3 * s.num_nodes - self._fixed, 1) for s in self.structures])
        kinetic, potential, closest, stretch, momentum = columns
        temperature = 2 * kinetic / (degrees * units.kB)
        energy = kinetic + potential
        ended = self.intact, self.num_lists
        return Trajectory(time, energy, temperature, closest, stretch, momentum / HBAR, *ended)

    @property
    def _fixed(self) -> int:
        """Degrees of freedom without motion: those of the centre of mass, unless it is pushed."""
        return 0 if self.ensemble.friction > 0 else 3

    # ---- the device's side

    def _chunk(self, params, constants: _Constants, state: _State, steps: Int[Array, ""]):
        """Up to ``steps`` steps, as long as the list holds; the state, their number, their rows."""
        first = state.step

        def body(carry):
            old, _, rows = carry
            moved = self._move(constants, old)
            new = self._finish(constants, self._evaluated(params, constants, moved))
            squares = jnp.sum((new.positions - constants.start) ** 2, axis=1)
            # not <=, so that NaN counts as out of range
            holds = jnp.all(squares < (self.skin / 2) ** 2)
            holds &= jnp.all(jnp.isfinite(new.forces))
            index = old.step - first
            row = self._observe(constants, new)
            rows = tuple(
                column.at[index].set(value) for column, value in zip(rows, row, strict=True)
            )
            kept = jax.tree.map(lambda a, b: jnp.where(holds, a, b), new, old)
            return kept, holds, rows

        def going(carry):
            state, holds, _ = carry
            return holds & (state.step - first < steps)

        row = jax.eval_shape(self._observe, constants, state)
        rows = tuple(jnp.zeros((CHUNK, *column.shape), column.dtype) for column in row)
        state, _, rows = jax.lax.while_loop(going, body, (state, jnp.asarray(True), rows))
        return state, state.step - first, rows

    def _move(self, constants: _Constants, state: _State) -> _State:
        """Half a kick, and the whole way to the positions of the step's end."""
        half = 0.5 * self.timestep * units.fs
        masses = constants.masses[:, None]
        velocities = state.velocities + half * state.forces / masses
        positions = state.positions + half * velocities
        # [1/ps] times [fs]
        kept = math.exp(-1e-3 * self.ensemble.friction * self.timestep)
        if self.ensemble.friction > 0:
            noise = jax.random.normal(
                jax.random.fold_in(self.key, state.step), velocities.shape, jnp.float64
            )
            spread = jnp.sqrt((1 - kept**2) * units.kB * self.ensemble.temperature / masses)
            velocities = kept * velocities + spread * noise
        positions = positions + half * velocities
        real = constants.graph.node_mask[:, None]
        return state._replace(
            positions=jnp.where(real, positions, state.positions),
            velocities=jnp.where(real, velocities, 0.0),
        )

    def _evaluated(self, params, constants: _Constants, state: _State) -> _State:
        """The state with forces and energy of its positions."""
        here = constants.graph._replace(positions=state.positions)
        graph = within_cutoff(here, self.potential.config.cutoff)
        prediction = self.network(params, _as(graph, self.dtype))
        nodes = prediction.node_energies.astype(jnp.float64)
        return state._replace(
            forces=prediction.forces.astype(jnp.float64),
            potential=sum_graphs(nodes, constants.graph),
        )

    def _finish(self, constants: _Constants, state: _State) -> _State:
        half = 0.5 * self.timestep * units.fs
        velocities = state.velocities + half * state.forces / constants.masses[:, None]
        return state._replace(velocities=velocities, step=state.step + 1)

    def _observe(self, constants: _Constants, state: _State):
        """Kinetic and potential energy, closest approach, longest stretch and angular momentum of
        every graph."""
        graph = constants.graph
        squares = jnp.sum(state.velocities**2, axis=1)
        kinetic = sum_graphs(0.5 * constants.masses * squares, graph)
        here = graph._replace(positions=state.positions)
        lengths = jnp.linalg.norm(edge_vectors(here, self.potential.config.cutoff), axis=1)
        touch = constants.radii[graph.senders] + constants.radii[graph.receivers]
        ratio = jnp.where(graph.edge_mask, lengths / touch, jnp.inf)
        home = graph.node_graph[graph.receivers]
        closest = jax.ops.segment_min(ratio, home, graph.num_graphs)
        ends = state.positions[constants.bonds]
        now = jnp.linalg.norm(ends[:, 0] - ends[:, 1], axis=1)
        stretch = jax.ops.segment_max(
            now / constants.bond_lengths, constants.bond_graph, graph.num_graphs
        )
        stretch = jnp.where(stretch > 0, stretch, 0.0)
        masses = jnp.where(graph.node_mask, constants.masses, 0.0)[:, None]
        total = jnp.maximum(sum_graphs(masses, graph), 1.0)  # padding has none
        center = sum_graphs(masses * state.positions, graph) / total
        arms = state.positions - center[graph.node_graph]
        momentum = sum_graphs(masses * jnp.cross(arms, state.velocities), graph)
        return kinetic, state.potential, closest, stretch, momentum


def _as(graph: Graph, dtype: str) -> Graph:
    """The graph with its real numbers in ``dtype``."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, graph
    )


def _velocities(
    structure: Structure, temperature: float, rng: np.random.Generator
) -> Float[np.ndarray, "nodes 3"]:
    """Of Maxwell and Boltzmann, without motion of the whole."""
    masses = atomic_masses[structure.atomic_numbers][:, None]
    drawn = rng.normal(size=(structure.num_nodes, 3)) * np.sqrt(units.kB * temperature / masses)
    return drawn - (masses * drawn).sum(axis=0) / masses.sum()


def _bonds(
    structures: Sequence[Structure],
) -> tuple[Int[np.ndarray, "bonds 2"], Float[np.ndarray, " bonds"], Int[np.ndarray, " bonds"]]:
    """Pairs of nodes bonded at the start, their lengths [Å] and graphs; none where periodic, since
    solids may flow. One pair of an atom with itself stands for none."""
    pairs, lengths, graphs, first = [[0, 0]], [1.0], [0], 0
    for index, structure in enumerate(structures):
        if not any(structure.pbc):
            vectors = structure.positions[:, None] - structure.positions[None]
            distances = np.linalg.norm(vectors, axis=2)
            radii = covalent_radii[structure.atomic_numbers]
            bonded = np.triu(distances < BONDED * (radii[:, None] + radii[None]), k=1)
            for i, j in np.argwhere(bonded).tolist():
                pairs.append([first + i, first + j])
                lengths.append(float(distances[i, j]))
                graphs.append(index)
        first += structure.num_nodes
    return np.array(pairs), np.array(lengths), np.array(graphs)


def drift(trajectory: Trajectory, num_nodes: Sequence[int]) -> dict[str, float]:
    """Slope and scatter of the total energy of an NVE run, per atom, over the replicas.

    ``drift_meV_per_atom_per_ps`` is the largest slope (of either sign) of a line through a
    replica's energy, ``mean_drift_...`` the mean slope; ``fluctuation_meV_per_atom`` the largest
    standard deviation around the line.
    """
    per_atom = 1e3 * trajectory.energy / np.array(num_nodes)[None]
    lines = np.polynomial.polynomial.polyfit(trajectory.time, per_atom, 1)
    around = per_atom - lines[0][None] - trajectory.time[:, None] * lines[1][None]
    return {
        "drift_meV_per_atom_per_ps": float(np.abs(lines[1]).max()),
        "mean_drift_meV_per_atom_per_ps": float(lines[1].mean()),
        "fluctuation_meV_per_atom": float(around.std(axis=0).max()),
    }
