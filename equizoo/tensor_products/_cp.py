"""Canonical polyadic decompositions: three-way tensors as sums of products of three vectors."""

import hashlib
import logging
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float

from equizoo.registry import cache_folder
from equizoo.whole_files import written_whole

logger = logging.getLogger(__name__)

FITS = Path(__file__).with_name("cp_fits")  # made by benchmarks/cp_ranks.py

# Part of the key of the disk cache: raise it when the solver finds other factors.
SOLVER = 1

_RIDGES = np.geomspace(1e-4, 1e-9, 6)  # of the damped steps; more at the start kills terms
_STEPS = 15  # for each ridge
_LAST_STEPS = 200  # without a ridge
_FLOOR, _ROUNDED = 2e-15, 1e-14  # relative errors where to stop a descent, and the search
_DENSE = 6000  # unknowns; with more, the normal equations of all of them are not formed


_DAMAGED = (zipfile.BadZipFile, zlib.error)


class Factors(NamedTuple):
    """``tensor[i, j, k] = sum_r first[r, i] second[r, j] result[r, k]``."""

    first: Float[np.ndarray, "terms dim_1"]
    second: Float[np.ndarray, "terms dim_2"]
    result: Float[np.ndarray, "terms dim_3"]


def tensor_of(factors: Factors) -> Float[np.ndarray, "dim_1 dim_2 dim_3"]:
    """The tensor that the factors stand for."""
    return np.einsum("ri,rj,rk->ijk", *factors, optimize=True)


def relative_error(target: Float[np.ndarray, "dim_1 dim_2 dim_3"], factors: Factors) -> float:
    """Frobenius norm of the difference, relative to that of the target."""
    return float(np.linalg.norm(target - tensor_of(factors)) / np.linalg.norm(target))


def by_slices(target: Float[np.ndarray, "dim_1 dim_2 dim_3"]) -> Factors:
    """An exact decomposition: singular values of the slices along the best of the three axes.

    At most ``d_1 d_2`` terms; ``d_2`` if the first axis is a scalar.
    """
    return min((_slices_along(target, axis) for axis in range(3)), key=lambda f: len(f.first))


def _slices_along(target: np.ndarray, axis: int) -> Factors:
    left, values, right = np.linalg.svd(np.moveaxis(target, axis, 0), full_matrices=False)
    index, place = np.nonzero(values > 1e-12 * values.max())
    root = np.sqrt(values[index, place])[:, None]
    factors = [root * left[index, :, place], root * right[index, place]]
    factors.insert(axis, np.eye(target.shape[axis])[index])
    return Factors(*factors)


def decompose(target: Float[np.ndarray, "dim_1 dim_2 dim_3"], rank: int) -> Factors:
    """The best approximation by ``rank`` terms that :func:`search` finds in a sensible time.

    Small problems get more starts: a second at most for ``0e+1o``, half a minute for
    ``0e+1o+2e``, minutes for ``0e+1o+2e+3o``.
    """
    unknowns = rank * sum(target.shape)
    factors, _ = search(target, rank, starts=int(np.clip((2500 / unknowns) ** 2, 1, 8)))
    return factors


def search(
    target: Float[np.ndarray, "dim_1 dim_2 dim_3"], rank: int, starts: int
) -> tuple[Factors, int]:
    """The best approximation from several random starts, and how many it took.

    Alternating least squares, then damped Gauss-Newton steps on all factors together, both with a
    ridge that shrinks: without it, terms grow without bound and cancel. Equal arguments give equal
    factors with the same linear algebra; another release of it may stop elsewhere in a flat valley.
    An exact result ends the search. The ridges are meant for a target whose blocks have norm one.
    """
    used = [np.flatnonzero(target.any(axis=(n - 1, n - 2))) for n in range(3)]
    core = target[np.ix_(*used)]
    best, least, tried = None, np.inf, 0
    while tried < starts and least > _ROUNDED:
        factors = _refined(core, _random_start(core, rank, seed=tried))
        error = relative_error(core, factors)
        logger.debug("%d terms, start %d: relative error %.1e", rank, tried, error)
        if error < least:
            best, least = factors, error
        tried += 1
    assert best is not None  # errors are finite
    padded = [np.zeros((rank, dim)) for dim in target.shape]
    for whole, part, index in zip(padded, best, used, strict=True):
        whole[:, index] = part
    return Factors(*padded), tried


