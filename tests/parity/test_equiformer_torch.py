"""The Equiformers against restatements in torch, float64: block by block, and whole."""

import os

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # which e3nn 0.4.4 asks for

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import parity_table
import pytest
from flax import nnx

if not os.environ.get("EQUIZOO_PARITY"):  # which `make parity` sets: there it must not be missing
    REASON = "torch is not installed here; 'make parity' makes an environment that has it"
    pytest.importorskip("torch", reason=REASON)
    pytest.importorskip("e3nn", reason=REASON)

import equiformer_torch
import equiformer_v2_torch as peer
import torch
from ase.neighborlist import neighbor_list
from e3nn import o3

from equizoo.graph import edge_vectors
from equizoo.layers.activation import ActivationConstant
from equizoo.layers.sphere_grid import Grid
from equizoo.zoo import equiformer
from equizoo.zoo._base import Forces
from equizoo.zoo._convert.equiformer_v2 import convert
from equizoo.zoo.equiformer_v2 import edges_of

sys.path.append(str(Path(__file__).parents[1] / "zoo"))
import test_equiformer_v2 as checkpoints
from equiformer_oracle import original_state
from equiformer_v2_oracle import random_state
from small_models import STRUCTURES, SmallModel, small_config
from test_equiformer import BOTH_PARITIES

TOLERANCE = 1e-9  # relative to the largest number, float64: the same sums in another order
ENERGY, FORCES = checkpoints.NORMALIZERS["target"], checkpoints.NORMALIZERS["grad_target"]
MOLECULES = [STRUCTURES["molecule"], STRUCTURES["triclinic"]]
CASES = {
    "equiformer_v2": {},
    "equiformer_v2, joint norm": {"norm_type": "rms_norm_sh", "num_heads": 1},
    "equiformer_v2, all orders": {"lmax_list": [2], "mmax_list": [2], "grid_resolution": 8},
    "equiformer_v2, published degrees and grid": {
        "lmax_list": [6], "grid_resolution": 18, "num_layers": 1,
    },
}  # fmt: skip


