"""A padded batch of structures as a graph, and every sum over edges, nodes and species in it.

All sign and cell conventions live here:
``edge_vectors = positions[receivers] - positions[senders] + shifts @ cell`` with lattice vectors in
the rows of ``cell``; messages are summed on receivers.

Two layouts of the edges. *Flat*: sorted by receiver, sums are sorted segment sums. *Rows* (when
``outgoing`` is present): receiver ``i`` owns the edges ``[i * slots, (i + 1) * slots)``, so a sum
over neighbours is a sum over an axis, and the gather from senders has another gather as its
transpose. Rows need no scatter in any derivative and are deterministic; they waste memory where
neighbour counts vary much, and the batcher then chooses flat.
"""

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from equizoo.neighbors import (
    NeighborLimit,
    Neighbors,
    complete_cell,
    nearest_neighbors,
    neighbor_list,
)
from equizoo.structure import Structure, symbols


class Graph(NamedTuple):
    """A batch of structures padded to a :class:`Budget`. Padding is inert and marked by masks.

    Padded edges point from a node to itself, padded nodes have species 0 and belong to the last
    graph, which is always padding.
    """

    positions: Float[Array, "nodes 3"]  # [Å] relative to the mean of each structure
    species: Int[Array, " nodes"]  # index into the model's elements
    node_graph: Int[Array, " nodes"]
    node_mask: Bool[Array, " nodes"]
    cell: Float[Array, "graphs 3 3"]  # [Å] rows are lattice vectors
    graph_mask: Bool[Array, " graphs"]
    senders: Int[Array, " edges"]
    receivers: Int[Array, " edges"]
    shifts: Float[Array, "edges 3"]  # in lattice vectors
    edge_mask: Bool[Array, " edges"]
    outgoing: Int[Array, "nodes out_slots"] | None  # edges that leave a node, num_edges = none
    species_blocks: Int[Array, "blocks block_size"]  # nodes of one species, num_nodes = none
    block_species: Int[Array, " blocks"]
    block_slot: Int[Array, " nodes"]  # where a node stands in the flattened species_blocks
    head: Int[Array, " graphs"] | None = None  # index into the model's heads; None: the first
    charge: Float[Array, " graphs"] | None = None  # [e] None: neutral
    spin: Float[Array, " graphs"] | None = None  # multiplicity 2S + 1; None: singlet
    # [eV/Å] of the structure before it was corrupted, on corrupted atoms, zero on others; None: the
    # model is not asked for noise
    given_forces: Float[Array, "nodes 3"] | None = None

    @property
    def num_nodes(self) -> int:
        return self.species.shape[0]

    @property
    def num_edges(self) -> int:
        return self.senders.shape[0]

    @property
    def num_graphs(self) -> int:
        return self.graph_mask.shape[0]

    @property
    def slots(self) -> int | None:
        """Edges per row, or ``None`` in the flat layout."""
        return None if self.outgoing is None else self.num_edges // self.num_nodes


class ForcesOn(enum.StrEnum):
    """Atoms whose forces are targets: ``all``, or those that are :attr:`Structure.free`."""

    ALL = "all"
    FREE = "free"


class Labels(NamedTuple):
    """Targets of a batch; a label that is absent has mask False and value zero."""

    energy: Float[Array, " graphs"]  # [eV] without reference energies
    forces: Float[Array, "nodes 3"]  # [eV/Å]
    stress: Float[Array, "graphs 3 3"]  # [eV/Å^3]
    energy_mask: Bool[Array, " graphs"]
    forces_mask: Bool[Array, " nodes"]
    stress_mask: Bool[Array, " graphs"]
    noise: Float[Array, "nodes 3"] | None = None  # displacements over the scale of their frame
    noise_mask: Bool[Array, " nodes"] | None = None  # atoms that have been displaced


# ---- sums and gathers -------------------------------------------------------------------------


@jax.custom_vjp
def _sum_of(
    x: Float[Array, "sources *rest"],
    index: Int[Array, "targets slots"],
    transpose: Int[Array, "sources slots_back"],
) -> Float[Array, "targets *rest"]:
    """``out[t] = sum_k x[index[t, k]]``, an index past the end adding nothing.

    ``transpose`` lists, for every source, the targets that it adds to: the derivative is the same
    map with the two exchanged, so all derivatives in reverse mode are gathers.
    """
    taken = x.at[index].get(mode="fill", fill_value=0)
    return taken[:, 0] if index.shape[1] == 1 else taken.sum(axis=1)


