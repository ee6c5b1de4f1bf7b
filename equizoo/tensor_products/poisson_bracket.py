"""Poisson bracket of functions on the sphere: the odd couplings, cross products and handedness."""

import dataclasses

import e3nn_jax as e3nn

from equizoo.tensor_products._base import Path, TensorProduct, allowed_paths
from equizoo.tensor_products._pointwise import BoundPointwise, Factor, Term
from equizoo.tensor_products._signals import Signals, degree_of, is_even, weights_of


@dataclasses.dataclass(frozen=True)
class PoissonBracket(TensorProduct):
    r"""The antisymmetric product of two functions on the sphere, by exact quadrature.

    .. math:: \{A, B\} = \hat r \cdot (\nabla A \times \nabla B)

    Couplings with ``l_1 + l_2 + l_3`` odd have the coefficient, up to sign,
    ``sqrt(d_1 d_2 d_3 l_1 (l_1 + 1) l_2 (l_2 + 1)) 3j(l_1 l_2 l_3; 1 -1 0)``, which is never zero
    (checked to l = 12), scaled for unit variance; even ones are absent. Two true tensors
    (``0e+1o+2e``) give pseudo-tensors (``1e+2o``).

    Reference: Bochkarev et al. 2026 (SCALE-CG), https://arxiv.org/abs/2605.15073.
    """

    def _bind(
        self, irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps
    ) -> BoundPointwise:
        paths = allowed_paths(irreps_1, irreps_2, irreps_out, keep=is_odd)
        signals = Signals(degree_of(paths), (irreps_1, irreps_2))
        weights = weights_of(irreps_2, paths)
        return BoundPointwise(
            irreps_1, irreps_2, irreps_out, paths,
            firsts=signals.derivatives(irreps_1),
            seconds=[Factor(along, weights) for along in signals.derivatives(irreps_2)],
            results=[signals.results(irreps_out, keeps_chirality=False)],
            terms=[Term(0, 0, 1), Term(0, 1, 0, sign=-1)],
        )  # fmt: skip


def is_odd(path: Path) -> bool:
    return not is_even(path)
