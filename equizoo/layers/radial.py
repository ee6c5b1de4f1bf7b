"""Functions of distance: bases and envelopes."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def polynomial_envelope(
    r: Float[Array, "*batch"],  # [Å]
    cutoff: float,  # [Å]
    p: int = 6,
) -> Float[Array, "*batch"]:
    r"""Smooth step from 1 at ``r = 0`` to 0 at ``cutoff``.

    .. math:: f(u) = 1 - \tfrac{(p+1)(p+2)}{2}u^p + p(p+2)u^{p+1} - \tfrac{p(p+1)}{2}u^{p+2},
        \quad u = r / r_c

    Value, slope and curvature vanish at the cutoff; exactly zero beyond it, so padded edges of
    length ``cutoff`` are inert.

    Example:
        >>> polynomial_envelope(jnp.array([0.0, 5.0]), cutoff=5.0).tolist()
        [1.0, 0.0]

    Reference: Gasteiger et al. 2020, https://arxiv.org/abs/2003.03123, eq. 8.
    """
    u = r / cutoff
    value = 1 + u**p * (-(p + 1) * (p + 2) / 2 + u * (p * (p + 2) - u * (p * (p + 1) / 2)))
    return jnp.where(u < 1, value, 0)


def bessel_basis(
    r: Float[Array, "*batch"],  # [Å]
    cutoff: float,  # [Å]
    num_basis: int,
) -> Float[Array, "*batch num_basis"]:
    r"""Spherical Bessel functions of order zero.

    .. math:: b_n(r) = \sqrt{2 / r_c} \, \sin(n \pi r / r_c) / r, \quad n = 1 \dots N

    Finite with finite derivatives at ``r = 0``.

    Reference: Gasteiger et al. 2020, https://arxiv.org/abs/2003.03123, eq. 7.
    """
    n = jnp.arange(1, num_basis + 1, dtype=r.dtype).reshape((1,) * r.ndim + (-1,))
    factor = float(np.sqrt(2 / cutoff) * np.pi / cutoff)
    return factor * n * jnp.sinc(n * (r / cutoff)[..., None])
