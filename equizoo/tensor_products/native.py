"""Any product, with sums over neighbours in machine code made for it, on the CPU."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from equizoo.graph import Graph
from equizoo.registry import TENSOR_PRODUCTS
from equizoo.tensor_products import _native_sums as code
from equizoo.tensor_products._base import BoundProduct, TensorProduct
from equizoo.tensor_products._machine_code import available, num_parts, registered, require_llvm

_ZERO = 1e-10  # of a coupling; the maps have unit variance
_MOST = 1000  # couplings of components in one function: the time to make it grows with them


@dataclasses.dataclass(frozen=True)
class Native(TensorProduct):
    """Another product, equal to rounding, with ``convolve`` as one function for all its steps.

    XLA writes weighted features and their derivatives for every edge to memory and multiplies many
    small matrices; here an edge's harmonics, weights and features meet in registers, and only sums
    over neighbours are written. All derivatives are such functions, or made of them.

    Where it does not apply the other product does it: without llvmlite, on other devices than the
    CPU, for types other than float32 and float64, and for products with too many couplings or of
    special harmonics. Derivatives are those of reverse mode.
    """

    product: TensorProduct = dataclasses.field(
        default_factory=lambda: TENSOR_PRODUCTS["clebsch_gordan"]()
    )

    @classmethod
    def made_for(cls, product: TensorProduct) -> "Native":
        """Of a product, or itself; ``ValueError`` on a CPU without llvmlite."""
        require_llvm()
        return product if isinstance(product, cls) else cls(product)

    def _bind(
        self, irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps
    ) -> "BoundNative":
        return BoundNative(self.product.bind(irreps_1, irreps_2, irreps_out))

    def _bind_power(self, irreps_in: e3nn.Irreps, irreps_out: e3nn.Irreps, order: int) -> Any:
        return self.product.bind_power(irreps_in, irreps_out, order)


class BoundNative(BoundProduct):
    """See :class:`Native`."""

    def __init__(self, product: BoundProduct):
        self._product = product
        self.irreps_1, self.irreps_2 = product.irreps_1, product.irreps_2
        self.irreps_out, self.irreps_paths = product.irreps_out, product.irreps_paths
        self.into, self.paths = product.into, product.paths
        self.num_weights = product.num_weights
        self.exact, self.defect = product.exact, product.defect
        self.on_harmonics = product.on_harmonics

    def _select(self, keep: tuple[int, ...]) -> "BoundNative":
        return BoundNative(self._product.select(keep))

    def prepare(self, y: Float[Array, "batch dim_2 channels_2"]) -> Any:
        return self._product.prepare(y)

    def couple(
        self,
        x: Float[Array, "batch dim_1 channels"],
        prepared: Any,
        weights: Float[Array, "batch_w num_weights channels_w"],
    ) -> Float[Array, "batch dim_paths channels"]:
        return self._product.couple(x, prepared, weights)

    def __call__(
        self,
        x: Float[Array, "batch dim_1 channels"],
        y: Float[Array, "batch dim_2 channels_2"],
        weights: Float[Array, "batch_w num_weights channels_w"],
    ) -> Float[Array, "batch dim_out channels"]:
        return self._product(x, y, weights)

    def collect(
        self,
        edge_features: Float[Array, "edges dim_1 channels"],
        edge_harmonics: Float[Array, "edges dim_2"],
        prepared: Any,
        edge_weights: Float[Array, "edges num_weights channels"],
        graph: Graph,
    ) -> Float[Array, "nodes dim_out channels"]:
        return self._product.collect(edge_features, edge_harmonics, prepared, edge_weights, graph)

    def flops(self, batch: int, channels: int) -> int:
        return self._product.flops(batch, channels)

    def convolve(
        self,
        node_features: Float[Array, "nodes dim_1 channels"],
        edge_harmonics: Float[Array, "edges dim_2"],
        edge_weights: Float[Array, "edges num_weights channels"],
        graph: Graph,
    ) -> Float[Array, "nodes dim_paths channels"]:
        arrays = node_features, edge_harmonics, edge_weights
        if not self.applies(graph, *arrays):
            return self._product.convolve(*arrays, graph)
        return self._functions.neighbor_sum(*arrays, _edges(graph))

    def convolve_tabulated(
        self,
        node_features: Float[Array, "nodes dim_1 channels"],
        edge_harmonics: Float[Array, "edges dim_2"],
        table: Float[Array, "rows order weights"],
        rows: Int[Array, " edges"],
        powers: Float[Array, "edges order"],
        graph: Graph,
    ) -> Float[Array, "nodes dim_paths channels"]:
        r"""``convolve`` with weights ``\sum_k powers[e, k] table[rows[e], k]``, which are in no
        memory either; the table is taken as constant. Only where :meth:`applies`."""
        return self._functions.tabulated_sum(
            node_features, edge_harmonics, powers, table, rows, _edges(graph)
        )

    def applies(self, graph: Graph, *arrays: Float[Array, "..."]) -> bool:
        """Whether there is machine code for these arguments; else ``convolve`` is the product's."""
        kinds = {x.dtype.name for x in arrays}
        return (
            available()
            and graph.num_edges > 0
            and kinds in ({"float32"}, {"float64"})
            and self._couplings is not None
        )

    @functools.cached_property
    def _couplings(self) -> code.Couplings | None:
        """``None`` where they are no tensor, or too many."""
        if self.on_harmonics:
            return None
        found = code.Couplings.of(self._product.dense_per_path(), _ZERO)
        return found if found.number <= _MOST else None

    @functools.cached_property
    def _functions(self) -> "_Functions":
        assert self._couplings is not None, "applies() says so"
        return _Functions(self._couplings)