_sum_of.defvjp(
    lambda x, index, transpose: (_sum_of(x, index, transpose), (index, transpose)),
    lambda residual, g: (_sum_of(g, residual[1], residual[0]), None, None),
)


def edge_vectors(graph: Graph, cutoff: float) -> Float[Array, "edges 3"]:
    """Vectors from sender to receiver [Å]; ``(cutoff, 0, 0)`` on padded edges."""
    cell = graph.cell[graph.node_graph[graph.receivers]]
    shift = jnp.einsum("ei,eij->ej", graph.shifts, cell, precision="highest")
    vectors = graph.positions[graph.receivers] - graph.positions[graph.senders] + shift
    padding = jnp.array([cutoff, 0, 0], vectors.dtype)
    return jnp.where(graph.edge_mask[:, None], vectors, padding[None])


def within_cutoff(graph: Graph, cutoff: float) -> Graph:
    """The graph without edges longer than ``cutoff`` [Å]: they become padding.

    For edges found with a skin, whose lengths at present positions decide.
    """
    vectors = edge_vectors(graph, cutoff)
    mask = graph.edge_mask & (jnp.sum(vectors**2, axis=1) < cutoff**2)
    outgoing = graph.outgoing
    if outgoing is not None:
        real = mask.at[outgoing].get(mode="fill", fill_value=False)
        outgoing = jnp.where(real, outgoing, graph.num_edges)
    return graph._replace(edge_mask=mask, outgoing=outgoing)


def gather_senders(x: Float[Array, "nodes *rest"], graph: Graph) -> Float[Array, "edges *rest"]:
    """The value at each edge's sender; zero on padded edges."""
    senders = jnp.where(graph.edge_mask, graph.senders, graph.num_nodes)
    if graph.outgoing is None:
        return x.at[senders].get(mode="fill", fill_value=0)
    return _sum_of(x, senders[:, None], graph.outgoing)


def gather_receivers(x: Float[Array, "nodes *rest"], graph: Graph) -> Float[Array, "edges *rest"]:
    """The value at each edge's receiver, on padded edges too."""
    if graph.slots is None:
        return x[graph.receivers]
    rows = jnp.broadcast_to(x[:, None], (graph.num_nodes, graph.slots, *x.shape[1:]))
    return rows.reshape(graph.num_edges, *x.shape[1:])


def sum_receivers(x: Float[Array, "edges *rest"], graph: Graph) -> Float[Array, "nodes *rest"]:
    """The sum over each node's incoming edges, padded edges left out."""
    x = jnp.where(_expand(graph.edge_mask, x.ndim), x, 0)
    if graph.slots is None:
        return jax.ops.segment_sum(x, graph.receivers, graph.num_nodes, indices_are_sorted=True)
    return x.reshape(graph.num_nodes, graph.slots, *x.shape[1:]).sum(axis=1)


def sum_senders(x: Float[Array, "edges *rest"], graph: Graph) -> Float[Array, "nodes *rest"]:
    """The sum over each node's outgoing edges, padded edges left out."""
    senders = jnp.where(graph.edge_mask, graph.senders, graph.num_nodes)
    if graph.outgoing is None:
        return jax.ops.segment_sum(x, senders, graph.num_nodes)
    return _sum_of(x, graph.outgoing, senders[:, None])


def softmax_receivers(
    logits: Float[Array, "edges heads"],
    graph: Graph,
    envelope: Float[Array, " edges"] | None = None,
) -> Float[Array, "edges heads"]:
    r"""Weights of each node's incoming edges, padded edges zero.

    .. math:: w_e = \frac{\exp a_e}{\sum_{e'} \exp a_{e'}} \quad\text{or, with an envelope,}\quad
        w_e = \frac{f_e \exp a_e}{1 + \sum_{e'} f_{e'} \exp a_{e'}}

    Without an envelope they sum to one, and jump when an edge appears. An envelope that vanishes
    at the cutoff makes them as smooth as it is; the 1, an edge to nothing of logit zero, keeps the
    weight of an only neighbour from staying one until it is gone.
    """
    real = graph.edge_mask[:, None]
    # any shift cancels, so it is a constant for derivatives
    least = -jnp.inf if envelope is None else 0.0
    top = _max_receivers(jax.lax.stop_gradient(logits), graph, least)
    powers = jnp.exp(jnp.where(real, logits - gather_receivers(top, graph), 0))
    powers = jnp.where(real, powers if envelope is None else powers * envelope[:, None], 0)
    total = sum_receivers(powers, graph)
    total = jnp.where(total == 0, 1, total) if envelope is None else total + jnp.exp(-top)
    return powers / gather_receivers(total, graph)


