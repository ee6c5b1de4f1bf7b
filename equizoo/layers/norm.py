"""Normalisation of scalars and of equivariant features, one node at a time."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from equizoo.layers.features import SCALAR, Features, channels_of

EPSILON = 1e-5  # added to variances


class LayerNorm(nnx.Module):
    """Scalars less their mean, over their standard deviation, times a weight, plus a bias."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        del rngs  # nothing random
        self.weight = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))

    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        centered = x - jnp.mean(x, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + EPSILON)
        ones = (1,) * (x.ndim - 1)
        weight, bias = (p[...].astype(x.dtype).reshape(*ones, -1) for p in (self.weight, self.bias))
        return centered * inverse * weight + bias


class FeaturesNorm(nnx.Module):
    r"""Every irrep over its root mean square, times a weight for each channel.

    .. math:: y_{l m c} = \gamma_{l c} \, x_{l m c} \Big/
        \sqrt{\tfrac{1}{C (2l + 1)} \textstyle\sum_{m c} x_{l m c}^2 + \epsilon}

    Scalars ``0e`` are centred over their channels first and get a bias last.

    Reference: Liao and Smidt 2022 (Equiformer), https://arxiv.org/abs/2206.11990, section 4.1.
    """

    def __init__(self, irreps: str, *, rngs: nnx.Rngs):
        channels = channels_of(irreps)
        self.scalars = LayerNorm(channels[SCALAR], rngs=rngs)
        self.weights = nnx.Dict(
            {
                ir: nnx.Param(jnp.ones(mul, jnp.float32))
                for ir, mul in channels.items()
                if ir != SCALAR
            }
        )

    def __call__(self, x: Features) -> Features:
        result = {SCALAR: self.scalars(x[SCALAR])}
        for ir, weight in self.weights.items():
            mean = jnp.mean(x[ir] ** 2, axis=(1, 2), keepdims=True)
            scale = weight[...].astype(x[ir].dtype)[None, None]
            result[ir] = x[ir] * jax.lax.rsqrt(mean + EPSILON) * scale
        return result
