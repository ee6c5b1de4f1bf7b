"""Clebsch-Gordan product by whichever equal implementation was measured fastest."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path as File
from typing import Any, Literal, NamedTuple

import e3nn_jax as e3nn
import jax
from jaxtyping import Array, Float

from equizoo.device import device_name
from equizoo.graph import Graph
from equizoo.registry import TENSOR_PRODUCTS
from equizoo.tensor_products._base import BoundPower, BoundProduct, TensorProduct

Operation = Literal["edge", "channelwise", "convolve"]
TABLE = File(__file__).with_name("auto_table.json")

# Equal maps with equal weights. SO2 reads a direction from its argument, so it may only stand in
# where that is promised: in ``convolve``.
CANDIDATES: dict[Operation, tuple[str, ...]] = {
    "edge": ("clebsch_gordan", "clebsch_gordan_dense"),
    "channelwise": ("clebsch_gordan", "clebsch_gordan_dense"),
    "convolve": ("clebsch_gordan", "clebsch_gordan_dense", "so2"),
}


class Choice(NamedTuple):
    """A measured row: the fastest product for an operation of this degree and size."""

    backend: str  # of JAX
    device: str
    operation: Operation
    l_max: int
    size: int  # batch entries, or edges
    product: str  # name in TENSOR_PRODUCTS


@dataclasses.dataclass(frozen=True)
class Auto(TensorProduct):
    """The Clebsch-Gordan product, evaluated by one of several implementations of the same map.

    Chosen while tracing from operation, highest degree and size: the nearest row of a table that
    was measured on this backend, on the same device if the table has it, else ``ClebschGordan``.
    ``equizoo benchmark tensor-products --protocol auto --out DIR`` measures
    ``DIR/auto_table.json``. Only implementations with the same weights and the same result to
    rounding are candidates, never a less expressive one; nothing is measured while a model runs,
    so that a choice is the same in every run.
    """

    table: str | None = None  # JSON file with rows instead of the package's
    product: TensorProduct | None = None  # this one, whatever the table says

    def __post_init__(self):
        names = sorted(set().union(*CANDIDATES.values()))
        if self.product is None:
            return
        name = TENSOR_PRODUCTS.name_of(self.product)
        if name not in names or self.product != TENSOR_PRODUCTS[name]():
            raise ValueError(
                f"{self.product} is not the same map as ClebschGordan; expected one of "
                f"{', '.join(names)} with default options. Use it as the tensor product itself."
            )

    def _bind(
        self, irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps
    ) -> "BoundAuto":
        return BoundAuto(self, irreps_1, irreps_2, irreps_out)

    def _bind_power(
        self, irreps_in: e3nn.Irreps, irreps_out: e3nn.Irreps, order: int
    ) -> BoundPower:
        product = TENSOR_PRODUCTS["clebsch_gordan"]()
        return product.bind_power(irreps_in, irreps_out, order)


class BoundAuto(BoundProduct):
    """See :class:`Auto`."""

    def __init__(
        self, options: Auto, irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps
    ):
        self._options = options
        self._default = TENSOR_PRODUCTS["clebsch_gordan"]().bind(irreps_1, irreps_2, irreps_out)
        self.irreps_1, self.irreps_2, self.irreps_out = irreps_1, irreps_2, irreps_out
        self.irreps_paths, self.into = self._default.irreps_paths, self._default.into
        self.paths, self.num_weights = self._default.paths, self._default.num_weights

    def chosen(self, operation: Operation, size: int) -> BoundProduct:
        """The implementation for an operation on ``size`` batch entries or edges."""
        contents = self.irreps_1, self.irreps_2, self.irreps_out
        if self._options.product is not None:
            name = TENSOR_PRODUCTS.name_of(self._options.product)
            product = self._options.product if name in CANDIDATES[operation] else None
        else:
            l_max = max(ir.l for irreps in contents for _, ir in irreps)
            name = choose(operation, l_max, size, self._options.table)
            product = TENSOR_PRODUCTS[name]()
        if product is None:
            return self._default
        try:
            return product.bind(*contents)
        except ValueError:  # a content that this implementation does not take
            return self._default

    def prepare(self, y: Float[Array, "batch dim_2 channels_2"]) -> Any:
        operation: Operation = "edge" if y.shape[2] == 1 else "channelwise"
        return self.chosen(operation, y.shape[0]).prepare(y)

    def couple(
        self,
        x: Float[Array, "batch dim_1 channels"],
        prepared: Any,
        weights: Float[Array, "batch_w num_weights channels_w"],
    ) -> Float[Array, "batch dim_paths channels"]:
        several = isinstance(prepared, jax.Array) and prepared.shape[2] > 1
        operation: Operation = "channelwise" if several else "edge"
        return self.chosen(operation, x.shape[0]).couple(x, prepared, weights)

    def convolve(
        self,
        node_features: Float[Array, "nodes dim_1 channels"],
        edge_harmonics: Float[Array, "edges dim_2"],
        edge_weights: Float[Array, "edges num_weights channels"],
        graph: Graph,
    ) -> Float[Array, "nodes dim_paths channels"]:
        product = self.chosen("convolve", graph.num_edges)
        return product.convolve(node_features, edge_harmonics, edge_weights, graph)

    def flops(self, batch: int, channels: int) -> int:
        return self._default.flops(batch, channels)


def choose(operation: Operation, l_max: int, size: int, table: str | None = None) -> str:
    """The product in the nearest row: same operation, then degree, then size (by ratio)."""
    rows = [row for row in _rows(table) if row.operation == operation]
    rows = [row for row in rows if row.backend == jax.default_backend()]
    rows = [row for row in rows if row.device == device_name()] or rows
    if not rows:
        return "clebsch_gordan"
    return min(
        rows, key=lambda row: (abs(row.l_max - l_max), abs(math.log(row.size / max(size, 1))))
    ).product


def read_table(path: File) -> tuple[Choice, ...]:
    """The rows of a file; ``ValueError`` for one that is not an equal map."""
    rows = tuple(Choice(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"])
    for row in rows:
        if row.product not in CANDIDATES.get(row.operation, ()):
            raise ValueError(
                f"{path}: {row.product!r} cannot stand in for ClebschGordan in "
                f"{row.operation!r}; expected one of {CANDIDATES}."
            )
    return rows


def write_table(rows: Iterable[Choice], path: File) -> None:
    """Rows as :func:`read_table` reads them, in a fixed order."""
    lines = (json.dumps(row._asdict()) for row in sorted(rows))
    path.write_text('{"rows": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")


@functools.cache
def _rows(table: str | None) -> tuple[Choice, ...]:
    return read_table(File(table) if table else TABLE)
