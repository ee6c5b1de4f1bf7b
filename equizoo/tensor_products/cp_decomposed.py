"""Product of a few linear forms of each factor: a canonical polyadic decomposition of couplings."""

import dataclasses
import enum
import functools
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path as File

import e3nn_jax as e3nn
import numpy as np
from jaxtyping import Float

from equizoo.tensor_products._base import Path, TensorProduct, allowed_paths, wigner_3j
from equizoo.tensor_products._cp import Factors, by_slices, decompose_cached, tensor_of
from equizoo.tensor_products._pointwise import BoundPointwise, Factor, Term
from equizoo.tensor_products._signals import is_even, weights_of

logger = logging.getLogger(__name__)

TABLES = File(__file__).with_name("cp_tables")  # made by benchmarks/cp_ranks.py
_L_TABLES = 3  # highest degree in them
_ZERO = 1e-10  # of a coefficient or a defect; the maps have unit variance

Contents = tuple[e3nn.Irreps, e3nn.Irreps, e3nn.Irreps]


class Schedule(enum.StrEnum):
    """Number of terms as a function of the highest degree ``L`` that takes part.

    ``EXACT`` is the fewest for which an exact decomposition is known; the others are those that the
    paper compares (its choice is ``SEVEN_L2``), the logarithm being the natural one.
    """

    EXACT = "exact"
    SEVEN_L = "7L"
    SEVEN_L2 = "7L2"
    LOG = "log"  # 16 log^2(L + 1)
    FULL = "full"  # (L + 1)^4

    def terms(self, l_max: int) -> int | None:
        """The number of terms, at least one; ``None`` for ``EXACT``."""
        terms = {
            Schedule.SEVEN_L: 7 * l_max,
            Schedule.SEVEN_L2: 7 * l_max**2,
            Schedule.LOG: int(16 * np.log(l_max + 1) ** 2),
            Schedule.FULL: (l_max + 1) ** 4,
        }
        return max(1, terms[self]) if self in terms else None


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """As few terms as are found to keep the relative equivariance defect within ``defect``."""

    defect: float

    def __post_init__(self):
        if not self.defect > 0:
            raise ValueError(
                f"defect is {self.defect}, expected a positive number; for none give no tolerance, "
                "CPDecomposed()."
            )


Rows = tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True)
class Given:
    """The factors of a decomposition made elsewhere, whatever it stands for: a row for a term."""

    first: Rows
    second: Rows
    result: Rows

    def __post_init__(self):
        shapes = {(len(rows), min(map(len, rows), default=0)) for rows in self._rows}
        ragged = any(len({len(row) for row in rows}) > 1 for rows in self._rows)
        if ragged or len({terms for terms, _ in shapes}) != 1 or not all(d for _, d in shapes):
            raise ValueError(
                "Given factors need as many rows each, one for each term, of one length; got "
                + ", ".join(f"{len(rows)} rows" for rows in self._rows)
                + (" of several lengths." if ragged else ".")
            )

    @property
    def _rows(self) -> tuple[Rows, Rows, Rows]:
        return self.first, self.second, self.result

    @property
    def factors(self) -> Factors:
        """The same as arrays, in float64."""
        return Factors(*(np.array(rows, np.float64) for rows in self._rows))


class Normalization(enum.StrEnum):
    """``variance``: results of unit variance; ``wigner``: bare 3j tensors, as in the paper."""

    VARIANCE = "variance"
    WIGNER = "wigner"


