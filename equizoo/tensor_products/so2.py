"""Clebsch-Gordan product in the frame of an edge, where its tensors are sparse (eSCN)."""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable
from typing import NamedTuple

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from equizoo.graph import Graph, gather_senders
from equizoo.tensor_products._base import (
    BoundProduct,
    Path,
    TensorProduct,
    allowed_paths,
    coupling,
)
from equizoo.tensor_products._so3 import rotations_to_pole, unit_vectors, wigner_matrices
from equizoo.tensor_products._sphere import harmonics


@dataclasses.dataclass(frozen=True)
class SO2(TensorProduct):
    r"""The Clebsch-Gordan product with harmonics ``y`` of one direction, in the frame of that edge.

    .. math:: z = D_{l_3}^T z', \quad z'_m = u_{|m|} x'_m \;\text{ or }\;
        z'_m = v_m x'_{-m}, \; v_{-m} = -v_m, \quad x' = D_{l_1} x

    With the edge as polar axis only ``m = 0`` of ``y`` is left, so that a pair of irreps is coupled
    by ``min(l_1, l_3) + 1`` numbers ``u`` where ``l_1 + l_2 + l_3`` is even, by one less, ``v``,
    where it is odd. They are ``E w``, the path weights ``w`` turned by an orthogonal matrix,

    .. math:: E_{m l_2} = \sqrt{2 - \delta_{m 0}} \sqrt{2 l_2 + 1}
        \begin{pmatrix} l_1 & l_2 & l_3 \\ m & 0 & \pm m \end{pmatrix}, \quad E^T E = 1,

    times ``sqrt(2 l_3 + 1)``. Weights, paths and results are those of ``ClebschGordan``: the same
    map. The call sums paths in the frame, at ``O(L^3)`` operations per channel after ``O(L^4)`` for
    the Wigner matrices of a direction; ``per_path`` and ``convolve`` keep paths apart and rotate
    each back.

    ``y`` must be spherical harmonics of one direction for each batch entry and channel, times any
    factor for each degree. The direction is read from the 1o part, the factors by projection on
    the harmonics of that direction: the product is homogeneous of degree one in ``y``, and zero
    with finite derivatives for ``y = 0``; if only the 1o part is zero, so should be all but 0e. The
    choice of the frame about the edge drops out, so derivatives through ``y`` are exact everywhere,
    at the poles too.

    ``m_max`` leaves out the numbers with ``m > m_max``: still equivariant, cheaper, not
    Clebsch-Gordan any more. A path then also contains other harmonics, of the degrees from
    ``|l_1 - l_3|`` to ``l_1 + l_3`` in steps of two, in proportion to its own factor of ``y``.
    Therefore:

    - There still is one weight for each path of ``ClebschGordan``, in its order, so that ``m_max``
      can be changed under given weights; each path is scaled back to unit variance. Paths of which
      nothing remains (``m_max = 0`` and ``l_1 + l_2 + l_3`` odd) are left out.
    - ``paths`` names the couplings that own the weights. If ``irreps_2`` has all degrees named
      above, these are also the couplings that the product contains.
    - The map is bilinear in the harmonics with *one* factor for all degrees. ``dense`` is that map,
      and raises ``ValueError`` where a degree that it needs is not in ``irreps_2``.

    References: Passaro and Zitnick 2023, https://arxiv.org/abs/2302.03655; Liao et al. 2023
    (EquiformerV2), https://arxiv.org/abs/2306.12059, for ``m_max``.
    """

    m_max: int | None = None  # keep |m| up to this; None keeps all

    def __post_init__(self):
        if self.m_max is not None and self.m_max < 0:
            raise ValueError(f"m_max is {self.m_max}, expected 0 or more, or None to keep all m.")

    def _bind(
        self, irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps
    ) -> "BoundSO2":
        return BoundSO2(irreps_1, irreps_2, irreps_out, self.m_max)


