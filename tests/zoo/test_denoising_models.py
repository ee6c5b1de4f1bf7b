"""Forces as an input and noise as an output: equivariant, and nothing changes where not used."""

import dataclasses

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import ROWS, SmallModel, molecule, predict, small_config, turned

from equizoo.graph import Noise, batch_frames, unbatch_nodes
from equizoo.layers.force_encoding import ForceInput
from equizoo.zoo._base import Symmetry, energy_forces_stress
from equizoo.zoo.equiformer import SIZES as SIZES_V1
from equizoo.zoo.equiformer import EquiformerConfig
from equizoo.zoo.equiformer_v2 import SIZES as SIZES_V2
from equizoo.zoo.equiformer_v2 import EquiformerV2Config

INPUT = ForceInput(scale=0.7)
BOTH = {
    "irreps": "4x0e+2x0o+3x1e+3x1o",
    "head_irreps": "2x0e+1x0o+2x1e+2x1o",
    "ffn_irreps": "5x0e+2x0o+3x1e+3x1o",
}
MODELS = {
    "equiformer": {},
    "equiformer of both parities": BOTH,
    "equiformer_v2": {"grid_points": 14},
    "equiformer_v2 as published": {"grid_points": 14},
}
EXACT, GRID = 1e-9, 1e-5  # relative, float64; of the grid's points


def small(name):
    return SmallModel(small_config(name, force_input=INPUT, **MODELS[name]))


def corrupted_molecule():
    structure = molecule()
    forces = np.random.default_rng(5).normal(size=(6, 3))
    mask = np.array([True, False, True, True, False, False])
    return dataclasses.replace(structure, forces=forces), mask


def outputs(model, structure, mask):
    """Energy, forces and noise of a structure whose forces are given on the atoms of ``mask``."""
    frame = model.config.frame(structure)
    frame = frame._replace(noise=Noise(np.zeros((len(mask), 3)), mask))
    prediction = predict(model.graphdef, model.state, batch_frames([frame], ROWS, np.float64))
    forces, noise = (
        unbatch_nodes(np.asarray(x), [frame])[0] for x in (prediction.forces, prediction.noise)
    )
    return float(prediction.energy[0]), forces, noise


def rotation():
    return np.asarray(e3nn.rand_matrix(jax.random.key(3), dtype=jnp.float64))


def with_forces_turned(structure, matrix):
    return dataclasses.replace(turned(structure, matrix), forces=structure.forces @ matrix.T)


@pytest.mark.parametrize("name", MODELS)
def test_noise_turns_with_the_structure_and_its_forces(name):
    model, (structure, mask) = small(name), corrupted_molecule()
    tolerance = GRID if "v2" in name else EXACT
    energy, forces, noise = outputs(model, structure, mask)
    matrices = [rotation()]
    if model.config.symmetry is Symmetry.O3:
        matrices.append(-rotation())
    for matrix in matrices:
        found = outputs(model, with_forces_turned(structure, matrix), mask)
        assert found[0] == pytest.approx(energy, abs=tolerance * max(abs(energy), 1))
        for a, b in ((found[1], forces), (found[2], noise)):
            np.testing.assert_allclose(a, b @ matrix.T, atol=tolerance * np.abs(b).max())
    assert np.abs(noise).max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_everything_depends_on_the_forces_that_are_given_and_on_no_others(name):
    model, (structure, mask) = small(name), corrupted_molecule()
    before = outputs(model, structure, mask)
    for atom, matters in ((0, True), (1, False)):
        forces = structure.forces.copy()
        forces[atom] += 1.0
        after = outputs(model, dataclasses.replace(structure, forces=forces), mask)
        for a, b in zip(after, before, strict=True):
            assert (not np.allclose(a, b, rtol=1e-6, atol=1e-9)) == matters