V1_CASES = {
    "equiformer": {"envelope_p": None},
    "equiformer, envelope": {"output_channels": 4, "scale": 0.7, "shift": 0.3},
    "equiformer, linear messages": {"message": "linear"},
    "equiformer, degree 3": {
        "irreps": "4x0e+2x1e+2x2e+1x3e", "head_irreps": "2x0e+1x1e+1x2e+1x3e",
        "ffn_irreps": "3x0e+2x1e+1x2e+2x3e",
    },
    "equiformer, both parities, gaussians": BOTH_PARITIES | {"radial_basis": "gaussian"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def double_precision():
    """e3nn rounds constants to the default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def differentiable_edges(structure, cutoff, nearest=None):
    """Positions, vectors from target to source, and both ends; the ``nearest`` of each target."""
    atoms = structure.to_atoms()
    target, source, lengths, shifts = neighbor_list("ijdS", atoms, cutoff)
    if nearest is not None:
        order = np.lexsort((lengths, target))
        rank = np.arange(len(order)) - np.searchsorted(target[order], target[order])
        near = order[rank < nearest]
        target, source, shifts = target[near], source[near], shifts[near]
    source, target = torch.as_tensor(source), torch.as_tensor(target)
    positions = torch.tensor(atoms.positions, requires_grad=True)
    across = torch.as_tensor(shifts @ np.asarray(atoms.cell))
    return positions, positions[source] - positions[target] + across, source, target


def edges_of_graph(graph, cutoff):
    """Which nodes and edges are real, vectors from target to source, and both ends among those."""
    nodes, real = (np.flatnonzero(mask) for mask in (graph.node_mask, graph.edge_mask))
    place = {node: index for index, node in enumerate(nodes)}
    source, target = (
        torch.tensor([place[node] for node in np.asarray(ends)[real]])
        for ends in (graph.senders, graph.receivers)
    )
    vectors = torch.tensor(-np.asarray(edge_vectors(graph, cutoff))[real])
    return nodes, real, vectors, source, target


class Case:
    """A checkpoint with random weights, converted, and the same restated in torch."""

    def __init__(self, folder, ours=None, **settings):
        self.settings = checkpoints.SETTINGS | settings
        state = random_state(self.settings, checkpoints.NUM_BASIS)
        if not self.settings.get("regress_forces", True):
            state = {name: x for name, x in state.items() if not name.startswith("force_block")}
        state = {name: torch.as_tensor(value) for name, value in state.items()}
        stored = {
            "state_dict": {f"module.module.{name}": value for name, value in state.items()},
            "config": {"model": self.settings},
            "normalizers": checkpoints.NORMALIZERS,
        }
        converted = convert(checkpoints.dumped(stored, folder / "dump"))
        config = dataclasses.replace(converted.config, **(ours or {}))
        self.ours = checkpoints.model_of(converted._replace(config=config))
        grid = {Grid.FEJER: peer.published_grid, Grid.GAUSS: peer.gauss_grid}[config.grid]
        self.theirs = peer.EquiformerV2(
            self.settings, state, grid=grid, envelope_p=config.envelope_p
        )

    def theirs_of(self, structure):
        """Energy of the network, and forces of the head or of autograd, in the network's units."""
        config = self.ours.config
        nearest = None if config.neighbor_limit is None else self.settings["max_neighbors"]
        positions, vectors, source, target = differentiable_edges(structure, config.cutoff, nearest)
        numbers = torch.as_tensor(structure.atomic_numbers)
        edges = self.theirs.edges(vectors, numbers, source, target)
        x = self.theirs.features(edges)
        energy = self.theirs.energies(x).sum()
        if config.forces is Forces.DIRECT:
            return energy.item(), self.theirs.forces(x, edges).detach().numpy()
        (gradient,) = torch.autograd.grad(energy, positions)
        return energy.item(), -gradient.numpy()

    def theirs_alone(self, number):
        """Energy of the network for an atom without neighbours."""
        none = torch.zeros(0, dtype=torch.long)
        edges = self.theirs.edges(
            torch.zeros(0, 3, dtype=torch.float64), torch.tensor([number]), none, none
        )
        return self.theirs.energies(self.theirs.features(edges)).item()


def assert_equal(quantity, ours, theirs):
    theirs = theirs.detach() if torch.is_tensor(theirs) else theirs
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape and np.abs(theirs).max() > 1e-4
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    parity_table.record(quantity, float(error))
    assert error <= TOLERANCE, f"{quantity}: relative error {error:.1e}, allowed {TOLERANCE:.1e}"


def ours_by_block(graphdef, state, graph, x, kept, wide, gates, alphas):
    """Results of the parts of the first layer and of the heads; ``kept`` are in frames of edges."""
    model = nnx.merge(graphdef, state)
    layer, config = model.layers[0], model.config
    attention = layer.attention
    edges = edges_of(config, edge_vectors(graph, config.cutoff))
    weights = attention.weights(edges.basis, graph)
    scalars, first = attention.conv_1(wide, weights)
    return {
        "frames": edges.rows,
        "radial weights": weights,
        "edge-degree embedding": model.edge_degree(edges, graph),
        "layer norm": layer.norm_1(x),
        "SO(2) convolution 1, scalars": scalars,
        "SO(2) convolution 1": first,
        "S2 activation": attention._activated(kept, gates),
        "SO(2) convolution 2": attention.conv_2(kept)[1],
        "attention weights": attention._alpha(alphas, edges, graph),
        "attention": attention(x, edges, graph, None),
        "feed-forward": layer.ffn(x),
        "layer": layer(x, edges, graph, None),
        "energy head": model.energy_head(x)[:, 0, 0],
        "force head": model.force_head(x, edges, graph, None)[:, 1:4, 0],
    }


def theirs_by_block(theirs, edges, x, kept, wide, gates, alphas):
    name, network = "blocks.0.ga", "blocks.0.ga.so2_conv_1.rad_func.net"
    weights = theirs.radial_weights(name, network, edges)
    extra = alphas.shape[1] + gates.shape[1]
    scalars, first = theirs.so2_convolution(f"{name}.so2_conv_1", wide, extra, weights)
    return {
        "frames": edges.rows,
        "radial weights": weights,
        "edge-degree embedding": theirs.edge_degree(edges),
        "layer norm": theirs.norm("blocks.0.norm_1", x),
        "SO(2) convolution 1, scalars": scalars,
        "SO(2) convolution 1": first,
        "S2 activation": theirs.sphere_activation(kept, gates),
        "SO(2) convolution 2": theirs.so2_convolution(f"{name}.so2_conv_2", kept)[1],
        "attention weights": theirs.attention_weights(name, alphas, edges),
        "attention": theirs.attention(name, x, edges),
        "feed-forward": theirs.feed_forward("blocks.0.ffn", x),
        "layer": theirs.layer(0, x, edges),
        "energy head": theirs.feed_forward("energy_block", x)[:, 0, 0],
        "force head": theirs.forces(x, edges),
    }


@pytest.mark.parametrize("name", CASES)
def test_blocks_equal_to_torch(name, tmp_path):
    """Each from inputs at random, on the edges of a molecule and a crystal."""
    case = Case(tmp_path, **CASES[name])
    model, s = case.ours, case.settings
    graph = jax.tree.map(jnp.asarray, model.batch(MOLECULES))
    nodes, real, vectors, source, target = edges_of_graph(graph, model.config.cutoff)
    rng, components = np.random.default_rng(0), len(case.theirs.kept)
    shapes = {
        "x": (graph.num_nodes, len(case.theirs.degree), s["sphere_channels"]),
        "kept": (graph.num_edges, components, s["attn_hidden_channels"]),
        "wide": (graph.num_edges, components, 2 * s["sphere_channels"]),
        "gates": (graph.num_edges, s["attn_hidden_channels"]),
        "alphas": (graph.num_edges, s["num_heads"] * s["attn_alpha_channels"]),
    }
    inputs = {key: rng.normal(size=shape) for key, shape in shapes.items()}
    ours = jax.jit(ours_by_block, static_argnums=0)(
        model.graphdef, model.state, graph, **jax.tree.map(jnp.asarray, inputs)
    )
    numbers = torch.tensor(model.config.atomic_numbers)[np.asarray(graph.species)[nodes]]
    edges = case.theirs.edges(vectors, numbers, source, target)
    chosen = {key: value[nodes if key == "x" else real] for key, value in inputs.items()}
    theirs = theirs_by_block(case.theirs, edges, **jax.tree.map(torch.tensor, chosen))
    assert set(ours) == set(theirs)
    for block, expected in theirs.items():
        found = np.asarray(ours[block])
        assert_equal(block, found[real if len(found) == graph.num_edges else nodes], expected)


@pytest.mark.parametrize("name", CASES)
def test_equal_to_torch(name, tmp_path):
    """Energies and forces of the head, as the normalisers scale them."""
    case = Case(tmp_path, **CASES[name])
    for structure, (energy, forces, _) in zip(
        MOLECULES, case.ours.predict(MOLECULES), strict=False
    ):
        expected, expected_forces = case.theirs_of(structure)
        assert_equal("energy", energy, ENERGY["std"] * expected + ENERGY["mean"])
        assert_equal("forces", forces, FORCES["std"] * expected_forces)


def test_equiformer_v2_conservative(tmp_path):
    """A checkpoint without a head for forces: they are autograd's, through frames of edges."""
    case = Case(tmp_path, regress_forces=False)
    for structure in MOLECULES:
        expected, expected_forces = case.theirs_of(structure)
        energy, forces, _ = case.ours.one(structure)
        assert_equal("energy", energy, ENERGY["std"] * expected + ENERGY["mean"])
        assert_equal("forces", forces, ENERGY["std"] * expected_forces)


def test_equiformer_v2_of_new_models(tmp_path):
    """Envelope, Gauss's grid, isolated atoms subtracted, all neighbours: the options that no
    checkpoint has."""
    ours = {"envelope_p": 5, "grid": Grid.GAUSS, "zero_isolated": True, "offset": 0.0}
    case = Case(tmp_path, ours | {"neighbor_limit": None}, regress_forces=False)
    for structure in MOLECULES:
        expected, expected_forces = case.theirs_of(structure)
        isolated = sum(case.theirs_alone(int(z)) for z in structure.atomic_numbers)
        energy, forces, _ = case.ours.one(structure)
        assert_equal("energy", energy, ENERGY["std"] * (expected - isolated))
        assert_equal("forces", forces, ENERGY["std"] * expected_forces)


def v1_case(name):
    """A model with random weights, scales and biases too, and the same restated."""
    fields = {"activation": ActivationConstant.TORCH, "zero_isolated": False} | V1_CASES[name]
    model = SmallModel(small_config("equiformer", radial_widths=(6, 5), **fields))
    rng = np.random.default_rng(0)
    model.state = jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf) + 0.3 * rng.normal(size=leaf.shape)), model.state
    )
    state = original_state(model.config, model.model)
    state = {key: torch.tensor(np.asarray(value)) for key, value in state.items()}
    return model, equiformer_torch.Equiformer(model.config, model.config.harmonics, state)


