"""What tensor products cost on this machine: a sweep of ours, and ours beside other libraries'.

Every point gives one :class:`Row`; one that was not measured says why. ``benchmarks/README.md`` has
the protocol.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from ase.build import bulk
from jaxtyping import Array, Float

from equizoo.compile_cache import uncached
from equizoo.eval.benchmark_peers import (
    Absent,
    Candidate,
    Comparison,
    Edges,
    Problem,
    library_version,
    options_of,
    peers,
)
from equizoo.eval.benchmark_rows import Row, read_rows, write_rows
from equizoo.eval.benchmark_timing import (
    Environment,
    Program,
    Timing,
    compile_program,
    environment,
    numerics,
    time_in_turns,
)
from equizoo.graph import Budget, Graph, batch_frames, edge_vectors, make_frame
from equizoo.layers.harmonics import spherical_harmonics
from equizoo.registry import TENSOR_PRODUCTS
from equizoo.structure import Structure
from equizoo.tensor_products._base import (
    BoundProduct,
    TensorProduct,
    allowed_paths,
    bind_reached,
    natural_irreps,
    wigner_3j,
)
from equizoo.tensor_products.analysis import expressivity

MODES = ("SISO", "SIMO", "MIMO")
FORWARD, BACKWARD = DIRECTIONS = ("forward", "forward+backward")
# Two results are of one map if they differ by less, relative to their root mean square: in float32
# by rounding in sums of hundreds of terms, in float64 by that of the arguments, which are float32.
SAME_IN_SINGLE, SAME_IN_DOUBLE = 1e-4, 1e-5
_LARGEST_MAP = 2**25  # elements of a dense map of which the expressivity is measured
_COMPARED = 8  # batch entries and channels of which the rounding error is taken


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long and how large a point may be, and how often it is repeated."""

    seconds: float = 0.5  # of timing, unless ``repeats`` says otherwise
    repeats: tuple[int, int] = (10, 100)
    time: float = 60.0  # [s] to bind, to compile, or to call ``repeats[0]`` times
    memory: float = 8.0  # [GB] of arguments, results and temporaries

    def refuse(
        self, bytes: int | float = 0, seconds: float = 0, calls: float = 0, what: str = "compiling"
    ) -> str:
        """Why a point is not measured, if it is not."""
        if bytes > 1e9 * self.memory:
            return f"needs {bytes / 1e9:.3g} GB, limit {self.memory:g}"
        if seconds > self.time:
            return f"{what} takes {seconds:.3g} s, limit {self.time:g}"
        if calls * self.repeats[0] > self.time:
            return f"one call takes {calls:.3g} s, limit {self.time:g} for {self.repeats[0]}"
        return ""


def run(
    plan: "Sweep | SideBySide", folder: str | Path, report: Callable[[Row], None] = lambda row: None
) -> tuple[Path, list[Row]]:
    """The CSV file in ``folder``, and all its rows: those that it had and those of the plan.

    A row is written before the next point is measured, and a point that the file has from the same
    environment is not measured again.
    """
    file = Path(folder) / plan.file_name
    measured = read_rows(file) if file.exists() else []

    def reported() -> Iterator[Row]:
        for row in plan.run(measured):
            report(row)
            yield row

    with uncached():
        write_rows(reported(), file)
    return file, read_rows(file)


