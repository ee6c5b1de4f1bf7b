"""Scalar nonlinearities of unit second moment."""

import enum
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class ActivationConstant(enum.StrEnum):
    """Which factor makes ``E[(c f(z))^2] = 1`` for a standard normal ``z``.

    ``exact`` is the integral; ``torch`` the seeded Monte Carlo value inside torch-e3nn, which
    checkpoints converted from there depend on.
    """

    EXACT = "exact"
    TORCH = "torch"


class Nonlinearity(enum.StrEnum):
    """A function of one scalar; ``none`` is the identity."""

    SILU = "silu"
    TANH = "tanh"
    SIGMOID = "sigmoid"
    ABS = "abs"
    NONE = "none"


_FUNCTIONS: dict[Nonlinearity, Callable] = {
    Nonlinearity.SILU: jax.nn.silu,
    Nonlinearity.TANH: jnp.tanh,
    Nonlinearity.SIGMOID: jax.nn.sigmoid,
    Nonlinearity.ABS: jnp.abs,
    Nonlinearity.NONE: lambda x: x,
}

# Integrals over the normal density by quadrature; normalize2mom of e3nn 0.4.4 (10^6 samples).
FACTORS = {
    Nonlinearity.SILU: {"exact": 1.676532470331, "torch": 1.6791767923989418},
    Nonlinearity.TANH: {"exact": 1.5925374197228312, "torch": 1.5937334472592695},
    Nonlinearity.SIGMOID: {"exact": 1.8462285453386054, "torch": 1.8467055342154763},
    Nonlinearity.ABS: {"exact": 1.0, "torch": 1.001110600838467},
    Nonlinearity.NONE: {"exact": 1.0, "torch": 1.0},
}


def normalized(
    nonlinearity: Nonlinearity, constant: ActivationConstant = ActivationConstant.EXACT
) -> Callable[[Float[Array, "*batch"]], Float[Array, "*batch"]]:
    """``x -> c f(x)`` with unit second moment for a standard normal argument."""
    factor, function = FACTORS[nonlinearity][constant.value], _FUNCTIONS[nonlinearity]
    return lambda x: factor * function(x)


def normalized_silu(
    constant: ActivationConstant = ActivationConstant.EXACT,
) -> Callable[[Float[Array, "*batch"]], Float[Array, "*batch"]]:
    """``x -> c x sigmoid(x)`` with unit second moment for a standard normal argument."""
    return normalized(Nonlinearity.SILU, constant)
