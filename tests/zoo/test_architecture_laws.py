"""What every architecture must satisfy, held to the symmetry and smoothness that it declares."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation
from small_models import (
    APERIODIC,
    CASES,
    CUTOFF,
    ELEMENTS,
    FLAT,
    PERIODIC,
    ROWS,
    SLAB,
    STRUCTURES,
    TRACES,
    WIDE_ROWS,
    SmallModel,
    assert_close,
    crystal,
    derivative,
    molecule,
    node_energies,
    parameter_direction,
    predict,
    small_config,
    small_model,
    training_loss,
    turned,
)

from equizoo.config import from_dict, to_dict
from equizoo.graph import batch_frames
from equizoo.structure import Structure
from equizoo.train.config import Optimizer
from equizoo.train.optimizer import make_optimizer
from equizoo.train.parameter_paths import path_name
from equizoo.zoo._base import ArchitectureConfig, Symmetry

pytestmark = pytest.mark.parametrize("name", CASES)
EVERY_STRUCTURE = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 3e-4)], ids=["float64", "float32"]
)  # rounding, times the hundreds of operations that an energy passes through
SAME = 1e-12  # float64, the same sums in another order
DIFFERENCE = 1e-6  # of finite differences, which are exact to 1e-8 or so
STEP = 1e-4  # [Å] of differences; envelopes are steep near the cutoff
SEEDS = st.integers(0, 2**32 - 1)
NO_MATRICES = {  # by species, by head, by path or degree and channel
    "embedding", "senders", "receivers", "dot", "product_weights", "weights",
}  # fmt: skip


def evaluate(name, structure, dtype, **options):
    """A prediction; single precision is evaluated as users do, with x64 switched off."""
    if dtype == np.float64:
        return small_model(name).one(structure, dtype=dtype, **options)
    with jax.enable_x64(False):
        found = small_model(name).one(structure, dtype=dtype, **options)
    assert all(part.dtype == np.float32 for part in found)
    return found


# ---- symmetry --------------------------------------------------------------------------------


@PRECISIONS
@EVERY_STRUCTURE
@settings(max_examples=5)
@given(seed=SEEDS)
def test_turned_with_the_declared_group(name, structure, dtype, tolerance, seed):
    energy, forces, stress = evaluate(name, structure, dtype)
    tolerance = max(tolerance, small_config(name).defect)
    rotation = Rotation.random(random_state=seed).as_matrix()
    o3 = small_config(name).symmetry is Symmetry.O3
    for matrix in (rotation, -rotation) if o3 else (rotation,):
        found = evaluate(name, turned(structure, matrix), dtype)
        expected = energy, forces @ matrix.T, matrix @ stress @ matrix.T
        assert_close(found, expected, tolerance)


def test_a_declared_defect_is_one(name):
    defect, model = small_config(name).defect, small_model(name)
    rotation = Rotation.random(random_state=0).as_matrix()
    forces = model.one(molecule())[1]
    found = model.one(turned(molecule(), rotation))[1]
    relative = np.abs(found - forces @ rotation.T).max() / np.abs(forces).max()
    assert (relative > 1e-10) == (defect > 0)


def test_reflections_matter_where_they_are_not_declared(name):
    here, there = (
        small_model(name).energy(turned(molecule(), sign * np.eye(3))) for sign in (1, -1)
    )
    relative = abs(here - there) / abs(here)
    assert (relative < 1e-10) == (small_config(name).symmetry is Symmetry.O3)


@PRECISIONS
@EVERY_STRUCTURE
def test_translated(name, structure, dtype, tolerance):
    shift = np.array([0.3, -1.7, 2.9])
    moved = dataclasses.replace(structure, positions=structure.positions + shift)
    assert_close(evaluate(name, moved, dtype), evaluate(name, structure, dtype), tolerance)


@EVERY_STRUCTURE
def test_atoms_wrapped_through_the_cell(name, structure):
    jumps = np.random.default_rng(0).integers(-2, 3, (structure.num_nodes, 3))
    wrapped = dataclasses.replace(
        structure, positions=structure.positions + (jumps * structure.pbc) @ structure.cell
    )
    model = small_model(name)
    assert_close(model.one(wrapped), model.one(structure), SAME * 10)


@PRECISIONS
@EVERY_STRUCTURE
def test_atoms_in_another_order(name, structure, dtype, tolerance):
    order = np.random.default_rng(1).permutation(structure.num_nodes)
    shuffled = dataclasses.replace(
        structure,
        atomic_numbers=structure.atomic_numbers[order],
        positions=structure.positions[order],
    )
    energy, forces, stress = evaluate(name, structure, dtype)
    assert_close(evaluate(name, shuffled, dtype), (energy, forces[order], stress), tolerance)


@EVERY_STRUCTURE
def test_elements_matter(name, structure):
    other = np.where(structure.atomic_numbers == 1, 8, 1)
    changed = dataclasses.replace(structure, atomic_numbers=other)
    model = small_model(name)
    assert abs(model.energy(changed) / model.energy(structure) - 1) > 1e-6


# ---- batches -----------------------------------------------------------------------------------


# Of each budget a program; slow ones tell of a mistake in the rarer of two roundings or paddings.
@pytest.mark.parametrize(
    ("budget", "dtype", "tolerance"),
    [
        pytest.param(FLAT, np.float64, SAME, id="flat"),
        pytest.param(WIDE_ROWS, np.float64, SAME, id="wide rows", marks=pytest.mark.slow),
        pytest.param(FLAT, np.float32, 3e-4, id="flat float32", marks=pytest.mark.slow),
    ],
)
@EVERY_STRUCTURE
def test_padding_and_layout_change_nothing(name, structure, budget, dtype, tolerance):
    expected = evaluate(name, structure, dtype)
    assert_close(evaluate(name, structure, dtype, budget=budget), expected, tolerance)


@pytest.mark.parametrize("budget", [ROWS, FLAT], ids=["rows", "flat"])
def test_a_batch_is_its_structures(name, budget):
    model = small_model(name)
    structures = [molecule(3, 3), STRUCTURES["self_images"], crystal(seed=2)]
    for found, structure in zip(model.predict(structures, budget=budget), structures, strict=False):
        assert_close(found, model.one(structure), SAME)


@pytest.mark.parametrize("budget", [ROWS, FLAT], ids=["rows", "flat"])
def test_an_empty_batch_is_zero(name, budget):
    model = small_model(name)
    prediction = predict(model.graphdef, model.state, model.batch([], budget))
    assert all(np.all(np.asarray(part) == 0) for part in jax.tree.leaves(prediction))


def test_structures_and_equal_configs_share_one_compilation(name):
    small_model(name).one(molecule(0))
    before = TRACES.total()
    small_model(name).one(crystal(seed=1))
    small_model(name).predict([molecule(1, 2), molecule(2, 2)])
    SmallModel(small_config(name), seed=1).one(molecule(3))
    assert TRACES.total() == before


def test_weights_are_float32_parameters_and_nothing_else_is_state(name):
    state = nnx.state(small_config(name).build(rngs=nnx.Rngs(0)))
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(nnx.filter_state(state, nnx.Param)))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state))


def test_float32_stays_float32_with_x64_on(name):
    model = small_model(name)
    graph = model.batch([molecule()], dtype=np.float32)
    program = str(jax.make_jaxpr(functools.partial(predict, model.graphdef))(model.state, graph))
    assert "f64" not in program and "f32" in program


# ---- derivatives -------------------------------------------------------------------------------


@EVERY_STRUCTURE
def test_forces_are_minus_the_gradient(name, structure):
    """Exactly where the architecture declares it."""
    model = small_model(name)
    _, forces, _ = model.one(structure)
    rng = np.random.default_rng(0)
    scale = max(np.abs(forces).max(), 1e-3)
    found, expected = [], []
    for _ in range(4):
        direction = rng.normal(size=forces.shape)

        def along(t, direction=direction):
            moved = structure.positions + t * direction
            return model.energy(dataclasses.replace(structure, positions=moved))

        found.append(np.sum(forces * direction))
        expected.append(-derivative(along, STEP))
    close = np.allclose(found, expected, rtol=1e-7, atol=DIFFERENCE * scale)
    no_net_force = np.abs(forces.sum(axis=0)).max() < SAME * 10
    if small_config(name).conservative:
        assert close, (found, expected)
        assert no_net_force
    elif structure.num_nodes > 1:
        assert not close and not no_net_force


@pytest.mark.parametrize("kind", ["triclinic", "self_images"])
def test_stress_is_the_derivative_by_strain(name, kind):
    model, structure = small_model(name), STRUCTURES[kind]
    if not model.config.conservative:
        prediction = predict(model.graphdef, model.state, model.batch([structure]))
        assert prediction.stress is None
        return
    stress = model.one(structure)[2]
    volume = abs(np.linalg.det(structure.cell))
    found = np.zeros((3, 3))
    for i in range(3):
        for j in range(i + 1):
            strain = np.zeros((3, 3))
            strain[i, j] += 0.5
            strain[j, i] += 0.5

            def along(t, strain=strain):
                return model.energy(turned(structure, np.eye(3) + t * strain))

            found[i, j] = found[j, i] = derivative(along, STEP) / volume
    assert np.abs(stress).max() > 1e-6
    assert_close([stress], [found], DIFFERENCE)


def test_stress_where_the_cell_has_no_volume_is_zero(name):
    for kind in ("molecule", "slab"):
        np.testing.assert_array_equal(small_model(name).one(STRUCTURES[kind])[2], 0)


def test_stress_is_that_of_the_same_crystal_left_handed(name):
    """Volume is the modulus of the determinant: exchanging two lattice vectors changes nothing."""
    structure = STRUCTURES["triclinic"]
    exchanged = dataclasses.replace(structure, cell=structure.cell[[1, 0, 2]])
    model = small_model(name)
    assert_close(model.one(exchanged), model.one(structure), SAME * 10)


@pytest.mark.parametrize(
    "budget", [ROWS, pytest.param(FLAT, marks=pytest.mark.slow)], ids=["rows", "flat"]
)
def test_training_derivative(name, budget):
    """The gradient by weights of a loss on energy, forces and stress: double backward."""
    model = small_model(name)
    graph = jax.tree.map(jnp.asarray, model.batch([molecule(1, 5), crystal(nodes=3)], budget))
    state = jax.tree.map(lambda leaf: leaf.astype(np.float64), model.state)
    target = jnp.asarray(np.random.default_rng(0).normal(size=(budget.nodes, 3)))
    gradient = training_loss(model.graphdef, state, graph, target)[1]
    direction = parameter_direction(state)
    products = jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)
    found = float(sum(jax.tree.leaves(products)))

    def along(t):
        moved = jax.tree.map(lambda w, d: w + t * d, state, direction)
        return float(training_loss(model.graphdef, moved, graph, target)[0])

    assert abs(found) > 1e-3
    np.testing.assert_allclose(found, derivative(along, 1e-4), rtol=DIFFERENCE)


def test_training_derivative_is_finite_without_neighbours(name):
    model = small_model(name)
    state = jax.tree.map(lambda leaf: leaf.astype(np.float64), model.state)
    for structures in ([], [molecule(nodes=1)]):
        graph = jax.tree.map(jnp.asarray, model.batch(structures))
        gradient = training_loss(model.graphdef, state, graph, jnp.ones((ROWS.nodes, 3)))[1]
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


# ---- locality ----------------------------------------------------------------------------------


def crossing(distance):
    """Three atoms, and a fourth at this distance from the first and further from the others."""
    positions = np.array([[0.0, 0, 0], [1.1, 0.2, 0], [0.5, -0.9, 0.3], [-distance, 0, 0]])
    return Structure(np.array([8, 6, 1, 6]), positions, np.zeros((3, 3)))


def test_through_the_cutoff(name):
    """Energy and forces continuous exactly where the architecture declares it."""
    model, energies, forces = small_model(name), [], []
    for distance in (CUTOFF - 1e-6, CUTOFF + 1e-6):
        energy, force, _ = model.one(crossing(distance))
        energies.append(energy)
        forces.append(force)
    interacting = model.energy(crossing(0.8 * CUTOFF)) - model.energy(crossing(2 * CUTOFF))
    assert abs(interacting) > 1e-5
    smooth = bool(
        abs(energies[1] - energies[0]) < 1e-9 * max(1, abs(interacting))
        and np.abs(forces[1] - forces[0]).max() < 1e-8
    )
    assert smooth == small_config(name).smooth


def test_far_fragments_add_up(name):
    model, here, there = small_model(name), molecule(5, 4), molecule(6, 3)
    far = there.positions + np.array([60.0, -20, 10])
    both = Structure(
        np.concatenate([here.atomic_numbers, there.atomic_numbers]),
        np.concatenate([here.positions, far]),
        np.zeros((3, 3)),
    )
    parts = model.one(here), model.one(there)
    energy, forces, _ = model.one(both)
    expected = parts[0][0] + parts[1][0], np.concatenate([parts[0][1], parts[1][1]])
    assert_close((energy, forces), expected, SAME * 10)


@pytest.mark.parametrize("number", ELEMENTS)
@pytest.mark.parametrize("pbc", [APERIODIC, PERIODIC], ids=["free", "in a large box"])
def test_a_lone_atom_has_its_reference_energy(name, number, pbc):
    """No interaction, so nothing beyond the reference; unless the config says otherwise."""
    lone = Structure(np.array([number]), np.ones((1, 3)), 9 * np.eye(3), pbc)
    energy, forces, stress = small_model(name).one(lone)
    if getattr(small_config(name), "zero_isolated", True):
        np.testing.assert_allclose(energy, 0, atol=SAME)
    np.testing.assert_array_equal(forces, 0)
    np.testing.assert_array_equal(stress, 0)


# ---- configuration -------------------------------------------------------------------------------


def test_config_and_weights_rebuild_the_model(name):
    config = small_config(name)
    written = to_dict(config)
    again = from_dict(ArchitectureConfig, written)
    assert again == config and written["architecture"] == name.split()[0]
    rebuilt = SmallModel(again, seed=1)
    before = rebuilt.one(molecule())
    rebuilt.state = jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf)), small_model(name).state)
    expected = small_model(name).one(molecule())
    assert abs(before[0] - expected[0]) > 1e-8
    assert_close(rebuilt.one(molecule()), expected, 0.0)


def test_other_elements_change_nothing_for_those_kept(name):
    """Fewer, and a new one that starts as a copy."""
    small = small_model(name)
    state = jax.tree.map(lambda leaf: leaf.astype(np.float64), small.state)  # factors round nothing
    model = nnx.merge(small.graphdef, state)
    if model.species_tables is None:
        with pytest.raises(ValueError, match="can have no others"):
            model.with_elements(ELEMENTS[:2])
        return

    def slab(*numbers):
        structure = crystal(SLAB)
        chosen = np.where(structure.atomic_numbers == 6, *numbers)
        return dataclasses.replace(structure, atomic_numbers=chosen)

    for numbers, like, changed, same in (
        ((1, 8), {}, slab(1, 8), slab(1, 8)),
        ((*ELEMENTS, 14), {14: 6}, slab(1, 8), slab(1, 8)),
        ((8, 14), {14: 6}, slab(14, 8), slab(6, 8)),
    ):
        other = model.with_elements(numbers, like)
        assert other.config.atomic_numbers == numbers
        found, expected = (
            np.asarray(
                node_energies(*nnx.split(m), batch_frames([m.config.frame(s)], ROWS, np.float64))
            )
            for m, s in ((other, changed), (model, same))
        )
        np.testing.assert_allclose(found[:5], expected[:5], rtol=SAME, atol=SAME)
    with pytest.raises(ValueError, match=r"asks for \[14\], which the model does not have"):
        model.with_elements((1, 14))
    with pytest.raises(ValueError, match="at least one element"):
        model.with_elements(())


def test_muon_knows_the_matrices_of_linear_layers(name):
    """Their singular values are near the root of their outputs, and of those over inputs where
    kernels have that divisor in them, as drawn; other arrays move as by Adam."""
    model = small_model(name)
    params, unit = model.state, model.model.unit_kernels
    drawn = {path_name(k): v for k, v in jax.tree_util.tree_leaves_with_path(params)}
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)

    def updates(kind):
        config = Optimizer(kind=kind, weight_decay=0.0, warmup_steps=0, learning_rate=1.0)
        optimizer = make_optimizer(config, params, 10, unit_kernels=unit)
        found = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)[0]
        return {path_name(k): v for k, v in jax.tree_util.tree_leaves_with_path(found)}

    adam, matrices = updates("adamw"), 0
    for path, update in updates("muon").items():
        if np.allclose(update, adam[path], rtol=1e-6):
            last = path.rpartition(".")[2]
            assert update.ndim < 2 or last in NO_MATRICES, f"{path} looks like a matrix"
        else:
            matrices += 1
            inputs, outputs = update.shape[-2:]
            divisor = 1.0 if unit else inputs**0.5
            values = np.linalg.svd(update, compute_uv=False) * divisor / outputs**0.5
            assert values.mean() > 0.5 and values.max() < 1.5, path
            rms = np.sqrt(np.mean(drawn[path] ** 2))
            assert update.size < 32 or 0.35 < rms * divisor < 1.6, path
    assert matrices > 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"atomic_numbers": ()}, "different elements"),
        ({"atomic_numbers": (1, 6, 1)}, "different elements"),
        ({"cutoff": 0.0}, "must be positive"),
        ({"avg_num_neighbors": -1.0}, "must be positive"),
    ],
    ids=str,
)
def test_impossible_configs(name, fields, message):
    with pytest.raises(ValueError, match=message):
        small_config(name, **fields)
