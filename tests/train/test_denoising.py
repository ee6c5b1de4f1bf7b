"""Denoising as an auxiliary task: its loss by hand, its weight, its runs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SPECIES, every_step, make_structures, packing_for
from flax import nnx

import equizoo.train.loop as loop
from equizoo.config import from_dict, to_dict
from equizoo.data.corruption import Corruption, Corruptor
from equizoo.data.pipeline import training_stream
from equizoo.layers.force_encoding import ForceInput
from equizoo.train.config import Errors, LossWeights, Optimizer, TrainConfig
from equizoo.train.denoising import PUBLISHED, Decay, Denoising
from equizoo.train.loop import fit
from equizoo.train.loss import loss
from equizoo.zoo._base import Prediction
from equizoo.zoo.equiformer_v2 import EquiformerV2Config, Forces

TASK = Denoising(
    corruption=Corruption(probability=0.5, fraction=0.5, noise=(0.1,)),
    weight=2.0,
    decay=Decay.LINEAR,
)
CONFIG = TrainConfig(
    epochs=4,
    batch_size=3,
    loss=LossWeights(energy=0.1, forces=1.0, errors=Errors.NORMS),
    optimizer=Optimizer(learning_rate=0.01, ema_decay=0.9),
    auxiliary=TASK,
    checkpoint_every=5,
)


INPUT = ForceInput()


def tiny_model(force_input=INPUT):
    config = EquiformerV2Config(
        atomic_numbers=SPECIES, cutoff=4.0, avg_num_neighbors=6.0, channels=4, hidden_channels=4,
        ffn_channels=4, alpha_channels=3, value_channels=2, edge_channels=4, num_layers=1,
        num_heads=2, l_max=1, m_max=1, num_basis=4, grid_points=4, forces=Forces.DIRECT,
        alpha_dropout=0.0, drop_path=0.0, avg_num_nodes=4.0, force_input=force_input,
    )  # fmt: skip
    return config.build(rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def frames():
    config = tiny_model().config
    return [config.frame(structure) for structure in make_structures(24)]


def batch_of(frames):
    """The first batch of a stream, corrupted."""
    always = dataclasses.replace(TASK.corruption, probability=1.0)
    corruptor = Corruptor(always, tiny_model().config.frame)
    return jax.tree.map(
        jnp.asarray, next(training_stream(frames, packing_for(frames), 0, corruptor))
    )


# ---- the loss


def test_the_loss_of_a_corrupted_batch_by_hand(frames):
    graph, labels = batch_of(frames)
    assert labels.noise_mask.any() and labels.forces_mask.any()
    rng = np.random.default_rng(0)
    off = [rng.normal(size=labels.forces.shape).astype(np.float32) for _ in range(2)]
    errors = rng.normal(size=labels.energy.shape).astype(np.float32)
    prediction = Prediction(
        labels.energy + errors, labels.forces + off[0], None, jnp.zeros(len(off[0])),
        labels.noise + off[1],
    )  # fmt: skip
    weights = LossWeights(energy=2.0, forces=100.0, errors=Errors.NORMS)
    clean, moved = np.asarray(labels.forces_mask), np.asarray(labels.noise_mask)
    assert not (clean & moved).any()
    lengths = [np.linalg.norm(x, axis=1) for x in off]
    expected = 2.0 * np.abs(errors[np.asarray(labels.energy_mask)]).mean()
    atoms = clean.sum() + moved.sum()  # one mean over all atoms, each with its own weight
    expected += (100.0 * lengths[0][clean].sum() + 10.0 * lengths[1][moved].sum()) / atoms
    assert float(loss(prediction, graph, labels, weights, 10.0)) == pytest.approx(
        expected, rel=1e-5
    )
    squares = LossWeights(energy=0.0, forces=3.0)
    expected = (3.0 * (off[0][clean] ** 2).sum() + 10.0 * (off[1][moved] ** 2).sum()) / (3 * atoms)
    assert float(loss(prediction, graph, labels, squares, 10.0)) == pytest.approx(
        expected, rel=1e-5
    )


def test_norms_have_a_gradient_where_nothing_is_wrong(frames):
    graph, labels = batch_of(frames)
    right = Prediction(labels.energy, labels.forces, None, jnp.zeros(graph.num_nodes), labels.noise)
    weights = LossWeights(errors=Errors.NORMS)
    gradient = jax.grad(lambda p: loss(p, graph, labels, weights, 1.0))(right)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(gradient))


def test_the_weight_over_a_run():
    steps = jnp.array([0, 5, 10, 12])
    linear = [float(TASK.weight_at(step, 10)) for step in steps]
    assert linear == pytest.approx([2.0, 1.0, 0.0, 0.0])
    constant = dataclasses.replace(TASK, decay=Decay.CONSTANT)
    assert [float(constant.weight_at(step, 10)) for step in steps] == [2.0] * 4


# ---- settings


def test_published_settings_are_configuration():
    for name, task in PUBLISHED.items():
        config = dataclasses.replace(CONFIG, auxiliary=task)
        assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config, name
    table = {name: (t.corruption.probability, t.corruption.fraction, t.weight)
             for name, t in PUBLISHED.items()}  # fmt: skip
    assert table["oc20_2m"] == (0.5, 0.5, 10) and PUBLISHED["oc20_2m"].corruption.noise == (0.1,)
    assert table["oc20_all_md"] == (0.125, 0.25, 15)
    assert table["oc22"] == (0.5, 0.5, 25) and PUBLISHED["oc22"].corruption.noise == (0.15,)
    assert table["md17"] == (0.25, 0.25, 5) and PUBLISHED["md17"].decay is Decay.LINEAR
    levels = np.log(PUBLISHED["multi_scale"].corruption.noise)
    assert len(levels) == 50 and np.allclose(np.diff(levels), np.log(50) / 49)


def test_what_cannot_be_is_refused(frames, tmp_path):
    with pytest.raises(ValueError, match="takes no forces.*set its config's force_input"):
        fit(tiny_model(None), frames[:6], frames[6:9], packing_for(frames), CONFIG, tmp_path)
    with pytest.raises(ValueError, match="weight is 0.0, expected a positive"):
        dataclasses.replace(TASK, weight=0.0)
    with pytest.raises(ValueError, match="huber_delta is for errors='squares'"):
        LossWeights(huber_delta=0.1, errors=Errors.NORMS)


# ---- runs


def losses_of(folder, frames, config, stop_after=None):
    """The losses of a run, as bytes; ``stop_after`` some steps it is killed."""
    seen = []

    def see(report):
        seen.append(np.asarray(report.loss).tobytes())
        if len(seen) == stop_after:
            raise KeyboardInterrupt

    with every_step(see):
        try:
            fit(tiny_model(), frames[:18], frames[18:], packing_for(frames), config, folder)
        except KeyboardInterrupt:
            assert stop_after
    return seen


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_noise(frames, tmp_path):
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    whole = losses_of(tmp_path / "whole", frames, CONFIG)
    seen = losses_of(tmp_path / "killed", frames, CONFIG, stop_after=13)
    again = losses_of(tmp_path / "killed", frames, CONFIG)
    assert seen == whole[:13] and again == whole[10:] and len(whole) == 24


@pytest.mark.slow
def test_noise_is_learned_and_changes_nothing_but_through_learning(frames, tmp_path):
    """The first step's loss, where the coin fell on tails, is that of a run without the task."""
    long = dataclasses.replace(CONFIG, epochs=12)
    for folder in ("with", "without"):
        (tmp_path / folder).mkdir()
    task = losses_of(tmp_path / "with", frames, long)
    plain = dataclasses.replace(long, auxiliary=None)
    without = losses_of(tmp_path / "without", frames, plain)
    values = [np.frombuffer(x, np.float32)[0] for x in task]
    assert np.mean(values[-12:]) < 0.8 * np.mean(values[:12])
    stream = training_stream(
        frames[:18],
        packing_for(frames),
        CONFIG.seed,
        loop.make_corruptor(tiny_model().config, long),
    )
    heads = [bool(next(stream)[1].noise_mask.any()) for _ in range(len(task))]
    assert True in heads and False in heads
    first = heads.index(True)
    assert [float(v) for v in values[:first]] == pytest.approx(
        [float(np.frombuffer(x, np.float32)[0]) for x in without[:first]], rel=1e-5
    )
    assert task[first] != without[first]
