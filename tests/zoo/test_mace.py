"""MACE against an independent evaluation by explicit loops, and against published sizes."""

import dataclasses
import functools
import json
import warnings

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.spatial.transform import Rotation
from small_models import (
    ELEMENTS,
    ROWS,
    STRUCTURES,
    SmallModel,
    assert_close,
    derivative,
    small_config,
    turned,
)

from equizoo.config import from_dict, to_dict
from equizoo.graph import Graph, edge_vectors
from equizoo.layers.activation import ActivationConstant
from equizoo.layers.radial import Agnesi, Chebyshev, Gaussian, Soft
from equizoo.layers.repulsion import ZBL
from equizoo.neighbors import neighbor_list
from equizoo.registry import TENSOR_PRODUCTS
from equizoo.structure import Structure
from equizoo.tensor_products._base import TensorProduct
from equizoo.tensor_products._symmetric import monomials, symmetric_basis
from equizoo.tensor_products.clebsch_gordan_dense import ClebschGordanDense
from equizoo.zoo.mace import (
    SIZES,
    Attention,
    Categorical,
    Continuous,
    EdgeFeatures,
    EnvelopeOn,
    GraphFeature,
    Interaction,
    LastReadout,
    MACEConfig,
)

AGNOSTIC, RESIDUAL = Interaction.REAL_AGNOSTIC, Interaction.REAL_AGNOSTIC_RESIDUAL
VARIANTS = {
    "default": {},
    "agnostic_last": {
        "interactions": (RESIDUAL, AGNOSTIC),
        "correlation": 2,
        "zero_isolated": False,
        "scale": 0.7,
        "shift": 0.3,
        "activation": ActivationConstant.TORCH,
    },
    "one_layer": {"interactions": (AGNOSTIC,), "correlation": 1, "l_max": 1, "hidden_l_max": 0},
    "three_layers": {
        "interactions": (RESIDUAL, AGNOSTIC, RESIDUAL),
        "hidden_l_max": 2,
        "correlation": 2,
        "tensor_product": ClebschGordanDense(),
        "radial_widths": (6, 5),
        "channels": 3,
    },
}
CHARGED = (
    GraphFeature("charge", 3, Categorical(5, 2)),
    GraphFeature("spin", 2, Continuous()),
)
# Beyond the independent evaluation below: tests/zoo/test_convert.py and tests/parity hold these to
# the published implementation.
FURTHER = {
    "density": {
        "interactions": (
            Interaction.REAL_AGNOSTIC_DENSITY,
            Interaction.REAL_AGNOSTIC_DENSITY_RESIDUAL,
        ),
        "distance_transform": Agnesi(),
        "repulsion": ZBL(),
        "heads": ("a", "b"),
        "scale": (1.0, 2.0),
        "zero_isolated": False,
    },
    "attention": {
        "interactions": (Interaction.REAL_AGNOSTIC_ATTENTION_RESIDUAL,) * 2,
        "attention": Attention(3, (5,)),
        "envelope_on": EnvelopeOn.WEIGHTS,
        "radial_basis": Gaussian(),
        "distance_transform": Soft(),
        "correlation": 2,
    },
    "nonlinear": {
        "interactions": (Interaction.REAL_AGNOSTIC_RESIDUAL_NONLINEAR,) * 2,
        "envelope_on": EnvelopeOn.WEIGHTS,
        "edge_features": (EdgeFeatures(4, 0), EdgeFeatures(3, 1)),
        "last_readout": LastReadout.BIASED_MLP,
        "density_widths": (4,),
        "correlation": 2,
        "joint_embedding": CHARGED,
        "embedding_readout": True,
        "zero_isolated": False,
    },
    "four_fold": {
        "correlation": 4,
        "l_max": 1,
        "interactions": (AGNOSTIC,),
        "radial_basis": Chebyshev(),
        "distance_transform": Agnesi(),
        "last_readout": LastReadout.LINEAR,
        "heads": ("a", "b"),
    },
}
ORACLE = 1e-11  # relative, float64, other order of the same sums


@functools.cache
def variant(name):
    small = SmallModel(small_config("mace", **(VARIANTS | FURTHER)[name]))
    if name in FURTHER:  # so that cutting tables out of them rounds nothing
        small.state = jax.tree.map(lambda leaf: leaf.astype(np.float64), small.state)
    return small


# ---- an independent evaluation -------------------------------------------------------------------


def silu(x, constant):
    factor = {"exact": 1.676532470331, "torch": 1.6791767923989418}[constant]
    return factor * x / (1 + np.exp(-x))


def numpy_of(parameter):
    return np.asarray(parameter[...], np.float64)


