"""Published results: every row is readable, sourced, and shown beside one's own."""

import numpy as np
import pytest

from equizoo.eval.leaderboard_published import comparisons, published_numbers
from equizoo.eval.leaderboard_tasks import TASKS


def test_every_row_has_a_task_a_split_and_a_source():
    rows = published_numbers()
    assert len(rows) > 150
    units = {"energy_mae": "meV", "forces_mae": "meV/A", "forces_cosine": ""}
    seen = set()
    for row in rows:
        assert row.split in (*TASKS[row.task].splits, "average")
        assert row.part in ("val", "test") and "https://" in row.source
        assert row.unit == units.get(row.metric, "percent") and row.value >= 0
        key = (row.task, row.model, row.trained_on, row.metric, row.part, row.split, row.source)
        assert key not in seen
        seen.add(key)


def test_one_number_as_printed_in_its_paper():
    (found,) = [
        row.value
        for row in published_numbers()
        if (row.task, row.model, row.metric, row.part, row.split)
        == ("oc20-s2ef", "EquiformerV2 153M lE4", "forces_mae", "test", "average")
    ]
    assert found == 14.2


def test_printed_averages_are_those_of_the_printed_splits():
    """A mistyped digit shows, wherever one source prints every split and their average."""
    found: dict[tuple, dict[str, float]] = {}
    for row in published_numbers():
        key = (row.task, row.model, row.trained_on, row.metric, row.part, row.source)
        found.setdefault(key, {})[row.split] = row.value
    complete = {
        key: values
        for key, values in found.items()
        if values.keys() == {*TASKS[key[0]].splits, "average"}
    }
    assert len(complete) > 10
    for (task, *rest), values in complete.items():
        mean = np.mean([values[split] for split in TASKS[task].splits])
        printed_to = 10.0 if task == "oc22-is2re" else 0.1  # eV with two or four decimals, percent
        assert values["average"] == pytest.approx(mean, abs=0.6 * printed_to), (task, *rest)


@pytest.mark.parametrize(
    ("model", "task"),
    [("DeNS", "oc20-s2ef"), ("DeNS", "oc22-is2re"), ("TDN (direct)", "oc20-is2re"),
     ("TDN (direct)", "oc22-is2re"), ("Equiformer (direct)", "oc20-is2re")],
)  # fmt: skip
def test_architectures_of_the_zoo_are_among_them(model, task):
    assert any(model in row.model and row.task == task for row in published_numbers())


def test_our_own_results_come_last_and_their_average_where_all_splits_are_there():
    task = TASKS["oc20-is2re"]
    ours = {split: {"energy_mae_meV": 100.0 * i} for i, split in enumerate(task.splits)}
    tables = {table.title: table for table in comparisons(task, "test", ours, "mine")}
    average = tables["oc20-is2re, test average"]
    assert average.rows[-1] == ("mine", "", "150", "computed here")
    assert average.header == ("model", "trained on", "energy MAE [meV]", "source")
    assert ("SchNet", "OC20 S2EF All", "749", "[1]") in average.rows
    assert len(average.sources) == 3
    partly = comparisons(task, "test", {"id": ours["id"]}, "mine")
    assert "mine" not in [row[0] for row in partly[-1].rows]


@pytest.mark.parametrize("name", TASKS)
def test_tables_are_rectangular(name):
    for part in ("val", "test"):
        for table in comparisons(TASKS[name], part):
            assert all(len(row) == len(table.header) for row in table.rows)
