"""The optimizer of a configuration, with parameters grouped by path."""

import fnmatch
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from equizoo.train.config import Optimizer
from equizoo.train.parameter_paths import match_paths, path_name


def make_optimizer(
    config: Optimizer,
    params: Any,
    total_steps: int,
    fixed: tuple[str, ...] = (),
    unit_kernels: bool = True,
) -> optax.GradientTransformation:
    """Gradients clipped, then Adam or Muon, decay of the decayed group, the schedule and the rates.

    Parameters under ``frozen`` and ``fixed`` paths do not move, take no part in clipping and have
    no moments in the state. A plateau schedule is applied outside, as a factor on the updates.
    ``unit_kernels`` is what the model says of itself, see :class:`Architecture`.

    Raises ``ValueError`` for a pattern of ``frozen``, ``fixed`` or ``rates`` that matches nothing,
    and when nothing is left to move.
    """
    frozen = match_paths(params, config.frozen + fixed)
    if all(jax.tree.leaves(frozen)):
        raise ValueError(f"frozen is {list(config.frozen)}, which leaves no parameter to train.")
    steps = [
        optax.clip_by_global_norm(config.clip_norm),
        _direction(config.kind, unit_kernels),
        optax.add_decayed_weights(
            config.weight_decay,
            mask=lambda some: match_paths(some, config.decayed, must_match=False),
        ),
        optax.scale_by_learning_rate(learning_rate_schedule(config, total_steps)),
    ]
    if config.rates:
        match_paths(params, tuple(config.rates))
        steps.append(optax.stateless(lambda updates, _: _scaled(updates, config.rates)))
    chain = optax.partition(
        {"moves": optax.chain(*steps), "stays": optax.set_to_zero()},
        jax.tree.map(lambda stays: "stays" if stays else "moves", frozen),
    )

    def update(gradient, state, params=None):
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer step counts
            return chain.update(gradient, state, params)

    return optax.GradientTransformation(chain.init, update)


# Parameters that are matrices over their last two axes: inputs, outputs. Others (weights per path
# and channel, of norms, per species) are not, whatever their shape.
_MATRICES = ("*.kernel", "*.kernels", "*.kernels.*", "*.planar.*", "*.pointwise.*")


def _direction(kind: str, unit_kernels: bool) -> optax.GradientTransformation:
    if kind != "muon":
        return {"adamw": optax.scale_by_adam, "amsgrad": optax.scale_by_amsgrad}[kind]()
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    orthogonal = optax.contrib.scale_by_muon(
        weight_dimension_numbers=lambda some: jax.tree.map(lambda _: axes, some)
    )
    return optax.partition(
        {
            "matrix": optax.chain(
                _of_equal_shape_together(orthogonal),
                optax.stateless(lambda some, _: _sized(some, unit_kernels)),
            ),
            "other": optax.scale_by_adam(),
        },
        lambda some: jax.tree.map(
            lambda named, leaf: "matrix" if named and leaf.ndim > 1 else "other",
            match_paths(some, _MATRICES, must_match=False),
            some,
        ),
    )


def _of_equal_shape_together(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """``inner`` on stacks of all leaves of one shape: a few large operations for many small."""

    def shape_of(leaf: jax.Array) -> str:
        return "x".join(map(str, leaf.shape))

    def stacks(tree: Any) -> dict[str, jax.Array]:
        by_shape: dict[str, list[jax.Array]] = {}
        for leaf in jax.tree.leaves(tree):
            by_shape.setdefault(shape_of(leaf), []).append(leaf)
        return {shape: jnp.stack(leaves) for shape, leaves in by_shape.items()}

    def update(updates, state, params=None):
        leaves, tree = jax.tree.flatten(updates)
        given = None if params is None else stacks(params)
        found, state = inner.update(stacks(updates), state, given)
        parts = {shape: iter(stack) for shape, stack in found.items()}
        new = [next(parts[shape_of(leaf)]) for leaf in leaves]
        return jax.tree.unflatten(tree, new), state

    return optax.GradientTransformation(lambda params: inner.init(stacks(params)), update)


def _sized(updates: Any, unit_kernels: bool) -> Any:
    """Orthogonal matrices times the root of their outputs: entries up to one, as in Adam's updates,
    and layers that divide by the root of their inputs change all outputs alike, however wide.
    Kernels that have this divisor in them change by as much less."""

    def sized(update):
        inputs, outputs = update.shape[-2:]
        return update * (outputs if unit_kernels else outputs / inputs) ** 0.5

    return jax.tree.map(sized, updates)


def _scaled(updates: Any, rates: Mapping[str, float]) -> Any:
    """Each update times the factor of the first pattern that its path matches."""

    def scaled(path, update):
        name = path_name(path)
        factors = (rates[pattern] for pattern in rates if fnmatch.fnmatchcase(name, pattern))
        return update * next(factors, 1.0)

    return jax.tree_util.tree_map_with_path(scaled, updates)


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
