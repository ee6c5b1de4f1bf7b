"""Nonlinearities of gates and attention: closed forms and unit second moments."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from equizoo.layers.activation import ActivationConstant
from equizoo.layers.gating import (
    normalized_sigmoid,
    normalized_smooth_leaky_relu,
    smooth_leaky_relu,
)


def second_moment(function):
    def integrand(z):
        return float(function(jnp.float64(z))) ** 2 * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)

    return quad(integrand, -9, 9, epsabs=1e-10, limit=60)[0]


@pytest.mark.parametrize("function", [normalized_sigmoid, normalized_smooth_leaky_relu])
def test_unit_second_moment(function):
    assert abs(second_moment(function) - 1) < 1e-8
    sampled = function(jnp.float64(1.0), ActivationConstant.TORCH)
    assert 1e-5 < abs(sampled / function(jnp.float64(1.0)) - 1) < 3e-3


def test_smooth_leaky_relu():
    x = jnp.array([-60.0, -1.0, 0.0, 1.0, 60.0])
    found = smooth_leaky_relu(x)
    expected = 0.6 * x + 0.4 * x * jnp.tanh(x / 2)
    np.testing.assert_allclose(found, expected, atol=1e-14)
    np.testing.assert_allclose(found[jnp.array([0, 4])], [-12, 60], atol=1e-12)
