"""Weights of low rank over couplings: against Clebsch-Gordan with the weights written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_tensor_product_laws import (
    CHANNELS,
    LAYOUTS,
    arguments,
    convolve_on,
    derivatives,
    per_path_and_loop,
)

from equizoo.config import from_dict, to_dict
from equizoo.tensor_products._base import TensorProduct
from equizoo.tensor_products.analysis import equivariance_defect, expressivity
from equizoo.tensor_products.clebsch_gordan import ClebschGordan
from equizoo.tensor_products.low_rank_weights import LowRankWeights

CONTENTS = [
    ("0e+1o+2e", "0e+1o+2e+3o", "0e+1o+2e"),
    ("0e+0o+1e+1o", "0e+1o+2e", "0e+0o+1e+1o+2o+2e"),
    ("0e+1o", "0e+1o", "4e+1e+0e"),  # a result that nothing reaches
    ("0e+1e+2e", "0e+1e+2e", "0e+1e+2e"),  # rank two by matrices, higher ones coupling by coupling
]
contents = pytest.mark.parametrize("irreps", CONTENTS, ids=" x ".join)
channels = pytest.mark.parametrize("channels_2", [1, 3])


def mixing_of(bound, seed, batch=5):
    shape = (batch, bound.num_weights, len(bound.paths))
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@contents
@channels
@pytest.mark.parametrize("rank", [1, 2, 3, None])
def test_it_is_clebsch_gordan_with_the_weights_written_out(irreps, channels_2, rank):
    bound, whole = LowRankWeights(rank).bind(*irreps), ClebschGordan().bind(*irreps)
    assert bound.paths == whole.paths
    assert bound.num_weights == (rank or len(whole.paths))
    x, y, weights = arguments(bound, 0, channels_2=channels_2)
    written_out = np.einsum("kp,bkc->bpc", bound.mixing, weights) / np.sqrt(bound.num_weights)
    expected = whole(x, y, jnp.asarray(written_out))
    np.testing.assert_allclose(bound(x, y, weights), expected, atol=1e-12)


@contents
@channels
@pytest.mark.parametrize("rank", [1, 2, None])
def test_a_mixing_that_depends_on_the_data(irreps, channels_2, rank):
    bound, whole = LowRankWeights(rank).bind(*irreps), ClebschGordan().bind(*irreps)
    x, y, weights = arguments(bound, 0, channels_2=channels_2)
    mixing = mixing_of(bound, 1)
    written_out = jnp.einsum("bkp,bkc->bpc", mixing, weights) / np.sqrt(bound.num_weights)
    found = bound._sum_paths(bound.couple(x, bound.prepare(y, mixing), weights))
    np.testing.assert_allclose(found, whole(x, y, written_out), atol=1e-12)


@contents
@channels
def test_full_rank_reaches_any_weights(irreps, channels_2):
    """With one term for each coupling the weights of Clebsch-Gordan products are its weights."""
    bound, whole = LowRankWeights(None).bind(*irreps), ClebschGordan().bind(*irreps)
    x, y, weights = arguments(whole, 0, channels_2=channels_2)
    identity = np.sqrt(len(whole.paths)) * np.eye(len(whole.paths))
    prepared = bound.prepare(y, jnp.asarray(np.tile(identity, (5, 1, 1))))
    found = bound._sum_paths(bound.couple(x, prepared, weights))
    np.testing.assert_allclose(found, whole(x, y, weights), atol=1e-12)


@contents
@channels
def test_rank_one_is_one_weight_for_all_couplings(irreps, channels_2):
    bound, whole = LowRankWeights(1).bind(*irreps), ClebschGordan().bind(*irreps)
    x, y, weights = arguments(bound, 0, channels_2=channels_2)
    shared = jnp.tile(weights, (1, whole.num_weights, 1))
    np.testing.assert_allclose(bound(x, y, weights), whole(x, y, shared), atol=1e-12)


def test_one_matrix_for_each_term_serves_all_channels():
    """While these are not much larger than the matrices of the couplings one by one."""
    bound = LowRankWeights(1).bind("0e+1o+2e", "0e+1o+2e", "0e+1o")
    assert bound.prepare(jnp.ones((7, 9, 1))).shape == (7, 1, 4, 9)
    y = jnp.ones((7, 9, 1))
    assert LowRankWeights(6).bind(*CONTENTS[3]).prepare(y).shape == (7, 6, 9, 9)
    separate = LowRankWeights(7).bind(*CONTENTS[3]).prepare(y)
    expected = ClebschGordan().bind(*CONTENTS[3]).prepare(y)
    assert jax.tree.map(jnp.shape, separate.prepared) == jax.tree.map(jnp.shape, expected)


def test_rows_of_the_constant_mixing():
    """The first is constant; all are orthogonal, for full rank without further scales."""
    for irreps in CONTENTS:
        full = LowRankWeights(None).bind(*irreps)
        size = len(full.paths)
        np.testing.assert_allclose(full.mixing @ full.mixing.T, size * np.eye(size), atol=1e-12)
        for rank in (1, 2, 3):
            bound = LowRankWeights(rank).bind(*irreps)
            into = np.array([path.index_out for path in bound.paths])
            for index in bound.into:  # unit variance of the weights written out
                mine = bound.mixing[:, into == index]
                np.testing.assert_allclose(np.ptp(mine[0]), 0, atol=1e-14)
                np.testing.assert_allclose(np.mean(mine**2), 1)
            assert np.linalg.matrix_rank(bound.mixing) == rank


@pytest.mark.parametrize(
    ("irreps", "dimensions"),
    [("0e+1e", [4, 5, 5, 5, 5]), ("0e+1e+2e", [7, 8, 9, 10, 11, 12, 13, 14, *[15] * 7])],
    ids=str,
)
def test_the_family_grows_with_the_rank_to_all_couplings(irreps, dimensions):
    bounds = [LowRankWeights(k + 1).bind(irreps, irreps, irreps) for k in range(len(dimensions))]
    assert [expressivity(bound) for bound in bounds] == dimensions
    assert len(bounds[0].paths) == len(dimensions)
    assert max(map(equivariance_defect, bounds)) < 1e-9


@pytest.mark.parametrize("irreps", CONTENTS[:2], ids=" x ".join)
@pytest.mark.parametrize("rank", [2, None])
def test_variance_and_dense_at_higher_ranks(irreps, rank):
    bound = LowRankWeights(rank).bind(*irreps)
    dense = bound.dense()
    np.testing.assert_allclose(np.sum(dense**2, axis=(0, 1, 2)), 1, atol=1e-12)
    x, y, weights = arguments(bound, 3)
    expected = np.einsum("wijk,bwc,bic,bjc->bkc", dense, weights, x, y, optimize=True)
    np.testing.assert_allclose(bound(x, y, weights), expected, atol=1e-12)


class WrittenOut:
    """The definition, with a mixing for each edge: for ``per_path_and_loop``."""

    on_harmonics = False

    def __init__(self, bound, mixing):
        self.bound, self.mixing, self.irreps_2 = bound, mixing, bound.irreps_2
        self.whole = ClebschGordan().bind(bound.irreps_1, bound.irreps_2, bound.irreps_out)

    def per_path(self, x, y, weights):
        mixed = jnp.einsum("bkp,bkc->bpc", self.mixing, weights)
        z = self.whole(x, y, mixed / float(np.sqrt(self.bound.num_weights)))
        places = self.bound.irreps_out.slices()
        return jnp.concatenate([z[:, places[index]] for index in self.bound.into], axis=1)


class WithMixing:
    """A bound product whose ``convolve`` is given a mixing for each real edge of a graph."""

    on_harmonics = False

    def __init__(self, bound, mixing, graph):
        real = np.flatnonzero(graph.edge_mask)
        self.bound, self.irreps_2 = bound, bound.irreps_2
        self.mixing = jnp.zeros((graph.num_edges, *mixing.shape[1:])).at[real].set(mixing)

    def convolve(self, *args):
        return self.bound.convolve(*args, mixing=self.mixing)


@pytest.mark.parametrize("given", [False, True], ids=["constant", "mixing"])
@pytest.mark.parametrize("rank", [2, 3])
def test_convolve_at_higher_ranks(rank, given):
    bound, rng = LowRankWeights(rank).bind(*CONTENTS[3]), np.random.default_rng(0)
    edges, nodes = int(LAYOUTS[0].edge_mask.sum()), LAYOUTS[0].num_nodes
    shapes = (
        (nodes, bound.irreps_1.dim, CHANNELS),
        (edges, bound.irreps_2.dim),
        (edges, bound.num_weights, CHANNELS),
    )
    args, directions = ([jnp.asarray(rng.normal(size=s)) for s in shapes] for _ in range(2))
    cotangent = jnp.asarray(rng.normal(size=(nodes, bound.irreps_paths.dim, CHANNELS)))
    constant = jnp.tile(jnp.asarray(bound.mixing)[None], (edges, 1, 1))
    mixing = mixing_of(bound, 1, edges) if given else constant
    written_out = per_path_and_loop(WrittenOut(bound, mixing), LAYOUTS[0])
    expected = derivatives(written_out, args, cotangent, directions)
    for graph in LAYOUTS:
        product = WithMixing(bound, mixing, graph) if given else bound
        found = derivatives(convolve_on(product, graph), args, cotangent, directions)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-11)


def test_it_can_be_bound_while_a_caller_is_traced():
    x = jnp.ones((2, 4, 3))

    def call(x):
        bound = LowRankWeights(2).bind("0e+1o", "0e+1o", "0e+1o")
        return bound(x, x[:, :, :1], jnp.ones((1, 2, 1)))

    np.testing.assert_allclose(jax.jit(call)(x), call(x), atol=1e-13)


def test_no_edges_give_no_results():
    bound = LowRankWeights(1).bind(*("0e+1o",) * 3)
    x, y, weights = arguments(bound, 0, channels_2=1)
    assert bound(x[:0], y[:0], weights[:0]).shape == (0, 4, 3)


def test_config_and_errors():
    for rank in (1, 7, None):
        config = LowRankWeights(rank)
        assert to_dict(config) == {"name": "low_rank_weights", "rank": rank}
        assert from_dict(TensorProduct, to_dict(config)) == config
    assert LowRankWeights(7).bind("0e", "0e+1o", "0e+1o").num_weights == 2
    with pytest.raises(ValueError, match="rank is 0; expected at least 1, or None for full rank"):
        LowRankWeights(0)
    with pytest.raises(ValueError, match="No path couples"):
        LowRankWeights(2).bind("0e", "1o", "0e")
