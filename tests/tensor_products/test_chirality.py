"""Handedness: a 0o output needs odd couplings and an even one, and is learned where it can be."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from equizoo.eval.benchmark_timing import numerics
from equizoo.tensor_products.clebsch_gordan import ClebschGordan
from equizoo.tensor_products.gaunt_bracket import GauntBracket
from equizoo.tensor_products.gaunt_grid import GauntGrid
from equizoo.tensor_products.matrix_product import MatrixProduct
from equizoo.tensor_products.poisson_bracket import PoissonBracket

ROUNDING = 1e-12  # float64, outputs of order one


def load_benchmark():
    path = Path(__file__).parents[2] / "benchmarks/chirality.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


benchmark = load_benchmark()


def answers(edge_product, node_product):
    """What a network of random weights says of one hand of each handed example, and its mirror."""
    network = benchmark.Network(edge_product, node_product, channels=2, rngs=nnx.Rngs(0))
    graph = benchmark.batch_of(
        [
            benchmark.tetris_examples(np.random.default_rng(0))[0],
            *(benchmark.Example(atoms, 0, 1) for atoms in benchmark.MOLECULES.values()),
        ]
    ).graph
    call = jax.jit(network)
    own, mirrored = (call(graph._replace(positions=s * graph.positions)) for s in (1.0, -1.0))
    handed = slice(0, 3)
    return own.shape, mirrored.shape, own.hand[handed], mirrored.hand[handed]


@pytest.mark.parametrize(
    "product", [ClebschGordan(), MatrixProduct(), GauntBracket(), PoissonBracket()], ids=repr
)
def test_odd_couplings_at_edges_make_a_hand(product):
    own_shape, mirrored_shape, own, mirrored = answers(product, GauntGrid())
    assert np.abs(own).min() > 1e6 * ROUNDING
    np.testing.assert_allclose(mirrored, -own, atol=ROUNDING)
    np.testing.assert_allclose(mirrored_shape, own_shape, atol=ROUNDING)


@pytest.mark.parametrize("product", [GauntGrid(), PoissonBracket()], ids=repr)
def test_even_or_odd_couplings_alone_make_none(product):
    np.testing.assert_allclose(answers(product, product)[2], 0, atol=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("product", "expected"), [(GauntBracket(), 1.0), (GauntGrid(), 0.5)], ids=repr
)
def test_training_tells_the_hands_apart(product, expected):
    with numerics(benchmark.DTYPE):  # optax adds integers to floats
        score = benchmark.scores(product, product, tasks=("tetris",), seeds=(0,), steps=100)
    assert score.hand_accuracy == expected
    assert score.parity_defect < ROUNDING
    assert (score.mirror_difference < ROUNDING) == (expected < 1)


def test_the_first_two_shapes_are_mirror_images():
    """Both are chains of four blocks, in the order 1, 0, 2, 3."""
    steps = [
        np.diff(np.array(blocks, float)[[1, 0, 2, 3]], axis=0)
        for blocks in list(benchmark.TETRIS.values())[:2]
    ]
    grams = [s @ s.T for s in steps]
    np.testing.assert_array_equal(grams[0], grams[1])
    assert np.linalg.det(steps[0]) == -np.linalg.det(steps[1]) != 0
