"""The automatic choice: only among equal maps, by the table, the same every time."""

from pathlib import Path

import numpy as np
import pytest

from equizoo.config import from_dict, to_dict
from equizoo.device import device_name
from equizoo.registry import TENSOR_PRODUCTS
from equizoo.tensor_products import auto
from equizoo.tensor_products._base import TensorProduct
from equizoo.tensor_products.auto import Auto, Choice, choose, read_table, write_table
from equizoo.tensor_products.clebsch_gordan import ClebschGordan
from equizoo.tensor_products.clebsch_gordan_dense import ClebschGordanDense
from equizoo.tensor_products.gaunt_grid import GauntGrid

IRREPS = "0e+1o+2e", "0e+1o+2e+3o", "0e+1o+2e+1e"


@pytest.fixture
def table(tmp_path):
    rows = [
        Choice("cpu", "some", "edge", 3, 100, "clebsch_gordan_dense"),
        Choice("cpu", "some", "edge", 3, 10000, "clebsch_gordan"),
        Choice("gpu", "other", "edge", 3, 100, "clebsch_gordan"),
        Choice("cpu", "some", "convolve", 6, 5000, "so2"),
    ]
    write_table(rows, tmp_path / "table.json")
    assert sorted(read_table(tmp_path / "table.json")) == sorted(rows)
    return str(tmp_path / "table.json")


@pytest.mark.parametrize("name", sorted(set().union(*auto.CANDIDATES.values())))
def test_candidates_are_the_same_map(name):
    ours = TENSOR_PRODUCTS["clebsch_gordan"]().bind(*IRREPS)
    other = TENSOR_PRODUCTS[name]().bind(*IRREPS)
    np.testing.assert_allclose(other.dense(), ours.dense(), atol=1e-12)
    assert (other.paths, other.into) == (ours.paths, ours.into)


def test_the_nearest_row_decides(table):
    assert choose("edge", 3, 120, table) == "clebsch_gordan_dense"
    assert choose("edge", 2, 3000, table) == "clebsch_gordan"
    assert choose("channelwise", 3, 120, table) == "clebsch_gordan"  # no row: the default
    bound = Auto(table=table).bind(*IRREPS)
    assert bound.chosen("edge", 120) is ClebschGordanDense().bind(*IRREPS)
    assert bound.chosen("edge", 30000) is ClebschGordan().bind(*IRREPS)
    assert bound.chosen("convolve", 30) is TENSOR_PRODUCTS["so2"]().bind(*IRREPS)


def test_a_content_that_the_fastest_does_not_take_falls_back(table):
    bound = Auto(table=table).bind("0e+1o", "0e+1e", "0e+1e")  # no direction for SO2
    assert bound.chosen("convolve", 30) is ClebschGordan().bind("0e+1o", "0e+1e", "0e+1e")


def test_overridden(table):
    bound = Auto(table=table, product=ClebschGordan()).bind(*IRREPS)
    assert bound.chosen("edge", 120) is ClebschGordan().bind(*IRREPS)
    # read from a direction, SO2 is only the same map where harmonics are promised
    bound = Auto(product=TENSOR_PRODUCTS["so2"]()).bind(*IRREPS)
    assert bound.chosen("edge", 120) is ClebschGordan().bind(*IRREPS)
    with pytest.raises(ValueError, match="GauntGrid.* is not the same map as ClebschGordan"):
        Auto(product=GauntGrid())
    with pytest.raises(ValueError, match="with default options"):
        Auto(product=TENSOR_PRODUCTS["so2"](m_max=1))


def test_written_and_read_as_configuration():
    for product in (Auto(), Auto(product=ClebschGordanDense()), Auto(table="rows.json")):
        assert from_dict(TensorProduct, to_dict(product)) == product


def test_rows_of_the_same_device_come_first(tmp_path):
    rows = [
        Choice("cpu", device_name(), "edge", 6, 100, "clebsch_gordan"),
        Choice("cpu", "another", "edge", 3, 100, "clebsch_gordan_dense"),
    ]
    write_table(rows, tmp_path / "both.json")
    assert choose("edge", 3, 100, str(tmp_path / "both.json")) == "clebsch_gordan"
    write_table(rows[1:], tmp_path / "other.json")
    assert choose("edge", 3, 100, str(tmp_path / "other.json")) == "clebsch_gordan_dense"


def test_the_table_of_the_package_is_valid():
    rows = read_table(auto.TABLE)
    assert {row.operation for row in rows} == set(auto.CANDIDATES)
    assert len({row[:-1] for row in rows}) == len(rows)


def test_a_less_expressive_product_in_a_table_is_refused(tmp_path):
    path = Path(tmp_path / "table.json")
    write_table([Choice("cpu", "some", "edge", 1, 9, "gaunt_grid")], path)
    with pytest.raises(ValueError, match="'gaunt_grid' cannot stand in for ClebschGordan"):
        read_table(path)
