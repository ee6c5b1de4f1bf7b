"""Cross product of vector fields on the sphere: odd couplings, the published way to get them."""

import dataclasses
import functools

import e3nn_jax as e3nn
import numpy as np
from jaxtyping import Float
from sympy.physics import wigner

from equizoo.tensor_products._base import Path, TensorProduct, allowed_paths, wigner_3j
from equizoo.tensor_products._pointwise import BoundPointwise, Factor, Term
from equizoo.tensor_products._signals import chirality, weights_of
from equizoo.tensor_products._sphere import harmonics, lebedev

# (component of the result, of the first factor, of the second, sign)
_CROSS = [(0, 1, 2, 1), (0, 2, 1, -1), (1, 2, 0, 1), (1, 0, 2, -1), (2, 0, 1, 1), (2, 1, 0, -1)]


@dataclasses.dataclass(frozen=True)
class VectorSignal(TensorProduct):
    r"""Irreps of degree ``j`` as vector harmonics of degree ``l = j + offset``: cross products.

    .. math:: V^{j l}_m = \sqrt{2 j + 1} \sum_{\mu a} \begin{pmatrix} l & 1 & j \\ \mu & a & m
        \end{pmatrix} Y_{l \mu} \, e_a, \qquad
        z_{j_3} = \int V^{j_3 l_3} \cdot (V_x \times V_y) \frac{d\Omega}{4\pi}

    Coefficients, up to sign, ``sqrt(3 prod (2 j_i + 1)(2 l_i + 1)) 3j(l_1 l_2 l_3; 0 0 0)
    9j{l_1 l_2 l_3; 1 1 1; j_1 j_2 j_3}``, scaled for unit variance. The offsets of both factors and
    of the result are -1, 0 or 1 with an odd sum; even couplings are then absent. Offsets (0, 0, 1)
    multiply transverse fields: the Poisson bracket, at more cost.

    Reference: Xie et al. 2026, https://arxiv.org/abs/2602.21466.
    """

    offsets: tuple[int, int, int] = (1, 1, 1)

    def __post_init__(self):
        if not set(self.offsets) <= {-1, 0, 1} or sum(self.offsets) % 2 == 0:
            raise ValueError(
                f"offsets are {self.offsets}, expected three of -1, 0, 1 with an odd sum, such as "
                "(1, 1, 1); with an even sum no odd coupling survives."
            )

    def _bind(
        self, irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps
    ) -> BoundPointwise:
        paths = allowed_paths(irreps_1, irreps_2, irreps_out, keep=self._couples)
        sides = ([p.ir_1.l for p in paths], [p.ir_2.l for p in paths], [p.ir_out.l for p in paths])
        degree = sum(max(side) + offset for side, offset in zip(sides, self.offsets, strict=True))
        grid = lebedev(degree)
        contents = (irreps_1, irreps_2, irreps_out)
        first, second, result = (
            _vector_harmonics(irreps, offset, grid.points)
            for irreps, offset in zip(contents, self.offsets, strict=True)
        )
        signs = [chirality(irreps) for irreps in contents]
        result = result * grid.weights[:, None]
        if any((sign < 0).any() for sign in signs[:2]):  # as in Signals
            first, second = (np.concatenate([v, v * s], axis=1) for v, s in
                             zip((first, second), signs[:2], strict=True))  # fmt: skip
            result = np.concatenate([result, -result * signs[2]], axis=1) / 2
        else:
            result = result * (signs[2] < 0)
        weights = weights_of(irreps_2, paths)
        return BoundPointwise(
            irreps_1, irreps_2, irreps_out, paths,
            firsts=list(first), seconds=[Factor(component, weights) for component in second],
            results=list(result), terms=[Term(*term) for term in _CROSS],
        )  # fmt: skip

    def _couples(self, path: Path) -> bool:
        degrees = path.ir_1.l, path.ir_2.l, path.ir_out.l
        return sum(degrees) % 2 == 1 and _nonzero(degrees, self.offsets)


def _vector_harmonics(
    irreps: e3nn.Irreps, offset: int, points: Float[np.ndarray, "points 3"]
) -> Float[np.ndarray, "3 points dim"]:
    """Cartesian components (x, y, z) of the vector harmonics; zero where ``l`` is impossible."""
    columns = []
    for _, ir in irreps:
        degree = ir.l + offset
        if degree < 0 or not abs(degree - 1) <= ir.l <= degree + 1:
            columns.append(np.zeros((3, len(points), ir.dim)))
            continue
        values = harmonics(e3nn.Irreps([(1, (degree, 1))]), points)
        couple = np.sqrt(ir.dim) * wigner_3j(degree, 1, ir.l)
        columns.append(np.einsum("na,axm->xnm", values, couple))
    return np.concatenate(columns, axis=2)


@functools.cache
def _nonzero(degrees: tuple[int, int, int], offsets: tuple[int, int, int]) -> bool:
    """Whether the closed form of the coefficient is other than zero."""
    lower = [j + offset for j, offset in zip(degrees, offsets, strict=True)]
    possible = all(
        low >= 0 and abs(low - 1) <= j <= low + 1 for low, j in zip(lower, degrees, strict=True)
    )
    return (
        possible
        and wigner.wigner_3j(*lower, 0, 0, 0) != 0
        and wigner.wigner_9j(*lower, 1, 1, 1, *degrees) != 0
    )
