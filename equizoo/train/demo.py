"""The main job, shown end to end on a CPU and offline: what ``equizoo demo`` runs."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from ase import units
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.md.verlet import VelocityVerlet
from rich.console import Console
from rich.table import Table

from equizoo.data.datasets import load_dataset
from equizoo.data.reference_energies import RefitFromModel
from equizoo.eval.evaluate import evaluate
from equizoo.eval.potential import Potential, load
from equizoo.registry import MODELS, list_models, shown_elements
from equizoo.train.finetune import finetune
from equizoo.train.finetune_settings import FinetuneSettings
from equizoo.train.recipe import DataConfig

MODEL = "mace-3bpa"
NEW = "formamide"  # a molecule that is in none of the training sets
OLD = "mace-3bpa/replay"
STEPS, TIMESTEP, TEMPERATURE = 200, 0.5, 300.0  # NVE: number, [fs], [K]


def run(folder: Path, epochs: int, console: Console) -> dict[str, Any]:
    """Runs the seven parts, tells the console, and returns the figures.

    Raises ``ValueError`` when ``folder`` exists.
    """
    if folder.exists():
        raise ValueError(
            f"The output folder {folder} exists; remove it, or choose --out elsewhere."
        )
    started = time.monotonic()

    console.rule("1. The zoo")
    for entry in list_models():
        size = "" if entry.parameters is None else f"{entry.parameters:,} parameters, "
        console.print(
            f"{entry.name}: {entry.architecture}, {shown_elements(entry.elements)}, {size}"
            f"{entry.level_of_theory}, {entry.source}"
        )

    console.rule(f"2. Load {MODEL} by name")
    potential = load(MODEL)
    _print_card(console, potential)

    console.rule(f"3. Evaluate it on {NEW}, which it was not made for")
    test = load_dataset(f"{NEW}/test")
    untouched = dict(evaluate(potential, test).metrics)
    console.print(
        f"{len(test)} frames at {test.level_of_theory}: forces are off by "
        f"{untouched['forces_rmse_meV_per_A']:.0f} meV/Å (RMSE). Total energies are of another "
        "level of theory, so they differ by a constant per element; fine-tuning refits that first."
    )

    console.rule("4. Fine-tune it there")
    tuned = finetune(
        potential,
        DataConfig(
            train=f"{NEW}/train",
            num_valid=40,
            test=(f"{NEW}/test",),
            reference_energies=RefitFromModel(),
        ),
        folder,
        training=FinetuneSettings(epochs=epochs),
        old=(OLD,),
        name=f"{MODEL}-{NEW}",
    )
    if tuned is None:
        raise KeyboardInterrupt

    console.rule("5. Errors before and after, on the new data and on the old")
    _print_errors(console, tuned.before, tuned.after)
    console.print(
        f"{OLD} are molecules of the old kind labelled by {MODEL} itself, so 'before' is zero up "
        "to rounding and 'after' is what was forgotten."
    )

    console.rule("6. Written")
    for name in ("parity.png", "learning_curve.png", "model"):
        console.print(str(folder / name), soft_wrap=True)

    console.rule(f"7. Load the folder back and run {STEPS} steps of NVE")
    drift = nve_drift(load(folder / "model"), test.structures[0].to_atoms())
    console.print(
        f"{STEPS} steps of {TIMESTEP} fs from {TEMPERATURE:.0f} K in float32: energy drifts by "
        f"{drift['drift_meV_per_atom_per_ps']:+.3f} meV/atom/ps, fluctuates by "
        f"{drift['fluctuation_meV_per_atom']:.3f} meV/atom"
    )
    seconds = time.monotonic() - started
    console.print(f"done in {seconds:.0f} s")
    return {
        "model": MODEL,
        "untouched": untouched,
        "before": tuned.before,
        "after": tuned.after,
        "nve": drift,
        "folder": str(folder),
        "seconds": seconds,
    }


def nve_drift(potential: Potential, atoms: Any) -> dict[str, float]:
    """Drift (slope of a line) and fluctuation of the total energy in a short NVE run."""
    atoms = atoms.copy()
    atoms.calc = potential.calculator()
    MaxwellBoltzmannDistribution(atoms, temperature_K=TEMPERATURE, rng=np.random.default_rng(0))
    Stationary(atoms)
    dynamics = VelocityVerlet(atoms, timestep=TIMESTEP * units.fs)
    energies = []
    dynamics.attach(lambda: energies.append(atoms.get_total_energy()))
    dynamics.run(STEPS)
    per_atom = 1e3 * np.array(energies) / len(atoms)
    picoseconds = 1e-3 * TIMESTEP * np.arange(len(per_atom))
    slope, offset = np.polyfit(picoseconds, per_atom, 1)
    return {
        "drift_meV_per_atom_per_ps": float(slope),
        "fluctuation_meV_per_atom": float(np.std(per_atom - slope * picoseconds - offset)),
        "steps": STEPS,
        "timestep_fs": TIMESTEP,
    }


def _print_card(console: Console, potential: Potential) -> None:
    entry = MODELS[potential.name]
    facts = potential.describe()
    console.print(
        f"{facts['architecture']} for {' '.join(facts['elements'])}, {facts['parameters']:,} "
        f"parameters, cutoff {facts['cutoff_A']} Å, {facts['level_of_theory']}, "
        f"{facts['energy_reference']} energies, invariant under {facts['symmetry']}; weights "
        f"{entry.license_weights}, trained {entry.training_hours} h on {entry.training_hardware}"
    )
    for row in entry.metrics:
        console.print(
            f"{row['dataset']} {row['split']}: energy RMSE {row['energy_rmse_meV']:.1f} meV, force "
            f"RMSE {row['forces_rmse_meV_per_A']:.1f} meV/Å"
        )


def _print_errors(console: Console, before: Any, after: Any) -> None:
    table = Table("data", "", "E RMSE\nmeV/atom", "F MAE\nmeV/Å", "F RMSE\nmeV/Å")
    for dataset in before:
        for stage, metrics in (("before", before[dataset]), ("after", after[dataset])):
            table.add_row(
                dataset,
                stage,
                f"{metrics['energy_rmse_meV_per_atom']:.2f}",
                f"{metrics['forces_mae_meV_per_A']:.1f}",
                f"{metrics['forces_rmse_meV_per_A']:.1f}",
            )
    console.print(table)
