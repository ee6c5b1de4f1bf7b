"""Linear maps: by hand, equivariant because they touch channels alone, of unit variance."""

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from equizoo.graph import Budget, batch_frames, make_frame
from equizoo.layers.gate import gated
from equizoo.layers.linear import (
    EquivariantLinear,
    SpeciesLinear,
    into_irreps,
    normal_param,
    shared_irreps,
)
from equizoo.layers.mlp import NormalizedMLP
from equizoo.structure import Structure

IN, OUT = e3nn.Irreps("0e+0e+1o+2e+1o+1e"), e3nn.Irreps("1o+0e+1e")


def layer(channels_in=3, channels_out=5):
    return EquivariantLinear(IN, OUT, channels_in, channels_out, rngs=nnx.Rngs(0))


def test_blocks_of_one_irrep_are_mixed_together():
    linear, x = layer(), np.random.default_rng(0).normal(size=(4, IN.dim, 3))
    slices = IN.slices()
    for (_, ir), place in zip(OUT, OUT.slices(), strict=True):
        blocks = [x[:, s] for (_, i), s in zip(IN, slices, strict=True) if i == ir]
        kernel = np.asarray(linear.kernels[str(ir)][...], np.float64)
        expected = np.concatenate(blocks, axis=2) @ kernel / np.sqrt(3 * len(blocks))
        np.testing.assert_allclose(linear(jnp.asarray(x))[:, place], expected, rtol=1e-12)
    assert {str(k): v.shape for k, v in linear.kernels.items()} == {
        "1o": (6, 5), "0e": (6, 5), "1e": (3, 5)
    }  # fmt: skip


def test_linear_keeps_unit_variance():
    linear = layer(256, 256)
    x = np.random.default_rng(1).normal(size=(50, IN.dim, 256))
    y = np.asarray(linear(jnp.asarray(x)))
    for place in OUT.slices():
        assert 0.9 < np.mean(y[:, place] ** 2) < 1.1  # one, up to the draw of the weights


def test_an_irrep_without_a_source_is_refused():
    with pytest.raises(ValueError, match="Irrep 3o of '.*' is not among '.*'"):
        EquivariantLinear(IN, e3nn.Irreps("3o"), 2, 2, rngs=nnx.Rngs(0))


def test_parameters_are_float32_and_results_have_the_dtype_of_the_argument():
    linear = layer()
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(nnx.state(linear)))
    for dtype in (jnp.float32, jnp.float64):
        assert linear(jnp.zeros((1, IN.dim, 3), dtype)).dtype == dtype


def species_batch():
    rng = np.random.default_rng(0)
    structure = Structure(rng.choice([1, 6, 8], 20), rng.normal(size=(20, 3)), np.zeros((3, 3)))
    frame = make_frame(structure, 1.0, (8, 1, 6))
    budget = Budget.of([frame], nodes=23)
    return frame, jax.tree.map(jnp.asarray, batch_frames([frame], budget, np.float64))


def test_species_linear_is_a_map_per_species():
    frame, graph = species_batch()
    irreps_in, irreps_out = e3nn.Irreps("0e+1o"), e3nn.Irreps("0e+1o+2e")
    linear = SpeciesLinear(irreps_in, irreps_out, 4, 3, rngs=nnx.Rngs(0))
    x = np.random.default_rng(1).normal(size=(graph.num_nodes, 4, 4))
    y = np.asarray(linear(jnp.asarray(x), graph))
    assert y.shape == (graph.num_nodes, 9, 4)
    for node, species in enumerate(frame.species):
        scalar, vector = (
            np.asarray(linear.kernels[key][...], np.float64)[species] for key in ("0e", "1o")
        )
        np.testing.assert_allclose(y[node, :1], x[node, :1] @ scalar / np.sqrt(12), atol=1e-12)
        np.testing.assert_allclose(y[node, 1:4], x[node, 1:] @ vector / np.sqrt(12), atol=1e-12)
    np.testing.assert_array_equal(y[:, 4:], 0)
    np.testing.assert_array_equal(y[frame.num_nodes :], 0)


def test_species_linear_leaves_out_what_the_result_does_not_hold():
    _, graph = species_batch()
    linear = SpeciesLinear(e3nn.Irreps("0e+1o"), e3nn.Irreps("0e"), 4, 3, rngs=nnx.Rngs(0))
    assert list(linear.kernels) == ["0e"]
    assert linear(jnp.ones((graph.num_nodes, 4, 4)), graph).shape == (graph.num_nodes, 1, 4)


def test_normal_param_has_the_given_scale():
    values = np.asarray(normal_param(nnx.Rngs(0), (300, 300), 0.1)[...])
    np.testing.assert_allclose([values.mean(), values.std()], [0, 0.1], atol=2e-3)
    assert values.dtype == np.float32


def test_blocks_are_put_where_they_belong():
    small, large = e3nn.Irreps("0e+2e"), e3nn.Irreps("0e+1o+2e")
    assert shared_irreps(e3nn.Irreps("2e+0e+3o"), large) == small
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 3)))
    found = into_irreps(x, small, large)
    np.testing.assert_array_equal(found[:, :1], x[:, :1])
    np.testing.assert_array_equal(found[:, 1:4], 0)
    np.testing.assert_array_equal(found[:, 4:], x[:, 1:])
    np.testing.assert_array_equal(into_irreps(found, large, small), x)


def test_gate_by_hand():
    rng = np.random.default_rng(0)
    x, gates = rng.normal(size=(2, 9, 3)), rng.normal(size=(2, 2, 3))
    found = gated(jnp.asarray(x), jnp.asarray(gates), e3nn.Irreps("0e+1o+2e"))
    sigmoid = 1 / (1 + np.exp(-gates)) * 1.8462285453386054
    silu = 1.676532470331 * x[:, :1] / (1 + np.exp(-x[:, :1]))
    np.testing.assert_allclose(found[:, :1], silu, rtol=1e-12)
    np.testing.assert_allclose(found[:, 1:4], x[:, 1:4] * sigmoid[:, :1], rtol=1e-12)
    np.testing.assert_allclose(found[:, 4:], x[:, 4:] * sigmoid[:, 1:], rtol=1e-12)


def test_normalized_mlp_by_hand():
    mlp, x = (
        NormalizedMLP((3, 5, 2), rngs=nnx.Rngs(0)),
        np.random.default_rng(1).normal(size=(4, 3)),
    )
    for group, value in ((mlp.biases, 0.3), (mlp.norm_scales, 1.7), (mlp.norm_biases, -0.2)):
        for param in group:
            param[...] = param[...] * 0 + value
    first, last = (np.asarray(kernel[...], np.float64) for kernel in mlp.kernels)
    bias, scale, shift = (np.float32(v).astype(float) for v in (0.3, 1.7, -0.2))
    h = x @ first + bias
    h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5) * scale + shift
    expected = h / (1 + np.exp(-h)) @ last + bias
    np.testing.assert_allclose(mlp(jnp.asarray(x)), expected, rtol=1e-10)
