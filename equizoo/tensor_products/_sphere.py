"""The sphere in float64 numpy: harmonics, their derivatives, quadrature of a stated exactness."""

import functools
from typing import NamedTuple

import e3nn_jax as e3nn
import numpy as np
import scipy.integrate
import scipy.special
from jaxtyping import Float

from equizoo.tensor_products._base import wigner_3j


class Quadrature(NamedTuple):
    """Points of the unit sphere with weights that sum to one."""

    points: Float[np.ndarray, "points 3"]
    weights: Float[np.ndarray, " points"]


# Exact up to these degrees; scipy has no rules between them.
_LEBEDEV_DEGREES = (*range(3, 32, 2), *range(35, 132, 6))


def lebedev(degree: int) -> Quadrature:
    """The smallest Lebedev rule that integrates polynomials up to ``degree`` exactly.

    Some rules (degrees 13, 25 and 27) have negative weights; they are exact all the same. Raises
    ``ValueError`` beyond degree 131.

    Reference: Lebedev and Laikov 1999, Doklady Mathematics 59, 477.
    """
    for known in _LEBEDEV_DEGREES:
        if known >= degree:
            points, weights = scipy.integrate.lebedev_rule(known)
            return Quadrature(points.T, weights / (4 * np.pi))
    raise ValueError(f"Lebedev rules end at degree {_LEBEDEV_DEGREES[-1]}, got {degree}.")


def gauss_legendre(degree: int) -> Quadrature:
    """The product rule exact up to ``degree``: Gauss nodes in ``cos(theta)``, uniform azimuths.

    ``floor(degree / 2) + 1`` times ``degree + 1`` points, sorted by latitude; neither number can be
    smaller. The polar axis is y, as in e3nn.
    """
    heights, weights = np.polynomial.legendre.leggauss(degree // 2 + 1)
    azimuths = 2 * np.pi * np.arange(degree + 1) / (degree + 1)
    radii = np.sqrt(1 - heights**2)
    points = np.stack(
        [
            radii[:, None] * np.sin(azimuths),
            np.broadcast_to(heights[:, None], (len(heights), len(azimuths))),
            radii[:, None] * np.cos(azimuths),
        ],
        axis=-1,
    )
    spread = np.repeat(weights / 2 / len(azimuths), len(azimuths))
    return Quadrature(points.reshape(-1, 3), spread)


def harmonics(
    irreps: e3nn.Irreps, points: Float[np.ndarray, "points 3"]
) -> Float[np.ndarray, "points dim"]:
    """Real spherical harmonics at unit vectors, ``sum_m Y_lm^2 = 2l + 1``, e3nn's axes and signs.

    The parities of the irreps play no role.
    """
    values, _ = _solid_harmonics(max(ir.l for _, ir in irreps), points)
    return np.concatenate([values[ir.l] for _, ir in irreps], axis=1)


def tangent_derivatives(
    irreps: e3nn.Irreps, points: Float[np.ndarray, "points 3"]
) -> Float[np.ndarray, "2 points dim"]:
    r"""Derivatives of the harmonics along two tangents ``t_1, t_2`` with ``t_1 x t_2 = r``."""
    _, gradients = _solid_harmonics(max(ir.l for _, ir in irreps), points)
    gradient = np.concatenate([gradients[ir.l] for _, ir in irreps], axis=1)
    return np.einsum("tnx,nkx->tnk", np.stack(tangents(points)), gradient)


def tangents(points: Float[np.ndarray, "points 3"]) -> tuple[np.ndarray, np.ndarray]:
    """Two unit vectors at each point that make a right-handed frame with it."""
    least = np.eye(3)[np.argmin(np.abs(points), axis=1)]
    first = np.cross(least, points)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    return first, np.cross(points, first)


def _solid_harmonics(
    l_max: int, points: Float[np.ndarray, "points 3"]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Harmonic polynomials and their gradients, each degree coupled from the one below."""
    values = [np.ones((len(points), 1))]
    gradients = [np.zeros((len(points), 1, 3))]
    linear = np.sqrt(3) * points
    slope = np.broadcast_to(np.sqrt(3) * np.eye(3), (len(points), 3, 3))
    for degree in range(l_max):
        raising = _raising(degree)
        lower, lower_gradient = values[-1], gradients[-1]
        values.append(np.einsum("ijk,ni,nj->nk", raising, lower, linear, optimize=True))
        gradients.append(
            np.einsum("ijk,nix,nj->nkx", raising, lower_gradient, linear, optimize=True)
            + np.einsum("ijk,ni,njx->nkx", raising, lower, slope, optimize=True)
        )
    return values, gradients


@functools.cache
def _raising(degree: int) -> Float[np.ndarray, "d_lower 3 d_upper"]:
    """Couplings ``l, 1 -> l + 1`` scaled so that harmonics stay normalised."""
    coupling = wigner_3j(degree, 1, degree + 1)
    # at the pole only m = 0 is non-zero: sqrt(2l + 1) and sqrt(3) couple to sqrt(2l + 3)
    at_pole = coupling[degree, 1, degree + 1] * np.sqrt((2 * degree + 1) * 3)
    return coupling * np.sqrt(2 * degree + 3) / at_pole
