"""Products of other libraries as functions that compute what ours compute, each in its own layout.

Arguments are converted before anything is timed and results after. What a peer computes is compared
with the product of ours that it names before it is timed.
"""

import dataclasses
import enum
import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from equizoo import __version__
from equizoo.config import to_dict
from equizoo.eval.benchmark_timing import installed_version, numerics
from equizoo.registry import TENSOR_PRODUCTS
from equizoo.tensor_products._base import BoundProduct, TensorProduct


class Comparison(enum.StrEnum):
    """What is computed, ``x`` always with many channels."""

    EDGE = "edge"  # y with one channel, paths kept apart
    EDGE_WEIGHTED = "edge-weighted"  # the same, times a weight for each item, path and channel
    CHANNELWISE = "channelwise"  # y with as many channels, paths kept apart
    CHANNELWISE_SUMMED = "channelwise-summed"  # the same, weighted (per channel) and summed
    CONVOLVE = "convolve"  # edge-weighted between the neighbours of a structure, summed on nodes

    @property
    def weighted(self) -> bool:
        return self not in (Comparison.EDGE, Comparison.CHANNELWISE)


class Edges(NamedTuple):
    """The edges of a structure, sorted by receiver."""

    senders: Int[np.ndarray, " edges"]
    receivers: Int[np.ndarray, " edges"]


class Problem(NamedTuple):
    """What all compute: the same irreps for both factors and the result, paths as in ``bound``."""

    comparison: Comparison
    bound: BoundProduct  # Clebsch-Gordan, a weight for each path
    x: Float[np.ndarray, "nodes dim channels"]
    y: Float[np.ndarray, "items dim channels_2"]
    weights: Float[np.ndarray, "items_w paths channels"] | None
    edges: Edges | None  # of a convolution

    @property
    def irreps(self) -> e3nn.Irreps:
        return self.bound.irreps_1

    @property
    def channels(self) -> int:
        return self.x.shape[2]

    @property
    def arguments(self) -> tuple[np.ndarray, ...]:
        given = (self.x, self.y, self.weights)
        return tuple(a for a in given if a is not None)

    @property
    def constants(self) -> tuple[Any, ...]:
        return () if self.edges is None else (self.edges,)


