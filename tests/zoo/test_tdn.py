"""TDN against a restatement under the original's names; its sizes, its dial, its checkpoints."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.spatial.transform import Rotation
from small_models import (
    CUTOFF,
    FLAT,
    STRUCTURES,
    SmallModel,
    Together,
    assert_close,
    molecule,
    node_energies,
    small_config,
    together,
    turned,
)
from tdn_oracle import Oracle, couplings, random_factors, random_state

from equizoo.graph import edge_vectors
from equizoo.layers.radial import polynomial_envelope
from equizoo.tensor_products.clebsch_gordan import ClebschGordan
from equizoo.tensor_products.cp_decomposed import CPDecomposed, Schedule
from equizoo.tensor_products.gaunt_grid import GauntGrid
from equizoo.tensor_products.low_rank_weights import LowRankWeights
from equizoo.tensor_products.matrix_product import MatrixProduct
from equizoo.tensor_products.shared_weights import Form, SharedWeights
from equizoo.tensor_products.so2 import SO2
from equizoo.zoo._base import Forces, Symmetry
from equizoo.zoo._convert.tdn import Run, convert, read_dump
from equizoo.zoo._convert.tdn_dump import contents, write
from equizoo.zoo.tdn import (
    SIZES,
    Isolated,
    Linear,
    Output,
    Parity,
    TDNConfig,
    published_product,
)

ORACLE = 1e-9  # relative, float64, other order of the same sums
EXACT = 1e-12  # float64
AVG_NUM_NODES, AVG_DEGREE = 2.5, 6.0
RUN = Run(
    cutoff=CUTOFF,
    avg_num_nodes=AVG_NUM_NODES,
    avg_num_neighbors=AVG_DEGREE,
    output=Output.TOTAL,
    reference_energies={1: 0.0, 6: -1.0, 8: -2.0},
)


def state_of(l_max, **options):
    return random_state(
        l_max, channels=4, num_layers=2, num_heads=2, num_basis=5, rows=9, **options
    )


def model_of(converted, **fields):
    """The converted arrays in place of the drawn ones, under another config of the same shapes."""
    model = SmallModel(dataclasses.replace(converted.config, **fields))
    flat = nnx.to_flat_state(model.state)
    names = {".".join(map(str, path)): param for path, param in flat}
    arrays = {name: x for name, x in converted.arrays.items() if name in names}
    assert set(names) == set(arrays)
    for name, param in names.items():
        assert param.shape == arrays[name].shape, name
    values = [(p, v.replace(jnp.asarray(arrays[".".join(map(str, p))]))) for p, v in flat]
    model.state = nnx.from_flat_state(values)
    return model


@functools.cache
def converted(l_max, folder):
    checkpoint = {"model_state_dict": state_of(l_max) | factors_in(state_of(l_max), l_max)}
    return convert(dumped(checkpoint, folder / str(l_max)), RUN)


def factors_in(state, l_max, **changed):
    """The factors beside every product, as the original keeps them."""
    products = [name.removesuffix(".alpha_dot") for name in state if name.endswith("alpha_dot")]
    places = [f"{name}.tp{k}" for name in products for k in (1, 2)] + ["edge_embed.tp"]
    given = random_factors(l_max, 7 * l_max**2) | changed
    return {f"{at}.cp_tp.{name}": value for at in places for name, value in given.items()}


def dumped(checkpoint, folder, cache=None, **options):
    write(*contents(checkpoint, cache, **options), str(folder))
    return read_dump(folder)


def oracle_results(state, tensor, structures, envelope=None, isolated=False):
    """The sum of energies, minus its gradient, and forces of the head."""
    state = {name: jnp.asarray(x, jnp.float64) for name, x in state.items()}
    oracle = Oracle(state, tensor, CUTOFF, AVG_NUM_NODES, AVG_DEGREE, envelope)
    given = Together.of(structures)

    def outputs(positions, given):
        vectors = positions[given.senders] - positions[given.receivers] - given.shifts
        energies, forces = oracle(vectors, given.numbers, given.senders, given.receivers)
        return energies.sum(), forces

    with jax.numpy_rank_promotion("allow"):  # the oracle broadcasts as numpy does
        positions = jnp.asarray(given.positions)
        evaluated = jax.value_and_grad(functools.partial(outputs, given=given), has_aux=True)
        (energy, direct), gradient = jax.jit(evaluated)(positions)
        if isolated:
            lone = jax.jit(functools.partial(outputs, given=given.alone))
            energy -= lone(jnp.asarray(given.alone.positions))[0]
    return energy, -gradient, direct


TWO = [STRUCTURES["molecule"], STRUCTURES["triclinic"]]


@pytest.mark.parametrize("l_max", [1, 2])
def test_a_converted_checkpoint_against_the_original(l_max, tmp_path):
    """Factors of any tensor, evaluated as a matrix here and term by term there."""
    factors = random_factors(l_max, 7 * l_max**2)
    tensor = np.einsum("ir,jr,kr->ijk", *(np.float64(factors[f"cp_{x}"]) for x in "abc"))
    energy, _, forces = oracle_results(state_of(l_max), tensor, TWO)
    found = together(model_of(converted(l_max, tmp_path)), TWO)
    assert abs(energy) > 1e-2 and np.abs(forces).max() > 1e-2
    assert_close(found, (energy, forces), ORACLE)
    assert converted(l_max, tmp_path).config.defect > 0.1


@pytest.mark.parametrize(
    ("form", "l_max"), [("matrix", 1), ("matrix", 2), ("matrix", 3), ("neighbors", 2)], ids=str
)
def test_the_exact_model_against_the_formulas(form, l_max, tmp_path):
    envelope = functools.partial(polynomial_envelope, cutoff=CUTOFF, p=5)
    expected = oracle_results(
        state_of(l_max), couplings(l_max, unit_variance=True), TWO, envelope, isolated=True
    )
    model = model_of(
        converted(l_max, tmp_path),
        tensor_product=SharedWeights(form=Form(form)),
        forces=Forces.GRADIENT,
        envelope_p=5,
        isolated=Isolated.SUBTRACTED,
    )
    assert np.abs(expected[1]).max() > 1e-2
    assert_close(together(model, TWO), expected[:2], ORACLE)
    if l_max == 1:
        assert_close(together(model, TWO, budget=FLAT), expected[:2], ORACLE)


@pytest.mark.parametrize(("form", "l_max"), [(Form.MATRIX, 1), (Form.PRODUCT, 2)], ids=str)
def test_an_exact_decomposition_is_the_bare_couplings(l_max, form, tmp_path):
    """Ranks 8 and 30, with the paper's normalisation."""
    expected = oracle_results(state_of(l_max), couplings(l_max), [molecule()])
    product = dataclasses.replace(published_product(Schedule.EXACT), form=form)
    model = model_of(converted(l_max, tmp_path), tensor_product=product)
    assert model.config.defect == 0
    assert_close(model.one(molecule())[:2], (expected[0], expected[2]), ORACLE)


