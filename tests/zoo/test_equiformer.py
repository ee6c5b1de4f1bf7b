"""Equiformer against a restatement in the original's layout, and against published sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equiformer_oracle import Oracle, original_state
from flax import nnx
from small_models import (
    ELEMENTS,
    STRUCTURES,
    SmallModel,
    Together,
    assert_close,
    molecule,
    small_config,
    together,
    turned,
)

from equizoo.layers.distance_basis import RadialBasis
from equizoo.tensor_products.gaunt_grid import GauntGrid
from equizoo.tensor_products.so2 import SO2
from equizoo.zoo._base import Symmetry, energy_forces_stress
from equizoo.zoo.equiformer import SIZES, EquiformerConfig, Evaluation, Message

BOTH_PARITIES = {
    "irreps": "4x0e+2x0o+3x1o+2x1e+2x2e",
    "head_irreps": "2x0e+1x0o+2x1o+1x1e+1x2e",
    "ffn_irreps": "5x0e+3x0o+2x1o+3x1e+2x2e",
}
VARIANTS = {
    "default": {},
    "published": {"envelope_p": None, "zero_isolated": False, "shift": 0.3, "scale": 0.7},
    "as_given": {"evaluation": Evaluation.AS_GIVEN},
    "linear": {"message": Message.LINEAR, "radial_basis": RadialBasis.BESSEL},
    "both_parities": BOTH_PARITIES
    | {"radial_basis": RadialBasis.GAUSSIAN, "envelope_p": None, "zero_isolated": False},
    "degree_3": {
        "irreps": "4x0e+2x1e+2x2e+1x3e",
        "head_irreps": "2x0e+1x1e+1x2e+1x3e",
        "ffn_irreps": "3x0e+2x1e+1x2e+2x3e",
    },
}
ORACLE = 1e-9  # relative, float64, other order of the same sums


@functools.cache
def variant(name):
    """A model whose biases and scales, drawn as zeros and ones, are random too."""
    model = SmallModel(small_config("equiformer", radial_widths=(6, 5), **VARIANTS[name]))
    rng = np.random.default_rng(0)
    model.state = jax.tree.map(
        lambda leaf: leaf + 0.3 * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), model.state
    )
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_against_the_original_layout(name):
    model, structures = variant(name), [STRUCTURES["molecule"], STRUCTURES["triclinic"]]
    config = model.config
    oracle = Oracle(config, original_state(config, model.model))

    def energy(positions, given):
        species = np.array([ELEMENTS.index(z) for z in given.numbers])
        return oracle.energy(positions, given.shifts, species, given.senders, given.receivers)

    with jax.numpy_rank_promotion("allow"):  # the oracle broadcasts as numpy does
        given = Together.of(structures)
        evaluated = jax.jit(jax.value_and_grad(functools.partial(energy, given=given)))
        expected, gradient = evaluated(jnp.asarray(given.positions))
        if config.zero_isolated:
            lone = jax.jit(functools.partial(energy, given=given.alone))
            expected = expected - lone(jnp.asarray(given.alone.positions))
    assert abs(expected) > 1e-3
    assert_close(together(model, structures), (expected, -gradient), ORACLE)


def count(size):
    """With a row of the embedding for each of 64 elements, as published."""
    numbers = tuple(range(1, 65))
    config = EquiformerConfig(
        atomic_numbers=numbers, cutoff=5.0, avg_num_neighbors=15.58, **SIZES[size]
    )
    state = nnx.state(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(("size", "parameters"), [("md17_l2", 3_496_001), ("md17_l3", 5_500_865)])
def test_published_sizes(size, parameters):
    """3.50 M and 5.50 M in table 2 of the paper."""
    assert count(size) == parameters


def test_symmetry_follows_the_parities():
    assert small_config("equiformer").symmetry is Symmetry.SO3
    model = variant("both_parities")
    assert model.config.symmetry is Symmetry.O3
    energy, forces, _ = model.one(molecule())
    mirrored = model.one(turned(molecule(), -np.eye(3)))
    assert_close(mirrored[:2], (energy, -forces), 1e-10)


@pytest.mark.parametrize("product", [SO2(), GauntGrid()], ids=["so2", "gaunt_grid"])
def test_other_products(product):
    """On natural parities: SO2 is the same map, Gaunt another that is invariant as well."""
    fields = {"irreps": "4x0e+3x1o+2x2e", "head_irreps": "2x0e+2x1o+1x2e"}
    fields |= {"ffn_irreps": "4x0e+2x1o+1x2e"}
    reference = SmallModel(small_config("equiformer", num_layers=1, **fields))
    model = SmallModel(small_config("equiformer", num_layers=1, tensor_product=product, **fields))
    energy, forces, _ = model.one(molecule())
    if isinstance(product, SO2):
        assert_close((energy, forces), reference.one(molecule())[:2], 1e-10)
    else:
        mirrored = model.one(turned(molecule(), -np.eye(3)))
        assert_close(mirrored[:2], (energy, -forces), 1e-10)


def test_what_is_dropped_while_training():
    """A key makes the result random with the same weights; without one it is a function."""
    model = SmallModel(small_config("equiformer", alpha_dropout=0.3, drop_path=0.3))
    graph = jax.tree.map(jnp.asarray, model.batch([molecule(1), molecule(2, 4)]))

    @jax.jit
    def energies(key):
        instance = nnx.merge(model.graphdef, model.state)
        instance.key = key
        return energy_forces_stress(instance, graph).energy

    plain = energies(None)
    np.testing.assert_array_equal(plain, energies(None))
    first, again, second = (np.asarray(energies(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (np.abs(first - plain)[:2] > 1e-9).all() and (np.abs(first - second)[:2] > 1e-9).all()
    assert first[-1] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"irreps": "4x1e"}, "0e among them"),
        ({"irreps": "4x0e+2x1e+1x1e"}, "each irrep once"),
        ({"irreps": "four"}, "is not like"),
        ({"ffn_irreps": "4x0e+2x3e"}, "expected the irreps of"),
        ({"drop_path": 1.0}, "expected a rate"),
        ({"num_layers": 0}, "at least 1"),
        ({"shift": 1.0}, "zero_isolated"),
    ],
    ids=str,
)
def test_impossible_options(fields, message):
    with pytest.raises(ValueError, match=message):
        small_config("equiformer", **fields)