def _max_receivers(
    x: Float[Array, "edges heads"], graph: Graph, least: float
) -> Float[Array, "nodes heads"]:
    """The largest of ``least`` and each node's incoming edges; 0 if that is minus infinity."""
    x = jnp.where(graph.edge_mask[:, None], x, jnp.full_like(x, -jnp.inf))
    if graph.slots is None:
        top = jax.ops.segment_max(x, graph.receivers, graph.num_nodes, indices_are_sorted=True)
    else:
        top = x.reshape(graph.num_nodes, graph.slots, -1).max(axis=1)
    top = jnp.maximum(top, jnp.asarray(least, x.dtype))
    return jnp.where(jnp.isfinite(top), top, 0)


def sum_graphs(x: Float[Array, "nodes *rest"], graph: Graph) -> Float[Array, "graphs *rest"]:
    """The sum over each graph's nodes, padded nodes left out."""
    x = jnp.where(_expand(graph.node_mask, x.ndim), x, 0)
    member = (
        graph.node_graph[None, :]
        == jnp.arange(graph.num_graphs, dtype=graph.node_graph.dtype)[:, None]
    )
    return jnp.tensordot(member.astype(x.dtype), x, 1, precision="highest")


def to_species_blocks(
    x: Float[Array, "nodes *rest"], graph: Graph
) -> Float[Array, "blocks block_size *rest"]:
    """Nodes brought together by species, so that a weight per species is one per block."""
    index = graph.species_blocks.reshape(-1, 1)
    blocks = _sum_of(x, index, graph.block_slot[:, None])
    return blocks.reshape(*graph.species_blocks.shape, *x.shape[1:])


def from_species_blocks(
    x: Float[Array, "blocks block_size *rest"], graph: Graph
) -> Float[Array, "nodes *rest"]:
    """The inverse of :func:`to_species_blocks`; padded nodes get zero."""
    flat = x.reshape(graph.species_blocks.size, *x.shape[2:])
    return _sum_of(flat, graph.block_slot[:, None], graph.species_blocks.reshape(-1, 1))


def _expand(
    mask: Bool[Array, " n"] | Bool[np.ndarray, " n"], ndim: int
) -> Bool[Array, "n ..."] | Bool[np.ndarray, "n ..."]:
    return mask.reshape(mask.shape + (1,) * (ndim - 1))


# ---- from structures to padded batches, on the host --------------------------------------------


class Noise(NamedTuple):
    """What was added to the positions of a structure that a model is to find out."""

    displacements: Float[np.ndarray, "nodes 3"]  # over some scale; zero where not displaced
    mask: Bool[np.ndarray, " nodes"]  # atoms that have been displaced


class Frame(NamedTuple):
    """One structure with its neighbours, on the host: what batches are packed from.

    With ``noise``, positions and neighbours are the displaced ones, labels those of before.
    """

    structure: Structure
    species: Int[np.ndarray, " nodes"]
    neighbors: Neighbors
    max_in: int  # most edges into one node
    max_out: int  # most edges out of one node
    head: int = 0  # index into the model's heads
    noise: Noise | None = None

    @property
    def num_nodes(self) -> int:
        return len(self.species)

    @property
    def num_edges(self) -> int:
        return len(self.neighbors.senders)


def species_of(structure: Structure, atomic_numbers: Sequence[int]) -> Int[np.ndarray, " nodes"]:
    """Index of every atom in ``atomic_numbers``; ``ValueError`` names elements not in it."""
    from ase.data import chemical_symbols

    table = np.full(len(chemical_symbols), -1, np.int32)
    table[list(atomic_numbers)] = np.arange(len(atomic_numbers))
    species = table[structure.atomic_numbers]
    if (species < 0).any():
        unseen = sorted({int(z) for z in structure.atomic_numbers[species < 0]})
        raise ValueError(
            f"Structure {structure.name or '(unnamed)'} has element(s) "
            f"{symbols(unseen)} that the model was not made for; it "
            f"knows {symbols(atomic_numbers)}. Choose a model that "
            "covers them (`equizoo models`), or train one."
        )
    return species