class EdgeFrame(NamedTuple):
    """What the second factor says: how to turn its direction to the pole, and its factors."""

    # of degrees 0, 1, ..., each [batch, channels_2, 2l+1, 2l+1]
    rotations: tuple[Float[Array, "batch channels_2 _ _"], ...]
    # of each irrep of the second factor, [batch, 1, channels_2]
    scales: tuple[Float[Array, "batch 1 channels_2"], ...]


class Pair(NamedTuple):
    """All paths between one irrep of the first factor and one of the result."""

    index_1: int
    index_out: int
    l_1: int
    l_out: int
    m: int  # couples components up to this
    odd: bool  # l_1 + l_2 + l_3, the same for all: m is coupled to -m
    weights: slice  # places of the paths among the weights
    indices_2: tuple[int, ...]
    numbers: Float[np.ndarray, "paths _"]  # by which a path multiplies the components -m, ..., m


class BoundSO2(BoundProduct):
    """See :class:`SO2`."""

    on_harmonics = True

    def __init__(
        self,
        irreps_1: e3nn.Irreps,
        irreps_2: e3nn.Irreps,
        irreps_out: e3nn.Irreps,
        m_max: int | None,
        paths: tuple[Path, ...] | None = None,
    ):
        _check_harmonics(irreps_2)
        self.irreps_1, self.irreps_2, self.irreps_out = irreps_1, irreps_2, irreps_out
        self.paths = paths or allowed_paths(
            irreps_1, irreps_2, irreps_out, keep=lambda path: bool(_numbers(path, m_max).any())
        )
        self.irreps_paths = e3nn.Irreps([(1, path.ir_out) for path in self.paths])
        self.into = tuple(path.index_out for path in self.paths)
        self.num_weights = len(self.paths)
        self._m_max = m_max
        self._pairs = _pairs(self.paths, m_max)
        self._l_max = max(max(path.ir_1.l, path.ir_out.l) for path in self.paths)

    def _select(self, keep: tuple[int, ...]) -> "BoundSO2":
        paths = tuple(self.paths[index] for index in keep)
        return BoundSO2(self.irreps_1, self.irreps_2, self.irreps_out, self._m_max, paths)

    def prepare(self, y: Float[Array, "batch dim_2 channels_2"]) -> EdgeFrame:
        """Wigner matrices that turn the direction of ``y`` to the pole, and its factors."""
        places = self.irreps_2.slices()
        (linear,) = (s for s, (_, ir) in zip(places, self.irreps_2, strict=True) if ir.l == 1)
        directions = unit_vectors(jnp.moveaxis(y[:, linear], 1, 2))
        with jax.default_matmul_precision("highest"):  # whatever the device's default
            at_direction = e3nn.spherical_harmonics(
                self.irreps_2, directions, normalize=False, normalization="component"
            ).array
        overlap = y * jnp.moveaxis(at_direction, 2, 1)
        scales = tuple(
            jnp.sum(overlap[:, place], axis=1, keepdims=True) / ir.dim
            for place, (_, ir) in zip(places, self.irreps_2, strict=True)
        )
        return EdgeFrame(wigner_matrices(rotations_to_pole(directions), self._l_max), scales)

    def couple(
        self,
        x: Float[Array, "batch dim_1 channels"],
        prepared: EdgeFrame,
        weights: Float[Array, "batch_w num_weights channels_w"],
    ) -> Float[Array, "batch dim_paths channels"]:
        turned = self._to_frame(x, prepared)
        results = []
        for pair in self._pairs:
            products = self._separate(pair, turned, prepared, weights)
            back = _apply(jnp.swapaxes(_rows(prepared, pair.l_out, pair.m), 2, 3), products)
            results.append(_joined(back))
        return jnp.concatenate(results, axis=1)

    def __call__(
        self,
        x: Float[Array, "batch dim_1 channels"],
        y: Float[Array, "batch dim_2 channels_2"],
        weights: Float[Array, "batch_w num_weights channels_w"],
    ) -> Float[Array, "batch dim_out channels"]:
        """The product; paths are summed in the frame, and rotated back once for each irrep."""
        frame = self.prepare(y)
        turned = self._to_frame(x, frame)
        results = []
        for index, (_, ir) in enumerate(self.irreps_out):
            mine = [pair for pair in self._pairs if pair.index_out == index]
            if not mine:
                results.append(jnp.zeros((x.shape[0], ir.dim, x.shape[2]), x.dtype))
                continue
            m = max(pair.m for pair in mine)
            in_frame = functools.reduce(
                operator.add,
                (_padded(self._merged(pair, turned, frame, weights), m - pair.m) for pair in mine),
            )
            back = _apply(jnp.swapaxes(_rows(frame, ir.l, m), 2, 3), in_frame[:, :, None])[:, 0]
            results.append(back / float(np.sqrt(self.into.count(index))))
        return jnp.concatenate(results, axis=1)

    def convolve(
        self,
        node_features: Float[Array, "nodes dim_1 channels"],
        edge_harmonics: Float[Array, "edges dim_2"],
        edge_weights: Float[Array, "edges num_weights channels"],
        graph: Graph,
    ) -> Float[Array, "nodes dim_paths channels"]:
        """On rows the rotation back and the sum over neighbours are one matrix product."""
        if graph.slots is None:
            return super().convolve(node_features, edge_harmonics, edge_weights, graph)
        rows = (graph.num_nodes, graph.slots)
        senders = gather_senders(node_features, graph)
        y = jnp.where(graph.edge_mask[:, None], edge_harmonics, 0)
        frame = self.prepare(y[..., None])
        turned = self._to_frame(senders, frame)
        results = []
        for pair in self._pairs:
            products = self._separate(pair, turned, frame, edge_weights)
            rotation = _rows(frame, pair.l_out, pair.m)[:, 0]
            summed = jnp.einsum(
                "nsmk,nsmpc->npkc",
                rotation.reshape(*rows, *rotation.shape[1:]),
                products.reshape(*rows, *products.shape[1:]),
                precision="highest",
            )
            results.append(_joined(summed))
        return jnp.concatenate(results, axis=1)

    def flops(self, batch: int, channels: int) -> int:
        wigner = 0
        for degree in range(2, self._l_max + 1):
            low, high = 2 * degree - 1, 2 * degree + 1
            wigner += 2 * (3 * low * low * high + 9 * low * high + 3 * low * high * high)
        rotations = sum(2 * (2 * m + 1) * self.irreps_1[i].dim for i, m in self._reach_1().items())
        numbers = 0
        for index in set(self.into):
            mine = [pair for pair in self._pairs if pair.index_out == index]
            rotations += 2 * max(2 * pair.m + 1 for pair in mine) * self.irreps_out[index].dim
            numbers += sum(2 * pair.numbers.size + len(pair.numbers) for pair in mine)
            numbers += sum(2 * (2 * pair.m + 1) for pair in mine)
        projections = 2 * self.irreps_2.dim
        return batch * channels * (wigner + rotations + numbers + projections)

    def _on_basis(self, function: Callable[..., Array]) -> Float[np.ndarray, "w d1 d2 d3"]:
        """The bilinear map that takes the values of the product on harmonics, in float64.

        Solved from more directions than ``irreps_2`` has components; that the equations hold to
        rounding is asserted, and shows that there is such a map. The factors of the degrees are
        independent, or one for all when ``m_max`` leaves something out. Raises ``ValueError`` when
        that mixes in a degree that is not in ``irreps_2``.
        """
        truncated = self._check_closed()
        rng = np.random.default_rng(0)
        dims = (self.num_weights, self.irreps_1.dim, self.irreps_2.dim)
        points = rng.normal(size=(4 * dims[2], 3))
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        degrees = 1 if truncated else len(self.irreps_2)
        factors = np.broadcast_to(
            rng.uniform(0.5, 1.5, size=(len(points), degrees)), (len(points), len(self.irreps_2))
        )
        y = harmonics(self.irreps_2, points)
        y = y * np.repeat(factors, [ir.dim for _, ir in self.irreps_2], axis=1)
        # all weights and first factors side by side as channels
        w, x = (
            np.eye(dim)[index.ravel()].T[None]
            for dim, index in zip(dims[:2], np.indices(dims[:2]), strict=True)
        )
        x = np.broadcast_to(x, (len(points), *x.shape[1:]))
        # constants of a product that is bound while a caller is traced are numbers all the same
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            values = np.asarray(jax.jit(function)(*map(jnp.asarray, (x, y[..., None], w))))
        values = values.reshape(len(points), -1)
        solution = np.linalg.lstsq(y, values)[0]
        assert np.abs(y @ solution - values).max() < 1e-10, "not bilinear in the harmonics"
        solution = solution.reshape(dims[2], -1, *dims[:2])
        return np.transpose(solution, (2, 3, 0, 1))

    def _check_closed(self) -> bool:
        """Whether ``m_max`` leaves something out; raises where the rest is no map of ``y``."""
        cut = [pair for pair in self._pairs if pair.m < min(pair.l_1, pair.l_out)]
        needed = {
            degree
            for pair in cut
            for degree in range(abs(pair.l_1 - pair.l_out) + pair.odd, pair.l_1 + pair.l_out + 1, 2)
        }
        missing = sorted(needed - {ir.l for _, ir in self.irreps_2})
        if missing:
            raise ValueError(
                f"With m_max={self._m_max} this product contains harmonics of degrees {missing} "
                f"that irreps_2 '{self.irreps_2}' lacks, so no bilinear map of these irreps "
                f"describes it. Bind with irreps_2 up to degree {max(needed)}, or use m_max=None."
            )
        return bool(cut)

    def _reach_1(self) -> dict[int, int]:
        """For each irrep of the first factor that is used, the highest component that is."""
        reach: dict[int, int] = {}
        for pair in self._pairs:
            reach[pair.index_1] = max(pair.m, reach.get(pair.index_1, 0))
        return reach

    def _to_frame(
        self, x: Float[Array, "batch dim_1 channels"], frame: EdgeFrame
    ) -> dict[int, Float[Array, "batch _ channels"]]:
        places = self.irreps_1.slices()
        turned = {}
        for index, m in self._reach_1().items():
            rows = _rows(frame, self.irreps_1[index].ir.l, m)
            turned[index] = _apply(rows, x[:, places[index], None])[:, 0]
        return turned

    @staticmethod
    def _factors(pair: Pair, turned, frame: EdgeFrame, weights):
        """The components that a pair of irreps uses, and the strengths of its paths."""
        x = turned[pair.index_1]
        middle = x.shape[1] // 2
        x = x[:, middle - pair.m : middle + pair.m + 1]
        scales = jnp.concatenate([frame.scales[j] for j in pair.indices_2], axis=1)
        return x[:, ::-1] if pair.odd else x, weights[:, pair.weights] * scales

    def _separate(
        self, pair: Pair, turned, frame: EdgeFrame, weights
    ) -> Float[Array, "batch components paths channels"]:
        x, strengths = self._factors(pair, turned, frame, weights)
        numbers = jnp.asarray(pair.numbers.T[None, :, :, None], x.dtype)
        return numbers * strengths[:, None] * x[:, :, None]

    def _merged(
        self, pair: Pair, turned, frame: EdgeFrame, weights
    ) -> Float[Array, "batch components channels"]:
        x, strengths = self._factors(pair, turned, frame, weights)
        numbers = jnp.asarray(pair.numbers, x.dtype)
        return jnp.einsum("pm,bpc->bmc", numbers, strengths, precision="highest") * x


