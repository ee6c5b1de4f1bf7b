"""The product in the edge frame: equal to Clebsch-Gordan, at the poles too; truncated, its laws."""

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from scipy.spatial.transform import Rotation

from equizoo.layers.harmonics import spherical_harmonics
from equizoo.tensor_products._base import coupling, natural_irreps
from equizoo.tensor_products._so3 import wigner_matrices
from equizoo.tensor_products._sphere import harmonics
from equizoo.tensor_products.analysis import coefficients, interactability
from equizoo.tensor_products.clebsch_gordan import ClebschGordan
from equizoo.tensor_products.so2 import SO2

NATURAL = ("0e+1o+2e", "0e+1o+2e+3o", "0e+1o+2e+3o")
PSEUDO = ("0e+0o+1e+1o", "2e+1o+0e", "0e+0o+1e+1o+2o+2e")
HIGH = ("6e+6o+0e", "1o+3o+6e", "6e+5o+0o")
# Holds the degrees that truncation mixes in.
CLOSED = ("0e+1o+2e+2o", "0e+1o+2e+3o+4e", "0e+1o+2e+1e")
EXACT = 1e-12  # float64, sums of tens of terms of order one


def scaled_harmonics(irreps, points, rng=None):
    """Harmonics; with ``rng`` times a factor, of either sign, for each degree."""
    irreps = e3nn.Irreps(irreps)
    values = harmonics(irreps, points)
    if rng is None:
        return values
    factors = rng.normal(size=(len(points), len(irreps)))
    return values * np.repeat(factors, [ir.dim for _, ir in irreps], axis=1)


def run(function, *args):
    """Compiled: one program is quicker to build than its operations one by one."""
    return np.asarray(jax.jit(function)(*args))


def unit(rng, *shape):
    points = rng.normal(size=(*shape, 3))
    return points / np.linalg.norm(points, axis=-1, keepdims=True)


def arguments(product, seed=0, batch=6, channels=3, channels_2=1):
    rng = np.random.default_rng(seed)
    y = scaled_harmonics(product.irreps_2, unit(rng, batch * channels_2), rng)
    return (
        jnp.asarray(rng.normal(size=(batch, product.irreps_1.dim, channels))),
        jnp.asarray(np.swapaxes(y.reshape(batch, channels_2, -1), 1, 2)),
        jnp.asarray(rng.normal(size=(batch, product.num_weights, channels))),
    )


# ---- the same map as Clebsch-Gordan --------------------------------------------------------------


@pytest.mark.parametrize(
    ("irreps", "channels_2"), [(NATURAL, 1), (NATURAL, 3), (PSEUDO, 1), (PSEUDO, 3), (HIGH, 1)]
)
def test_it_is_clebsch_gordan_with_the_same_weights(irreps, channels_2):
    found, expected = SO2().bind(*irreps), ClebschGordan().bind(*irreps)
    assert found.paths == expected.paths and found.irreps_paths == expected.irreps_paths
    assert found.into == expected.into and found.num_weights == expected.num_weights
    args = arguments(found, channels_2=channels_2)
    np.testing.assert_allclose(run(found, *args), run(expected, *args), atol=EXACT)
    apart = run(found.per_path, *args), run(expected.per_path, *args)
    np.testing.assert_allclose(*apart, atol=EXACT)


def test_dense_is_that_of_clebsch_gordan_also_while_a_caller_is_traced():
    expected = ClebschGordan().bind(*PSEUDO)
    traced = jax.jit(lambda: jnp.asarray(SO2().bind(*PSEUDO).dense()))()
    np.testing.assert_allclose(traced, expected.dense(), atol=EXACT)
    found = SO2().bind(*PSEUDO).dense_per_path()
    np.testing.assert_allclose(found, expected.dense_per_path(), atol=EXACT)


def test_dense_notices_what_is_not_bilinear_in_the_harmonics():
    product = SO2().bind(*NATURAL)
    with pytest.raises(AssertionError, match="not bilinear in the harmonics"):
        product._on_basis(lambda x, y, w: product(x, y, w) * y[:, 1:2])


def test_selected_paths_are_those_of_clebsch_gordan():
    keep = (0, 3, 4, 9)
    found, expected = (p.bind(*NATURAL).select(keep) for p in (SO2(), ClebschGordan()))
    assert found.paths == expected.paths and found.on_harmonics
    args = arguments(found)
    np.testing.assert_allclose(run(found, *args), run(expected, *args), atol=EXACT)