def make_frame(
    structure: Structure,
    cutoff: float,
    atomic_numbers: Sequence[int],
    *,
    head: int = 0,
    limit: NeighborLimit | None = None,
    neighbors: Neighbors | None = None,
) -> Frame:
    """A structure with species indices and its neighbour list, of which ``limit`` keeps a part;
    ``head`` is the index of its level of theory. ``neighbors`` are these very ones, where known.

    Raises ``ValueError`` for elements outside ``atomic_numbers``.
    """
    species = species_of(structure, atomic_numbers)
    if neighbors is None:
        neighbors = neighbor_list(structure.positions, structure.cell, structure.pbc, cutoff)
        if limit is not None:
            neighbors = nearest_neighbors(neighbors, structure.positions, structure.cell, limit)
    counts = [
        np.bincount(ends, minlength=1).max(initial=0)
        for ends in (neighbors.receivers, neighbors.senders)
    ]
    return Frame(structure, species, neighbors, int(counts[0]), int(counts[1]), head)


def round_up(n: int, step: float = 1.0) -> int:
    """The smallest rung of a fixed ladder of sizes that is at least ``n``.

    Rungs are 1, 2, 3, 4 and then multiples of 4, each at least ``step`` times the one before: with
    ``step`` above 1 sizes that vary share a rung, and with it one compiled program.
    """
    rung = 1
    while rung < n:
        rung = rung + 1 if rung < 4 else max(rung + 4, 4 * math.ceil(rung * step / 4))
    return rung


