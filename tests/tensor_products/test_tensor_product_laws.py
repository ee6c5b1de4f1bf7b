"""What every tensor product must satisfy: a new file in ``tensor_products/`` comes under these."""

import functools

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from equizoo.graph import Budget, batch_frames, make_frame
from equizoo.registry import TENSOR_PRODUCTS
from equizoo.structure import Structure
from equizoo.tensor_products._base import TensorProduct
from equizoo.tensor_products.analysis import coefficients, equivariance_defect, interactability

PRODUCTS = list(TENSOR_PRODUCTS)
# Parities of spherical harmonics: every product takes these.
NATURAL = [
    ("0e", "0e+1o+2e+3o", "0e+1o+2e"),
    ("0e+1o", "0e+1o+2e", "0e+1o+2e+3o"),
    ("0e+1o+2e", "0e+1o+2e+3o", "0e+1o+2e+3o"),
]
# Pseudo-tensors, gaps in the degrees, irreps of each side that nothing couples.
UNUSUAL = [
    ("0e+0o+1e+1o", "0e+1o+2e", "0e+0o+1e+1o+2o+2e"),
    ("1o+3o", "2e+1e", "3o+1o+2o"),
    ("0e+1o", "0e+1o", "4e+1e+0e"),
    ("0e+1o+6e", "0e+1o+5o", "0e+1o+1e"),
]
# The odd couplings of true tensors alone: pseudo-tensors.
PSEUDO = [("0e+1o+2e", "0e+1o+2e", "1e+2o")]
EVERY = NATURAL + UNUSUAL + PSEUDO
# Even and odd couplings: what is compiled with derivatives is done on these alone.
SMALL = ("0e+1o", "0e+1o+2e", "0e+1o+1e+2o")

SEEDS = st.integers(0, 2**32 - 1)
EXACT = 1e-12  # float64, sums of tens of terms of order one
SINGLE = 1e-5  # float32 against float64, sums of tens of terms of order one

pytestmark = pytest.mark.parametrize("name", PRODUCTS)


def contents(values):
    return pytest.mark.parametrize("irreps", values, ids=" x ".join)


def bound(name, irreps):
    """The product with default options; a content that it declares it cannot hold is left out."""
    try:
        return TENSOR_PRODUCTS[name]().bind(*irreps)
    except ValueError as error:
        pytest.skip(f"not in the range of {name}: {error}")


@functools.cache
def dense_of(product):
    return product.dense()


@functools.cache
def compiled(product):
    return jax.jit(lambda *args: product(*args))


@functools.cache
def compiled_per_path(product):
    return jax.jit(lambda *args: product.per_path(*args))


@jax.jit
def wigner_matrices(rotation):
    return [e3nn.Irrep(degree, 1).D_from_matrix(rotation) for degree in range(7)]


def orthogonal(seed, determinant):
    """For the rotation of a seed, times the inversion: the function irreps -> representation."""
    matrices = wigner_matrices(Rotation.random(random_state=seed).as_matrix())

    def representation(irreps):
        signs = (1, 1) if determinant > 0 else (1, -1)
        return scipy.linalg.block_diag(
            *(signs[ir.p < 0] * np.asarray(matrices[ir.l]) for _, ir in e3nn.Irreps(irreps))
        )

    return representation


def second_factor(product):
    """How many coordinates ``y`` has, and ``y`` as a function of them.

    Its components; for a product that is defined on harmonics a vector and a factor per degree.
    """
    if not product.on_harmonics:
        return product.irreps_2.dim, lambda components: components

    def y(coordinates):
        harmonics = e3nn.spherical_harmonics(
            product.irreps_2, jnp.moveaxis(coordinates[:, :3], 1, 2), normalize=True
        ).array
        dims = np.array([ir.dim for _, ir in product.irreps_2])
        return jnp.moveaxis(harmonics, 2, 1) * jnp.repeat(coordinates[:, 3:], dims, axis=1)

    return 3 + len(product.irreps_2), y


def coordinates(product, seed, batch=5, channels=3, channels_2=None):
    """``x``, the coordinates of ``y``, weights."""
    rng = np.random.default_rng(seed)
    channels_2 = channels if channels_2 is None else channels_2
    shapes = (
        (batch, product.irreps_1.dim, channels),
        (batch, second_factor(product)[0], channels_2),
        (batch, product.num_weights, channels),
    )
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def arguments(product, seed, batch=5, channels=3, channels_2=None, dtype=np.float64):
    x, y, weights = coordinates(product, seed, batch, channels, channels_2)
    y = second_factor(product)[1](y)
    return [jnp.asarray(a, dtype) for a in (x, y, weights)]


