"""What is random while training, given a key; without one nothing is dropped."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from equizoo.graph import Graph


def split_keys(key: Array | None, count: int) -> list[Array | None]:
    """Independent keys; as many times ``None`` when there is no key."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def dropout(x: Float[Array, "*batch"], rate: float, key: Array | None) -> Float[Array, "*batch"]:
    """``x`` with elements zero at this rate and the rest over ``1 - rate``: the same mean."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


def keep_path(
    graph: Graph, rate: float, key: Array | None, dtype: jnp.dtype
) -> Float[Array, " nodes"]:
    """A factor for every node: ``1 / (1 - rate)``, and 0 for all nodes of a graph at this rate.

    Reference: Huang et al. 2016 (stochastic depth), https://arxiv.org/abs/1603.09382, per graph.
    """
    if key is None or rate == 0:
        return jnp.ones(graph.num_nodes, dtype)
    graphs = dropout(jnp.ones(graph.num_graphs, dtype), rate, key)
    return graphs[graph.node_graph]
