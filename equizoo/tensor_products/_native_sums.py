"""Code of sums over neighbours of products, and of their derivatives, for :mod:`native`.

All are derivatives of one number that is linear in features ``h`` of senders, harmonics ``y`` and
weights ``w`` of edges ``e``, and ``g`` of receivers:

.. math:: F = \\sum_e \\sum_{w i j d c} M_{w i j d} \\, h_{s(e) i c} \\, y_{e j} \\, w_{e w c} \\,
    g_{r(e) d c}

``dF/dg`` is the sum over neighbours itself, the others are the gradients that training and forces
ask for, and what training on forces asks for are derivatives of these along a direction. Edges are
in the order of their receivers; those into node ``n`` start at ``starts[n]``. For each edge the
coefficients ``M y`` are computed once for all channels; everything else is along the channels, in
registers. No product of an edge is written to memory.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from equizoo.tensor_products._machine_code import Code, Total


class Coupling(NamedTuple):
    """What takes one component of the features to one of the result."""

    i: int
    d: int
    terms: tuple[tuple[int, float], ...]  # components of the harmonics, and their factors


class Couplings(NamedTuple):
    """The non-zero elements of a product's dense map."""

    dim_1: int
    dim_2: int
    dim_out: int
    by_weight: tuple[tuple[Coupling, ...], ...]

    @classmethod
    def of(
        cls, dense: Float[np.ndarray, "num_weights dim_1 dim_2 dim_out"], smallest: float
    ) -> "Couplings":
        found = []
        for part in dense:
            there = np.abs(part) > smallest
            pairs = sorted((d, i) for i, d in np.argwhere(there.any(axis=1)).tolist())
            found.append(
                tuple(
                    Coupling(i, d, tuple((int(j), float(part[i, j, d])) for j in js))
                    for d, i in pairs
                    for js in [np.flatnonzero(there[i, :, d])]
                )
            )
        dim_1, dim_2, dim_out = dense.shape[1:]
        return cls(dim_1, dim_2, dim_out, tuple(found))

    @property
    def number(self) -> int:
        return sum(map(len, self.by_weight))


class GivenWeights(NamedTuple):
    """An array ``[edges, num_weights, channels]``."""

    number: int

    @property
    def arrays(self) -> tuple[str, ...]:
        return ("weights",)

    def at_edge(self, code: Code, arrays: Mapping[str, str], edge: str) -> "GivenAtEdge":
        start = code.times(edge, self.number * code.channels)
        gradient = arrays.get("d_weights")
        return GivenAtEdge(
            code,
            code.address(arrays["weights"], start),
            None if gradient is None else code.address(gradient, start),
            self.number,
        )


class GivenAtEdge(NamedTuple):
    code: Code
    values: str
    gradients: str | None
    number: int

    def __call__(self, index: int, c: str) -> str:
        start = self.code.address(self.values, index * self.code.channels)
        return self.code.load(self.code.address(start, c))

    def give(self, index: int, c: str, gradient: str) -> None:
        assert self.gradients is not None
        start = self.code.address(self.gradients, index * self.code.channels)
        self.code.store(gradient, self.code.address(start, c))

    def clear(self) -> None:
        if self.gradients is not None:
            self.code.clear(self.gradients, self.number * self.code.channels)

    def finish(self) -> None:
        pass


class TabulatedWeights(NamedTuple):
    """Rows of an array ``[rows, order, num_weights * channels]``, which edges combine with their
    ``powers``; gradients are those of the powers."""

    number: int
    order: int

    @property
    def arrays(self) -> tuple[str, ...]:
        return ("table", "rows", "powers")

    def at_edge(self, code: Code, arrays: Mapping[str, str], edge: str) -> "TabulatedAtEdge":
        row = code.integer(arrays["rows"], edge)
        powers = code.address(arrays["powers"], code.times(edge, self.order))
        gradients = arrays.get("d_powers")
        sums = [] if gradients is None else [arrays[f"sum{k}"] for k in range(self.order)]
        for memory in sums:
            code.store("zeroinitializer", memory)
        size = self.order * self.number * code.channels
        return TabulatedAtEdge(
            code,
            code.address(arrays["table"], code.times(row, size)),
            [code.spread(code.load_scalar(powers, k)) for k in range(self.order)],
            None if gradients is None else code.address(gradients, code.times(edge, self.order)),
            sums,
            self.number,
        )


