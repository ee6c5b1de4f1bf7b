"""Matrix product: irreps as square matrices, multiplied, and projected back on irreps."""

import dataclasses
import enum
import functools
import math
import warnings
from collections.abc import Sequence

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from sympy.physics import wigner

from equizoo.graph import Graph, gather_senders, sum_receivers
from equizoo.tensor_products._base import (
    BoundPower,
    BoundProduct,
    Path,
    TensorProduct,
    allowed_paths,
    wigner_3j,
)

# More non-zero elements than this are not unrolled unasked: compile time grows with them.
_UNROLLED = 50
# Coefficients of a polynomial, counted with all orders of its factors, of which the variance is
# still summed.
_LARGEST_POLYNOMIAL = 2**24


class Conversion(enum.StrEnum):
    """How irreps become matrices and matrices irreps."""

    AUTO = "auto"  # sparse for small matrices, else dense
    SPARSE = "sparse"  # the non-zero elements, unrolled: O(l^3) operations, long to compile
    DENSE = "dense"  # one product with a constant matrix: O(l^4) operations


@dataclasses.dataclass(frozen=True)
class MatrixProduct(TensorProduct):
    r"""Product of the matrices whose irreps are the factors.

    A matrix of side ``2 degree + 1`` holds each irrep of ``l = 0 ... 2 degree`` once:

    .. math:: X = \sum_{l_1} Q_{l_1} \cdot x_{l_1}, \quad
        Y = \sum_{l_2} w_{l_2} Q_{l_2} \cdot y_{l_2}, \quad
        z_{l_3} = \langle Q_{l_3}, X Y \rangle, \quad
        Q_{l m} = \sqrt{2 l + 1} \begin{pmatrix} \tilde l & \tilde l & l \\ \cdot & \cdot & m
        \end{pmatrix}

    Couplings, even and odd, have the coefficient ``(-1)^l_3 sqrt(d_1 d_2 d_3)
    6j{l_1 l_2 l_3; degree degree degree}``, scaled for unit variance. Some of these symbols vanish
    by accident, as (3, 5, 5) at degree 3: the default is the smallest degree at which none does
    among the couplings of the contents; another choice warns of what it loses. Parities are kept
    apart: even and odd parts multiply as the numbers 1 and -1 do.

    The power has one polynomial for each irrep of the result and order, the projection of ``X^n``.
    A power of true tensors holds true tensors only: the transpose of ``X`` is ``X`` reflected.

    References: Unke and Maennel 2024 (e3x), https://arxiv.org/abs/2401.07595, the fused tensor
    product; Xie et al. 2025 (The Price of Freedom), https://arxiv.org/abs/2506.13523.
    """

    degree: int | None = None
    conversion: Conversion = Conversion.AUTO

    def __post_init__(self):
        Conversion(self.conversion)  # raises for other words

    def _bind(
        self, irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps
    ) -> "BoundMatrixProduct":
        paths = allowed_paths(irreps_1, irreps_2, irreps_out)
        irs = [ir for path in paths for ir in path[3:]]
        degree = self._degree(irs, paths)
        paths = tuple(path for path in paths if _coefficient(path, degree))
        if not paths:
            raise ValueError(
                f"No path couples '{irreps_1}' and '{irreps_2}' to '{irreps_out}' at degree "
                f"{degree}, where their 6j symbols vanish; leave the degree to the default."
            )
        return BoundMatrixProduct(irreps_1, irreps_2, irreps_out, paths, degree, self.conversion)

    def _bind_power(
        self, irreps_in: e3nn.Irreps, irreps_out: e3nn.Irreps, order: int
    ) -> "MatrixPower":
        irs = [ir for _, ir in irreps_in + irreps_out]
        # of the couplings of an argument with itself the odd ones cancel
        pairs = tuple(
            Path(i, j, k, a, b, c)
            for k, (_, c) in enumerate(irreps_out)
            for i, (_, a) in enumerate(irreps_in)
            for j, (_, b) in enumerate(irreps_in)
            if c in a * b and (a.l + b.l + c.l) % 2 == 0
        )
        degree = self._degree(irs, pairs if order > 1 else ())
        return MatrixPower(irreps_in, irreps_out, order, degree, self.conversion)

    def _degree(self, irs: Sequence[e3nn.Irrep], paths: Sequence[Path]) -> int:
        """The degree asked for, or the smallest that loses no path; warns of lost ones."""
        highest = max(irs, key=lambda ir: ir.l)
        least = best = math.ceil(highest.l / 2)
        # 6j symbols are polynomials in the degree, up to a factor without zeros: this ends
        while not all(_coefficient(path, best) for path in paths):
            best += 1
        if self.degree is None:
            return best
        if self.degree < least:
            raise ValueError(
                f"degree is {self.degree}, expected at least {least}: matrices of side 2 degree + 1"
                f" hold l up to 2 degree, and {highest} is coupled."
            )
        lost = [path for path in paths if not _coefficient(path, self.degree)]
        if lost:
            listed = ", ".join(f"{p.ir_1} x {p.ir_2} -> {p.ir_out}" for p in lost)
            warnings.warn(
                f"degree {self.degree} loses {len(lost)} of {len(paths)} couplings, whose 6j "
                f"symbols vanish: {listed}. degree={best} has them all.",
                stacklevel=5,  # the caller of bind
            )
        return self.degree


