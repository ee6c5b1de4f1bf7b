"""Makes the data set ``mace-3bpa/replay``: molecules of the kind mace-3bpa saw, sampled by
its own molecular dynamics and labelled with its own predictions, so that forgetting can be measured
without shipping anybody's data.

``python examples/make_replay.py OUT.xyz.xz``; needs the data set ``3bpa/train_300K`` (or its
download) for one starting geometry, which is relaxed and then forgotten by the dynamics.
"""

import dataclasses
from pathlib import Path

import numpy as np
import tyro
from ase import units
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.optimize import BFGS

import equizoo
from equizoo.data.datasets import load_dataset
from equizoo.data.readers import write_structures
from equizoo.structure import Structure


def make_replay(
    out: tyro.conf.Positional[Path],
    model: str = "mace-3bpa",
    frames: int = 60,
    stride: int = 40,
    equilibration: int = 1000,
    temperature: float = 300.0,
    timestep: float = 1.0,
    seed: int = 0,
) -> None:
    """Sample and label.

    Args:
        out: extxyz file to write; must not exist.
        model: model that moves and labels the atoms.
        frames: how many to keep.
        stride: steps between them.
        equilibration: steps before the first.
        temperature: of the Langevin thermostat [K].
        timestep: [fs].
        seed: of velocities and thermostat.
    """
    potential = equizoo.load(model)
    atoms = load_dataset("3bpa/train_300K", index=":1").structures[0].to_atoms()
    atoms.calc = potential.calculator()
    BFGS(atoms, logfile=None).run(fmax=0.05, steps=200)
    rng = np.random.default_rng(seed)
    MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=rng)
    dynamics = Langevin(
        atoms, timestep * units.fs, temperature_K=temperature, friction=0.02 / units.fs, rng=rng
    )
    dynamics.run(equilibration)
    kept = []
    for index in range(frames):
        dynamics.run(stride)
        structure = Structure.from_atoms(atoms, f"replay[{index}]")
        structure = dataclasses.replace(structure, cell=np.zeros((3, 3)))
        kept.append(potential.predict(structure).label(structure))
    write_structures(out, kept)


if __name__ == "__main__":
    tyro.cli(make_replay)