def flat(features, irreps):
    """As e3nn has them, for every irrep channel by channel; jax sorts keys, e3nn has an order."""
    present = [str(ir) for _, ir in irreps if str(ir) in features]
    arrays = [np.swapaxes(np.asarray(features[ir]), 1, 2) for ir in present]
    return np.concatenate([x.reshape(len(x), -1) for x in arrays], axis=1)


def v1_by_block(graphdef, state, graph, x):
    model = nnx.merge(graphdef, state)
    layer, config = model.layers[0], model.config
    edges = equiformer.edges_of(config, model.basis, edge_vectors(graph, config.cutoff))
    return {
        "edge-degree embedding": model.edge_degree(edges, graph),
        "layer norm": layer.norm_1(x),
        "attention": layer.attention(x, edges, graph, None),
        "layer": layer(x, edges, graph, None),
        "last layer": model.layers[-1](x, edges, graph, None),
    }


@pytest.mark.parametrize("name", V1_CASES)
def test_blocks_equal_to_torch_v1(name):
    model, theirs = v1_case(name)
    graph = jax.tree.map(jnp.asarray, model.batch(MOLECULES))
    nodes, _, vectors, source, target = edges_of_graph(graph, model.config.cutoff)
    rng, irreps = np.random.default_rng(0), o3.Irreps(model.config.irreps)
    x = {
        str(ir): jnp.asarray(rng.normal(size=(graph.num_nodes, ir.dim, mul))) for mul, ir in irreps
    }
    ours = jax.jit(v1_by_block, static_argnums=0)(model.graphdef, model.state, graph, x)
    y, edges = torch.tensor(flat(x, irreps)[nodes]), theirs.edges(vectors, source, target)
    expected = {
        "edge-degree embedding": theirs.edge_degree(edges, len(nodes)),
        "layer norm": theirs.norm("blocks.0.norm_1", y, irreps),
        "attention": theirs.attention("blocks.0.ga", y, edges),
        "layer": theirs.layer(0, y, edges),
        "last layer": theirs.layer(model.config.num_layers - 1, y, edges),
    }
    for block, value in expected.items():
        assert_equal(block, flat(ours[block], irreps)[nodes], value)


