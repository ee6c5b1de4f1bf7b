"""The page of a run: every number that was measured, nothing from elsewhere."""

import html
import re

import pytest
from conftest import make_structures
from flax import nnx

from equizoo.data.readers import Dataset, ReadReport
from equizoo.eval.plots import errors_by_element
from equizoo.structure import EnergyReference
from equizoo.train.loop import Fitted
from equizoo.train.report_page import write_report_page

PNG = b"\x89PNG\r\n\x1a\n"


def metrics(scale):
    return {
        "energy_mae_meV": 12.0 * scale,
        "energy_mae_meV_per_atom": 1.5 * scale,
        "energy_rmse_meV_per_atom": 2.5 * scale,
        "forces_mae_meV_per_A": 20.0 * scale,
        "forces_rmse_meV_per_A": 30.0 * scale,
        "forces_rmse_meV_per_A_by_element": {"O": 40.0 * scale, "H": 10.0 * scale},
        "num_force_components": 99,
    }


def write_page(tmp_path, base_data):
    for name in ("learning_curve.png", "parity.png"):
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "run.json").write_text('{"name": "a < b"}')
    structures = tuple(make_structures(3))
    dataset = Dataset(
        name="ours <new>",
        structures=structures,
        isolated_atoms={},
        report=ReadReport(3, 3, 0, {}, {}, {}),
        energy_reference=EnergyReference.TOTAL,
        level_of_theory="PBE",
    )
    errors = {
        "before": {"valid": metrics(2.0), "old": metrics(1.0)},
        "after": {"valid": metrics(1.0), "old": metrics(1.5)},
    }
    fitted = Fitted(params=nnx.State({}), best_epoch=7, epochs=9, finished=True, seconds=30.0)
    path = write_report_page(tmp_path, "mine", fitted, {"train": dataset}, errors, base_data)
    assert path == tmp_path / "report.html"
    return path.read_text("utf-8")


@pytest.fixture
def page(tmp_path):
    """The text of the page of a fine-tuning."""
    return write_page(tmp_path, ("old",))


def rows_of(page):
    return [
        [html.unescape(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", line)]
        for line in re.findall(r"<tr>(.*?)</tr>", page)
    ]


def test_errors_before_and_after_stand_side_by_side(page):
    rows = rows_of(page)
    assert ["data", "error", "before", "after", "change"] in rows
    assert ["valid", "energy MAE [meV/atom]", "3", "1.5", "-50 %"] in rows
    assert ["old", "forces RMSE [meV/Å]", "30", "45", "+50 %"] in rows
    assert not any("[meV]" in cell for row in rows for cell in row)
    assert page.count('class="n worse"') == 4 + 2  # what was forgotten, the last of each element


def test_what_was_forgotten_is_said_of_each_element(page, tmp_path):
    rows = rows_of(page)
    heading = ["data", "element", "RMSE before [meV/Å]", "RMSE after [meV/Å]", "change"]
    place = rows.index(heading)
    assert rows[place + 1 : place + 5] == [
        ["valid", "H", "20", "10", "-50 %"],
        ["valid", "O", "80", "40", "-50 %"],
        ["old", "H", "10", "15", "+50 %"],
        ["old", "O", "40", "60", "+50 %"],
    ]
    assert "What was forgotten shows on data of the base model's kind: old." in page
    without = write_page(tmp_path, ())
    assert "What was forgotten is not known" in without and "--old" in without


def test_it_says_what_ran_on_what(page):
    assert "9 epochs in 30 s" in page and "epoch 7" in page
    part, name, frames, _, energies, theory = next(r for r in rows_of(page) if r[0] == "train")
    assert (part, name, frames, energies, theory) == ("train", "ours <new>", "3", "total", "PBE")
    names = {row[0] for row in rows_of(page)}
    assert {"device", "cores", "jax", "equizoo"} <= names
    assert "a &lt; b" in page


def test_it_needs_nothing_from_elsewhere(page):
    assert page.count("data:image/png;base64,") == page.count("<img") == 3
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_errors_by_element_need_forces(tmp_path):
    with pytest.raises(ValueError, match="None of the evaluations has forces"):
        errors_by_element({"valid": {"num_force_components": 0}}, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
