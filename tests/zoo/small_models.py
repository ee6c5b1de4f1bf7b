"""Small models and structures for the tests of architectures, with compiled functions shared."""

import collections
import dataclasses
import enum
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from equizoo.graph import Budget, batch_frames, edge_vectors, unbatch_nodes
from equizoo.neighbors import NeighborLimit, nearest_neighbors, neighbor_list
from equizoo.registry import ARCHITECTURES
from equizoo.structure import Structure
from equizoo.tensor_products.cp_decomposed import Schedule
from equizoo.zoo._base import energy_forces_stress
from equizoo.zoo.tdn import PUBLISHED, published_product

CUTOFF = 3.5  # [Å]
ELEMENTS = (1, 6, 8)
APERIODIC, SLAB, PERIODIC = (False,) * 3, (True, True, False), (True,) * 3
TRICLINIC = np.array([[4.1, 0.3, 0.0], [1.1, 4.4, 0.2], [0.4, -0.7, 4.2]])  # [Å]

# One shape for everything, so that each model is compiled once per layout and precision.
ROWS = Budget(nodes=12, graphs=4, edges=288, slots=24, out_slots=24, blocks=4, block_size=8)
WIDE_ROWS = Budget(nodes=17, graphs=6, edges=476, slots=28, out_slots=29, blocks=5, block_size=8)
FLAT = dataclasses.replace(ROWS, edges=150, slots=None, out_slots=None)

# Whatever of these fields a config has is made small.
SMALL = {
    "channels": 4,
    "hidden_l_max": 1,
    "irreps": "4x0e+3x1e+2x2e",
    "head_irreps": "2x0e+2x1e+1x2e",
    "ffn_irreps": "6x0e+4x1e+3x2e",
    "output_channels": 5,
    "hidden_channels": 4,
    "ffn_channels": 4,
    "alpha_channels": 3,
    "value_channels": 2,
    "edge_channels": 4,
    "m_max": 1,
    "grid_points": 8,
    "avg_num_nodes": 1.0,
    "l_max": 2,
    "num_layers": 2,
    "num_heads": 2,
    "num_bessel": 4,
    "num_basis": 4,
    "radial_widths": (8,),
    "readout_channels": 4,
}


# Laws hold for the defaults of every architecture, and for these settings too.
VARIANTS = {
    "equiformer_v2 as published": {
        "forces": "direct", "envelope_p": None, "zero_isolated": False, "norm": "joint",
        "neighbor_limit": NeighborLimit(8), "grid": "fejer",
    },
    # direct forces are in test_tdn: symmetry can make them zero, and leave noise to compare
    "tdn as published": PUBLISHED
    | {"l_max": 1, "tensor_product": published_product(Schedule.EXACT), "forces": "gradient"},
    "tdn at the paper's rank": {"l_max": 1, "tensor_product": published_product()},
    "tdn with both parities": {"parity": "both", "l_max": 1},
}  # fmt: skip
CASES = [*ARCHITECTURES, *VARIANTS]


def small_config(name, **fields):
    """The defaults of an architecture, made small wherever its config has a field for it."""
    cls, fields = ARCHITECTURES[name.split()[0]], VARIANTS.get(name, {}) | fields
    known = {field.name: field.type for field in dataclasses.fields(cls)}
    reduced = {key: value for key, value in SMALL.items() if key in known}
    fields = {
        key: known[key](value) if isinstance(known[key], enum.EnumType) else value
        for key, value in fields.items()
    }
    required = {"atomic_numbers": ELEMENTS, "cutoff": CUTOFF, "avg_num_neighbors": 6.0}
    return cls(**(required | reduced | fields))


def molecule(seed=0, nodes=6, spread=1.3):
    """A random cluster with atoms at least 0.7 Å apart: chiral, within the cutoff in part."""
    rng = np.random.default_rng(seed)
    positions = np.zeros((0, 3))
    while len(positions) < nodes:
        new = spread * rng.normal(size=3)
        if all(np.linalg.norm(new - old) > 0.7 for old in positions):
            positions = np.concatenate([positions, new[None]])
    numbers = np.array([ELEMENTS[i % 3] for i in range(nodes)])
    return Structure(numbers, positions, np.zeros((3, 3)))


def crystal(pbc=PERIODIC, seed=0, nodes=5, cell=TRICLINIC):
    return dataclasses.replace(molecule(seed, nodes), cell=cell, pbc=pbc)


STRUCTURES = {
    "molecule": molecule(),
    "triclinic": crystal(),
    "slab": crystal(SLAB),
    "self_images": crystal(nodes=1, cell=0.5 * TRICLINIC),
}