class TabulatedAtEdge(NamedTuple):
    code: Code
    row: str
    powers: Sequence[str]
    gradients: str | None
    sums: Sequence[str]  # vectors in memory
    number: int

    def _coefficient(self, k: int, index: int, c: str) -> str:
        start = (k * self.number + index) * self.code.channels
        return self.code.load(self.code.address(self.code.address(self.row, start), c))

    def __call__(self, index: int, c: str) -> str:
        total = Total(self.code)
        for k, power in enumerate(self.powers):
            total.add(power, self._coefficient(k, index, c))
        return total.value

    def give(self, index: int, c: str, gradient: str) -> None:
        for k, memory in enumerate(self.sums):
            total = self.code.plus(gradient, self._coefficient(k, index, c), self.code.load(memory))
            self.code.store(total, memory)

    def clear(self) -> None:
        if self.gradients is not None:
            for k in range(len(self.powers)):
                self.code.store_scalar(self.code.number(0.0), self.gradients, k)

    def finish(self) -> None:
        assert self.gradients is not None
        for k, memory in enumerate(self.sums):
            total = self.code.total(self.code.load(memory))
            self.code.store_scalar(total, self.gradients, k)


Weights = GivenWeights | TabulatedWeights


class _Sums:
    """What the functions have in common: the loops, and what an edge has."""

    def __init__(
        self,
        couplings: Couplings,
        weights: Weights,
        dtype: str,
        channels: int,
        operands: Sequence[str],
        results: Sequence[str],
    ):
        self.couplings, self.weights = couplings, weights
        self.operands, self.results = tuple(operands), tuple(results)
        names = [*operands, *results]
        self.code = code = Code(dtype, channels, len(names))
        self.arrays = dict(zip(names, code.pointers, strict=True))

    def scalars(self) -> str:
        """Memory for the coefficients of an edge."""
        return self.code.scratch(self.couplings.number, self.code.scalar)

    def vectors(self, number: int) -> list[str]:
        return [self.code.scratch(1, self.code.vector) for _ in range(number)]

    def rows(self, name: str, index: str, dim: int, part: str | None = None) -> str:
        """Where the row of an array ``[..., dim, channels]`` begins; of that of a part if given."""
        start = index
        if part is not None:
            start = self.code.sum(index, self.code.times(part, self.code.nodes))
        return self.code.address(
            self.arrays[name], self.code.times(start, dim * self.code.channels)
        )

    def load(self, row: str, component: int, c: str) -> str:
        start = self.code.address(row, component * self.code.channels)
        return self.code.load(self.code.address(start, c))

    def store(self, value: str, row: str, component: int, c: str) -> None:
        start = self.code.address(row, component * self.code.channels)
        self.code.store(value, self.code.address(start, c))

    def coefficients(self, harmonics: str, memory: str) -> None:
        """The sums over components of the harmonics, for all couplings."""
        code, place = self.code, 0
        y = [code.load_scalar(harmonics, j) for j in range(self.couplings.dim_2)]
        for couplings in self.couplings.by_weight:
            for coupling in couplings:
                value = code.weighted_sum([(y[j], factor) for j, factor in coupling.terms])
                code.store_scalar(value, memory, place)
                place += 1

    def coefficient(self, memory: str, place: int) -> str:
        return self.code.spread(self.code.load_scalar(memory, place))

    def channels(self, body) -> None:
        self.code.loop(0, self.code.channels, self.code.width, body)

    def function(self) -> tuple[str, int, int]:
        """Its text, and how many operands and results it has."""
        return self.code.finish(), len(self.operands), len(self.results)


def neighbor_sum(
    couplings: Couplings, weights: Weights, dtype: str, channels: int
) -> tuple[str, int, int]:
    """``dF/dg``: operands ``h, y`` and those of the weights, then senders, starts and
    mask."""
    sums = _Sums(
        couplings, weights, dtype, channels,
        ["h", "y", *weights.arrays, "senders", "starts", "mask"], ["out"],
    )  # fmt: skip
    code, memory, dims = sums.code, sums.scalars(), couplings

    def node(n: str) -> None:
        out = sums.rows("out", n, dims.dim_out)
        code.clear(out, dims.dim_out * channels)

        def edge(e: str) -> None:
            sums.coefficients(code.address(sums.arrays["y"], code.times(e, dims.dim_2)), memory)
            h = sums.rows("h", code.integer(sums.arrays["senders"], e), dims.dim_1)
            weight = weights.at_edge(code, sums.arrays, e)

            def at(c: str) -> None:
                features = [sums.load(h, i, c) for i in range(dims.dim_1)]
                place = 0
                for index, mine in enumerate(couplings.by_weight):
                    if not mine:
                        continue
                    totals = {coupling.d: Total(code) for coupling in mine}
                    for coupling in mine:
                        m = sums.coefficient(memory, place)
                        totals[coupling.d].add(m, features[coupling.i])
                        place += 1
                    w = weight(index, c)
                    for d, total in totals.items():
                        sums.store(code.plus(w, total.value, sums.load(out, d, c)), out, d, c)

            sums.channels(at)

        _edges(sums, n, edge, lambda e: None)

    code.loop(code.first_node, code.last_node, 1, node)
    return sums.function()


