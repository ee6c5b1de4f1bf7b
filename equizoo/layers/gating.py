"""Nonlinearities of gates and of attention."""

import jax
from jaxtyping import Array, Float

from equizoo.layers.activation import ActivationConstant

# exact: integral over the normal density, by quadrature; torch: e3nn 0.4.4, normalize2mom
_SIGMOID = {
    ActivationConstant.EXACT: 1.8462285453386054,
    ActivationConstant.TORCH: 1.8467055342154763,
}
_SMOOTH_LEAKY_RELU = {
    ActivationConstant.EXACT: 1.529087143556853,
    ActivationConstant.TORCH: 1.531320475574866,
}


def normalized_sigmoid(
    x: Float[Array, "*batch"], constant: ActivationConstant = ActivationConstant.EXACT
) -> Float[Array, "*batch"]:
    """``c sigmoid(x)`` with unit second moment for a standard normal argument."""
    return _SIGMOID[constant] * jax.nn.sigmoid(x)


def smooth_leaky_relu(x: Float[Array, "*batch"], slope: float = 0.2) -> Float[Array, "*batch"]:
    r"""``x`` for large, ``slope x`` for large negative arguments, analytic in between.

    .. math:: f(x) = \tfrac{1 + s}{2} x + \tfrac{1 - s}{2} x \tanh(x / 2)

    Reference: Liao and Smidt 2022 (Equiformer), https://arxiv.org/abs/2206.11990, appendix C.
    """
    return x * (slope + (1 - slope) * jax.nn.sigmoid(x))


def normalized_smooth_leaky_relu(
    x: Float[Array, "*batch"], constant: ActivationConstant = ActivationConstant.EXACT
) -> Float[Array, "*batch"]:
    """``c smooth_leaky_relu(x)`` with unit second moment for a standard normal argument."""
    return _SMOOTH_LEAKY_RELU[constant] * smooth_leaky_relu(x)
