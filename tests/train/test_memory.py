"""Memory of a step is known before the first one, and can be traded for time."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import frames_of, make_structures, packing_for, tiny_model
from flax import nnx

import equizoo.train.loop as loop
import equizoo.train.memory as memory
from equizoo.train.config import LossWeights, Optimizer, TrainConfig, WhenTooLarge
from equizoo.train.memory import Forecast, forecast, free_memory, require_fit
from equizoo.train.optimizer import make_optimizer
from equizoo.train.step import init_state, make_train_step
from equizoo.zoo._base import Remat

GB = 10**9
LARGE = Forecast(state=GB, batch=16 * GB, free=8 * GB, batch_size=20)


def step_and_arguments(remat=Remat.NONE, batch_size=3):
    frames = frames_of(make_structures(12))
    packing, model = packing_for(frames, batch_size), tiny_model()
    optimizer = make_optimizer(Optimizer(), nnx.state(model, nnx.Param), 10)
    step = make_train_step(model, optimizer, LossWeights(), 0.99, remat)
    batch = jax.tree.map(jnp.asarray, packing(frames[:3]))
    return step, (init_state(model, optimizer), *batch, jnp.asarray(1.0, jnp.float32))


def test_a_batch_size_is_proposed():
    assert not LARGE.fits
    assert LARGE.proposed == 9  # 0.9 of 8 GB at 0.8 GB each
    with pytest.raises(ValueError, match="batch size 20 takes 16.00 GB.*batch_size=9 should fit"):
        require_fit(LARGE, WhenTooLarge.REFUSE)
    with pytest.warns(UserWarning, match="batch_size=9"):
        require_fit(LARGE, WhenTooLarge.WARN)
    tiny = dataclasses.replace(LARGE, free=GB // 2)
    with pytest.raises(ValueError, match="not even one structure"):
        require_fit(tiny, WhenTooLarge.REFUSE)


def test_what_fits_or_is_unknown_passes():
    for free in (None, 32 * GB):
        found = dataclasses.replace(LARGE, free=free)
        assert found.proposed == 20
        require_fit(found, WhenTooLarge.REFUSE)


def test_larger_batches_take_more():
    found = []
    for batch_size in (3, 9):
        step, arguments = step_and_arguments(batch_size=batch_size)
        found.append(forecast(step.lower(*arguments).compile(), arguments[0], batch_size))
    small, large = found
    assert small.state == large.state == sum(x.nbytes for x in jax.tree.leaves(arguments[0]))
    assert 2 * small.batch < large.batch < 4.5 * small.batch


def test_free_memory_is_that_of_the_machine():
    assert 10**7 < free_memory() < 10**14


def test_a_run_that_would_not_fit_is_refused_before_it_begins(tmp_path, monkeypatch):
    frames = frames_of(make_structures(6))
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    config = TrainConfig(epochs=1, batch_size=3)
    with pytest.raises(ValueError, match="Out of memory ahead"):
        loop.fit(tiny_model(), frames[:4], frames[4:], packing_for(frames), config, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_remat_gives_the_same_step():
    reports, params = [], []
    for remat in Remat:
        step, arguments = step_and_arguments(remat)
        state, report = step(*arguments)
        reports.append(report)
        params.append(jax.tree.leaves(state.params))
    np.testing.assert_allclose(reports[0].loss, reports[1].loss, rtol=1e-5)
    np.testing.assert_allclose(reports[0].gradient_norm, reports[1].gradient_norm, rtol=1e-4)
    for a, b in zip(*params, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_remat_is_refused_where_it_does_nothing(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(type(model), "remats", frozenset([Remat.NONE]))
    optimizer = make_optimizer(Optimizer(), nnx.state(model, nnx.Param), 10)
    with pytest.raises(ValueError, match="MACE does not offer; expected one of none"):
        make_train_step(model, optimizer, LossWeights(), 0.99, Remat.LAYERS)


def test_files_that_were_read_are_room(tmp_path, monkeypatch):
    """They count as used by a container, which drops them when memory is asked for."""
    own = Path("/proc/self/cgroup")
    if not own.is_file():
        pytest.skip("this system has no control groups")
    group = tmp_path / own.read_text().strip().rpartition(":")[2].lstrip("/")
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{8 * GB}\n")
    (group / "memory.current").write_text(f"{7 * GB}\n")
    (group / "memory.stat").write_text(f"anon {2 * GB}\ninactive_file {5 * GB}\nslab 0\n")
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path)
    assert memory._control_group() == 6 * GB
    (group / "memory.max").write_text("max\n")
    assert memory._control_group() is None
