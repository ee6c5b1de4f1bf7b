"""A real run over real frames of OC20: killed with SIGKILL, continued, equal to the last bit."""

import json
import lzma
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from models import mace_potential

from equizoo.data.catalyst import open_catalyst
from equizoo.eval.golden import ATOL
from equizoo.eval.leaderboard_tasks import TASKS
from equizoo.eval.potential import load
from equizoo.structure import EnergyReference

FOLDERS = [Path(f) for f in os.environ.get("EQUIZOO_DATA", "").split(os.pathsep) if f]
DATA = next((f for f in FOLDERS if (f / "oc20_relax").is_dir()), None)
TASK = TASKS["oc20-s2ef"]
IN_SPLIT, IN_PART = 40, 4
PARTS = len(TASK.splits) * IN_SPLIT // IN_PART
COMMAND = "import sys; from equizoo.cli import main; main(sys.argv[1:])"
AT_MOST = 600.0  # [s] for a process that has to start, compile and predict
SAME = 1e-4  # relative, of float32 in batches of another shape


def text_of_frames(path: Path) -> Iterator[str]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for first in file:
            yield "".join([first, *(next(file) for _ in range(1 + int(first)))])


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Real frames as the archives have them, a folder for each split, and a model for them."""
    assert DATA is not None
    folder, real = tmp_path_factory.mktemp("here"), DATA / "oc20_relax/s2ef_val"
    texts = text_of_frames(real / "0.extxyz.xz")
    with lzma.open(real / "0.txt.xz", "rt", encoding="utf-8") as lines:
        for split in TASK.splits:
            (folder / "data" / f"test_{split}").mkdir(parents=True)
            pairs = [(next(texts), next(lines)) for _ in range(IN_SPLIT)]
            for name, some in zip(
                ("0.extxyz.xz", "0.txt.xz"), zip(*pairs, strict=True), strict=True
            ):
                (folder / "data" / f"test_{split}" / name).write_bytes(
                    lzma.compress("".join(some).encode())
                )
    (folder / "counts.json").write_text(json.dumps(dict.fromkeys(TASK.splits, IN_SPLIT)))
    elements: set[int] = set()
    for split in TASK.splits:
        for frame in open_catalyst(folder / "data" / f"test_{split}"):
            elements.update(frame.structure.atomic_numbers.tolist())
    numbers = tuple(sorted(elements))
    mace_potential(
        atomic_numbers=numbers,
        reference_energies=dict.fromkeys(numbers, 0.0),
        energy_reference=EnergyReference.ADSORPTION,
    ).save(folder / "model")
    return folder


def started(here: Path, out: Path) -> subprocess.Popen:
    arguments = [
        *("leaderboard", TASK.name, here / "model", here / "data", "--out", out),
        *("--counts", here / "counts.json", "--part-size", IN_PART, "--batch-nodes", 256),
        *("--json", "-"),
    ]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen) -> dict:
    out, errors = process.communicate(timeout=AT_MOST)
    assert process.returncode == 0, errors
    return json.loads(out)


@pytest.fixture(scope="module")
def whole(here):
    """The file of a run that nothing happened to."""
    out = here / "whole.npz"
    result = finished(started(here, out))
    assert result["systems"] == dict.fromkeys(TASK.splits, IN_SPLIT)
    assert len(parts_of(out)) == PARTS
    return out


def parts_of(out: Path) -> dict[Path, int]:
    """Parts that are there, and when each was written."""
    found = out.with_name(f"{out.name}.parts").rglob("[0-9]*.npz")
    return {path: path.stat().st_mtime_ns for path in found}


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="needs oc20_relax in EQUIZOO_DATA")
def test_kill_minus_9_then_the_same_command_gives_the_same_file(here, whole):
    killed = here / "killed.npz"
    process = started(here, killed)
    give_up = time.monotonic() + AT_MOST
    while len(parts_of(killed)) < 2 and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = parts_of(killed)
    assert 2 <= len(before) < PARTS and not killed.exists()

    assert finished(started(here, killed))["file"] == str(killed)
    after = parts_of(killed)
    assert len(after) == PARTS and before.items() <= after.items()  # kept, not made again
    assert killed.read_bytes() == whole.read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="needs oc20_relax in EQUIZOO_DATA")
def test_what_is_in_the_file_is_what_the_model_predicts(here, whole):
    potential = load(str(here / "model"))
    with np.load(whole, allow_pickle=False) as arrays:
        for split in TASK.splits:
            ids, energy, forces, ends = (arrays[name] for name in TASK.arrays(split))
            frames = list(open_catalyst(here / "data" / f"test_{split}"))
            assert ids.tolist() == [frame.id for frame in frames]
            assert np.ptp(energy) > 10 * ATOL  # so that another frame's energy would not do
            rows = np.split(forces, ends)
            for place in (0, IN_SPLIT // 2, IN_SPLIT - 1):
                expected = potential.predict(frames[place].structure)
                # small differences to isolated atoms, whose rounding does not shrink with them
                np.testing.assert_allclose(energy[place], expected.energy, rtol=SAME, atol=ATOL)
                scale = np.abs(expected.forces).max()
                np.testing.assert_allclose(rows[place], expected.forces, atol=SAME * scale)
