"""Clebsch-Gordan product whose weights, couplings by channels, are a matrix of low rank."""

import dataclasses
from typing import Any, NamedTuple

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from equizoo.graph import Graph, gather_senders, sum_receivers
from equizoo.registry import TENSOR_PRODUCTS
from equizoo.tensor_products._base import BoundProduct, TensorProduct, coupling
from equizoo.tensor_products._matrices import apply_matrices

# Matrices with no more elements are not worth a library's call each (twice as fast up to l_max 1).
_SUMMED = 20
# Matrices with so many times the elements of the couplings are still faster than these, forces of
# TDN included: 2.7 times took 0.5 to 0.8 of the time, 3.2 times 1.4 of it (l_max 1 and 2, CPU).
_WORTH = 3


@dataclasses.dataclass(frozen=True)
class LowRankWeights(TensorProduct):
    r"""All couplings of angular momentum, with weights that couplings share.

    .. math:: W_{p c} = K^{-1/2} \sum_{k=1}^{K} a_{k p} b_{k c}, \qquad
        z_c = \sum_k b_{k c} \, T_k x_c, \quad
        T_k = K^{-1/2} \sum_p \frac{a_{k p}}{\sqrt{N_p}} C_p \, y

    for ``N_p`` couplings into an irrep of the result. The weights of a call are ``b``. All channels
    share the matrices ``T``; for low ranks a product is a multiplication by each. The mixing ``a``
    is constant, or an argument of ``prepare`` and ``convolve`` that depends on the data. Exactly
    equivariant for every rank. Rank one has one weight for all couplings, as TDN does; with
    ``rank`` at the number of couplings (or ``None``) the family is that of Clebsch-Gordan products.
    Higher ranks are cut down to that number.

    Reference: Lin et al. 2025 (TDN), https://arxiv.org/abs/2507.01131, for the shared weights.
    """

    rank: int | None = 1

    def __post_init__(self):
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank is {self.rank}; expected at least 1, or None for full rank.")

    def _bind(
        self, irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps
    ) -> "BoundLowRank":
        whole = TENSOR_PRODUCTS["clebsch_gordan"]().bind(irreps_1, irreps_2, irreps_out)
        return BoundLowRank(whole, self.rank)


class Separate(NamedTuple):
    """A second factor prepared for the product with a weight for each coupling."""

    prepared: Any
    mixing: Float[Array, "batch num_weights paths"] | None  # None: the constant one


