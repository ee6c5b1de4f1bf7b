"""Any product with one weight for all its couplings: a matrix for each pair, for all channels."""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import e3nn_jax as e3nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from equizoo.graph import Graph
from equizoo.registry import TENSOR_PRODUCTS
from equizoo.tensor_products._base import BoundProduct, TensorProduct
from equizoo.tensor_products._matrices import apply_matrices

_BFLOAT16 = 2.0**-8  # of each factor: 8 bits of mantissa
_SMALL = 1e-10  # of a coupling; the maps have unit variance


class Form(enum.StrEnum):
    """How it is evaluated; all but ``bfloat16`` are the same map.

    ``matrix``: one matrix for each second factor of one channel multiplies all channels.
    ``neighbors``: likewise; where neighbours are summed, rows of them are before the coupling, so
    that no result of an edge is written to memory, for ``dim^3`` more operations per node.
    ``bfloat16``: as ``matrix``, with matrices and arguments rounded to bfloat16, sums in the full
    precision. ``product``: as the product itself does it, a CP decomposition term by term.
    """

    MATRIX = "matrix"
    NEIGHBORS = "neighbors"
    BFLOAT16 = "bfloat16"
    PRODUCT = "product"


@dataclasses.dataclass(frozen=True)
class SharedWeights(TensorProduct):
    r"""Another product with all its weights tied to one.

    .. math:: z_c = w_c \, T(y) \, x_c, \qquad T(y)_{k i} = \sum_{w j} M_{w i j k} \, y_j

    The matrix ``T`` depends on the second factor alone: ``prepare`` makes it once for all layers
    and channels. Any product fits, exact or not: the map is that of its ``dense`` tensor, with its
    ``defect``. The default is the sum of all Clebsch-Gordan couplings, ``LowRankWeights(1)``.

    Reference: Lin et al. 2025 (TDN), https://arxiv.org/abs/2507.01131, for the shared weight.
    """

    product: TensorProduct = dataclasses.field(
        default_factory=lambda: TENSOR_PRODUCTS["clebsch_gordan"]()
    )
    form: Form = Form.MATRIX

    def __post_init__(self):
        Form(self.form)  # raises for other words

    def _bind(
        self, irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps
    ) -> "BoundShared":
        return BoundShared(self.product.bind(irreps_1, irreps_2, irreps_out), self.form)


class Whole(NamedTuple):
    """A second factor prepared for the product itself."""

    prepared: Any


class BoundShared(BoundProduct):
    """See :class:`SharedWeights`; second factors of several channels go to the product itself."""

    num_weights = 1

    def __init__(self, product: BoundProduct, form: Form):
        self._product, self._form = product, form
        self.irreps_1, self.irreps_2 = product.irreps_1, product.irreps_2
        self.irreps_out, self.paths = product.irreps_out, product.paths
        self.into = tuple(sorted(set(product.into)))
        self.irreps_paths = e3nn.Irreps([self.irreps_out[index] for index in self.into])
        self.on_harmonics = product.on_harmonics
        rounded = _BFLOAT16 * (form == Form.BFLOAT16)
        self.exact, self.defect = product.exact and not rounded, product.defect + rounded
        self._scale = np.ones(self.irreps_paths.dim)
        if form != Form.PRODUCT or product.num_weights > 1:
            places = [self.irreps_out.slices()[index] for index in self.into]
            dense = product.dense()
            self._scale = _scale_of_tied(dense, places)
            tensor = np.sum(dense, axis=0)
            tensor = np.concatenate([tensor[:, :, place] for place in places], axis=2)
            self._tensor = tensor * self._scale

    def prepare(
        self, y: Float[Array, "batch dim_2 channels_2"]
    ) -> Float[Array, "batch dim_paths dim_1"] | Whole:
        """For one channel the matrices ``T``."""
        if y.shape[2] > 1 or self._form == Form.PRODUCT:
            return Whole(self._product.prepare(y))
        flat = np.transpose(self._tensor, (1, 2, 0)).reshape(self.irreps_2.dim, -1)
        matrices = jnp.matmul(y[:, :, 0], jnp.asarray(flat, y.dtype), precision="highest")
        if self._form == Form.BFLOAT16:
            matrices = matrices.astype(jnp.bfloat16)
        return matrices.reshape(len(y), self.irreps_paths.dim, self.irreps_1.dim)

    def couple(
        self,
        x: Float[Array, "batch dim_1 channels"],
        prepared: Float[Array, "batch dim_paths dim_1"] | Whole,
        weights: Float[Array, "batch_w 1 channels_w"],
    ) -> Float[Array, "batch dim_paths channels"]:
        if isinstance(prepared, Whole):
            ones = jnp.ones((1, self._product.num_weights, 1), x.dtype)
            z = self._product._sum_paths(self._product.couple(x, prepared.prepared, ones))
            places = self.irreps_out.slices()
            z = jnp.concatenate([z[:, places[index]] for index in self.into], axis=1)
            return weights * (z * jnp.asarray(self._scale, z.dtype)[None, :, None])
        if self._form == Form.BFLOAT16:
            x_rounded = x.astype(prepared.dtype)
            return weights * jnp.matmul(prepared, x_rounded, preferred_element_type=x.dtype)
        return weights * apply_matrices(prepared, x)

    def collect(
        self,
        edge_features: Float[Array, "edges dim_1 channels"],
        edge_harmonics: Float[Array, "edges dim_2"],
        prepared: Float[Array, "edges dim_paths dim_1"] | Whole,
        edge_weights: Float[Array, "edges 1 channels"],
        graph: Graph,
    ) -> Float[Array, "nodes dim_out channels"]:
        if self._form != Form.NEIGHBORS or graph.slots is None:
            return super().collect(edge_features, edge_harmonics, prepared, edge_weights, graph)
        nodes, channels = graph.num_nodes, edge_features.shape[2]
        harmonics = jnp.where(graph.edge_mask[:, None], edge_harmonics, 0)
        weighted = edge_weights * edge_features
        summed = jnp.einsum(
            "nsj,nsq->njq",
            harmonics.reshape(nodes, graph.slots, -1),
            weighted.reshape(nodes, graph.slots, -1),
            precision="highest",
        ).reshape(nodes, -1, channels)  # rows (j, i)
        matrix = np.transpose(self._tensor, (2, 1, 0)).reshape(self.irreps_paths.dim, -1)
        z = jnp.einsum(
            "kq,nqc->nkc", jnp.asarray(matrix, summed.dtype), summed, precision="highest"
        )
        return self._sum_paths(z)

    def flops(self, batch: int, channels: int) -> int:
        if self._form == Form.PRODUCT:
            return self._product.flops(batch, channels) + batch * channels * self.irreps_paths.dim
        couplings = int(np.count_nonzero(np.abs(self._tensor) > _SMALL))
        return batch * channels * (3 * couplings + self.irreps_paths.dim)


def _scale_of_tied(
    dense: Float[np.ndarray, "num_weights dim_1 dim_2 dim_out"], places: Sequence[slice]
) -> Float[np.ndarray, " dim_paths"]:
    """What gives sums with one weight the variance that independent weights have.

    One, unless several weights reach the same coupling.
    """
    scales = []
    for place in places:
        independent = np.sum(dense[..., place] ** 2)
        tied = np.sum(np.sum(dense[..., place], axis=0) ** 2)
        ratio = np.sqrt(independent / tied) if tied > _SMALL * independent else 1.0
        alike = abs(ratio - 1) < _SMALL  # not by rounding
        scales.append(np.full(place.stop - place.start, 1.0 if alike else ratio))
    return np.concatenate(scales)
