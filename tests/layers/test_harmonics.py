"""Spherical harmonics: closed forms, norm, parity, and derivatives at the origin."""

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np

from equizoo.layers.harmonics import safe_norm, spherical_harmonics

IRREPS = e3nn.Irreps("0e+1o+2e+3o")
VECTORS = np.random.default_rng(0).normal(size=(7, 3))


def harmonics(vectors):
    return np.asarray(spherical_harmonics(IRREPS, jnp.asarray(vectors)))


def test_closed_forms():
    """Degree one is (x, y, z); the polar axis is y."""
    found = harmonics(VECTORS)
    x, y, z = (VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)).T
    np.testing.assert_allclose(found[:, 0], 1, atol=1e-14)
    np.testing.assert_allclose(found[:, 1:4], np.sqrt(3) * np.stack([x, y, z], 1), atol=1e-14)
    second = np.sqrt(15) * np.stack(
        [x * z, x * y, (3 * y**2 - 1) / np.sqrt(12), y * z, (z**2 - x**2) / 2], axis=1
    )
    np.testing.assert_allclose(found[:, 4:9], second, atol=1e-13)


def test_norm_parity_and_independence_of_length():
    found = harmonics(VECTORS)
    for (_, ir), place in zip(IRREPS, IRREPS.slices(), strict=True):
        np.testing.assert_allclose(np.sum(found[:, place] ** 2, axis=1), 2 * ir.l + 1)
        np.testing.assert_allclose(harmonics(-VECTORS)[:, place], ir.p * found[:, place])
    np.testing.assert_allclose(harmonics(3.7 * VECTORS), found, atol=1e-13)


def test_finite_at_the_origin():
    def total(vectors):
        return jnp.sum(spherical_harmonics(IRREPS, vectors)) + jnp.sum(safe_norm(vectors))

    origin = jnp.zeros((2, 3))
    assert np.isfinite(total(origin))
    assert np.isfinite(jax.grad(total)(origin)).all()
    assert np.isfinite(jax.grad(lambda v: jnp.sum(jax.grad(total)(v) ** 2))(origin)).all()


def test_safe_norm():
    np.testing.assert_allclose(safe_norm(jnp.asarray(VECTORS)), np.linalg.norm(VECTORS, axis=1))
    np.testing.assert_array_equal(jax.grad(lambda v: safe_norm(v))(jnp.zeros(3)), 0)