TRACES = collections.Counter()  # of each graph definition and batch shape


@functools.partial(jax.jit, static_argnums=0)
def predict(graphdef, state, graph):
    TRACES[graphdef, graph.num_edges, graph.positions.dtype] += 1
    return energy_forces_stress(nnx.merge(graphdef, state), graph)


@functools.partial(jax.jit, static_argnums=0)
def node_energies(graphdef, state, graph):
    model = nnx.merge(graphdef, state)
    return model.node_energies(edge_vectors(graph, model.config.cutoff), graph)


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1)
def training_loss(graphdef, state, graph, target):
    """Squared errors of energy, forces and stress: its gradient is a double backward pass."""
    found = energy_forces_stress(nnx.merge(graphdef, state), graph)
    stress = 0 if found.stress is None else 10 * jnp.sum(found.stress**2)
    errors = jnp.where(graph.node_mask[:, None], found.forces - target, 0)
    return jnp.sum(errors**2) + jnp.sum(found.energy**2) + stress


class SmallModel:
    """A model with fixed weights and its predictions, compiled once per configuration and shape."""

    def __init__(self, config, seed=0):
        self.config = config
        self.graphdef, self.state = nnx.split(config.build(rngs=nnx.Rngs(seed)))

    @property
    def model(self):
        return nnx.merge(self.graphdef, self.state)

    def frames(self, structures):
        config = self.config
        return [config.frame(s) for s in structures]

    def batch(self, structures, budget=ROWS, dtype=np.float64):
        return batch_frames(self.frames(structures), budget, dtype)

    def predict(self, structures, budget=ROWS, dtype=np.float64):
        """(energy, forces, stress) of every structure in one batch; no stress: zeros."""
        prediction = predict(self.graphdef, self.state, self.batch(structures, budget, dtype))
        forces = unbatch_nodes(np.asarray(prediction.forces), self.frames(structures))
        stress = prediction.stress
        if stress is None:
            stress = np.zeros((len(prediction.energy), 3, 3), dtype)
        together = zip(prediction.energy, forces, stress, strict=False)
        return [(np.asarray(e), f, np.asarray(s)) for e, f, s in together]

    def one(self, structure, **options):
        return self.predict([structure], **options)[0]

    def energy(self, structure, **options):
        return float(self.one(structure, **options)[0])


@functools.cache
def small_model(name):
    return SmallModel(small_config(name))


class Together(NamedTuple):
    """Structures side by side as an oracle takes them, so that it is compiled once for all."""

    numbers: np.ndarray
    positions: np.ndarray  # [Å]
    senders: np.ndarray
    receivers: np.ndarray
    shifts: np.ndarray  # [Å]

    @classmethod
    def of(cls, structures, limit=None):
        parts, nodes = [], 0
        for s in structures:
            near = neighbor_list(s.positions, s.cell, s.pbc, CUTOFF)
            if limit is not None:
                near = nearest_neighbors(near, s.positions, s.cell, limit)
            edges = near.senders + nodes, near.receivers + nodes, near.shifts @ s.cell
            parts.append(cls(s.atomic_numbers, s.positions, *edges))
            nodes += s.num_nodes
        return cls(*map(np.concatenate, zip(*parts, strict=True)))

    @property
    def alone(self):
        """Each atom with nothing but an image of itself at the cutoff, where envelopes vanish."""
        itself = np.arange(len(self.numbers))
        away = np.tile([[CUTOFF, 0.0, 0.0]], (len(itself), 1))
        return Together(self.numbers, np.zeros_like(self.positions), itself, itself, away)


def together(model, structures, **options):
    """The sum of the model's energies of structures, and their forces, in one batch."""
    energies, forces, _ = zip(*model.predict(structures, **options), strict=True)
    return sum(energies), np.concatenate(forces)


def derivative(function, step):
    """Central difference of fourth order at zero; its error is of order ``step**4``."""
    near, far = (function(k * step) - function(-k * step) for k in (1, 2))
    return (8 * near - far) / (12 * step)


def turned(structure, matrix):
    """The structure rotated or reflected."""
    return dataclasses.replace(
        structure, positions=structure.positions @ matrix.T, cell=structure.cell @ matrix.T
    )


def assert_close(found, expected, tolerance):
    """Energies, forces and stresses equal relative to the largest number of each.

    What cancels exactly, as forces between an atom and its images do, is held against 0.01.
    """
    for a, b in zip(found, expected, strict=True):
        scale = max(np.abs(np.asarray(b)).max(), 1e-2)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def parameter_direction(state, seed=0):
    leaves, tree = jax.tree.flatten(state)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(rng.normal(size=leaf.shape)) for leaf in leaves])