# ---- symmetry ----------------------------------------------------------------------------------


def deviation(model, structure, seed=0):
    """Of energy and forces under a rotation, relative to the largest."""
    matrix = Rotation.random(random_state=seed).as_matrix()
    energy, forces, _ = model.one(structure)
    again, found, _ = model.one(turned(structure, matrix))
    worst = np.abs(found - forces @ matrix.T).max() / np.abs(forces).max()
    return max(worst, abs(again / energy - 1))


@pytest.mark.parametrize("kind", ["molecule", "triclinic", "slab"])
@pytest.mark.parametrize(
    ("forces", "l_max"), [("gradient", 1), ("gradient", 2), ("gradient", 3), ("direct", 2)], ids=str
)
def test_the_exact_form_turns_with_the_structure(forces, l_max, kind):
    model = SmallModel(small_config("tdn", l_max=l_max, forces=forces))
    matrix = Rotation.random(random_state=0).as_matrix()
    energy, force, _ = model.one(STRUCTURES[kind])
    again, found, _ = model.one(turned(STRUCTURES[kind], matrix))
    scale = max(np.abs(force).max(), 1e-2)
    np.testing.assert_allclose(found, force @ matrix.T, atol=EXACT * scale, rtol=0)
    np.testing.assert_allclose(again, energy, atol=EXACT * max(abs(energy), 1e-2), rtol=0)


def test_the_defect_bounds_the_deviation_and_falls_with_the_rank():
    found = {}
    for terms in (4, Schedule.SEVEN_L2, Schedule.EXACT):
        config = small_config("tdn", l_max=1, tensor_product=published_product(terms))
        model = SmallModel(config)
        worst = max(deviation(model, molecule(), seed) for seed in range(5))
        assert worst < max(model.config.defect, 1e-10)
        found[terms] = worst
    worst = list(found.values())
    assert worst == sorted(worst, reverse=True) and worst[1] > 1e-4 > 1e-10 > worst[2]


def test_bfloat16_matrices_are_near():
    reference = SmallModel(small_config("tdn"))
    model = SmallModel(small_config("tdn", tensor_product=SharedWeights(form=Form.BFLOAT16)))
    defect = model.config.defect
    assert 1e-3 < defect < 0.1
    for dtype in (np.float64, np.float32):
        found, expected = (m.one(molecule(), dtype=dtype)[:2] for m in (model, reference))
        assert_close(found, expected, defect)
        assert np.abs(found[1] - expected[1]).max() > 1e-5 * np.abs(expected[1]).max()


