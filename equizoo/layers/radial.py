"""Functions of distance: bases, transforms and envelopes."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import ase.data
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def polynomial_envelope(
    r: Float[Array, "*batch"],  # [Å]
    cutoff: float | Float[Array, "*batch"],  # [Å]
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


@dataclasses.dataclass(frozen=True)
class Bessel:
    """Spherical Bessel functions of order zero, :func:`bessel_basis`.

    A converted model may have frequencies and a prefactor of its own: trained, or rounded.
    """

    frequencies: tuple[float, ...] | None = None  # [1/Å] n pi / cutoff
    prefactor: float | None = None  # [Å^-1/2] sqrt(2 / cutoff)
    kind: Literal["bessel"] = "bessel"

    def __call__(
        self, x: Float[Array, "*batch"], cutoff: float, num_basis: int
    ) -> Float[Array, "*batch num_basis"]:
        """``num_basis`` functions of length [Å] or transformed length."""
        if self.frequencies is None and self.prefactor is None:
            return bessel_basis(x, cutoff, num_basis)
        known = self.frequencies or tuple(n * np.pi / cutoff for n in range(1, num_basis + 1))
        factor = float(np.sqrt(2 / cutoff)) if self.prefactor is None else self.prefactor
        w = _axis(known, x)
        return factor * w * jnp.sinc(w / float(np.pi) * x[..., None])


@dataclasses.dataclass(frozen=True)
class Gaussian:
    r"""Gaussians ``exp(c (x - mu_n)^2)`` with centers from 0 to the cutoff, ends included.

    ``c = -1 / (2 d^2)`` with ``d`` the distance between centers. Converted models may state both.
    """

    centers: tuple[float, ...] | None = None  # [Å]
    coefficient: float | None = None  # [1/Å^2]
    kind: Literal["gaussian"] = "gaussian"

    def __call__(
        self, x: Float[Array, "*batch"], cutoff: float, num_basis: int
    ) -> Float[Array, "*batch num_basis"]:
        """``num_basis`` (two at least) functions of length [Å] or transformed length."""
        centers = self.centers or tuple(np.linspace(0, cutoff, num_basis).tolist())
        factor = self.coefficient
        if factor is None:
            factor = -0.5 / (cutoff / (num_basis - 1)) ** 2
        return jnp.exp(factor * (x[..., None] - _axis(centers, x)) ** 2)


@dataclasses.dataclass(frozen=True)
class Chebyshev:
    """Chebyshev polynomials of the first kind, orders 1 to N.

    They grow beyond 1: meant for a transformed length in (0, 1), as of :class:`Agnesi`.
    """

    kind: Literal["chebyshev"] = "chebyshev"

    def __call__(
        self, x: Float[Array, "*batch"], cutoff: float, num_basis: int
    ) -> Float[Array, "*batch num_basis"]:
        """``T_1(x) ... T_N(x)`` by ``T_{n+1} = 2 x T_n - T_{n-1}``."""
        values = [jnp.ones_like(x), x]
        while len(values) <= num_basis:
            values.append(2 * x * values[-1] - values[-2])
        return jnp.stack(values[1 : num_basis + 1], axis=-1)


RadialBasis = Bessel | Gaussian | Chebyshev


@dataclasses.dataclass(frozen=True)
class Agnesi:
    r"""A length on the scale of the two atoms, from 1 at zero towards 0 at infinity.

    .. math:: x = \left(1 + \frac{a\, t^q}{1 + t^{q - p}}\right)^{-1}, \quad
        t = 2 r / (R_i + R_j)

    ``radii`` by species are ASE's covalent radii unless given.

    Reference: Witt et al. 2023, https://doi.org/10.1063/5.0158783.
    """

    q: float = 0.9183
    p: float = 4.5791
    a: float = 1.0805
    radii: tuple[float, ...] | None = None  # [Å]
    kind: Literal["agnesi"] = "agnesi"

    def __call__(
        self,
        r: Float[Array, " edges"],  # [Å]
        radii: Float[Array, " edges"],  # [Å] R_i + R_j
    ) -> Float[Array, " edges"]:
        """The transformed length."""
        t = 2 * r / radii
        return 1 / (1 + self.a * t**self.q / (1 + t ** (self.q - self.p)))


@dataclasses.dataclass(frozen=True)
class Soft:
    r"""A length that stays near ``3/4 (R_i + R_j)`` for close atoms, itself for distant ones.

    .. math:: x = p_0 + (r - p_0) \, \tfrac12 \left[1 + \tanh\left(\alpha
        \frac{r - m}{p_1 - p_0}\right)\right]

    with ``p_0`` and ``p_1`` 3/4 and 4/3 of the sum of radii, ``m`` half way between.
    """

    alpha: float = 4.0
    radii: tuple[float, ...] | None = None  # [Å]
    kind: Literal["soft"] = "soft"

    def __call__(
        self,
        r: Float[Array, " edges"],  # [Å]
        radii: Float[Array, " edges"],  # [Å] R_i + R_j
    ) -> Float[Array, " edges"]:
        """The transformed length [Å]."""
        near, far = 3 / 4 * radii, 4 / 3 * radii
        step = jnp.tanh(self.alpha / (far - near) * (r - (near + far) / 2))
        return near + (r - near) * 0.5 * (1 + step)


DistanceTransform = Agnesi | Soft


def covalent_radii(
    atomic_numbers: Sequence[int], radii: Sequence[float] | None = None
) -> Float[np.ndarray, " species"]:
    """Radii by species [Å]: the given ones, or ASE's; ``ValueError`` for another number of them."""
    if radii is None:
        return np.array([ase.data.covalent_radii[z] for z in atomic_numbers], np.float64)
    if len(radii) != len(atomic_numbers):
        raise ValueError(
            f"{len(radii)} radii for {len(atomic_numbers)} elements; expected one for each."
        )
    return np.array(radii, np.float64)


def _axis(values: Sequence[float], x: Float[Array, "*batch"]) -> Float[Array, "..."]:
    return jnp.asarray(values, x.dtype).reshape((1,) * x.ndim + (-1,))
