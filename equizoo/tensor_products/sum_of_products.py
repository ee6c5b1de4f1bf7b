"""Sum of several copies of a cheap product, between differently scaled arguments."""

import dataclasses
from typing import Any, NamedTuple

import e3nn_jax as e3nn
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array, Bool, Float, Int

from equizoo.graph import Graph
from equizoo.registry import TENSOR_PRODUCTS
from equizoo.tensor_products._base import BoundProduct, TensorProduct
from equizoo.tensor_products._coefficients import coefficients

_ZERO = 1e-10  # of a coefficient; the maps have unit variance
_EXACT = 1e-11  # relative residual of a fit that has found an exact solution
_STARTS = 16
_RIDGE = 1e-2  # holds the scales near their start, so that the fit is unique
_NEWTON_STEPS = 30
_REACHED = 1e-6  # a direction that weights reach, against rounding; the smallest are about 1e-4


@dataclasses.dataclass(frozen=True)
class SumOfProducts(TensorProduct):
    r"""A sum of one product with itself: a dial from that product to Clebsch-Gordan.

    .. math:: z = \sum_{k=1}^{K} c_k \odot P(a_k \odot x, \; y; \; b_k \odot w_k)

    with constants ``a`` for the irreps of ``x``, ``c`` for those of the result, and ``b`` for the
    weights of the product ``P`` (where it has one for each irrep of ``y``, these are scales of
    ``y``). A Gaunt product couples degrees in proportions that scales of its arguments hardly
    change; every term adds to what can be reached, up to any weights of the couplings. As
    equivariant as ``P``, with any number of terms.

    The constants are fitted: with all weights one, the sum is the Clebsch-Gordan product with all
    weights one, up to a factor for each irrep of the result, as nearly as the terms allow
    (``BoundSum.residual``). For l up to 1, 2, 3 it is that exactly with 1, 2, 2 terms of
    ``GauntGrid`` (the even couplings), 1, 1, 2 of ``PoissonBracket`` (the odd ones), 1, 2, 3 of
    ``GauntBracket`` and 2, 3, 4 of ``MatrixProduct``. Weight ``w`` of term ``k`` is number
    ``w * terms + k``.

    Reference: Xie et al. 2025 (The Price of Freedom), https://arxiv.org/abs/2506.13523, section 3,
    for what one product with scales can express.
    """

    product: TensorProduct = dataclasses.field(
        default_factory=lambda: TENSOR_PRODUCTS["gaunt_bracket"]()
    )
    terms: int = 2

    def __post_init__(self):
        if self.terms < 1:
            raise ValueError(f"terms is {self.terms}; expected at least 1.")

    def _bind(
        self, irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps
    ) -> "BoundSum":
        return BoundSum(self.product.bind(irreps_1, irreps_2, irreps_out), self.terms)


class Scales(NamedTuple):
    """The constants of all terms."""

    first: Float[np.ndarray, "terms irreps_1"]
    weights: Float[np.ndarray, "terms num_weights"]
    result: Float[np.ndarray, "terms irreps_out"]


