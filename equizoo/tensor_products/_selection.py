"""Any product with some of its weights left out."""

from typing import Any

import e3nn_jax as e3nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from equizoo.graph import Graph
from equizoo.tensor_products._base import BoundProduct
from equizoo.tensor_products._coefficients import coefficients

_ZERO = 1e-10  # of a coefficient; the maps have unit variance


class BoundSelection(BoundProduct):
    """The whole product with zeros for the weights that are left out: saves weights, not work."""

    def __init__(self, product: BoundProduct, keep: tuple[int, ...]):
        self._product, self._keep = product, keep
        self.irreps_1, self.irreps_2 = product.irreps_1, product.irreps_2
        self.irreps_out = product.irreps_out
        self.exact = product.exact
        self.on_harmonics = product.on_harmonics
        self.num_weights = len(keep)
        found = coefficients(product)
        there = np.abs(found.values[list(keep)]).max(axis=0) > _ZERO
        self.paths = tuple(p for p, keeps in zip(found.paths, there, strict=True) if keeps)
        places = product.irreps_paths.slices()
        parts = product.dense_per_path()[list(keep)]
        left = [e for e, place in enumerate(places) if np.abs(parts[..., place]).max() > _ZERO]
        self.into = tuple(product.into[entry] for entry in left)
        self.irreps_paths = e3nn.Irreps([product.irreps_paths[entry] for entry in left])
        self._columns = np.concatenate([np.arange(parts.shape[3])[places[e]] for e in left])
        scales = self._scales(parts[..., self._columns])
        self._scale = np.repeat(scales, [ir.dim for _, ir in self.irreps_paths])
        if not self.exact:
            self.defect = coefficients(self).defect

    def _scales(
        self, parts: Float[np.ndarray, "num_weights dim_1 dim_2 dim_paths"]
    ) -> Float[np.ndarray, " entries"]:
        """For each entry what gives the irrep of the result that it goes to unit variance."""
        places = self.irreps_paths.slices()
        scales = []
        for index in self.into:
            mine = [place for place, i in zip(places, self.into, strict=True) if i == index]
            summed = sum(parts[..., place] for place in mine) / np.sqrt(len(mine))
            scales.append(np.mean(np.sum(summed**2, axis=(0, 1, 2))) ** -0.5)
        return np.array(scales)

    def prepare(self, y: Float[Array, "batch dim_2 channels_2"]) -> Any:
        return self._product.prepare(y)

    def couple(
        self,
        x: Float[Array, "batch dim_1 channels"],
        prepared: Any,
        weights: Float[Array, "batch_w num_weights channels_w"],
    ) -> Float[Array, "batch dim_paths channels"]:
        return self._reduced(self._product.couple(x, prepared, self._with_zeros(weights)))

    def convolve(
        self,
        node_features: Float[Array, "nodes dim_1 channels"],
        edge_harmonics: Float[Array, "edges dim_2"],
        edge_weights: Float[Array, "edges num_weights channels"],
        graph: Graph,
    ) -> Float[Array, "nodes dim_paths channels"]:
        weights = self._with_zeros(edge_weights)
        return self._reduced(self._product.convolve(node_features, edge_harmonics, weights, graph))

    def flops(self, batch: int, channels: int) -> int:
        return self._product.flops(batch, channels) + batch * channels * len(self._columns)

    def _with_zeros(
        self, weights: Float[Array, "batch num_weights channels"]
    ) -> Float[Array, "batch all_weights channels"]:
        zero = jnp.zeros_like(weights[:, :1])
        place = {index: w for w, index in enumerate(self._keep)}
        rows = [
            weights[:, place[index], None] if index in place else zero
            for index in range(self._product.num_weights)
        ]
        return jnp.concatenate(rows, axis=1)

    def _reduced(
        self, z: Float[Array, "batch dim_all channels"]
    ) -> Float[Array, "batch dim_paths channels"]:
        return jnp.asarray(self._scale, z.dtype)[None, :, None] * z[:, self._columns]
