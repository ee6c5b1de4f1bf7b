"""Radial networks that see nothing but the distance, as splines."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import nnx
from jaxtyping import Array, Float, Int
from scipy.interpolate import make_interp_spline

from equizoo.graph import Graph, sum_receivers

_ORDER = 6  # coefficients of a piece: quintic, with four continuous derivatives
_ROWS = 256  # of samples are enough to find out which functions matter


# Of distances [Å], for a pair of kinds of atoms; float64.
Network = Callable[
    [Float[np.ndarray, " points"], tuple[int, int]], Float[np.ndarray, "points outputs"]
]


class Places(NamedTuple):
    """Where edges are in the tables of all splines of the same knots."""

    rows: Int[Array, " edges"]
    powers: Float[Array, "edges order"]  # of the place within the piece, times an envelope if any


@dataclasses.dataclass(frozen=True)
class Knots:
    """Evenly spaced from 0 to the cutoff; a table for every unordered pair of kinds of atoms."""

    cutoff: float  # [Å]
    intervals: int
    num_kinds: int = 1  # 1: networks do not tell atoms apart

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return [(i, j) for i in range(self.num_kinds) for j in range(i + 1)]

    def places(
        self,
        lengths: Float[Array, " edges"],  # [Å]
        kinds: tuple[Int[Array, " edges"], Int[Array, " edges"]] | None = None,
    ) -> Places:
        """Where edges of these lengths are, between atoms of the two ``kinds`` if given."""
        along = lengths * (self.intervals / self.cutoff)
        piece = jnp.clip(along.astype(jnp.int32), 0, self.intervals - 1)
        u = along - piece.astype(along.dtype)
        powers = jnp.stack([u**k for k in range(_ORDER)], axis=1)
        if kinds is not None:
            high, low = jnp.maximum(*kinds), jnp.minimum(*kinds)
            piece = piece + self.intervals * (high * (high + 1) // 2 + low)
        return Places(piece, powers)


class RadialFunctions(nnx.Module):
    """Splines of the distance; zero, with their slopes, where ``powers`` have an envelope that is.

    Forces are exact derivatives of the splines, not splines of derivatives.
    """

    def __init__(self, table: Float[np.ndarray, "rows order functions"]):
        with jax.enable_x64(True):
            self.table = nnx.Param(jnp.asarray(table))

    @property
    def number(self) -> int:
        return self.table[...].shape[2]

    def __call__(self, places: Places) -> Float[Array, "edges functions"]:
        table = self.table[...].astype(places.powers.dtype)
        pieces = table.at[places.rows].get(mode="promise_in_bounds")
        return jnp.einsum("eok,eo->ek", pieces, places.powers)


class RadialTable(RadialFunctions):
    """A radial network whose outputs are splines, each with coefficients of its own."""

    def __init__(self, network: Network, knots: Knots):
        super().__init__(_pieces(*_samples(network, knots)))


class RadialSpline(nnx.Module):
    r"""A radial network ``f`` as ``f_o(r) = \sum_k \phi_k(r) V_{k o}``, ``phi`` splines.

    They are fewer than the outputs, since those come from a hidden layer and a smooth argument.
    """

    def __init__(
        self,
        network: Network,
        envelope: Callable[[Float[np.ndarray, " points"]], Float[np.ndarray, " points"]],
        knots: Knots,
        tolerance: float,
    ):
        """What is left out of ``network`` times ``envelope`` is at any distance below ``tolerance``
        of its size there or, if that is more, of the median of its sizes: it is often much larger
        at distances shorter than any in the training data."""
        r, values = _samples(network, knots)
        every = max(1, len(r) // max(_ROWS // len(values), _ROWS // 4))
        seen = (values * envelope(r)[None, :, None])[:, ::every]
        seen = seen.reshape(-1, seen.shape[2])
        size = np.linalg.norm(seen, axis=1, keepdims=True)
        seen = seen / np.maximum(size, np.median(size))
        # in each step a direction of the distance that has most left
        directions, left, _ = scipy.linalg.qr(seen.T, mode="economic", pivoting=True)
        left = np.abs(np.diag(left))
        kernel = directions[:, : max(1, int((left > tolerance).sum()))].T
        self.functions = RadialFunctions(_pieces(r, values @ kernel.T))
        with jax.enable_x64(True):
            self.kernel = nnx.Param(jnp.asarray(kernel))

    def __call__(self, places: Places) -> Float[Array, "edges outputs"]:
        return self.functions(places) @ self.kernel[...].astype(places.powers.dtype)


def _samples(
    network: Network, knots: Knots
) -> tuple[Float[np.ndarray, " knots"], Float[np.ndarray, "pairs knots outputs"]]:
    """The knots [Å], and the network there."""
    r = np.linspace(0, knots.cutoff, knots.intervals + 1)
    return r, np.stack([network(r, pair) for pair in knots.pairs])


def _pieces(
    r: Float[np.ndarray, " knots"], values: Float[np.ndarray, "pairs knots functions"]
) -> Float[np.ndarray, "rows order functions"]:
    """Coefficients of the splines through values, for powers of the place within a piece."""
    spline, step = make_interp_spline(r, values, k=_ORDER - 1, axis=1), r[1]
    table = [spline(r[:-1], nu=k) * (step**k / math.factorial(k)) for k in range(_ORDER)]
    return np.stack(table, axis=2).reshape(-1, _ORDER, values.shape[2])


class NeighborDensities(nnx.Module):
    r"""Linear maps of the densities ``\sum_j \phi_k(r_j) Y_{l m}(r_j)`` of neighbours by species.

    Equal to a convolution of features that depend on the sender's species alone with weights that
    are linear in ``phi``, and a linear map of that: channels enter once per atom.
    """

    def __init__(
        self,
        functions: RadialFunctions,
        irreps: e3nn.Irreps,
        kernels: dict[str, Float[Array, "rows channels"]],  # by irrep; species, then functions
    ):
        self.functions, self.irreps = functions, str(irreps)
        self.kernels = nnx.Dict({ir: nnx.Param(kernel) for ir, kernel in kernels.items()})

    def __call__(
        self,
        places: Places,
        harmonics: Float[Array, "edges dim"],
        graph: Graph,
    ) -> Float[Array, "nodes dim channels"]:
        irreps, functions = e3nn.Irreps(self.irreps), self.functions(places)
        num_species = self.kernels[str(irreps[0].ir)][...].shape[0] // self.functions.number
        if num_species > 1:
            senders = graph.species[graph.senders]
            species = jnp.arange(num_species, dtype=senders.dtype)
            mine = (senders[:, None] == species[None]).astype(functions.dtype)
            functions = (mine[:, :, None] * functions[:, None]).reshape(len(functions), -1)
        if graph.slots is None:
            sums = sum_receivers(harmonics[:, :, None] * functions[:, None], graph)
        else:
            rows = (graph.num_nodes, graph.slots, -1)
            real = jnp.where(graph.edge_mask[:, None], harmonics, 0)
            sums = jnp.einsum("nsm,nsk->nmk", real.reshape(rows), functions.reshape(rows))
        kernels = [self.kernels[str(ir)][...].astype(sums.dtype) for _, ir in irreps]
        pieces = jax.lax.split(sums, [ir.dim for _, ir in irreps], axis=1)
        return jnp.concatenate([p @ k for p, k in zip(pieces, kernels, strict=True)], axis=1)
