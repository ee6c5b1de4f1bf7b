"""What a run moves: the weights themselves, or low-rank changes of them, merged at the end."""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from equizoo.train.parameter_paths import match_paths, path_name

Kind = Literal["whole", "adapted", "kept"]
Parts = dict[str, jax.Array]  # "whole", or "base" with or without "down" and "up"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank:
    r"""Matrices change by products of two thin ones, and nothing else moves (LoRA).

    .. math:: W = W_0 + D U, \qquad D \in R^{n \times r}, U \in R^{r \times m}

    for every parameter that is a matrix, or one for each species, of more rows and columns than
    ``rank``. ``D`` starts from a normal distribution of variance ``1 / rank``, ``U`` from zero: a
    run starts from the model as it is, and a step changes entries of ``W`` as much as it would
    change those of a whole matrix. The maps mix channels of one irrep, so that the model is as
    equivariant as before, whatever the matrices. What is saved is the model with ``W``.

    Reference: Hu et al. 2021 (LoRA), https://arxiv.org/abs/2106.09685.
    """

    rank: int = 8
    adapted: tuple[str, ...] = ("*",)  # parameter path patterns; what is no matrix stays
    whole: tuple[str, ...] = ()  # path patterns of parameters that move without restriction

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}, expected at least 1.")


class Parametrization(NamedTuple):
    """Trained arrays, and the model's parameters as a function of them."""

    start: Callable[[nnx.State], Any]  # trained arrays that give these parameters
    weights: Callable[[Any], nnx.State]
    fixed: tuple[str, ...]  # path patterns of what is kept among the trained arrays unchanged


WHOLE = Parametrization(start=lambda params: params, weights=lambda trained: trained, fixed=())


def parametrization(params: nnx.State, rule: LowRank | None, seed: int = 0) -> Parametrization:
    """How the parameters of a model are trained; ``None``: as they are.

    Raises ``ValueError`` for a pattern that matches no parameter, or when nothing would move.
    """
    if rule is None:
        return WHOLE
    kinds, structure = _kinds(params, rule), jax.tree.structure(params)

    def start(params: nnx.State) -> dict[str, Parts]:
        return {
            name: _parts(name, leaf, kinds[name], rule.rank, seed)
            for name, leaf in _named(params).items()
        }

    def weights(trained: dict[str, Parts]) -> nnx.State:
        return jax.tree.unflatten(structure, [_merged(trained[name]) for name in kinds])

    return Parametrization(start, weights, fixed=("*.base",))


def _named(params: nnx.State) -> dict[str, jax.Array]:
    """By dotted path, in the order of the tree's leaves."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _kinds(params: nnx.State, rule: LowRank) -> dict[str, Kind]:
    adapted = jax.tree.leaves(match_paths(params, rule.adapted))
    whole = jax.tree.leaves(match_paths(params, rule.whole))
    kinds: dict[str, Kind] = {}
    for (name, leaf), is_adapted, is_whole in zip(
        _named(params).items(), adapted, whole, strict=True
    ):
        if is_whole:
            kinds[name] = "whole"
        else:
            kinds[name] = "adapted" if is_adapted and _fits(leaf, rule.rank) else "kept"
    if set(kinds.values()) == {"kept"}:
        shapes = ", ".join(f"{name} {leaf.shape}" for name, leaf in _named(params).items())
        raise ValueError(
            f"No matrix among {list(rule.adapted)} has more than {rule.rank} rows and columns, so "
            f"nothing would be trained; lower the rank. Parameters: {shapes}."
        )
    return kinds


def _fits(leaf: jax.Array, rank: int) -> bool:
    return leaf.ndim in (2, 3) and min(leaf.shape[-2:]) > rank


def _parts(name: str, leaf: jax.Array, kind: Kind, rank: int, seed: int) -> Parts:
    if kind != "adapted":
        return {"whole" if kind == "whole" else "base": leaf}
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    *species, rows, columns = leaf.shape
    down = rng.normal(scale=rank**-0.5, size=(*species, rows, rank))
    return {
        "base": leaf,
        "down": jnp.asarray(down, leaf.dtype),
        "up": jnp.zeros((*species, rank, columns), leaf.dtype),
    }


def _merged(parts: Parts) -> jax.Array:
    if "whole" in parts:
        return parts["whole"]
    base = jax.lax.stop_gradient(parts["base"])
    if "down" not in parts:
        return base
    # what is saved is what was validated, on devices that would multiply in fewer digits too
    return base + jnp.matmul(parts["down"], parts["up"], precision="highest")
