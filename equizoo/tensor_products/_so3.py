"""Rotations of frames and their Wigner matrices, differentiable in the direction everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from equizoo.tensor_products._base import wigner_3j


def unit_vectors(vectors: Float[Array, "*batch 3"]) -> Float[Array, "*batch 3"]:
    """The directions of vectors; the pole, with derivative zero, for those of (nearly) no length.

    No square under- or overflows: lengths down to some 1e-15 (float32), 1e-123 (float64) count.
    """
    # the size drops out of the result, so that it is a constant for derivatives
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(vectors), axis=-1, keepdims=True))
    zero = size < float(jnp.finfo(vectors.dtype).tiny) ** 0.4  # its inverse square is still finite
    pole = jnp.broadcast_to(jnp.asarray([0, 1, 0], vectors.dtype), vectors.shape)
    scaled = jnp.where(zero, pole, vectors / jnp.where(zero, 1, size))
    return scaled / jnp.sqrt(jnp.sum(scaled**2, axis=-1, keepdims=True))


def rotations_to_pole(directions: Float[Array, "*batch 3"]) -> Float[Array, "*batch 3 3"]:
    """Rotation matrices that take unit vectors to the polar axis y.

    The shortest rotation in the upper half; below, the shortest after half a turn about x. Either
    is smooth on its half and beyond, so that derivatives are finite, and exact for whatever does
    not depend on the angle about the direction; the matrices themselves jump at the equator.
    """
    x, y, z = directions[..., 0], directions[..., 1], directions[..., 2]
    sign = jnp.where(y < 0, jnp.full_like(y, -1), jnp.ones_like(y))
    y, z = sign * y, sign * z
    k = 1 / (1 + y)
    columns = [
        jnp.stack([1 - k * x * x, x, -k * x * z], axis=-1),
        jnp.stack([-x, y, -z], axis=-1) * sign[..., None],
        jnp.stack([-k * x * z, z, 1 - k * z * z], axis=-1) * sign[..., None],
    ]
    return jnp.stack(columns, axis=-1)


def wigner_matrices(
    rotation: Float[Array, "*batch 3 3"], l_max: int
) -> tuple[Float[Array, "*batch _ _"], ...]:
    r"""Matrices ``D`` of degrees 0 to ``l_max``: ``Y_l(R r) = D_l Y_l(r)``.

    .. math:: D_l = C^T (D_{l-1} \otimes R) \, C

    with the isometric coupling ``C`` of degrees ``l - 1`` and 1 to ``l``: a polynomial in the
    rotation, without angles.
    """
    matrices = [jnp.ones((*rotation.shape[:-2], 1, 1), rotation.dtype), rotation]
    for degree in range(2, l_max + 1):
        isometry = np.sqrt(2 * degree + 1) * wigner_3j(degree - 1, 1, degree)
        couple = jnp.asarray(isometry, rotation.dtype)
        half = jnp.einsum("...ik,ijm->...jmk", matrices[-1], couple, precision="highest")
        both = jnp.einsum("...jmk,...jl->...mkl", half, rotation, precision="highest")
        matrices.append(jnp.einsum("...mkl,kln->...mn", both, couple, precision="highest"))
    return tuple(matrices[: l_max + 1])