# ---- the map itself --------------------------------------------------------------------------


@contents(EVERY)
@given(seed=SEEDS)
@pytest.mark.parametrize("determinant", [1, -1], ids=["rotation", "reflection"])
def test_dense_commutes_with_o3(name, irreps, determinant, seed):
    product = bound(name, irreps)
    dense = dense_of(product)
    d_1, d_2, d_out = map(orthogonal(seed, determinant), irreps)
    before = np.einsum("wabk,ai,bj->wijk", dense, d_1, d_2, optimize=True)
    after = np.einsum("wijl,kl->wijk", dense, d_out)
    np.testing.assert_allclose(before, after, atol=EXACT)


@contents(EVERY)
@given(seed=SEEDS)
def test_the_call_is_the_contraction_with_dense(name, irreps, seed):
    product = bound(name, irreps)
    x, y, weights = arguments(product, seed)
    expected = np.einsum("wijk,bwc,bic,bjc->bkc", dense_of(product), weights, x, y, optimize=True)
    np.testing.assert_allclose(compiled(product)(x, y, weights), expected, atol=1e-11)


@contents(EVERY)
def test_dense_is_a_combination_of_its_paths(name, irreps):
    """Of the couplings that are allowed it contains those that it names; else nothing."""
    product = bound(name, irreps)
    found = coefficients(product)
    assert (found.residual < 1e-10) == product.exact
    assert product.exact == (equivariance_defect(product) < 1e-9)
    if product.exact:
        present = {path for path, there in interactability(product).items() if there}
        assert present == set(product.paths)


@contents(EVERY)
def test_unit_variance_in_unit_variance_out(name, irreps):
    """Closed form: standard normal weights and inputs give the sum of squares of ``dense``."""
    product = bound(name, irreps)
    variance = np.sum(dense_of(product) ** 2, axis=(0, 1, 2))
    reached = {path.index_out for path in product.paths}
    slices = product.irreps_out.slices()
    for index, place in enumerate(slices):
        np.testing.assert_allclose(variance[place], float(index in reached), atol=1e-10)


@contents(EVERY)
def test_paths_are_allowed_and_in_order(name, irreps):
    product = bound(name, irreps)
    for path in product.paths:
        assert path.ir_1 == product.irreps_1[path.index_1].ir
        assert path.ir_2 == product.irreps_2[path.index_2].ir
        assert path.ir_out == product.irreps_out[path.index_out].ir
        assert path.ir_out in path.ir_1 * path.ir_2
    assert [p.index_out for p in product.paths] == sorted(p.index_out for p in product.paths)
    assert list(product.into) == sorted(product.into)
    assert set(product.into) == {path.index_out for path in product.paths}
    assert [product.irreps_out[i].ir for i in product.into] == [i for _, i in product.irreps_paths]


@contents(EVERY)
@given(seed=SEEDS)
def test_paths_summed_are_the_call(name, irreps, seed):
    product = bound(name, irreps)
    x, y, weights = arguments(product, seed)
    pieces = np.asarray(compiled_per_path(product)(x, y, weights))
    expected = np.zeros((len(x), product.irreps_out.dim, 3))
    for index, place in zip(product.into, product.irreps_paths.slices(), strict=True):
        slot = product.irreps_out.slices()[index]
        expected[:, slot] += pieces[:, place] / np.sqrt(product.into.count(index))
    np.testing.assert_allclose(compiled(product)(x, y, weights), expected, atol=EXACT)


# ---- as a function of arrays -------------------------------------------------------------------


@contents(NATURAL)
@given(seed=SEEDS)
def test_one_channel_or_one_weight_row_is_broadcast(name, irreps, seed):
    product = bound(name, irreps)
    x, y, weights = arguments(product, seed, channels_2=1)
    full = compiled(product)(x, jnp.tile(y, (1, 1, 3)), weights)
    np.testing.assert_allclose(compiled(product)(x, y, weights), full, atol=EXACT)
    one = weights[:1, :, :1]
    full = compiled(product)(x, y, jnp.tile(one, (5, 1, 3)))
    np.testing.assert_allclose(compiled(product)(x, y, one), full, atol=EXACT)


