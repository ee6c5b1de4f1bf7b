"""A run that is killed goes on as if nothing had happened, bit for bit."""

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from equizoo.train.progress import MEASURED, read_rows

HERE = Path(__file__).parent


def start(folder: Path, pause: float = 0.0) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parents[1])}
    return subprocess.Popen(
        [sys.executable, HERE / "tiny_run.py", folder, str(pause)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def losses(folder: Path) -> list[str]:
    return (folder / "losses.txt").read_text().split()


def wait_for_losses(folder: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while count and (not (folder / "losses.txt").exists() or len(losses(folder)) < count):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.01)


def rows_without_time(folder: Path) -> list[dict]:
    return [
        {key: value for key, value in row.items() if key not in MEASURED}
        for row in read_rows(folder / "metrics.jsonl")
    ]


def final_params(folder: Path) -> list[bytes]:
    from conftest import tiny_model
    from tiny_run import CONFIG

    from equizoo.train.checkpoint import Checkpoints
    from equizoo.train.optimizer import make_optimizer
    from equizoo.train.step import init_state

    model = tiny_model()
    with jax.enable_x64(False):
        state = init_state(model, make_optimizer(CONFIG.optimizer, *_params_and_steps(model)))
        checkpoints = Checkpoints(folder / "checkpoints")
        restored = checkpoints.restore("last", state)
        checkpoints.close()
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(restored[0])]


def _params_and_steps(model):
    from flax import nnx

    return nnx.state(model, nnx.Param), 36


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert "finished" in finish(start(folder))
    return folder


def test_kill_minus_9_in_mid_epoch_then_resume_is_bit_exact(uninterrupted, tmp_path):
    folder = tmp_path / "killed"
    process = start(folder, pause=0.05)
    wait_for_losses(folder, 16, process)  # epochs have 6 steps, checkpoints come every 3
    process.send_signal(signal.SIGKILL)
    process.wait()
    seen = losses(folder)
    whole = losses(uninterrupted)
    assert 16 <= len(seen) < len(whole)
    assert seen == whole[: len(seen)]

    (folder / "losses.txt").unlink()
    assert "finished" in finish(start(folder))
    again = losses(folder)
    resumed_at = len(whole) - len(again)
    assert resumed_at % 3 == 0
    assert len(seen) - 3 <= resumed_at <= len(seen)
    assert again == whole[resumed_at:]
    assert rows_without_time(folder) == rows_without_time(uninterrupted)
    assert final_params(folder) == final_params(uninterrupted)


def test_sigterm_saves_the_step_in_progress_and_exits_cleanly(uninterrupted, tmp_path):
    folder = tmp_path / "terminated"
    process = start(folder, pause=0.05)
    wait_for_losses(folder, 8, process)
    process.send_signal(signal.SIGTERM)
    assert "interrupted" in finish(process)
    seen = losses(folder)

    (folder / "losses.txt").unlink()
    assert "finished" in finish(start(folder))
    assert seen + losses(folder) == losses(uninterrupted)
    assert final_params(folder) == final_params(uninterrupted)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(uninterrupted, tmp_path):
    """While compiling, between steps, while a checkpoint is written: whatever it hits."""
    folder, draw = tmp_path / "hunted", random.Random(0)
    folder.mkdir()
    for _ in range(20):
        seen = len(losses(folder)) if (folder / "losses.txt").exists() else 0
        process = start(folder, pause=0.1)  # so that no machine is through before the last kill
        wait_for_losses(folder, seen + draw.choice([0, 0, 1, 2, 4]), process)
        time.sleep(draw.uniform(0, 0.2))
        assert process.poll() is None, "it came to its end before the twentieth kill"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "finished" in finish(start(folder))
    assert rows_without_time(folder) == rows_without_time(uninterrupted)
    assert final_params(folder) == final_params(uninterrupted)


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="only Linux can limit a running process"
)
def test_no_room_on_the_disk_stops_with_a_clear_error_and_the_last_checkpoint_valid(
    uninterrupted, tmp_path
):
    """The system refuses files above a size; what was saved before is what a resumed run finds."""
    folder = tmp_path / "full"
    process = start(folder, pause=0.05)
    wait_for_losses(folder, 10, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4000, 4000))
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert re.search(
        r"OSError: The checkpoint of step \d+ cannot be written to .*, that of step \d+ is", errors
    )

    (folder / "losses.txt").unlink()
    assert "finished" in finish(start(folder))
    assert final_params(folder) == final_params(uninterrupted)
