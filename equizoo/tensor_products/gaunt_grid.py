"""Gaunt product on a grid of the sphere: even couplings by multiplying functions point by point."""

import dataclasses

import e3nn_jax as e3nn

from equizoo.tensor_products._base import TensorProduct, allowed_paths
from equizoo.tensor_products._pointwise import BoundPointwise, BoundPointwisePower, Factor, Term
from equizoo.tensor_products._signals import Signals, degree_of, is_even, weights_of


@dataclasses.dataclass(frozen=True)
class GauntGrid(TensorProduct):
    r"""Product of two functions on the sphere, by exact quadrature with the fewest known points.

    .. math:: z_{l_3} = \int Y_{l_3} \Big(\sum_{l_1} Y_{l_1} \cdot x_{l_1}\Big)
        \Big(\sum_{l_2} w_{l_2} Y_{l_2} \cdot y_{l_2}\Big) \frac{d\Omega}{4\pi}

    Couplings with ``l_1 + l_2 + l_3`` even have the coefficient
    ``sqrt(d_1 d_2 d_3) |3j(l_1 l_2 l_3; 0 0 0)|``, scaled for unit variance; odd ones are absent:
    no cross products, no handedness.

    References: Luo et al. 2024, https://arxiv.org/abs/2401.10216; Xie et al. 2025 (The Price of
    Freedom), https://arxiv.org/abs/2506.13523, for the grid.
    """

    def _bind(
        self, irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps
    ) -> BoundPointwise:
        paths = allowed_paths(irreps_1, irreps_2, irreps_out, keep=is_even)
        signals = Signals(degree_of(paths), (irreps_1, irreps_2))
        second = Factor(signals.values(irreps_2), weights_of(irreps_2, paths))
        return BoundPointwise(
            irreps_1, irreps_2, irreps_out, paths, firsts=[signals.values(irreps_1)],
            seconds=[second], results=[signals.results(irreps_out)], terms=[Term(0, 0, 0)],
        )  # fmt: skip

    def _bind_power(
        self, irreps_in: e3nn.Irreps, irreps_out: e3nn.Irreps, order: int
    ) -> BoundPointwisePower:
        highest = (max(ir.l for _, ir in irreps) for irreps in (irreps_in, irreps_out))
        signals = Signals(order * next(highest) + next(highest), (irreps_in,))
        values, results = signals.values(irreps_in), signals.results(irreps_out)
        return BoundPointwisePower(irreps_in, irreps_out, order, values, results)