def test_at_the_pole_couplings_are_orthogonal_and_sparse():
    """``E^T E = 1``: the matrices of the paths of a pair of irreps, up to ``sqrt(2 l_3 + 1)``."""
    irreps_out = "+".join(f"{degree}e+{degree}o" for degree in range(5))
    product = SO2().bind(natural_irreps(4), natural_irreps(8), irreps_out)
    pole = harmonics(product.irreps_2, np.array([[0.0, 1, 0]]))
    x = jnp.eye(product.irreps_1.dim)[None]  # basis vectors as channels
    ones = jnp.ones((1, product.num_weights, 1))
    (z,) = run(product.per_path, x, jnp.asarray(pole)[..., None], ones)
    pairs = {}
    for path, place in zip(product.paths, product.irreps_paths.slices(), strict=True):
        matrix = z[place, product.irreps_1.slices()[path.index_1]]
        m_out, m_in = (
            np.indices(matrix.shape) - np.array([path.ir_out.l, path.ir_1.l])[:, None, None]
        )
        sign = (-1) ** (path.ir_1.l + path.ir_2.l + path.ir_out.l)
        assert np.abs(matrix[m_out != sign * m_in]).max(initial=0) < EXACT
        pairs.setdefault(path[:3:2] + path[3::2], []).append(matrix.ravel())
    assert len(pairs) == 5 * (5 + 5) - 9  # no odd coupling to or from a scalar
    for (*_, ir_1, ir_out), matrices in pairs.items():
        odd = ir_1.p * (-1) ** ir_1.l != ir_out.p * (-1) ** ir_out.l
        assert len(matrices) == min(ir_1.l, ir_out.l) + (not odd)
        gram = np.array(matrices) @ np.array(matrices).T
        np.testing.assert_allclose(gram, ir_out.dim * np.eye(len(matrices)), atol=EXACT)


# ---- direction and size of the second factor -----------------------------------------------------


