"""The loop as a whole: it learns, it compiles little, it stops when told."""

import contextlib
import dataclasses
import itertools
import math
import re
import signal

import jax
import numpy as np
import pytest
from conftest import SPECIES, frames_of, make_structures, packing_for, tiny_model
from flax import nnx

import equizoo.train.step as step_module
from equizoo.data.pipeline import Packing, training_stream
from equizoo.graph import Budget
from equizoo.train import loop
from equizoo.train.config import LossWeights, Optimizer, SecondStage, TrainConfig
from equizoo.train.loop import Progress, _loss_at, _train_row, _update_plateau, fit
from equizoo.train.loss import ErrorSums
from equizoo.train.progress import MEASURED, read_rows
from equizoo.train.step import StepReport

CONFIG = TrainConfig(
    epochs=12,
    batch_size=3,
    loss=LossWeights(energy=1.0, forces=1.0, stress=1.0),
    optimizer=Optimizer(learning_rate=0.02, ema_decay=0.9),
)


def test_errors_fall_and_the_best_average_is_returned(frames, tmp_path):
    fitted = fit(tiny_model(), frames[:18], frames[18:], packing_for(frames), CONFIG, tmp_path)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == list(range(1, 13))
    assert rows[-1]["train_loss"] < 0.5 * rows[0]["train_loss"]
    objectives = [row["valid_objective"] for row in rows]
    assert fitted.best_epoch == 1 + int(np.argmin(objectives))
    assert fitted.finished and fitted.epochs == 12
    assert rows[-1]["valid_forces_rmse_meV_per_A"] > rows[-1]["valid_forces_mae_meV_per_A"] > 0
    assert any((tmp_path / "tensorboard").iterdir())


def test_early_stop_ends_the_run(frames, tmp_path):
    still = dataclasses.replace(
        CONFIG, early_stop=2, optimizer=Optimizer(learning_rate=1e-12, ema_decay=0.0)
    )
    fitted = fit(tiny_model(), frames[:6], frames[6:9], packing_for(frames), still, tmp_path)
    assert fitted.epochs < still.epochs


def test_early_stop_waits_for_validations_and_a_stopped_run_stays_stopped(frames, tmp_path):
    still = dataclasses.replace(
        CONFIG,
        early_stop=1,
        validate_every=2,
        optimizer=Optimizer(learning_rate=1e-12, ema_decay=0.0),
    )
    given = tiny_model(), frames[:6], frames[6:9], packing_for(frames), still, tmp_path
    fitted = fit(*given)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert fitted.epochs == 4 and [r["epoch"] for r in rows if "valid_objective" in r] == [2, 4]
    again = fit(*given)
    assert (again.epochs, again.best_epoch) == (4, fitted.best_epoch)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 4
    with pytest.raises(ValueError, match="early_stop is 0, expected at least 1"):
        dataclasses.replace(CONFIG, early_stop=0)


def test_a_stress_that_no_stage_could_learn_is_refused_before_the_first(frames, tmp_path):
    model = tiny_model()
    direct = type("Direct", (type(model.config),), {"conservative": False})
    model.config = direct(**{f.name: getattr(model.config, f.name)
                             for f in dataclasses.fields(model.config)})  # fmt: skip
    late = dataclasses.replace(
        CONFIG,
        loss=LossWeights(),
        second_stage=SecondStage(start=0.5, loss=LossWeights(stress=1.0)),
    )
    with pytest.raises(ValueError, match="direct forces predicts none"):
        fit(model, frames[:6], frames[6:9], packing_for(frames), late, tmp_path)


def test_the_second_stage_has_its_own_loss_from_its_start_on(frames, tmp_path):
    weights = LossWeights(energy=1.0, forces=1.0)
    heavier = LossWeights(energy=1e4, forces=1e4)
    config = dataclasses.replace(
        CONFIG,
        epochs=5,
        loss=weights,
        second_stage=SecondStage(start=0.6, loss=heavier),
        optimizer=Optimizer(learning_rate=1e-6, warmup_steps=1),
    )
    fractions = (0.0, 0.59, 0.6, 0.99)
    assert [_loss_at(config, f) for f in fractions] == [weights, weights, heavier, heavier]
    fit(tiny_model(), frames[:6], frames[6:9], packing_for(frames), config, tmp_path)
    losses = [row["train_loss"] for row in read_rows(tmp_path / "metrics.jsonl")]
    np.testing.assert_allclose(losses[1:3], losses[0], rtol=0.05)
    np.testing.assert_allclose(losses[3:], 1e4 * losses[0], rtol=0.05)


