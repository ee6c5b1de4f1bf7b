"""Parts of a batch give what the whole gives, however many devices share them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import packing_for, tiny_model
from flax import nnx

from equizoo.train.config import LossWeights, Optimizer, TrainConfig
from equizoo.train.optimizer import make_optimizer
from equizoo.train.parallel import largest_share, make_mesh, replicated, shared
from equizoo.train.step import init_state, make_train_step

HERE = Path(__file__).parent


def stepped(model, mesh, graph, labels):
    optimizer = make_optimizer(Optimizer(warmup_steps=0), nnx.state(model, nnx.Param), 10)
    weights = LossWeights(energy=1.0, forces=2.0, stress=3.0)
    step = make_train_step(model, optimizer, weights, 0.9, mesh=mesh)
    state = init_state(model, optimizer)
    state = state if mesh is None else replicated(mesh, state)
    return step(state, graph, labels, jnp.ones((), jnp.float32))


def test_parts_of_unequal_content_give_the_loss_and_gradient_of_the_whole(frames):
    """Among them crystals with stress and clusters without: means are over the whole batch."""
    model, chosen = tiny_model(), frames[:6]
    whole = jax.tree.map(jnp.asarray, packing_for(frames, 6)(chosen))
    state, report = stepped(model, None, *whole)
    packing, mesh = packing_for(frames, 3), make_mesh(3)
    parts = [packing(chosen[i:j]) for i, j in ((0, 1), (1, 3), (3, 6))]
    in_parts, same = stepped(model, mesh, *shared(mesh, parts))
    np.testing.assert_allclose(same.loss, report.loss, rtol=1e-6)
    np.testing.assert_allclose(same.gradient_norm, report.gradient_norm, rtol=1e-5)
    for a, b in zip(same.errors, report.errors, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(in_parts.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def run(folder: Path, devices: int, last_step: int = 100) -> dict:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(HERE.parents[1]),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
        + f" --xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, HERE / "parallel_run.py", folder, str(last_step)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    found = run(tmp_path_factory.mktemp("alone"), 1)
    assert set(found["devices"]) == {1} and len(found["losses"]) == 9
    return found


def test_many_devices_give_the_result_of_one(alone, tmp_path):
    many = run(tmp_path / "many", 8)
    assert set(many["devices"]) == {8}
    np.testing.assert_allclose(many["losses"], alone["losses"], rtol=1e-5)
    np.testing.assert_allclose(many["params"], alone["params"], atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(alone, tmp_path):
    started = run(tmp_path / "moved", 2, last_step=5)
    assert set(started["devices"]) == {2} and len(started["losses"]) == 5
    rest = run(tmp_path / "moved", 4)
    assert set(rest["devices"]) == {4} and len(rest["losses"]) == 5  # from the checkpoint of step 4
    losses = started["losses"][:4] + rest["losses"]
    np.testing.assert_allclose(losses, alone["losses"], rtol=1e-5)
    np.testing.assert_allclose(rest["params"], alone["params"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("parts, devices, used", [(4, 8, 4), (6, 4, 3), (5, 3, 1), (1, 8, 1)])
def test_devices_share_the_parts_equally(parts, devices, used):
    assert largest_share(parts, devices) == used


def test_a_batch_that_cannot_be_shared_equally_is_refused():
    with pytest.raises(ValueError, match="batch_size is 5, which 2 microbatches cannot share"):
        TrainConfig(epochs=1, batch_size=5, microbatches=2)
