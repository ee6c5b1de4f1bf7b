"""Products with small matrices are those of ``jnp.matmul``, and so are all their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equizoo.tensor_products._matrices import apply_matrices, apply_transposed


def plain(matrices, x):
    return jnp.matmul(matrices, x, precision="highest")


def plain_transposed(matrices, x):
    return jnp.matmul(jnp.swapaxes(matrices, -1, -2), x, precision="highest")


PAIRS = pytest.mark.parametrize(
    "ours, theirs, rows",
    [(apply_matrices, plain, 5), (apply_transposed, plain_transposed, 4)],
    ids=["as they are", "transposed"],
)


def arguments(rows, batch=(7,), dtype=np.float64):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(*batch, *s)), dtype) for s in ((4, 5), (rows, 3)))


def derivatives(function, order):
    """A number that has all derivatives of one order in it, none of them zero."""
    if order == 0:
        return lambda m, x: jnp.sum(jnp.sin(function(m, x)))
    lower = derivatives(function, order - 1)
    return lambda m, x: sum(jnp.sum(jnp.sin(g)) for g in jax.grad(lower, (0, 1))(m, x))


@PAIRS
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_values_and_derivatives(ours, theirs, rows, order):
    with jax.enable_x64(True):
        given = arguments(rows)
        found, expected = (jax.jit(derivatives(f, order))(*given) for f in (ours, theirs))
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@PAIRS
def test_forward_mode_and_hessians(ours, theirs, rows):
    with jax.enable_x64(True):
        given = arguments(rows)
        found, expected = (jax.jvp(f, given, given) for f in (ours, theirs))
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-12)
        found, expected = (
            jax.hessian(lambda x, f=f: jnp.sum(f(given[0], x) ** 3))(given[1])
            for f in (ours, theirs)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@PAIRS
def test_batches(ours, theirs, rows):
    m, x = arguments(rows, (2, 7), np.float32)
    np.testing.assert_allclose(ours(m, x), theirs(m, x), rtol=1e-5)
    for axes in ((0, 0), (1, 1), (None, 0), (0, None)):
        given = [v[0] if axis is None else v for v, axis in zip((m, x), axes, strict=True)]
        found, expected = (jax.vmap(f, in_axes=axes)(*given) for f in (ours, theirs))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert ours(m[:, :1], x).shape == theirs(m, x).shape  # one matrix for all of an axis
