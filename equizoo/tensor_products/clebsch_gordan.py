"""Clebsch-Gordan product as models use it: the harmonics become matrices before features enter."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from equizoo.graph import Graph, gather_senders
from equizoo.tensor_products._base import (
    BoundPower,
    BoundProduct,
    Path,
    TensorProduct,
    allowed_paths,
    coupling,
)
from equizoo.tensor_products._matrices import apply_matrices
from equizoo.tensor_products._symmetric import monomials, symmetric_basis

# More non-zero couplings than this are not unrolled: compile time grows with them. With one channel
# in the second factor small matrices are faster but for the fewest couplings (l_max 1).
_UNROLLED, _UNROLLED_FOR_EDGES = 2500, 20


@dataclasses.dataclass(frozen=True)
class ClebschGordan(TensorProduct):
    """All couplings of angular momentum; equal to ``ClebschGordanDense``, ordered for speed.

    - With one channel in the second factor, ``prepare`` contracts the couplings with it: small
      matrices for each batch entry that all channels, and layers with the same ``y``, share.
    - With channels in both factors the non-zero couplings are unrolled while tracing.
    - ``convolve`` on rows is one matrix product for each node and path: couplings and harmonics of
      all neighbours make a matrix ``[dim_out, neighbours * dim_1]``, weighted features the other.
      Products of edges are never in memory.
    - The many-body product runs over a basis without redundancy, weights folded in per block.
    """

    def _bind(
        self, irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps
    ) -> "BoundClebschGordan":
        return BoundClebschGordan(irreps_1, irreps_2, irreps_out)

    def _bind_power(
        self, irreps_in: e3nn.Irreps, irreps_out: e3nn.Irreps, order: int
    ) -> "SymmetricPower":
        return SymmetricPower(irreps_in, irreps_out, order)


class Matrices(NamedTuple):
    """The second factor contracted with the couplings."""

    matrices: Float[Array, "batch dim_paths dim_1"]


class BoundClebschGordan(BoundProduct):
    """See :class:`ClebschGordan`."""

    def __init__(
        self, irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps,
        paths: tuple[Path, ...] | None = None,
    ):  # fmt: skip
        self.irreps_1, self.irreps_2, self.irreps_out = irreps_1, irreps_2, irreps_out
        self.paths = paths or allowed_paths(irreps_1, irreps_2, irreps_out)
        self.irreps_paths = e3nn.Irreps([(1, path.ir_out) for path in self.paths])
        self.into = tuple(path.index_out for path in self.paths)
        self.num_weights = len(self.paths)
        self._couplings = np.zeros((self.irreps_paths.dim, irreps_1.dim, irreps_2.dim))
        slices_1, slices_2 = irreps_1.slices(), irreps_2.slices()
        for path, place in zip(self.paths, self.irreps_paths.slices(), strict=True):
            block = np.transpose(coupling(path), (2, 0, 1))
            self._couplings[place, slices_1[path.index_1], slices_2[path.index_2]] = block
        couplings = np.count_nonzero(self._couplings)
        self._few, self._very_few = couplings <= _UNROLLED, couplings <= _UNROLLED_FOR_EDGES

    def _select(self, keep: tuple[int, ...]) -> "BoundClebschGordan":
        paths = tuple(self.paths[index] for index in keep)
        return BoundClebschGordan(self.irreps_1, self.irreps_2, self.irreps_out, paths)

    def prepare(
        self, y: Float[Array, "batch dim_2 channels_2"]
    ) -> Float[Array, "batch dim_2 channels_2"] | Matrices:
        """A matrix for each batch entry if there is one channel and not the fewest couplings."""
        if y.shape[2] > 1 or self._very_few:
            return y
        constants = self._couplings.reshape(-1, self.irreps_2.dim)
        matrices = jnp.matmul(y[..., 0], jnp.asarray(constants.T, y.dtype), precision="highest")
        return Matrices(matrices.reshape(-1, self.irreps_paths.dim, self.irreps_1.dim))

    def couple(
        self,
        x: Float[Array, "batch dim_1 channels"],
        prepared: Float[Array, "batch dim_2 channels_2"] | Matrices,
        weights: Float[Array, "batch_w num_weights channels_w"],
    ) -> Float[Array, "batch dim_paths channels"]:
        if isinstance(prepared, Matrices):
            matrices = prepared.matrices
            if weights.shape[2] == 1:
                return apply_matrices(self._spread(weights) * matrices, x)
            products = apply_matrices(matrices, x)
            pieces = _split(products, self.irreps_paths)
        elif self._few:
            pieces = [jnp.concatenate(parts, axis=1) for parts in self._components(x, prepared)]
        else:
            pieces = self._by_pairs(x, prepared)
        separate = jax.lax.split(weights, [1] * self.num_weights, axis=1)
        weighted = [weight * piece for weight, piece in zip(separate, pieces, strict=True)]
        return jnp.concatenate(weighted, axis=1)

    def __call__(
        self,
        x: Float[Array, "batch dim_1 channels"],
        y: Float[Array, "batch dim_2 channels_2"],
        weights: Float[Array, "batch_w num_weights channels_w"],
    ) -> Float[Array, "batch dim_out channels"]:
        if self._very_few or (self._few and y.shape[2] > 1):
            return self._summed_components(x, y, weights)
        prepared = self.prepare(y)
        if weights.shape[2] > 1 or not isinstance(prepared, Matrices):
            return self._sum_paths(self.couple(x, prepared, weights))
        # weights that channels share sum the paths of the small matrices instead of the results
        matrices = self._sum_paths(self._spread(weights) * prepared.matrices)
        return apply_matrices(matrices, x)

    def _spread(
        self, weights: Float[Array, "batch_w num_weights 1"]
    ) -> Float[Array, "batch_w dim_paths 1"]:
        dims = [path.ir_out.dim for path in self.paths]
        return jnp.repeat(weights, np.array(dims), axis=1, total_repeat_length=sum(dims))

    def _components(self, x, y) -> Iterator[list[Float[Array, "batch 1 channels"]]]:
        """For each path the components of its product, over non-zero couplings alone."""
        # split, not indexing: its transpose is one concatenation
        xs = jax.lax.split(x, [1] * x.shape[1], axis=1)
        ys = jax.lax.split(y, [1] * y.shape[1], axis=1)
        for place in self.irreps_paths.slices():
            yield [
                sum(float(row[i, j]) * (xs[i] * ys[j]) for i, j in np.argwhere(row))
                for row in self._couplings[place]
            ]

    def _summed_components(self, x, y, weights) -> Float[Array, "batch dim_out channels"]:
        """The call without the products of each path in memory."""
        totals = [jnp.zeros((x.shape[0], 1, x.shape[2]), x.dtype)] * self.irreps_out.dim
        starts = [place.start for place in self.irreps_out.slices()]
        separate = jax.lax.split(weights, [1] * self.num_weights, axis=1)
        for result, weight, components in zip(
            self.into, separate, self._components(x, y), strict=True
        ):
            weight = weight / float(np.sqrt(self.into.count(result)))
            for m, component in enumerate(components, starts[result]):
                totals[m] = totals[m] + weight * component
        return jnp.concatenate(totals, axis=1)

    def _by_pairs(self, x, y) -> list[Float[Array, "batch dim channels"]]:
        xs, ys = _split(x, self.irreps_1), _split(y, self.irreps_2)
        products: dict[Path, Float[Array, "batch dim channels"]] = {}
        for pair in sorted({(path.index_1, path.index_2) for path in self.paths}):
            mine = [path for path in self.paths if (path.index_1, path.index_2) == pair]
            outer = xs[pair[0]][:, :, None] * ys[pair[1]][:, None]
            constants = np.concatenate([coupling(path) for path in mine], axis=2)
            together = jnp.einsum(
                "bijc,ijk->bkc", outer, jnp.asarray(constants, x.dtype), precision="highest"
            )
            ends = np.cumsum([path.ir_out.dim for path in mine])[:-1].tolist()
            products.update(zip(mine, jnp.split(together, ends, axis=1), strict=True))
        return [products[path] for path in self.paths]

    def flops(self, batch: int, channels: int) -> int:
        per_channel = sum(3 * np.count_nonzero(coupling(p)) + p.ir_out.dim for p in self.paths)
        return int(batch * channels * per_channel)

    def convolve(
        self,
        node_features: Float[Array, "nodes dim_1 channels"],
        edge_harmonics: Float[Array, "edges dim_2"],
        edge_weights: Float[Array, "edges num_weights channels"],
        graph: Graph,
    ) -> Float[Array, "nodes dim_paths channels"]:
        if graph.slots is None:
            return super().convolve(node_features, edge_harmonics, edge_weights, graph)
        rows = (graph.num_nodes, graph.slots)
        senders = gather_senders(node_features, graph)
        real_harmonics = jnp.where(graph.edge_mask[:, None], edge_harmonics, 0)
        features = _split(senders.reshape(*rows, *senders.shape[1:]), self.irreps_1, axis=2)
        harmonics = _split(real_harmonics.reshape(*rows, -1), self.irreps_2, axis=2)
        weights = jax.lax.split(
            edge_weights.reshape(*rows, *edge_weights.shape[1:]), [1] * self.num_weights, axis=2
        )
        results = []
        for path, weight in zip(self.paths, weights, strict=True):
            constants = jnp.asarray(np.transpose(coupling(path), (2, 0, 1)), senders.dtype)
            matrices = jnp.einsum(
                "dij,nkj->ndki", constants, harmonics[path.index_2], precision="highest"
            )
            weighted = weight * features[path.index_1]
            results.append(
                jnp.einsum(
                    "ndq,nqc->ndc",
                    matrices.reshape(rows[0], path.ir_out.dim, -1),
                    weighted.reshape(rows[0], -1, weighted.shape[3]),
                    precision="highest",
                )
            )
        return jnp.concatenate(results, axis=1)


def _applied(matrices: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Matrix products in the full precision of their arguments, whatever the device's default.

    Of constants; where each item has a matrix of its own, ``apply_matrices``.
    """
    return jnp.matmul(matrices, x, precision="highest")


