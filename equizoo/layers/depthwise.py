"""A tensor product of node features with harmonics, channel by channel."""

import functools
from typing import Any

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from equizoo.layers.features import SCALAR, Features, channels_of, irreps_of
from equizoo.tensor_products._base import BoundProduct, TensorProduct


class Depthwise:
    """The products of each irrep of the features with harmonics, into the irreps that are kept.

    No channel meets another ('uvu'), so channels may differ between irreps: a product is bound for
    each. Its results of one irrep stand side by side in the channels of ``irreps_out``, in the
    order of the factors. Bound products are constants; see :func:`depthwise`.
    """

    irreps_out: str
    num_weights: int
    exact: bool  # equivariant to rounding
    weights_of: dict[str, slice]  # those of each factor
    results_of: dict[str, dict[str, slice]]  # channels of each irrep of the result, by factor

    def __init__(
        self, product: TensorProduct, irreps: str, irreps_harmonics: str, keep: frozenset[str]
    ):
        harmonics = e3nn.Irreps(irreps_harmonics)
        self.channels = channels_of(irreps)
        self.products: dict[str, BoundProduct] = {}
        self.weights_of, self.results_of = {}, {}
        reached: dict[str, int] = {}
        start = 0
        for ir, mul in self.channels.items():
            results = {str(out) for _, other in harmonics for out in e3nn.Irrep(ir) * other}
            wanted = sorted(results & (keep | {SCALAR}), key=e3nn.Irrep)
            if not wanted:
                continue
            bound = product.bind(ir, irreps_harmonics, "+".join(wanted))
            self.products[ir] = bound
            self.weights_of[ir] = slice(start, start + bound.num_weights * mul)
            start = self.weights_of[ir].stop
            before = dict(reached)
            for _, out in bound.irreps_paths:
                reached[str(out)] = reached.get(str(out), 0) + mul
            results = {str(out) for _, out in bound.irreps_paths}
            self.results_of[ir] = {out: slice(before.get(out, 0), reached[out]) for out in results}
        self.irreps_out = irreps_of({ir: reached[ir] for ir in sorted(reached, key=e3nn.Irrep)})
        self.num_weights = start
        self.exact = all(bound.exact for bound in self.products.values())

    def prepare(self, harmonics: Float[Array, "edges dim"]) -> dict[str, Any]:
        """What depends on the harmonics alone: once for all layers that share this object."""
        return {ir: bound.prepare(harmonics[..., None]) for ir, bound in self.products.items()}

    def __call__(
        self,
        x: Features,
        prepared: dict[str, Any],
        weights: Float[Array, "batch_w num_weights"],
    ) -> Features:
        """The products, ``weights`` of each edge or (``batch_w = 1``) shared by all."""
        # split, not indexing: its transpose is one concatenation
        sizes = [place.stop - place.start for place in self.weights_of.values()]
        parts = jax.lax.split(weights, sizes, axis=1)
        results: dict[str, list[Array]] = {}
        for ir, part in zip(self.products, parts, strict=True):
            for out, pieces in self._pieces(ir, x[ir], prepared, part).items():
                results.setdefault(out, []).extend(pieces)
        return {ir: jnp.concatenate(results[ir], axis=2) for ir in channels_of(self.irreps_out)}

    def of_factor(
        self,
        ir: str,
        x: Float[Array, "edges dim channels"],
        prepared: dict[str, Any],
        weights: Float[Array, "batch_w num_mine"],
    ) -> Features:
        """The products of one irrep alone, with ``weights_of`` it: the channels ``results_of`` it.

        They are what the whole product has there; its other channels do not depend on this factor.
        """
        pieces = self._pieces(ir, x, prepared, weights)
        return {out: jnp.concatenate(arrays, axis=2) for out, arrays in pieces.items()}

    def _pieces(
        self, ir: str, x: Array, prepared: dict[str, Any], weights: Array
    ) -> dict[str, list[Array]]:
        bound = self.products[ir]
        mine = weights.reshape(-1, bound.num_weights, self.channels[ir])
        product = bound.couple(x, prepared[ir], mine)
        pieces: dict[str, list[Array]] = {}
        parts = jax.lax.split(product, [out.dim for _, out in bound.irreps_paths], axis=1)
        for (_, out), part in zip(bound.irreps_paths, parts, strict=True):
            pieces.setdefault(str(out), []).append(part)
        return pieces


@functools.cache
def depthwise(
    product: TensorProduct, irreps: str, irreps_harmonics: str, irreps_keep: str
) -> Depthwise:
    """The product into ``0e`` and the irreps of ``irreps_keep``; equal arguments share one object.

    Raises ``ValueError`` where the tensor product does not take these irreps.
    """
    return Depthwise(product, irreps, irreps_harmonics, frozenset(channels_of(irreps_keep)))