@dataclasses.dataclass(frozen=True)
class CPDecomposed(TensorProduct):
    r"""All couplings with equal weights, as products of ``R`` linear forms of each factor.

    .. math:: z = A \left[ (B^\top x) \odot (C^\top (w \cdot y)) \right], \qquad
        \sum_{r=1}^R B_{ir} C_{jr} A_{kr} = \sum_{\text{paths}} w^{l_1 l_2 l_3}_{ijk}

    with the bare Wigner 3j tensors, scaled for unit variance of each result degree unless
    ``normalization`` says otherwise. The same map as
    ``ClebschGordan`` with one weight for all paths of an irrep of the second factor.

    Exact unless told otherwise: ``R`` is 8, 30, 90 for ``L = 1, 2, 3`` when parity forbids nothing
    (``0e+1e+2e+3e``) and 6, 18, 54 for the couplings among true tensors (``0e+1o+2e+3o``). Other
    contents use parts of these tables, or both, or both mirror images. ``rank`` may ask for fewer
    terms, by number (at most so many), :class:`Schedule` or :class:`Tolerance`, or hold factors
    that are :class:`Given`, those of a published model: the product is then not equivariant, and
    its ``defect`` says by how much. The decomposition is searched when first bound, in seconds for
    ``L = 2`` and minutes for ``L = 3``, and kept on disk.

    The many-body product has no such form: a decomposition for pairs says nothing about triples.

    Raises ``ValueError`` for an exact product beyond degree 3, unless one factor is scalar.

    Reference: Lin et al. 2025 (Tensor Decomposition Networks), https://arxiv.org/abs/2507.01131.
    Its bound on the defect (theorem 3.1) is larger than the map itself at every rank, since the
    singular values of the couplings are all alike; see :class:`BoundCP` for what holds instead.
    """

    rank: int | Schedule | Tolerance | Given = Schedule.EXACT
    normalization: Normalization = Normalization.VARIANCE

    def __post_init__(self):
        Normalization(self.normalization)  # raises for other words
        if isinstance(self.rank, str):
            Schedule(self.rank)  # raises for other words
        elif not isinstance(self.rank, Tolerance | Given) and self.rank < 1:
            raise ValueError(f"rank is {self.rank}, expected at least 1.")

    def _bind(
        self, irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps
    ) -> "BoundCP":
        contents = (irreps_1, irreps_2, irreps_out)
        bound = self._bound(contents)
        if not bound.exact:
            logger.info("%d terms for %s: defect %.1e", bound.terms, _words(contents), bound.defect)
        return bound

    def _bound(self, contents: Contents) -> "BoundCP":
        norm, paths = self.normalization, allowed_paths(*contents)
        if isinstance(self.rank, Given):
            return BoundCP(contents, _fitting(self.rank.factors, contents), norm)
        target = _equal_weights(contents)
        exact = _exact_factors(paths, contents, target)
        if isinstance(self.rank, Tolerance):
            most = by_slices(target) if exact is None else exact
            return _within(self.rank.defect, target, contents, BoundCP(contents, most, norm))
        if isinstance(self.rank, str):
            terms = Schedule(self.rank).terms(_highest_degree(paths))
        else:
            terms = self.rank
        if exact is not None and (terms is None or terms >= len(exact.first)):
            return BoundCP(contents, exact, norm)
        if terms is None:
            raise ValueError(
                f"{_words(contents)} reaches degree "
                f"{_highest_degree(paths)}; exact decompositions are known up to {_L_TABLES}. "
                "GauntGrid (even couplings) and GauntBracket (odd ones) are exact decompositions "
                "on quadrature points, for any degree. Or accept a defect: "
                "CPDecomposed(rank=Tolerance(1e-2))."
            )
        return BoundCP(contents, decompose_cached(target, terms, _words(contents)), norm)


class BoundCP(BoundPointwise):
    r"""See :class:`CPDecomposed`; a pointwise product that knows how far it is from equivariant.

    With ``M`` the map at unit weights, ``P`` the projection on couplings and ``E = M - P M``:

    - ``defect``, exact in the mean over rotations, reflections and standard normal ``x``, ``y``:

      .. math:: \sqrt{E \| M(D x, D y) - D M(x, y) \|^2 \,/\, E \| M(x, y) \|^2}
          = \sqrt{2} \; \|E\|_F / \|M\|_F

    - ``defect_bound``, for the worst case, with the least of three spectral norms of ``E`` as a
      matrix: one index against the other two.

      .. math:: \| M(D x, D y) - D M(x, y) \| \le 2 \min_n \|E_{(n)}\|_2 \, \|x\| \, \|y\|
    """

    def __init__(
        self,
        contents: Contents,
        factors: Factors,
        normalization: Normalization = Normalization.VARIANCE,
    ):
        self.normalization = normalization
        tensor, couplings = tensor_of(factors), _couplings(contents)
        paths = tuple(path for path, at, w in couplings if abs(np.sum(w * tensor[at])) > _ZERO)
        weights = weights_of(contents[1], tuple(path for path, _, _ in couplings))
        super().__init__(
            *contents, paths, [factors.first], [Factor(factors.second, weights)],
            [factors.result], [Term(0, 0, 0)],
        )  # fmt: skip
        self.terms = len(factors.first)
        scaled = tensor_of(Factors(factors.first, factors.second, self._results[0]))
        residual = scaled.copy()
        for _, at, w in _couplings((*contents[:2], self.irreps_paths)):
            residual[at] -= np.sum(w * scaled[at]) * w
        self.defect = float(np.sqrt(2) * np.linalg.norm(residual) / np.linalg.norm(scaled))
        self.defect_bound = 2 * min(
            float(np.linalg.norm(np.moveaxis(residual, axis, 0).reshape(dim, -1), ord=2))
            for axis, dim in enumerate(residual.shape)
        )
        self.exact = self.defect < _ZERO

    def _normalized(
        self, results: Sequence[Float[np.ndarray, "points dim_out"]]
    ) -> tuple[Float[np.ndarray, "points dim_paths"], ...]:
        if self.normalization == Normalization.VARIANCE:
            return super()._normalized(results)
        slices = self.irreps_out.slices()
        return tuple(np.concatenate([r[:, slices[i]] for i in self.into], axis=1) for r in results)


def _within(defect: float, target: np.ndarray, contents: Contents, fallback: BoundCP) -> BoundCP:
    """The product of fewest terms that bisection finds; ``fallback`` keeps any tolerance."""
    low, best = 1, fallback
    while low < best.terms:
        terms = (low + best.terms) // 2
        factors = decompose_cached(target, terms, _words(contents))
        bound = BoundCP(contents, factors, fallback.normalization)
        if bound.defect <= defect:
            best = bound
        else:
            low = terms + 1
    return best


