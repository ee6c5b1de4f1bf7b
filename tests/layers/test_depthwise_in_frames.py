"""Products in frames of edges against the products as they are given, turned back."""

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from equizoo.layers.depthwise import depthwise
from equizoo.layers.depthwise_in_frames import _by_order, frames_of, in_frames, into_frames
from equizoo.layers.features import FeaturesLinear, channels_of
from equizoo.layers.harmonics import spherical_harmonics
from equizoo.registry import TENSOR_PRODUCTS
from equizoo.tensor_products.clebsch_gordan import ClebschGordan
from equizoo.tensor_products.cp_decomposed import CPDecomposed, Schedule
from equizoo.tensor_products.low_rank_weights import LowRankWeights
from equizoo.tensor_products.shared_weights import Form, SharedWeights

NATURAL = "3x0e+2x1o+2x2e"
EVEN = "3x0e+2x1e+2x2e"
BOTH = "2x0e+3x0o+2x1o+2x1e+1x2e"
HARMONICS = {NATURAL: "0e+1o+2e", EVEN: "0e+1e+2e", BOTH: "0e+1o+2e"}
ROUNDING = 1e-12
EDGES = 9  # two of them the poles, two on the equator, one without a length


def edge_vectors():
    vectors = np.random.default_rng(0).normal(size=(EDGES, 3))
    vectors[:5] = [[0, 1.5, 0], [0, -2, 0], [1, 0, 0], [0, 0, -1], [0, 0, 0]]
    return jnp.asarray(vectors)


def products():
    """All products with their defaults, and those that share weights between even and odd paths."""
    found = [(name, TENSOR_PRODUCTS[name](), NATURAL) for name in TENSOR_PRODUCTS]
    found += [("clebsch_gordan", ClebschGordan(), irreps) for irreps in (EVEN, BOTH)]
    found += [("low_rank", LowRankWeights(2), EVEN), ("matrix", SharedWeights(), EVEN)]
    return [pytest.param(p, i, id=f"{n}-{i}") for n, p, i in found]


def problem(product, irreps, shared):
    rng, harmonics = np.random.default_rng(1), HARMONICS[irreps]
    plain = depthwise(product, irreps, harmonics, irreps)
    x = {
        ir: jnp.asarray(rng.normal(size=(EDGES, e3nn.Irrep(ir).dim, mul)))
        for ir, mul in channels_of(irreps).items()
    }
    weights = jnp.asarray(rng.normal(size=(1 if shared else EDGES, plain.num_weights)))
    wanted = "+".join(f"2x{ir}" for ir in channels_of(plain.irreps_out) if ir in irreps)
    linears = [
        FeaturesLinear(plain.irreps_out, "4x0e", rngs=nnx.Rngs(0)),
        FeaturesLinear(plain.irreps_out, wanted, rngs=nnx.Rngs(1)),
    ]
    for linear in linears:
        linear.bias[...] = jnp.asarray(rng.normal(size=linear.bias.shape), linear.bias.dtype)
    return plain, x, weights, linears


def as_given(plain, harmonics, x, weights, vectors, linears):
    y = spherical_harmonics(e3nn.Irreps(harmonics), vectors)
    whole = plain(x, plain.prepare(y), weights)
    return [linear(whole) for linear in linears]


def turned(product, irreps, x, weights, vectors, linears):
    frames = frames_of(vectors, irreps)
    found = product(into_frames(x, frames), weights, linears)
    return [
        {
            ir: jnp.einsum("eij,eic->ejc", frames[ir], a) if ir in frames else a
            for ir, a in y.items()
        }
        for y in found
    ]


@pytest.mark.parametrize("shared", [False, True], ids=["weights per edge", "shared weights"])
@pytest.mark.parametrize(("product", "irreps"), products())
def test_the_map_is_that_of_the_product_as_given(product, irreps, shared):
    with jax.enable_x64(True):
        try:
            plain, x, weights, linears = problem(product, irreps, shared)
        except ValueError as refusal:
            pytest.skip(f"does not bind: {refusal}")
        framed, vectors = in_frames(plain), edge_vectors()
        if not plain.exact:
            assert framed is None
            pytest.skip("not exact")

        def compared(function, *given):
            def scalar(x, weights, vectors):
                found = function(*given, x, weights, vectors, linears)
                leaves = [leaf[np.arange(EDGES) != 4] for leaf in jax.tree.leaves(found)]
                return sum(jnp.sum(jnp.sin(leaf)) for leaf in leaves), leaves

            evaluated = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True))
            (_, leaves), gradients = evaluated(x, weights, vectors)
            return [leaves, gradients[0], gradients[1], gradients[2]]

        expected = compared(as_given, plain, HARMONICS[irreps])
        found = compared(turned, framed, irreps)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = np.abs(other).max()
        assert scale > 1e-3
        np.testing.assert_allclose(one, other, rtol=0, atol=ROUNDING * max(scale, 1))


def test_most_products_are_compared():
    """Or the tests above would say nothing."""
    compared = 0
    for name in TENSOR_PRODUCTS:
        try:
            plain = depthwise(TENSOR_PRODUCTS[name](), NATURAL, HARMONICS[NATURAL], NATURAL)
        except ValueError:
            continue
        compared += in_frames(plain) is not None
    assert compared >= 9


def test_harmonics_in_their_own_frame_have_order_zero_alone():
    with jax.enable_x64(True):
        vectors = edge_vectors()
        irreps = "1x0e+1x1o+1x2e+1x3o"
        harmonics = spherical_harmonics(e3nn.Irreps(irreps), vectors)
        x = {
            str(ir): harmonics[:, place, None]
            for (_, ir), place in zip(
                e3nn.Irreps(irreps), e3nn.Irreps(irreps).slices(), strict=True
            )
        }
        found = into_frames(x, frames_of(vectors, irreps))
    for ir, array in found.items():
        expected = np.zeros(array.shape)
        expected[:, 0] = np.sqrt(e3nn.Irrep(ir).dim)
        if ir != "0e":
            expected[4] = 0  # without a length
        np.testing.assert_allclose(array, expected, rtol=0, atol=ROUNDING)


def test_a_product_that_is_not_exact_stays_as_it_is():
    product = SharedWeights(CPDecomposed(Schedule.SEVEN_L), Form.PRODUCT)
    assert in_frames(depthwise(product, EVEN, HARMONICS[EVEN], EVEN)) is None


def test_a_map_that_depends_on_the_angle_is_refused():
    with pytest.raises(ValueError, match="does not commute"):
        _by_order(np.random.default_rng(0).normal(size=(3, 5)))