def mix(blocks_by_degree, linear):
    """A linear map per degree: blocks of one degree side by side, over the root of their width."""
    result = {}
    for key, kernel in linear.kernels.items():
        degree, kernel = int(key[0]), numpy_of(kernel)
        stacked = np.concatenate(blocks_by_degree[degree], axis=-1)
        result[degree] = stacked @ kernel / np.sqrt(len(kernel))
    return result


def mix_by_species(x, linear, species, num_species):
    result = {}
    for key, kernel in linear.kernels.items():
        degree, kernel = int(key[0]), numpy_of(kernel)
        scale = np.sqrt(kernel.shape[1] * num_species)
        result[degree] = np.einsum("nmc,ncd->nmd", x[degree], kernel[species]) / scale
    return result


def messages(layer, x, edges, radial, harmonics, config):
    """The neighbour sums ``M_i``, one block per path, by a loop over edges and paths."""
    for index, kernel in enumerate(map(numpy_of, layer.radial.kernels)):
        radial = radial @ kernel / np.sqrt(len(kernel))
        if index < len(layer.radial.kernels) - 1:
            radial = silu(radial, config.activation.value)
    paths = [
        (l_1, l_2, l_3)
        for l_1 in x
        for l_2 in range(config.l_max + 1)
        for l_3 in range(abs(l_1 - l_2), min(l_1 + l_2, config.l_max) + 1)
        if (l_1 + l_2 + l_3) % 2 == 0
    ]
    paths.sort(key=lambda path: path[2])
    num_nodes, channels = x[0].shape[0], x[0].shape[2]
    weights = radial.reshape(len(radial), len(paths), channels)
    blocks = {l_3: [] for l_3 in range(config.l_max + 1)}
    for p, (l_1, l_2, l_3) in enumerate(paths):
        coupling = np.sqrt(2 * l_3 + 1) * np.asarray(e3nn.clebsch_gordan(l_1, l_2, l_3))
        summed = np.zeros((num_nodes, 2 * l_3 + 1, channels))
        for e, (sender, receiver) in enumerate(edges):
            pair = np.einsum("ijk,ic,j->kc", coupling, x[l_1][sender], harmonics[e][l_2])
            summed[receiver] += weights[e, p] * pair
        blocks[l_3].append(summed)
    return blocks


def contract(a, weights, degrees_out, order, irreps_in):
    """The symmetric contraction, monomial by monomial; ``weights`` are those of each node."""
    flat = np.concatenate([a[degree] for degree in sorted(a)], axis=1)
    result, start = {}, 0
    for degree in degrees_out:
        total = np.zeros((len(flat), 2 * degree + 1, flat.shape[2]))
        for nu in range(1, order + 1):
            basis = symmetric_basis(irreps_in, e3nn.Irrep(degree, (-1) ** degree), nu)
            for column, monomial in enumerate(monomials(irreps_in.dim, nu)):
                product = np.prod(flat[:, monomial], axis=1)
                mine = weights[:, start : start + len(basis)]
                total += np.einsum("km,nkc,nc->nmc", basis[:, :, column], mine, product)
            start += len(basis)
        result[degree] = total
    return result


