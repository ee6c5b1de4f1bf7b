"""The automatic choice: only among equal maps, by the table, the same every time."""

import json
from pathlib import Path

import numpy as np
import pytest

from equizoo.config import from_dict, to_dict
from equizoo.registry import TENSOR_PRODUCTS
from equizoo.tensor_products import auto
from equizoo.tensor_products._base import TensorProduct
from equizoo.tensor_products.auto import Auto, choose, read_table
from equizoo.tensor_products.clebsch_gordan import ClebschGordan
from equizoo.tensor_products.clebsch_gordan_dense import ClebschGordanDense
from equizoo.tensor_products.gaunt_grid import GauntGrid

IRREPS = "0e+1o+2e", "0e+1o+2e+3o", "0e+1o+2e+1e"


@pytest.fixture
def table(tmp_path):
    rows = [
        {"backend": "cpu", "operation": "edge", "l_max": 3, "size": 100, "product": name}
        for name in ["clebsch_gordan_dense"]
    ]
    rows += [
        {"backend": "cpu", "operation": "edge", "l_max": 3, "size": 10000,
         "product": "clebsch_gordan"},
        {"backend": "gpu", "operation": "edge", "l_max": 3, "size": 100,
         "product": "clebsch_gordan"},
        {"backend": "cpu", "operation": "convolve", "l_max": 6, "size": 5000, "product": "so2"},
    ]  # fmt: skip
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"rows": rows}))
    return str(path)


@pytest.mark.parametrize("name", sorted(set().union(*auto._EQUAL.values())))
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
    with pytest.raises(ValueError, match="GauntGrid is not the same map as ClebschGordan"):
        Auto(product=GauntGrid())


def test_written_and_read_as_configuration():
    for product in (Auto(), Auto(product=ClebschGordanDense()), Auto(table="rows.json")):
        assert from_dict(TensorProduct, to_dict(product)) == product


def test_the_table_of_the_package_is_valid():
    backends = {row["backend"] for row in json.loads(auto.TABLE.read_text())["rows"]}
    for backend in backends:
        assert read_table(auto.TABLE, backend)


def test_a_less_expressive_product_in_a_table_is_refused(tmp_path):
    row = {"backend": "cpu", "operation": "edge", "l_max": 1, "size": 9, "product": "gaunt_grid"}
    path = Path(tmp_path / "table.json")
    path.write_text(json.dumps({"rows": [row]}))
    with pytest.raises(ValueError, match="'gaunt_grid' cannot stand in for ClebschGordan"):
        read_table(path, "cpu")