@pytest.mark.parametrize("name", MODELS)
def test_no_forces_given_is_forces_of_zero(name):
    """The program that is used after training, and batches whose coin fell on tails."""
    model, (structure, _) = small(name), corrupted_molecule()
    energy, forces, _ = outputs(model, structure, np.zeros(6, bool))
    plain = model.one(structure)
    assert float(plain[0]) == pytest.approx(energy, rel=1e-12)
    np.testing.assert_allclose(plain[1], forces, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_the_bias_of_the_encoding_is_always_on(name):
    model, structure = small(name), molecule()
    before = model.one(structure)[1]
    state = jax.tree.map(lambda x: x, model.state)
    bias = state["force_embedding"]["bias"]
    bias[...] = bias[...] + jnp.linspace(-1, 1, bias.shape[0], dtype=bias.dtype)
    changed = predict(model.graphdef, state, model.batch([structure]))
    assert not np.allclose(np.asarray(changed.forces)[:6], before, rtol=1e-3)


def test_degree_one_of_the_encoding_is_the_force():
    structure, mask = corrupted_molecule()
    model = small("equiformer_v2")
    frame = model.config.frame(structure)._replace(noise=Noise(np.zeros((6, 3)), mask))
    graph = jax.tree.map(jnp.asarray, batch_frames([frame], ROWS, np.float64))
    encoded = np.asarray(INPUT.encoded(e3nn.Irreps("0e+1o+2e"), graph, jnp.dtype("float64")))
    given = structure.forces * mask[:, None]
    np.testing.assert_allclose(encoded[:6, 1:4], given / 0.7, atol=1e-12)
    lengths = np.linalg.norm(given, axis=1) / (0.7 * 3**0.5)
    np.testing.assert_allclose(encoded[:6, 0], lengths, atol=1e-12)
    squares = np.sum(encoded[:6, 4:] ** 2, axis=1)  # 2 l + 1 times those of degree 0
    np.testing.assert_allclose(squares, 5 * lengths**2, atol=1e-12)
    assert not encoded[6:].any()


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (EquiformerConfig, {"md17_l2": 4.00, "md17_l3": 6.35}),
        (EquiformerV2Config, {"oc20_83m": 89, "oc20_153m": 160, "oc22_121m": 127}),
    ],
    ids=["equiformer", "equiformer_v2"],
)
def test_published_sizes_with_denoising(config, millions):
    """Tables 2, 4 and 6 of the paper; of the first the third digit counts."""
    sizes = SIZES_V1 if config is EquiformerConfig else SIZES_V2
    elements = 64 if config is EquiformerConfig else 90
    for size, expected in millions.items():
        built = config(
            atomic_numbers=tuple(range(1, elements + 1)),
            cutoff=5.0,
            avg_num_neighbors=15.0,
            force_input=ForceInput(),
            **sizes[size],
        )
        state = nnx.state(nnx.eval_shape(lambda built=built: built.build(rngs=nnx.Rngs(0))))
        count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state)) / 1e6
        assert abs(count - expected) < (0.006 if expected < 10 else 1), (size, count)


def test_models_that_cannot_say_so():
    structure, mask = corrupted_molecule()
    for name in ("mace", "equiformer", "equiformer_v2"):
        model = SmallModel(small_config(name))
        assert not model.config.denoises
        frame = model.config.frame(structure)._replace(noise=Noise(np.zeros((6, 3)), mask))
        graph = jax.tree.map(jnp.asarray, batch_frames([frame], ROWS, np.float64))
        with pytest.raises(ValueError, match="no head for noise; set its config's force_input"):
            energy_forces_stress(model.model, graph)
    with pytest.raises(ValueError, match="is of irrep 1e, which '4x0e' lacks"):
        small_config(
            "equiformer", irreps="4x0e", head_irreps="2x0e", ffn_irreps="4x0e", force_input=INPUT
        )
    with pytest.raises(ValueError, match="expected a positive force"):
        ForceInput(scale=0.0)
