"""Atoms without neighbours."""

import numpy as np

from equizoo.graph import Graph


def lone_atoms(num_species: int) -> Graph:
    """One atom of every species in a graph of its own, with one edge that is masked."""
    nodes = np.arange(num_species, dtype=np.int32)
    return Graph(
        positions=np.zeros((num_species, 3), np.float32),
        species=nodes,
        node_graph=nodes,
        node_mask=np.ones(num_species, bool),
        cell=np.zeros((num_species, 3, 3), np.float32),
        graph_mask=np.ones(num_species, bool),
        senders=nodes,
        receivers=nodes,
        shifts=np.zeros((num_species, 3), np.float32),
        edge_mask=np.zeros(num_species, bool),
        outgoing=np.full((num_species, 1), num_species, np.int32),
        species_blocks=nodes[:, None],
        block_species=nodes,
        block_slot=nodes,
    )