@functools.cache
def _six_j(degrees: tuple[int, int, int], degree: int) -> float:
    return float(wigner.wigner_6j(*degrees, degree, degree, degree))  # exact until here


def _coefficient(path: Path, degree: int) -> float:
    """Of the coupling in the product of matrices, which keeps lengths; exactly zero if absent."""
    degrees = tuple(sorted((path.ir_1.l, path.ir_2.l, path.ir_out.l)))
    root = math.sqrt(path.ir_1.dim * path.ir_2.dim * path.ir_out.dim)
    return (-1) ** path.ir_out.l * root * _six_j(degrees, degree)


class BoundMatrixProduct(BoundProduct):
    """See :class:`MatrixProduct`; one weight for each irrep of the second factor that couples.

    In ``convolve`` the features are matrices already at nodes and the results become irreps there:
    an edge multiplies two matrices.
    """

    def __init__(
        self,
        irreps_1: e3nn.Irreps,
        irreps_2: e3nn.Irreps,
        irreps_out: e3nn.Irreps,
        paths: tuple[Path, ...],
        degree: int,
        conversion: Conversion,
    ):
        self.irreps_1, self.irreps_2, self.irreps_out = irreps_1, irreps_2, irreps_out
        self.paths, self.degree = paths, degree
        self.into = tuple(sorted({path.index_out for path in paths}))
        self.irreps_paths = e3nn.Irreps([irreps_out[index] for index in self.into])
        used_1, used_2 = {path.index_1 for path in paths}, {path.index_2 for path in paths}
        self._weighted = tuple(sorted(used_2))  # position in irreps_2 of each weight
        self.num_weights = len(used_2)

        parities = {(path.ir_1.p, path.ir_2.p) for path in paths}
        self._matrices = _Matrices(degree, 1 if len(parities) == 1 else 2, conversion)
        self._first = self._matrices.elements(
            irreps_1, [float(index in used_1) for index in range(len(irreps_1))]
        )
        self._second = self._matrices.elements(
            irreps_2, [float(index in used_2) for index in range(len(irreps_2))]
        )
        self._result = self._matrices.elements(self.irreps_paths, self._scales())

    def _scales(self) -> list[float]:
        """One over the standard deviation of each reached irrep: ``1 / sqrt(sum d_1 d_2 6j^2)``."""
        return [
            1 / math.sqrt(
                sum(
                    _coefficient(path, self.degree) ** 2 / path.ir_out.dim
                    for path in self.paths
                    if path.index_out == index
                )
            )
            for index in self.into
        ]  # fmt: skip

    def prepare(
        self, y: Float[Array, "batch dim_2 channels_2"]
    ) -> Float[Array, "batch dim_2 channels_2"] | tuple[Float[Array, "batch side side"], ...]:
        """For one channel the matrix of each irrep that has a weight; else ``y``."""
        if y.shape[2] > 1:
            return y
        slices = self.irreps_2.slices()
        return tuple(
            jnp.einsum(
                "bm,pqm->bpq", y[:, slices[index], 0],
                jnp.asarray(_basis(self.degree, self.irreps_2[index].ir.l), y.dtype),
                precision="highest",
            )
            for index in self._weighted
        )  # fmt: skip

    def couple(
        self,
        x: Float[Array, "batch dim_1 channels"],
        prepared: Float[Array, "batch dim_2 channels_2"]
        | tuple[Float[Array, "batch side side"], ...],
        weights: Float[Array, "batch_w num_weights channels_w"],
    ) -> Float[Array, "batch dim_paths channels"]:
        first = self._matrices.of(self._first, x)
        product = _multiply(first, self._second_matrices(prepared, weights))
        return self._matrices.back(self._result, product)

    def _second_matrices(
        self,
        prepared: Float[Array, "batch dim_2 channels_2"]
        | tuple[Float[Array, "batch side side"], ...],
        weights: Float[Array, "batch_w num_weights channels_w"],
    ) -> Float[Array, "batch sheets side side channels_2"]:
        if not isinstance(prepared, tuple):
            order = {index: weight for weight, index in enumerate(self._weighted)}
            numbers = [order.get(index, 0) for index in range(len(self.irreps_2))]
            repeats = np.repeat(numbers, [ir.dim for _, ir in self.irreps_2])
            return self._matrices.of(self._second, weights[:, repeats] * prepared)
        shape = (*prepared[0].shape, weights.shape[2])
        parts = [jnp.zeros(shape, weights.dtype)] * self._matrices.sheets
        for weight, (index, matrix) in enumerate(zip(self._weighted, prepared, strict=True)):
            sheet = self._matrices.sheet_of(self.irreps_2[index].ir)
            parts[sheet] = parts[sheet] + matrix[..., None] * weights[:, weight][:, None, None]
        return _mirrored(jnp.stack(parts, axis=1))

    def convolve(
        self,
        node_features: Float[Array, "nodes dim_1 channels"],
        edge_harmonics: Float[Array, "edges dim_2"],
        edge_weights: Float[Array, "edges num_weights channels"],
        graph: Graph,
    ) -> Float[Array, "nodes dim_paths channels"]:
        at_edges = gather_senders(self._matrices.of(self._first, node_features), graph)
        second = self._second_matrices(self.prepare(edge_harmonics[..., None]), edge_weights)
        summed = sum_receivers(_multiply(at_edges, second), graph)
        return self._matrices.back(self._result, summed)

    def flops(self, batch: int, channels: int) -> int:
        conversions = (self._first, self._second, self._result)
        per_channel = sum(self._matrices.flops(elements) for elements in conversions)
        side = self._matrices.side
        per_channel += self.irreps_2.dim + self._matrices.sheets * side**2 * (2 * side - 1)
        return int(batch * channels * per_channel)