@pytest.mark.parametrize("irreps", [NATURAL, PSEUDO], ids=" x ".join)
def test_derivatives_through_edge_vectors_are_those_of_clebsch_gordan(irreps):
    """First and second, at and near the poles and the equator, where the frame changes."""
    special = [
        [0, 1, 0], [0, -1, 0], [0, 2, 0], [1, 0, 0], [0, 0, -1], [1, -0.0, 1],
        [1e-9, 1, 0], [0, -1, 1e-9], [1e-5, -1, 1e-5], [1, 1e-12, 0.3], [1, -1e-12, 0.3],
    ]  # fmt: skip
    rng = np.random.default_rng(1)
    vectors = jnp.asarray(np.concatenate([special, rng.normal(size=(4, 3))]))
    direction = jnp.asarray(rng.normal(size=vectors.shape))
    bound = [product.bind(*irreps) for product in (SO2(), ClebschGordan())]
    x, _, weights = arguments(bound[0], batch=len(vectors))

    def derivatives(product):
        def scalar(vectors, x):
            size = jnp.sum(vectors**2, axis=1, keepdims=True)
            y = jnp.sin(size) * spherical_harmonics(product.irreps_2, vectors)
            return jnp.sum(jnp.sin(product(x, y[..., None], weights)))

        def along(vectors, x):
            first = jax.grad(scalar, (0, 1))(vectors, x)
            return jnp.sum(first[0] * direction), first

        second, first = jax.jit(jax.grad(along, (0, 1), has_aux=True))(vectors, x)
        return [*first, *second]

    for found, expected in zip(*map(derivatives, bound), strict=True):
        np.testing.assert_allclose(found, expected, atol=EXACT * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_second_factor_no_product_and_finite_derivatives(dtype):
    product = SO2().bind(*NATURAL)
    x, y, weights = (jnp.asarray(a, dtype) for a in arguments(product))
    zero = jnp.zeros_like(y)
    np.testing.assert_array_equal(run(product, x, zero, weights), 0)

    def first(x, y, weights):
        gradients = jax.grad(lambda *args: jnp.sum(product(*args) ** 2), (0, 1, 2))(x, y, weights)
        return sum(jnp.sum(gradient) for gradient in gradients)

    for gradient in jax.jit(jax.grad(first, (0, 1, 2)))(x, zero, weights):
        assert np.isfinite(gradient).all()


def test_an_edge_without_length_has_a_scalar_only():
    """The harmonics of a zero vector: one, then zeros."""
    found, expected = (product.bind(*NATURAL) for product in (SO2(), ClebschGordan()))
    x, _, weights = arguments(found)
    y = spherical_harmonics(found.irreps_2, jnp.zeros((len(x), 3)))[..., None]
    assert jnp.sum(jnp.abs(y)) == len(x)
    both = run(found, x, y, weights), run(expected, x, y, weights)
    np.testing.assert_allclose(*both, atol=EXACT)


@pytest.mark.parametrize(("dtype", "size"), [(np.float32, 1e-14), (np.float64, 1e-100)])
def test_it_is_homogeneous_down_to_tiny_second_factors(dtype, size):
    product = SO2().bind(*NATURAL)
    x, y, weights = (jnp.asarray(a, dtype) for a in arguments(product))
    product = jax.jit(product)
    full = product(x, y, weights)
    rounding = 20 * np.finfo(dtype).eps * np.abs(full).max()
    np.testing.assert_allclose(product(x, size * y, weights) / size, full, atol=rounding)
    np.testing.assert_allclose(product(x, -y, weights), -full, atol=rounding)


@pytest.mark.parametrize("product", [SO2(), SO2(m_max=1)], ids=str)
def test_the_angle_of_the_frame_about_the_edge_drops_out(product):
    product = product.bind(*PSEUDO)
    x, y, weights = arguments(product)
    frame = jax.jit(product.prepare)(y)
    angles = np.random.default_rng(2).uniform(0, 2 * np.pi, size=len(x))
    about_pole = jnp.asarray(Rotation.from_euler("y", angles[:, None]).as_matrix())[:, None]
    turns = wigner_matrices(about_pole, len(frame.rotations) - 1)
    turned = frame._replace(
        rotations=tuple(a @ b for a, b in zip(turns, frame.rotations, strict=True))
    )
    assert jnp.abs(turned.rotations[1] - frame.rotations[1]).max() > 0.5
    couple = jax.jit(product.couple)
    np.testing.assert_allclose(couple(x, turned, weights), couple(x, frame, weights), atol=EXACT)


def test_layers_can_share_what_is_prepared():
    first, second = SO2().bind("0e+3o", NATURAL[1], NATURAL[2]), SO2().bind(*NATURAL)
    x, y, weights = arguments(second)
    frames = [jax.jit(product.prepare)(y) for product in (first, second)]
    for a, b in zip(*map(jax.tree.leaves, frames), strict=True):
        np.testing.assert_array_equal(a, b)
    shared = run(second.couple, x, frames[0], weights)
    np.testing.assert_allclose(shared, run(second.per_path, x, y, weights), atol=EXACT)


def test_degree_six_in_float32():
    product = SO2().bind(*HIGH)
    args = arguments(product, batch=50)
    single = run(product, *(jnp.asarray(a, np.float32) for a in args))
    exact = run(product, *args)
    np.testing.assert_allclose(single, exact, atol=2e-6 * np.abs(exact).max())


# ---- truncation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("m_max", [0, 1])
@pytest.mark.parametrize("determinant", [1, -1], ids=["rotation", "reflection"])
@pytest.mark.parametrize("irreps", [NATURAL, CLOSED], ids=" x ".join)
def test_truncated_it_is_equivariant(m_max, determinant, irreps):
    product = SO2(m_max=m_max).bind(*irreps)
    rotation = determinant * Rotation.random(random_state=3).as_matrix()

    def representation(irreps):
        return scipy.linalg.block_diag(
            *(np.asarray(ir.D_from_matrix(jnp.asarray(rotation))) for _, ir in irreps)
        )

    x, y, weights = arguments(product)
    d_1, d_2, d_out = map(representation, (product.irreps_1, product.irreps_2, product.irreps_out))
    product = jax.jit(product)
    turned = product(jnp.einsum("ij,bjc->bic", d_1, x), jnp.einsum("ij,bjc->bic", d_2, y), weights)
    expected = jnp.einsum("ij,bjc->bic", d_out, product(x, y, weights))
    assert jnp.abs(expected).max() > 0.5
    np.testing.assert_allclose(turned, expected, atol=EXACT)


def test_truncation_at_the_highest_degree_leaves_nothing_out():
    whole, cut = SO2().bind(*NATURAL), SO2(m_max=2).bind(*NATURAL)
    args = arguments(whole)
    np.testing.assert_array_equal(run(cut, *args), run(whole, *args))
    np.testing.assert_array_equal(cut.dense(), whole.dense())


def test_truncation_approaches_the_whole_as_much_as_what_remains():
    """Mean square error of a path ``2 (1 - sqrt(f))``, ``f`` the share of its squares kept."""
    irreps = ("0e+1o+2e+3o", natural_irreps(6), "3o+0e+1o+2e")
    whole = SO2().bind(*irreps)
    last = np.full(whole.num_weights, np.inf)
    for m_max in range(4):
        difference = SO2(m_max=m_max).bind(*irreps).dense() - whole.dense()
        errors = np.sum(difference**2, axis=(1, 2, 3))
        for weight, path in enumerate(whole.paths):
            squares = np.diagonal(coupling(path)[:, path.ir_2.l] ** 2, _offset(path))
            m = np.arange(len(squares)) - len(squares) // 2
            share = np.sum(squares[np.abs(m) <= m_max]) / np.sum(squares)
            expected = 2 * (1 - np.sqrt(share)) * path.ir_out.dim / whole.into.count(path.index_out)
            np.testing.assert_allclose(errors[weight], expected, atol=1e-11)
        assert (errors < last + EXACT).all()
        last = errors
    assert last.max() < 1e-20


def _offset(path):
    """The diagonal of a coupling at the pole on which ``m`` is the same on both sides."""
    return path.ir_out.l - path.ir_1.l


@pytest.mark.parametrize("m_max", [0, 1])
def test_truncated_dense_where_all_degrees_are_there(m_max):
    product = SO2(m_max=m_max).bind(*CLOSED)
    whole = ClebschGordan().bind(*CLOSED)
    odd = [(p.ir_1.l + p.ir_2.l + p.ir_out.l) % 2 == 1 for p in whole.paths]
    assert any(odd)
    left = [path for path, is_odd in zip(whole.paths, odd, strict=True) if m_max or not is_odd]
    assert list(product.paths) == left and product.num_weights == len(left)
    found = coefficients(product)
    assert found.residual < 1e-10
    assert {path for path, there in interactability(product).items() if there} == set(left)
    mixed = np.sum(np.abs(found.values) > 1e-10, axis=1)
    assert mixed.max() > 1  # more than its own coupling
    variance = np.sum(product.dense() ** 2, axis=(0, 1, 2))
    reached = np.repeat(
        [index in product.into for index in range(len(product.irreps_out))],
        [ir.dim for _, ir in product.irreps_out],
    )
    np.testing.assert_allclose(variance, reached.astype(float), atol=EXACT)
    x, _, weights = arguments(product)
    rng = np.random.default_rng(4)
    y = rng.normal(size=(len(x), 1)) * scaled_harmonics(product.irreps_2, unit(rng, len(x)))
    expected = np.einsum("wijk,bwc,bic,bj->bkc", product.dense(), weights, x, y, optimize=True)
    np.testing.assert_allclose(product(x, jnp.asarray(y)[..., None], weights), expected, atol=EXACT)


def test_truncated_dense_where_degrees_are_missing():
    message = r"With m_max=1 this product contains harmonics of degrees \[4, 5\] that irreps_2"
    with pytest.raises(ValueError, match=message):
        SO2(m_max=1).bind(*NATURAL).dense()


# ---- what cannot be bound ------------------------------------------------------------------------


def test_errors():
    with pytest.raises(ValueError, match="m_max is -1, expected 0 or more, or None"):
        SO2(m_max=-1)
    with pytest.raises(ValueError, match="direction of the edge from the 1o part .* lacks"):
        SO2().bind("0e+1o", "0e+2e", "0e+1o")
    with pytest.raises(ValueError, match=r"expects spherical harmonics .* has 1e, 2o"):
        SO2().bind("0e+1o", "0e+1o+1e+2o", "0e+1o")
    with pytest.raises(ValueError, match="No path couples"):
        SO2(m_max=0).bind("1e", "0e+1o+2e", "1o+2e")
