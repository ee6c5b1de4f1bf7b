"""What boards are told is what the run wrote."""

import importlib.util
import json
import os
import struct
import subprocess
import sys

import pytest

from equizoo.train.progress import LiveProgress, RunLog, TensorBoard, WeightsAndBiases, read_rows

ROWS = [
    {"epoch": 1, "step": 10, "train_loss": 0.5, "valid_objective": 2.0},
    {"epoch": 2, "step": 20, "train_loss": 0.25},
    {"epoch": 3, "step": 30, "train_loss": 0.125, "valid_objective": 1.0},
]


def records(folder):
    """Of one offline run of Weights & Biases: a LevelDB log after seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    [file] = folder.glob("*.wandb")
    content, place, found = file.read_bytes(), 7, []
    while place + 7 <= len(content):
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        assert kind == 1  # whole in one block
        found.append(Record.FromString(content[place + 7 : place + 7 + size]))
        place += 7 + size
    return found


def figures_of(folder):
    found = {}
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            items = {(item.key or item.nested_key[0]): item for item in record.history.item}
            found[record.history.step.num] = {
                name: float(item.value_json) for name, item in items.items() if name[0] != "_"
            }
    return found


def expected(rows):
    return {
        row["step"]: {name: row[name] for name in row if name not in ("epoch", "step")}
        for row in rows
    }


# One process each, as a run and its resumption are.
SESSION = """
import json, pathlib, sys
from equizoo.train.progress import RunLog, WeightsAndBiases
folder, resume_step, rows = json.loads(sys.argv[1])
log = RunLog(pathlib.Path(folder), resume_step, "a title", [WeightsAndBiases("a project")])
for row in rows:
    log.write(row)
log.close()
"""


def test_weights_and_biases_get_every_row_and_a_resumed_run_goes_on(tmp_path):
    (tmp_path / "run.json").write_text('{"name": "small"}')
    for resume_step, rows in [(0, ROWS[:2]), (20, ROWS[2:])]:
        argument = json.dumps([str(tmp_path), resume_step, rows])
        environment = os.environ | {"WANDB_MODE": "offline"}
        subprocess.run([sys.executable, "-c", SESSION, argument], env=environment, check=True)
    assert read_rows(tmp_path / "metrics.jsonl") == ROWS
    parts = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert [figures_of(part) for part in parts] == [expected(ROWS[:2]), expected(ROWS[2:])]
    runs = [record.run for part in parts for record in records(part) if record.HasField("run")]
    assert {(run.project, run.display_name) for run in runs} == {("a project", "a title")}
    assert len({run.run_id for run in runs}) == 1
    assert {item.key: item.value_json for item in runs[0].config.update}["name"] == '"small"'


def test_without_its_package_the_choice_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'equizoo\[wandb\]'"):
        WeightsAndBiases("a project")


def test_tensorboard_gets_every_row(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    log = RunLog(tmp_path, 0, "", [TensorBoard()])
    for row in ROWS:
        log.write(row)
    log.close()
    found = {}
    [file] = (tmp_path / "tensorboard").iterdir()
    content, place = file.read_bytes(), 0
    while place < len(content):
        size = struct.unpack("<Q", content[place : place + 8])[0]
        event = Event.FromString(content[place + 12 : place + 12 + size])
        for value in event.summary.value:
            found.setdefault(event.step, {})[value.tag] = value.simple_value
        place += 16 + size
    assert found == expected(ROWS)


def test_a_line_of_an_epoch_shows_the_errors_that_there_are(capsys):
    row = {"epoch": 1, "step": 8, "train_loss": 0.5, "skipped_steps": 0}
    row |= {"padding_nodes": 0.1, "padding_edges": 0.2, "train_energy_rmse_meV_per_atom": 3.0}
    live = LiveProgress(8, 0, "training")
    live.report(row)
    live.report(row | {"valid_forces_rmse_meV_per_A": 51.0, "valid_energy_rmse_meV_per_atom": 2.0})
    first, second = capsys.readouterr().err.splitlines()
    assert "train E 3.00 meV/atom  padding 10% of atoms" in first and "valid" not in first
    assert "valid E 2.00 meV/atom, F 51.0 meV/Å  padding" in second and "nan" not in first + second