def test_a_plateau_lowers_the_rate_once_patience_is_over():
    config = dataclasses.replace(
        CONFIG,
        optimizer=Optimizer(schedule="plateau", plateau_factor=0.5, plateau_patience=2),
    )
    progress, scales = Progress(), []
    for objective in (1.0, 0.9, 0.9, 0.95, 1.0, 0.8, 0.9):
        _update_plateau(progress, objective, config)
        scales.append(progress.scale)
    assert scales == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    cosine = dataclasses.replace(CONFIG, optimizer=Optimizer(plateau_patience=0))
    still = Progress(plateau_best=0.0)
    _update_plateau(still, 1.0, cosine)
    assert still.scale == 1.0


def test_the_loss_of_an_epoch_is_the_mean_over_steps_that_counted():
    row = _train_row(Progress(loss_sum=6.0, loss_steps=3, skipped_steps=2))
    assert (row["train_loss"], row["skipped_steps"]) == (2.0, 2)
    assert "train_loss" not in _train_row(Progress(skipped_steps=2))


def test_a_stream_of_a_thousand_sizes_compiles_one_training_program(tmp_path, monkeypatch):
    traces = []
    original = step_module.energy_forces_stress

    def counted(model, graph):
        traces.append(graph.num_nodes)
        return original(model, graph)

    monkeypatch.setattr(step_module, "energy_forces_stress", counted)
    frames = frames_of(make_structures(1000, seed=3))
    packing = packing_for(frames, batch_size=40)
    config = dataclasses.replace(CONFIG, epochs=1, batch_size=40)
    fit(tiny_model(), frames[:900], frames[900:], packing, config, tmp_path)
    assert 2 <= len(traces) <= 8  # the step (traced once or twice by JAX) and validation


def steps(outcomes, frames):
    """What the loop notes of steps that were good or not, one after the other."""
    progress, errors = Progress(), ErrorSums(*np.zeros((4, 3)))
    for good in outcomes:
        report = StepReport(np.float32(1.0 if good else math.nan), np.float32(1.0), errors)
        loop._accumulate(progress, report, frames)
    return progress


def test_skipped_steps_are_counted_in_all_and_in_a_row(frames):
    bad, good = [False] * 20, [True]
    progress = steps([*bad, *good, *bad, *good, *bad[:3]], frames[:2])
    assert (progress.skipped_steps, progress.skipped_in_a_row) == (43, 3)
    assert _train_row(progress)["skipped_steps"] == 43
    assert progress.loss_steps == 2
    loop._require_no_spoiler(progress)
    steps([*good, *bad], frames[:2])
    with pytest.raises(FloatingPointError, match="for more than 20 steps in a row"):
        steps([*good, *bad, False], frames[:2])


def test_a_structure_in_too_many_skipped_steps_ends_the_run_whatever_the_others_do(frames):
    progress = Progress()
    for _ in range(20):
        for outcome, members in ((False, frames[:3]), (True, frames[1:])):
            value = np.float32(1.0 if outcome else math.inf)
            report = StepReport(value, np.float32(1.0), ErrorSums(*np.zeros((4, 3))))
            loop._accumulate(progress, report, members)
    loop._require_no_spoiler(progress)
    progress.suspects[frames[0].structure.name] += 1
    name = re.escape(frames[0].structure.name)
    with pytest.raises(FloatingPointError, match=f"in 20 steps so far.* {name}, in 21 of them"):
        loop._require_no_spoiler(progress)


@contextlib.contextmanager
def sigterm_after(owner, name, call):
    """The signal comes at the end of that call of a function (from 1)."""
    original, count = getattr(owner, name), itertools.count(1)

    def signalled(*arguments):
        result = original(*arguments)
        if next(count) == call:
            signal.raise_signal(signal.SIGTERM)
        return result

    setattr(owner, name, signalled)
    try:
        yield
    finally:
        setattr(owner, name, original)


