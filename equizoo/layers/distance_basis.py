"""Bases of distance, with and without parameters, that networks with layer normalisation take."""

import enum

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from equizoo.layers.radial import polynomial_envelope


class RadialBasis(enum.StrEnum):
    """:class:`ExpNormal`, :class:`LearnedGaussians` or :class:`LearnedBessel`."""

    EXP_NORMAL = "exp_normal"
    GAUSSIAN = "gaussian"
    BESSEL = "bessel"

    def build(
        self, cutoff: float, num_basis: int, *, pi: float = np.pi, rngs: nnx.Rngs
    ) -> "ExpNormal | LearnedGaussians | LearnedBessel":
        """Functions of distances [Å]; ``pi`` is that of Gaussians."""
        match self:
            case RadialBasis.EXP_NORMAL:
                return ExpNormal(cutoff, num_basis)
            case RadialBasis.GAUSSIAN:
                return LearnedGaussians(cutoff, num_basis, pi=pi, rngs=rngs)
            case RadialBasis.BESSEL:
                return LearnedBessel(cutoff, num_basis, rngs=rngs)


def cosine_cutoff(
    r: Float[Array, "*batch"],  # [Å]
    cutoff: float,  # [Å]
) -> Float[Array, "*batch"]:
    """``(1 + cos(pi r / cutoff)) / 2``, zero from the cutoff on: continuous with its slope."""
    return jnp.where(r < cutoff, (1 + jnp.cos(np.pi * r / cutoff)) / 2, 0)


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


class ExpNormal(nnx.Module):
    r"""Gaussians of ``exp(-5 r / cutoff)`` times a cosine cutoff, nothing learned.

    .. math:: b_n(r) = \tfrac{1 + \cos(\pi r / r_c)}{2}
        \exp\left(-\beta \, (e^{-5 r / r_c} - \mu_n)^2\right), \quad
        \beta = \left(\tfrac{2}{N} (1 - e^{-r_c})\right)^{-2}

    with :math:`\mu_n` from :math:`e^{-r_c}` (``r_c`` in Å) to 1 in equal steps.

    Reference: Thölke and De Fabritiis 2022, https://arxiv.org/abs/2202.02541, eq. 2.
    """

    def __init__(self, cutoff: float, num_basis: int):
        self.cutoff = cutoff
        self.start = float(np.exp(-cutoff))
        self.means = tuple(np.linspace(self.start, 1, num_basis).tolist())

    def __call__(self, r: Float[Array, " edges"]) -> Float[Array, "edges num_basis"]:
        means = jnp.asarray(self.means, r.dtype)[None]
        beta = (2 / len(self.means) * (1 - self.start)) ** -2
        gaussians = jnp.exp(-beta * (jnp.exp(-5 / self.cutoff * r)[:, None] - means) ** 2)
        return cosine_cutoff(r, self.cutoff)[:, None] * gaussians


class LearnedGaussians(nnx.Module):
    r"""Normal densities of a learned affine function of ``r / cutoff``.

    .. math:: b_n(r) = \frac{1}{\sqrt{2 \pi} \, \sigma_n}
        \exp\left(-\frac{(w r / r_c + b - \mu_n)^2}{2 \sigma_n^2}\right)

    Does not vanish at the cutoff. Reference: Ying et al. 2021 (Graphormer),
    https://arxiv.org/abs/2106.05234; Equiformer writes ``pi`` as 3.14159.
    """

    def __init__(self, cutoff: float, num_basis: int, *, pi: float = np.pi, rngs: nnx.Rngs):
        self.cutoff, self.pi = cutoff, pi
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
        return jnp.exp(-0.5 * deviation**2) / (widths * float(np.sqrt(2 * self.pi)))


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
