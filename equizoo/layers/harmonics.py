"""Real spherical harmonics of edge vectors."""

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def safe_norm(vectors: Float[Array, "*batch dim"]) -> Float[Array, "*batch"]:
    """Lengths, with derivative zero (not NaN) at the origin."""
    squared = jnp.sum(vectors**2, axis=-1)
    zero = squared == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squared)))


def spherical_harmonics(
    irreps: e3nn.Irreps, vectors: Float[Array, "edges 3"]
) -> Float[Array, "edges dim"]:
    """Harmonics of the directions, ``sum_m Y_lm^2 = 2l + 1``; l = 1 is (x, y, z), polar axis y."""
    lengths = safe_norm(vectors)[:, None]
    directions = vectors / jnp.where(lengths == 0, 1, lengths)
    with jax.default_matmul_precision("highest"):  # whatever the device's default
        return e3nn.spherical_harmonics(
            irreps, directions, normalize=False, normalization="component"
        ).array
