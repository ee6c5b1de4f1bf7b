"""Products with harmonics in the frame of each edge, and the linear maps that follow them.

Along the polar axis harmonics are constants, zero but for ``m = 0``. There an exact product with
them is a matrix of numbers that takes orders ``m`` to ``m`` and ``-m`` alone, so that no result
has components of orders that its factor lacks, and where edges share their weights the product and
the linear map after it are one matrix. The result is that of :class:`Depthwise` and the linear
maps, turned into the frame; what acts on channels alone can go on there.

References: Passaro and Zitnick 2023 (eSCN), https://arxiv.org/abs/2302.03655, section 4, for the
frame; here weights stay those of Clebsch-Gordan paths, or of whatever the product has.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from equizoo.graph import Graph, sum_receivers
from equizoo.layers.depthwise import Depthwise
from equizoo.layers.features import Features, FeaturesLinear, channels_of
from equizoo.layers.so2 import sum_from_frames
from equizoo.tensor_products._matrices import apply_matrices
from equizoo.tensor_products._so3 import rotations_to_pole, unit_vectors, wigner_matrices

Frames = dict[str, Float[Array, "edges dim dim"]]  # by irrep; scalars need none
_ROUNDING = 1e-9  # of couplings in float64


def frames_of(vectors: Float[Array, "edges 3"], irreps: str) -> Frames:
    """Matrices of each irrep into the frames of ``vectors``: orders 0, 1, -1, 2, -2, ..."""
    found = [e3nn.Irrep(ir) for ir in channels_of(irreps)]
    rotations = rotations_to_pole(unit_vectors(vectors))
    matrices = wigner_matrices(rotations, max(ir.l for ir in found))
    return {str(ir): matrices[ir.l][:, _order(ir.l)] for ir in found if ir.l > 0}


def _order(degree: int) -> Int[np.ndarray, " components"]:
    return np.array([degree] + [degree + s * m for m in range(1, degree + 1) for s in (1, -1)])


def into_frames(x: Features, frames: Frames) -> Features:
    """Features of edges, turned into their frames."""
    return {ir: apply_matrices(frames[ir], a) if ir in frames else a for ir, a in x.items()}


def summed_from_frames(
    y: dict[str, Float[Array, "edges _ _"]], frames: Frames, graph: Graph
) -> dict[str, Float[Array, "nodes _ _"]]:
    """Features in the frames of edges, turned back and summed over the edges of each receiver."""
    return {
        ir: sum_from_frames(a, frames[ir], graph) if ir in frames else sum_receivers(a, graph)
        for ir, a in y.items()
    }


class _Term(NamedTuple):
    """What one weight does to one factor in one path, as numbers for each order ``m >= 0``.

    ``z_m = same x_m + swapped x_-m`` and ``z_-m = same x_-m - swapped x_m``.
    """

    factor: str
    weight: int  # of the factor
    place: int  # of its channels among those of the product's result, an index into places
    same: Float[np.ndarray, " orders"]
    swapped: Float[np.ndarray, " orders"]


class DepthwiseInFrames:
    """A :class:`Depthwise` product and linear maps of it, in frames; see :func:`in_frames`."""

    terms: dict[str, list[_Term]]  # of each irrep of the result
    places: dict[str, list[int]]  # numbers of channels that stand side by side there

    def __init__(self, product: Depthwise):
        self.product = product
        self.terms = {ir: [] for ir in channels_of(product.irreps_out)}
        self.places = {ir: [] for ir in self.terms}
        for factor, bound in product.products.items():
            pole = np.zeros(bound.irreps_2.dim)
            for (_, ir), place in zip(bound.irreps_2, bound.irreps_2.slices(), strict=True):
                pole[place.start + ir.l] = np.sqrt(ir.dim)
            maps = bound.dense_at(pole)
            columns = bound.irreps_paths.slices()
            # factors come in the order in which their results stand side by side
            for (_, out), mine in zip(bound.irreps_paths, columns, strict=True):
                place = len(self.places[str(out)])
                self.places[str(out)].append(product.channels[factor])
                for weight, matrix in enumerate(maps[:, :, mine]):
                    same, swapped = _by_order(matrix)
                    if np.any(same) or np.any(swapped):
                        self.terms[str(out)].append(_Term(factor, weight, place, same, swapped))

    def __call__(
        self,
        x: Features,
        weights: Float[Array, "batch_w num_weights"],
        linears: Sequence[FeaturesLinear],
    ) -> list[Features]:
        """What each of ``linears`` makes of the product, ``weights`` of each edge or shared."""
        sizes = [place.stop - place.start for place in self.product.weights_of.values()]
        parts = jax.lax.split(weights, sizes, axis=1)
        by_weight: dict[str, Sequence[Array]] = {}
        pieces: dict[str, Sequence[Array]] = {}
        for (factor, bound), part in zip(self.product.products.items(), parts, strict=True):
            shaped = part.reshape(len(part), bound.num_weights, -1)
            by_weight[factor] = jax.lax.split(shaped, [1] * bound.num_weights, axis=1)
            degree = e3nn.Irrep(factor).l
            pieces[factor] = jax.lax.split(x[factor], [1] + [2] * degree, axis=1)
        results: list[Features] = [{} for _ in linears]
        for ir, terms in self.terms.items():
            kernels = {
                index: linear.kernels[ir][...].astype(weights.dtype)
                for index, linear in enumerate(linears)
                if ir in linear.kernels
            }
            if kernels:
                kernel = jnp.concatenate(list(kernels.values()), axis=1)
                rows = jax.lax.split(kernel, self.places[ir], axis=0)
                mapped = _mapped(e3nn.Irrep(ir).l, terms, pieces, by_weight, rows)
                widths = [part.shape[1] for part in kernels.values()]
                for index, part in zip(kernels, jax.lax.split(mapped, widths, axis=2), strict=True):
                    results[index][ir] = part
        return [linear.biased(result) for linear, result in zip(linears, results, strict=True)]


def _mapped(
    degree: int,
    terms: Sequence[_Term],
    pieces: Mapping[str, Sequence[Array]],  # by order
    weights: Mapping[str, Sequence[Array]],
    rows: Sequence[Float[Array, "_ channels_out"]],  # of the kernel, by place
) -> Float[Array, "edges dim channels_out"]:
    """An irrep of this degree of the result, order by order."""
    edges, channels = next(iter(pieces.values()))[0].shape[0], rows[0].shape[1]
    orders = []
    for m in range(degree + 1):
        found = []
        if same := [(t, t.same[m]) for t in terms if m < len(t.same) and t.same[m]]:
            found.append(_summed(same, m, pieces, weights, rows))
        if swapped := [(t, t.swapped[m]) for t in terms if m < len(t.swapped) and t.swapped[m]]:
            plus, minus = jax.lax.split(_summed(swapped, m, pieces, weights, rows), [1, 1], axis=1)
            found.append(jnp.concatenate([minus, -plus], axis=1))
        if not found:
            found.append(jnp.zeros((edges, 1 if m == 0 else 2, channels), rows[0].dtype))
        orders.append(functools.reduce(jnp.add, found))
    return jnp.concatenate(orders, axis=1)


def _summed(
    terms: Sequence[tuple[_Term, float]],
    m: int,
    pieces: Mapping[str, Sequence[Array]],
    weights: Mapping[str, Sequence[Array]],
    rows: Sequence[Float[Array, "_ channels_out"]],
) -> Float[Array, "edges components channels_out"]:
    """The sum of terms with their coefficients, as one matrix product."""
    inputs, kernels = [], []
    if next(iter(weights.values()))[0].shape[0] > 1:
        for term, coefficient in terms:
            inputs.append(pieces[term.factor][m] * weights[term.factor][term.weight])
            kernels.append(float(coefficient) * rows[term.place])
    else:  # weights of all edges are rather the kernel's
        for factor in dict.fromkeys(term.factor for term, _ in terms):
            inputs.append(pieces[factor][m])
            mine = [
                float(c) * weights[factor][t.weight][0, 0, :, None] * rows[t.place]
                for t, c in terms
                if t.factor == factor
            ]
            kernels.append(functools.reduce(jnp.add, mine))
    return jnp.concatenate(inputs, axis=2) @ jnp.concatenate(kernels, axis=0)


def _by_order(
    matrix: Float[np.ndarray, "dim_1 dim_out"],
) -> tuple[Float[np.ndarray, " orders"], Float[np.ndarray, " orders"]]:
    """What a map that commutes with rotations about the polar axis is made of; see _Term."""
    first, out = (dim // 2 for dim in matrix.shape)
    orders = np.arange(min(first, out) + 1)
    same = matrix[first + orders, out + orders]
    swapped = matrix[first - orders, out + orders]
    swapped[0] = 0
    again = np.zeros_like(matrix)
    again[first + orders, out + orders] = again[first - orders, out - orders] = same
    again[first - orders[1:], out + orders[1:]] = swapped[1:]
    again[first + orders[1:], out - orders[1:]] = -swapped[1:]
    if not np.abs(again - matrix).max() <= _ROUNDING:
        raise ValueError("This product does not commute with rotations about its second factor.")
    same, swapped = (np.where(np.abs(a) > _ROUNDING, a, 0.0) for a in (same, swapped))
    return same, swapped


@functools.cache
def in_frames(product: Depthwise) -> DepthwiseInFrames | None:
    """The product in frames, or ``None`` for one that is not exactly equivariant."""
    return DepthwiseInFrames(product) if product.exact else None
