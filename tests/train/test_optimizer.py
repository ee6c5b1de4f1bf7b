"""Parameter groups, schedules and averages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib
import pytest
from conftest import packing_for, tiny_model
from flax import nnx

from equizoo.train.config import LossWeights, Optimizer
from equizoo.train.optimizer import learning_rate_schedule, make_optimizer
from equizoo.train.parameter_paths import match_paths, path_name
from equizoo.train.step import init_state, make_train_step


def params_of(model):
    return nnx.state(model, nnx.Param)


def named(params):
    return {path_name(p): v for p, v in jax.tree_util.tree_flatten_with_path(params)[0]}


def test_parameter_names_are_dotted_paths():
    names = set(named(params_of(tiny_model())))
    assert {"embedding", "layers.0.radial.kernels.0", "layers.0.product_weights"} <= names
    assert "layers.0.linear.kernels.1o" in names


def test_frozen_paths_stay_bit_identical_and_others_move(frames):
    model = tiny_model()
    config = Optimizer(frozen=("embedding", "layers.0.*"), weight_decay=0.1)
    optimizer = make_optimizer(config, params_of(model), 10)
    before = {k: np.asarray(v).copy() for k, v in named(params_of(model)).items()}
    step = make_train_step(model, optimizer, LossWeights(), 0.9)
    graph, labels = jax.tree.map(jnp.asarray, packing_for(frames)(frames[:3]))
    state = init_state(model, optimizer)
    for _ in range(3):
        state, _ = step(state, graph, labels, jnp.ones((), jnp.float32))
    for name, value in named(state.params).items():
        frozen = name == "embedding" or name.startswith("layers.0.")
        assert np.array_equal(np.asarray(value), before[name]) == frozen, name


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match=r"'layer\.0\.\*' matches no parameter"):
        match_paths(params_of(tiny_model()), ("layer.0.*",))


def test_weight_decay_touches_its_group_only():
    params = params_of(tiny_model())
    config = Optimizer(weight_decay=0.5, warmup_steps=0, schedule="constant", learning_rate=0.1)
    optimizer = make_optimizer(config, params, 10)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    for name, update in named(updates).items():
        decayed = ".linear." in name or name.endswith("product_weights")
        assert bool(jnp.any(update != 0)) == decayed, name


def test_gradients_are_clipped_by_the_norm_of_all_together():
    params = params_of(tiny_model())
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)  # noqa: E731
    large, small = (jax.tree.map(draw, params) for _ in range(2))
    norm = float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(large))))

    def second_update(clip_norm, factor):
        optimizer = make_optimizer(Optimizer(clip_norm=clip_norm, weight_decay=0.0), params, 10)
        first = jax.tree.map(lambda x: x * jnp.float32(factor), large)
        _, state = optimizer.update(first, optimizer.init(params), params)
        update, _ = optimizer.update(
            jax.tree.map(lambda x: x * jnp.float32(1e-3), small), state, params
        )
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(update)])

    clipped = second_update(1.0, 100.0)
    np.testing.assert_allclose(clipped, second_update(1e9, 1 / norm), rtol=1e-4, atol=1e-9)
    assert np.abs(clipped / second_update(1e9, 100.0) - 1).max() > 0.01


def test_the_cosine_warms_up_and_ends_low():
    schedule = learning_rate_schedule(Optimizer(learning_rate=0.01, warmup_steps=10), 1000)
    assert float(schedule(0)) < 0.002
    assert float(schedule(10)) == pytest.approx(0.01)
    assert float(schedule(505)) == pytest.approx(0.005, rel=0.01)
    assert float(schedule(1000)) == pytest.approx(1e-6, rel=1e-3)


def test_the_average_follows_its_recursion(frames):
    model = tiny_model()
    optimizer = make_optimizer(Optimizer(), params_of(model), 10)
    step = make_train_step(model, optimizer, LossWeights(), 0.99)
    graph, labels = jax.tree.map(jnp.asarray, packing_for(frames)(frames[:3]))
    state = init_state(model, optimizer)
    mean = np.asarray(state.ema["embedding"][...])
    for t in range(4):
        state, _ = step(state, graph, labels, jnp.ones((), jnp.float32))
        decay = min(0.99, (1 + t) / (10 + t))
        mean = decay * mean + (1 - decay) * np.asarray(state.params["embedding"][...])
    np.testing.assert_allclose(np.asarray(state.ema["embedding"][...]), mean, rtol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing(frames):
    model = tiny_model()
    optimizer = make_optimizer(Optimizer(), params_of(model), 10)
    step = make_train_step(model, optimizer, LossWeights(), 0.99)
    graph, labels = jax.tree.map(jnp.asarray, packing_for(frames)(frames[:3]))
    bad = labels._replace(forces=labels.forces.at[0, 0].set(jnp.nan))
    state = init_state(model, optimizer)
    before = [np.asarray(x).copy() for x in jax.tree.leaves((state.params, state.optimizer))]
    state, report = step(state, graph, bad, jnp.ones((), jnp.float32))
    after = jax.tree.leaves((state.params, state.optimizer))
    assert not np.isfinite(float(report.loss))
    assert int(state.step) == 1
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(before, after, strict=True))


def gradient_like(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def updates_of(config, gradients, params):
    optimizer = make_optimizer(config, params, 10)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
    return named(updates)


@pytest.mark.parametrize("kind", ["adamw", "amsgrad", "muon"])
def test_rates_are_factors_of_the_learning_rate_by_path(kind):
    params = params_of(tiny_model())
    plain = updates_of(Optimizer(kind=kind), [gradient_like(params)], params)
    rates = {"layers.0.linear.*": 0.5, "layers.0.*": 0.1, "readouts.*": 3.0}
    scaled = updates_of(Optimizer(kind=kind, rates=rates), [gradient_like(params)], params)
    for name, update in scaled.items():
        if name.startswith("layers.0.linear."):
            factor = 0.5
        elif name.startswith("layers.0."):
            factor = 0.1
        else:
            factor = 3.0 if name.startswith("readouts.") else 1.0
        np.testing.assert_allclose(update, factor * plain[name], rtol=1e-6)


def test_muon_is_adam_for_all_but_the_matrices_of_linear_layers():
    params = params_of(tiny_model())
    plain = {"weight_decay": 0.0, "warmup_steps": 0, "learning_rate": 1.0}
    gradients = [gradient_like(params)]
    muon = updates_of(Optimizer(kind="muon", **plain), gradients, params)
    adam = updates_of(Optimizer(kind="adamw", **plain), gradients, params)
    for name, update in muon.items():
        as_adam = np.allclose(update, adam[name], rtol=1e-6)
        assert as_adam == ("kernels" not in name), name
        if not as_adam and update.ndim == 2 and min(update.shape) > 1:
            values = np.linalg.svd(update, compute_uv=False)
            assert values[0] < 2 * values[-1], name


def test_muon_treats_every_matrix_as_if_it_were_alone():
    """Over two steps, so that the momentum is each one's own too."""
    params = params_of(tiny_model())
    plain = {"weight_decay": 0.0, "warmup_steps": 0, "learning_rate": 1.0, "clip_norm": 1e9}
    gradients = [gradient_like(params), jax.tree.map(lambda x: x**2 - 0.1, gradient_like(params))]
    config = Optimizer(kind="muon", **plain)
    together, rate = updates_of(config, gradients, params), learning_rate_schedule(config, 10)(1)
    alone = optax.contrib.scale_by_muon()
    matrices = 0
    for name, found in together.items():
        if "kernels" not in name or found.ndim != 2:
            continue
        state = alone.init(named(params)[name])
        with jax.numpy_dtype_promotion("standard"):
            for gradient in gradients:
                expected, state = alone.update(named(gradient)[name], state)
        expected = -float(rate) * np.sqrt(found.shape[1]) * np.asarray(expected)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
        matrices += 1
    assert matrices > 3


def test_frozen_parameters_have_no_moments():
    params = params_of(tiny_model())
    config = Optimizer(kind="adamw", frozen=("layers.0.*",))
    held = sum(x.size for x in jax.tree.leaves(make_optimizer(config, params, 10).init(params)))
    moving = sum(v.size for k, v in named(params).items() if not k.startswith("layers.0."))
    assert 2 * moving <= held <= 2 * moving + 10


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"frozen": ("*",)}, "leaves no parameter to train"),
        ({"rates": {"nothing": 0.1}}, "'nothing' matches no parameter"),
    ],
)
def test_optimizers_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(Optimizer(**fields), params_of(tiny_model()), 10)


def test_a_rate_of_zero_is_refused():
    with pytest.raises(ValueError, match="to keep weights: frozen"):
        Optimizer(rates={"*": 0.0})
