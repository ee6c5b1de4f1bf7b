"""Gated nonlinearity of equivariant features."""

import e3nn_jax as e3nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from equizoo.layers.activation import ActivationConstant, Nonlinearity, normalized


def gated(
    x: Float[Array, "n dim channels"],
    gates: Float[Array, "n num_gated channels"],
    irreps: e3nn.Irreps,
    constant: ActivationConstant = ActivationConstant.EXACT,
) -> Float[Array, "n dim channels"]:
    """Scalars through SiLU; every other irrep times the sigmoid of its own gates.

    ``gates`` has one row for each irrep of ``irreps`` above degree 0, in their order; both
    functions are scaled to unit second moment. Commutes with O(3) where ``irreps`` has no
    pseudo-scalars.

    Reference: Weiler et al. 2018, https://arxiv.org/abs/1807.02547.
    """
    silu = normalized(Nonlinearity.SILU, constant)
    factors = normalized(Nonlinearity.SIGMOID, constant)(gates)
    blocks, row = [], 0
    for (_, ir), place in zip(irreps, irreps.slices(), strict=True):
        if ir.l == 0:
            blocks.append(silu(x[:, place]))
        else:
            blocks.append(x[:, place] * factors[:, row : row + 1])
            row += 1
    return jnp.concatenate(blocks, axis=1)
