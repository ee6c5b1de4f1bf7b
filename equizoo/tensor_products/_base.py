"""What every equivariant product answers: the interface that layers know."""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from equizoo.graph import Graph, gather_senders, sum_receivers
from equizoo.registry import TENSOR_PRODUCTS

_BASIS_VECTORS = 4096  # evaluated together for a dense map: intermediate signals take memory


class Path(NamedTuple):
    """One coupling of an irrep of the first factor and one of the second to one of the result."""

    index_1: int  # position in irreps_1
    index_2: int  # position in irreps_2
    index_out: int  # position in irreps_out
    ir_1: e3nn.Irrep
    ir_2: e3nn.Irrep
    ir_out: e3nn.Irrep


@dataclasses.dataclass(frozen=True)
class TensorProduct(abc.ABC):
    """An equivariant product and its options; ``bind`` makes it a function of arrays.

    Irreps are single copies (``0e+1o+2e``): copies are the channels, the last axis of the arrays.
    """

    registry: ClassVar = TENSOR_PRODUCTS

    def bind(
        self, irreps_1: e3nn.Irreps | str, irreps_2: e3nn.Irreps | str,
        irreps_out: e3nn.Irreps | str,
    ) -> "BoundProduct":  # fmt: skip
        """The product between two contents; equal arguments give one shared object.

        Raises ``ValueError`` for irreps with several copies, or a result that no path reaches.
        """
        return _bind(self, *(single_copies(x) for x in (irreps_1, irreps_2, irreps_out)))

    def bind_power(
        self, irreps_in: e3nn.Irreps | str, irreps_out: e3nn.Irreps | str, order: int
    ) -> "BoundPower":
        """The many-body product of up to ``order`` copies of one argument, shared like ``bind``."""
        return _bind_power(self, single_copies(irreps_in), single_copies(irreps_out), order)

    @abc.abstractmethod
    def _bind(
        self, irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps
    ) -> "BoundProduct": ...

    def _bind_power(
        self, irreps_in: e3nn.Irreps, irreps_out: e3nn.Irreps, order: int
    ) -> "BoundPower":
        raise ValueError(
            f"{type(self).__name__} has no many-body form; use a tensor product that has one, such "
            "as ClebschGordan, for the product basis."
        )


@functools.cache
def _bind(product, irreps_1, irreps_2, irreps_out):
    return product._bind(irreps_1, irreps_2, irreps_out)


@functools.cache
def _bind_power(product, irreps_in, irreps_out, order):
    if order < 1:
        raise ValueError(f"order is {order}, expected at least 1.")
    return product._bind_power(irreps_in, irreps_out, order)


def bind_reached(
    bind: Callable[[e3nn.Irreps], "BoundProduct"], irreps_out: e3nn.Irreps
) -> "BoundProduct":
    """What ``bind`` makes of those of ``irreps_out`` that the product reaches."""
    while True:
        bound = bind(irreps_out)
        reached = sorted({path.index_out for path in bound.paths})
        if len(reached) == len(irreps_out):
            return bound
        irreps_out = e3nn.Irreps([irreps_out[index] for index in reached])


