"""From the features of an edge's length to the weights of its messages."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from equizoo.layers.norm import LayerNorm
from equizoo.layers.products import Products


def uniform_param(rngs: nnx.Rngs, shape: tuple[int, ...], bound: float) -> nnx.Param:
    """A parameter drawn uniformly from ``[-bound, bound]``, in float32."""
    draw = jax.random.uniform(rngs.params(), shape, jnp.float32, -1, 1)
    return nnx.Param(bound * draw)


class Affine(nnx.Module):
    """``x W + b`` of scalars; weights from ``U(±1/sqrt(fan_in))``, the bias from its own bound."""

    def __init__(
        self,
        width_in: int,
        width_out: int,
        *,
        bias_bound: float = 0.0,
        products: Products = Products.FULL,
        rngs: nnx.Rngs,
    ):
        self.products = products
        self.kernel = uniform_param(rngs, (width_in, width_out), width_in**-0.5)
        self.bias = uniform_param(rngs, (width_out,), bias_bound)

    def __call__(
        self, x: Float[Array, "batch features"], wanted: slice = slice(None)
    ) -> Float[Array, "batch outputs"]:
        """``wanted``: which outputs, all by default."""
        product = self.products.of(x, self.kernel[...][:, wanted].astype(x.dtype))
        return product + self.bias[...][wanted].astype(x.dtype)[None]


class RadialNetwork(nnx.Module):
    """Scalars to scalars: affine maps with layer normalisation and SiLU between them.

    Layer normalisation makes the result depend on ratios of the input: unlike that of
    ``ScalarMLP`` it does not vanish where the input does, so edges need a mask or an envelope.

    Reference: Liao and Smidt 2022 (Equiformer), https://arxiv.org/abs/2206.11990, appendix C.
    """

    def __init__(self, widths: tuple[int, ...], *, offset_bound: float = 0.0, rngs: nnx.Rngs):
        last = len(widths) - 2
        self.maps = nnx.List(
            [
                Affine(a, b, bias_bound=offset_bound if index == last else 0.0, rngs=rngs)
                for index, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True))
            ]
        )
        self.norms = nnx.List([LayerNorm(width, rngs=rngs) for width in widths[1:-1]])

    def __call__(
        self, x: Float[Array, "batch features"], wanted: slice = slice(None)
    ) -> Float[Array, "batch outputs"]:
        """``wanted``: which outputs, all by default."""
        for affine, norm in zip(self.maps[:-1], self.norms, strict=True):
            x = jax.nn.silu(norm(affine(x)))
        return self.maps[-1](x, wanted)
