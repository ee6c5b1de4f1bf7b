"""Networks of invariant features."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from equizoo.layers.activation import ActivationConstant, normalized_silu
from equizoo.layers.linear import normal_param

_EPSILON = 1e-5  # of the normalisation, torch's default


class ScalarMLP(nnx.Module):
    """Scalars to scalars: SiLU layers without biases, the last one linear.

    From the radial basis of an edge to the weights of its product, from the scalars of an atom to
    its energy. Zero input gives zero output, so edges whose basis vanishes are inert.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        *,
        activation: ActivationConstant = ActivationConstant.EXACT,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.kernels = nnx.List(
            [normal_param(rngs, shape) for shape in zip(widths[:-1], widths[1:], strict=True)]
        )

    def __call__(self, x: Float[Array, "batch features"]) -> Float[Array, "batch outputs"]:
        silu = normalized_silu(self.activation)
        for index, param in enumerate(self.kernels):
            kernel = param[...].astype(x.dtype)
            x = x @ (kernel / float(np.sqrt(kernel.shape[0])))
            if index < len(self.kernels) - 1:
                x = silu(x)
        return x


class NormalizedMLP(nnx.Module):
    r"""Scalars to scalars: linear maps with biases, each but the last normalised, then SiLU.

    .. math:: y = \mathrm{silu}(\gamma \, (h - \bar h) / \sqrt{\mathrm{var}(h) + 10^{-5}}
        + \beta), \quad h = W x + b

    Zero input does not give zero output: what depends on distance needs an envelope of its own.

    Reference: the radial network of eSEN, https://arxiv.org/abs/2502.12147.
    """

    def __init__(self, widths: tuple[int, ...], *, rngs: nnx.Rngs):
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.kernels = nnx.List([normal_param(rngs, pair, pair[0] ** -0.5) for pair in pairs])
        self.biases = nnx.List([_constant(0.0, width) for width in widths[1:]])
        self.norm_scales = nnx.List([_constant(1.0, width) for width in widths[1:-1]])
        self.norm_biases = nnx.List([_constant(0.0, width) for width in widths[1:-1]])

    def __call__(self, x: Float[Array, "batch features"]) -> Float[Array, "batch outputs"]:
        for index, (kernel, bias) in enumerate(zip(self.kernels, self.biases, strict=True)):
            x = x @ kernel[...].astype(x.dtype) + bias[...].astype(x.dtype)[None]
            if index < len(self.kernels) - 1:
                centred = x - jnp.mean(x, axis=1, keepdims=True)
                variance = jnp.mean(centred**2, axis=1, keepdims=True)
                scale, shift = (
                    group[index][...].astype(x.dtype)[None]
                    for group in (self.norm_scales, self.norm_biases)
                )
                x = jax.nn.silu(centred / jnp.sqrt(variance + _EPSILON) * scale + shift)
        return x


def _constant(value: float, width: int) -> nnx.Param:
    return nnx.Param(jnp.full(width, value, jnp.float32))