class BoundProduct(abc.ABC):
    """A map ``(x, y, weights) -> z``, bilinear in ``x`` and ``y``, linear in the weights.

    Unit variance in, unit variance out: for independent standard normal inputs and weights every
    component of ``z`` has variance one.
    """

    irreps_1: e3nn.Irreps
    irreps_2: e3nn.Irreps
    irreps_out: e3nn.Irreps
    irreps_paths: e3nn.Irreps  # content of :meth:`per_path`
    into: tuple[int, ...]  # position in irreps_out of each entry of irreps_paths, ascending
    paths: tuple[Path, ...]  # the couplings that the product contains, sorted by the result
    num_weights: int
    exact: bool = True  # equivariant to rounding
    defect: float = 0.0  # where not: relative, root mean square over rotations and arguments
    on_harmonics: bool = False  # y must be harmonics of one direction, times a factor per degree

    def prepare(self, y: Float[Array, "batch dim_2 channels_2"]) -> Any:
        """What depends on the second factor alone, a pytree of arrays ``[batch, ...]``.

        Layers that share ``y`` (the harmonics of edges) can share it; ``y`` itself by default.
        """
        return y

    @abc.abstractmethod
    def couple(
        self,
        x: Float[Array, "batch dim_1 channels"],
        prepared: Any,
        weights: Float[Array, "batch_w num_weights channels_w"],
    ) -> Float[Array, "batch dim_paths channels"]:
        """``per_path(x, y, weights)`` from ``prepared = prepare(y)``."""

    @abc.abstractmethod
    def flops(self, batch: int, channels: int) -> int:
        """Multiplications and additions of one forward call, ``y`` with as many channels."""

    def per_path(
        self,
        x: Float[Array, "batch dim_1 channels"],
        y: Float[Array, "batch dim_2 channels_2"],
        weights: Float[Array, "batch_w num_weights channels_w"],
    ) -> Float[Array, "batch dim_paths channels"]:
        """The result as separate as the product has it, in the order of ``irreps_paths``.

        Clebsch-Gordan products have one entry for each path; products that cannot tell the paths
        into an irrep apart have one entry for each irrep.
        """
        return self.couple(x, self.prepare(y), weights)

    def __call__(
        self,
        x: Float[Array, "batch dim_1 channels"],
        y: Float[Array, "batch dim_2 channels_2"],
        weights: Float[Array, "batch_w num_weights channels_w"],
    ) -> Float[Array, "batch dim_out channels"]:
        """The product, with ``channels_2``, ``channels_w`` and ``batch_w`` full size or 1."""
        return self._sum_paths(self.per_path(x, y, weights))

    def apply(
        self,
        x: Float[Array, "batch dim_1 channels"],
        prepared: Any,
        weights: Float[Array, "batch_w num_weights channels_w"],
    ) -> Float[Array, "batch dim_out channels"]:
        """The call from ``prepared = prepare(y)``."""
        return self._sum_paths(self.couple(x, prepared, weights))

    def collect(
        self,
        edge_features: Float[Array, "edges dim_1 channels"],
        edge_harmonics: Float[Array, "edges dim_2"],
        prepared: Any,
        edge_weights: Float[Array, "edges num_weights channels"],
        graph: Graph,
    ) -> Float[Array, "nodes dim_out channels"]:
        """The sum over neighbours of the product of what each edge has with its harmonics.

        ``prepared`` is that of the harmonics; paths are summed.
        """
        return self._sum_paths(
            sum_receivers(self.couple(edge_features, prepared, edge_weights), graph)
        )

    def convolve(
        self,
        node_features: Float[Array, "nodes dim_1 channels"],
        edge_harmonics: Float[Array, "edges dim_2"],
        edge_weights: Float[Array, "edges num_weights channels"],
        graph: Graph,
    ) -> Float[Array, "nodes dim_paths channels"]:
        """The sum over neighbours of ``per_path(sender features, harmonics, weights)``."""
        senders = gather_senders(node_features, graph)
        return sum_receivers(self.per_path(senders, edge_harmonics[..., None], edge_weights), graph)

    def dense(self) -> Float[np.ndarray, "num_weights dim_1 dim_2 dim_out"]:
        """The map evaluated on basis vectors in float64: ``z = sum w x y dense``."""
        return self._on_basis(self)

    def dense_per_path(self) -> Float[np.ndarray, "num_weights dim_1 dim_2 dim_paths"]:
        """Like :meth:`dense`, of :meth:`per_path`."""
        return self._on_basis(self.per_path)

    def dense_at(
        self, y: Float[np.ndarray, " dim_2"]
    ) -> Float[np.ndarray, "num_weights dim_1 dim_paths"]:
        """The map of :meth:`per_path` for one second factor, in float64: ``z = sum w x dense``."""
        dims = (self.num_weights, self.irreps_1.dim)
        places = np.unravel_index(np.arange(np.prod(dims)), dims)
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            w, x = (
                jnp.asarray(np.eye(dim)[place][..., None])
                for dim, place in zip(dims, places, strict=True)
            )
            repeated = jnp.broadcast_to(y[None, :, None], (len(x), len(y), 1))
            found = np.asarray(jax.jit(self.per_path)(x, repeated, w))
        return found.reshape(*dims, -1)

    def select(self, keep: tuple[int, ...]) -> "BoundProduct":
        """The product with some of its weights, in their order; the others as if they were zero.

        Scaled to unit variance again. Raises ``ValueError`` unless ``keep`` holds ascending
        indices of weights, at least one.
        """
        known = range(self.num_weights)
        if not keep or list(keep) != sorted(set(keep)) or not set(keep) <= set(known):
            raise ValueError(
                f"keep is {keep}; expected indices of weights, ascending, each once, at least one, "
                f"below {len(known)}: the product of '{self.irreps_1}' and '{self.irreps_2}' to "
                f"'{self.irreps_out}' has that many weights."
            )
        return self if len(keep) == self.num_weights else self._select(keep)

    def _select(self, keep: tuple[int, ...]) -> "BoundProduct":
        # it builds on this file; products that can leave work out override this method
        from equizoo.tensor_products._selection import BoundSelection

        return BoundSelection(self, keep)

    def _on_basis(self, function: Callable[..., Array]) -> Float[np.ndarray, "w d1 d2 d3"]:
        dims = (self.num_weights, self.irreps_1.dim, self.irreps_2.dim)
        total = int(np.prod(dims))
        batch = min(total, _BASIS_VECTORS)
        evaluate, parts = jax.jit(function), []
        # constants of a product that is bound while a caller is traced are numbers all the same
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            for first in range(0, total, batch):
                places = np.unravel_index(np.arange(first, first + batch) % total, dims)
                w, x, y = (
                    jnp.asarray(np.eye(dim)[place][..., None])
                    for dim, place in zip(dims, places, strict=True)
                )
                parts.append(np.asarray(evaluate(x, y, w)))
        return np.concatenate(parts)[:total].reshape(*dims, -1)

    def _sum_paths(
        self, z: Float[Array, "batch dim_paths channels"]
    ) -> Float[Array, "batch dim_out channels"]:
        """Paths into one irrep summed, divided by the root of their number."""
        # split, not indexing: its transpose is one concatenation
        pieces = jax.lax.split(z, [ir.dim for _, ir in self.irreps_paths], axis=1)
        results = []
        for index, (_, ir) in enumerate(self.irreps_out):
            mine = [piece for piece, i in zip(pieces, self.into, strict=True) if i == index]
            if mine:
                results.append(sum(mine) / float(np.sqrt(len(mine))))
            else:
                results.append(jnp.zeros((z.shape[0], ir.dim, z.shape[2]), z.dtype))
        return jnp.concatenate(results, axis=1)


