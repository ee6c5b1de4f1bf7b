"""Layers of uniform features ``[n, (l_max + 1)^2, channels]``: as many channels for each degree."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from equizoo.layers.norm import EPSILON, LayerNorm
from equizoo.layers.products import Products
from equizoo.layers.radial_network import uniform_param
from equizoo.layers.sphere_grid import degrees_of


class UniformLinear(nnx.Module):
    r"""``y_{l m d} = \sum_c W^l_{c d} x_{l m c} + b_d``, the bias for degree 0 alone."""

    def __init__(
        self,
        l_max: int,
        channels_in: int,
        channels_out: int,
        *,
        products: Products = Products.FULL,
        rngs: nnx.Rngs,
    ):
        self.products = products
        self.kernels = uniform_param(
            rngs, (l_max + 1, channels_in, channels_out), channels_in**-0.5
        )
        self.bias = nnx.Param(jnp.zeros(channels_out, jnp.float32))

    def __call__(self, x: Float[Array, "n dim channels_in"]) -> Float[Array, "n dim channels_out"]:
        kernels, bias = self.kernels[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        results = [
            self.products.of(x[:, degree**2 : (degree + 1) ** 2], kernel)
            for degree, kernel in enumerate(kernels)
        ]
        results[0] = results[0] + bias[None, None]
        return jnp.concatenate(results, axis=1)


class SeparateNorm(nnx.Module):
    r"""Layer normalisation of degree 0; all other degrees over one root mean square.

    .. math:: y_{l m c} = \gamma_{l c} x_{l m c} \Big/ \sqrt{\tfrac{1}{C} \textstyle\sum_c
        \tfrac{1}{L} \sum_{l > 0} \tfrac{1}{2 l + 1} \sum_m x_{l m c}^2 + \epsilon}

    Reference: Liao et al. 2023 (EquiformerV2), https://arxiv.org/abs/2306.12059, section 4.3.
    """

    def __init__(self, l_max: int, channels: int, *, rngs: nnx.Rngs):
        self.l_max = l_max
        self.scalars = LayerNorm(channels, rngs=rngs)
        self.weights = nnx.Param(jnp.ones((l_max, channels), jnp.float32))

    def __call__(self, x: Float[Array, "n dim channels"]) -> Float[Array, "n dim channels"]:
        scalars = self.scalars(x[:, :1])
        rest = _over_mean_square(x[:, 1:], degrees_of(self.l_max)[1:], self.l_max)
        weights = self.weights[...].astype(x.dtype)[degrees_of(self.l_max)[1:] - 1]
        return jnp.concatenate([scalars, rest * weights[None]], axis=1)


class JointNorm(nnx.Module):
    r"""All degrees over one root mean square, degree 0 centred over its channels before.

    .. math:: y_{l m c} = \gamma_{l c} x_{l m c} \Big/ \sqrt{\tfrac{1}{C} \textstyle\sum_c
        \tfrac{1}{L + 1} \sum_l \tfrac{1}{2 l + 1} \sum_m x_{l m c}^2 + \epsilon}
        + \delta_{l 0} \beta_c
    """

    def __init__(self, l_max: int, channels: int, *, rngs: nnx.Rngs):
        del rngs  # nothing random
        self.l_max = l_max
        self.weights = nnx.Param(jnp.ones((l_max + 1, channels), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))

    def __call__(self, x: Float[Array, "n dim channels"]) -> Float[Array, "n dim channels"]:
        centred = x[:, :1] - jnp.mean(x[:, :1], axis=2, keepdims=True)
        x = jnp.concatenate([centred, x[:, 1:]], axis=1)
        weights = self.weights[...].astype(x.dtype)[degrees_of(self.l_max)]
        x = _over_mean_square(x, degrees_of(self.l_max), self.l_max + 1) * weights[None]
        return x.at[:, 0].add(self.bias[...].astype(x.dtype)[None])


def _over_mean_square(
    x: Float[Array, "n dim channels"], degrees, count: int
) -> Float[Array, "n dim channels"]:
    """Each degree counts the same, whatever its number of components."""
    balance = jnp.asarray(1 / (count * (2 * degrees + 1)), x.dtype)
    mean = jnp.mean(jnp.einsum("nic,i->nc", x**2, balance), axis=1)
    return x * jax.lax.rsqrt(mean + EPSILON)[:, None, None]
