"""Matrix products of features with weights, in the precision that a config names."""

import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Products(enum.StrEnum):
    """``full``: in the precision of the features. ``bfloat16``: features and weights rounded to 8
    significant bits before, sums in float32 after; derivatives alike.

    The rounding makes relative errors of about 0.4 % in every product, in equivariance too.
    """

    FULL = "full"
    BFLOAT16 = "bfloat16"

    def of(
        self, x: Float[Array, "*batch width"], weights: Float[Array, "width out"]
    ) -> Float[Array, "*batch out"]:
        """``x @ weights``."""
        if self is Products.FULL:
            return x @ weights
        return _rounded(x.reshape(-1, x.shape[-1]), weights).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _rounded(x: Float[Array, "n width"], weights: Float[Array, "width out"]):
    """One form for the product and its derivatives of any order in reverse mode."""
    arguments = x.astype(jnp.bfloat16), weights.astype(jnp.bfloat16)
    return jnp.matmul(*arguments, preferred_element_type=jnp.float32).astype(x.dtype)


_rounded.defvjp(
    lambda x, weights: (_rounded(x, weights), (x, weights)),
    lambda saved, g: (_rounded(g, saved[1].T), _rounded(saved[0].T, g)),
)