def _check_harmonics(irreps_2: e3nn.Irreps) -> None:
    unnatural = [str(ir) for _, ir in irreps_2 if ir.p != (-1) ** ir.l]
    if unnatural:
        raise ValueError(
            "SO2 expects spherical harmonics as the second factor, of parity (-1)^l as in "
            f"'0e+1o+2e'; irreps_2 '{irreps_2}' has {', '.join(unnatural)}. ClebschGordan takes "
            "any second factor."
        )
    if not any(ir.l == 1 for _, ir in irreps_2):
        raise ValueError(
            "SO2 reads the direction of the edge from the 1o part of the second factor, which "
            f"irreps_2 '{irreps_2}' lacks. Add 1o, or use ClebschGordan, which does not need it."
        )


def _numbers(path: Path, m_max: int | None) -> Float[np.ndarray, " components"]:
    """What a path multiplies the components of the first factor by in the frame of the edge.

    The slice of the coupling at ``m_2 = 0`` is a diagonal, or an antidiagonal if the sum of the
    degrees is odd. What remains of it is scaled for unit variance, zero if nothing does.
    """
    l_1, l_2, l_3 = path.ir_1.l, path.ir_2.l, path.ir_out.l
    full = min(l_1, l_3)
    m = full if m_max is None else min(full, m_max)
    at_pole = np.sqrt(path.ir_2.dim) * coupling(path)[:, l_2]
    orders = np.arange(-full, full + 1)
    numbers = at_pole[l_1 + (-orders if _is_odd(path) else orders), l_3 + orders]
    kept = numbers[full - m : full + m + 1]
    remains = np.sum(kept**2) / np.sum(numbers**2)
    return kept / np.sqrt(remains) if remains > 1e-20 else np.zeros_like(kept)


