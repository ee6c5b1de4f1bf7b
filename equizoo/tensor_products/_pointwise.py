"""Products that multiply values point by point: on grids, in Fourier space, over CP ranks."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import e3nn_jax as e3nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from equizoo.graph import Graph, gather_senders, sum_receivers
from equizoo.tensor_products._base import BoundPower, BoundProduct, Path


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """A linear map from the second factor to values at points, and what weighs its irreps."""

    matrix: Float[np.ndarray, "points dim_2"]
    weights: tuple[int | None, ...]  # index of the weight of each irrep; None: no contribution


class Term(NamedTuple):
    """One pointwise product, by position in the lists of maps."""

    into: int
    first: int
    second: int
    sign: int = 1


class BoundPointwise(BoundProduct):
    r"""Sum of products of values at points.

    .. math:: z = \sum_t s_t B_t \left[ (F_t x) \odot (G_t (w \cdot y)) \right]

    The maps ``F``, ``G``, ``B`` are constants; there is one weight for each irrep of ``y`` (in each
    ``Factor``). They act on nodes in ``convolve``: edges only multiply values at points.
    """

    def __init__(
        self,
        irreps_1: e3nn.Irreps,
        irreps_2: e3nn.Irreps,
        irreps_out: e3nn.Irreps,
        paths: tuple[Path, ...],
        firsts: Sequence[Float[np.ndarray, "points dim_1"]],
        seconds: Sequence[Factor],
        results: Sequence[Float[np.ndarray, "points dim_out"]],
        terms: Sequence[Term],
    ):
        self.irreps_1, self.irreps_2, self.irreps_out = irreps_1, irreps_2, irreps_out
        self.paths = paths
        self.into = tuple(sorted({path.index_out for path in paths}))
        self.irreps_paths = e3nn.Irreps([irreps_out[index] for index in self.into])
        used = {w for second in seconds for w in second.weights if w is not None}
        self.num_weights = len(used)
        # A quadrature need not be exact for irreps that nothing couples: they must not enter.
        coupled = {path.index_1 for path in paths}
        keep = [place in coupled for place in range(len(irreps_1))]
        self._firsts = tuple(first * _columns(irreps_1, keep) for first in firsts)
        self._seconds = tuple(
            Factor(f.matrix * _columns(irreps_2, [w is not None for w in f.weights]), f.weights)
            for f in seconds
        )
        self._terms = tuple(terms)
        self._results = self._normalized(results)

    def _normalized(
        self, results: Sequence[Float[np.ndarray, "points dim_out"]]
    ) -> tuple[Float[np.ndarray, "points dim_paths"], ...]:
        """The maps from points to the reached irreps, scaled for results of unit variance."""
        variance = self._variances(results)
        slices = self.irreps_out.slices()
        columns = np.concatenate([np.arange(self.irreps_out.dim)[slices[i]] for i in self.into])
        scale = np.concatenate(
            [
                np.full(slices[i].stop - slices[i].start, variance[slices[i]].mean())
                for i in self.into
            ]
        )
        return tuple(result[:, columns] / np.sqrt(scale) for result in results)

    def _variances(
        self, results: Sequence[Float[np.ndarray, "points dim_out"]]
    ) -> Float[np.ndarray, " dim_out"]:
        total = np.zeros(self.irreps_out.dim)
        for a in self._terms:
            for b in self._terms:
                if (second := self._shared(a.second, b.second)) is not None:
                    first = self._firsts[a.first] @ self._firsts[b.first].T
                    kernel = a.sign * b.sign * first * second
                    total += np.einsum(
                        "nk,nk->k", results[a.into], kernel @ results[b.into], optimize=True
                    )
        return total

    def _shared(self, a: int, b: int) -> Float[np.ndarray, "points points"] | None:
        """Covariance of two weighted second factors; ``None`` when they share no weight."""
        left, right = self._seconds[a], self._seconds[b]
        slices = self.irreps_2.slices()
        same = [
            place
            for place, i, j in zip(slices, left.weights, right.weights, strict=True)
            if i is not None and i == j
        ]
        if not same:
            return None
        return sum(left.matrix[:, place] @ right.matrix[:, place].T for place in same)

    def prepare(
        self, y: Float[Array, "batch dim_2 channels_2"]
    ) -> Float[Array, "batch dim_2 channels_2"] | tuple[Float[Array, "batch _ _"], ...]:
        """For one channel the values of each irrep of ``y`` at the points; else ``y``."""
        if y.shape[2] > 1:
            return y
        prepared = []
        for second in self._seconds:
            values = [
                jnp.matmul(
                    y[:, place, 0],
                    jnp.asarray(second.matrix[:, place].T, y.dtype),
                    precision="highest",
                )
                for place, weight in zip(self.irreps_2.slices(), second.weights, strict=True)
                if weight is not None
            ]
            prepared.append(jnp.stack(values, axis=2))
        return tuple(prepared)

    def couple(
        self,
        x: Float[Array, "batch dim_1 channels"],
        prepared: Float[Array, "batch dim_2 channels_2"] | tuple[Float[Array, "batch _ _"], ...],
        weights: Float[Array, "batch_w num_weights channels_w"],
    ) -> Float[Array, "batch dim_paths channels"]:
        products = self._multiply(self._first_values(x), prepared, weights)
        return self._project(products)

    def _first_values(
        self, x: Float[Array, "batch dim_1 channels"]
    ) -> list[Float[Array, "batch points channels"]]:
        return [_apply(matrix, x) for matrix in self._firsts]

    def _second_values(self, prepared, weights) -> list[Float[Array, "batch points channels_2"]]:
        if isinstance(prepared, tuple):
            return [
                sum(
                    values[:, :, i, None] * weights[:, None, w]
                    for i, w in enumerate(w for w in second.weights if w is not None)
                )
                for second, values in zip(self._seconds, prepared, strict=True)
            ]
        dims = [ir.dim for _, ir in self.irreps_2]
        results = []
        for second in self._seconds:
            index = np.repeat([0 if w is None else w for w in second.weights], dims)
            results.append(_apply(second.matrix, weights[:, index] * prepared))
        return results

    def _multiply(self, first, prepared, weights) -> list[Float[Array, "batch points channels"]]:
        second = self._second_values(prepared, weights)
        products = []
        for index in range(len(self._results)):
            mine = [t for t in self._terms if t.into == index]
            products.append(sum(t.sign * (first[t.first] * second[t.second]) for t in mine))
        return products

    def _project(self, products) -> Float[Array, "batch dim_paths channels"]:
        pairs = zip(self._results, products, strict=True)
        return functools.reduce(jnp.add, (_apply(matrix.T, values) for matrix, values in pairs))

    def convolve(
        self,
        node_features: Float[Array, "nodes dim_1 channels"],
        edge_harmonics: Float[Array, "edges dim_2"],
        edge_weights: Float[Array, "edges num_weights channels"],
        graph: Graph,
    ) -> Float[Array, "nodes dim_paths channels"]:
        at_nodes = self._first_values(node_features)
        at_edges = [gather_senders(values, graph) for values in at_nodes]
        products = self._multiply(at_edges, self.prepare(edge_harmonics[..., None]), edge_weights)
        return self._project([sum_receivers(values, graph) for values in products])

    def flops(self, batch: int, channels: int) -> int:
        per_channel = sum(2 * matrix.size for matrix in (*self._firsts, *self._results))
        per_channel += sum(2 * f.matrix.size + f.matrix.shape[1] for f in self._seconds)
        per_channel += sum(2 * len(self._firsts[term.first]) for term in self._terms)
        return batch * channels * per_channel


class BoundPointwisePower(BoundPower):
    r"""Powers of the values at points, one weight for each order and irrep of the result.

    .. math:: z_l = B_l \sum_\nu w_{l \nu} s_{l \nu} (F x)^\nu
    """

    def __init__(
        self,
        irreps_in: e3nn.Irreps,
        irreps_out: e3nn.Irreps,
        order: int,
        values: Float[np.ndarray, "points dim_in"],
        result: Float[np.ndarray, "points dim_out"],
    ):
        self.irreps_in, self.irreps_out, self.order = irreps_in, irreps_out, order
        self.weight_slices, self._scales = {}, {}
        self._values, self._results = values, [result[:, place] for place in irreps_out.slices()]
        start = 0
        for index, projection in enumerate(self._results):
            for nu in range(1, order + 1):
                kernel = gaussian_moments(values @ values.T, nu)
                variance = np.mean(np.einsum("nk,nk->k", projection, kernel @ projection))
                count = int(variance > 1e-10)
                self.weight_slices[index, nu] = slice(start, start + count)
                self._scales[index, nu] = float(1 / np.sqrt(variance)) if count else 0.0
                start += count
        self.num_weights = start
        if start == 0:
            raise ValueError(
                f"No polynomial of '{irreps_in}' up to order {order} is '{irreps_out}'."
            )

    def __call__(
        self,
        x: Float[Array, "blocks nodes dim_in channels"],
        weights: Float[Array, "blocks num_weights channels"],
    ) -> Float[Array, "blocks nodes dim_out channels"]:
        blocks, nodes, dim_in, channels = x.shape
        values = _apply(self._values, x.reshape(blocks * nodes, dim_in, channels))
        values = values.reshape(blocks, nodes, -1, channels)
        results = []
        for index, projection in enumerate(self._results):
            polynomial = jnp.zeros_like(values)
            for nu in range(self.order, 0, -1):
                mine = weights[:, self.weight_slices[index, nu]]
                if mine.shape[1]:
                    polynomial += self._scales[index, nu] * mine[:, None]
                polynomial *= values
            flat = polynomial.reshape(blocks * nodes, -1, channels)
            results.append(_apply(projection.T, flat).reshape(blocks, nodes, -1, channels))
        return jnp.concatenate(results, axis=2)


def _apply(
    matrix: Float[np.ndarray, "rows columns"], x: Float[Array, "batch columns channels"]
) -> Float[Array, "batch rows channels"]:
    """A constant matrix on the middle axis."""
    return jnp.einsum("rk,bkc->brc", jnp.asarray(matrix, x.dtype), x, precision="highest")


def _columns(irreps: e3nn.Irreps, keep: Sequence[bool]) -> Float[np.ndarray, " dim"]:
    """One for the components of irreps that are kept, zero for the others."""
    return np.repeat(np.array(keep, dtype=np.float64), [ir.dim for _, ir in irreps])


def gaussian_moments(
    covariance: Float[np.ndarray, "points points"], nu: int
) -> Float[np.ndarray, "points points"]:
    """``E[f^nu g^nu]`` of normal variables ``f``, ``g`` (Isserlis), for all pairs of points."""
    variance = np.diag(covariance)
    total = np.zeros_like(covariance)
    for pairs in range(nu // 2 + 1):
        shared = nu - 2 * pairs
        ways = math.factorial(nu) // (math.factorial(pairs) * 2**pairs)
        own = variance**pairs
        total += ways**2 / math.factorial(shared) * covariance**shared * own[:, None] * own
    return total
