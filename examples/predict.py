"""Energies and forces from a released model, for one molecule, for many, and through ASE."""

from ase.build import molecule
from ase.optimize import BFGS

import equizoo

potential = equizoo.load("mace-3bpa")

acetamide = molecule("CH3CONH2")
result = potential.predict(acetamide)
print(f"acetamide: {result.energy:.3f} eV, forces on its first atoms in eV/Å:")
print(result.forces[:3].round(3))

names = ["CH3OH", "HCOOH", "H3CNH2", "CH3CONH2"]
for name, one in zip(names, potential.predict([molecule(name) for name in names]), strict=True):
    print(f"{name:10s} {one.energy:12.3f} eV")

acetamide.calc = potential.calculator()  # float32; dtype="float64" for vibrations and long dynamics
BFGS(acetamide, logfile=None).run(fmax=0.05, steps=30)
print(f"relaxed: {acetamide.get_potential_energy():.3f} eV")
