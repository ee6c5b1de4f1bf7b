"""Low-rank changes of weights: they start from the model, stay in their rank, and merge exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import packing_for, tiny_model
from flax import nnx

from equizoo.train.checkpoint import Checkpoints
from equizoo.train.config import LossWeights, Optimizer
from equizoo.train.optimizer import make_optimizer
from equizoo.train.parameter_paths import path_name
from equizoo.train.parametrization import LowRank, _merged, parametrization
from equizoo.train.step import init_state, make_train_step, make_validation_step


def params_of(model):
    return nnx.state(model, nnx.Param)


def named(params):
    return {path_name(p): np.asarray(v) for p, v in jax.tree_util.tree_leaves_with_path(params)}


def test_it_starts_from_the_model_as_it_is():
    params = params_of(tiny_model())
    form = parametrization(params, LowRank(rank=2))
    for a, b in zip(
        jax.tree.leaves(form.weights(form.start(params))), jax.tree.leaves(params), strict=True
    ):
        assert np.array_equal(a, b)


@pytest.fixture(scope="module")
def trained(frames):
    """The model, its parametrization, the state after some steps, and a batch."""
    model, rule = tiny_model(), LowRank(rank=2, adapted=("layers.*",), whole=("readouts.*",))
    params = params_of(model)
    form = parametrization(params, rule)
    config = Optimizer(learning_rate=0.02, warmup_steps=0, weight_decay=0.1)
    optimizer = make_optimizer(config, form.start(params), 10, form.fixed)
    step = make_train_step(model, optimizer, LossWeights(), 0.5, form=form)
    batch = jax.tree.map(jnp.asarray, packing_for(frames)(frames[:3]))
    state = init_state(model, optimizer, form)
    for _ in range(5):
        state, _ = step(state, *batch, jnp.ones((), jnp.float32))
    return model, form, state, batch


def test_changes_are_of_the_rank_asked_for_and_nothing_else_moves(trained):
    model, form, state, _ = trained
    before, after = named(params_of(model)), named(form.weights(state.params))
    adapted = 0
    for name, old in before.items():
        change = after[name] - old
        if name.startswith("readouts."):
            assert np.any(change), name
        elif name.startswith("layers.") and old.ndim in (2, 3) and min(old.shape[-2:]) > 2:
            values = np.linalg.svd(change.astype(np.float64), compute_uv=False)
            assert np.all(values[..., 2:] < 1e-5 * values[..., :1]), name
            assert np.all(values[..., 0] > 0), name
            adapted += 1
        else:
            assert not np.any(change), name
    assert adapted >= 6


def test_the_merged_model_predicts_what_was_validated(trained):
    model, form, state, batch = trained
    inside = make_validation_step(model, LossWeights(), form)(state.ema, *batch)
    merged = make_validation_step(model, LossWeights())(form.weights(state.ema), *batch)
    for a, b in zip(jax.tree.leaves(inside), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_what_is_saved_is_merged_in_full_precision():
    """On devices whose products have fewer digits by default; a CPU's have not."""
    parts = {"base": jnp.ones((4, 4)), "down": jnp.ones((4, 2)), "up": jnp.ones((2, 4))}
    assert "HIGHEST" in str(jax.make_jaxpr(_merged)(parts))


def test_the_optimizer_remembers_only_what_moves(trained):
    _, _, state, _ = trained
    moving = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
        if not path_name(path).endswith(".base")
    )
    held = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer))
    assert 3 * moving <= held <= 3 * moving + 10  # AMSGrad: two moments and a maximum; counters


def test_one_seed_gives_one_start():
    params = params_of(tiny_model())
    starts = [
        jax.tree.leaves(parametrization(params, LowRank(rank=2), seed).start(params))
        for seed in (1, 1, 2)
    ]
    same = [
        all(np.array_equal(a, b) for a, b in zip(starts[0], other, strict=True))
        for other in starts[1:]
    ]
    assert same == [True, False]


@pytest.mark.parametrize(
    "rule, message",
    [
        (LowRank(rank=1000), "has more than 1000 rows and columns"),
        (LowRank(adapted=("layer.*",)), r"'layer\.\*' matches no parameter"),
        (LowRank(whole=("nothing",)), "'nothing' matches no parameter"),
    ],
)
def test_rules_that_train_nothing_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        parametrization(params_of(tiny_model()), rule)


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="rank is 0, expected at least 1"):
        LowRank(rank=0)


def test_a_checkpoint_brings_all_of_it_back(tmp_path):
    model = tiny_model()
    params = params_of(model)
    form = parametrization(params, LowRank(rank=2))
    config = Optimizer(kind="muon", rates={"*.up": 2.0})
    optimizer = make_optimizer(config, form.start(params), 10, form.fixed)
    state = init_state(model, optimizer, form)
    gradient = jax.tree.map(jnp.ones_like, state.params)
    updates, moments = optimizer.update(gradient, state.optimizer, state.params)
    state = state._replace(optimizer=moments, step=state.step + 1)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save("last", state, {}, {})
    restored = checkpoints.restore("last", init_state(model, optimizer, form))
    checkpoints.close()
    assert jax.tree.structure(restored[0]) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored[0]), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