class MatrixPower(BoundPower):
    r"""Powers of the matrix of ``x``, projected on irreps: one weight for each irrep and order.

    .. math:: z_l = \sum_\nu w_{l \nu} s_{l \nu} \langle Q_l, X^\nu \rangle
    """

    def __init__(
        self,
        irreps_in: e3nn.Irreps,
        irreps_out: e3nn.Irreps,
        order: int,
        degree: int,
        conversion: Conversion,
    ):
        if irreps_in.dim**order > _LARGEST_POLYNOMIAL:
            raise ValueError(
                f"The variance of polynomials of order {order} in '{irreps_in}' is a sum over "
                f"{irreps_in.dim}^{order} terms, expected at most {_LARGEST_POLYNOMIAL}; lower the "
                "order or the degrees."
            )
        self.irreps_in, self.irreps_out, self.order = irreps_in, irreps_out, order
        self.degree = degree
        self._matrices = _Matrices(degree, len({ir.p for _, ir in irreps_in}), conversion)
        self._values = self._matrices.elements(irreps_in, [1.0] * len(irreps_in))
        scales = np.array(
            [
                [_power_scale(irreps_in, ir, nu, degree) for _, ir in irreps_out]
                for nu in range(1, order + 1)
            ]
        )
        self._results = [self._matrices.elements(irreps_out, row.tolist()) for row in scales]
        self.weight_slices, start = {}, 0
        for index, column in enumerate(scales.T):
            for nu, scale in enumerate(column, start=1):
                self.weight_slices[index, nu] = slice(start, start + int(scale > 0))
                start += int(scale > 0)
        self.num_weights = start
        if start == 0:
            raise ValueError(
                f"No polynomial of '{irreps_in}' up to order {order} is '{irreps_out}'."
            )

    def __call__(
        self,
        x: Float[Array, "blocks nodes dim_in channels"],
        weights: Float[Array, "blocks num_weights channels"],
    ) -> Float[Array, "blocks nodes dim_out channels"]:
        blocks, nodes, dim_in, channels = x.shape
        first = power = self._matrices.of(self._values, x.reshape(-1, dim_in, channels))
        result = jnp.zeros((blocks, nodes, self.irreps_out.dim, channels), x.dtype)
        for nu in range(1, self.order + 1):
            power = power if nu == 1 else _multiply(power, first)
            places = [self.weight_slices[index, nu] for index in range(len(self.irreps_out))]
            if any(place.start < place.stop for place in places):
                projected = self._matrices.back(self._results[nu - 1], power)
                # where there is no weight the projection is zero
                numbers = [place.start if place.start < place.stop else 0 for place in places]
                mine = weights[:, np.repeat(numbers, [ir.dim for _, ir in self.irreps_out])]
                result += mine[:, None] * projected.reshape(result.shape)
        return result