def oracle(small, structure):
    """Node energies of MACE from its published definition, in float64 numpy."""
    config, model = small.config, small.model
    table = {number: index for index, number in enumerate(config.atomic_numbers)}
    species = np.array([table[int(number)] for number in structure.atomic_numbers])
    num_species = len(config.atomic_numbers)
    neighbors = neighbor_list(structure.positions, structure.cell, structure.pbc, config.cutoff)
    edges = list(zip(neighbors.senders, neighbors.receivers, strict=True))
    vectors = structure.positions[neighbors.receivers] - structure.positions[neighbors.senders]
    vectors = vectors + neighbors.shifts @ structure.cell
    r = np.linalg.norm(vectors, axis=1)[:, None]
    u, p = r / config.cutoff, config.envelope_p
    envelope = 1 - (p + 1) * (p + 2) / 2 * u**p + p * (p + 2) * u ** (p + 1)
    envelope = envelope - p * (p + 1) / 2 * u ** (p + 2)
    n = np.arange(1, config.num_bessel + 1)
    radial = np.sqrt(2 / config.cutoff) * np.sin(n * np.pi * u) / r * envelope
    irreps = e3nn.Irreps([(1, (d, (-1) ** d)) for d in range(config.l_max + 1)])
    flat = e3nn.spherical_harmonics(irreps, jnp.asarray(vectors), True, normalization="component")
    harmonics = [[row[place] for place in irreps.slices()] for row in np.asarray(flat.array)]

    x = {0: (numpy_of(model.embedding)[species] / np.sqrt(num_species))[:, None]}
    energies = np.zeros(len(species))
    for t, (layer, readout, kind) in enumerate(
        zip(model.layers, model.readouts, config.interactions, strict=True)
    ):
        last = t == len(config.interactions) - 1
        up = mix({degree: [block] for degree, block in x.items()}, layer.linear_up)
        sums = messages(layer, up, edges, radial, harmonics, config)
        a = mix(sums, layer.linear)
        a = {degree: block / config.avg_num_neighbors for degree, block in a.items()}
        if kind is AGNOSTIC:
            a = mix_by_species(a, layer.species_linear, species, num_species)
        degrees_out = range(1 if last else config.hidden_l_max + 1)
        weights = numpy_of(layer.product_weights)[species]
        products = contract(a, weights, degrees_out, config.correlation, irreps)
        out = mix({degree: [block] for degree, block in products.items()}, layer.product_linear)
        if kind is RESIDUAL:
            connection = mix_by_species(x, layer.species_linear, species, num_species)
            out = {degree: out[degree] + connection.get(degree, 0) for degree in out}
        x = out
        scalars = x[0][:, 0]
        for index, kernel in enumerate(map(numpy_of, readout.kernels)):
            scalars = silu(scalars, config.activation.value) if index else scalars
            scalars = scalars @ kernel / np.sqrt(len(kernel))
        assert len(readout.kernels) == (2 if last else 1)
        energies += scalars[:, 0]
    return config.scale * energies + config.shift


def lone(number):
    return Structure(np.array([number]), np.zeros((1, 3)), np.zeros((3, 3)))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", ["molecule", "slab"])
def test_equals_an_independent_evaluation(name, kind):
    small, structure = variant(name), STRUCTURES[kind]
    expected = oracle(small, structure)
    if small.config.zero_isolated:
        isolated = {number: oracle(small, lone(number))[0] for number in ELEMENTS}
        expected = expected - [isolated[int(number)] for number in structure.atomic_numbers]
    np.testing.assert_allclose(small.energy(structure), expected.sum(), rtol=ORACLE, atol=1e-13)


# ---- variants ------------------------------------------------------------------------------------

OTHERS = [name for name in VARIANTS if name != "default"]  # the default is under the laws for all


