"""Two processes over loopback train one model: as one process would, killed, stopped, resumed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import make_structures, tiny_model
from flax import nnx
from hosts_run import CONFIG, PARTS, problem

from equizoo.config import to_dict
from equizoo.data.pipeline import Share, training_stream
from equizoo.data.readers import write_structures
from equizoo.train import hosts, loop
from equizoo.train.hosts import gathered, join, on_first
from equizoo.train.optimizer import make_optimizer
from equizoo.train.parallel import make_mesh, replicated, shared
from equizoo.train.progress import MEASURED, read_rows
from equizoo.train.step import init_state, make_train_step

HERE = Path(__file__).parent
STEPS = 12  # 4 epochs of 24 frames, 8 at a time


def start(folder: Path, command: tuple = (), *, pause: float = 0.0) -> list[subprocess.Popen]:
    """Both processes, with two devices each; their place comes after the command."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(HERE.parents[1]),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2",
    }
    command = command or (HERE / "hosts_run.py", folder, str(pause))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(
            [sys.executable, *command, f"{index}/2@127.0.0.1:{port}"],
            env=environment,
            cwd=folder,
            **pipes,
        )
        for index in range(2)
    ]


@contextlib.contextmanager
def none_left(processes: list[subprocess.Popen]):
    """After an error within it, the processes that still run are killed."""
    try:
        yield
    except BaseException:
        for process in processes:
            process.kill()
        raise


def finish(processes: list[subprocess.Popen]) -> list[str]:
    with none_left(processes):
        results = [process.communicate(timeout=400) for process in processes]
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in results]


def losses(folder: Path, index: int) -> list[str]:
    path = folder / f"losses-{index}.txt"
    return path.read_text().split() if path.exists() else []