@contents(NATURAL)
@given(seed=SEEDS)
def test_float32_is_near_float64(name, irreps, seed):
    product = bound(name, irreps)
    exact = compiled(product)(*arguments(product, seed, channels_2=1))
    single = arguments(product, seed, channels_2=1, dtype=np.float32)
    on = compiled(product)(*single)
    assert on.dtype == np.float32
    np.testing.assert_allclose(on, exact, atol=SINGLE * np.abs(exact).max())
    with jax.enable_x64(False):
        off = compiled(product)(*single)
        assert off.dtype == np.float32
    np.testing.assert_allclose(off, exact, atol=SINGLE * np.abs(exact).max())


@contents([SMALL])
@pytest.mark.parametrize("channels_2", [1, 3])
def test_matrix_products_are_in_full_precision_whatever_the_default(name, irreps, channels_2):
    """Else results had fewer digits on a GPU or TPU than on a CPU."""
    product = bound(name, irreps)
    args = arguments(product, 0, channels_2=channels_2)
    with jax.default_matmul_precision("bfloat16"):
        program = jax.make_jaxpr(jax.grad(lambda *a: product(*a).sum(), argnums=(0, 2)))(*args)
    assert "Precision.DEFAULT" not in str(program)


@contents([SMALL])
@pytest.mark.parametrize("channels_2", [1, 3])
def test_first_and_second_gradients_are_those_of_dense(name, irreps, channels_2):
    product = bound(name, irreps)
    args = coordinates(product, 0, channels_2=channels_2)
    directions = coordinates(product, 1, channels_2=channels_2)
    dense, second = jnp.asarray(dense_of(product)), second_factor(product)[1]

    def plain(x, y, weights):
        y = jnp.broadcast_to(y, (*y.shape[:2], x.shape[2]))
        return jnp.einsum("wijk,bwc,bic,bjc->bkc", dense, weights, x, y)

    cotangent = jnp.cos(jnp.arange(product.irreps_out.dim, dtype=float))[:, None]
    cotangent = jnp.tile(cotangent, (1, 3))[None]
    found, expected = (
        derivatives(lambda x, y, w, f=f: f(x, second(y), w), args, cotangent, directions)
        for f in (product, plain)
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10 * max(1, np.abs(b).max()))


@contents([SMALL])
@pytest.mark.parametrize("channels_2", [1, 3])
def test_gradients_at_zero_are_finite(name, irreps, channels_2):
    product = bound(name, irreps)
    zeros = [jnp.zeros_like(a) for a in arguments(product, 0, channels_2=channels_2)]

    def first(*args):
        gradients = jax.grad(lambda *args: jnp.sum(product(*args)), (0, 1, 2))(*args)
        return sum(jnp.sum(gradient) for gradient in gradients)

    value, second = jax.jit(jax.value_and_grad(first, (0, 1, 2)))(*zeros)
    assert np.isfinite(value) and all(np.isfinite(gradient).all() for gradient in second)


@contents([SMALL])
def test_jit_vmap_and_forward_mode(name, irreps):
    product = bound(name, irreps)
    args = arguments(product, 0, channels_2=1)
    tangents = arguments(product, 1, channels_2=1)
    z = product(*args)
    np.testing.assert_allclose(compiled(product)(*args), z, atol=EXACT)
    stacked = [jnp.stack([a, 2 * a]) for a in args]
    together = jax.jit(jax.vmap(product))(*stacked)
    np.testing.assert_allclose(together, jnp.stack([z, 8 * z]), atol=1e-11)
    _, forward = jax.jit(lambda *args: jax.jvp(product, args, tuple(tangents)))(*args)
    v = jnp.cos(jnp.arange(z.size, dtype=z.dtype)).reshape(z.shape)
    backward = jax.jit(lambda *args: jax.vjp(product, *args)[1](v))(*args)
    pairs = zip(backward, tangents, strict=True)
    np.testing.assert_allclose(jnp.sum(forward * v), sum(jnp.sum(b * t) for b, t in pairs))


def test_most_contents_can_be_bound(name):
    """So that the laws above are not skipped one and all."""
    cls = TENSOR_PRODUCTS[name]
    skipped = 0
    for irreps in EVERY:
        try:
            cls().bind(*irreps)
        except ValueError:
            skipped += 1
    assert skipped <= len(EVERY) // 2