def _clebsch_gordan() -> TensorProduct:
    return TENSOR_PRODUCTS["clebsch_gordan"]()


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A function to be timed, its arguments, and how its result becomes one of ours.

    Its map is that of ``same_as``, a product of ours.
    """

    library: str
    name: str
    function: Callable[..., Any]  # of ``arguments`` and then ``constants``
    arguments: tuple[Any, ...]
    constants: tuple[Any, ...] = ()
    to_ours: Callable[[np.ndarray], np.ndarray] = lambda z: z
    options: str = ""
    same_as: TensorProduct = dataclasses.field(default_factory=_clebsch_gordan)
    weights: Float[np.ndarray, "items_w weights channels"] | None = None  # not the problem's


class Absent(NamedTuple):
    """What cannot take part, and why."""

    library: str
    name: str
    reason: str


def peers(problem: Problem) -> list[Candidate | Absent]:
    """What other libraries offer for the problem."""
    found: list[Candidate | Absent] = []
    for library, adapters in _ADAPTERS.items():
        if problem.comparison not in adapters:
            continue
        try:
            with numerics("float32"):
                found.extend(adapters[problem.comparison](problem))
        except ImportError as error:
            reason = f"{library} cannot be imported: {error}; install equizoo[peers]"
            found.append(Absent(library, "", reason))
    return found


def library_version(library: str) -> str:
    """The version of the library with this import name, or nothing."""
    return __version__ if library == "equizoo" else installed_version(library)


# ---- e3nn-jax: [..., channels of a degree, components], a flat last axis -----------------------


def _e3nn_edge(problem: Problem) -> list[Candidate]:
    wide, keep = problem.channels * problem.irreps, [ir for _, ir in problem.irreps]

    def product(x, y, *weights):
        z = e3nn.tensor_product(
            e3nn.IrrepsArray(wide, x), e3nn.IrrepsArray(problem.irreps, y), filter_ir_out=keep
        )
        return (z * weights[0] if weights else z).array

    return [_e3nn_candidate(problem, "tensor_product", product)]


def _e3nn_convolve(problem: Problem) -> list[Candidate]:
    wide, keep = problem.channels * problem.irreps, [ir for _, ir in problem.irreps]
    num_nodes = len(problem.x)

    def convolve(x, y, weights, edges):
        senders = e3nn.IrrepsArray(wide, x[edges.senders])
        messages = e3nn.tensor_product(
            senders, e3nn.IrrepsArray(problem.irreps, y), filter_ir_out=keep
        )
        return jax.ops.segment_sum(
            (messages * weights).array, edges.receivers, num_nodes, indices_are_sorted=True
        )

    return [_e3nn_candidate(problem, "gather, product, segment_sum", convolve)]


def _e3nn_candidate(problem: Problem, name: str, function: Callable[..., Any]) -> Candidate:
    wide, keep = problem.channels * problem.irreps, [ir for _, ir in problem.irreps]
    results = e3nn.tensor_product(wide, problem.irreps, filter_ir_out=keep)
    weights = () if problem.weights is None else (_flat(problem.weights),)
    return Candidate(
        "e3nn_jax",
        name,
        function,
        (_to_mul_ir(problem.x, problem.irreps), problem.y[:, :, 0], *weights),
        problem.constants,
        lambda z: _from_mul_ir(z, results, problem.channels),
    )


def _e3nn_channelwise(problem: Problem) -> list[Candidate]:
    irreps, channels = problem.irreps, problem.channels
    keep = [ir for _, ir in irreps]
    pairs = sorted({(path.index_1, path.index_2) for path in problem.bound.paths})
    repeated = [e3nn.Irreps([(channels, irreps[p[side]].ir) for p in pairs]) for side in (0, 1)]
    results = e3nn.elementwise_tensor_product(*repeated, filter_ir_out=keep)

    def elementwise(x, y):
        sides = []
        for side, values in enumerate((x, y)):
            chunks = e3nn.IrrepsArray(channels * irreps, values).chunks
            mine = [chunks[pair[side]] for pair in pairs]
            sides.append(e3nn.from_chunks(repeated[side], mine, x.shape[:-1], x.dtype))
        return e3nn.elementwise_tensor_product(*sides, filter_ir_out=keep).array

    def by_channel(x, y):
        x, y = e3nn.IrrepsArray(irreps, x), e3nn.IrrepsArray(irreps, y)
        return e3nn.tensor_product(x, y, filter_ir_out=keep).array

    arguments = tuple(_to_mul_ir(values, irreps) for values in (problem.x, problem.y))
    swapped = tuple(np.swapaxes(values, 1, 2) for values in (problem.x, problem.y))
    return [
        Candidate(
            "e3nn_jax",
            "elementwise_tensor_product",
            elementwise,
            arguments,
            to_ours=lambda z: _from_mul_ir(z, results, channels),
        ),
        Candidate(
            "e3nn_jax",
            "tensor_product by channel",
            by_channel,
            swapped,
            to_ours=lambda z: np.swapaxes(z, 1, 2),
        ),
    ]


def _to_mul_ir(
    x: Float[np.ndarray, "items dim channels"], irreps: e3nn.Irreps
) -> Float[np.ndarray, "items flat"]:
    return np.concatenate([_flat(np.swapaxes(x[:, s], 1, 2)) for s in irreps.slices()], axis=1)


def _from_mul_ir(
    z: Float[np.ndarray, "items flat"], irreps: e3nn.Irreps, channels: int
) -> Float[np.ndarray, "items dim channels"]:
    """Every ``channels`` copies are one entry of the result; entries sorted by irrep."""
    entries = []
    for (copies, ir), place in zip(irreps, irreps.slices(), strict=True):
        values = z[:, place].reshape(len(z), copies // channels, channels, ir.dim)
        entries += [(ir, np.swapaxes(values[:, k], 1, 2)) for k in range(values.shape[1])]
    entries.sort(key=lambda entry: entry[0])
    return np.concatenate([values for _, values in entries], axis=1)


# ---- cuEquivariance: [..., components, channels], a flat last axis -----------------------------


def _cue_edge(problem: Problem) -> list[Candidate]:
    import cuequivariance as cue

    sides = _cue_irreps(problem, problem.channels), _cue_irreps(problem, 1)
    if problem.weights is None:
        whole = cue.descriptors.full_tensor_product(*sides, sides[1])
    else:
        whole = cue.descriptors.channelwise_tensor_product(*sides, sides[1])
    return [_cue_candidate(problem, whole.polynomial)]


def _cue_channelwise(problem: Problem) -> list[Candidate]:
    import cuequivariance as cue

    channels, irreps = problem.channels, _cue_irreps(problem, 1)
    product = cue.SegmentedTensorProduct.from_subscripts("iu,ju,ku+ijk")
    for operand in (0, 1):
        for _, ir in irreps:
            product.add_segment(operand, (ir.dim, channels))
    for path in problem.bound.paths:
        irs = [irreps[i].ir for i in (path.index_1, path.index_2, path.index_out)]
        (coupling,) = cue.clebsch_gordan(*irs)
        product.add_path(path.index_1, path.index_2, None, c=coupling)
    product = product.normalize_paths_for_operand(-1)
    return [_cue_candidate(problem, cue.SegmentedPolynomial.eval_last_operand(product))]


def _cue_irreps(problem: Problem, channels: int) -> Any:
    import cuequivariance as cue

    return cue.Irreps("O3", "+".join(f"{channels}x{ir}" for _, ir in problem.irreps))


def _cue_candidate(problem: Problem, polynomial: Any) -> Candidate:
    import cuequivariance_jax as cuex

    method = "naive"
    if jax.default_backend() == "gpu" and importlib.util.find_spec("cuequivariance_ops_jax"):
        method = "uniform_1d"
    rows = len(problem.x if problem.edges is not None else problem.y)

    def evaluate(x, y, *rest):
        weights = [] if problem.weights is None else [rest[0]]
        inputs = [*weights, x, y]
        indices = None
        if problem.edges is not None:
            edges = rest[-1]
            indices = [None, edges.senders, None, edges.receivers]
        shape = jax.ShapeDtypeStruct((rows, polynomial.outputs[0].size), x.dtype)
        return cuex.segmented_polynomial(polynomial, inputs, [shape], indices, method=method)[0]

    return Candidate(
        "cuequivariance_jax",
        "segmented_polynomial",
        evaluate,
        tuple(_flat(values) for values in problem.arguments),
        problem.constants,
        lambda z: z.reshape(len(z), -1, problem.channels),
        options=f"method={method}",
    )


# ---- e3j: [..., components, channels] as ours --------------------------------------------------


def _e3j_product(problem: Problem) -> list[Candidate]:
    from e3j.core.scalar_mixing import ScalarMixing
    from e3j.core.tensor_product import TensorProduct as E3jProduct

    one = str(problem.irreps)
    edge = problem.comparison != Comparison.CHANNELWISE
    product = E3jProduct(
        (one, one),
        one,
        layout="TRAILING_CHANNELS",
        mode="OUTER" if edge else "MAP",
        normalization="SQRT_DIM_OUT",
    )
    mixing = ScalarMixing(product.target, layout="TRAILING_CHANNELS")

    def evaluate(x, y, *weights):
        z = product(x, y)
        return mixing(weights[0], z) if weights else z

    y = problem.y[:, :, 0] if edge else problem.y
    weights = () if problem.weights is None else (problem.weights,)
    return [_e3j_candidate("TensorProduct", evaluate, (problem.x, y, *weights))]


def _e3j_convolve(problem: Problem) -> list[Candidate]:
    from e3j.core.convolution import Convolution
    from e3j.spaces import O3Space

    one = O3Space(str(problem.irreps))
    convolution = Convolution(
        (one, one), one, graph_ordering="RECEIVER", layout="TRAILING_CHANNELS"
    )

    def convolve(x, y, weights, edges):
        return convolution(x, y, weights, edges.senders, edges.receivers)

    assert problem.weights is not None  # of a convolution
    arguments = (problem.x, problem.y[:, :, 0], problem.weights)
    return [_e3j_candidate("Convolution", convolve, arguments, problem.constants)]


def _e3j_candidate(
    name: str, function: Callable[..., Any], arguments: tuple, constants: tuple = ()
) -> Candidate:
    import e3j

    state = e3j.config.state()
    way = state.convolution if name == "Convolution" else state.tensor_product
    return Candidate(
        "e3j",
        name,
        function,
        arguments,
        constants,
        options=f"method={way.value}",
    )


# ---- e3x: [..., parities, components, channels], other axes ------------------------------------


def _e3x_summed(problem: Problem) -> list[Candidate]:
    arguments = tuple(
        np.einsum("bdc,de->bec", values, _e3x_axes(problem.irreps.lmax))[:, None].astype(
            values.dtype
        )
        for values in (problem.x, problem.y)
    )

    def to_ours(z):
        return np.einsum("bec,de->bdc", z[:, 0], _e3x_axes(problem.irreps.lmax))

    shared = dict(library="e3x", arguments=arguments, to_ours=to_ours)
    return [_e3x_tensor(problem, shared), _e3x_fused(problem, shared)]


def _e3x_tensor(problem: Problem, shared: dict[str, Any]) -> Candidate:
    import e3x

    top, paths = problem.irreps.lmax, problem.bound.paths
    module = e3x.nn.Tensor(max_degree=top, include_pseudotensors=False)
    into = [path.index_out for path in paths]
    scales = np.array([[1 / np.sqrt(into.count(index))] for index in into], np.float32)
    places = tuple(np.array([p[:3] for p in paths]).T)

    def tensor(x, y, weights):
        shape = (top + 1, top + 1, top + 1, weights.shape[2])
        kernel = jnp.zeros(shape, x.dtype).at[places].set(weights[0] * scales.astype(x.dtype))
        kernel = kernel[None, :, None, :, None, :, :]
        return module.apply({"params": {"kernel": kernel}}, x, y)

    arguments = (*shared["arguments"], problem.weights)
    return Candidate(
        name="nn.Tensor", function=tensor, **shared | {"arguments": arguments},
    )  # fmt: skip


def _e3x_fused(problem: Problem, shared: dict[str, Any]) -> Candidate:
    """With scales of the result such that it equals ours, which is normalised otherwise."""
    import e3x

    top, channels = problem.irreps.lmax, problem.channels
    module = e3x.nn.FusedTensor(max_degree=top, include_pseudotensors=False)
    ours = TENSOR_PRODUCTS["matrix_product"]()

    def fused(x, y, weights, scales):
        first, second = jnp.ones((top + 1, x.shape[-1]), x.dtype), weights[0]
        result = jnp.broadcast_to(scales[:, None].astype(x.dtype), first.shape)
        kernels = {f"kernel_{name}1": first for name in "eo"}
        kernels |= {f"kernel_{name}2": second for name in "eo"}
        kernels |= {f"kernel_{name}": result for name in ("eee", "ooe", "eoo", "oeo")}
        return module.apply({"params": kernels}, x, y)

    rng = np.random.default_rng(1)
    weights = rng.normal(size=(1, top + 1, channels)).astype(problem.x.dtype)
    arguments = (*shared["arguments"], weights)
    few = (problem.x[:8], problem.y[:8], weights)
    x, y = (values[:8] for values in shared["arguments"])
    theirs = shared["to_ours"](np.asarray(fused(x, y, weights, np.ones(top + 1))))
    expected = np.asarray(ours.bind(*3 * (problem.irreps,))(*map(jnp.asarray, few)))
    scales = np.array(
        [
            np.sum(theirs[:, s] * expected[:, s]) / np.sum(theirs[:, s] ** 2)
            for s in problem.irreps.slices()
        ]
    )
    return Candidate(
        name="nn.FusedTensor", function=fused, constants=(scales,), same_as=ours,
        weights=weights, **shared | {"arguments": arguments},
    )  # fmt: skip


@functools.cache
def _e3x_axes(l_max: int) -> Float[np.ndarray, "dim dim"]:
    """``Y_e3x = Y_e3nn @ axes``, orthogonal: other polar axis, fitted on random directions."""
    import e3x

    points = np.random.default_rng(0).normal(size=(8 * (l_max + 1) ** 2, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    irreps = e3nn.Irreps.spherical_harmonics(l_max)
    with numerics("float64"):
        theirs = np.asarray(e3x.so3.spherical_harmonics(jnp.asarray(points), l_max))
        mine = e3nn.spherical_harmonics(
            irreps, jnp.asarray(points), normalize=True, normalization="norm"
        ).array
    axes = np.zeros((irreps.dim, irreps.dim))
    for place in irreps.slices():
        fitted = np.linalg.lstsq(np.asarray(mine)[:, place], theirs[:, place])[0]
        axes[place, place] = fitted
    return axes


def _flat(values: Float[np.ndarray, "items a b"]) -> Float[np.ndarray, "items ab"]:
    return values.reshape(len(values), -1)


_ADAPTERS: dict[str, dict[Comparison, Callable[[Problem], list[Candidate]]]] = {
    "e3nn_jax": {
        Comparison.EDGE: _e3nn_edge,
        Comparison.EDGE_WEIGHTED: _e3nn_edge,
        Comparison.CHANNELWISE: _e3nn_channelwise,
        Comparison.CONVOLVE: _e3nn_convolve,
    },
    "cuequivariance_jax": {
        Comparison.EDGE: _cue_edge,
        Comparison.EDGE_WEIGHTED: _cue_edge,
        Comparison.CHANNELWISE: _cue_channelwise,
        Comparison.CONVOLVE: _cue_edge,
    },
    "e3x": {Comparison.CHANNELWISE_SUMMED: _e3x_summed},
    "e3j": {
        Comparison.EDGE: _e3j_product,
        Comparison.EDGE_WEIGHTED: _e3j_product,
        Comparison.CHANNELWISE: _e3j_product,
        Comparison.CONVOLVE: _e3j_convolve,
    },
}


def options_of(product: TensorProduct) -> str:
    """The options of a product of ours, as ``name=value`` with commas; nothing for none."""
    fields = {key: value for key, value in to_dict(product).items() if key != "name"}
    return ", ".join(f"{key}={value}" for key, value in fields.items())