@pytest.mark.parametrize("name", [*OTHERS, *FURTHER])
def test_variants_turn_with_o3_and_have_exact_forces(name):
    small, structure = variant(name), STRUCTURES["triclinic"]
    energy, forces, stress = small.one(structure)
    for sign in (1, -1):
        matrix = sign * Rotation.random(random_state=0).as_matrix()
        expected = energy, forces @ matrix.T, matrix @ stress @ matrix.T
        assert_close(small.one(turned(structure, matrix)), expected, 1e-10)
    strain = np.array([[0.3, 0.1, -0.2], [0.1, -0.4, 0.5], [-0.2, 0.5, 0.2]])
    work = derivative(lambda t: small.energy(turned(structure, np.eye(3) + t * strain)), 1e-3)
    volume = abs(np.linalg.det(structure.cell))
    np.testing.assert_allclose(np.sum(stress * strain) * volume, work, rtol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_lone_atoms(name):
    """Zero where ``zero_isolated``; else a constant of the element, never the environment's."""
    small = variant(name)
    for number in ELEMENTS:
        energy = small.energy(lone(number))
        if small.config.zero_isolated:
            np.testing.assert_allclose(energy, 0, atol=1e-13)
        else:
            np.testing.assert_allclose(energy, oracle(small, lone(number))[0], rtol=ORACLE)
            assert abs(energy - small.config.shift) > 1e-4


@pytest.mark.parametrize("name", FURTHER)
def test_configs_of_variants_are_plain_json(name):
    config = variant(name).config
    assert from_dict(MACEConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("kind", "envelope_on", "smooth"),
    [
        (RESIDUAL, EnvelopeOn.BASIS, True),
        (Interaction.REAL_AGNOSTIC_ATTENTION_RESIDUAL, EnvelopeOn.BASIS, False),
        (Interaction.REAL_AGNOSTIC_ATTENTION_RESIDUAL, EnvelopeOn.WEIGHTS, True),
        (Interaction.REAL_AGNOSTIC_RESIDUAL_NONLINEAR, EnvelopeOn.BASIS, False),
        (Interaction.REAL_AGNOSTIC_RESIDUAL_NONLINEAR, EnvelopeOn.WEIGHTS, True),
    ],
)
def test_smooth_where_it_says_so(kind, envelope_on, smooth):
    """A radial network that sees the atoms does not vanish where its basis does."""
    config = small_config(
        "mace", interactions=(kind,), envelope_on=envelope_on, l_max=1, correlation=1,
        attention=Attention(3, (5,)), density_widths=(4,),
    )  # fmt: skip
    assert config.smooth is smooth
    small = SmallModel(config)

    def pair(distance):
        positions = np.array([[0.0, 0, 0], [distance, 0, 0]])
        return small.energy(Structure(np.array([8, 1]), positions, np.zeros((3, 3))))

    jump = abs(pair(config.cutoff - 1e-7) - pair(config.cutoff + 1e-7))
    assert (jump < 1e-9) is smooth


@pytest.mark.parametrize("name", ["density", "four_fold"])
def test_heads_differ_and_can_be_cut_out(name):
    small, structure = variant(name), STRUCTURES["molecule"]
    graph = jax.tree.map(jnp.asarray, small.batch([structure]))
    found = []
    for index, head in enumerate(small.config.heads):
        of_head = graph._replace(head=jnp.full(graph.num_graphs, index, np.int32))
        mine = np.asarray(small.model.node_energies(vectors_of(of_head, small), of_head))
        single = small.model.with_head(head)
        assert single.config.heads == (head,)
        other = np.asarray(single.node_energies(vectors_of(graph, small), graph))
        np.testing.assert_allclose(other[:6], mine[:6], rtol=1e-12, atol=1e-14)
        found.append(mine[:6].sum())
    assert abs(found[0] - found[1]) > 1e-3
    with pytest.raises(ValueError, match="head is 'c', expected one of a, b"):
        small.model.with_head("c")


@pytest.mark.parametrize("name", ["density", "four_fold"])
def test_copied_heads_equal_the_one_that_there_was(name):
    small, structure = variant(name), STRUCTURES["molecule"]
    graph = jax.tree.map(jnp.asarray, small.batch([structure]))
    single = small.model.with_head(small.config.heads[0])
    expected = np.asarray(single.node_energies(vectors_of(graph, small), graph))[:6]
    several = single.with_copied_heads(("x", "y", "z"))
    assert several.config.heads == ("x", "y", "z")
    for index, head in enumerate(several.config.heads):
        of_head = graph._replace(head=jnp.full(graph.num_graphs, index, np.int32))
        mine = np.asarray(several.node_energies(vectors_of(of_head, small), of_head))
        np.testing.assert_allclose(mine[:6], expected, rtol=1e-12, atol=1e-14)
        again = several.with_head(head)
        for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (again, single)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
    with pytest.raises(ValueError, match="has heads .* already"):
        several.with_copied_heads(("a", "b"))


def vectors_of(graph: Graph, small):
    return edge_vectors(jax.tree.map(jnp.asarray, graph), small.config.cutoff)


@pytest.mark.parametrize("name", FURTHER)
def test_fewer_elements_change_nothing_for_those_kept(name):
    small = variant(name)
    numbers = np.array([8, 1, 8, 1, 1, 8])
    structure = dataclasses.replace(STRUCTURES["molecule"], atomic_numbers=numbers)
    smaller = small.model.with_elements((8, 1))
    assert smaller.config.atomic_numbers == (1, 8)
    again = SmallModel(smaller.config)
    again.state = nnx.state(smaller)
    assert_close(again.one(structure), small.one(structure), 1e-12)
    with pytest.raises(ValueError, match=r"asks for \[26\], which the model does not have"):
        small.model.with_elements((1, 26))


def test_charge_and_spin_matter_where_they_are_embedded():
    small, structure = variant("nonlinear"), STRUCTURES["molecule"]
    energies = [
        small.energy(dataclasses.replace(structure, charge=charge, spin=spin))
        for charge, spin in ((0.0, 1.0), (1.0, 1.0), (0.0, 3.0))
    ]
    assert len(set(np.round(energies, 8))) == 3
    with pytest.raises(ValueError, match="charge 3; the model knows whole numbers from -2 to 2"):
        small.config.require(dataclasses.replace(structure, charge=3.0))
    charged = dataclasses.replace(structure, charge=-1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small.config.require(charged)
        variant("density").config.require(structure)
    with pytest.warns(UserWarning, match="has charge -1 e. The model does not know charges"):
        variant("density").config.require(charged)


# ---- every tensor product ------------------------------------------------------------------------

# Two true tensors give none of what MACE carries on: these hold odd couplings alone.
ODD = ("poisson_bracket", "vector_signal")


@pytest.mark.parametrize("name", [name for name in TENSOR_PRODUCTS if name not in ODD])
def test_every_tensor_product_by_config_alone(name):
    """Over edges, and as the product basis where the product has a many-body form."""
    cls = TENSOR_PRODUCTS[name]
    fields = {"tensor_product": cls()}
    if cls._bind_power is not TensorProduct._bind_power:
        fields["product_basis"] = cls()
    config = small_config("mace", **fields)
    assert from_dict(MACEConfig, to_dict(config)) == config
    small, structure = SmallModel(config), STRUCTURES["slab"]
    energy, forces, stress = small.one(structure)
    assert np.abs(forces).max() > 1e-3
    matrix = -Rotation.random(random_state=0).as_matrix()
    expected = energy, forces @ matrix.T, matrix @ stress @ matrix.T
    assert_close(small.one(turned(structure, matrix)), expected, 1e-10)
    direction = np.random.default_rng(0).normal(size=forces.shape)

    def along(t):
        moved = dataclasses.replace(structure, positions=structure.positions + t * direction)
        return small.energy(moved)

    np.testing.assert_allclose(-np.sum(forces * direction), derivative(along, 1e-3), rtol=1e-6)


@pytest.mark.parametrize("name", ODD)
def test_products_of_odd_couplings_alone_are_refused(name):
    config = small_config("mace", tensor_product=TENSOR_PRODUCTS[name]())
    with pytest.raises(ValueError, match="No path couples"):
        config.build(rngs=nnx.Rngs(0))


# ---- sizes ---------------------------------------------------------------------------------------


def count(state):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state))