class BoundSum(BoundProduct):
    """See :class:`SumOfProducts`. The terms are channels of one call of the product."""

    scales: Scales
    residual: float  # relative distance from equal weights, over the couplings of the product

    def __init__(self, product: BoundProduct, terms: int):
        self._product, self._terms = product, terms
        self.irreps_1, self.irreps_2 = product.irreps_1, product.irreps_2
        self.irreps_out, self.irreps_paths = product.irreps_out, product.irreps_paths
        self.into, self.paths = product.into, product.paths
        self.exact, self.on_harmonics = product.exact, product.on_harmonics
        self.num_weights = terms * product.num_weights
        table = _table(product)
        fitted, self.residual = _fit(table, terms)
        self.scales = _normalized(table, fitted)
        if not self.exact:
            self.defect = coefficients(self).defect

    def prepare(self, y: Float[Array, "batch dim_2 channels_2"]) -> Any:
        return self._product.prepare(y if y.shape[2] == 1 else jnp.tile(y, (1, 1, self._terms)))

    def couple(
        self,
        x: Float[Array, "batch dim_1 channels"],
        prepared: Any,
        weights: Float[Array, "batch_w num_weights channels_w"],
    ) -> Float[Array, "batch dim_paths channels"]:
        terms, channels = self._scaled(x), x.shape[2]
        z = self._product.couple(terms, prepared, self._scaled_weights(weights, channels))
        return self._summed(z)

    def convolve(
        self,
        node_features: Float[Array, "nodes dim_1 channels"],
        edge_harmonics: Float[Array, "edges dim_2"],
        edge_weights: Float[Array, "edges num_weights channels"],
        graph: Graph,
    ) -> Float[Array, "nodes dim_paths channels"]:
        terms, channels = self._scaled(node_features), node_features.shape[2]
        weights = self._scaled_weights(edge_weights, channels)
        return self._summed(self._product.convolve(terms, edge_harmonics, weights, graph))

    def flops(self, batch: int, channels: int) -> int:
        terms = self._terms * channels
        dims = self.irreps_1.dim + self._product.num_weights + 2 * self.irreps_paths.dim
        return self._product.flops(batch, terms) + batch * terms * dims

    def _scaled(
        self, x: Float[Array, "batch dim_1 channels"]
    ) -> Float[Array, "batch dim_1 terms_channels"]:
        scales = np.repeat(self.scales.first, [ir.dim for _, ir in self.irreps_1], axis=1)
        terms = jnp.asarray(scales.T, x.dtype)[None, :, :, None] * x[:, :, None]
        return terms.reshape(*x.shape[:2], -1)

    def _scaled_weights(
        self, weights: Float[Array, "batch_w num_weights channels_w"], channels: int
    ) -> Float[Array, "batch_w num_weights_of_product terms_channels"]:
        shape = (len(weights), self._product.num_weights, self._terms)
        scales = jnp.asarray(self.scales.weights.T, weights.dtype)
        terms = scales[None, :, :, None] * weights.reshape(*shape, -1)
        return jnp.broadcast_to(terms, (*shape, channels)).reshape(*shape[:2], -1)

    def _summed(
        self, z: Float[Array, "batch dim_paths terms_channels"]
    ) -> Float[Array, "batch dim_paths channels"]:
        scales = self.scales.result[:, list(self.into)]
        scales = np.repeat(scales, [ir.dim for _, ir in self.irreps_paths], axis=1)
        terms = z.reshape(*z.shape[:2], self._terms, -1)
        return jnp.sum(jnp.asarray(scales.T, z.dtype)[None, :, :, None] * terms, axis=2)


class _Table(NamedTuple):
    """The couplings that a product contains, as the fit needs them."""

    values: Float[np.ndarray, "num_weights paths"]  # of Wigner 3j tensors of norm one
    there: Bool[np.ndarray, "num_weights paths"]  # not zero
    target: Float[np.ndarray, " paths"]  # the same of a Clebsch-Gordan product of weights one
    first: Int[np.ndarray, " paths"]  # index of the irrep
    result: Int[np.ndarray, " paths"]
    dims: Int[np.ndarray, " paths"]  # of the results
    num_first: int
    num_result: int


def _table(product: BoundProduct) -> _Table:
    found = coefficients(product)
    there = [p for p, path in enumerate(found.paths) if path in set(product.paths)]
    paths = [found.paths[p] for p in there]
    result = np.array([path.index_out for path in paths])
    dims = np.array([path.ir_out.dim for path in paths])
    return _Table(
        values=found.values[:, there],
        there=np.abs(found.values[:, there]) > _ZERO,
        target=np.sqrt(dims / np.bincount(result)[result]),
        first=np.array([path.index_1 for path in paths]),
        result=result,
        dims=dims,
        num_first=len(product.irreps_1),
        num_result=len(product.irreps_out),
    )


