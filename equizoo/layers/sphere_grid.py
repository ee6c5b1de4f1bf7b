"""Functions on the sphere at the points of a grid, and back."""

import functools

import e3nn_jax as e3nn
import numpy as np
from jaxtyping import Float, Int

from equizoo.tensor_products._base import natural_irreps
from equizoo.tensor_products._sphere import harmonics


@functools.cache
def grid_matrices(
    l_max: int, points: int
) -> tuple[Float[np.ndarray, "grid dim"], Float[np.ndarray, "grid dim"]]:
    r"""``to`` and ``back``: values are ``to @ c``, coefficients ``back.T @ values``.

    .. math:: f(r) = \sum_{l m} \frac{c_{l m} Y_{l m}(r)}{\sqrt{(2 l + 1)(L + 1)}}, \qquad
        c_{l m} = \sqrt{(2 l + 1)(L + 1)} \, \sum_p w_p Y_{l m}(r_p) f(r_p)

    so that coefficients of variance one make values of variance one. The grid has ``points``
    latitudes :math:`(k + 1/2) \pi / n` and as many longitudes; the sum is exact up to degree
    ``points - 1`` of the integrand in latitude and in longitude, so one transform after the other
    is the identity. Raises ``ValueError`` where it is not: fewer than ``2 l_max + 1`` points, or an
    odd number.

    References: e3nn's ``ToS2Grid``; the weights are Fejér's.
    """
    if points < 2 * l_max + 1 or points % 2:
        raise ValueError(
            f"A grid of {points} points does not resolve degree {l_max}; expected an even number, "
            f"at least {2 * l_max + 2}."
        )
    betas = (np.arange(points) + 0.5) * np.pi / points
    alphas = 2 * np.pi * np.arange(points) / points
    odd = 2 * np.arange(points // 2) + 1
    latitude_weights = np.sin(betas) * (np.sin(np.outer(betas, odd)) / odd).sum(axis=1)
    latitude_weights /= latitude_weights.sum() * points
    where = np.stack(
        [
            np.outer(np.sin(betas), np.sin(alphas)),
            np.outer(np.cos(betas), np.ones(points)),
            np.outer(np.sin(betas), np.cos(alphas)),
        ],
        axis=-1,
    ).reshape(-1, 3)
    irreps = natural_irreps(l_max)
    values = harmonics(irreps, where)
    scales = np.sqrt([(2 * ir.l + 1) * (l_max + 1) for _, ir in e3nn.Irreps(irreps)])
    scales = np.repeat(scales, [ir.dim for _, ir in irreps])
    weights = np.repeat(latitude_weights, points)
    return values / scales, weights[:, None] * values * scales


def degrees_of(l_max: int) -> Int[np.ndarray, " dim"]:
    """The degree of each component of uniform features."""
    return np.repeat(np.arange(l_max + 1), 2 * np.arange(l_max + 1) + 1)