@pytest.mark.parametrize(
    ("parity", "forces"), [(Parity.NATURAL, Forces.GRADIENT), (Parity.BOTH, Forces.DIRECT)], ids=str
)
def test_with_parities_mirror_images_have_equal_energies(parity, forces):
    model = SmallModel(small_config("tdn", parity=parity, forces=forces))
    assert model.config.symmetry is Symmetry.O3
    energy, found, _ = model.one(molecule())
    mirrored = model.one(turned(molecule(), -np.eye(3)))
    assert_close(mirrored[:2], (energy, -found), 1e-11)


# ---- the dial, and other products ----------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 4, None])
def test_more_weights_for_the_couplings(rank):
    """From TDN's one to one for each coupling, exact all the way."""
    config = small_config("tdn", tensor_product=LowRankWeights(rank))
    model = SmallModel(config)
    assert config.defect == 0 and deviation(model, molecule()) < 1e-10
    assert config.product.num_weights == (rank or 15)
    one = SmallModel(small_config("tdn"))
    same = rank == 1
    assert same == (abs(model.energy(molecule()) / one.energy(molecule()) - 1) < 1e-10)


def test_all_couplings_with_weights_of_their_own():
    model = SmallModel(small_config("tdn", tensor_product=ClebschGordan()))
    assert model.config.product.num_weights == 15
    assert deviation(model, molecule()) < 1e-10


def test_linear_maps_for_each_degree():
    shared, own = (SmallModel(small_config("tdn", linear=linear)) for linear in Linear)
    assert deviation(own, molecule()) < 1e-10
    flat = dict(nnx.to_flat_state(own.state))
    tiled = nnx.from_flat_state(
        [
            (path, param.replace(jnp.tile(param[...], (len(flat[path]), 1, 1))))
            if path[-1] == "kernels"
            else (path, param)
            for path, param in nnx.to_flat_state(shared.state)
        ]
    )
    own.state = tiled
    assert_close(own.one(molecule()), shared.one(molecule()), 1e-12)


@pytest.mark.parametrize(
    "product",
    [GauntGrid(), MatrixProduct(), SO2(), SharedWeights(GauntGrid()), CPDecomposed()],
    ids=["gaunt", "matrix", "so2", "gaunt shared", "weights per degree of the harmonics"],
)
def test_other_products(product):
    model = SmallModel(small_config("tdn", parity=Parity.NATURAL, tensor_product=product))
    energy, forces, _ = model.one(molecule())
    mirrored = model.one(turned(molecule(), -np.eye(3)))
    assert_close(mirrored[:2], (energy, -forces), 1e-10)
    assert deviation(model, molecule()) < 1e-10


# ---- sizes -------------------------------------------------------------------------------------


