"""Gaunt product by the spherical transforms of s2fft."""

import dataclasses
import functools

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from equizoo.tensor_products._base import TensorProduct
from equizoo.tensor_products._transforms import (
    BoundTransformed,
    BoundTransformedPower,
    Degrees,
    Transform,
)

# s2fft warns of float32 when it is imported; its kernels here are float64 whatever JAX's default.
with jax.enable_x64(True):
    from s2fft.precompute_transforms import construct, spherical
    from s2fft.sampling import s2_samples

SAMPLINGS = ("gl", "dh", "mw", "mwss")


@dataclasses.dataclass(frozen=True)
class GauntS2FFT(TensorProduct):
    """The product of ``GauntGrid`` through s2fft: Legendre transforms in latitude, FFTs around it.

    ``sampling`` places the points: Gauss-Legendre (``gl``, the fewest points and the shortest
    programs), Driscoll-Healy (``dh``) or McEwen-Wiaux (``mw``, ``mwss``, which resample the product
    before they integrate it). HEALPix has no exact quadrature and is refused.

    References: Price and McEwen 2024, https://arxiv.org/abs/2311.14670, for s2fft; Xie et al. 2025
    (The Price of Freedom), https://arxiv.org/abs/2506.13523, for the product.
    """

    sampling: str = "gl"

    def __post_init__(self):
        if self.sampling not in SAMPLINGS:
            raise ValueError(
                f"sampling is {self.sampling!r}, expected one of {', '.join(SAMPLINGS)}. Other "
                "samplings of s2fft (healpix) are not exact, and the product would not be "
                "equivariant."
            )

    def _bind(
        self, irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps
    ) -> BoundTransformed:
        return BoundTransformed(irreps_1, irreps_2, irreps_out, self._transform)

    def _bind_power(
        self, irreps_in: e3nn.Irreps, irreps_out: e3nn.Irreps, order: int
    ) -> BoundTransformedPower:
        return BoundTransformedPower(irreps_in, irreps_out, order, self._transform)

    def _transform(self, degrees: Degrees) -> "Spherical":
        return Spherical(degrees, self.sampling)


class Spherical(Transform):
    """Precomputed transforms of s2fft, at a band that is exact for the product.

    Samplings with a quadrature (``gl``, ``dh``) integrate products of degree ``2 band - 2``; the
    others represent functions up to degree ``band - 1``, the product itself among them.
    """

    def __init__(self, degrees: Degrees, sampling: str):
        self.l_out, self.sampling = degrees.result, sampling
        if sampling in ("gl", "dh"):
            half = -(-(degrees.product + degrees.result) // 2)
            self.band = 1 + max(half, degrees.factors, degrees.result)
        else:
            self.band = 1 + max(degrees.product, degrees.result)
        self.points = int(np.prod(s2_samples.f_shape(self.band, sampling)))

    def to_values(
        self, packed: Float[Array, "*batch 2 degrees orders"]
    ) -> Float[Array, "*batch latitudes longitudes"]:
        size, band = packed.shape[-1], self.band
        flm = jax.lax.complex(packed[..., 0, :, :], -packed[..., 1, :, :])
        flm *= _normalisation(size, flm)
        # negative orders are not read: the functions are real
        margins = [(0, 0)] * (flm.ndim - 2) + [(0, band - size), (band - 1, band - size)]
        flm = jnp.pad(flm, margins)
        kernel = jnp.asarray(kernels(band, self.sampling)[0], packed.dtype)
        return self._over_batch(spherical.inverse_transform_jax, flm, kernel)

    def to_coefficients(
        self, values: Float[Array, "*batch latitudes longitudes"]
    ) -> Float[Array, "*batch 2 degrees orders"]:
        kernel = jnp.asarray(kernels(self.band, self.sampling)[1], values.dtype)
        flm = self._over_batch(spherical.forward_transform_jax, values, kernel)
        size = self.l_out + 1
        flm = flm[..., :size, self.band - 1 : self.band - 1 + size]
        flm /= _normalisation(size, flm)
        return jnp.stack([flm.real, -flm.imag], axis=-3)

    def _over_batch(self, function, arrays, kernel):
        """One call of s2fft for the whole batch; it is written for JAX's defaults of promotion."""
        flat = arrays.reshape(-1, *arrays.shape[-2:])
        with (
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
            jax.default_matmul_precision("highest"),
        ):
            result = jax.vmap(
                lambda array: function(array, kernel, self.band, self.sampling, True, 0, None)
            )(flat)
        return result.reshape(*arrays.shape[:-2], *result.shape[1:])

    def flops(self, l_max: int) -> tuple[int, int]:
        # one complex matrix per order, whatever the degree; real FFTs around each latitude
        latitudes, longitudes = s2_samples.f_shape(self.band, self.sampling)
        matrices = [8 * len(kernel) * self.band**2 for kernel in kernels(self.band, self.sampling)]
        around = int(2.5 * latitudes * longitudes * np.log2(longitudes))
        return matrices[0] + around, matrices[1] + around


@functools.cache
def kernels(
    band: int, sampling: str
) -> tuple[Float[np.ndarray, "lat degrees orders"], Float[np.ndarray, "_ degrees orders"]]:
    """Legendre functions at the latitudes, and those with weights of integration, in float64."""
    inverse, forward = (
        construct.spin_spherical_kernel(
            band, reality=True, sampling=sampling, forward=forward, recursion="risbo"
        )
        for forward in (False, True)
    )
    return inverse, forward


def _normalisation(
    size: int, like: Complex[Array, "*batch degrees orders"]
) -> Complex[Array, "... 1 orders"]:
    """From harmonics of mean square one to orthonormal ones with the sign ``(-1)^m``."""
    order = np.arange(size)
    factors = np.where(order == 0, np.sqrt(4 * np.pi), np.sqrt(2 * np.pi) * (-1.0) ** order)
    return jnp.asarray(factors.reshape((1,) * (like.ndim - 1) + (size,)), like.dtype)
