"""Functions on the sphere at the points of a quadrature, true tensors and pseudo-tensors apart."""

import e3nn_jax as e3nn
import numpy as np
from jaxtyping import Float, Int

from equizoo.tensor_products._base import Path
from equizoo.tensor_products._sphere import harmonics, lebedev, tangent_derivatives


class Signals:
    """Maps between coefficients and values at points, exact for products up to a degree.

    A signal of true tensors and one of pseudo-tensors can share coefficients. Where pseudo-tensors
    occur among ``inputs`` the points are doubled, the pseudo-tensors change sign in the second
    half, and results are told apart by their symmetry under the exchange of halves.
    """

    def __init__(self, degree: int, inputs: tuple[e3nn.Irreps, ...]):
        self.grid = lebedev(degree)
        self.doubled = any((chirality(irreps) < 0).any() for irreps in inputs)

    def values(self, irreps: e3nn.Irreps) -> Float[np.ndarray, "points dim"]:
        return self._halves(harmonics(irreps, self.grid.points), irreps)

    def derivatives(self, irreps: e3nn.Irreps) -> tuple[np.ndarray, np.ndarray]:
        """Maps to the derivatives along two tangents that make a right-handed frame."""
        along = tangent_derivatives(irreps, self.grid.points)
        return self._halves(along[0], irreps), self._halves(along[1], irreps)

    def results(
        self, irreps: e3nn.Irreps, keeps_chirality: bool = True
    ) -> Float[np.ndarray, "points dim"]:
        """Maps from values of products back to coefficients (transposed), quadrature included.

        With ``keeps_chirality`` the product of two true signals is one (multiplication); without,
        it is a pseudo-signal (the Poisson bracket).
        """
        sign = chirality(irreps) * (1 if keeps_chirality else -1)
        weighted = self.grid.weights[:, None] * harmonics(irreps, self.grid.points)
        if self.doubled:
            return np.concatenate([weighted, weighted * sign]) / 2
        return weighted * (sign > 0)

    def _halves(
        self, values: Float[np.ndarray, "points dim"], irreps: e3nn.Irreps
    ) -> Float[np.ndarray, "doubled dim"]:
        return np.concatenate([values, values * chirality(irreps)]) if self.doubled else values


def chirality(irreps: e3nn.Irreps) -> Int[np.ndarray, " dim"]:
    """For each component +1 (the parity of harmonics) or -1 (a pseudo-tensor)."""
    return np.repeat([ir.p * (-1) ** ir.l for _, ir in irreps], [ir.dim for _, ir in irreps])


def is_even(path: Path) -> bool:
    """Whether the degrees have an even sum; odd couplings are antisymmetric, as cross products."""
    return (path.ir_1.l + path.ir_2.l + path.ir_out.l) % 2 == 0


def degree_of(paths: tuple[Path, ...]) -> int:
    """Of the polynomials to integrate: the sum of the highest degrees that are coupled."""
    sides = ((p.ir_1.l, p.ir_2.l, p.ir_out.l) for p in paths)
    return sum(map(max, zip(*sides, strict=True)))


def weights_of(
    irreps_2: e3nn.Irreps, paths: tuple[Path, ...], start: int = 0
) -> tuple[int | None, ...]:
    """Numbers the irreps of the second factor that are coupled, from ``start``."""
    used = sorted({path.index_2 for path in paths})
    order = {index: start + weight for weight, index in enumerate(used)}
    return tuple(order.get(index) for index in range(len(irreps_2)))