@dataclasses.dataclass(frozen=True)
class Budget:
    """The static shape of a batch: one compiled program per budget.

    One graph and one node are always left for padding. ``slots`` and ``out_slots`` choose the
    row layout (``edges`` is then ``nodes * slots``); ``slots=None`` the flat one.
    """

    nodes: int
    graphs: int
    edges: int
    slots: int | None
    out_slots: int | None
    blocks: int
    block_size: int

    # An edge of the flat layout against one in rows, unless a model says otherwise: gathers,
    # scatters and a sort order against a gather and an axis sum.
    COST_OF_FLAT = 2.0

    @classmethod
    def of(
        cls, frames: Sequence[Frame], nodes: int = 0, graphs: int = 0, step: float = 1.0
    ) -> "Budget":
        """A budget that holds every one of ``frames`` alone and ``nodes``, ``graphs`` together.

        Sizes are rounded up to the ladder of :func:`round_up` with ``step``.
        """
        if not frames:
            raise ValueError("A budget needs at least one frame to be chosen from; got none.")
        largest = max(frame.num_nodes for frame in frames)
        nodes = round_up(max(nodes, largest) + 1, step)
        return cls.sized(
            frames,
            nodes=nodes,
            graphs=round_up(max(graphs, 1), step) + 1,
            edges=max(math.ceil(nodes * f.num_edges / f.num_nodes) for f in frames),
            num_species=len(set().union(*(frame.species.tolist() for frame in frames))),
            step=step,
        )

    @classmethod
    def sized(
        cls,
        frames: Sequence[Frame],
        *,
        nodes: int,
        graphs: int,
        edges: int,
        num_species: int,
        step: float = 1.0,
        headroom: float = 1.0,
        cost_of_flat: float | None = None,
    ) -> "Budget":
        """The budget for the most edges into and out of one node that any of ``frames`` has; see
        :meth:`cheaper`."""
        return cls.cheaper(
            max_in=max(f.max_in for f in frames),
            max_out=max(f.max_out for f in frames),
            nodes=nodes,
            graphs=graphs,
            edges=edges,
            num_species=num_species,
            step=step,
            headroom=headroom,
            cost_of_flat=cost_of_flat,
        )

    @classmethod
    def cheaper(
        cls,
        *,
        max_in: int,
        max_out: int,
        nodes: int,
        graphs: int,
        edges: int,
        num_species: int,
        step: float = 1.0,
        headroom: float = 1.0,
        cost_of_flat: float | None = None,
    ) -> "Budget":
        """The cheaper of two layouts: ``edges`` in a flat one, or rows of ``max_in`` and
        ``max_out`` edges for every node.

        Both are made ``headroom`` times as large, and rounded up as in :meth:`of`.
        """
        slots, out_slots, flat = (
            round_up(math.ceil(headroom * size), step) for size in (max_in, max_out, edges)
        )
        cost_of_flat = cls.COST_OF_FLAT if cost_of_flat is None else cost_of_flat
        rows = nodes * slots <= cost_of_flat * flat
        block_size = _block_size(num_species, nodes)
        return cls(
            nodes=nodes,
            graphs=graphs,
            edges=nodes * slots if rows else flat,
            slots=slots if rows else None,
            out_slots=out_slots if rows else None,
            blocks=nodes // block_size + num_species,  # of each species all but the last are full
            block_size=block_size,
        )

    def fits(self, frames: Sequence[Frame]) -> bool:
        """Whether ``frames`` can be one batch of this shape."""
        if sum(f.num_nodes for f in frames) > self.nodes - 1 or len(frames) > self.graphs - 1:
            return False
        if self.slots is None or self.out_slots is None:
            if sum(f.num_edges for f in frames) > self.edges:
                return False
        elif any(f.max_in > self.slots or f.max_out > self.out_slots for f in frames):
            return False
        counts = (
            np.zeros(0, int)
            if not frames
            else np.bincount(np.concatenate([f.species for f in frames]))
        )
        return int(np.sum(-(-counts // self.block_size))) <= self.blocks


def _block_size(num_species: int, nodes: int) -> int:
    """Nodes per species block: small blocks pad less, large ones share a folding of weights that
    costs about as much as 24 nodes."""
    return min((8, 16, 32, 64), key=lambda b: (nodes // b + num_species) * (b + 24))


def batch_frames(
    frames: Sequence[Frame],
    budget: Budget,
    dtype: np.dtype | type = np.float32,
) -> Graph:
    """One padded :class:`Graph` (numpy arrays) of all ``frames``, in their order.

    Positions are taken relative to each structure's mean before they are rounded to ``dtype``, and
    atoms more than a cell away from it are brought back by whole cells: where they have wandered
    does not cost precision.
    An empty sequence gives a batch of padding. Raises ``ValueError`` when they do not fit.
    """
    if not budget.fits(frames):
        raise ValueError(
            f"{len(frames)} frames with {sum(f.num_nodes for f in frames)} nodes and "
            f"{sum(f.num_edges for f in frames)} edges do not fit {budget}."
        )
    nodes, graphs, edges = budget.nodes, budget.graphs, budget.edges
    positions = np.zeros((nodes, 3), dtype)
    species = np.zeros(nodes, np.int32)
    node_graph = np.full(nodes, graphs - 1, np.int32)
    node_mask = np.zeros(nodes, bool)
    cell = np.zeros((graphs, 3, 3), dtype)
    graph_mask = np.zeros(graphs, bool)
    if budget.slots is None:
        receivers = np.full(edges, nodes - 1, np.int32)
    else:
        receivers = np.repeat(np.arange(nodes, dtype=np.int32), budget.slots)
    senders = receivers.copy()
    shifts = np.zeros((edges, 3), dtype)
    edge_mask = np.zeros(edges, bool)
    head = np.zeros(graphs, np.int32)
    charge, spin = np.zeros(graphs, dtype), np.ones(graphs, dtype)
    given = None if all(f.noise is None for f in frames) else np.zeros((nodes, 3), dtype)

    first_node = first_edge = 0
    for g, frame in enumerate(frames):
        structure, neighbors = frame.structure, frame.neighbors
        here = slice(first_node, first_node + frame.num_nodes)
        cells = _cells_away(structure)
        inside = structure.positions - cells @ structure.cell
        positions[here] = inside - inside.mean(axis=0)
        species[here] = frame.species
        node_graph[here] = g
        node_mask[here] = True
        cell[g] = np.where(np.array(structure.pbc)[:, None], structure.cell, 0.0)
        graph_mask[g] = True
        head[g], charge[g], spin[g] = frame.head, structure.charge, structure.spin
        if given is not None and frame.noise is not None and structure.forces is not None:
            given[here] = np.where(frame.noise.mask[:, None], structure.forces, 0)
        if budget.slots is None:
            place = np.arange(first_edge, first_edge + frame.num_edges)
        else:
            place = (first_node + neighbors.receivers) * budget.slots + _rank_in_group(
                neighbors.receivers, frame.num_nodes
            )
        senders[place] = neighbors.senders + first_node
        receivers[place] = neighbors.receivers + first_node
        shifts[place] = neighbors.shifts + cells[neighbors.receivers] - cells[neighbors.senders]
        edge_mask[place] = True
        first_node += frame.num_nodes
        first_edge += frame.num_edges

    outgoing = None
    if budget.out_slots is not None:
        outgoing = np.full((nodes, budget.out_slots), edges, np.int32)
        real = np.flatnonzero(edge_mask)
        real = real[np.argsort(senders[real], kind="stable")]
        outgoing[senders[real], _rank_in_group(senders[real], nodes)] = real

    blocks, block_species, block_slot = _species_blocks(species[:first_node], nodes, budget)
    return Graph(
        positions, species, node_graph, node_mask, cell, graph_mask, senders, receivers, shifts,
        edge_mask, outgoing, blocks, block_species, block_slot, head, charge, spin, given,
    )  # fmt: skip


def _cells_away(structure: Structure) -> Float[np.ndarray, "nodes 3"]:
    """By how many cell vectors each atom is away from the mean of all; zero up to one, and along
    axes that do not repeat."""
    periodic = np.array(structure.pbc)
    if not periodic.any():
        return np.zeros((structure.num_nodes, 3))
    axes = complete_cell(structure.cell, periodic)
    apart = np.linalg.solve(axes.T, (structure.positions - structure.positions.mean(axis=0)).T).T
    return np.where(periodic & (np.abs(apart) > 1), np.round(apart), 0.0)


def batch_labels(
    frames: Sequence[Frame],
    budget: Budget,
    reference_energies: Float[np.ndarray, "*heads species"],  # [eV]
    dtype: np.dtype | type = np.float32,
    forces_on: ForcesOn = ForcesOn.ALL,
) -> Labels:
    """Targets in the layout of :func:`batch_frames`, reference energies subtracted in float64:
    those of each frame's head, where they differ by head.

    Stress is a label of cells periodic along all three axes; of others no model has one.
    Where frames have noise, displaced atoms have it for a target and no force.
    """
    energy = np.zeros(budget.graphs, dtype)
    forces = np.zeros((budget.nodes, 3), dtype)
    stress = np.zeros((budget.graphs, 3, 3), dtype)
    energy_mask = np.zeros(budget.graphs, bool)
    forces_mask = np.zeros(budget.nodes, bool)
    stress_mask = np.zeros(budget.graphs, bool)
    noise = noise_mask = None
    if any(frame.noise is not None for frame in frames):
        noise, noise_mask = np.zeros((budget.nodes, 3), dtype), np.zeros(budget.nodes, bool)
    shared = reference_energies.ndim == 1
    first_node = 0
    for g, frame in enumerate(frames):
        structure = frame.structure
        here = slice(first_node, first_node + frame.num_nodes)
        if structure.energy is not None:
            isolated = reference_energies if shared else reference_energies[frame.head]
            energy[g] = structure.energy - isolated[frame.species].sum()
            energy_mask[g] = True
        if structure.forces is not None:
            forces[here] = structure.forces
            forces_mask[here] = True
            if forces_on is ForcesOn.FREE:
                forces_mask[here] = structure.free
        if structure.stress is not None and all(structure.pbc):
            stress[g] = structure.stress
            stress_mask[g] = True
        if noise is not None and noise_mask is not None and frame.noise is not None:
            noise[here], noise_mask[here] = frame.noise
            forces_mask[here] &= ~frame.noise.mask
        first_node += frame.num_nodes
    return Labels(energy, forces, stress, energy_mask, forces_mask, stress_mask, noise, noise_mask)


def unbatch_nodes(
    x: Float[np.ndarray, "nodes *rest"], frames: Sequence[Frame]
) -> list[Float[np.ndarray, "_ *rest"]]:
    """Per-node values of a batch cut into one array per frame."""
    ends = np.cumsum([frame.num_nodes for frame in frames])
    return np.split(np.asarray(x)[: ends[-1]], ends[:-1])


def _rank_in_group(sorted_groups: Int[np.ndarray, " n"], num_groups: int) -> Int[np.ndarray, " n"]:
    """0, 1, 2, ... within each run of equal values of a sorted array."""
    counts = np.bincount(sorted_groups, minlength=num_groups)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return np.arange(len(sorted_groups)) - starts[sorted_groups]


def _species_blocks(species, nodes: int, budget: Budget):
    """Nodes sorted by species into blocks of one species each, and the way back."""
    size = budget.block_size
    blocks = np.full((budget.blocks, size), nodes, np.int32)
    block_species = np.zeros(budget.blocks, np.int32)
    block_slot = np.full(nodes, budget.blocks * size, np.int32)
    row = 0
    for s in np.unique(species):
        members = np.flatnonzero(species == s)
        rows = -(-len(members) // size)
        blocks[row : row + rows].flat[: len(members)] = members
        block_species[row : row + rows] = s
        block_slot[members] = row * size + np.arange(len(members))
        row += rows
    return blocks, block_species, block_slot