def count(**fields):
    """With the 80 rows of the published embedding."""
    config = TDNConfig(
        atomic_numbers=tuple(range(1, 81)), cutoff=4.5, avg_num_neighbors=18.6, **fields
    )
    state = nnx.state(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(("l_max", "parameters"), [(1, 4_476_676), (2, 4_480_004), (3, 4_483_332)])
def test_published_sizes(l_max, parameters):
    """4.5 M in the paper's table 4, whatever the rank."""
    assert count(**SIZES[f"paper_l{l_max}"] | {"tensor_product": SharedWeights()}) == parameters
    assert count(**SIZES[f"exact_l{l_max}"] | {"forces": Forces.DIRECT}) == parameters


@pytest.mark.parametrize(
    ("l_max", "own_couplings", "own_linear"), [(1, 5.0, 9.1), (2, 6.3, 14.6), (3, 8.9, 21.3)]
)
def test_published_sizes_without_sharing(l_max, own_couplings, own_linear):
    """Millions in the paper's ablations. Its linear maps for each degree also exist where scalars
    alone are read: gates, attention weights, the energy's head, constants of edges, 22 C^2."""
    fields = {"l_max": l_max, "forces": Forces.DIRECT, "tensor_product": LowRankWeights(None)}
    assert round(count(**fields) / 1e6, 1) == own_couplings
    unread = 22 * 256**2 * l_max
    assert round((count(**fields, linear=Linear.PER_DEGREE) + unread) / 1e6, 1) == own_linear


# ---- checkpoints ---------------------------------------------------------------------------------


def test_layouts_of_checkpoints(tmp_path):
    """A bare state dict with a cache file; compiled, distributed; a moving average."""
    state, cache = state_of(1), random_factors(1, 7)
    expected = convert(dumped(state | factors_in(state, 1), tmp_path / "plain"), RUN)
    wrapped = {
        "module." + name.replace("blocks.0.", "blocks.0._orig_mod."): value
        for name, value in state.items()
    }
    average = {"shadow_params": [2 * value for value in state.values()], "decay": 0.995}
    cases = {
        "cache": (state, cache, {}),
        "wrapped": ({"model_state_dict": wrapped, "epoch": 3}, cache, {}),
        "raw": ({"model_state_dict": state, "ema_state_dict": average}, cache, {"raw": True}),
    }
    for name, (checkpoint, given, options) in cases.items():
        found = convert(dumped(checkpoint, tmp_path / name, given, **options), RUN)
        assert found.config == expected.config
        for key, value in expected.arrays.items():
            np.testing.assert_array_equal(found.arrays[key], value)
    averaged = {"model_state_dict": state, "ema_state_dict": average}
    twice = convert(dumped(averaged, tmp_path / "average", cache), RUN)
    for key, value in expected.arrays.items():
        np.testing.assert_array_equal(twice.arrays[key], 2 * value)


def test_energies_per_atom_and_elements(tmp_path):
    state = state_of(1)
    dump = dumped(state | factors_in(state, 1), tmp_path / "dump")
    total, per_atom = (model_of(convert(dump, RUN._replace(output=output))) for output in Output)
    found, expected = per_atom.one(molecule()), total.one(molecule())
    np.testing.assert_allclose(found[0], 6 * expected[0], rtol=1e-12)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-12)
    conservative = convert(dump, RUN._replace(forces=Forces.GRADIENT))
    assert not any(name.startswith("force_head") for name in conservative.arrays)
    assert convert(dump, RUN).reference_energies == {1: 0.0, 6: -1.0, 8: -2.0}
    with pytest.raises(ValueError, match=r"rows for elements below 9, none for \[9\]"):
        convert(dump, RUN._replace(reference_energies={1: 0.0, 9: 0.0}))


@pytest.mark.parametrize(
    ("change", "cache", "message"),
    [
        (lambda s: s.clear(), None, "is no TDN"),
        (lambda s: [s.pop(n) for n in list(s) if "cp_" in n], None, "--factors"),
        (lambda s: s.pop("edge_embed.tp.cp_tp.cp_c"), None, None),
        (lambda s: [s.pop(n) for n in list(s) if "cp_c" in n], None, "factors lack cp_c"),
        (lambda s: s.update({"edge_embed.tp.cp_tp.cp_a": np.ones((4, 7))}), None, "differs from"),
        (lambda s: s.update({"head.0.bias": np.full((1, 4), np.nan)}), None, "holds NaN"),
        (lambda s: s.update({"stress_head.bias": np.ones((1, 4))}), None, "stress_head.bias"),
        (lambda s: s.pop("norm.affine_weight"), None, "lacks norm.affine_weight"),
    ],
    ids=["state", "no factors", "factors in part", "factor", "differ", "nan", "unknown", "lacks"],
)
def test_checkpoints_that_are_not_covered(change, cache, message, tmp_path):
    state = state_of(1)
    state |= factors_in(state, 1)
    change(state)
    if message is None:
        assert convert(dumped(state, tmp_path / "dump", cache), RUN).config.l_max == 1
        return
    with pytest.raises(ValueError, match=message):
        convert(dumped(state, tmp_path / "dump", cache), RUN)


def test_a_moving_average_of_another_model(tmp_path):
    state = state_of(1)
    checkpoint = {"model_state_dict": state, "ema_state_dict": {"shadow_params": [np.ones(3)]}}
    with pytest.raises(ValueError, match="--raw"):
        dumped(checkpoint, tmp_path / "dump", random_factors(1, 7))


# ---- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3}, "must be a multiple of num_heads"),
        ({"l_max": 0}, "must be at least 1"),
        ({"num_layers": 0}, "must be at least 1"),
        ({"alpha_dropout": 1.0}, "expected a rate"),
    ],
    ids=str,
)
def test_impossible_options(fields, message):
    with pytest.raises(ValueError, match=message):
        small_config("tdn", **fields)


def test_what_is_dropped_while_training():
    model = SmallModel(small_config("tdn", alpha_dropout=0.3))
    graph = jax.tree.map(jnp.asarray, model.batch([molecule(1)]))
    plain = np.asarray(node_energies(model.graphdef, model.state, graph))

    @jax.jit
    def energies(key):
        instance = nnx.merge(model.graphdef, model.state)
        instance.key = key
        return instance.node_energies(*vectors_and(graph))

    first, again, second = (np.asarray(energies(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).max() > 1e-9 and np.abs(first - second).max() > 1e-9


def vectors_and(graph):
    return edge_vectors(graph, CUTOFF), graph
