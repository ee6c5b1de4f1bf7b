"""Gaunt product by fast Fourier transforms: functions on the sphere, continued to a torus."""

import dataclasses
import functools

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from equizoo.tensor_products._base import TensorProduct, natural_irreps
from equizoo.tensor_products._sphere import harmonics
from equizoo.tensor_products._transforms import (
    BoundTransformed,
    BoundTransformedPower,
    Degrees,
    Transform,
)


@dataclasses.dataclass(frozen=True)
class GauntFourier(TensorProduct):
    r"""The product of ``GauntGrid`` as it was first published, in two-dimensional Fourier series.

    .. math:: A(\theta, \phi) = \sum_{|u|, |v| \le L} A_{u v} e^{i (u \theta + v \phi)}

    Harmonics continued along great circles past the pole are such polynomials on the torus
    ``[0, 2 pi)^2``; products are taken by FFT, padded with zeros so that none of them wraps around.
    Conversions cost ``O(L^3)``: the azimuthal frequency is the order of the harmonic. The torus
    covers the sphere twice, and Fourier series need more points than quadrature on the sphere: for
    reference, not for speed.

    Reference: Luo et al. 2024, https://arxiv.org/abs/2401.10216.
    """

    def _bind(
        self, irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps
    ) -> BoundTransformed:
        return BoundTransformed(irreps_1, irreps_2, irreps_out, Torus)

    def _bind_power(
        self, irreps_in: e3nn.Irreps, irreps_out: e3nn.Irreps, order: int
    ) -> BoundTransformedPower:
        return BoundTransformedPower(irreps_in, irreps_out, order, Torus)


class Torus(Transform):
    r"""Values at ``(2 pi i / n_theta, 2 pi j / n_phi)``, by real FFTs.

    All frequencies of the product in ``theta`` enter its integral over the sphere; in ``phi`` those
    up to the degree of the result, and higher ones may wrap around where these are not. The points
    ``(2 pi - theta, phi)`` and ``(theta, phi + pi)`` are the same: with ``n_phi`` odd the second
    sheet lies between the points of the first, and aliases are ``2 n_phi`` apart.
    """

    def __init__(self, degrees: Degrees):
        self.l_out = degrees.result
        apart = (degrees.product + degrees.result + 2) // 4  # 2 n_phi exceeds the two together
        highest = max(degrees.factors, degrees.result, apart)
        self.shape = 2 * degrees.product + 1, 2 * highest + 1
        self.points = self.shape[0] * self.shape[1]

    def to_values(
        self, packed: Float[Array, "*batch 2 degrees orders"]
    ) -> Float[Array, "*batch latitudes longitudes"]:
        l_max = packed.shape[-1] - 1
        matrix = jnp.asarray(latitude_series(l_max), packed.dtype)
        waves = jnp.einsum("ulm,...plm->...pum", matrix, packed, precision="highest")
        spectrum = jax.lax.complex(waves[..., 0, :, :], -waves[..., 1, :, :])
        halves = np.where(np.arange(l_max + 1) == 0, 1, 0.5)  # of conjugate frequencies
        spectrum = _times(spectrum, halves * _phases(l_max))
        gap = jnp.zeros(
            (*spectrum.shape[:-2], self.shape[0] - 2 * l_max - 1, l_max + 1), spectrum.dtype
        )
        spectrum = jnp.concatenate(
            [spectrum[..., : l_max + 1, :], gap, spectrum[..., l_max + 1 :, :]], axis=-2
        )
        return jnp.fft.irfft2(spectrum, s=self.shape, norm="forward")

    def to_coefficients(
        self, values: Float[Array, "*batch latitudes longitudes"]
    ) -> Float[Array, "*batch 2 degrees orders"]:
        spectrum = jnp.fft.rfft2(values, norm="forward")[..., : self.l_out + 1]
        spectrum = _times(spectrum, _phases(self.l_out))
        waves = jnp.stack([spectrum.real, -spectrum.imag], axis=-3)
        matrix = jnp.asarray(integrals(self.l_out, self.shape[0]), values.dtype)
        return jnp.einsum("ulm,...pum->...plm", matrix, waves, precision="highest")

    def flops(self, l_max: int) -> tuple[int, int]:
        # real FFTs, 2.5 N log2 N; cosines and sines each through one real matrix per order
        transform = int(2.5 * self.points * np.log2(self.points))
        return (
            transform + 4 * (2 * l_max + 1) * (l_max + 1) ** 2,
            transform + 4 * self.shape[0] * (self.l_out + 1) ** 2,
        )


def frequencies(n: int) -> np.ndarray:
    """``0, 1, ..., -1``: the order of FFTs, for odd ``n``."""
    return np.fft.fftfreq(n, 1 / n).round().astype(int)


@functools.cache
def latitude_series(l_max: int) -> Float[np.ndarray, "frequencies degrees orders"]:
    r"""Real ``T`` with :math:`\Theta_{lm}(\theta) = \sum_u i^{-(m \bmod 2)} T_{ulm} e^{iu\theta}`.

    Even orders are series of cosines, odd ones of sines. The discrete transform of a trigonometric
    polynomial at ``2 l_max + 1`` points is exact; what parity forbids is set to zero.
    """
    angles = 2 * np.pi * np.arange(2 * l_max + 1) / (2 * l_max + 1)
    # where sin(theta) < 0 these are points past the pole
    meridian = np.stack([0 * angles, np.cos(angles), np.sin(angles)], axis=1)
    values = harmonics(natural_irreps(l_max), meridian)
    series = np.fft.fft(values, axis=0, norm="forward")
    u = np.abs(frequencies(2 * l_max + 1))
    result = np.zeros((2 * l_max + 1, l_max + 1, l_max + 1))
    for degree in range(l_max + 1):
        for order in range(degree + 1):
            column = series[:, degree**2 + degree + order] / _phases(l_max)[order]
            result[:, degree, order] = column.real * ((u <= degree) & ((u - degree) % 2 == 0))
    return result


@functools.cache
def integrals(l_max: int, n: int) -> Float[np.ndarray, "frequencies degrees orders"]:
    r"""Real ``W``: :math:`i^{-(m \bmod 2)} W_{ulm} = \frac{1}{2} \int_0^\pi e^{iu\theta}
    \Theta_{lm}(\theta) \sin\theta \, d\theta`, its part that is even (odd) in ``u`` for even (odd)
    orders: products of functions on the sphere have no other.

    In closed form, from the integrals of ``cos(a theta) sin(theta)``: ``2 / (1 - a^2)`` for even
    ``a`` and 0 for odd ``a``.
    """
    sums = frequencies(n)[:, None] + frequencies(2 * l_max + 1)
    even = sums % 2 == 0
    cosine = np.where(even, 2 / (1 - np.where(even, sums, 0) ** 2.0), 0)
    return np.einsum("uj,jlm->ulm", cosine, latitude_series(l_max)) / 2


def _phases(l_max: int) -> np.ndarray:
    """1 for even orders, ``1 / i`` for odd ones."""
    return np.where(np.arange(l_max + 1) % 2 == 0, 1, -1j)


def _times(spectrum: Array, factors: np.ndarray) -> Array:
    """A constant for each order, the last axis."""
    shape = (1,) * (spectrum.ndim - 1) + factors.shape
    return spectrum * jnp.asarray(factors.reshape(shape), spectrum.dtype)