@pytest.fixture(scope="module")
def two_epochs(frames, tmp_path_factory):
    """A run of which others are interrupted: what it is given, its rows, its weights."""
    config = dataclasses.replace(CONFIG, epochs=2, checkpoint_every=1000)
    given = (frames[:9], frames[9:18], packing_for(frames), config)
    assert sum(1 for _ in loop.sequential_batches(*given[1:3])) > 2
    folder = tmp_path_factory.mktemp("whole")
    fitted = fit(tiny_model(), *given, folder)
    return given, unmeasured(folder), jax.device_get(jax.tree.leaves(fitted.params))


def unmeasured(folder):
    rows = read_rows(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


@pytest.mark.parametrize(
    ("owner", "name", "call", "epochs"),
    [
        (loop, "_fitting", 1, []),  # while the step is compiled
        (jax, "device_get", 4 + 1, []),  # between batches of the first epoch's validation
        (jax, "device_get", 2 * 3 + 3 + 1 + 1, [1]),  # of the last one's
        (loop, "_require_no_spoiler", 2, [1]),  # before any of its batches
    ],
)
def test_sigterm_in_any_phase_saves_and_the_run_goes_on_as_if_nothing_had_happened(
    two_epochs, tmp_path, owner, name, call, epochs
):
    given, rows, params = two_epochs
    with sigterm_after(owner, name, call):
        stopped = fit(tiny_model(), *given, tmp_path)
    assert not stopped.finished
    assert [row["epoch"] for row in unmeasured(tmp_path)] == epochs
    resumed = fit(tiny_model(), *given, tmp_path)
    assert resumed.finished and unmeasured(tmp_path) == rows
    for a, b in zip(jax.tree.leaves(resumed.params), params, strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)


def test_more_epochs_go_on_where_the_run_had_ended(frames, tmp_path):
    """Where no schedule is spread over them, as if there had been so many from the start."""
    constant = Optimizer(learning_rate=0.02, ema_decay=0.9, schedule="constant", warmup_steps=1)
    given = (frames[:9], frames[9:12], packing_for(frames))
    for folder, lengths in (("extended", (1, 2)), ("whole", (2,))):
        for epochs in lengths:
            config = dataclasses.replace(CONFIG, epochs=epochs, optimizer=constant)
            fitted = fit(tiny_model(), *given, config, tmp_path / folder)
            assert fitted.finished and fitted.epochs == epochs
    assert unmeasured(tmp_path / "extended") == unmeasured(tmp_path / "whole")


def test_the_structure_that_spoils_steps_is_named(tmp_path):
    structures = make_structures(20)
    structures[7] = dataclasses.replace(structures[7], forces=1e30 * structures[7].forces)
    frames = frames_of(structures)
    config = dataclasses.replace(CONFIG, epochs=25)
    with pytest.raises(FloatingPointError) as stopped:
        fit(tiny_model(), frames[:18], frames[18:], packing_for(frames), config, tmp_path)
    assert f"It never was with {structures[7].name}, in 21 of them" in str(stopped.value)


def test_a_row_says_how_much_of_the_batches_was_padding(frames, tmp_path):
    packing, config = packing_for(frames), dataclasses.replace(CONFIG, epochs=1)
    fit(tiny_model(), frames[:18], frames[18:], packing, config, tmp_path)
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    stream = training_stream(frames[:18], packing, CONFIG.seed)
    held = [frame for _ in range(6) for frame in stream.take()]
    for kind, room in (("nodes", packing.budget.nodes), ("edges", packing.budget.edges)):
        used = sum(getattr(frame, f"num_{kind}") for frame in held)
        assert row[f"padding_{kind}"] == pytest.approx(1 - used / (6 * room))
    assert row["peak_memory_GB"] > 0.05


def test_labels_that_are_never_finite_stop_the_run(frames, tmp_path):
    energies = np.full(len(SPECIES), math.inf)
    packing = Packing(Budget.of(frames, nodes=20, graphs=4), energies)
    with pytest.raises(FloatingPointError, match="20 steps.* No structure stands out"):
        fit(tiny_model(), frames[:18], frames[18:], packing, CONFIG, tmp_path)


def test_training_does_not_change_the_model_it_is_given(frames, tmp_path):
    model = tiny_model()
    before = [np.asarray(x).copy() for x in jax.tree.leaves(nnx.state(model, nnx.Param))]
    config = dataclasses.replace(CONFIG, epochs=1)
    fit(model, frames[:6], frames[6:9], packing_for(frames), config, tmp_path)
    after = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(before, after, strict=True))