def test_equal_arguments_share_one_bound_product(name):
    cls = TENSOR_PRODUCTS[name]
    first = cls().bind("0e+1o", "0e+1o", "0e+1o+1e")
    assert cls().bind("0e+1o", e3nn.Irreps("0e+1o"), e3nn.Irreps("0e+1o+1e")) is first
    assert cls().bind("0e+1o", "0e+1o", "0e+1e") is not first
    assert hash(cls()) == hash(cls()) and cls() == cls()


def test_cost_grows_with_batch_and_channels(name):
    product = TENSOR_PRODUCTS[name]().bind("0e+1o", "0e+1o", "0e+1o+1e")
    one = product.flops(1, 4)
    assert isinstance(one, int) and product.flops(10, 4) == 10 * one
    assert one < product.flops(1, 8) <= 2 * one


@pytest.mark.parametrize(
    ("irreps", "message"),
    [
        (("2x0e", "0e", "0e"), "Expected each irrep once with one copy"),
        (("0e+1o+0e", "0e", "0e"), "Expected each irrep once with one copy"),
        (("0e", "1o", "0e"), "No path couples '1x0e' and '1x1o' to '1x0e'"),
    ],
    ids=str,
)
def test_what_cannot_be_bound(name, irreps, message):
    with pytest.raises(ValueError, match=message):
        TENSOR_PRODUCTS[name]().bind(*irreps)


# ---- convolve ------------------------------------------------------------------------------------


def layouts():
    rng = np.random.default_rng(5)
    structure = Structure(
        rng.choice([1, 8], 6), rng.normal(size=(6, 3)), 4 * np.eye(3), (True, True, False)
    )
    frame = make_frame(structure, 2.6, (1, 8))
    flat = Budget(nodes=8, graphs=2, edges=70, slots=None, out_slots=None, blocks=3, block_size=8)
    rows = Budget(nodes=8, graphs=2, edges=96, slots=12, out_slots=12, blocks=3, block_size=8)
    return [
        jax.tree.map(jnp.asarray, batch_frames([frame], budget, np.float64))
        for budget in (rows, flat)
    ]


LAYOUTS = layouts()
CHANNELS = 2


def convolve_on(product, graph):
    """``convolve`` as a function of real edges alone, with noise on the padded ones."""
    real = jnp.asarray(np.flatnonzero(graph.edge_mask))
    second = second_factor(product)[1]

    def spread(values):
        noise = jnp.asarray(np.random.default_rng(3).normal(size=(graph.num_edges, 1)))
        noise = noise.reshape(-1, *(1,) * (values.ndim - 1))
        return jnp.broadcast_to(noise, (graph.num_edges, *values.shape[1:])).at[real].set(values)

    return lambda x, y, weights: product.convolve(
        x, spread(second(y[..., None])[..., 0]), spread(weights), graph
    )


def per_path_and_loop(product, graph):
    real = np.flatnonzero(graph.edge_mask)
    senders, receivers = np.asarray(graph.senders)[real], np.asarray(graph.receivers)[real]
    into = jnp.asarray(receivers[None] == np.arange(graph.num_nodes)[:, None], float)

    def function(x, y, weights):
        y = second_factor(product)[1](y[..., None])
        return jnp.einsum("ne,epc->npc", into, product.per_path(x[senders], y, weights))

    return function


def derivatives(function, args, cotangent, directions):
    """Value, gradient, and gradient of the gradient along a direction: reverse over reverse."""

    def scalar(*args):
        z = function(*args)
        return jnp.sum(jnp.sin(z) * cotangent), z

    def along(*args):
        gradient, z = jax.grad(scalar, (0, 1, 2), has_aux=True)(*args)
        pairs = zip(gradient, directions, strict=True)
        return sum(jnp.sum(g * d) for g, d in pairs), (gradient, z)

    second, (first, z) = jax.jit(jax.grad(along, (0, 1, 2), has_aux=True))(*args)
    return [z, *first, *second]


