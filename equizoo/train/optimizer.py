"""The optimizer of a configuration, with parameters grouped by path."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from equizoo.train.config import Optimizer


def make_optimizer(
    config: Optimizer, params: nnx.State, total_steps: int
) -> optax.GradientTransformation:
    """Gradients clipped, then Adam, decay of the decayed group, the schedule; frozen paths do not
    move. A plateau schedule is applied outside, as a factor on the updates.

    Raises ``ValueError`` for a ``frozen`` pattern that matches nothing.
    """
    adam = {"adamw": optax.scale_by_adam, "amsgrad": optax.scale_by_amsgrad}[config.kind]
    steps = [
        optax.clip_by_global_norm(config.clip_norm),
        adam(),
        optax.add_decayed_weights(
            config.weight_decay, mask=match_paths(params, config.decayed, must_match=False)
        ),
        optax.scale_by_learning_rate(learning_rate_schedule(config, total_steps)),
    ]
    if config.frozen:
        frozen = match_paths(params, config.frozen)
        steps = [optax.masked(optax.set_to_zero(), frozen), *steps]
        steps.append(optax.masked(optax.set_to_zero(), frozen))
    chain = optax.chain(*steps)

    def update(gradient, state, params=None):
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer step counts
            return chain.update(gradient, state, params)

    return optax.GradientTransformation(chain.init, update)


def learning_rate_schedule(config: Optimizer, total_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then the cosine or a constant."""
    warmup = min(config.warmup_steps, max(total_steps // 10, 1))
    start = config.learning_rate / (warmup + 1)
    if config.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(
            init_value=start,
            peak_value=config.learning_rate,
            warmup_steps=warmup,
            decay_steps=max(total_steps, warmup + 1),
            end_value=config.learning_rate * config.final_learning_rate,
        )
    else:
        schedule = optax.linear_schedule(start, config.learning_rate, warmup)
    return lambda step: schedule(jnp.asarray(step, jnp.float32))


def match_paths(params: nnx.State, patterns: Sequence[str], *, must_match: bool = True) -> Any:
    """A tree of booleans like ``params``: whether the dotted path matches one of the patterns."""
    paths = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    for pattern in patterns:
        if must_match and not fnmatch.filter(paths, pattern):
            raise ValueError(
                f"The pattern {pattern!r} matches no parameter. Parameters: {', '.join(paths)}."
            )
    matched = [any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns) for path in paths]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(params), matched)


def path_name(path: Sequence[Any]) -> str:
    """``layers.0.linear.kernels.1o`` from the keys of a tree path."""
    names = [
        str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path
    ]
    return ".".join(name for name in names if name != "value")
