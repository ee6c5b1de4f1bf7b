import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from equizoo.layers.mlp import ScalarMLP
from equizoo.layers.radial import bessel_basis, polynomial_envelope
from equizoo.layers.radial_spline import Knots, RadialSpline

CUTOFF = 4.0


def envelope(r):
    return np.asarray(polynomial_envelope(jnp.asarray(r), CUTOFF))


@pytest.fixture(scope="module")
def network():
    return ScalarMLP((6, 16, 16, 24), rngs=nnx.Rngs(0))


def of_distance(network, r):
    return network(bessel_basis(jnp.asarray(r), CUTOFF, 6))


@pytest.mark.parametrize("tolerance", [1e-2, 1e-9])
def test_values_and_slopes_are_those_of_the_network(network, tolerance):
    knots = Knots(CUTOFF, 1024)
    spline = RadialSpline(
        lambda r, pair: np.asarray(of_distance(network, r)), envelope, knots, tolerance
    )
    r = jnp.asarray(np.random.default_rng(0).uniform(0, CUTOFF, 200))

    def enveloped(r, function):
        return polynomial_envelope(r, CUTOFF)[:, None] * function(r)

    def both(function):
        slopes = jax.jvp(lambda r: enveloped(r, function), (r,), (jnp.ones_like(r),))
        return np.stack(slopes)

    expected = both(lambda r: of_distance(network, r))
    error = np.abs(both(lambda r: spline(knots.places(r))) - expected).max(axis=(1, 2))
    allowed = 10 * tolerance * np.abs(expected).max(axis=(1, 2))
    assert (error <= allowed).all(), (error, allowed)
    # fewer functions for a coarse tolerance, never more than the last hidden layer has
    assert spline.functions.number <= (13 if tolerance == 1e-2 else 16)


def test_pairs_of_kinds_have_tables_of_their_own(network):
    knots = Knots(CUTOFF, 128, num_kinds=3)
    stretch = {pair: 1 + 0.1 * index for index, pair in enumerate(knots.pairs)}
    spline = RadialSpline(
        lambda r, pair: np.asarray(of_distance(network, r / stretch[pair])), envelope, knots, 1e-12
    )
    r = jnp.asarray(np.linspace(0.5, 3.5, 9))
    first, second = (jnp.asarray(kinds, jnp.int32) for kinds in np.divmod(np.arange(9), 3))
    values = spline(knots.places(r, (first, second)))
    np.testing.assert_array_equal(values, spline(knots.places(r, (second, first))))
    for i, j, x, value in zip(first.tolist(), second.tolist(), r.tolist(), values, strict=True):
        argument = np.array([x]) / stretch[max(i, j), min(i, j)]
        np.testing.assert_allclose(value, of_distance(network, argument)[0], atol=1e-5)


def test_places_at_and_beyond_the_cutoff_are_in_the_last_piece():
    places = Knots(CUTOFF, 8).places(jnp.array([0.0, 3.99, CUTOFF, 2 * CUTOFF]))
    assert places.rows.tolist() == [0, 7, 7, 7]
    np.testing.assert_allclose(places.powers[2], np.ones(6))