def _split(values: Float[Array, "..."], irreps: e3nn.Irreps, axis: int = 1) -> Sequence[Array]:
    """Not by indexing: the transpose of a split is one concatenation."""
    return jax.lax.split(values, [ir.dim for _, ir in irreps], axis=axis)


class SymmetricPower(BoundPower):
    r"""All equivariant polynomials up to order four, over a basis without redundancy.

    .. math:: z_{l m} = \sum_{\nu=1}^{N} \sum_k w^{(\nu)}_{l k} B^{(\nu)}_{l k m}(x)

    The weights are contracted with the coefficients first, once per block. Every monomial up to
    order three is a feature of even parity (one, a component, a product of two) times a factor: an
    odd component for an odd result; one, or an even component, for an even one. So all irreps are
    one product of a matrix ``[dim_out * factors, features]`` with the features and one sum over
    factors. A quartic monomial is an even pair times a pair of the result's parity, treated
    likewise. Pairs are whole outer products, and sums over factors products with constant 0/1
    matrices: under XLA on CPU these and their derivatives are faster than slicing and broadcasting.

    Reference: Batatia et al. 2022, https://arxiv.org/abs/2206.07697, eq. 10 (the redundant form).
    """

    def __init__(self, irreps_in: e3nn.Irreps, irreps_out: e3nn.Irreps, order: int):
        if order > 4:
            raise ValueError(f"order is {order}; the symmetric power is built for orders 1 to 4.")
        self.irreps_in, self.irreps_out, self.order = irreps_in, irreps_out, order
        self.weight_slices = {}
        start = 0
        for index, (_, ir) in enumerate(irreps_out):
            for nu in range(1, order + 1):
                count = len(symmetric_basis(irreps_in, ir, nu))
                self.weight_slices[index, nu] = slice(start, start + count)
                start += count
        self.num_weights = start
        if start == 0:
            raise ValueError(
                f"No polynomial of '{irreps_in}' up to order {order} is '{irreps_out}'."
            )
        parities = np.repeat([ir.p for _, ir in irreps_in], [ir.dim for _, ir in irreps_in])
        even, odd = (np.flatnonzero(parities == p).tolist() for p in (1, -1))
        singles: list[Monomial] = [(), *((i,) for i in even)]
        self._factors: dict[int, list[Monomial]] = {1: singles, -1: [(i,) for i in odd]}
        outer = [(i, j) for part in (even, odd) for i in part for j in part] if order > 1 else []
        # of a pair that is there twice, the first
        self._features: dict[Monomial, int] = {}
        for place, monomial in enumerate([*singles, *outer]):
            self._features.setdefault(_sorted(monomial), place)
        self._num_features = len(singles) + len(outer)
        self._coefficients = [self._arrange(index) for index in range(len(irreps_out))]
        if order == 4:
            pairs = monomials(irreps_in.dim, 2)
            pair_parities = parities[pairs].prod(axis=1)
            self._pairs = {p: pairs[pair_parities == p] for p in (1, -1)}
            self._quartic = [self._arrange_quartic(index) for index in range(len(irreps_out))]

    def _arrange(self, index: int) -> Float[np.ndarray, "weights rows features"]:
        """Coefficients of the orders to three of an irrep, by factor and feature."""
        ir = self.irreps_out[index].ir
        factors, parts = self._factors[ir.p], []
        for nu in range(1, min(self.order, 3) + 1):
            basis = symmetric_basis(self.irreps_in, ir, nu)
            arranged = np.zeros((len(basis), ir.dim, len(factors), self._num_features))
            for c, monomial in enumerate(monomials(self.irreps_in.dim, nu)):
                if basis[:, :, c].any():
                    factor, feature = self._divided(monomial.tolist(), factors)
                    arranged[:, :, factor, feature] = basis[:, :, c]
            parts.append(arranged.reshape(len(basis), ir.dim * len(factors), self._num_features))
        return np.concatenate(parts)

    def _divided(self, monomial: list[int], factors: Sequence["Monomial"]) -> tuple[int, int]:
        """The first factor of the monomial that leaves a feature, and that feature's place."""
        for place, factor in enumerate(factors):
            rest = list(monomial)
            for component in factor:
                if component in rest:
                    rest.remove(component)
            if len(rest) == len(monomial) - len(factor) and tuple(rest) in self._features:
                return place, self._features[tuple(rest)]
        raise AssertionError(f"{monomial} is not a factor times a feature.")

    def _arrange_quartic(self, index: int) -> Float[np.ndarray, "weights rows pairs"]:
        """Coefficients of order four, by even pair and pair of the irrep's parity."""
        ir = self.irreps_out[index].ir
        basis = symmetric_basis(self.irreps_in, ir, 4)
        place = {tuple(monomial): c for c, monomial in enumerate(monomials(self.irreps_in.dim, 4))}
        factors, pairs = self._pairs[1].tolist(), self._pairs[ir.p].tolist()
        arranged = np.zeros((len(basis), ir.dim, len(factors), len(pairs)))
        for f, factor in enumerate(factors):
            for c, pair in enumerate(pairs):
                # a monomial that can be split in several ways is put in the first place only
                column = place.pop(_sorted((*factor, *pair)), None)
                if column is not None:
                    arranged[:, :, f, c] = basis[:, :, column]
        return arranged.reshape(len(basis), ir.dim * len(factors), len(pairs))

    def __call__(
        self,
        x: Float[Array, "blocks nodes dim_in channels"],
        weights: Float[Array, "blocks num_weights channels"],
    ) -> Float[Array, "blocks nodes dim_out channels"]:
        blocks, nodes, dim_in, channels = x.shape
        x = jnp.transpose(x, (0, 3, 2, 1)).reshape(blocks * channels, dim_in, nodes)
        weights = jnp.transpose(weights, (0, 2, 1)).reshape(blocks * channels, -1)
        one = jnp.ones((len(x), 1, nodes), x.dtype)
        pieces = list(zip(_split(x, self.irreps_in), self.irreps_in, strict=True))
        empty = [x[:, :0]]  # where all irreps have the same parity
        even, odd = (
            jnp.concatenate([piece for piece, (_, ir) in pieces if ir.p == p] or empty, axis=1)
            for p in (1, -1)
        )
        factors = {1: jnp.concatenate([one, even], axis=1), -1: odd}
        pairs = [_outer(even), _outer(odd)] if self.order > 1 else []
        features = jnp.concatenate([factors[1], *pairs], axis=1)
        matrices = [
            self._folded(index, 1, min(self.order, 3), coefficients, weights)
            for index, coefficients in enumerate(self._coefficients)
        ]
        products = jax.lax.split(
            apply_matrices(jnp.concatenate(matrices, axis=1), features),
            [matrix.shape[1] for matrix in matrices],
            axis=1,
        )
        results = [
            _sum_factors(product, factors[ir.p], ir.dim)
            for product, (_, ir) in zip(products, self.irreps_out, strict=True)
        ]
        if self.order == 4:
            results = [r + q for r, q in zip(results, self._quartics(x, weights), strict=True)]
        result = jnp.concatenate(results, axis=1).reshape(blocks, channels, -1, nodes)
        return jnp.transpose(result, (0, 3, 2, 1))

    def _folded(
        self,
        index: int,
        first: int,
        last: int,
        coefficients: Float[np.ndarray, "weights rows features"],
        weights: Float[Array, "batch num_weights"],
    ) -> Float[Array, "batch rows features"]:
        """The weights of orders ``first`` to ``last`` of an irrep times their coefficients."""
        mine = slice(self.weight_slices[index, first].start, self.weight_slices[index, last].stop)
        number, rows, features = coefficients.shape
        flat = jnp.asarray(coefficients.reshape(number, rows * features), weights.dtype)
        return _applied(weights[:, mine], flat).reshape(len(weights), rows, features)

    def _quartics(
        self, x: Float[Array, "batch dim nodes"], weights: Float[Array, "batch num_weights"]
    ) -> list[Float[Array, "batch _ nodes"]]:
        pairs = {
            p: _pick(pairs[:, 0], x) * _pick(pairs[:, 1], x) for p, pairs in self._pairs.items()
        }
        return [
            _sum_factors(
                apply_matrices(
                    self._folded(index, 4, 4, self._quartic[index], weights), pairs[ir.p]
                ),
                pairs[1],
                ir.dim,
            )
            for index, (_, ir) in enumerate(self.irreps_out)
        ]


