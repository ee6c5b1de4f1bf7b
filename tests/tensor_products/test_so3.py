"""Frames and Wigner matrices: conventions, accuracy, derivatives at the poles and the equator."""

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial.transform import Rotation

from equizoo.tensor_products._base import natural_irreps
from equizoo.tensor_products._so3 import rotations_to_pole, unit_vectors, wigner_matrices
from equizoo.tensor_products._sphere import harmonics

L_MAX = 6


def directions():
    """The axes, the neighbourhood of the poles and of the equator, and some others."""
    special = [
        [0, 1, 0], [0, -1, 0], [1, 0, 0], [0, 0, 1], [-1, 0, 0], [0, 0, -1], [1, -0.0, 1],
        [1e-9, 1, 0], [0, -1, 1e-9], [1, 1e-12, 0.3], [1, -1e-12, 0.3],
    ]  # fmt: skip
    points = np.concatenate([special, np.random.default_rng(0).normal(size=(20, 3))])
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def test_wigner_matrices_are_those_of_e3nn():
    rotation = jnp.asarray(Rotation.random(5, random_state=0).as_matrix())
    for degree, matrix in enumerate(wigner_matrices(rotation, L_MAX)):
        expected = e3nn.Irrep(degree, 1).D_from_matrix(rotation)
        np.testing.assert_allclose(matrix, expected, atol=1e-12)


def test_directions_are_turned_to_the_pole():
    points = directions()
    rotations = rotations_to_pole(jnp.asarray(points))
    np.testing.assert_allclose(np.linalg.det(rotations), 1, atol=1e-14)
    matrices = wigner_matrices(rotations, L_MAX)
    irreps = natural_irreps(L_MAX)
    values = harmonics(irreps, points)
    pole = harmonics(irreps, np.array([[0.0, 1, 0]]))
    for matrix, place in zip(matrices, irreps.slices(), strict=True):
        turned = np.einsum("nij,nj->ni", matrix, values[:, place])
        expected = np.broadcast_to(pole[:, place], turned.shape)
        np.testing.assert_allclose(turned, expected, atol=1e-12)


def test_wigner_matrices_in_float32():
    exact = wigner_matrices(rotations_to_pole(jnp.asarray(directions())), L_MAX)
    single = wigner_matrices(rotations_to_pole(jnp.asarray(directions(), np.float32)), L_MAX)
    for degree, (a, b) in enumerate(zip(single, exact, strict=True)):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, atol=2e-7 * (1 + degree))


def test_derivatives_of_frames_are_finite_everywhere():
    def scalar(vectors):
        matrices = wigner_matrices(rotations_to_pole(unit_vectors(vectors)), 3)
        return sum(jnp.sum(jnp.sin(matrix)) for matrix in matrices)

    vectors = jnp.asarray(np.concatenate([directions(), np.zeros((1, 3))]))
    first = jax.grad(scalar)
    second = jax.jit(jax.grad(lambda v: jnp.sum(first(v) ** 2)))(vectors)
    assert np.isfinite(second).all() and np.abs(second).max() < 1e3
    np.testing.assert_array_equal(first(vectors)[-1], 0)


def test_unit_vectors_of_extreme_lengths():
    points = directions()
    for dtype, sizes in {np.float32: (2e-15, 1e30), np.float64: (1e-120, 1e200)}.items():
        for size in sizes:
            found = unit_vectors(jnp.asarray(size * points, dtype))
            np.testing.assert_allclose(found, points, atol=4 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(unit_vectors(jnp.zeros((2, 3))), [[0, 1, 0]] * 2)