# ---- ours over sizes ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Products over sizes, after the protocol of the paper.

    - ``SISO``: one irrep of degree ``l_max`` in both factors and in the result;
    - ``SIMO``: the same factors, all degrees to ``2 l_max`` in the result;
    - ``MIMO``: all degrees to ``l_max`` in both factors, all to ``2 l_max`` in the result.

    The paper's irreps have no parity. Either the parities of harmonics or even ones throughout give
    the same couplings: each product gets those for which it states fewer operations. Results that a
    product does not reach are left out, paths kept as separate as the product has them. The second
    factor are harmonics of random directions, which every product takes; all entries of a batch
    share the weights.

    Reference: Xie et al. 2025 (The Price of Freedom), https://arxiv.org/abs/2506.13523, section 5.
    """

    file_name: ClassVar = "tensor_products_sweep.csv"

    variants: tuple[str, ...] = ()  # all
    modes: tuple[str, ...] = MODES
    l_max: tuple[int, ...] = tuple(range(1, 11))
    channels: tuple[int, ...] = (16,)
    batch: tuple[int, ...] = (625,)  # with 16 channels ten thousand products, as in the paper
    dtype: Literal["float32", "float64"] = "float32"
    limits: Limits = Limits()

    def __post_init__(self):
        _check_variants(self.variants)

    def run(self, measured: Iterable[Row] = ()) -> Iterator[Row]:
        """The points, but for those that are among ``measured``."""
        known = {row.point for row in measured}
        place = environment()._asdict()
        names = self.variants or tuple(TENSOR_PRODUCTS)
        for mode, channels, batch in itertools.product(self.modes, self.channels, self.batch):
            stopped: dict[tuple[str, str], str] = {}  # why, by variant and direction
            for l_max, name, direction in itertools.product(sorted(self.l_max), names, DIRECTIONS):
                product = TENSOR_PRODUCTS[name]()
                row = Row(
                    **place, library_version=place["equizoo"], variant=name, map=name,
                    options=options_of(product), mode=mode, l_max=l_max, channels=channels,
                    channels_2=channels, batch=batch, dtype=self.dtype, direction=direction,
                )  # fmt: skip
                if row.point in known:
                    continue
                reason = stopped.get((name, direction)) or stopped.get((name, FORWARD))
                if reason:
                    yield row.replace(skipped=reason)
                    continue
                row, beyond = self._measure(row, product)
                if beyond:
                    stopped[name, direction] = f"l_max={l_max} {direction}: {beyond}"
                yield row

    def _measure(self, row: Row, product: TensorProduct) -> tuple[Row, str]:
        """The row, and a reason not to try larger ones."""
        try:
            bound, bind_s = _bind(product, row.mode, row.l_max)
        except ValueError as error:
            return row.replace(skipped=_first_line(error)), ""
        row = row.replace(
            irreps_1=str(bound.irreps_1), irreps_2=str(bound.irreps_2),
            irreps_out=str(bound.irreps_out), couplings=len(bound.paths),
            num_weights=bound.num_weights, bind_s=bind_s,
        )  # fmt: skip
        results = row.batch * bound.irreps_paths.dim * row.channels * np.dtype(row.dtype).itemsize
        reason = self.limits.refuse(results, bind_s, what="binding")
        if reason:
            return row.replace(skipped=reason), reason
        arguments = _arguments(bound, row)
        row = row.replace(weights=_shape(arguments[2]))
        try:
            program, timing, reason = self._time(bound, arguments, row)
        except jax.errors.JaxRuntimeError as error:  # out of memory, above all
            reason = _first_line(error)
            return row.replace(skipped=reason), reason
        if timing is None:
            return row.compiled(program).replace(skipped=reason), reason
        row = row.timed(program, timing)
        units = _expressivity(bound)
        if units:
            row = row.replace(
                expressivity=units, us_per_expressivity=1e3 * timing.median_ms / units
            )
        if row.direction == BACKWARD:
            return row, ""
        flops = bound.flops(row.batch, row.channels)
        return row.replace(
            flops=flops,
            gflop_per_s=1e-6 * flops / timing.median_ms,
            max_error=_rounding_error(bound, arguments, np.asarray(program.run())),
        ), ""

    def _time(
        self, bound: BoundProduct, arguments: tuple[np.ndarray, ...], row: Row
    ) -> tuple[Program, Timing | None, str]:
        with numerics(row.dtype):
            backward = row.direction == BACKWARD
            program = compile_program(bound.per_path, arguments, backward=backward)
            reason = self.limits.refuse(program.memory, program.compile_s)
            reason = reason or self.limits.refuse(calls=_seconds_of_a_call(program))
            if reason:
                return program, None, reason
            (timing,) = time_in_turns([program.run], self.limits.seconds, self.limits.repeats)
            return program, timing, ""


def _bind(product: TensorProduct, mode: str, l_max: int) -> tuple[BoundProduct, float]:
    """The cheaper of two labellings, and the seconds it took to bind."""
    found, problems = [], []
    for contents in _contents(mode, l_max):
        try:
            found.append(_bind_reached(product, *contents))
        except ValueError as error:
            problems.append(error)
    if not found:
        raise problems[0]
    return min(found, key=lambda pair: pair[0].flops(16, 16))


@functools.cache
def _bind_reached(
    product: TensorProduct, irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps
) -> tuple[BoundProduct, float]:
    """With what the product reaches of the result; Wigner symbols, shared by all, not timed."""
    paths = allowed_paths(irreps_1, irreps_2, irreps_out)
    for path in paths:
        wigner_3j(path.ir_1.l, path.ir_2.l, path.ir_out.l)
    reached = {path.index_out for path in paths}
    irreps_out = e3nn.Irreps([irreps_out[index] for index in sorted(reached)])
    seconds = 0.0

    def bind(results: e3nn.Irreps) -> BoundProduct:
        nonlocal seconds
        start = time.perf_counter()
        bound = product._bind(irreps_1, irreps_2, results)  # product.bind would keep it
        seconds = time.perf_counter() - start
        return bound

    return bind_reached(bind, irreps_out), seconds


def _contents(mode: str, l_max: int) -> list[tuple[e3nn.Irreps, e3nn.Irreps, e3nn.Irreps]]:
    """Both factors and the result of a mode: with the parities of harmonics, and all even."""
    inputs = range(l_max + 1) if mode == "MIMO" else [l_max]
    results = [l_max] if mode == "SISO" else range(2 * l_max + 1)
    natural = e3nn.Irreps([(1, (degree, (-1) ** degree)) for degree in inputs])
    even = e3nn.Irreps([(1, (degree, 1)) for degree in inputs])
    both = e3nn.Irreps([(1, (degree, parity)) for degree in results for parity in (1, -1)])
    return [
        (natural, natural, both),
        (even, even, e3nn.Irreps([(1, (degree, 1)) for degree in results])),
    ]


def _arguments(bound: BoundProduct, row: Row) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``x``, ``y`` and weights, the same at every call."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(row.batch, bound.irreps_1.dim, row.channels))
    y = _harmonics(tuple(ir.l for _, ir in bound.irreps_2), row.batch, row.channels_2)
    weights = np.random.default_rng(1).normal(size=(1, bound.num_weights, row.channels))
    first, second, third = (values.astype(row.dtype) for values in (x, y, weights))
    return first, second, third


@functools.lru_cache(maxsize=2)
def _harmonics(
    degrees: tuple[int, ...], batch: int, channels: int
) -> Float[np.ndarray, "batch dim channels"]:
    """Of random directions, in float64."""
    directions = np.random.default_rng(2).normal(size=(batch * channels, 3))
    irreps = e3nn.Irreps([(1, (degree, (-1) ** degree)) for degree in degrees])
    with numerics("float64"):
        values = np.asarray(spherical_harmonics(irreps, jnp.asarray(directions)))
    return np.swapaxes(values.reshape(batch, channels, -1), 1, 2)


def _expressivity(bound: BoundProduct) -> int | None:
    """Not measured for large maps, unless each weight is that of one coupling."""
    if bound.num_weights == len(bound.paths) == len(bound.irreps_paths):
        return len(bound.paths)
    dims = (bound.irreps_1.dim, bound.irreps_2.dim, bound.irreps_out.dim)
    return expressivity(bound) if bound.num_weights * np.prod(dims) <= _LARGEST_MAP else None


def _rounding_error(
    bound: BoundProduct, arguments: Sequence[np.ndarray], result: np.ndarray
) -> float:
    """Of the first entries and channels against the same product in float64."""
    x, y, weights = map(_few, arguments)
    with numerics("float64"):
        expected = bound.per_path(*map(jnp.asarray, (x[:_COMPARED], y[:_COMPARED], weights)))
    return _difference(result[:_COMPARED, :, :_COMPARED], np.asarray(expected))


# ---- ours and others' --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """Ours and other libraries' in turns, on equal arguments in float32: see :class:`Comparison`.

    Both factors and the result have the irreps of harmonics to ``l_max``. The structure of the
    convolution is silicon with every second atom carbon, ``cells`` cubic cells along each axis,
    cutoff 5 Å: 216 atoms and about 6,000 edges for 3.
    """

    comparisons: tuple[str, ...] = tuple(Comparison)
    variants: tuple[str, ...] = ()  # all
    l_max: tuple[int, ...] = (1, 2, 3, 4)
    channels: tuple[int, ...] = (64,)
    batch: tuple[int, ...] = (1000,)
    cells: int = 3
    with_peers: bool = True
    limits: Limits = Limits(seconds=1.0)
    file_name: str = "tensor_products_sidebyside.csv"

    def __post_init__(self):
        _check_variants(self.variants)

    def run(self, measured: Iterable[Row] = ()) -> Iterator[Row]:
        """The points, but for those that are among ``measured``."""
        known = {row.point for row in measured}
        place = environment()
        for comparison in map(Comparison, self.comparisons):
            # a structure has as many edges as it has
            batches = self.batch[:1] if comparison is Comparison.CONVOLVE else self.batch
            for size in itertools.product(sorted(self.l_max), self.channels, batches):
                match = _Match(*_problem(comparison, *size, self.cells), place, self.limits)
                others = peers(match.problem) if self.with_peers else []
                for row in match.play(match.ours(self.variants) + others, known):
                    if row.point not in known:
                        yield row


@dataclasses.dataclass
class _Match:
    """One problem and all that solve it."""

    problem: Problem
    graph: Graph | None
    place: Environment
    limits: Limits

    def ours(self, variants: tuple[str, ...]) -> list[Candidate | Absent]:
        found: list[Candidate | Absent] = []
        for name in variants or tuple(TENSOR_PRODUCTS):
            product = TENSOR_PRODUCTS[name]()
            try:
                bound = product.bind(*3 * (self.problem.irreps,))
            except ValueError as error:
                found.append(Absent("equizoo", name, _first_line(error)))
            else:
                weights = _weights_for(self.problem, bound)
                found.append(_our_candidate(product, bound, self.problem, self.graph, weights))
        return found

    def play(self, candidates: Sequence[Candidate | Absent], known: set) -> Iterator[Row]:
        """Checked one by one, then timed in turns: forward all of them, then all backward."""
        forward, backward = [], []
        for candidate in candidates:
            row = self._row(candidate)
            if {row.replace(direction=d).point for d in DIRECTIONS} <= known:
                continue
            if isinstance(candidate, Absent):
                row = row.replace(skipped=candidate.reason)
            else:
                row, program = self._check(row, candidate)
                if program is not None:
                    forward.append((row, program))
                    backward.append((row, candidate))
                    continue
            for direction in DIRECTIONS:
                yield row.replace(direction=direction)
        yield from self._in_turns(forward)
        programs = []
        for row, candidate in backward:
            row, program = self._compile(
                row.replace(direction=BACKWARD, max_error=None), candidate, backward=True
            )
            if program is None:
                yield row
            else:
                programs.append((row, program))
        yield from self._in_turns(programs)

    def _row(self, candidate: Candidate | Absent) -> Row:
        problem, library = self.problem, candidate.library
        row = Row(
            **self.place._asdict(), library=library, variant=candidate.name, dtype="float32",
            library_version=library_version(library),
            mode=str(problem.comparison), l_max=problem.irreps.lmax,
            irreps_1=str(problem.irreps), irreps_2=str(problem.irreps),
            irreps_out=str(problem.irreps), channels=problem.channels,
            channels_2=problem.y.shape[2], batch=len(problem.y),
            nodes=None if problem.edges is None else len(problem.x), direction=FORWARD,
        )  # fmt: skip
        if isinstance(candidate, Absent):
            return row
        bound = candidate.same_as.bind(*3 * (problem.irreps,))
        weights = problem.weights if candidate.weights is None else candidate.weights
        return row.replace(
            options=candidate.options, map=TENSOR_PRODUCTS.name_of(candidate.same_as),
            couplings=len(bound.paths), num_weights=bound.num_weights,
            weights="" if weights is None else _shape(weights),
        )  # fmt: skip

    def _check(self, row: Row, candidate: Candidate) -> tuple[Row, Program | None]:
        """The row with the map and its error, and the program unless it is not to be timed."""
        row, program = self._compile(row, candidate)
        if program is None:
            return row, None
        result = candidate.to_ours(np.asarray(program.run()))[..., :_COMPARED]
        own = candidate.weights is not None
        usual = not own and candidate.same_as == _usual_product()
        expected = self._usual if usual else self._reference(candidate.same_as, candidate.weights)
        error = _difference(result, expected)
        row = row.replace(max_error=error)
        if candidate.library != "equizoo" and error > SAME_IN_SINGLE:
            return row.replace(skipped=f"computes another map, off by {error:.2g}"), None
        like_usual = not own and expected.shape == self._usual.shape
        if like_usual and _difference(expected, self._usual) < SAME_IN_DOUBLE:
            row = row.replace(map=TENSOR_PRODUCTS.name_of(_usual_product()))
        return row, program

    @functools.cached_property
    def _usual(self) -> Float[np.ndarray, "items dim channels"]:
        return self._reference(_usual_product(), None)

    def _reference(
        self, product: TensorProduct, weights: np.ndarray | None
    ) -> Float[np.ndarray, "items dim channels"]:
        """The result of a product of ours in float64, of some channels."""
        own = self.problem.weights if weights is None else weights
        few = None if own is None else _few(own)
        problem = self.problem._replace(x=_few(self.problem.x), y=_few(self.problem.y), weights=few)
        bound = product.bind(*3 * (problem.irreps,))
        candidate = _our_candidate(product, bound, problem, self.graph, few)
        with numerics("float64"):
            values = jax.tree.map(jnp.asarray, (*candidate.arguments, *candidate.constants))
            return candidate.to_ours(np.asarray(candidate.function(*values)))

    def _compile(
        self, row: Row, candidate: Candidate, backward: bool = False
    ) -> tuple[Row, Program | None]:
        given = candidate.function, candidate.arguments, candidate.constants
        try:
            with numerics("float32"):
                program = compile_program(*given, backward=backward)
                reason = self.limits.refuse(program.memory, program.compile_s)
                reason = reason or self.limits.refuse(calls=_seconds_of_a_call(program))
        except jax.errors.JaxRuntimeError as error:  # out of memory, above all
            return row.replace(skipped=_first_line(error)), None
        row = row.compiled(program)
        return (row.replace(skipped=reason), None) if reason else (row, program)

    def _in_turns(self, entries: Sequence[tuple[Row, Program]]) -> Iterator[Row]:
        runs = [program.run for _, program in entries]
        timings = time_in_turns(runs, self.limits.seconds, self.limits.repeats)
        for (row, program), timing in zip(entries, timings, strict=True):
            yield row.timed(program, timing)


def _our_candidate(
    product: TensorProduct,
    bound: BoundProduct,
    problem: Problem,
    graph: Graph | None,
    weights: np.ndarray | None,
) -> Candidate:
    """A product of ours as it is used for the problem, with other weights than the problem's."""
    used = problem.weights if weights is None else weights
    arguments: tuple[np.ndarray, ...] = (problem.x, problem.y)
    constants: tuple[Any, ...] = ()
    to_ours = _same

    def unweighted(x: Array, y: Array) -> Array:
        return bound.per_path(x, y, jnp.ones((1, bound.num_weights, 1), x.dtype))

    def convolve(x: Array, y: Array, weights: Array, graph: Graph) -> Array:
        return bound.convolve(x, y[:, :, 0], weights, graph)

    function: Any = unweighted
    if used is not None:
        arguments = (problem.x, problem.y, used)
        summed = problem.comparison is Comparison.CHANNELWISE_SUMMED
        function = bound if summed else bound.per_path
    if graph is not None:
        nodes, edges = len(problem.x), np.flatnonzero(graph.edge_mask)
        arguments = (
            _padded(arguments[0], np.arange(nodes), graph.num_nodes),
            *(_padded(values, edges, graph.num_edges) for values in arguments[1:]),
        )
        function, constants = convolve, (graph,)

        def to_ours(z):
            return z[:nodes]

    return Candidate(
        "equizoo", TENSOR_PRODUCTS.name_of(product), function, arguments, constants, to_ours,
        options=options_of(product), same_as=product, weights=weights,
    )  # fmt: skip


