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

    def __init__(
        self, product: TensorProduct, irreps: str, irreps_harmonics: str, keep: frozenset[str]
    ):
        harmonics = e3nn.Irreps(irreps_harmonics)
        self.channels = channels_of(irreps)
        self.products: dict[str, BoundProduct] = {}
        reached: dict[str, int] = {}
        for ir, mul in self.channels.items():
            results = {str(out) for _, other in harmonics for out in e3nn.Irrep(ir) * other}
            wanted = sorted(results & (keep | {SCALAR}), key=e3nn.Irrep)
            if not wanted:
                continue
            bound = product.bind(ir, irreps_harmonics, "+".join(wanted))
            self.products[ir] = bound
            for _, out in bound.irreps_paths:
                reached[str(out)] = reached.get(str(out), 0) + mul
        self.irreps_out = irreps_of({ir: reached[ir] for ir in sorted(reached, key=e3nn.Irrep)})
        self.num_weights = sum(
            bound.num_weights * self.channels[ir] for ir, bound in self.products.items()
        )

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
        results: dict[str, list[Array]] = {}
        sizes = [bound.num_weights * self.channels[ir] for ir, bound in self.products.items()]
        # split, not indexing: its transpose is one concatenation
        parts = jax.lax.split(weights, sizes, axis=1)
        for (ir, bound), part in zip(self.products.items(), parts, strict=True):
            mine = part.reshape(-1, bound.num_weights, self.channels[ir])
            product = bound.couple(x[ir], prepared[ir], mine)
            pieces = jax.lax.split(product, [out.dim for _, out in bound.irreps_paths], axis=1)
            for (_, out), piece in zip(bound.irreps_paths, pieces, strict=True):
                results.setdefault(str(out), []).append(piece)
        return {ir: jnp.concatenate(results[ir], axis=2) for ir in channels_of(self.irreps_out)}


@functools.cache
def depthwise(
    product: TensorProduct, irreps: str, irreps_harmonics: str, irreps_keep: str
) -> Depthwise:
    """The product into ``0e`` and the irreps of ``irreps_keep``; equal arguments share one object.

    Raises ``ValueError`` where the tensor product does not take these irreps.
    """
    return Depthwise(product, irreps, irreps_harmonics, frozenset(channels_of(irreps_keep)))
