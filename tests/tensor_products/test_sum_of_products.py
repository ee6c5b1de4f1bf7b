"""Sums of scaled products: equal weights from few terms, families that grow with the terms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_tensor_product_laws import arguments

from equizoo.config import from_dict, to_dict
from equizoo.tensor_products._base import TensorProduct
from equizoo.tensor_products.analysis import coefficients, equivariance_defect, expressivity
from equizoo.tensor_products.clebsch_gordan import ClebschGordan
from equizoo.tensor_products.cp_decomposed import CPDecomposed
from equizoo.tensor_products.gaunt_bracket import GauntBracket
from equizoo.tensor_products.gaunt_grid import GauntGrid
from equizoo.tensor_products.matrix_product import MatrixProduct
from equizoo.tensor_products.poisson_bracket import PoissonBracket
from equizoo.tensor_products.sum_of_products import SumOfProducts, _fit, _table

NATURAL, EVEN = "0e+1o+2e+3o", "0e+1e+2e+3e"


def content(product, l_max):
    """Where a product couples all that it can: degrees of one parity for odd couplings."""
    irreps = NATURAL if product == GauntGrid() else EVEN
    return ["+".join(irreps.split("+")[: l_max + 1])] * 3


def equal_weights(product, l_max, terms):
    bound = SumOfProducts(product, terms).bind(*content(product, l_max))
    found = coefficients(bound)
    there = [p for p, path in enumerate(found.paths) if path in bound.paths]
    return bound, found.values.sum(axis=0)[there]


# Terms from which on the sum is exact, for degrees up to 1, 2, 3.
ENOUGH = {GauntGrid(): (1, 2, 2), PoissonBracket(): (1, 1, 2), MatrixProduct(): (2, 3, 4)}
ENOUGH[GauntBracket()] = (1, 2, 3)  # even and odd couplings have weights of their own
CASES = [(p, l_max, terms[l_max - 1]) for p, terms in ENOUGH.items() for l_max in (1, 2, 3)]


@pytest.mark.parametrize(("product", "l_max", "terms"), CASES, ids=str)
def test_weights_one_are_clebsch_gordan_with_weights_one(product, l_max, terms):
    """Where the product couples, and up to a factor for each irrep of the result."""
    bound, summed = equal_weights(product, l_max, terms)
    assert bound.residual < 1e-11
    for index in bound.into:
        dims = bound.irreps_out[index].ir.dim
        mine = np.array([path.index_out == index for path in bound.paths])
        expected = np.sqrt(dims / mine.sum())  # of ClebschGordan
        np.testing.assert_allclose(summed[mine] * expected / summed[mine][0], expected, atol=1e-10)


def test_the_whole_map_is_that_of_clebsch_gordan():
    """Not only its coefficients, and with the factors of unit variance taken out."""
    irreps = content(MatrixProduct(), 2)
    summed = SumOfProducts(MatrixProduct(), 3).bind(*irreps).dense().sum(axis=0)
    expected = ClebschGordan().bind(*irreps).dense().sum(axis=0)
    factors = np.sum(summed * expected, axis=(0, 1)) / np.sum(expected**2, axis=(0, 1))
    np.testing.assert_allclose(summed, factors * expected, atol=1e-10)


@pytest.mark.parametrize(("product", "l_max", "terms"), [c for c in CASES if c[2] > 1], ids=str)
def test_one_term_less_is_not_enough_and_says_how_far_it_is(product, l_max, terms):
    """The residual is the distance from equal weights after the best factor for each irrep."""
    bound, summed = equal_weights(product, l_max, terms - 1)
    assert 1e-3 < bound.residual < 1
    squares, total = 0.0, 0.0
    for index in bound.into:
        dims = bound.irreps_out[index].ir.dim
        mine = summed[[path.index_out == index for path in bound.paths]]
        target = np.full(len(mine), np.sqrt(dims / len(mine)))
        total += target @ target
        squares += target @ target - (target @ mine) ** 2 / (mine @ mine)
    np.testing.assert_allclose(bound.residual, np.sqrt(squares / total), rtol=5e-3)


@pytest.mark.parametrize(
    ("product", "l_max", "dimensions"),
    [
        (GauntGrid(), 1, [4, 4]),
        (GauntGrid(), 2, [7, 10, 11, 11]),
        (GauntGrid(), 3, [10, 14, 18, 22, 23]),
        (GauntBracket(), 2, [9, 14, 15]),
        (GauntBracket(), 3, [13, 20, 27, 33, 34]),
        (MatrixProduct(), 2, [7, 10, 13, 15]),
        (MatrixProduct(), 3, [10, 14, 18, 22, 25, 28]),
    ],
    ids=str,
)
def test_the_family_grows_with_the_terms_to_all_couplings(product, l_max, dimensions):
    """By one for each weight that is new, until it is as large as the couplings are many."""
    bounds = [
        SumOfProducts(product, terms).bind(*content(product, l_max))
        for terms in range(1, len(dimensions) + 1)
    ]
    assert [expressivity(bound) for bound in bounds] == dimensions
    assert dimensions[-1] <= len(bounds[0].paths)


def test_it_is_the_sum_that_the_scales_say():
    irreps = ["0e+1o+2e", "0e+1o+2e+3o", "0e+1o+2e"]
    product = GauntGrid().bind(*irreps)
    bound = SumOfProducts(GauntGrid(), 3).bind(*irreps)
    assert bound.num_weights == 3 * product.num_weights
    dims_1 = [ir.dim for _, ir in bound.irreps_1]
    dims_out = [ir.dim for _, ir in bound.irreps_out]
    for channels_2 in (1, 3):
        x, y, weights = arguments(bound, 0, channels_2=channels_2)
        expected = 0.0
        for k in range(3):
            a = np.repeat(bound.scales.first[k], dims_1)[:, None]
            c = np.repeat(bound.scales.result[k], dims_out)[:, None]
            b = bound.scales.weights[k][:, None]
            expected += c * np.asarray(product(a[None] * x, y, b[None] * weights[:, k::3]))
        np.testing.assert_allclose(bound(x, y, weights), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("terms", "irreps", "expected"),
    [
        (1, "0e+1o", [1.34730394, -0.80484856, -0.92218966]),
        (2, "0e+1o+2e", [-0.92099575, 0.24636757, 1.10917223]),
        (2, "0e+1e+2e", [-1.62439176, 0.25215984, -1.67891134]),
        (2, "0e+1o+2e+3o", [1.11755285, 0.79375295, -0.20000581]),
        (3, "0e+1e+2e+3e", [-0.93338573, 1.07009872, -0.7487726]),
    ],
    ids=str,
)
def test_the_scales_are_those_that_stored_weights_rest_on(terms, irreps, expected):
    """Another fit as good as this one would change the models; three numbers of each."""
    scales = SumOfProducts(terms=terms).bind(irreps, irreps, irreps).scales
    found = [scales.first[-1, 0], scales.weights[0, 1], scales.result[-1, -1]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("terms", "content"), [(2, NATURAL), (3, EVEN), (3, NATURAL)], ids=str)
def test_rounding_does_not_decide_the_fit(terms, content):
    """Coefficients that differ by rounding, as between machines, give the same scales."""
    table = _table(GauntBracket().bind(content, content, content))
    rng = np.random.default_rng(0)
    noise = 1 + 1e-14 * rng.normal(size=table.values.shape)
    one, _ = _fit(table, terms)
    other, _ = _fit(table._replace(values=noise * table.values), terms)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_it_can_be_bound_while_a_caller_is_traced():
    x, weights = jnp.ones((2, 4, 1)), jnp.ones((2, 6, 1))

    def call(x):
        bound = SumOfProducts(terms=3).bind("0e+1o", "0e+1o", "0e+1o")
        assert all(isinstance(scale, np.ndarray) for scale in bound.scales)
        return bound(x, x, weights)

    np.testing.assert_allclose(jax.jit(call)(x), call(x), atol=1e-12)


def test_any_product_can_be_summed():
    """One that has a weight for each coupling is at the end of the dial with one term."""
    bound = SumOfProducts(ClebschGordan(), 1).bind("0e+1o", "0e+1o", "0e+1o+1e")
    assert bound.residual < 1e-11 and bound.num_weights == len(bound.paths) == 5
    nested = SumOfProducts(SumOfProducts(GauntGrid(), 2), 2)
    assert nested.bind("0e+1o", "0e+1o", "0e+1o").num_weights == 4 * 2


def test_its_config_names_the_product():
    config = SumOfProducts(MatrixProduct(), 3)
    written = to_dict(config)
    assert written["name"] == "sum_of_products" and written["terms"] == 3
    assert written["product"]["name"] == "matrix_product"
    assert from_dict(TensorProduct, written) == config
    assert from_dict(TensorProduct, "sum_of_products") == SumOfProducts(GauntBracket(), 2)
    short = {"name": "sum_of_products", "product": "gaunt_grid"}
    assert from_dict(TensorProduct, short) == SumOfProducts(GauntGrid())
    with pytest.raises(ValueError, match=r"product.name: unknown 'gaunt_gird'. Did you mean"):
        from_dict(TensorProduct, short | {"product": "gaunt_gird"})


def test_no_terms():
    with pytest.raises(ValueError, match="terms is 0; expected at least 1"):
        SumOfProducts(terms=0)


def test_what_is_not_exact_says_by_how_much():
    five = CPDecomposed(rank=5)
    for bound in (
        SumOfProducts(five, 2).bind(*("0e+1e",) * 3),
        SumOfProducts(five, 2).bind(*("0e+1e",) * 3).select((0,)),
    ):
        assert not bound.exact and bound.defect > 0.01
        np.testing.assert_allclose(bound.defect, equivariance_defect(bound), rtol=1e-6)
