"""Gaunt product and Poisson bracket on one grid: every coupling, from pointwise products."""

import dataclasses

import e3nn_jax as e3nn

from equizoo.tensor_products._base import TensorProduct, allowed_paths
from equizoo.tensor_products._pointwise import BoundPointwise, Factor, Term
from equizoo.tensor_products._signals import Signals, degree_of, is_even, weights_of


@dataclasses.dataclass(frozen=True)
class GauntBracket(TensorProduct):
    r"""Product and antisymmetric product of two functions on the sphere.

    .. math:: A B + \hat r \cdot (\nabla A \times \nabla B)

    The even couplings of ``GauntGrid`` and the odd ones of ``PoissonBracket``, each with its own
    weights for the irreps of the second factor: all that Clebsch-Gordan products couple, in fixed
    proportions. Where one kind couples nothing, its transforms are left out.

    References: those of ``GauntGrid``; Bochkarev et al. 2026 (SCALE-CG),
    https://arxiv.org/abs/2605.15073.
    """

    def _bind(
        self, irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps
    ) -> BoundPointwise:
        paths = allowed_paths(irreps_1, irreps_2, irreps_out)
        even = tuple(path for path in paths if is_even(path))
        odd = tuple(path for path in paths if not is_even(path))
        signals = Signals(degree_of(paths), (irreps_1, irreps_2))
        firsts, seconds, results, terms = [], [], [], []
        if even:
            firsts.append(signals.values(irreps_1))
            weights = weights_of(irreps_2, even)
            seconds.append(Factor(signals.values(irreps_2), weights))
            results.append(signals.results(irreps_out))
            terms.append(Term(0, 0, 0))
        if odd:
            a, b, into = len(firsts), len(firsts) + 1, len(results)
            firsts.extend(signals.derivatives(irreps_1))
            weights = weights_of(irreps_2, odd, start=len({path.index_2 for path in even}))
            seconds.extend(Factor(along, weights) for along in signals.derivatives(irreps_2))
            results.append(signals.results(irreps_out, keeps_chirality=False))
            terms.extend([Term(into, a, b), Term(into, b, a, sign=-1)])
        return BoundPointwise(
            irreps_1, irreps_2, irreps_out, paths, firsts, seconds, results, terms
        )
