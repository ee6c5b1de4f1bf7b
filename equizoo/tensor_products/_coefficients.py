"""A product as a combination of the couplings that symmetry allows."""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from equizoo.tensor_products._base import BoundProduct, Path, allowed_paths, wigner_3j


class Coefficients(NamedTuple):
    """The map as couplings: ``dense[w] = sum_p values[w, p] 3j_p`` plus a residual."""

    paths: tuple[Path, ...]  # all that angular momentum and parity allow
    values: Float[np.ndarray, "num_weights paths"]
    residual: float  # Frobenius norm of what no coupling explains; zero for an exact product
    norm: float  # Frobenius norm of the map

    @property
    def defect(self) -> float:
        """Relative change under rotations, root mean square over them and over normal arguments and
        weights."""
        return float(np.sqrt(2)) * self.residual / self.norm


@functools.cache
def coefficients(product: BoundProduct) -> Coefficients:
    """Projections of the map on the Wigner 3j tensors, which are orthonormal."""
    paths = allowed_paths(product.irreps_1, product.irreps_2, product.irreps_out)
    dense = product.dense()
    residual = dense.copy()
    slices = product.irreps_1.slices(), product.irreps_2.slices(), product.irreps_out.slices()
    values = np.zeros((product.num_weights, len(paths)))
    for p, path in enumerate(paths):
        place = (slices[0][path.index_1], slices[1][path.index_2], slices[2][path.index_out])
        coupling = wigner_3j(path.ir_1.l, path.ir_2.l, path.ir_out.l)
        values[:, p] = np.einsum("wijk,ijk->w", dense[:, *place], coupling)
        residual[:, *place] -= values[:, p, None, None, None] * coupling
    return Coefficients(
        paths, values, float(np.linalg.norm(residual)), float(np.linalg.norm(dense))
    )