def _fit(table: _Table, terms: int) -> tuple[Scales, float]:
    """Scales whose sum is nearest the target, and the relative residual.

    Least squares from fixed starts, first not far from the start, then without that condition if
    this is exact: otherwise scales would diverge against each other. Among exact solutions the
    first whose weights reach most.
    """
    columns = table.num_first + len(table.values) + table.num_result
    # scattered between -1 and 1, the same everywhere
    starts = np.cos(np.arange(1, _STARTS * terms * columns + 1) ** 1.5).reshape(_STARTS, -1)
    highest = sum(min(terms, count) for count in np.count_nonzero(table.there, axis=1))
    best, least, most = starts[0], np.inf, 0
    for start in starts:
        found, residual = _descend(table, terms, start)
        reach = _reach(table, _split(table, terms, found)) if residual < _EXACT else 0
        if reach > most or (most == 0 and residual < least * (1 - 1e-6)):  # not by rounding
            best, least, most = found, residual, reach
        if most == highest:
            break
    return _split(table, terms, best), least


def _descend(
    table: _Table, terms: int, start: Float[np.ndarray, " all"]
) -> tuple[Float[np.ndarray, " all"], float]:
    near = scipy.optimize.least_squares(
        lambda v: np.concatenate([_misfit(table, terms, v), _RIDGE * (v - start)]),
        start,
        lambda v: np.concatenate([_slope(table, terms, v), _RIDGE * np.eye(len(v))]),
        method="lm", ftol=1e-14, xtol=1e-14, gtol=1e-14, max_nfev=500,
    ).x  # fmt: skip
    near = np.round(near, 3)  # so that rounding errors do not decide what follows
    at = near
    for _ in range(_NEWTON_STEPS):
        slope, misfit = _slope(table, terms, at), _misfit(table, terms, at)
        damped = np.concatenate([slope, np.linalg.norm(misfit) * np.eye(len(at))])  # stays near
        at = at - np.linalg.lstsq(damped, np.append(misfit, np.zeros(len(at))), rcond=None)[0]
    exact = _relative(table, terms, at)
    return (at, exact) if exact < _EXACT else (near, _relative(table, terms, near))


def _reach(table: _Table, scales: Scales) -> int:
    """The dimension of what the weights reach."""
    return int(np.linalg.matrix_rank(np.concatenate(_terms(table, scales)), tol=_REACHED))


def _terms(table: _Table, scales: Scales) -> Float[np.ndarray, "terms num_weights paths"]:
    """The couplings that each weight contributes."""
    a, _, c = _factors(table, scales)
    return (a * c)[:, None] * scales.weights[..., None] * table.values


def _relative(table: _Table, terms: int, flat: Float[np.ndarray, " all"]) -> float:
    return float(np.linalg.norm(_misfit(table, terms, flat)) / np.linalg.norm(table.target))


def _split(table: _Table, terms: int, flat: Float[np.ndarray, " all"]) -> Scales:
    ends = np.cumsum([table.num_first, len(table.values)])
    return Scales(*np.split(flat.reshape(terms, -1), ends, axis=1))


def _factors(table: _Table, scales: Scales) -> tuple[Float[np.ndarray, "terms paths"], ...]:
    return (
        scales.first[:, table.first],
        scales.weights @ table.values,
        scales.result[:, table.result],
    )


def _misfit(
    table: _Table, terms: int, flat: Float[np.ndarray, " all"]
) -> Float[np.ndarray, " paths"]:
    a, b, c = _factors(table, _split(table, terms, flat))
    return np.sum(a * b * c, axis=0) - table.target


def _slope(
    table: _Table, terms: int, flat: Float[np.ndarray, " all"]
) -> Float[np.ndarray, "paths all"]:
    a, b, c = _factors(table, _split(table, terms, flat))
    by_scale = (
        (b * c)[..., None] * np.eye(table.num_first)[table.first],
        (a * c)[..., None] * table.values.T,
        (a * b)[..., None] * np.eye(table.num_result)[table.result],
    )
    slope = np.concatenate(by_scale, axis=2)  # [terms, paths, scales of a term]
    return np.moveaxis(slope, 0, 1).reshape(len(table.target), -1)


def _normalized(table: _Table, scales: Scales) -> Scales:
    """The same with results of unit variance for independent weights."""
    squares = np.sum(_terms(table, scales) ** 2, axis=(0, 1))
    variances = np.bincount(table.result, squares / table.dims, minlength=table.num_result)
    # irreps that nothing reaches have no scale
    inverse = np.divide(1, np.sqrt(variances), out=np.zeros(table.num_result), where=variances > 0)
    return scales._replace(result=scales.result * inverse)