def shapes_of(config):
    return nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))


def mace_of_size(size, atomic_numbers):
    return MACEConfig(
        atomic_numbers=atomic_numbers, cutoff=5.0, avg_num_neighbors=10.0, **SIZES[size]
    )


@pytest.mark.parametrize(
    ("size", "atomic_numbers", "parameters"),
    [
        ("paper_l2", (1, 6, 8), 2_707_984),
        ("paper_l0", (1, 6, 7, 8), 1_491_216),
        ("paper_l1", (1, 6, 7, 8), 2_130_192),
        ("paper_l2", (1, 6, 7, 8), 2_855_184),
    ],
)
def test_parameters_of_published_models(size, atomic_numbers, parameters):
    """Counts of the published implementation with the reduced basis."""
    config = mace_of_size(size, atomic_numbers)
    assert count(nnx.state(shapes_of(config))) == parameters


def test_parameters_of_each_part():
    """256 channels, hidden degrees up to 2, three elements: 10 and 17 paths from l = 1 and 2."""
    model = shapes_of(mace_of_size("paper_l2", (1, 6, 8)))
    channels, square = 256, 256**2
    parts = [model.embedding, *model.layers, *model.readouts]
    radial = 8 * 64 + 2 * 64**2
    expected = [
        3 * channels,
        square + radial + 64 * 4 * channels + 4 * square + 3 * square
        + 3 * (13 + 16 + 20) * channels + 3 * square,
        3 * square + radial + 64 * 17 * channels + 17 * square + 3 * square
        + 3 * 13 * channels + square,
        channels,
        16 * channels + 16,
    ]  # fmt: skip
    assert [count(nnx.state(part)) for part in parts[1:]] == expected[1:]
    assert np.prod(parts[0].shape) == expected[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"interactions": ()}, "interactions is empty, expected one entry per layer"),
        ({"hidden_l_max": 3}, r"hidden_l_max \(3\) must lie between 0 and l_max \(2\)"),
        ({"hidden_l_max": -1}, r"hidden_l_max \(-1\) must lie between"),
        ({"shift": 0.5}, "set shift=0, or zero_isolated=False"),
        ({"correlation": 5}, "order is 5"),
        ({"heads": ()}, "heads is .*, expected one or more different names"),
        ({"heads": ("a", "b"), "scale": (1.0,)}, "scale has 1 values for 2 heads"),
        ({"edge_features": (EdgeFeatures(2, 0),)}, "edge_features has 1 entries for 2 layers"),
        ({"embedding_readout": True}, "needs a joint_embedding to read"),
        ({"joint_embedding": CHARGED}, "set zero_isolated=False"),
        ({"repulsion": ZBL(radii=(1.0,))}, "1 radii for 3 elements"),
    ],
    ids=str,
)
def test_impossible_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        small_config("mace", **fields).build(rngs=nnx.Rngs(0))


def test_laws_see_edges_to_own_images():
    (frame,) = variant("default").frames([STRUCTURES["self_images"]])
    assert 12 <= frame.max_in <= ROWS.slots
