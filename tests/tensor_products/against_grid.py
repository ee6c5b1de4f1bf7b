"""Comparison of a form of the Gaunt product with the one on a grid: the same map, same weights."""

import jax
import jax.numpy as jnp
import numpy as np
from closed_forms import assert_coefficients, gaunt

from equizoo.tensor_products._base import natural_irreps
from equizoo.tensor_products._signals import is_even
from equizoo.tensor_products.analysis import coefficients
from equizoo.tensor_products.gaunt_grid import GauntGrid

BOTH = "0e+0o+1e+1o+2e+2o"
CONTENTS = [
    ("0e", "0e", "0e"),
    ("0e+1o+2e+3o", "0e+1o+2e", "0e+1o+2e"),
    tuple(str(natural_irreps(l_max)) for l_max in (4, 3, 7)),
    tuple(str(natural_irreps(6)) for _ in range(3)),
    ("2e+5o", "1o+4e", "6e+3o"),
    (BOTH, "0e+1e+2o", BOTH),
    ("1e+2o", "1e+0o", "0o+1o+2e"),
]
POWERS = [
    ("0e+1o+2e+3o", "0e+1o+2e+3o", 3),
    (str(natural_irreps(6)), "0e+6e", 2),
    ("3o", "0e+1o+2e", 2),
    (BOTH, BOTH, 3),
    ("2e", "0e", 3),
]
# Nothing couples the last irrep of the first factor.
UNCOUPLED = ("0e+1o+6e", "0e+1o", "0e+1o")
EXACT = 1e-11
SINGLE = 2e-6  # float32, sums of hundreds of terms of order one


def arguments(bound, channels_2, dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = (
        (4, bound.irreps_1.dim, 3),
        (4, bound.irreps_2.dim, channels_2),
        (4, bound.num_weights, 3),
    )
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def assert_equals_grid(product, irreps):
    """In float64, and in float32 with and without x64."""
    bound, grid = product.bind(*irreps), GauntGrid().bind(*irreps)
    assert bound.paths == grid.paths and bound.num_weights == grid.num_weights
    for channels_2 in (1, 3):
        expected = np.asarray(jax.jit(grid.__call__)(*arguments(grid, channels_2)))
        found = jax.jit(bound.__call__)(*arguments(bound, channels_2))
        np.testing.assert_allclose(found, expected, atol=EXACT)
        single = arguments(bound, channels_2, np.float32)
        tolerance = SINGLE * np.abs(expected).max()
        for x64 in (True, False):
            with jax.enable_x64(x64):
                found = jax.jit(bound.__call__)(*single)
                assert found.dtype == np.float32
                np.testing.assert_allclose(np.asarray(found), expected, atol=tolerance)


def assert_power_equals_grid(product, irreps_in, irreps_out, order):
    power = product.bind_power(irreps_in, irreps_out, order)
    grid = GauntGrid().bind_power(irreps_in, irreps_out, order)
    assert power.weight_slices == grid.weight_slices and power.num_weights == grid.num_weights
    rng = np.random.default_rng(order)
    x = jnp.asarray(rng.normal(size=(2, 3, power.irreps_in.dim, 2)))
    weights = jnp.asarray(rng.normal(size=(2, power.num_weights, 2)))
    expected = np.asarray(jax.jit(grid.__call__)(x, weights))
    found = jax.jit(power.__call__)(x, weights)
    np.testing.assert_allclose(found, expected, atol=EXACT * max(1, np.abs(expected).max()))
    with jax.enable_x64(False):
        single = power(jnp.asarray(x, np.float32), jnp.asarray(weights, np.float32))
        assert single.dtype == np.float32
    np.testing.assert_allclose(np.asarray(single), expected, atol=SINGLE * np.abs(expected).max())


def assert_gaunt_coefficients(bound):
    """Those of the closed form, positive, one weight for each irrep that is coupled."""
    found = coefficients(bound)
    used = sorted({path.index_2 for path in found.paths if is_even(path)})
    assert_coefficients(
        bound, gaunt, lambda path: used.index(path.index_2) if is_even(path) else None
    )
    assert (found.values >= -1e-12).all()
    assert found.residual < 1e-12
