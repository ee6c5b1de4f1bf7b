"""Products of functions on the sphere through transforms: coefficients to values and back."""

import abc
from collections.abc import Callable, Collection
from typing import NamedTuple

import e3nn_jax as e3nn
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float, Int

from equizoo.graph import Graph, gather_senders, sum_receivers
from equizoo.tensor_products._base import BoundPower, BoundProduct, allowed_paths, wigner_3j
from equizoo.tensor_products._pointwise import gaussian_moments
from equizoo.tensor_products._signals import chirality, is_even, weights_of
from equizoo.tensor_products._sphere import harmonics


class Degrees(NamedTuple):
    """The highest degrees of the factors, of their product, and of what is wanted of it."""

    factors: int
    product: int
    result: int


class Transform(abc.ABC):
    r"""Between coefficients of functions on the sphere and their values at points.

    Made for :class:`Degrees`: ``to_values`` of the factors, multiplied point by point, give
    ``to_coefficients`` the exact coefficients of the product. Those of

    .. math:: f = \sum_{l, m \ge 0} \Theta_{l m}(\theta)
        \left( c_{l m} \cos m \phi + s_{l m} \sin m \phi \right)

    are packed as ``[(c, s), l, m]``: the harmonics of e3nn, whose polar axis is y.
    """

    points: int

    @abc.abstractmethod
    def to_values(
        self, packed: Float[Array, "*batch 2 degrees orders"]
    ) -> Float[Array, "*batch latitudes longitudes"]: ...

    @abc.abstractmethod
    def to_coefficients(
        self, values: Float[Array, "*batch latitudes longitudes"]
    ) -> Float[Array, "*batch 2 degrees orders"]:
        """Up to the degree of the result."""

    @abc.abstractmethod
    def flops(self, l_max: int) -> tuple[int, int]:
        """Multiplications and additions: to values from degree ``l_max``, to coefficients."""


def pack(
    x: Float[Array, "*batch dim"], irreps: e3nn.Irreps, keep: Collection[int]
) -> Float[Array, "*batch 2 degrees orders"]:
    """Coefficients of the function that the irreps with index in ``keep`` add up to."""
    size = 1 + max(irreps[index].ir.l for index in keep)
    shape = (2, size, size)
    packed = []
    # a true and a pseudo-tensor of the same degree have the same place
    for sign in (1, -1):
        source = np.full(shape, irreps.dim)  # beyond the end: zero
        for index in keep:
            degree, parity = irreps[index].ir.l, irreps[index].ir.p
            if parity * (-1) ** degree == sign:
                source[_places(degree)] = np.arange(irreps.dim)[irreps.slices()[index]]
        if (source < irreps.dim).any():
            packed.append(x.at[..., source].get(mode="fill", fill_value=0))
    return sum(packed[1:], packed[0])


def unpack(
    packed: Float[Array, "*batch 2 degrees orders"], irreps: e3nn.Irreps
) -> Float[Array, "*batch dim"]:
    """The components of each irrep, which ``pack`` adds up."""
    places = np.concatenate([np.stack(_places(ir.l)) for _, ir in irreps], axis=1)
    flat = packed.reshape(*packed.shape[:-3], -1)
    return flat[..., np.ravel_multi_index(tuple(places), packed.shape[-3:])]


def _places(degree: int) -> tuple[Int[np.ndarray, " dim"], ...]:
    """Where the components of an irrep are packed: sines of order ``-m``, cosines of ``m``."""
    m = np.arange(-degree, degree + 1)
    return (m < 0).astype(int), np.full_like(m, degree), np.abs(m)


