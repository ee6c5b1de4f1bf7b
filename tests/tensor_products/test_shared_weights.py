"""Products with one weight for all couplings: forms of one map, and what they say of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_tensor_product_laws import CHANNELS, LAYOUTS, arguments, second_factor

from equizoo.config import from_dict, to_dict
from equizoo.graph import gather_senders
from equizoo.tensor_products._base import TensorProduct
from equizoo.tensor_products._cp import decompose
from equizoo.tensor_products.clebsch_gordan import ClebschGordan
from equizoo.tensor_products.cp_decomposed import CPDecomposed, Given, Normalization, Schedule
from equizoo.tensor_products.gaunt_bracket import GauntBracket
from equizoo.tensor_products.low_rank_weights import LowRankWeights
from equizoo.tensor_products.matrix_product import MatrixProduct
from equizoo.tensor_products.shared_weights import Form, SharedWeights
from equizoo.tensor_products.so2 import SO2
from equizoo.tensor_products.sum_of_products import SumOfProducts

CONTENTS = [
    ("0e+1e+2e", "0e+1e+2e", "0e+1e+2e"),
    ("0e+0o+1e+1o", "0e+1o+2e", "0e+0o+1e+1o+2o+2e"),
    ("0e+1o", "0e+1o", "4e+1e+0e"),  # a result that nothing reaches
]
contents = pytest.mark.parametrize("irreps", CONTENTS, ids=" x ".join)
SAME_MAP = [form for form in Form if form != Form.BFLOAT16]
PRODUCTS = [ClebschGordan(), CPDecomposed(), CPDecomposed(rank=5), GauntBracket()]
OVERLAPPING = [LowRankWeights(None), SumOfProducts()]  # several weights for one coupling


@contents
@pytest.mark.parametrize("form", SAME_MAP)
@pytest.mark.parametrize("channels_2", [1, 3])
@pytest.mark.parametrize("product", PRODUCTS, ids=repr)
def test_it_is_the_product_with_equal_weights(product, irreps, form, channels_2):
    whole = product.bind(*irreps)
    bound = SharedWeights(product, form).bind(*irreps)
    x, y, weights = arguments(whole, 0, channels_2=channels_2)
    shared = weights[:, :1]
    expected = whole(x, y, jnp.tile(shared, (1, whole.num_weights, 1)))
    np.testing.assert_allclose(bound(x, y, shared), expected, atol=1e-11)
    assert bound.exact == whole.exact and bound.defect == whole.defect
    assert bound.paths == whole.paths


@pytest.mark.parametrize("form", SAME_MAP)
def test_in_the_frame_of_the_edge(form):
    """A product that is defined on harmonics alone."""
    irreps = ("0e+1o+2e", "0e+1o+2e", "0e+1o+2e")
    bound, whole = SharedWeights(SO2(), form).bind(*irreps), SO2().bind(*irreps)
    assert bound.on_harmonics
    x, y, weights = arguments(whole, 0, channels_2=1)
    expected = whole(x, y, jnp.tile(weights[:, :1], (1, whole.num_weights, 1)))
    np.testing.assert_allclose(bound(x, y, weights[:, :1]), expected, atol=1e-11)


@contents
def test_the_default_is_rank_one_of_low_rank_weights(irreps):
    bound, other = SharedWeights().bind(*irreps), LowRankWeights(1).bind(*irreps)
    np.testing.assert_allclose(bound.dense(), other.dense(), atol=1e-14)


def test_one_matrix_serves_all_channels():
    bound = SharedWeights().bind(*CONTENTS[0])
    assert bound.prepare(jnp.ones((7, 9, 1))).shape == (7, 9, 9)
    rounded = SharedWeights(form=Form.BFLOAT16).bind(*CONTENTS[0])
    assert rounded.prepare(jnp.ones((7, 9, 1))).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bfloat16_is_near_and_says_how_near(dtype):
    bound = SharedWeights(form=Form.BFLOAT16).bind(*CONTENTS[0])
    exact = SharedWeights().bind(*CONTENTS[0])
    assert not bound.exact and 0 < bound.defect < 0.01
    x, y, weights = arguments(exact, 0, batch=200, channels_2=1, dtype=dtype)
    found, expected = bound(x, y, weights), exact(x, y, weights)
    assert found.dtype == dtype
    relative = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < relative < bound.defect


@contents
@pytest.mark.parametrize("graph", LAYOUTS, ids=["rows", "flat"])
@pytest.mark.parametrize("form", SAME_MAP)
def test_sums_over_neighbours(form, graph, irreps):
    """Of features of edges, and their derivatives: every form as one edge after the other."""
    bound, reference = SharedWeights(form=form).bind(*irreps), ClebschGordan().bind(*irreps)
    rng = np.random.default_rng(0)
    nodes = jnp.asarray(rng.normal(size=(graph.num_nodes, bound.irreps_1.dim, CHANNELS)))
    x = gather_senders(nodes, graph)
    y = second_factor(bound)[1](jnp.asarray(rng.normal(size=(graph.num_edges, bound.irreps_2.dim))))
    weights = jnp.asarray(rng.normal(size=(graph.num_edges, 1, CHANNELS)))
    cotangent = jnp.asarray(rng.normal(size=(graph.num_nodes, bound.irreps_out.dim, CHANNELS)))

    def with_derivatives(product):
        def collect(x, y, weights):
            weights = jnp.tile(weights, (1, product.num_weights, 1))
            return product.collect(x, y, product.prepare(y[..., None]), weights, graph)

        result, pull = jax.vjp(collect, x, y, weights)
        return result, *pull(cotangent)

    expected = with_derivatives(reference)
    for a, b in zip(with_derivatives(bound), expected, strict=True):
        real = np.asarray(graph.edge_mask if len(a) == graph.num_edges else graph.node_mask)
        np.testing.assert_allclose(a[real], b[real], atol=1e-11)


@pytest.mark.parametrize("rank", [Schedule.EXACT, 7])
def test_bare_couplings_are_those_of_unit_variance_but_for_a_factor_per_degree(rank):
    irreps = ("0e+1e", "0e+1e", "0e+1e")
    if rank != Schedule.EXACT:  # a search may end elsewhere in a flat valley: one search for both
        target = CPDecomposed(normalization=Normalization.WIGNER).bind(*irreps).dense()[0]
        rank = Given(*(tuple(map(tuple, part)) for part in decompose(target, rank)))
    unit, bare = (
        SharedWeights(CPDecomposed(rank, normalization)).bind(*irreps).dense()[0]
        for normalization in Normalization
    )
    for place in (slice(0, 1), slice(1, 4)):
        factor = np.linalg.norm(bare[..., place]) / np.linalg.norm(unit[..., place])
        np.testing.assert_allclose(bare[..., place], factor * unit[..., place], atol=1e-12)
    if rank == Schedule.EXACT:  # each coupling of norm one: 2 into scalars, 3 into vectors
        np.testing.assert_allclose(np.sum(bare**2, axis=(0, 1)), [2, 1, 1, 1])


def test_options_are_written_and_read():
    product = SharedWeights(CPDecomposed(Schedule.SEVEN_L2, Normalization.WIGNER), Form.PRODUCT)
    written = to_dict(product)
    assert written == {
        "name": "shared_weights",
        "product": {"name": "cp_decomposed", "rank": "7L2", "normalization": "wigner"},
        "form": "product",
    }
    assert from_dict(TensorProduct, written) == product


@pytest.mark.parametrize("form", SAME_MAP)
@pytest.mark.parametrize("product", OVERLAPPING, ids=repr)
def test_unit_variance_where_several_weights_reach_one_coupling(product, form):
    irreps = ("0e+1e",) * 3
    bound = SharedWeights(product, form).bind(*irreps)
    variance = np.sum(bound.dense() ** 2, axis=(0, 1, 2))
    np.testing.assert_allclose(variance, 1, rtol=1e-9)
    x, y, weights = arguments(bound, 0, channels_2=3)
    each = [bound(*(a[:, :, c : c + 1] for a in (x, y, weights))) for c in range(3)]
    np.testing.assert_allclose(bound(x, y, weights), np.concatenate(each, axis=2), atol=1e-11)


def test_misspelt_options_are_refused():
    """By the classes themselves; while tests run, by the check of types before."""
    wrong = (
        (SharedWeights(), "form", "neighbours"),
        (MatrixProduct(), "conversion", "spares"),
        (CPDecomposed(), "normalization", "Variance"),
    )
    for product, option, value in wrong:
        object.__setattr__(product, option, value)
        with pytest.raises(ValueError, match=value):
            product.__post_init__()
