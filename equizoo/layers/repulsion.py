"""Repulsion of nuclei at short distance, in closed form."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from equizoo.layers.radial import polynomial_envelope

_COULOMB = 14.3996  # [eV Å] e^2 / (4 pi epsilon_0), as the published implementation rounds it
_BOHR = 0.529  # [Å] likewise
_DECAYS = (3.2, 0.9423, 0.4028, 0.2016)


@dataclasses.dataclass(frozen=True)
class ZBL:
    r"""Screened repulsion of Ziegler, Biersack and Littmark, ending where atoms would touch.

    .. math:: v = 14.4 \frac{Z_i Z_j}{r} \sum_k c_k e^{-d_k r / s} \, f_p(r / (R_i + R_j)), \quad
        s = \frac{0.4543 \cdot 0.529}{Z_i^{0.3} + Z_j^{0.3}}

    in eV and Å. ``radii`` by species are ASE's covalent radii unless given. The sum of two radii
    should be below the model's cutoff.
    """

    envelope_p: int = 6
    exponent: float = 0.3
    prefactor: float = 0.4543
    coefficients: tuple[float, float, float, float] = (0.1818, 0.5099, 0.2802, 0.02817)
    radii: tuple[float, ...] | None = None  # [Å]

    def __call__(
        self,
        r: Float[Array, " edges"],  # [Å]
        pairs: tuple[Int[Array, " edges"], Int[Array, " edges"]],  # species of the two atoms
        atomic_numbers: tuple[int, ...],
        radii: Float[Array, " edges"],  # [Å] R_i + R_j
    ) -> Float[Array, " edges"]:
        """Energy of each pair [eV]."""
        numbers = np.array(atomic_numbers, np.float64)
        z_1, z_2 = (jnp.asarray(numbers, r.dtype)[species] for species in pairs)
        screened = jnp.asarray(numbers**self.exponent, r.dtype)
        scaled = r * (screened[pairs[0]] + screened[pairs[1]]) / (self.prefactor * _BOHR)
        terms = zip(self.coefficients, _DECAYS, strict=True)
        screening = sum(c * jnp.exp(-d * scaled) for c, d in terms)
        envelope = polynomial_envelope(r, radii, self.envelope_p)
        return _COULOMB * z_1 * z_2 / r * screening * envelope
