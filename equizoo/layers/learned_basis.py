"""Bases of distance with parameters."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from equizoo.layers.radial import polynomial_envelope


class LearnedGaussians(nnx.Module):
    r"""Normal densities of a learned affine function of ``r / cutoff``.

    .. math:: b_n(r) = \frac{1}{\sqrt{2 \pi} \, \sigma_n}
        \exp\left(-\frac{(w r / r_c + b - \mu_n)^2}{2 \sigma_n^2}\right)

    Does not vanish at the cutoff. Reference: Ying et al. 2021 (Graphormer),
    https://arxiv.org/abs/2106.05234; as in Equiformer, which writes pi as 3.14159.
    """

    def __init__(self, cutoff: float, num_basis: int, *, rngs: nnx.Rngs):
        self.cutoff = cutoff
        draw = jax.random.uniform(rngs.params(), (2, num_basis), jnp.float32)
        self.means = nnx.Param(draw[0])
        self.widths = nnx.Param(draw[1] * (1 - 1 / num_basis) + 1 / num_basis)
        self.weight = nnx.Param(jnp.ones(1, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(1, jnp.float32))

    def __call__(self, r: Float[Array, " edges"]) -> Float[Array, "edges num_basis"]:
        means, widths, weight, bias = (
            param[...].astype(r.dtype)[None]
            for param in (self.means, self.widths, self.weight, self.bias)
        )
        widths = jnp.abs(widths) + 1e-5
        deviation = ((r / self.cutoff)[:, None] * weight + bias - means) / widths
        return jnp.exp(-0.5 * deviation**2) / (widths * float(np.sqrt(2 * 3.14159)))


class LearnedBessel(nnx.Module):
    r"""Spherical Bessel functions of learned frequencies times a polynomial envelope.

    .. math:: b_n(r) = f_5(r / r_c) \sqrt{2 / r_c} \, \sin(k_n r / r_c) / r

    with :math:`k_n = n \pi` at first. Reference: Gasteiger et al. 2020,
    https://arxiv.org/abs/2003.03123, eqs. 7 and 8.
    """

    def __init__(self, cutoff: float, num_basis: int, *, rngs: nnx.Rngs):
        del rngs  # nothing random
        self.cutoff = cutoff
        self.frequencies = nnx.Param(np.pi * jnp.arange(1, num_basis + 1, dtype=jnp.float32))

    def __call__(self, r: Float[Array, " edges"]) -> Float[Array, "edges num_basis"]:
        frequencies = self.frequencies[...].astype(r.dtype)[None]
        waves = jnp.sinc(frequencies * (r / (np.pi * self.cutoff))[:, None])
        scale = float(np.sqrt(2 / self.cutoff) / self.cutoff)
        return polynomial_envelope(r, self.cutoff, 5)[:, None] * scale * frequencies * waves