def _is_odd(path: Path) -> bool:
    return (path.ir_1.l + path.ir_2.l + path.ir_out.l) % 2 == 1


def _pairs(paths: tuple[Path, ...], m_max: int | None) -> tuple[Pair, ...]:
    """The paths, which are sorted by result and first factor, in runs of equal irreps."""
    pairs, start = [], 0
    for (index_out, index_1), run in itertools.groupby(
        paths, key=lambda path: (path.index_out, path.index_1)
    ):
        mine = list(run)
        numbers = np.stack([_numbers(path, m_max) for path in mine])
        pairs.append(
            Pair(
                index_1,
                index_out,
                l_1=mine[0].ir_1.l,
                l_out=mine[0].ir_out.l,
                m=numbers.shape[1] // 2,
                odd=_is_odd(mine[0]),
                weights=slice(start, start + len(mine)),
                indices_2=tuple(path.index_2 for path in mine),
                numbers=numbers,
            )
        )
        start += len(mine)
    return tuple(pairs)


def _rows(frame: EdgeFrame, degree: int, m: int) -> Float[Array, "batch channels_2 rows columns"]:
    """The part of a Wigner matrix that gives the components up to ``m`` in the frame."""
    return frame.rotations[degree][:, :, degree - m : degree + m + 1]


def _apply(
    matrix: Float[Array, "batch channels_2 rows columns"],
    x: Float[Array, "batch columns copies channels"],
) -> Float[Array, "batch copies rows channels"]:
    if matrix.shape[2:] == (1, 1):  # degree 0 does not turn
        return jnp.swapaxes(x, 1, 2)
    if matrix.shape[1] == 1:
        return jnp.einsum("brk,bkpc->bprc", matrix[:, 0], x, precision="highest")
    return jnp.einsum("bcrk,bkpc->bprc", matrix, x, precision="highest")


def _padded(
    x: Float[Array, "batch components channels"], by: int
) -> Float[Array, "batch components_out channels"]:
    return jnp.pad(x, ((0, 0), (by, by), (0, 0)))


def _joined(
    x: Float[Array, "batch paths components channels"],
) -> Float[Array, "batch dim channels"]:
    batch, paths, components, channels = x.shape
    return x.reshape(batch, paths * components, channels)