@pytest.mark.parametrize("name", V1_CASES)
def test_equal_to_torch_v1(name):
    """Energies, and forces by autograd."""
    model, theirs = v1_case(name)
    for structure, (energy, forces, _) in zip(MOLECULES, model.predict(MOLECULES), strict=False):
        positions, vectors, source, target = differentiable_edges(structure, model.config.cutoff)
        numbers = list(model.config.atomic_numbers)
        species = torch.tensor([numbers.index(z) for z in structure.atomic_numbers])
        total = theirs.energies(species, theirs.edges(vectors, source, target)).sum()
        (gradient,) = torch.autograd.grad(total, positions)
        assert_equal("energy", energy, total.item())
        assert_equal("forces", forces, -gradient)


def test_the_restatement_has_e3nn_s_rotations():
    """Wigner matrices that were solved for are those that published models use."""
    rotations = o3.rand_matrix(5, dtype=torch.float64)
    ours = peer.wigner(rotations, 6)
    for degree in range(7):
        expected = o3.Irrep(degree, (-1) ** degree).D_from_matrix(rotations)
        place = slice(degree**2, (degree + 1) ** 2)
        torch.testing.assert_close(ours[:, place, place], expected, rtol=0, atol=1e-10)
    directions = torch.nn.functional.normalize(torch.randn(50, 3, dtype=torch.float64))
    frames = peer.rotations_to_y(directions)
    pole = torch.einsum("eij,ej->ei", frames, directions)
    torch.testing.assert_close(pole, torch.eye(3)[1].expand(50, 3).double(), rtol=0, atol=1e-12)
    unit = torch.eye(3).double().expand(50, 3, 3)
    torch.testing.assert_close(frames @ frames.mT, unit, rtol=0, atol=1e-12)
    assert (torch.linalg.det(frames) > 0).all()