def _problem(
    comparison: Comparison, l_max: int, channels: int, batch: int, cells: int
) -> tuple[Problem, Graph | None]:
    """The arguments, always the same, and for a convolution the structure as a graph."""
    irreps = natural_irreps(l_max)
    bound = _usual_product().bind(irreps, irreps, irreps)
    graph, edges, nodes = None, None, batch
    both = comparison in (Comparison.CHANNELWISE, Comparison.CHANNELWISE_SUMMED)
    y = _harmonics(tuple(range(l_max + 1)), batch, channels if both else 1)
    if comparison is Comparison.CONVOLVE:
        graph, nodes = _structure(cells)
        real = np.asarray(graph.edge_mask)
        edges = Edges(np.asarray(graph.senders)[real], np.asarray(graph.receivers)[real])
        with numerics("float32"):
            vectors = edge_vectors(jax.tree.map(jnp.asarray, graph), cutoff=5.0)
            y = np.asarray(spherical_harmonics(irreps, vectors))[real, :, None]
    x = np.random.default_rng(0).normal(size=(nodes, irreps.dim, channels))
    problem = Problem(comparison, bound, x.astype(np.float32), y.astype(np.float32), None, edges)
    if comparison.weighted:
        problem = problem._replace(weights=_random_weights(problem, bound.num_weights))
    return problem, graph