class BoundLowRank(BoundProduct):
    """See :class:`LowRankWeights`; a mixing has one column for each of ``paths``.

    Where the matrices ``T`` would be several times as large as the couplings are (high ranks), or
    the second factor has several channels, the weights are written out and the product is a
    ``ClebschGordan``.
    """

    def __init__(self, whole: BoundProduct, rank: int | None):
        self._whole = whole
        self.irreps_1, self.irreps_2 = whole.irreps_1, whole.irreps_2
        self.irreps_out, self.paths = whole.irreps_out, whole.paths
        self.into = tuple(sorted({path.index_out for path in self.paths}))
        self.irreps_paths = e3nn.Irreps([self.irreps_out[index] for index in self.into])
        self.num_weights = min(rank or len(self.paths), len(self.paths))
        self.mixing = self._constant_mixing()
        self._basis = self._couplings()
        separate = sum(path.ir_out.dim * path.ir_1.dim for path in self.paths)
        together = self.num_weights * self.irreps_paths.dim * self.irreps_1.dim
        self._shares = together <= _WORTH * separate

    def _constant_mixing(self) -> Float[np.ndarray, "num_weights paths"]:
        """Cosines of growing frequency, orthonormal rows but for the scale of each irrep."""
        num, index = len(self.paths), np.arange(len(self.paths))
        rows = np.cos(np.pi / num * np.outer(np.arange(self.num_weights), index + 0.5))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        into = np.array([path.index_out for path in self.paths])
        for result in self.into:
            mine = rows[:, into == result]
            rows[:, into == result] *= np.sqrt(mine.shape[1] / np.sum(mine**2))
        return np.sqrt(self.num_weights) * rows

    def _couplings(self) -> Float[np.ndarray, "paths dim_2 dim_paths dim_1"]:
        """The matrices into which each coupling turns the second factor, scales included."""
        into = [path.index_out for path in self.paths]
        dims = (self.irreps_2.dim, self.irreps_paths.dim, self.irreps_1.dim)
        basis = np.zeros((len(self.paths), *dims))
        results = dict(zip(self.into, self.irreps_paths.slices(), strict=True))
        for p, path in enumerate(self.paths):
            place_1 = self.irreps_1.slices()[path.index_1]
            place_2 = self.irreps_2.slices()[path.index_2]
            block = np.transpose(coupling(path), (1, 2, 0))
            scale = np.sqrt(self.num_weights * into.count(path.index_out))
            basis[p, place_2, results[path.index_out], place_1] = block / scale
        return basis

    def prepare(
        self,
        y: Float[Array, "batch dim_2 channels_2"],
        mixing: Float[Array, "batch num_weights paths"] | None = None,
    ) -> Float[Array, "batch num_weights dim_paths dim_1"] | Separate:
        """For one channel the matrices ``T``, if they are small; a constant mixing by default.

        Unit variance out asks for a mixing of unit variance.
        """
        if y.shape[2] > 1 or not self._shares:
            return Separate(self._whole.prepare(y), mixing)
        if mixing is None:
            constants = np.tensordot(self.mixing, self._basis, axes=1)
            flat = np.moveaxis(constants, 1, 0).reshape(self.irreps_2.dim, -1)
            matrices = jnp.matmul(y[:, :, 0], jnp.asarray(flat, y.dtype), precision="highest")
        else:
            matrices = self._mixed(y[:, :, 0], mixing)
        rows, columns = self.irreps_paths.dim, self.irreps_1.dim
        return matrices.reshape(len(y), self.num_weights, rows, columns)

    def _mixed(
        self, y: Float[Array, "batch dim_2"], mixing: Float[Array, "batch num_weights paths"]
    ) -> Float[Array, "batch num_weights dim_paths dim_1"]:
        """Block by block, an irrep of the result by one of the first factor."""
        rows = []
        for result, place in zip(self.into, self.irreps_paths.slices(), strict=True):
            blocks = []
            for index_1, place_1 in enumerate(self.irreps_1.slices()):
                ends = [(path.index_1, path.index_out) == (index_1, result) for path in self.paths]
                mine = np.flatnonzero(ends)
                constants = jnp.asarray(self._basis[mine, :, place, place_1], y.dtype)
                each = jnp.einsum("bj,pjoi->bpoi", y, constants, precision="highest")
                mixed = mixing[:, :, mine]
                blocks.append(jnp.einsum("bkp,bpoi->bkoi", mixed, each, precision="highest"))
            rows.append(jnp.concatenate(blocks, axis=3))
        return jnp.concatenate(rows, axis=2)

    def couple(
        self,
        x: Float[Array, "batch dim_1 channels"],
        prepared: Float[Array, "batch num_weights dim_paths dim_1"] | Separate,
        weights: Float[Array, "batch_w num_weights channels_w"],
    ) -> Float[Array, "batch dim_paths channels"]:
        if isinstance(prepared, Separate):
            written_out = self._written_out(weights, prepared.mixing)
            return self._summed(self._whole.couple(x, prepared.prepared, written_out))
        if weights.shape[2] == 1:  # on the matrices, which are smaller than their products with x
            matrices = jnp.sum(weights[:, :, None] * prepared, axis=1)
            if matrices.shape[1] * matrices.shape[2] <= _SUMMED:
                return jnp.sum(matrices[..., None] * x[:, None], axis=2)
            return apply_matrices(matrices, x)
        batch, rank, rows, columns = prepared.shape
        stacked = prepared.reshape(batch, rank * rows, columns)
        products = apply_matrices(stacked, x)
        products = products.reshape(batch, rank, rows, x.shape[2])
        return jnp.sum(weights[:, :, None] * products, axis=1)

    def _written_out(
        self,
        weights: Float[Array, "batch_w num_weights channels_w"],
        mixing: Float[Array, "batch num_weights paths"] | None,
    ) -> Float[Array, "batch_or_1 paths channels_w"]:
        if mixing is None:
            mixing = jnp.asarray(self.mixing, weights.dtype)[None]
        mixed = jnp.matmul(jnp.swapaxes(mixing, 1, 2), weights, precision="highest")
        return mixed / float(np.sqrt(self.num_weights))

    def _summed(
        self, z: Float[Array, "batch dim_all_paths channels"]
    ) -> Float[Array, "batch dim_paths channels"]:
        dims = [ir.dim for _, ir in self.irreps_out]
        pieces = jax.lax.split(self._whole._sum_paths(z), dims, axis=1)
        return jnp.concatenate([pieces[index] for index in self.into], axis=1)

    def convolve(
        self,
        node_features: Float[Array, "nodes dim_1 channels"],
        edge_harmonics: Float[Array, "edges dim_2"],
        edge_weights: Float[Array, "edges num_weights channels"],
        graph: Graph,
        mixing: Float[Array, "edges num_weights paths"] | None = None,
    ) -> Float[Array, "nodes dim_paths channels"]:
        """Rows of neighbours are summed before the coupling, unless a mixing of theirs is given."""
        if not self._shares:
            written_out = self._written_out(edge_weights, mixing)
            convolved = self._whole.convolve(node_features, edge_harmonics, written_out, graph)
            return self._summed(convolved)
        senders = gather_senders(node_features, graph)
        if graph.slots is None or mixing is not None:
            prepared = self.prepare(edge_harmonics[..., None], mixing)
            return sum_receivers(self.couple(senders, prepared, edge_weights), graph)
        rows = (graph.num_nodes, graph.slots)
        harmonics = jnp.where(graph.edge_mask[:, None], edge_harmonics, 0)
        harmonics = harmonics.reshape(*rows, -1)
        weighted = edge_weights[:, :, None] * senders[:, None]  # [edges, weights, dim_1, channels]
        weighted = weighted.reshape(*rows, -1, node_features.shape[2])
        summed = jnp.einsum(  # q = (weight, dim_1)
            "nsj,nsqc->njqc", harmonics, weighted, precision="highest"
        )
        summed = summed.reshape(graph.num_nodes, -1, node_features.shape[2])
        constants = np.tensordot(self.mixing, self._basis, axes=1)  # [weights, dim_2, out, dim_1]
        matrix = np.transpose(constants, (2, 1, 0, 3)).reshape(self.irreps_paths.dim, -1)
        return jnp.einsum(
            "oq,nqc->noc", jnp.asarray(matrix, summed.dtype), summed, precision="highest"
        )

    def flops(self, batch: int, channels: int) -> int:
        mixing = 2 * self.num_weights * len(self.paths)
        return self._whole.flops(batch, channels) + batch * channels * mixing