def _random_start(target: np.ndarray, rank: int, seed: int) -> Factors:
    rng = np.random.default_rng(seed)
    return Factors(*(rng.normal(size=(dim, rank)).T / np.sqrt(dim) for dim in target.shape))


def _refined(target: np.ndarray, factors: Factors) -> Factors:
    if sum(f.size for f in factors) > _DENSE:
        return _alternate(target, factors, np.geomspace(1e-2, 1e-12, 500))
    factors = _down_the_ridges(
        target, _alternate(target, factors, np.geomspace(1e-2, _RIDGES[0], 30))
    )
    if _ROUNDED < relative_error(target, factors) < 1e-8:  # exact, but with cancelling terms
        factors = _down_the_ridges(target, factors)
    return _balanced(factors)


def _down_the_ridges(target: np.ndarray, factors: Factors) -> Factors:
    for ridge in _RIDGES:
        factors = _descend(target, factors, ridge, ridge, _STEPS)
    return _descend(target, factors, 0.0, _RIDGES[-1], _LAST_STEPS)


def _alternate(target: np.ndarray, factors: Factors, ridges: np.ndarray) -> Factors:
    """One sweep of ridge regressions, factor by factor, for each ridge."""
    parts = list(factors)
    for ridge in ridges:
        for axis in range(3):
            normal = _gram_of_others(parts, axis)
            normal[np.diag_indices(len(normal))] += ridge
            parts[axis] = scipy.linalg.solve(
                normal, _contracted(target, parts, axis), assume_a="pos"
            )
        parts = list(_balanced(parts))
    return Factors(*parts)


def _descend(
    target: np.ndarray, factors: Factors, ridge: float, damping: float, steps: int
) -> Factors:
    """Levenberg-Marquardt steps on the squared error plus ``ridge`` times the squared factors."""

    def objective(parts) -> float:
        error = np.sum((target - tensor_of(Factors(*parts))) ** 2)
        return (error + ridge * sum(np.sum(part**2) for part in parts)) / 2

    parts, floor = list(factors), np.sum(target**2) * _FLOOR**2 / 2
    values = [objective(parts)]
    while len(values) <= steps and values[-1] > floor:
        hessian, gradient = _normal_equations(target, parts, ridge)
        growth = 2.0
        while True:
            trial, promised = _moved(parts, hessian, gradient, damping)
            value = objective(trial) if promised > 0 else np.inf
            if value < values[-1]:
                break
            damping, growth = damping * growth, 2 * growth
            if damping > 1e8:
                return Factors(*parts)
        # little damping where the quadratic model was right, more where it was not (Nielsen)
        kept = (values[-1] - value) / promised
        damping = max(damping * max(1 / 3, 1 - (2 * kept - 1) ** 3), 1e-16)
        parts = trial
        values.append(value)
        if len(values) > 25 and values[-25] - value < 1e-3 * value:
            break
    return Factors(*parts)