class _Edges(NamedTuple):
    """Whole numbers and truth values, which have no derivatives."""

    senders: Int[Array, " edges"]
    starts: Int[Array, " nodes_plus_1"]
    mask: Bool[Array, " edges"]


def _edges(graph: Graph) -> _Edges:
    nodes = jnp.arange(graph.num_nodes + 1, dtype=jnp.int32)
    if graph.slots is None:
        starts = jnp.searchsorted(graph.receivers, nodes).astype(jnp.int32)
    else:
        starts = nodes * graph.slots
    return _Edges(graph.senders.astype(jnp.int32), starts, graph.edge_mask)


class _Functions:
    """Functions of features ``h``, harmonics ``y`` and weights ``w``, with derivatives; ``g`` is a
    cotangent of the sums. All take the edges after them."""

    def __init__(self, couplings: code.Couplings):
        self._couplings = couplings
        self._given = code.GivenWeights(len(couplings.by_weight))
        self.neighbor_sum = _with_gradient(self._sum, self._of_sum)
        self.gradients = _with_gradient(self._gradients, self._of_gradients)
        self.gradients_along = _with_gradient(self._along, self._of_along)
        self.tabulated_sum = _with_gradient(self._tabulated, self._of_tabulated)

    def _sum(self, h, y, w, edges):
        return self._call(code.neighbor_sum, self._given, h, [self._out(h)], h, y, w, *edges)[0]

    def _of_sum(self, h, y, w, edges, g):
        return self.gradients(h, y, w, g, edges)

    def _gradients(self, h, y, w, g, edges):
        shapes = (num_parts(), *h.shape), y.shape, w.shape
        found = self._call(code.gradients, self._given, h, shapes, h, y, g, w, *edges)
        return found[0].sum(0), *found[1:]

    def _of_gradients(self, h, y, w, g, edges, t):
        # second derivatives are symmetric
        return self.gradients_along(h, y, w, g, *t, edges)

    def _along(self, h, y, w, g, t_h, t_y, t_w, edges):
        shapes = (num_parts(), *h.shape), y.shape, w.shape, g.shape
        operands = h, y, g, w, t_h, t_y, t_w, *edges
        found = self._call(code.gradients_along, self._given, h, shapes, *operands)
        return found[0].sum(0), *found[1:]

    def _of_along(self, h, y, w, g, t_h, t_y, t_w, edges, cotangents):
        """Third derivatives, by functions that have all: rare, and not made for speed."""

        def by_parts(h, y, w, g, t_h, t_y, t_w):
            _, y_1, w_1 = self.gradients(t_h, y, w, g, edges)
            h_2, _, w_2 = self.gradients(h, t_y, w, g, edges)
            h_3, y_3, _ = self.gradients(h, y, t_w, g, edges)
            ways = (t_h, y, w), (h, t_y, w), (h, y, t_w)
            return h_2 + h_3, y_1 + y_3, w_1 + w_2, sum(self.neighbor_sum(*x, edges) for x in ways)

        return jax.vjp(by_parts, h, y, w, g, t_h, t_y, t_w)[1](cotangents)

    def _tabulated(self, h, y, p, table, rows, edges):
        operands = h, y, table, rows, p, *edges
        return self._call(code.neighbor_sum, self._weights_of(p), h, [self._out(h)], *operands)[0]

    def _of_tabulated(self, h, y, p, table, rows, edges, g):
        shapes = (num_parts(), *h.shape), y.shape, p.shape
        operands = h, y, g, table, rows, p, *edges
        found = self._call(code.gradients, self._weights_of(p), h, shapes, *operands)
        return found[0].sum(0), *found[1:], jnp.zeros_like(table)

    def _weights_of(self, powers):
        return code.TabulatedWeights(self._given.number, powers.shape[1])

    def _out(self, h):
        return len(h), self._couplings.dim_out, h.shape[2]

    def _call(self, function, weights, h, shapes, *operands):
        text, *numbers = function(self._couplings, weights, h.dtype.name, h.shape[2])
        name = registered(text, *numbers, num_parts())
        results = tuple(jax.ShapeDtypeStruct(shape, h.dtype) for shape in shapes)
        return jax.ffi.ffi_call(name, results, vmap_method="sequential")(*operands)


def _with_gradient(
    function: Callable[..., Any], gradient: Callable[..., tuple[Array, ...]]
) -> Callable[..., Any]:
    """``gradient`` takes the arguments and a cotangent, and returns those of the first arguments;
    the others are whole numbers, which have none."""

    def backward(arguments, cotangent):
        found = gradient(*arguments, cotangent)
        return *found, *([None] * (len(arguments) - len(found)))

    with_gradient = jax.custom_vjp(function)
    with_gradient.defvjp(lambda *arguments: (with_gradient(*arguments), arguments), backward)
    return with_gradient
