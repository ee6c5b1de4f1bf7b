"""What a product can express, what it costs, how equivariant it is: measured on the map itself."""

import numpy as np
from jaxtyping import Bool

from equizoo.tensor_products._base import BoundProduct, Path
from equizoo.tensor_products._coefficients import coefficients

_ZERO = 1e-10  # of a coefficient; the maps have unit variance


def equivariance_defect(product: BoundProduct) -> float:
    r"""How far the product is from commuting with rotations and reflections, relative to its size.

    .. math:: \sqrt{E \| M(D x, D y) - D M(x, y) \|^2 \,/\, E \| M(x, y) \|^2}
        = \sqrt{2 \left(1 - \| P M \|^2 / \| M \|^2 \right)}

    over random rotations, standard normal arguments and weights; ``P`` projects on the couplings.
    """
    found = coefficients(product)
    return float(np.sqrt(2) * found.residual / found.norm)


def interactability(product: BoundProduct) -> dict[Path, bool]:
    """For each coupling that is allowed, whether the product contains it."""
    found = coefficients(product)
    present = np.abs(found.values).max(axis=0) > _ZERO
    return dict(zip(found.paths, present.tolist(), strict=True))


def expressivity(product: BoundProduct, seed: int = 0) -> int:
    r"""Dimension of the family of maps reached by its weights and by scales of every irrep.

    .. math:: a_{l_1} b_{l_2} c_{l_3} \sum_w \theta_w \, \alpha_w(l_1, l_2, l_3)

    The rank of its derivative at a generic point. Clebsch-Gordan reaches the number of couplings; a
    product with one weight ``n_1 + n_2 + n_3 - 2`` (if it is connected), for ``n`` irreps each.

    Reference: Xie et al. 2025 (The Price of Freedom), https://arxiv.org/abs/2506.13523, section 3.
    """
    found = coefficients(product)
    rng = np.random.default_rng(seed)
    contents = product.irreps_1, product.irreps_2, product.irreps_out
    scales = [rng.uniform(0.5, 2, size=len(irreps)) for irreps in contents]
    theta = rng.normal(size=len(found.values))
    index = np.array([(p.index_1, p.index_2, p.index_out) for p in found.paths])
    own = theta @ found.values
    product_of_scales = np.prod([s[i] for s, i in zip(scales, index.T, strict=True)], axis=0)
    columns = [found.values * product_of_scales]
    for side, scale in enumerate(scales):
        member: Bool[np.ndarray, "irreps paths"] = np.arange(len(scale))[:, None] == index[:, side]
        columns.append(member * (own * product_of_scales) / scale[:, None])
    return int(np.linalg.matrix_rank(np.concatenate(columns), tol=1e-8))
