"""Atoms without neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from equizoo.graph import Graph


def lone_atoms(
    num_species: int,
    cutoff: float,  # [Å]
    dtype: jnp.dtype,
    num_heads: int = 1,
) -> tuple[Float[Array, "edges 3"], Graph]:
    """One atom of every species for every head, head by head, in a graph of its own, with one edge
    that is masked; and the vectors of these edges, as long as the cutoff."""
    total = num_species * num_heads
    nodes = np.arange(total, dtype=np.int32)
    species = nodes % num_species
    graph = Graph(
        positions=np.zeros((total, 3), np.float32),
        species=species,
        node_graph=nodes,
        node_mask=np.ones(total, bool),
        cell=np.zeros((total, 3, 3), np.float32),
        graph_mask=np.ones(total, bool),
        senders=nodes,
        receivers=nodes,
        shifts=np.zeros((total, 3), np.float32),
        edge_mask=np.zeros(total, bool),
        outgoing=np.full((total, 1), total, np.int32),
        species_blocks=nodes[:, None],
        block_species=species,
        block_slot=nodes,
        head=nodes // num_species,
    )
    away = jnp.tile(jnp.array([[cutoff, 0, 0]], dtype), (graph.num_edges, 1))
    return away, jax.tree.map(jnp.asarray, graph)
