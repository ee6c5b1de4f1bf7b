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


def cosine_cutoff(
    r: Float[Array, "*batch"],  # [Å]
    cutoff: float,  # [Å]
) -> Float[Array, "*batch"]:
    """``(1 + cos(pi r / cutoff)) / 2``, zero from the cutoff on: continuous with its slope."""
    return jnp.where(r < cutoff, (1 + jnp.cos(np.pi * r / cutoff)) / 2, 0)


def exp_normal_basis(
    r: Float[Array, "*batch"],  # [Å]
    cutoff: float,  # [Å]
    num_basis: int,
) -> Float[Array, "*batch num_basis"]:
    r"""Gaussians of ``exp(-5 r / cutoff)`` times a cosine cutoff.

    .. math:: b_n(r) = \tfrac{1 + \cos(\pi r / r_c)}{2}
        \exp\left(-\beta \, (e^{-5 r / r_c} - \mu_n)^2\right), \quad
        \beta = \left(\tfrac{2}{N} (1 - e^{-r_c})\right)^{-2}

    with :math:`\mu_n` from :math:`e^{-r_c}` (``r_c`` in Å) to 1 in equal steps.

    Reference: Thölke and De Fabritiis 2022, https://arxiv.org/abs/2202.02541, eq. 2.
    """
    start = float(np.exp(-cutoff))
    means = jnp.asarray(np.linspace(start, 1, num_basis), r.dtype).reshape((1,) * r.ndim + (-1,))
    beta = (2 / num_basis * (1 - start)) ** -2
    gaussians = jnp.exp(-beta * (jnp.exp(-5 / cutoff * r)[..., None] - means) ** 2)
    return cosine_cutoff(r, cutoff)[..., None] * gaussians


def gaussian_smearing(
    r: Float[Array, "*batch"],  # [Å]
    cutoff: float,  # [Å]
    num_basis: int,
    width: float = 2.0,
) -> Float[Array, "*batch num_basis"]:
    r"""Gaussians at ``num_basis`` equal steps from 0 to the cutoff, ``width`` steps wide.

    .. math:: b_n(r) = \exp\left(-\frac{(r - n \Delta)^2}{2 (w \Delta)^2}\right), \quad
        \Delta = r_c / (N - 1), \quad n = 0 \dots N - 1

    Does not vanish at the cutoff.
    """
    step = cutoff / (num_basis - 1)
    centers = jnp.asarray(np.arange(num_basis) * step, r.dtype).reshape((1,) * r.ndim + (-1,))
    return jnp.exp(-((r[..., None] - centers) ** 2) / (2 * (width * step) ** 2))