def wait_for_losses(folder: Path, count: int, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 300
    with none_left(processes):
        while min(len(losses(folder, index)) for index in range(2)) < count:
            for process in processes:
                assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "the run did not get there"
            time.sleep(0.01)


def rows(folder: Path) -> list[dict]:
    return [
        {key: value for key, value in row.items() if key not in MEASURED}
        for row in read_rows(folder / "metrics.jsonl")
    ]


def assert_same_result(a: Path, b: Path) -> None:
    assert rows(a) == rows(b)
    (params,) = {(folder / f"params-{i}").read_bytes() for folder in (a, b) for i in range(2)}
    assert len(params) > 500


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert all("finished 4" in output for output in finish(start(folder)))
    return folder


def test_two_processes_give_what_one_device_gives_with_their_batches(whole):
    assert losses(whole, 0) == losses(whole, 1) and len(losses(whole, 0)) == STEPS
    train, _, packing = problem()
    model = tiny_model()
    optimizer = make_optimizer(CONFIG.optimizer, nnx.state(model, nnx.Param), STEPS)
    mesh = make_mesh(PARTS)
    step = make_train_step(model, optimizer, CONFIG.loss, CONFIG.optimizer.ema_decay, mesh=mesh)
    state = replicated(mesh, init_state(model, optimizer))
    streams = [training_stream(train, packing, CONFIG.seed, share=Share(i, 2)) for i in range(2)]
    expected = []
    for _ in range(STEPS):
        parts = [next(stream) for stream in streams for _ in range(PARTS // 2)]
        state, report = step(state, *shared(mesh, parts), replicated(mesh, np.float32(1)))
        expected.append(float(report.loss))
    found = np.frombuffer(bytes.fromhex("".join(losses(whole, 0))), np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_first_alone_writes(whole):
    assert [row["epoch"] for row in rows(whole)] == [1, 2, 3, 4]
    assert len(list((whole / "tensorboard").glob("events*"))) == 1


@pytest.mark.slow
def test_killed_and_started_again_the_result_is_the_same_to_the_bit(whole, tmp_path):
    folder = tmp_path / "killed"
    processes = start(folder, pause=0.2)
    wait_for_losses(folder, 5, processes)
    processes[1].kill()
    time.sleep(0.5)
    processes[0].kill()  # it waits for the other in vain
    for process in processes:
        process.communicate()
    seen = len(losses(folder, 0))
    assert 5 <= seen < STEPS
    assert all("finished" in output for output in finish(start(folder)))
    again = losses(folder, 0)[seen:]
    assert len(again) < STEPS and again == losses(whole, 0)[-len(again) :]
    assert_same_result(folder, whole)


@pytest.mark.slow
def test_one_that_is_told_to_stop_stops_both_after_the_same_step(whole, tmp_path):
    folder = tmp_path / "stopped"
    processes = start(folder, pause=0.2)
    wait_for_losses(folder, 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert all("interrupted" in output for output in finish(processes))
    assert losses(folder, 0) == losses(folder, 1)
    assert 3 <= len(losses(folder, 0)) < STEPS

    # one process has not both parts of the data
    train, valid, packing = problem()
    with pytest.raises(ValueError, match="had 2 processes, now there are 1"):
        loop.fit(tiny_model(), train, valid, packing, CONFIG, folder)

    assert all("finished" in output for output in finish(start(folder)))
    assert losses(folder, 0) == losses(whole, 0)
    assert_same_result(folder, whole)


def test_parts_that_processes_cannot_share_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ValueError, match="4 microbatches cannot be shared equally by 3 processes"):
        make_mesh(4)


@pytest.mark.parametrize("place", ["2/2@here:80", "0/2", "first", "0/2@here"])
def test_a_place_that_is_none_is_refused(place):
    with pytest.raises(ValueError, match="is no place among processes"):
        join(place)


def test_a_process_alone_is_the_first_and_hears_itself():
    done = []
    on_first(lambda: done.append(1))
    assert done == [1] and gathered({"a": [1.5]}) == [{"a": [1.5]}]
    with pytest.raises(ValueError, match="no good"):
        on_first(lambda: (_ for _ in ()).throw(ValueError("no good")))
    with pytest.raises(OSError, match="full"):
        on_first(lambda: (_ for _ in ()).throw(OSError("full")))


def test_sigterm_makes_a_stoppable_function_return_none_and_is_as_before_after_it():
    before = signal.getsignal(signal.SIGTERM)

    @hosts.stoppable
    def work(stop, noted=False):
        with hosts.Termination() if noted else contextlib.nullcontext() as termination:
            if stop:
                signal.raise_signal(signal.SIGTERM)
            return termination.noted if noted else "done"

    assert (work(False), work(True)) == ("done", None)
    assert (work(False, noted=True), work(True, noted=True)) == (False, True)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_sigterm_ends_the_process_at_once():
    code = """
import os, signal
from equizoo.train.hosts import Termination
with Termination() as termination:
    os.kill(os.getpid(), signal.SIGTERM)
    print("noted", termination.noted, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "noted True\n"), done.stderr


def test_whatever_stops_the_first_process_stops_the_others(monkeypatch):
    told = []
    monkeypatch.setattr(hosts, "gathered", lambda value: told.append(value) or [value])
    with pytest.raises(OSError, match="full"):
        on_first(lambda: (_ for _ in ()).throw(OSError("full")))
    assert told == ["OSError: full"]
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    monkeypatch.setattr(hosts, "gathered", lambda value: ["OSError: full"])
    with pytest.raises(ValueError, match="The first process stopped: OSError: full"):
        on_first(lambda: None)


@pytest.mark.slow
def test_the_command_line_trains_with_several_processes(tmp_path):
    write_structures(tmp_path / "data.xyz", make_structures(24))
    model = to_dict(tiny_model().config) | {"architecture": "mace"}
    training = {"epochs": 1, "batch_size": 8, "microbatches": 4}
    recipe = {
        "name": "tiny",
        "model": model,
        "data": {
            "train": "data.xyz",
            "num_valid": 4,
            "reference_energies": {"name": "least_squares"},
        },
        "training": training,
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    command = ("-m", "equizoo.cli", "train", "recipe.json", "--out", "run", "--host")
    outputs = finish(start(tmp_path, command))
    assert ["errors of the trained model" in output for output in outputs] == [True, False]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["metrics"]["valid"]["forces_rmse_meV_per_A"] > 0
    assert {"model", "report.html", "parity.png"} <= {p.name for p in (tmp_path / "run").iterdir()}

    # what the first refuses, the other refuses too, in its words
    for process in start(tmp_path, command):
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 2 and "The output folder run exists" in errors
