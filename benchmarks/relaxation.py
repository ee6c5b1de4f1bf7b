"""How much faster is relaxing in batches than one by one with ASE, and does it end at the same?

    equizoo train benchmarks/relaxation_model.json --out DIR   # a model of all its elements: 4 min
    python benchmarks/relaxation.py DIR/model --out results/relaxation.csv --form compiled

Relaxes the initial structures of the 23 relaxations of `oc20_relax` (found by EQUIZOO_DATA) twice
each way, with the same model, L-BFGS, fmax and limit of steps; times are those of the second pass,
when everything is compiled. A row: seconds of both, their ratio, force calls of both, and the part
of systems whose energies agree within 5 meV.
"""

import csv
import dataclasses
import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import ase
import jax
import numpy as np
import tyro
from ase.constraints import FixAtoms
from ase.optimize import LBFGS as OneByOne

import equizoo
from equizoo.data.datasets import load_dataset
from equizoo.eval.optimizers import LBFGS
from equizoo.eval.relax import Relaxer
from equizoo.structure import Structure

AGREE = 0.005  # [eV]


def one_by_one(
    potential: Any, structures: list[Structure], fmax: float, steps: int, dtype: str
) -> tuple[list[float], int]:
    """Energies [eV] and force calls by ASE."""
    energies, calls = [], 0
    calculator = potential.calculator(dtype)
    for structure in structures:
        atoms = structure.to_atoms()
        atoms.set_constraint(FixAtoms(np.flatnonzero(structure.info["fixed"])))
        atoms.calc = calculator
        run = OneByOne(atoms, logfile=None)
        run.run(fmax=fmax, steps=steps)
        energies.append(float(atoms.get_potential_energy()))
        calls += run.nsteps + 1
    return energies, calls


def batched(relaxer: Relaxer, structures: list[Structure]) -> tuple[list[float], int]:
    """Energies [eV] and force calls in batches."""
    results = relaxer(structures)
    return [r.energy for r in results], sum(r.steps + 1 for r in results)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """The result of the second call, and its seconds."""
    function()
    begin = time.perf_counter()
    result = function()
    return result, time.perf_counter() - begin


def main(
    name: tyro.conf.Positional[str],
    out: Path,
    fmax: float = 0.05,
    steps: int = 200,
    dtype: str = "float32",
    batch_nodes: int = 512,
    skin: float | None = None,
    lanes: int | None = None,
    systems: int | None = None,
    form: Literal["plain", "native", "compiled"] = "plain",
) -> None:
    """Relax the sample both ways; adds a row to OUT.

    Args:
        name: a model that knows the elements of the sample; systems with others are left out.
        out: CSV file.
        fmax: in eV/Å.
        steps: at most.
        dtype: float32 or float64.
        batch_nodes: atoms in a batch.
        skin: in Å; by default that of the device.
        lanes: batches under way at once; by default that of the device.
        systems: only the first ones.
        form: of the model, both ways: as it is, with kernels=native, or the inference form.
    """
    potential = equizoo.load(name)
    if form == "native":
        potential = potential.with_kernels("native")
    if form == "compiled":
        potential = potential.compile()
    known = set(potential.config.atomic_numbers)
    structures = [
        dataclasses.replace(s, energy=None)
        for s in load_dataset("oc20_relax/is2re_train").structures
        if set(s.atomic_numbers.tolist()) <= known
    ][:systems]
    relaxer = Relaxer(
        potential,
        optimizer=LBFGS(),
        fmax=fmax,
        max_steps=steps,
        dtype=dtype,
        batch_nodes=batch_nodes,
        skin=skin,
        lanes=lanes,
    )
    (theirs, their_calls), their_seconds = timed(
        lambda: one_by_one(potential, structures, fmax, steps, dtype)
    )
    (ours, our_calls), our_seconds = timed(lambda: batched(relaxer, structures))
    agree = np.abs(np.array(ours) - np.array(theirs)) < AGREE
    row = {
        "date": datetime.date.today().isoformat(),
        "model": potential.name,
        "form": form,
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "ase": ase.__version__,
        "dtype": dtype,
        "fmax_eV_per_A": fmax,
        "max_steps": steps,
        "batch_nodes": batch_nodes,
        "skin_A": relaxer.skin,
        "lanes": relaxer.lanes,
        "systems": len(structures),
        "atoms": sum(s.num_nodes for s in structures),
        "ase_seconds": round(their_seconds, 2),
        "batched_seconds": round(our_seconds, 2),
        "speedup": round(their_seconds / our_seconds, 3),
        "ase_force_calls": their_calls,
        "batched_force_calls": our_calls,
        "within_5_meV": round(float(agree.mean()), 3),
    }
    new = not out.exists()
    with open(out, "a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(row)


if __name__ == "__main__":
    tyro.cli(main)
