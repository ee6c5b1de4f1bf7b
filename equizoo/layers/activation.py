"""Scalar nonlinearities of unit second moment."""

import enum
from collections.abc import Callable

import jax
from jaxtyping import Array, Float


class ActivationConstant(enum.StrEnum):
    """Which factor makes ``E[(c silu(z))^2] = 1`` for a standard normal ``z``.

    ``exact`` is the integral; ``torch`` the seeded Monte Carlo value inside torch-e3nn, which
    checkpoints converted from there depend on.
    """

    EXACT = "exact"
    TORCH = "torch"


_SILU = {
    ActivationConstant.EXACT: 1.676532470331,  # integral over the normal density, by quadrature
    ActivationConstant.TORCH: 1.6791767923989418,  # e3nn 0.4.4, normalize2mom
}


def normalized_silu(
    constant: ActivationConstant = ActivationConstant.EXACT,
) -> Callable[[Float[Array, "*batch"]], Float[Array, "*batch"]]:
    """``x -> c x sigmoid(x)`` with unit second moment for a standard normal argument."""
    factor = _SILU[constant]
    return lambda x: factor * jax.nn.silu(x)
