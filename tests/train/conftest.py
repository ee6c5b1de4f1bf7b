"""A tiny problem that trains in seconds: small clusters and crystals with Morse energies."""

import contextlib
import dataclasses
import time

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.morse import MorsePotential
from flax import nnx

from equizoo.data.pipeline import Packing
from equizoo.graph import Budget, make_frame
from equizoo.structure import EnergyReference, Structure
from equizoo.train import loop
from equizoo.zoo.mace import Interaction, MACEConfig

CUTOFF = 4.0
SPECIES = (13, 29)


def labelled(atoms: Atoms, name: str) -> Structure:
    atoms = atoms.copy()
    atoms.calc = MorsePotential(epsilon=0.3, r0=2.6, rho0=4.0)
    structure = Structure.from_atoms(atoms, name)
    stress = None
    if all(atoms.pbc):
        stress = atoms.get_stress(voigt=False)
    return dataclasses.replace(
        structure,
        energy=float(atoms.get_potential_energy()),
        forces=atoms.get_forces(),
        stress=stress,
    )


def make_structures(count: int, seed: int = 0) -> list[Structure]:
    rng = np.random.default_rng(seed)
    structures = []
    for index in range(count):
        if index % 3:
            size = int(rng.integers(2, 6))
            atoms = Atoms(rng.choice(SPECIES, size), 2.6 * np.arange(size)[:, None] * np.eye(3)[:1])
            atoms.positions += rng.normal(0, 0.3, (size, 3))
        else:
            atoms = bulk("Al", "fcc", a=4.0, cubic=True)
            atoms.numbers[0] = 29
            atoms.positions += rng.normal(0, 0.1, (4, 3))
        structures.append(labelled(atoms, f"morse[{index}]"))
    return structures


def tiny_model(seed: int = 0):
    config = MACEConfig(
        atomic_numbers=SPECIES,
        cutoff=CUTOFF,
        avg_num_neighbors=6.0,
        channels=4,
        hidden_l_max=1,
        l_max=1,
        correlation=2,
        interactions=(Interaction.REAL_AGNOSTIC_RESIDUAL,),
        radial_widths=(8,),
        num_bessel=4,
        readout_channels=4,
    )
    return config.build(rngs=nnx.Rngs(seed))


def frames_of(structures):
    return [make_frame(structure, CUTOFF, SPECIES) for structure in structures]


def packing_for(frames, batch_size: int = 3) -> Packing:
    nodes = batch_size * sum(f.num_nodes for f in frames) // len(frames)
    return Packing(Budget.of(frames, nodes=nodes, graphs=2 * batch_size), np.zeros(len(SPECIES)))


@contextlib.contextmanager
def every_step(see):
    """Within it, ``see`` is given the report of each training step before the loop uses it."""
    accumulate = loop._accumulate

    def observed(progress, report, frames):
        see(report)
        accumulate(progress, report, frames)

    loop._accumulate = observed
    try:
        yield
    finally:
        loop._accumulate = accumulate


@contextlib.contextmanager
def losses_written(file, pause=0.0):
    """Within it, each step's loss is a line of ``file``, to the bit, also when the run is killed;
    then a pause [s]."""
    with open(file, "a") as losses:

        def see(report):
            losses.write(f"{np.asarray(report.loss).tobytes().hex()}\n")
            losses.flush()
            time.sleep(pause)

        with every_step(see):
            yield


@pytest.fixture(scope="session")
def base():
    """A potential that knows nothing but its own opinion, which is what may be forgotten."""
    from equizoo.eval.potential import Potential  # which processes that only train do without

    return Potential(
        tiny_model(),
        reference_energies=dict(zip(SPECIES, (-1.0, -2.0), strict=True)),
        energy_reference=EnergyReference.TOTAL,
        level_of_theory="tiny",
        name="tiny",
    )


@pytest.fixture(scope="session")
def frames():
    return frames_of(make_structures(24))