class BoundTransformed(BoundProduct):
    r"""Product of two functions on the sphere, the Gaunt product, by a transform ``T``.

    .. math:: z = S \, T^{-1} \left[ (T x) \odot (T (w \cdot y)) \right]

    There is one weight for each irrep of ``y`` that is coupled. Transforms are linear: in
    ``convolve`` those of ``x`` and ``z`` act on nodes, and edges multiply values at points.
    Pseudo-tensors, where coupled, double the functions: they change sign in the second copy, and
    results are told apart by their symmetry under the exchange of copies.
    """

    def __init__(
        self,
        irreps_1: e3nn.Irreps,
        irreps_2: e3nn.Irreps,
        irreps_out: e3nn.Irreps,
        transform: Callable[[Degrees], Transform],
    ):
        self.irreps_1, self.irreps_2, self.irreps_out = irreps_1, irreps_2, irreps_out
        self.paths = allowed_paths(irreps_1, irreps_2, irreps_out, keep=is_even)
        self.into = tuple(sorted({path.index_out for path in self.paths}))
        self.irreps_paths = e3nn.Irreps([irreps_out[index] for index in self.into])
        self._weights = weights_of(irreps_2, self.paths)
        self._used_1 = sorted({path.index_1 for path in self.paths})
        self._used_2 = sorted({path.index_2 for path in self.paths})
        self.num_weights = len(self._used_2)

        self._degrees = max(p.ir_1.l for p in self.paths), max(p.ir_2.l for p in self.paths)
        self._transform = transform(
            Degrees(max(self._degrees), sum(self._degrees), max(p.ir_out.l for p in self.paths))
        )
        copies = _copies((irreps_1, self._used_1), (irreps_2, self._used_2))
        self._signs_1, self._signs_2 = (_signs(i, copies) for i in (irreps_1, irreps_2))
        deviations = np.sqrt([self._variance(index) for index in self.into])
        deviations = np.repeat(deviations, [ir.dim for _, ir in self.irreps_paths])
        self._fold = _signs(self.irreps_paths, copies) / copies / deviations

    def _variance(self, index: int) -> float:
        """Of each component of an irrep of the result, before it is scaled.

        The sum of squares of the coefficients of its paths, over its dimension.
        """
        total = 0.0
        for path in self.paths:
            if path.index_out == index:
                l_1, l_2, l_3 = path.ir_1.l, path.ir_2.l, path.ir_out.l
                at_zero = wigner_3j(l_1, l_2, l_3)[l_1, l_2, l_3]  # all orders zero
                total += path.ir_1.dim * path.ir_2.dim * at_zero**2
        return total

    def prepare(
        self, y: Float[Array, "batch dim_2 channels_2"]
    ) -> Float[Array, "batch dim_2 channels_2"] | Float[Array, "batch copies num_weights _ _"]:
        """For one channel the values of each irrep of ``y`` at the points; else ``y``."""
        if y.shape[2] > 1:
            return y
        member = np.repeat(
            [[index == used for index in range(len(self.irreps_2))] for used in self._used_2],
            [ir.dim for _, ir in self.irreps_2], axis=1,
        )  # fmt: skip
        return self._values_2(y * jnp.asarray(member.T[None], y.dtype))

    def couple(
        self,
        x: Float[Array, "batch dim_1 channels"],
        prepared: Float[Array, "batch dim_2 channels_2"]
        | Float[Array, "batch copies num_weights _ _"],
        weights: Float[Array, "batch_w num_weights channels_w"],
    ) -> Float[Array, "batch dim_paths channels"]:
        return self._project(self._values_1(x) * self._weighted_2(prepared, weights))

    def convolve(
        self,
        node_features: Float[Array, "nodes dim_1 channels"],
        edge_harmonics: Float[Array, "edges dim_2"],
        edge_weights: Float[Array, "edges num_weights channels"],
        graph: Graph,
    ) -> Float[Array, "nodes dim_paths channels"]:
        senders = gather_senders(self._values_1(node_features), graph)
        filters = self._weighted_2(self.prepare(edge_harmonics[..., None]), edge_weights)
        return self._project(sum_receivers(senders * filters, graph))

    def _values_1(
        self, x: Float[Array, "batch dim_1 channels"]
    ) -> Float[Array, "batch copies channels _ _"]:
        return _values(self._transform, x, self.irreps_1, self._used_1, self._signs_1)

    def _values_2(
        self, y: Float[Array, "batch dim_2 channels"]
    ) -> Float[Array, "batch copies channels _ _"]:
        return _values(self._transform, y, self.irreps_2, self._used_2, self._signs_2)

    def _weighted_2(
        self,
        prepared: Float[Array, "batch dim_2 channels_2"]
        | Float[Array, "batch copies num_weights _ _"],
        weights: Float[Array, "batch_w num_weights channels_w"],
    ) -> Float[Array, "batch copies channels _ _"]:
        if prepared.ndim == 5:  # values of each irrep of one channel
            terms = [
                prepared[:, :, w, None] * weights[:, None, w, :, None, None]
                for w in range(self.num_weights)
            ]
            return sum(terms[1:], terms[0])
        index = np.repeat(
            [0 if w is None else w for w in self._weights], [ir.dim for _, ir in self.irreps_2]
        )
        return self._values_2(weights[:, index] * prepared)

    def _project(
        self, values: Float[Array, "batch copies channels _ _"]
    ) -> Float[Array, "batch dim_paths channels"]:
        return _coefficients(self._transform, values, self.irreps_paths, self._fold)

    def flops(self, batch: int, channels: int) -> int:
        (first, back), (second, _) = (self._transform.flops(l_max) for l_max in self._degrees)
        per_copy = first + second + self._transform.points + back
        return batch * channels * (len(self._fold) * per_copy + self.irreps_2.dim)


