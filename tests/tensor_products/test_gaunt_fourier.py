"""The Gaunt product on the torus: constants against exact integrals, results against the grid."""

import e3nn_jax as e3nn
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import sympy
from against_grid import (
    CONTENTS,
    POWERS,
    UNCOUPLED,
    assert_equals_grid,
    assert_gaunt_coefficients,
    assert_power_equals_grid,
)

from equizoo.tensor_products._base import natural_irreps
from equizoo.tensor_products._transforms import BoundTransformed, BoundTransformedPower
from equizoo.tensor_products.analysis import coefficients
from equizoo.tensor_products.gaunt_fourier import (
    GauntFourier,
    Torus,
    frequencies,
    integrals,
    latitude_series,
)


@pytest.mark.parametrize("irreps", CONTENTS, ids=str)
def test_equals_the_grid(irreps):
    assert_equals_grid(GauntFourier(), irreps)


@pytest.mark.parametrize("power", POWERS, ids=str)
def test_power_equals_the_grid(power):
    assert_power_equals_grid(GauntFourier(), *power)


@pytest.mark.parametrize("irreps", [CONTENTS[1], CONTENTS[5], CONTENTS[6], UNCOUPLED], ids=str)
def test_coefficients_in_closed_form(irreps):
    assert_gaunt_coefficients(GauntFourier().bind(*irreps))


def harmonic(degree, order):
    """``Theta_lm`` on the meridian: mean square one with ``cos(m phi)``, positive near the pole."""
    x, theta = sympy.symbols("x theta")
    scale = (2 - (order == 0)) * (2 * degree + 1)
    scale *= sympy.factorial(degree - order) / sympy.factorial(degree + order)
    function = (-1) ** order * sympy.sqrt(scale) * sympy.assoc_legendre(degree, order, x)
    # the root of 1 - x^2 is positive, as sin(theta) is on the half circle that is integrated
    return sympy.lambdify(theta, function.subs(x, sympy.cos(theta)), "mpmath")


@pytest.mark.parametrize(("degree", "order"), [(0, 0), (1, 0), (1, 1), (3, 2), (4, 3), (6, 1)])
def test_constants_are_exact(degree, order):
    """Against integrals over the meridian in 30 digits."""
    l_max, n = 6, 15
    function = harmonic(degree, order)
    wave = mpmath.sin if order % 2 else mpmath.cos

    def integral(integrand):
        with mpmath.workdps(30):
            return float(mpmath.quad(integrand, [0, mpmath.pi]))

    series = [
        integral(lambda t, u=u: function(t) * wave(u * t)) / np.pi
        for u in frequencies(2 * l_max + 1).tolist()
    ]
    np.testing.assert_allclose(latitude_series(l_max)[:, degree, order], series, atol=4e-15)
    results = [
        integral(lambda t, u=u: function(t) * wave(u * t) * mpmath.sin(t)) / 2 * (-1) ** order
        for u in frequencies(n).tolist()
    ]
    np.testing.assert_allclose(integrals(l_max, n)[:, degree, order], results, atol=4e-15)


class FewerLatitudes(Torus):
    def __init__(self, degrees):
        super().__init__(degrees)
        self.shape = self.shape[0] - 2, self.shape[1]


class FewerLongitudes(Torus):
    def __init__(self, degrees):
        super().__init__(degrees)
        self.shape = self.shape[0], self.shape[1] - 2


@pytest.mark.parametrize("l_max", [1, 2, 3])
def test_fewer_latitudes_are_not_exact(l_max):
    irreps = natural_irreps(l_max), natural_irreps(l_max), natural_irreps(l_max)
    assert coefficients(BoundTransformed(*irreps, Torus)).residual < 1e-12
    assert coefficients(BoundTransformed(*irreps, FewerLatitudes)).residual > 1e-3


def test_fewer_longitudes_are_not_exact():
    """Many factors of low degree: aliases, not the factors, decide on the number."""
    irreps, order = e3nn.Irreps("0e+1o"), 7
    assert_power_equals_grid(GauntFourier(), irreps, irreps, order)
    full, fewer = (
        BoundTransformedPower(irreps, irreps, order, transform)
        for transform in (Torus, FewerLongitudes)
    )
    assert full._transform.shape == (15, 5) and fewer._transform.shape == (15, 3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 4, 1)))
    weights = jnp.ones((1, full.num_weights, 1))
    assert np.abs(full(x, weights) - fewer(x, weights)).max() > 1e-4


def test_conversions_have_cubic_size():
    """One matrix per order, sparse as parity has it: ``l, l - 2, ... -l`` alone."""
    for l_max in (2, 4, 8):
        series = latitude_series(l_max)
        assert series.shape == (2 * l_max + 1, l_max + 1, l_max + 1)
        assert np.count_nonzero(series) <= sum((d + 1) ** 2 for d in range(l_max + 1))
