"""Products on a grid: closed forms, the fewest points, symmetry, powers."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import assert_coefficients, bracket, gaunt, vector_signal

from equizoo.tensor_products import _signals
from equizoo.tensor_products._base import natural_irreps
from equizoo.tensor_products._signals import is_even
from equizoo.tensor_products._sphere import Quadrature, gauss_legendre, harmonics, lebedev
from equizoo.tensor_products._symmetric import monomials, symmetric_basis
from equizoo.tensor_products.analysis import coefficients, expressivity
from equizoo.tensor_products.gaunt_bracket import GauntBracket
from equizoo.tensor_products.gaunt_grid import GauntGrid
from equizoo.tensor_products.poisson_bracket import PoissonBracket
from equizoo.tensor_products.vector_signal import VectorSignal

BOTH = "+".join(f"{degree}{parity}" for degree in range(4) for parity in "eo")
CONTENTS = [
    (natural_irreps(3), natural_irreps(3), natural_irreps(6)),
    ("0e+1o+2e", "0e+1o+2e+3o", "1e+2o+3e+4o"),
    ("0e+1e+2o", "0e+1o+2e", BOTH),
    (BOTH, "0o+1e+2o+3e", BOTH),
]
contents = pytest.mark.parametrize("irreps", CONTENTS, ids=str)


def position(product, keep):
    """Weights number the irreps of the second factor that are coupled."""
    used = sorted({path.index_2 for path in coefficients(product).paths if keep(path)})
    return lambda path: used.index(path.index_2) if keep(path) else None


def is_odd(path):
    return not is_even(path)


@contents
def test_gaunt_coefficients(irreps):
    try:
        product = GauntGrid().bind(*irreps)
    except ValueError:
        assert irreps == CONTENTS[1]  # true tensors into pseudo-tensors
        return
    assert_coefficients(product, gaunt, position(product, is_even))
    assert (coefficients(product).values >= -1e-12).all()  # positive on e3nn's basis


@contents
def test_bracket_coefficients(irreps):
    try:
        product = PoissonBracket().bind(*irreps)
    except ValueError:
        assert irreps == CONTENTS[0]  # true tensors into true tensors
        return
    assert_coefficients(product, bracket, position(product, is_odd))


@pytest.mark.parametrize("offsets", [(1, 1, 1), (-1, 1, 1), (0, 0, 1), (0, 1, 0), (-1, -1, -1)])
def test_vector_signal_coefficients(offsets):
    product = VectorSignal(offsets).bind("0e+1o+2e+3o", "0e+1o+2e+3o", "0o+1e+2o+3e+4o")
    formula = vector_signal(offsets)

    def couples(path):
        degrees = path.ir_1.l, path.ir_2.l, path.ir_out.l
        return sum(degrees) % 2 == 1 and formula(*degrees) != 0

    assert_coefficients(product, formula, position(product, couples))


def test_vector_signal_reaches_every_odd_coupling():
    product = VectorSignal().bind("0e+1o+2e+3o", "0e+1o+2e+3o", "0o+1e+2o+3e+4o+5e")
    assert len(product.paths) == sum(is_odd(path) for path in coefficients(product).paths)


def test_vector_signal_refuses_offsets_without_odd_couplings():
    with pytest.raises(ValueError, match="expected three of -1, 0, 1 with an odd sum"):
        VectorSignal((1, 1, 0))


@contents
def test_gaunt_and_bracket_together_are_both(irreps):
    product = GauntBracket().bind(*irreps)
    paths = coefficients(product).paths
    assert set(product.paths) == set(paths)
    even, odd = (position(product, keep) for keep in (is_even, is_odd))
    shift = len({path.index_2 for path in paths if is_even(path)})
    # each kind has the proportions of its own formula; together they have unit variance
    assert_coefficients(
        product,
        lambda *degrees: gaunt(*degrees) if sum(degrees) % 2 == 0 else bracket(*degrees),
        lambda path: even(path) if is_even(path) else shift + odd(path),
    )


def test_expressivity_of_gaunt_grows_linearly_and_of_clebsch_gordan_cubically():
    for l_max in (1, 2, 3):
        irreps = natural_irreps(l_max), natural_irreps(l_max), natural_irreps(2 * l_max)
        assert expressivity(GauntGrid().bind(*irreps)) == 4 * l_max + 1


def test_the_bracket_of_a_function_with_itself_is_zero():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16, 2)))
    for product in (PoissonBracket(), VectorSignal()):
        bound = product.bind("0e+1o+2e+3o", "0e+1o+2e+3o", "1e+2o+3e")
        weights = jnp.ones((1, bound.num_weights, 1))
        y = jnp.asarray(np.random.default_rng(1).normal(size=x.shape))
        assert np.abs(bound(x, y, weights)).max() > 0.1
        # l = 0 is not among the weights of the bracket, and does not contribute
        np.testing.assert_allclose(bound(x, x, weights), 0, atol=1e-12)


@pytest.mark.parametrize("l_max", [1, 2, 3, 4])
@pytest.mark.parametrize("product", [GauntGrid(), GauntBracket()], ids=repr)
def test_no_smaller_rule_is_exact(monkeypatch, product, l_max):
    """The next smaller Lebedev rule leaves the span of the couplings."""
    degree = 3 * l_max
    smaller = [
        d for d in range(3, degree) if len(lebedev(d).weights) < len(lebedev(degree).weights)
    ]
    if not smaller:
        assert len(lebedev(degree).weights) == 6  # there is none: l_max = 1
        return
    monkeypatch.setattr(_signals, "lebedev", lambda _: lebedev(smaller[-1]))
    irreps = natural_irreps(l_max), natural_irreps(l_max), natural_irreps(l_max)
    assert coefficients(product._bind(*irreps)).residual > 1e-3


@pytest.mark.parametrize("degree", [3, 4, 6, 8, 9, 12, 15, 18])
def test_quadrature_is_exact_and_gauss_legendre_is_sharp(degree):
    for rule in (lebedev(degree), gauss_legendre(degree)):
        integrals = rule.weights @ harmonics(natural_irreps(degree), rule.points)
        np.testing.assert_allclose(integrals, [1] + [0] * (len(integrals) - 1), atol=1e-13)
    rule = gauss_legendre(degree)
    assert len(rule.weights) == (degree // 2 + 1) * (degree + 1)
    columns = rule.points.reshape(-1, degree + 1, 3)[:, :degree]
    angles = 2 * np.pi * np.arange(degree) / degree
    radii = np.linalg.norm(columns[..., [0, 2]], axis=-1)
    turned = np.stack([radii * np.sin(angles), columns[..., 1], radii * np.cos(angles)], -1)
    fewer = Quadrature(
        turned.reshape(-1, 3),
        np.repeat(rule.weights.reshape(-1, degree + 1).sum(1) / degree, degree),
    )
    integrals = fewer.weights @ harmonics(natural_irreps(degree), fewer.points)
    assert np.abs(integrals[1:]).max() > 1e-3


def test_lebedev_points():
    counts = {3: 6, 6: 26, 9: 38, 12: 74, 15: 86, 18: 146}
    assert {degree: len(lebedev(degree).weights) for degree in counts} == counts
    with pytest.raises(ValueError, match="end at degree 131, got 140"):
        lebedev(140)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_power_lies_in_the_span_of_the_symmetric_basis(order):
    irreps_in, irreps_out = natural_irreps(2), natural_irreps(2)
    power = GauntGrid().bind_power(irreps_in, irreps_out, order)
    rng = np.random.default_rng(order)
    x = rng.normal(size=(400, irreps_in.dim))
    features = np.prod(x[:, monomials(irreps_in.dim, order)], axis=2)
    for (index, (_, ir)), nu in itertools.product(enumerate(irreps_out), [order]):
        place = power.weight_slices[index, nu]
        assert place.stop - place.start == 1
        weights = jnp.zeros((1, power.num_weights, 1)).at[:, place.start].set(1.0)
        values = power(jnp.asarray(x)[None, ..., None], weights)[
            0, :, irreps_out.slices()[index], 0
        ]
        basis = symmetric_basis(irreps_in, ir, nu)
        columns = np.einsum("wkm,nm->nkw", basis, features).reshape(-1, len(basis))
        solution, *_ = np.linalg.lstsq(columns, np.asarray(values).ravel(), rcond=None)
        np.testing.assert_allclose(columns @ solution, np.asarray(values).ravel(), atol=1e-10)
        # the basis is orthonormal, so unit variance is unit length
        np.testing.assert_allclose(np.linalg.norm(solution), 1, atol=1e-10)