@contents([SMALL])
def test_convolve_on_rows_on_flat_and_by_loop(name, irreps):
    product, rng = bound(name, irreps), np.random.default_rng(0)
    edges, nodes = int(LAYOUTS[0].edge_mask.sum()), LAYOUTS[0].num_nodes
    assert edges > 30
    shapes = (
        (nodes, product.irreps_1.dim, CHANNELS),
        (edges, second_factor(product)[0]),
        (edges, product.num_weights, CHANNELS),
    )
    args, directions = ([jnp.asarray(rng.normal(size=s)) for s in shapes] for _ in range(2))
    cotangent = jnp.asarray(rng.normal(size=(nodes, product.irreps_paths.dim, CHANNELS)))
    expected = derivatives(per_path_and_loop(product, LAYOUTS[0]), args, cotangent, directions)
    for graph in LAYOUTS:
        found = derivatives(convolve_on(product, graph), args, cotangent, directions)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-11)


# ---- power ---------------------------------------------------------------------------------------


def bound_power(name, irreps_in, irreps_out, order):
    """The many-body form, where the product has one; the base class raises where it has none."""
    cls = TENSOR_PRODUCTS[name]
    if cls._bind_power is TensorProduct._bind_power:
        with pytest.raises(ValueError, match="has no many-body form"):
            cls().bind_power(irreps_in, irreps_out, order)
        return None
    return cls().bind_power(irreps_in, irreps_out, order)


@pytest.mark.parametrize("irreps", [("0e+1o+2e", "0e+1o"), ("0e+1o+2e+3o", "0e+1o+2e")], ids=str)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("determinant", [1, -1], ids=["rotation", "reflection"])
def test_power_commutes_with_o3(name, irreps, order, determinant):
    power = bound_power(name, *irreps, order)
    if power is None:
        return
    rng = np.random.default_rng(order)
    x = rng.normal(size=(2, 3, power.irreps_in.dim, 2))
    weights = jnp.asarray(rng.normal(size=(2, power.num_weights, 2)))
    d_in, d_out = map(orthogonal(order, determinant), irreps)
    turned = power(jnp.asarray(np.einsum("ij,bnjc->bnic", d_in, x)), weights)
    expected = np.einsum("ij,bnjc->bnic", d_out, power(jnp.asarray(x), weights))
    scale = np.abs(expected).max()
    assert scale > 0.1
    np.testing.assert_allclose(turned, expected, atol=1e-12 * scale)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_power_is_linear_in_weights_and_finite_at_zero(name, order):
    power = bound_power(name, "0e+1o+2e", "0e+1o", order)
    if power is None:
        return
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 4, 9, 2)))
    u, v = (jnp.asarray(rng.normal(size=(1, power.num_weights, 2))) for _ in range(2))
    np.testing.assert_allclose(power(x, u + 2 * v), power(x, u) + 2 * power(x, v), atol=1e-11)
    covered = sorted(
        i for place in power.weight_slices.values() for i in range(place.start, place.stop)
    )
    assert covered == list(range(power.num_weights))
    gradient = jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(power(x, u)))(x) ** 2))
    assert np.isfinite(gradient(jnp.zeros_like(x))).all()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_power_in_float32(name, order):
    power = bound_power(name, "0e+1o+2e", "0e+1o", order)
    if power is None:
        return
    rng = np.random.default_rng(1)
    x, weights = rng.normal(size=(2, 3, 9, 2)), rng.normal(size=(2, power.num_weights, 2))
    exact = power(jnp.asarray(x), jnp.asarray(weights))
    for x64 in (False, True):
        with jax.enable_x64(x64):
            single = power(jnp.asarray(x, np.float32), jnp.asarray(weights, np.float32))
            assert single.dtype == np.float32
        np.testing.assert_allclose(single, exact, atol=SINGLE * np.abs(exact).max())
    with jax.default_matmul_precision("bfloat16"):
        program = jax.make_jaxpr(power)(jnp.asarray(x), jnp.asarray(weights))
    assert "Precision.DEFAULT" not in str(program)


def test_equal_arguments_share_one_bound_power(name):
    power = bound_power(name, "0e+1o", "0e+1o", 2)
    if power is None:
        return
    assert bound_power(name, e3nn.Irreps("0e+1o"), "0e+1o", 2) is power
    assert bound_power(name, "0e+1o", "0e+1o", 3) is not power
    with pytest.raises(ValueError, match="order is 0, expected at least 1"):
        bound_power(name, "0e+1o", "0e", 0)
    with pytest.raises(ValueError, match="one copy"):
        bound_power(name, "2x0e", "0e", 2)