class BoundTransformedPower(BoundPower):
    r"""Powers of a function on the sphere, one weight for each order and irrep of the result.

    .. math:: z_l = \sum_\nu w_{l \nu} s_{l \nu} \left[ T^{-1} (T x)^\nu \right]_l
    """

    def __init__(
        self,
        irreps_in: e3nn.Irreps,
        irreps_out: e3nn.Irreps,
        order: int,
        transform: Callable[[Degrees], Transform],
    ):
        self.irreps_in, self.irreps_out, self.order = irreps_in, irreps_out, order
        self._used = range(len(irreps_in))
        copies = _copies((irreps_in, self._used))
        self._signs, self._fold = _signs(irreps_in, copies), _signs(irreps_out, copies) / copies
        l_in, l_out = (max(ir.l for _, ir in irreps) for irreps in (irreps_in, irreps_out))
        self._transform = transform(Degrees(l_in, order * l_in, l_out))
        self.weight_slices, self._scales = {}, {}
        variances = _variances_of_powers(irreps_in, irreps_out, order, copies)
        start = 0
        for key, variance in sorted(variances.items()):
            count = int(variance > 1e-10)
            self.weight_slices[key] = slice(start, start + count)
            self._scales[key] = float(1 / np.sqrt(variance)) if count else 0.0
            start += count
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
        x = x.reshape(blocks * nodes, dim_in, channels)
        powers = [_values(self._transform, x, self.irreps_in, self._used, self._signs)]
        for _ in range(self.order - 1):
            powers.append(powers[-1] * powers[0])
        z = _coefficients(
            self._transform, jnp.concatenate(powers, axis=2), self.irreps_out, self._fold
        )
        z = z.reshape(blocks, nodes, -1, self.order, channels)
        results = []
        for index, place in enumerate(self.irreps_out.slices()):
            result = jnp.zeros_like(z[:, :, place, 0])
            for nu in range(1, self.order + 1):
                mine = weights[:, None, self.weight_slices[index, nu]]
                if mine.shape[2]:
                    result += self._scales[index, nu] * mine * z[:, :, place, nu - 1]
            results.append(result)
        return jnp.concatenate(results, axis=2)


def _values(transform, x, irreps, used, signs) -> Float[Array, "batch copies channels _ _"]:
    x = jnp.swapaxes(x, 1, 2)[:, None] * jnp.asarray(signs[None, :, None], x.dtype)
    return transform.to_values(pack(x, irreps, used))


def _coefficients(transform, values, irreps, fold) -> Float[Array, "batch dim channels"]:
    z = unpack(transform.to_coefficients(values), irreps)
    z = jnp.sum(z * jnp.asarray(fold[None, :, None], z.dtype), axis=1)
    return jnp.swapaxes(z, 1, 2)


def _copies(*contents: tuple[e3nn.Irreps, Collection[int]]) -> int:
    """Two where pseudo-tensors are among the irreps that are used."""
    used = [irreps[index] for irreps, indices in contents for index in indices]
    return 2 if (chirality(e3nn.Irreps(sorted(set(used)))) < 0).any() else 1


def _signs(irreps: e3nn.Irreps, copies: int) -> Float[np.ndarray, "copies dim"]:
    return np.stack([np.ones(irreps.dim), chirality(irreps).astype(float)])[:copies]


def _variances_of_powers(
    irreps_in: e3nn.Irreps, irreps_out: e3nn.Irreps, order: int, copies: int
) -> dict[tuple[int, int], float]:
    r"""Variance of each irrep of each power ``f^\nu``, for a standard normal argument.

    .. math:: \frac{1}{2} \int_{-1}^1 E[f^\nu(\hat e) f^\nu(\hat r)] P_l(t) \, dt,
        \quad t = \hat e \cdot \hat r

    exactly, by Gauss-Legendre: the expectation is a polynomial in ``t``.
    """
    l_in, l_out = (max(ir.l for _, ir in irreps) for irreps in (irreps_in, irreps_out))
    heights, weights = np.polynomial.legendre.leggauss((order * l_in + l_out) // 2 + 1)
    heights = np.append(1.0, heights)  # the pole first
    points = np.stack([np.sqrt(1 - heights**2), heights, 0 * heights], axis=1)
    values = harmonics(irreps_in, points)
    values = np.concatenate([values * sign for sign in _signs(irreps_in, copies)])
    variances = {}
    for nu in range(1, order + 1):
        moments = gaussian_moments(values @ values.T, nu)[0].reshape(copies, -1)[:, 1:]
        for index, (_, ir) in enumerate(irreps_out):
            legendre = scipy.special.eval_legendre(ir.l, heights[1:])
            sign = ir.p * (-1) ** ir.l
            same, *other = moments @ (legendre * weights / 2)
            crossed = other[0] if other else same
            variances[index, nu] = float(same + sign * crossed) / 2
    return variances
