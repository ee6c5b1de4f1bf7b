"""Products rounded to bfloat16: their error, and that of their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equizoo.layers.products import Products

EPS = 2.0**-9  # the largest relative error of rounding to 8 significant bits


def arguments(dtype=np.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in ((5, 3, 64), (64, 7)))


def test_the_error_is_that_of_rounding_both_arguments():
    x, weights = arguments(np.float64)
    exact = np.asarray(x @ weights)
    bound = np.abs(x) @ np.abs(weights) * (2 * EPS + EPS**2)  # term by term
    found = np.asarray(Products.BFLOAT16.of(x, weights))
    assert found.dtype == np.float64 and found.shape == exact.shape
    error = np.abs(found - exact)
    assert (error < np.asarray(bound)).all() and error.max() > 1e-3
    np.testing.assert_array_equal(Products.FULL.of(x, weights), exact)


def test_sums_are_not_rounded():
    """A thousand ones: in bfloat16 they would not count beyond 256."""
    ones = jnp.ones((1, 1000), jnp.float32)
    assert float(Products.BFLOAT16.of(ones, ones.T)[0, 0]) == 1000


@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_have_errors_of_the_same_size(order):
    x, weights = arguments()

    def total(products, x, weights):
        return jnp.sum(jnp.sin(products.of(x, weights)))

    def derivative(products, x, weights):
        if order == 1:
            return jax.grad(total, argnums=(1, 2))(products, x, weights)
        inner = jax.grad(total, argnums=1)
        squares = lambda *a: jnp.sum(inner(products, *a) ** 2)  # noqa: E731 - as gradient forces
        return jax.grad(squares, argnums=(0, 1))(x, weights)

    rounded, exact = (derivative(p, x, weights) for p in (Products.BFLOAT16, Products.FULL))
    for a, b in zip(rounded, exact, strict=True):
        relative = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
        assert 1e-4 < relative < 0.1