def gradients(
    couplings: Couplings, weights: Weights, dtype: str, channels: int
) -> tuple[str, int, int]:
    """``dF/dh`` of each part, ``dF/dy`` and that with respect to the weights: operands are those of
    :func:`neighbor_sum` with ``g`` after ``y``."""
    tabulated = isinstance(weights, TabulatedWeights)
    sums = _Sums(
        couplings, weights, dtype, channels,
        ["h", "y", "g", *weights.arrays, "senders", "starts", "mask"],
        ["d_h", "d_y", "d_powers" if tabulated else "d_weights"],
    )  # fmt: skip
    code, memory, dims = sums.code, sums.scalars(), couplings
    d_y_sums = sums.vectors(dims.dim_2)
    if isinstance(weights, TabulatedWeights):
        names = [f"sum{k}" for k in range(weights.order)]
        sums.arrays |= dict(zip(names, sums.vectors(weights.order), strict=True))
    d_h_part = sums.rows("d_h", "0", dims.dim_1, "%part")
    code.clear(d_h_part, code.times(code.nodes, dims.dim_1 * channels))

    def node(n: str) -> None:
        g = sums.rows("g", n, dims.dim_out)

        def edge(e: str) -> None:
            harmonics = code.times(e, dims.dim_2)
            sums.coefficients(code.address(sums.arrays["y"], harmonics), memory)
            sender = code.integer(sums.arrays["senders"], e)
            h, d_h = (
                sums.rows("h", sender, dims.dim_1),
                sums.rows("d_h", sender, dims.dim_1, "%part"),
            )
            weight = weights.at_edge(code, sums.arrays, e)
            for total in d_y_sums:
                code.store("zeroinitializer", total)

            def at(c: str) -> None:
                features = [sums.load(h, i, c) for i in range(dims.dim_1)]
                d_features = [Total(code) for _ in range(dims.dim_1)]
                d_y = [Total(code, code.load(kept)) for kept in d_y_sums]
                place = 0
                for index, mine in enumerate(couplings.by_weight):
                    if not mine:
                        weight.give(index, c, code.vector_of(0.0))
                        continue
                    w, d_w = weight(index, c), Total(code)
                    outer = {d: sums.load(g, d, c) for d in sorted({m.d for m in mine})}
                    for i in sorted({coupling.i for coupling in mine}):
                        weighted, mapped = code.product(w, features[i]), Total(code)
                        for k, coupling in enumerate(mine, place):
                            if coupling.i != i:
                                continue
                            mapped.add(sums.coefficient(memory, k), outer[coupling.d])
                            both = code.product(weighted, outer[coupling.d])
                            for j, factor in coupling.terms:
                                d_y[j].add(both, code.vector_of(factor))
                        d_w.add(mapped.value, features[i])
                        d_features[i].add(mapped.value, w)
                    weight.give(index, c, d_w.value)
                    place += len(mine)
                _add(sums, d_features, d_h, c)
                for total, kept in zip(d_y, d_y_sums, strict=True):
                    code.store(total.value, kept)

            sums.channels(at)
            weight.finish()
            _totals(sums, d_y_sums, harmonics)

        _edges(sums, n, edge, lambda e: _clear(sums, e))

    code.loop(code.first_node, code.last_node, 1, node)
    return sums.function()


