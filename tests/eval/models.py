"""Models and structures small enough to compile in a moment."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
from ase import Atoms
from flax import nnx

from equizoo.eval.potential import Potential
from equizoo.graph import sum_receivers
from equizoo.structure import EnergyReference
from equizoo.zoo._base import Architecture, ArchitectureConfig
from equizoo.zoo.mace import Interaction, MACEConfig

ENERGIES = {1: -13.6, 6: -1029.4, 8: -2042.0}  # [eV]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairConfig(ArchitectureConfig):
    """A smooth repulsion between all pairs closer than the cutoff."""

    def build(self, *, rngs: nnx.Rngs) -> "Pair":
        return Pair(self)


class Pair(Architecture):
    def __init__(self, config: PairConfig):
        self.config = config
        self.strength = nnx.Param(jnp.array([0.05, 0.2, 0.3], jnp.float32))

    def node_energies(self, vectors, graph):
        squares = jnp.sum(vectors**2, axis=1) / self.config.cutoff**2
        strength = self.strength[...].astype(vectors.dtype)
        pair = strength[graph.species[graph.senders]] * jnp.maximum(1 - squares, 0) ** 3
        return strength[graph.species] * sum_receivers(pair, graph)


def pair_potential(cutoff: float = 3.0) -> Potential:
    config = PairConfig(atomic_numbers=(1, 6, 8), cutoff=cutoff, avg_num_neighbors=8.0)
    return Potential(
        config.build(rngs=nnx.Rngs(0)),
        reference_energies=ENERGIES,
        energy_reference=EnergyReference.TOTAL,
        level_of_theory="none",
        name="pair",
    )


def mace_potential(
    seed: int = 0, atomic_numbers: tuple[int, ...] = (1, 6, 8), **options
) -> Potential:
    config = MACEConfig(
        atomic_numbers=atomic_numbers,
        cutoff=3.5,
        avg_num_neighbors=8.0,
        channels=4,
        hidden_l_max=1,
        l_max=2,
        correlation=2,
        num_bessel=4,
        radial_widths=(8,),
        readout_channels=4,
        interactions=(Interaction.REAL_AGNOSTIC_RESIDUAL,),
        scale=5.0,
    )
    fields = {
        "reference_energies": ENERGIES,
        "energy_reference": EnergyReference.TOTAL,
        "level_of_theory": "none",
    }
    return Potential(config.build(rngs=nnx.Rngs(seed)), **fields | options)


def cluster(rng: np.random.Generator, nodes: int, spacing: float = 1.6) -> Atoms:
    """Atoms on displaced sites of a grid."""
    per_axis = int(np.ceil(nodes ** (1 / 3)))
    sites = np.array(list(itertools.product(range(per_axis), repeat=3)))[:nodes]
    positions = spacing * (sites + rng.uniform(-0.15, 0.15, (nodes, 3)))
    return Atoms(rng.choice([1, 6, 8], nodes), positions)


def crystal(rng: np.random.Generator, per_axis: int = 2, spacing: float = 1.6) -> Atoms:
    """The same in a sheared triclinic cell."""
    atoms = cluster(rng, per_axis**3, spacing)
    shear = np.array([[1.0, 0.0, 0.0], [0.25, 1.0, 0.0], [-0.1, 0.2, 1.1]])
    atoms.set_cell(per_axis * spacing * np.eye(3))
    atoms.pbc = True
    atoms.set_cell(atoms.cell.array @ shear, scale_atoms=True)
    return atoms