def _power_scale(irreps_in: e3nn.Irreps, ir_out: e3nn.Irrep, nu: int, degree: int) -> float:
    r"""One over the root mean square of ``<Q, X^nu>`` for normal components; 0 where that is zero.

    The mean square is exact. With the coefficients ``T`` of the polynomial, symmetric in their
    ``nu`` indices, and ``k`` traces taken over pairs of them (Isserlis),

    .. math:: E[(T \cdot x^\nu)^2] = \sum_k \frac{1}{(\nu - 2k)!}
        \left(\frac{\nu!}{k! \, 2^k}\right)^2 \| \mathrm{tr}^k T \|^2
    """
    matrices = np.concatenate([_basis(degree, ir.l) for _, ir in irreps_in], axis=2)
    parities = np.repeat([ir.p for _, ir in irreps_in], [ir.dim for _, ir in irreps_in])
    partial = _basis(degree, ir_out.l)[:, :, 0]  # all components have the same mean square
    for _ in range(nu - 1):
        partial = np.einsum("...pr,pqa->...aqr", partial, matrices, optimize=True)
    coefficients = np.tensordot(partial, matrices, axes=([-2, -1], [0, 1]))
    parity = functools.reduce(np.multiply.outer, [parities] * nu)
    coefficients = _symmetrized(coefficients * (parity == ir_out.p))
    total = 0.0
    for traces in range(nu // 2 + 1):
        ways = math.factorial(nu) / (math.factorial(traces) * 2**traces)
        total += ways**2 / math.factorial(nu - 2 * traces) * float(np.sum(coefficients**2))
        if nu - 2 * traces >= 2:
            coefficients = np.trace(coefficients, axis1=0, axis2=1)
    return 1 / math.sqrt(total) if total > 1e-10 else 0.0


def _symmetrized(tensor: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """The mean over all orders of the axes, one axis brought in at a time."""
    for last in range(1, tensor.ndim):
        exchanged = [np.swapaxes(tensor, axis, last) for axis in range(last + 1)]
        tensor = functools.reduce(np.add, exchanged) / (last + 1)
    return tensor


class _Matrices:
    """Irreps to matrices and back.

    Where parities mix, matrices have two sheets: ``E + O`` and ``E - O``, for the parts ``E`` of
    even and ``O`` of odd parity. A product on each sheet keeps the parities apart, with two
    products of matrices where the parts need four.
    """

    def __init__(self, degree: int, sheets: int, conversion: Conversion):
        self.degree, self.sheets, self.conversion = degree, sheets, conversion
        self.side = 2 * degree + 1

    def sheet_of(self, ir: e3nn.Irrep) -> int:
        """Where its matrix stands before the sheets are mixed."""
        return 1 if self.sheets == 2 and ir.p == -1 else 0

    def elements(
        self, irreps: e3nn.Irreps, factors: Sequence[float]
    ) -> Float[np.ndarray, "elements dim"]:
        """Matrices of the components (columns), with a factor for each irrep."""
        elements = np.zeros((self.sheets, self.side, self.side, irreps.dim))
        for (_, ir), place, factor in zip(irreps, irreps.slices(), factors, strict=True):
            if factor:
                elements[self.sheet_of(ir), :, :, place] = factor * _basis(self.degree, ir.l)
        return elements.reshape(-1, irreps.dim)

    def of(
        self, elements: Float[np.ndarray, "elements dim"], x: Float[Array, "batch dim channels"]
    ) -> Float[Array, "batch sheets side side channels"]:
        shape = (-1, self.sheets, self.side, self.side, x.shape[2])
        if self._unrolls(elements):
            return _mirrored(_unrolled(elements, x).reshape(shape))
        constants = jnp.asarray(self._mixed(elements), x.dtype)
        return jnp.einsum("ek,bkc->bec", constants, x, precision="highest").reshape(shape)

    def back(
        self,
        elements: Float[np.ndarray, "elements dim"],
        matrices: Float[Array, "batch sheets side side channels"],
    ) -> Float[Array, "batch dim channels"]:
        shape = (len(matrices), len(elements), matrices.shape[4])
        elements = elements / self.sheets
        if self._unrolls(elements):
            return _unrolled(elements.T, _mirrored(matrices).reshape(shape))
        constants = jnp.asarray(self._mixed(elements), matrices.dtype)
        return jnp.einsum("ek,bec->bkc", constants, matrices.reshape(shape), precision="highest")

    def _mixed(
        self, elements: Float[np.ndarray, "elements dim"]
    ) -> Float[np.ndarray, "elements dim"]:
        """:func:`_mirrored` on constants."""
        parts = elements.reshape(self.sheets, -1, elements.shape[1])
        mixed = parts if self.sheets == 1 else np.stack([parts[0] + parts[1], parts[0] - parts[1]])
        return mixed.reshape(elements.shape)

    def flops(self, elements: Float[np.ndarray, "elements dim"]) -> int:
        if self._unrolls(elements):
            return int(2 * np.count_nonzero(elements) + (self.sheets - 1) * len(elements))
        return 2 * elements.size

    def _unrolls(self, elements: Float[np.ndarray, "elements dim"]) -> bool:
        if self.conversion == Conversion.AUTO:
            return bool(np.count_nonzero(elements) <= _UNROLLED)
        return self.conversion == Conversion.SPARSE


def _unrolled(
    constants: Float[np.ndarray, "rows columns"], x: Float[Array, "batch columns channels"]
) -> Float[Array, "batch rows channels"]:
    """The constant matrix on the middle axis, zeros left out."""
    # split, not indexing: its transpose is one concatenation
    components = jax.lax.split(x, [1] * x.shape[1], axis=1)
    zero = jnp.zeros_like(components[0])
    rows = [
        sum((float(row[k]) * components[k] for k in np.flatnonzero(row).tolist()), start=zero)
        for row in constants
    ]
    return jnp.concatenate(rows, axis=1)


@functools.cache
def _basis(degree: int, l_irrep: int) -> Float[np.ndarray, "side side dim"]:
    """Orthonormal matrices that transform as an irrep; symmetric for even ``l``, else skew."""
    return math.sqrt(2 * l_irrep + 1) * wigner_3j(degree, degree, l_irrep)


def _mirrored(
    parts: Float[Array, "batch sheets side side channels"],
) -> Float[Array, "batch sheets side side channels"]:
    """``(E, O)`` to ``(E + O, E - O)``; its own inverse times two."""
    if parts.shape[1] == 1:
        return parts
    even, odd = parts[:, 0], parts[:, 1]
    return jnp.stack([even + odd, even - odd], axis=1)


def _multiply(
    a: Float[Array, "batch sheets side side channels"],
    b: Float[Array, "batch sheets side side channels_b"],
) -> Float[Array, "batch sheets side side channels"]:
    """Products of matrices as sums of columns times rows: element-wise over channels.

    So small, and with the channels last, they are no work for a batched matrix product.
    """
    ones = [1] * a.shape[3]
    columns, rows = jax.lax.split(a, ones, axis=3), jax.lax.split(b, ones, axis=2)
    outer = [column * row for column, row in zip(columns, rows, strict=True)]
    return functools.reduce(jnp.add, outer)
