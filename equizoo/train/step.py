"""One optimisation step and one validation step, as pure jitted functions of state and batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from equizoo.graph import Graph, Labels
from equizoo.train.config import LossWeights
from equizoo.train.loss import ErrorSums, LossSums, error_sums, label_counts, loss, loss_sums
from equizoo.train.parallel import summed_over_parts
from equizoo.train.parametrization import WHOLE, Parametrization
from equizoo.zoo._base import Architecture, Remat, energy_forces_stress


class TrainState(NamedTuple):
    """What changes from step to step; every part is saved as an item of its own."""

    params: Any  # what is trained: the model's parameters, or what gives them
    ema: Any  # exponential moving average of params: what is validated and released
    optimizer: Any
    step: Int[Array, ""]


class StepReport(NamedTuple):
    """What a step tells; stays on the device until it is looked at."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    errors: ErrorSums


def init_state(
    model: Architecture,
    optimizer: optax.GradientTransformation,
    form: Parametrization = WHOLE,
) -> TrainState:
    """State at step zero from a model's parameters (copied: the step donates its argument)."""
    params = form.start(nnx.state(model, nnx.Param))
    return TrainState(
        params=jax.tree.map(jnp.copy, params),
        ema=jax.tree.map(jnp.copy, params),
        optimizer=optimizer.init(params),
        step=jnp.zeros((), jnp.int32),
    )


def make_train_step(
    model: Architecture,
    optimizer: optax.GradientTransformation,
    weights: LossWeights,
    ema_decay: float,
    remat: Remat = Remat.NONE,
    noise_weight: Callable[[Int[Array, ""]], Float[Array, ""]] | None = None,
    form: Parametrization = WHOLE,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Graph, Labels, Array], tuple[TrainState, StepReport]]:
    """The jitted step ``(state, graph, labels, scale) -> (state, report)``; donates the state.

    With a ``mesh`` the arrays of ``graph`` and ``labels`` have a leading axis of parts of the
    batch, which its devices share (:mod:`equizoo.train.parallel`).

    ``scale`` multiplies the update (the plateau schedule). The average starts as the plain mean
    of the first steps and never weighs the random initial values by more than ``10 / (10 + t)``.
    What is random while training (dropout) is drawn from the number of the step, so that a resumed
    run repeats it. ``noise_weight`` is that of the noise by step, where batches have some. A step
    whose loss or gradient is not finite changes nothing but the counter. Raises ``ValueError`` for
    a ``remat`` that the architecture does not offer.
    """
    if remat not in model.remats:
        raise ValueError(
            f"remat is {remat.value!r}, which {type(model).__name__} does not offer; expected one "
            f"of {', '.join(sorted(model.remats))}."
        )
    graphdef = nnx.graphdef(model)

    def objective(params, graph, labels, counts, step, key):
        instance = nnx.merge(graphdef, form.weights(params))
        instance.key, instance.remat = key, remat
        prediction = energy_forces_stress(instance, graph)
        on_noise = 0.0 if noise_weight is None else noise_weight(step)
        value = loss(prediction, graph, labels, weights, on_noise, counts)
        return value, error_sums(prediction, graph, labels)

    differentiate = jax.value_and_grad(objective, has_aux=True)

    def of_part(everywhere, part, index):
        params, counts, step, key = everywhere
        return differentiate(params, *part, counts, step, jax.random.fold_in(key, index))

    def of_batch(params, graph, labels, step):
        key = jax.random.fold_in(jax.random.key(0), step)
        if mesh is None:
            return differentiate(params, graph, labels, label_counts(labels), step, key)
        counts = jax.tree.map(jnp.sum, jax.vmap(label_counts)(labels))
        everywhere = (params, counts, step, key)
        return summed_over_parts(mesh, of_part)(everywhere, (graph, labels))

    def step(state, graph, labels, scale):
        (value, errors), gradient = of_batch(state.params, graph, labels, state.step)
        norm = optax.tree.norm(gradient)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        updates = jax.tree.map(lambda update: scale.astype(update.dtype) * update, updates)
        params = optax.apply_updates(state.params, updates)
        t = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema_decay, (1 + t) / (10 + t))
        ema = jax.tree.map(
            lambda mean, new: mean + (1 - decay).astype(mean.dtype) * (new - mean),
            state.ema,
            params,
        )
        new = TrainState(params, ema, optimizer_state, state.step)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return new._replace(step=state.step + 1), StepReport(value, norm, errors)

    return jax.jit(_full_precision(step), donate_argnums=0)


def make_validation_step(
    model: Architecture, weights: LossWeights, form: Parametrization = WHOLE
) -> Callable[[Any, Graph, Labels], tuple[ErrorSums, LossSums]]:
    """The jitted sums of a batch under given trained arrays: of errors, and of this loss."""
    graphdef = nnx.graphdef(model)

    def validate(params, graph, labels):
        instance = nnx.merge(graphdef, form.weights(params))
        prediction = energy_forces_stress(instance, graph)
        errors = error_sums(prediction, graph, labels)
        return errors, loss_sums(prediction, graph, labels, weights)

    return jax.jit(_full_precision(validate))


def _full_precision(function: Callable) -> Callable:
    """The function traced with matrix products in the full precision of their arguments."""

    def traced(*args):
        with jax.default_matmul_precision("highest"):
            return function(*args)

    return traced
