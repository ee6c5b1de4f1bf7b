"""Any product with couplings left out: gates while training chooses, a smaller product after."""

import dataclasses

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from equizoo.registry import TENSOR_PRODUCTS
from equizoo.tensor_products._base import BoundProduct, TensorProduct
from equizoo.tensor_products._coefficients import coefficients


@dataclasses.dataclass(frozen=True)
class SelectedPaths(TensorProduct):
    """Another product with some of its weights, by ascending index; ``None`` keeps them all.

    For ``ClebschGordan`` a weight is a coupling, one of ``bound.paths``, and couplings that are
    left out cost nothing. Other products run whole and only save weights. Unit variance in,
    unit variance out still holds: each irrep of the result is scaled again.

    Training chooses in three phases, with one learned gate for each weight. First every step
    multiplies the weights of the whole product by ``where(random_keep(...), gates, 0)``; then by
    ``where(keep_by_gate(gates, ...), gates, 0)``; at last ``keep = indices(keep_by_gate(...))`` is
    fixed and the model built again. Indices are those of one bound product: where the layers of a
    model have different contents, each needs its own.

    Example:
        >>> product = SelectedPaths(keep=(0, 3)).bind("0e+1o", "0e+1o", "0e+1o")
        >>> [f"{path.ir_1} x {path.ir_2} -> {path.ir_out}" for path in product.paths]
        ['0e x 0e -> 0e', '1o x 0e -> 1o']

    Reference: SPHNet, Luo et al. 2025, https://arxiv.org/abs/2502.01171; there the gates of the
    couplings kept stay in the product, divided by their sum.
    """

    product: TensorProduct = dataclasses.field(
        default_factory=lambda: TENSOR_PRODUCTS["clebsch_gordan"]()
    )
    keep: tuple[int, ...] | None = None

    def _bind(
        self, irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps
    ) -> BoundProduct:
        whole = self.product.bind(irreps_1, irreps_2, irreps_out)
        return whole if self.keep is None else whole.select(self.keep)


def random_keep(num: int, sparsity: float, key: PRNGKeyArray) -> Bool[Array, " num"]:
    """A mask of ``num`` weights, true for a uniformly random subset of the size to be kept.

    At least one, else ``num * (1 - sparsity)`` rounded down. Raises ``ValueError`` unless
    ``0 <= sparsity < 1``.
    """
    return jax.random.permutation(key, num) < _num_kept(num, sparsity)


def keep_by_gate(gates: Float[Array, " num"], sparsity: float) -> Bool[Array, " num"]:
    """A mask, true for the gates of greatest magnitude, the first among equals.

    As many as in :func:`random_keep`. Where weights do not carry equal variance, pass
    ``gates * sqrt(variance_shares(product))``.
    """
    order = jnp.argsort(-jnp.abs(gates), stable=True)
    rank = jnp.argsort(order)
    return rank < _num_kept(len(gates), sparsity)


def indices(mask: Bool[Array, " num"]) -> tuple[int, ...]:
    """The places where a concrete mask is true: ``SelectedPaths.keep``."""
    return tuple(np.flatnonzero(np.asarray(mask)).tolist())


def variance_shares(product: BoundProduct) -> Float[np.ndarray, " num_weights"]:
    r"""The variance that each weight brings into the irreps of the result, summed over them.

    .. math:: \sum_p \alpha_w(p)^2 / (2 l_3(p) + 1)

    They sum to the number of irreps that are reached.
    """
    found = coefficients(product)
    return np.sum(found.values**2 / [path.ir_out.dim for path in found.paths], axis=1)


def _num_kept(num: int, sparsity: float) -> int:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; expected the share to leave out, 0 <= s < 1.")
    return max(1, int(num * (1 - sparsity) + 1e-9))