def _fitting(factors: Factors, contents: Contents) -> Factors:
    found, dims = [part.shape[1] for part in factors], [irreps.dim for irreps in contents]
    if found != dims:
        raise ValueError(
            f"The given factors are of dimensions {found}; {_words(contents)} has {dims}. Factors "
            "belong to one l_max and one choice of parities."
        )
    return factors


def _words(contents: Contents) -> str:
    return "'{}' x '{}' to '{}'".format(*contents)


def _highest_degree(paths: Iterable[Path]) -> int:
    return max(degree for path in paths for degree in _degrees(path))


def _degrees(path: Path) -> tuple[int, int, int]:
    return path.ir_1.l, path.ir_2.l, path.ir_out.l


# ---- what is decomposed ------------------------------------------------------------------------


def _couplings(contents: Contents) -> list[tuple[Path, tuple[slice, ...], np.ndarray]]:
    """Every allowed path, its place in the tensor and its Wigner 3j tensor, of norm one."""
    slices = [irreps.slices() for irreps in contents]
    return [
        (
            path,
            tuple(places[index] for places, index in zip(slices, path[:3], strict=True)),
            wigner_3j(*_degrees(path)),
        )
        for path in allowed_paths(*contents)
    ]


def _equal_weights(contents: Contents, kind: str = "all") -> np.ndarray:
    """The sum of all couplings of a kind, each of norm one."""
    target = np.zeros([irreps.dim for irreps in contents])
    for path, at, w in _couplings(contents):
        if _is_of(kind, path):
            target[at] = w
    return target


def _is_of(kind: str, path: Path) -> bool:
    """Whether a coupling is in the tables "even" or "odd" (sum of degrees); all are in "all"."""
    return kind == "all" or is_even(path) == (kind == "even")


# ---- exact decompositions ------------------------------------------------------------------------


def table_target(kind: str, l_max: int) -> Float[np.ndarray, "dim dim dim"]:
    """The tensor that a table decomposes: each degree up to ``l_max`` once, no rule for parity."""
    irreps = e3nn.Irreps([(1, (degree, 1)) for degree in range(l_max + 1)])
    return _equal_weights((irreps, irreps, irreps), kind)


@functools.cache
def table(kind: str, l_max: int) -> Factors:
    """The exact factors that the package ships."""
    with np.load(TABLES / f"{kind}_{l_max}.npz", allow_pickle=False) as stored:
        return Factors(*(stored[name] for name in Factors._fields))


def _exact_factors(paths: Sequence[Path], contents: Contents, target: np.ndarray) -> Factors | None:
    """Of the exact decompositions that are known the one with the fewest terms."""
    found = []
    in_tables = _highest_degree(paths) <= _L_TABLES
    if in_tables:
        halves = [_from_table(kind, paths, contents) for kind in ("even", "odd")]
        parts = zip(*(half for half in halves if half is not None), strict=True)
        found = [Factors(*map(np.concatenate, parts))]
        if (together := _from_table("all", paths, contents)) is not None:
            found.append(together)
    highest = map(max, zip(*map(_degrees, paths), strict=True))
    if in_tables or min(highest) == 0:  # with scalars, slices are best
        found.append(by_slices(target))
    return min(found, key=lambda factors: len(factors.first), default=None)


def _from_table(kind: str, paths: Sequence[Path], contents: Contents) -> Factors | None:
    """A table cut down to the irreps of its paths, so that it holds those paths alone.

    Where it would couple irreps against parity, the mean with its mirror image does not:
    ``M(x, y)`` and ``P M(P x, P y)``, twice the terms.
    """
    paths = [path for path in paths if _is_of(kind, path)]
    if not paths:
        return None
    factors = table(kind, max(1, _highest_degree(paths)))
    used = [sorted({path[side] for path in paths}) for side in range(3)]
    blind = [
        e3nn.Irreps([(1, (irreps[i].ir.l, 1)) for i in index])
        for irreps, index in zip(contents, used, strict=True)
    ]
    coupled = [path for path in allowed_paths(*blind) if _is_of(kind, path)]
    parts = [_rows(*of_side) for of_side in zip(factors, contents, used, strict=True)]
    if len(coupled) > len(paths):
        parities = [np.repeat([ir.p for _, ir in i], [ir.dim for _, ir in i]) for i in contents]
        parts = [np.concatenate([part, part * p]) for part, p in zip(parts, parities, strict=True)]
        parts[2] /= 2
    return Factors(*parts)


def _rows(
    part: Float[np.ndarray, "terms dim"], irreps: e3nn.Irreps, used: Sequence[int]
) -> Float[np.ndarray, "terms dim_irreps"]:
    """The columns of a table at the degrees of the irreps; zero for those not used."""
    columns = [
        part[:, ir.l**2 : (ir.l + 1) ** 2] if index in used else np.zeros((len(part), ir.dim))
        for index, (_, ir) in enumerate(irreps)
    ]
    return np.concatenate(columns, axis=1)