def gradients_along(
    couplings: Couplings, weights: GivenWeights, dtype: str, channels: int
) -> tuple[str, int, int]:
    """The derivatives of ``dF/dh`` of each part, ``dF/dy``, ``dF/dw`` and ``dF/dg`` along the
    directions ``t_h, t_y, t_w``: operands ``h, y, g, weights``, these three, senders, starts and
    mask."""
    sums = _Sums(
        couplings, weights, dtype, channels,
        ["h", "y", "g", "weights", "t_h", "t_y", "t_weights", "senders", "starts", "mask"],
        ["d_h", "d_y", "d_weights", "d_g"],
    )  # fmt: skip
    code, memory, along, dims = sums.code, sums.scalars(), sums.scalars(), couplings
    d_y_sums = sums.vectors(dims.dim_2)
    d_h_part = sums.rows("d_h", "0", dims.dim_1, "%part")
    code.clear(d_h_part, code.times(code.nodes, dims.dim_1 * channels))
    directions = {"weights": sums.arrays["t_weights"]}

    def node(n: str) -> None:
        g, d_g = sums.rows("g", n, dims.dim_out), sums.rows("d_g", n, dims.dim_out)
        code.clear(d_g, dims.dim_out * channels)

        def edge(e: str) -> None:
            harmonics = code.times(e, dims.dim_2)
            sums.coefficients(code.address(sums.arrays["y"], harmonics), memory)
            sums.coefficients(code.address(sums.arrays["t_y"], harmonics), along)
            sender = code.integer(sums.arrays["senders"], e)
            h, t_h = sums.rows("h", sender, dims.dim_1), sums.rows("t_h", sender, dims.dim_1)
            d_h = sums.rows("d_h", sender, dims.dim_1, "%part")
            weight = weights.at_edge(code, sums.arrays, e)
            t_weight = weights.at_edge(code, directions, e)
            for total in d_y_sums:
                code.store("zeroinitializer", total)

            def at(c: str) -> None:
                features = [sums.load(h, i, c) for i in range(dims.dim_1)]
                t_features = [sums.load(t_h, i, c) for i in range(dims.dim_1)]
                d_features = [Total(code) for _ in range(dims.dim_1)]
                d_y = [Total(code, code.load(kept)) for kept in d_y_sums]
                place = 0
                for index, mine in enumerate(couplings.by_weight):
                    if not mine:
                        weight.give(index, c, code.vector_of(0.0))
                        continue
                    w, t_w, d_w = weight(index, c), t_weight(index, c), Total(code)
                    ds = sorted({coupling.d for coupling in mine})
                    outer = {d: sums.load(g, d, c) for d in ds}
                    d_outer = {d: Total(code, sums.load(d_g, d, c)) for d in ds}
                    for i in sorted({coupling.i for coupling in mine}):
                        weighted = code.product(w, features[i])
                        t_weighted = code.plus(w, t_features[i], code.product(t_w, features[i]))
                        mapped, t_mapped = Total(code), Total(code)
                        for k, coupling in enumerate(mine, place):
                            if coupling.i != i:
                                continue
                            d = coupling.d
                            m, t_m = sums.coefficient(memory, k), sums.coefficient(along, k)
                            mapped.add(m, outer[d])
                            t_mapped.add(t_m, outer[d])
                            d_outer[d].add(m, t_weighted)
                            d_outer[d].add(t_m, weighted)
                            both = code.product(t_weighted, outer[d])
                            for j, factor in coupling.terms:
                                d_y[j].add(both, code.vector_of(factor))
                        d_w.add(t_mapped.value, features[i])
                        d_w.add(mapped.value, t_features[i])
                        d_features[i].add(t_mapped.value, w)
                        d_features[i].add(mapped.value, t_w)
                    weight.give(index, c, d_w.value)
                    for d, total in d_outer.items():
                        sums.store(total.value, d_g, d, c)
                    place += len(mine)
                _add(sums, d_features, d_h, c)
                for total, kept in zip(d_y, d_y_sums, strict=True):
                    code.store(total.value, kept)

            sums.channels(at)
            _totals(sums, d_y_sums, harmonics)

        _edges(sums, n, edge, lambda e: _clear(sums, e))

    code.loop(code.first_node, code.last_node, 1, node)
    return sums.function()


def _edges(sums: _Sums, n: str, edge, padded) -> None:
    """The edges of a node: ``edge`` for real ones, ``padded`` for the others."""
    code = sums.code
    first, last = (code.integer(sums.arrays["starts"], k) for k in (n, code.sum(n, 1)))

    def either(e: str) -> None:
        code.if_true(sums.arrays["mask"], e, lambda: edge(e), lambda: padded(e))

    code.loop(first, last, 1, either)


def _add(sums: _Sums, totals: Sequence[Total], row: str, c: str) -> None:
    one = sums.code.vector_of(1.0)
    for i, total in enumerate(totals):
        if not total.empty:
            sums.store(sums.code.plus(total.value, one, sums.load(row, i, c)), row, i, c)


def _totals(sums: _Sums, vectors: Sequence[str], start: str) -> None:
    """Sums over channels are the gradients of an edge's harmonics."""
    row = sums.code.address(sums.arrays["d_y"], start)
    for j, memory in enumerate(vectors):
        sums.code.store_scalar(sums.code.total(sums.code.load(memory)), row, j)


def _clear(sums: _Sums, e: str) -> None:
    """Gradients of a padded edge."""
    sums.weights.at_edge(sums.code, sums.arrays, e).clear()
    dim = sums.couplings.dim_2
    row = sums.code.address(sums.arrays["d_y"], sums.code.times(e, dim))
    for j in range(dim):
        sums.code.store_scalar(sums.code.number(0.0), row, j)
