"""Scalar nonlinearities of unit second moment."""

import enum
from collections.abc import Callable

import jax
from jaxtyping import Array, Float

Pointwise = Callable[[Float[Array, "*batch"]], Float[Array, "*batch"]]


class ActivationConstant(enum.StrEnum):
    """Which factor makes ``E[(c f(z))^2] = 1`` for a standard normal ``z``.

    ``exact`` is the integral; ``torch`` the seeded Monte Carlo value inside torch-e3nn, which
    checkpoints converted from there depend on.
    """

    EXACT = "exact"
    TORCH = "torch"


# exact: integral over the normal density, by quadrature; torch: e3nn 0.4.4, normalize2mom
_SILU = {
    ActivationConstant.EXACT: 1.676532470331,
    ActivationConstant.TORCH: 1.6791767923989418,
}
_SIGMOID = {
    ActivationConstant.EXACT: 1.846228545339,
    ActivationConstant.TORCH: 1.8467055342154763,
}
_SMOOTH_LEAKY_RELU = {
    ActivationConstant.EXACT: 1.529087143556853,
    ActivationConstant.TORCH: 1.531320475574866,
}


def normalized_silu(constant: ActivationConstant = ActivationConstant.EXACT) -> Pointwise:
    """``x -> c x sigmoid(x)`` with unit second moment for a standard normal argument."""
    factor = _SILU[constant]
    return lambda x: factor * jax.nn.silu(x)


def normalized_sigmoid(constant: ActivationConstant = ActivationConstant.EXACT) -> Pointwise:
    """``x -> c sigmoid(x)`` with unit second moment for a standard normal argument."""
    factor = _SIGMOID[constant]
    return lambda x: factor * jax.nn.sigmoid(x)


def smooth_leaky_relu(x: Float[Array, "*batch"], slope: float = 0.2) -> Float[Array, "*batch"]:
    r"""``x`` for large, ``slope x`` for large negative arguments, analytic in between.

    .. math:: f(x) = \tfrac{1 + s}{2} x + \tfrac{1 - s}{2} x \tanh(x / 2)

    Reference: Liao and Smidt 2022 (Equiformer), https://arxiv.org/abs/2206.11990, appendix C.
    """
    return x * (slope + (1 - slope) * jax.nn.sigmoid(x))


def normalized_smooth_leaky_relu(
    constant: ActivationConstant = ActivationConstant.EXACT,
) -> Pointwise:
    """``c smooth_leaky_relu`` with unit second moment for a standard normal argument."""
    factor = _SMOOTH_LEAKY_RELU[constant]
    return lambda x: factor * smooth_leaky_relu(x)