def _moved(parts, hessian, gradient, damping) -> tuple[list[np.ndarray], float]:
    """The factors after a step and the decrease that the quadratic model promises.

    It promises none where rounding leaves no positive definite matrix.
    """
    damped = hessian.copy()
    damped[np.diag_indices(len(damped))] += damping
    try:
        factored = scipy.linalg.cho_factor(damped, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError:
        return parts, 0.0
    step = -scipy.linalg.cho_solve(factored, gradient, check_finite=False)
    moves = np.split(step, np.cumsum([part.size for part in parts])[:-1])
    moved = [part + move.reshape(part.shape) for part, move in zip(parts, moves, strict=True)]
    return moved, float(step @ (damping * step - gradient)) / 2


def _normal_equations(target, parts, ridge) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Newton matrix and gradient: Gram matrices of the factors say it all."""
    ends = np.cumsum([0, *(part.size for part in parts)])
    place = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    hessian, gradient = np.zeros((ends[-1], ends[-1])), np.zeros(ends[-1])
    for n, part in enumerate(parts):
        gram = _gram_of_others(parts, n)
        slope = gram @ part - _contracted(target, parts, n) + ridge * part
        gradient[place[n]] = slope.ravel()
        hessian[place[n], place[n]] = np.kron(gram, np.eye(part.shape[1]))
        for m in range(n + 1, 3):
            third = parts[3 - n - m]
            block = np.einsum("rs,si,rj->risj", third @ third.T, part, parts[m], optimize=True)
            block = block.reshape(part.size, parts[m].size)
            hessian[place[n], place[m]], hessian[place[m], place[n]] = block, block.T
    hessian[np.diag_indices(len(hessian))] += ridge
    return hessian, gradient


def _gram_of_others(parts, axis) -> np.ndarray:
    one, other = (parts[n] for n in range(3) if n != axis)
    return (one @ one.T) * (other @ other.T)


def _contracted(target, parts, axis) -> Float[np.ndarray, "terms dim"]:
    """The target contracted with the vectors of each term along the other axes."""
    one, other = (parts[n] for n in range(3) if n != axis)
    pairs = (one[:, :, None] * other[:, None]).reshape(len(one), -1)
    return pairs @ np.moveaxis(target, axis, 2).reshape(-1, target.shape[axis])


def _balanced(parts) -> Factors:
    """The same terms, each with three vectors of equal length."""
    lengths = [np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
    common = np.cbrt(lengths[0] * lengths[1] * lengths[2])
    scales = [
        np.divide(common, length, out=np.zeros_like(length), where=length > 0) for length in lengths
    ]
    return Factors(*(part * scale for part, scale in zip(parts, scales, strict=True)))


# ---- disk cache ------------------------------------------------------------------------------


def decompose_cached(
    target: Float[np.ndarray, "dim_1 dim_2 dim_3"], rank: int, content: str
) -> Factors:
    """:func:`decompose`, kept in :func:`equizoo.registry.cache_folder` under the words ``content``.

    Those of published models are in the package, equal everywhere. A file that is damaged, or does
    not belong to the target, is replaced. A folder that cannot be written is reported and otherwise
    ignored.
    """
    key = f"{content}, {rank} terms, solver {SOLVER}"
    name = f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    path = cache_folder() / "cp" / name
    factors = _read(FITS / name, key, target, rank)
    if factors is None:
        factors = _read(path, key, target, rank)
    if factors is None:
        logger.info("Looking for %d terms for %s; kept in %s", rank, content, path)
        factors = decompose(target, rank)
        try:
            _write(path, key, factors, relative_error(target, factors))
        except OSError as error:
            logger.warning("%s cannot be written, so the search will be repeated: %s", path, error)
    return factors


def _read(path: Path, key: str, target: np.ndarray, rank: int) -> Factors | None:
    """What a file holds, after checking that it is what was once written for this target."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            factors = Factors(*(stored[name] for name in Factors._fields))
            found, error = str(stored["key"]), float(stored["error"])
        shapes = [part.shape for part in factors]
        fits = found == key and shapes == [(rank, dim) for dim in target.shape]
        if fits and abs(relative_error(target, factors) - error) < 1e-9:
            return factors
        problem: object = "it is of something else"
    except (
        OSError,
        KeyError,
        ValueError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    ) as e:
        problem = e
    logger.warning("%s is made anew: %s", path, problem)
    return None


def _write(path: Path, key: str, factors: Factors, error: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial, partial.open("wb") as file:
        np.savez(file, key=key, error=error, **factors._asdict())
