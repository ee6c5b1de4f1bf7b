"""The table of products against counts by hand."""

import itertools

import pytest

from equizoo.tensor_products.analysis.properties import properties, table
from equizoo.tensor_products.clebsch_gordan import ClebschGordan
from equizoo.tensor_products.gaunt_grid import GauntGrid
from equizoo.tensor_products.poisson_bracket import PoissonBracket


def couplings(l_max, remainder=None):
    """Triples of degrees up to ``l_max``; of those only with this remainder of their sum by two."""
    return sum(
        abs(l1 - l2) <= l3 <= l1 + l2 and remainder in (None, (l1 + l2 + l3) % 2)
        for l1, l2, l3 in itertools.product(range(l_max + 1), repeat=3)
    )


@pytest.mark.parametrize("l_max", [1, 2])
def test_counts(l_max):
    full = properties(ClebschGordan(), l_max)
    assert full.product == "clebsch_gordan"
    assert full.allowed == full.contained == full.num_weights == full.expressivity
    assert full.allowed == couplings(l_max)
    degrees = l_max + 1
    even = properties(GauntGrid(), l_max)
    assert even.contained == couplings(l_max, 0) and even.allowed == full.allowed
    assert even.expressivity == 3 * degrees - 2  # a scale for each irrep, two of them common
    odd = properties(PoissonBracket(), l_max)  # no harmonic of degree zero has a gradient
    assert odd.contained == couplings(l_max, 1)
    assert max(row.defect for row in (full, even, odd)) < 1e-13
    numbers = 2 * degrees**2 + full.num_weights
    results = sum(2 * l_out + 1 for l_out in range(degrees)) + sum(
        2 * l_out + 1
        for l_out in range(1, degrees)  # 1e, 2o, ...: no scalar is a pseudo-tensor
    )
    assert full.bytes == 4 * (numbers + results)


def test_a_product_that_does_not_exist_says_why():
    rows, problems = table(0, ["clebsch_gordan", "poisson_bracket"])
    assert [row.product for row in rows] == ["clebsch_gordan"]
    assert "No path couples" in problems["poisson_bracket"]
    with pytest.raises(ValueError, match="No path couples"):
        properties(PoissonBracket(), 0)
    with pytest.raises(ValueError, match="gaunt_grid"):
        table(1, ["gaunt"])