class BoundPower(abc.ABC):
    """A polynomial map of one argument, equivariant and linear in its weights.

    Every basis polynomial has unit variance for a standard normal argument.
    """

    irreps_in: e3nn.Irreps
    irreps_out: e3nn.Irreps
    order: int
    num_weights: int  # of each irrep of the result, by ascending order: ``weight_slices``
    weight_slices: dict[tuple[int, int], slice]  # (index_out, order) -> place among the weights
    exact: bool = True

    @abc.abstractmethod
    def __call__(
        self,
        x: Float[Array, "blocks nodes dim_in channels"],
        weights: Float[Array, "blocks num_weights channels"],
    ) -> Float[Array, "blocks nodes dim_out channels"]:
        """The weighted sum of the basis polynomials; nodes of a block share their weights."""


def single_copies(irreps: e3nn.Irreps | str) -> e3nn.Irreps:
    """The irreps, after checking that each entry has one copy and is there once."""
    irreps = e3nn.Irreps(irreps)
    if any(mul != 1 for mul, _ in irreps) or len({ir for _, ir in irreps}) != len(irreps):
        raise ValueError(
            f"Expected each irrep once with one copy, as in '0e+1o+2e'; got '{irreps}'. Copies are "
            "channels, the last axis of the arrays."
        )
    return irreps


def natural_irreps(l_max: int) -> e3nn.Irreps:
    """``0e + 1o + 2e + ...``: the parities of spherical harmonics."""
    return e3nn.Irreps([(1, (degree, (-1) ** degree)) for degree in range(l_max + 1)])


def allowed_paths(
    irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps,
    keep: Callable[[Path], bool] = lambda path: True,
) -> tuple[Path, ...]:  # fmt: skip
    """All couplings permitted by angular momentum and parity, sorted by the result.

    Raises ``ValueError`` when there is none.
    """
    paths = tuple(
        path
        for k, (_, ir_out) in enumerate(irreps_out)
        for i, (_, ir_1) in enumerate(irreps_1)
        for j, (_, ir_2) in enumerate(irreps_2)
        if ir_out in ir_1 * ir_2 and keep(path := Path(i, j, k, ir_1, ir_2, ir_out))
    )
    if not paths:
        raise ValueError(f"No path couples '{irreps_1}' and '{irreps_2}' to '{irreps_out}'.")
    return paths


@functools.cache
def wigner_3j(l_1: int, l_2: int, l_3: int) -> Float[np.ndarray, "d1 d2 d3"]:
    """Real Wigner 3j tensor of Frobenius norm one, in float64 (e3nn's axes and signs)."""
    return np.asarray(e3nn.clebsch_gordan(l_1, l_2, l_3), dtype=np.float64)


def coupling(path: Path) -> Float[np.ndarray, "d1 d2 d3"]:
    """``sqrt(2 l_3 + 1)`` times the 3j tensor: unit variance from unit variance."""
    degrees = path.ir_1.l, path.ir_2.l, path.ir_out.l
    return np.sqrt(path.ir_out.dim) * wigner_3j(*degrees)