Monomial = tuple[int, ...]  # indices of components, ascending


def _sorted(components: Iterable[int]) -> Monomial:
    return tuple(sorted(components))


def _outer(x: Float[Array, "batch dim nodes"]) -> Float[Array, "batch pairs nodes"]:
    """All products of two components."""
    batch, dim, nodes = x.shape
    return (x[:, :, None] * x[:, None]).reshape(batch, dim * dim, nodes)


def _sum_factors(
    products: Float[Array, "batch rows nodes"],
    factors: Float[Array, "batch factors nodes"],
    dim: int,
) -> Float[Array, "batch dim nodes"]:
    """The sum over factors of rows ``[dim, factors]`` times their factor."""
    batch, number, nodes = factors.shape
    terms = products.reshape(batch, dim, number, nodes) * factors[:, None]
    summed = _constant(np.repeat(np.eye(dim), number, axis=1), products)
    return _applied(summed, terms.reshape(products.shape))


def _pick(
    index: Int[np.ndarray, " features"], x: Float[Array, "batch dim nodes"]
) -> Float[Array, "batch features nodes"]:
    """``x[:, index]`` as a matrix product."""
    return _applied(_constant(np.eye(x.shape[1])[index], x), x)


def _constant(
    matrix: Float[np.ndarray, "rows columns"], like: Float[Array, "batch dim nodes"]
) -> Float[Array, "batch rows columns"]:
    return jnp.broadcast_to(jnp.asarray(matrix, like.dtype), (like.shape[0], *matrix.shape))
