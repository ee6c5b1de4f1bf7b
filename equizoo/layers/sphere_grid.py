"""Functions on the sphere at the points of a grid, and back."""

import enum
import functools

import e3nn_jax as e3nn
import numpy as np
from jaxtyping import Float, Int

from equizoo.tensor_products._base import natural_irreps
from equizoo.tensor_products._sphere import harmonics


class Grid(enum.StrEnum):
    """Where a function on the sphere is evaluated, for a number of points.

    ``fejer``: as many latitudes, evenly spaced, and as many longitudes; as published models have
    it. ``gauss``: half as many latitudes, at Gauss's nodes, that integrate the same polynomials,
    and no more longitudes than orders that are kept call for.
    """

    FEJER = "fejer"
    GAUSS = "gauss"


@functools.cache
def grid_matrices(
    l_max: int, points: int, grid: Grid = Grid.FEJER, m_max: int | None = None
) -> tuple[Float[np.ndarray, "grid dim"], Float[np.ndarray, "grid dim"]]:
    r"""``to`` and ``back``: values are ``to @ c``, coefficients ``back.T @ values``.

    .. math:: f(r) = \sum_{l m} \frac{c_{l m} Y_{l m}(r)}{\sqrt{(2 l + 1)(L + 1)}}, \qquad
        c_{l m} = \sqrt{(2 l + 1)(L + 1)} \, \sum_p w_p Y_{l m}(r_p) f(r_p)

    so that coefficients of variance one make values of variance one. The sum is exact up to degree
    ``points - 1`` of the integrand, so one transform after the other is the identity. Where only
    orders ``|m| <= m_max`` are kept, ``Grid.GAUSS`` has at most ``4 m_max + 2`` longitudes: exact
    in the order up to the third power of ``f``. Raises ``ValueError`` for fewer than
    ``2 l_max + 1`` points, and for an odd number of Fejér's.

    References: e3nn's ``ToS2Grid``; the weights are Fejér's and Gauss's.
    """
    even = grid == Grid.FEJER
    if points < 2 * l_max + 1 or (even and points % 2):
        raise ValueError(
            f"A grid of {points} points does not resolve degree {l_max}; expected an even number, "
            f"at least {2 * l_max + 2}."
            if even
            else f"A grid of {points} points does not resolve degree {l_max}; expected at least "
            f"{2 * l_max + 1}."
        )
    cosines, weights = _fejer(points) if even else np.polynomial.legendre.leggauss(-(-points // 2))
    longitudes = points if even or m_max is None else min(points, 4 * m_max + 2)
    sines, alphas = np.sqrt(1 - cosines**2), 2 * np.pi * np.arange(longitudes) / longitudes
    where = np.stack(
        [
            np.outer(sines, np.sin(alphas)),
            np.outer(cosines, np.ones(longitudes)),
            np.outer(sines, np.cos(alphas)),
        ],
        axis=-1,
    ).reshape(-1, 3)
    irreps = natural_irreps(l_max)
    values = harmonics(irreps, where)
    scales = np.sqrt([(2 * ir.l + 1) * (l_max + 1) for _, ir in e3nn.Irreps(irreps)])
    scales = np.repeat(scales, [ir.dim for _, ir in irreps])
    weights = np.repeat(weights / (weights.sum() * longitudes), longitudes)
    return values / scales, weights[:, None] * values * scales


def _fejer(points: int) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Cosines and weights of latitudes ``(k + 1/2) pi / n``."""
    betas = (np.arange(points) + 0.5) * np.pi / points
    odd = 2 * np.arange(points // 2) + 1
    return np.cos(betas), np.sin(betas) * (np.sin(np.outer(betas, odd)) / odd).sum(axis=1)


def degrees_of(l_max: int) -> Int[np.ndarray, " dim"]:
    """The degree of each component of uniform features."""
    return np.repeat(np.arange(l_max + 1), 2 * np.arange(l_max + 1) + 1)