def _structure(cells: int) -> tuple[Graph, int]:
    atoms = bulk("Si", cubic=True) * (cells, cells, cells)
    atoms.rattle(0.1, seed=0)
    atoms.numbers[::2] = 6
    frame = make_frame(Structure.from_atoms(atoms), 5.0, (6, 14))
    return batch_frames([frame], Budget.of([frame])), len(atoms)


def _weights_for(
    problem: Problem, bound: BoundProduct
) -> Float[np.ndarray, "items_w weights channels"] | None:
    """Those of a product that has not as many as there are couplings; else the problem's."""
    if not problem.comparison.weighted or bound.num_weights == problem.bound.num_weights:
        return None
    return _random_weights(problem, bound.num_weights)


def _random_weights(problem: Problem, count: int) -> Float[np.ndarray, "items_w weights channels"]:
    shared = problem.comparison is Comparison.CHANNELWISE_SUMMED
    shape = (1 if shared else len(problem.y), count, problem.channels)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def _padded(
    values: Float[np.ndarray, "items dim channels"], places: np.ndarray, count: int
) -> Float[np.ndarray, "padded dim channels"]:
    result = np.zeros((count, *values.shape[1:]), values.dtype)
    result[places] = values
    return result


# ---- shared ------------------------------------------------------------------------------------


def _usual_product() -> TensorProduct:
    """With a weight for each coupling: what other libraries compute."""
    return TENSOR_PRODUCTS["clebsch_gordan"]()


def _check_variants(names: Sequence[str]) -> None:
    for name in names:
        TENSOR_PRODUCTS[name]  # raises, and says which there are


def _seconds_of_a_call(program: Program) -> float:
    start = time.perf_counter()
    program.run()
    return time.perf_counter() - start


def _difference(
    result: Float[np.ndarray, "*shape"], expected: Float[np.ndarray, "*shape"]
) -> float:
    """The largest, relative to the root mean square."""
    return float(np.abs(result - expected).max() / np.sqrt(np.mean(expected**2)))


def _few(values: Float[np.ndarray, "*batch channels"]) -> Float[np.ndarray, "*batch some"]:
    """Some channels, in float64."""
    return values[..., :_COMPARED].astype(np.float64)


def _same(z: np.ndarray) -> np.ndarray:
    return z


def _shape(values: np.ndarray) -> str:
    return " x ".join(map(str, values.shape))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
