"""Makes the data set that ships with the package: formamide, PBE/def2-SVP, thermal distortions.

The molecule is relaxed, its normal modes come from central differences of the forces, and every
frame is a classical thermal displacement along them, turned by a random rotation and labelled with
energy and forces. Isolated atoms at the same level give the reference energies. The result in
``equizoo/bundled/datasets/formamide_pbe_def2svp`` was made with the default options:

    pip install "pyscf>=2.14"
    python examples/make_dataset.py --output formamide_pbe_def2svp --work /tmp/formamide_work

Every finished frame is appended to ``<work>/frames.jsonl`` at once, so a run that was stopped goes
on where it was; the same command again only writes the files anew. A frame depends on the seed, its
split and its number alone, so a longer data set contains the shorter one. Each calculation uses one
thread, because the order of a sum changes the last digits.

The script is also a worked example: replace ``START``, ``BONDS`` and ``mean_field`` to sample
another small molecule. The package itself never imports PySCF.
"""

import dataclasses
import json
import lzma
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import tyro
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from jaxtyping import Float
from scipy.linalg import null_space
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

START = Atoms(  # [Å] rough and deliberately not planar, so that a planar minimum is a finding
    "CONHHH",
    [
        [0.00, 0.00, 0.00],
        [1.21, 0.00, 0.00],
        [-0.70, 1.17, 0.00],
        [-0.63, -0.92, 0.00],
        [-0.17, 2.03, 0.06],
        [-1.71, 1.19, 0.09],
    ],
)
BONDS = np.array([[0, 1], [0, 2], [0, 3], [2, 4], [2, 5]])  # C=O, C-N, C-H, N-H, N-H
UNPAIRED = {"H": 1, "C": 2, "N": 3, "O": 2}  # electrons in the ground state of the isolated atom
SPLITS = ("train", "test")  # the position is part of a frame's seed

XC, BASIS, GRID_LEVEL = "pbe", "def2-svp", 4
CONV_TOL, CONV_TOL_GRAD = 1e-10, 1e-6  # [Ha]; the second sets the error of the forces
HESSIAN_STEP = 0.01  # [Å]
CHECK_STEP = 0.005  # [Å] five-point stencil: truncation and energy noise are below 1e-6 eV/Å
MAX_FORCE = 1e-4  # [eV/Å] at the minimum
TRAIN_TEMPERATURES = (300.0, 600.0)  # [K] uniform between
TEST_TEMPERATURES = (300.0, 600.0)  # [K] alternating
MIN_WAVENUMBER = 300.0  # [1/cm] softer modes are drawn as if they were this stiff
MAX_STRETCH = 0.25  # of a bond, either way, relative to the minimum
MAX_ENERGY = 2.5  # [eV] above the minimum
DECIMALS = 8  # of positions [Å] (before the calculation), energies [eV] and forces [eV/Å]


@dataclasses.dataclass(frozen=True)
class Options:
    """Makes the bundled formamide data set (PBE/def2-SVP, needs PySCF)."""

    output: Path
    """Folder to write: train.xyz.xz, test.xyz.xz, isolated_atoms.xyz, README.md."""
    work: Path
    """Folder for finished calculations; a stopped run goes on from here."""
    train: int = 400
    """Number of training frames."""
    test: int = 150
    """Number of test frames."""
    seed: int = 20240607
    """Seed of all random draws."""
    workers: int = 2
    """Processes, one thread each."""


@dataclasses.dataclass(frozen=True)
class Minimum:
    """The relaxed molecule and its harmonic vibrations."""

    positions: Float[np.ndarray, "nodes 3"]  # [Å] centre of mass at the origin
    energy: float  # [eV]
    curvatures: Float[np.ndarray, " modes"]  # [eV/(Å^2 u)] of the mass-weighted Hessian, ascending
    modes: Float[np.ndarray, "modes nodes 3"]  # orthonormal, mass-weighted


# --- Electronic structure -------------------------------------------------------------------------


def mean_field(atoms: Atoms, unpaired: int, level: int, conv_tol: float) -> Any:
    """A Kohn-Sham object with density fitting: restricted for closed shells, else unrestricted."""
    from pyscf import dft, gto, lib

    lib.num_threads(1)
    molecule = gto.M(
        atom=list(zip(atoms.symbols, atoms.positions / units.Bohr, strict=True)),
        unit="Bohr",  # so that ASE's constants are the only ones
        basis=BASIS,
        spin=unpaired,
        verbose=0,
    )
    solver = (dft.UKS if unpaired else dft.RKS)(molecule, xc=XC).density_fit()
    solver.grids.level = level
    solver.conv_tol = conv_tol
    return solver


def converged(atoms: Atoms) -> Any:
    """A converged closed-shell Kohn-Sham object; a coarse grid supplies the starting density.

    Raises ``RuntimeError`` when the self-consistent field does not converge.
    """
    coarse = mean_field(atoms, 0, level=1, conv_tol=1e-6)
    coarse.kernel()
    fine = mean_field(atoms, 0, GRID_LEVEL, CONV_TOL)
    fine.conv_tol_grad = CONV_TOL_GRAD
    fine.with_df = coarse.with_df
    fine.kernel(dm0=coarse.make_rdm1())
    if not fine.converged:
        raise RuntimeError(f"SCF did not converge for {atoms.symbols} at\n{atoms.positions}")
    return fine


def total_energy(atoms: Atoms) -> float:
    """Energy [eV] of the closed-shell molecule."""
    return float(converged(atoms).e_tot) * units.Hartree


def energy_and_forces(atoms: Atoms) -> tuple[float, Float[np.ndarray, "nodes 3"]]:
    """Energy [eV] and forces [eV/Å], its exact derivative: the grid's motion is included."""
    solver = converged(atoms)
    gradient = solver.nuc_grad_method()
    gradient.grid_response = True
    forces = -np.asarray(gradient.kernel()) * (units.Hartree / units.Bohr)
    return float(solver.e_tot) * units.Hartree, forces


def atom_energy(symbol: str) -> float:
    """Energy [eV] of an isolated atom, followed down until its orbitals are internally stable.

    Second-order SCF, because degenerate p orbitals keep the ordinary iteration turning. Raises
    ``RuntimeError`` when no stable solution is found in five attempts.
    """
    solver = mean_field(Atoms(symbol), UNPAIRED[symbol], GRID_LEVEL, CONV_TOL).newton()
    solver.conv_tol_grad = CONV_TOL_GRAD
    solver.kernel()
    for _ in range(5):
        orbitals, _, stable, _ = solver.stability(return_status=True)
        if stable and solver.converged:
            return float(solver.e_tot) * units.Hartree
        solver.kernel(orbitals, solver.mo_occ)
    raise RuntimeError(f"No converged, internally stable solution for the atom {symbol}.")


# --- Minimum and normal modes ---------------------------------------------------------------------


def moved(positions: Float[np.ndarray, "nodes 3"]) -> Atoms:
    atoms = START.copy()
    atoms.positions = positions
    return atoms


def relax() -> tuple[float, Float[np.ndarray, "nodes 3"]]:
    """Energy [eV] and positions [Å] of the minimum, centre of mass at the origin."""

    def objective(flat):
        energy, forces = energy_and_forces(moved(flat.reshape(-1, 3)))
        return energy, -forces.ravel()

    options = {"gtol": MAX_FORCE}
    result = minimize(objective, START.positions.ravel(), jac=True, method="BFGS", options=options)
    if np.abs(result.jac).max() > MAX_FORCE:
        raise RuntimeError(f"Relaxation stopped early: {result.message}")
    atoms = moved(result.x.reshape(-1, 3))
    return float(result.fun), atoms.positions - atoms.get_center_of_mass()


def displacements(positions: Float[np.ndarray, "nodes 3"], steps: Sequence[float]) -> list[Atoms]:
    """The molecule with each coordinate moved by each of the ``steps`` [Å]; steps vary fastest."""
    unit_moves = np.eye(positions.size).reshape(-1, *positions.shape)
    return [moved(positions + step * move) for move in unit_moves for step in steps]


def rigid_motions(
    positions: Float[np.ndarray, "nodes 3"], masses: Float[np.ndarray, " nodes"]
) -> Float[np.ndarray, "coordinates 6"]:
    """Mass-weighted translations and rotations about the origin, not normalised."""
    motions = [np.broadcast_to(axis, positions.shape) for axis in np.eye(3)]
    motions += [np.cross(axis, positions) for axis in np.eye(3)]
    return np.stack([(np.sqrt(masses)[:, None] * m).ravel() for m in motions], axis=1)


def find_minimum(pool: Executor) -> Minimum:
    """The relaxed molecule and its vibrations, translations and rotations projected out."""
    energy, positions = pool.submit(relax).result()
    labels = pool.map(energy_and_forces, displacements(positions, (-HESSIAN_STEP, HESSIAN_STEP)))
    forces = np.stack([f.ravel() for _, f in labels]).reshape(positions.size, 2, -1)
    hessian = (forces[:, 0] - forces[:, 1]) / (2 * HESSIAN_STEP)
    masses = START.get_masses()
    weights = np.repeat(masses**-0.5, 3)
    hessian = weights[:, None] * (hessian + hessian.T) / 2 * weights
    internal = null_space(rigid_motions(positions, masses).T)
    curvatures, vectors = np.linalg.eigh(internal.T @ hessian @ internal)
    modes = (internal @ vectors).T
    largest = np.take_along_axis(modes, np.abs(modes).argmax(axis=1)[:, None], axis=1)
    modes = modes * np.sign(largest)  # an eigenvector's sign is arbitrary: fix it
    return Minimum(positions, energy, curvatures, modes.reshape(len(modes), -1, 3))


def wavenumbers(curvatures: Float[np.ndarray, " modes"]) -> Float[np.ndarray, " modes"]:
    """Harmonic wavenumbers [1/cm]; imaginary ones are returned as negative numbers."""
    hbar = units._hbar * 1e10 / np.sqrt(units._e * units._amu)  # [eV] per sqrt(eV/Å^2/u)
    return np.sign(curvatures) * hbar * np.sqrt(np.abs(curvatures)) / units.invcm


def harmonic_mean(temperature: float) -> float:
    """Mean potential energy [eV] of the classical harmonic molecule: kT/2 for each mode."""
    return (START.positions.size - 6) * units.kB * temperature / 2


# --- Sampling -------------------------------------------------------------------------------------


def temperature_of(split: str, index: int, rng: np.random.Generator) -> float:
    if split == "train":
        return float(np.round(rng.uniform(*TRAIN_TEMPERATURES), 1))
    return TEST_TEMPERATURES[index % len(TEST_TEMPERATURES)]


def draw(
    minimum: Minimum, temperature: float, rng: np.random.Generator
) -> Float[np.ndarray, "nodes 3"]:
    """Positions [Å] from the classical harmonic distribution, randomly rotated and rounded.

    Each mass-weighted normal coordinate is normal with variance kT / curvature.
    """
    floor = minimum.curvatures[-1] * (MIN_WAVENUMBER / wavenumbers(minimum.curvatures)[-1]) ** 2
    width = np.sqrt(units.kB * temperature / np.maximum(minimum.curvatures, floor))
    amplitudes = width * rng.normal(size=width.shape)
    weighted = np.tensordot(amplitudes, minimum.modes, axes=1)
    positions = minimum.positions + weighted / np.sqrt(START.get_masses())[:, None]
    rotation = Rotation.from_quat(rng.normal(size=4))
    return np.round(rotation.apply(positions), DECIMALS)


def largest_stretch(
    positions: Float[np.ndarray, "nodes 3"], minimum: Float[np.ndarray, "nodes 3"]
) -> float:
    """Largest relative change of a bond length."""
    length, relaxed = (
        np.linalg.norm(p[BONDS[:, 0]] - p[BONDS[:, 1]], axis=1) for p in (positions, minimum)
    )
    return float(np.abs(length / relaxed - 1).max())


def make_frame(minimum: Minimum, seed: int, split: str, index: int) -> dict[str, Any]:
    """One accepted frame as JSON data, with the number of draws refused before it."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    temperature = temperature_of(split, index, rng)
    start = time.perf_counter()
    refused = 0
    while True:
        positions = draw(minimum, temperature, rng)
        if largest_stretch(positions, minimum.positions) <= MAX_STRETCH:
            energy, forces = energy_and_forces(moved(positions))
            if energy - minimum.energy <= MAX_ENERGY:
                break
        refused += 1
    return {
        "split": split,
        "index": index,
        "temperature": temperature,
        "refused": refused,
        "seconds": time.perf_counter() - start,
        "energy": energy,
        "positions": positions.tolist(),
        "forces": forces.tolist(),
    }


def check_forces(pool: Executor, frame: dict[str, Any]) -> float:
    """Largest difference [eV/Å] of a frame's forces from five-point differences of its energy."""
    steps = [CHECK_STEP * step for step in (-2.0, -1.0, 1.0, 2.0)]
    energies = pool.map(total_energy, displacements(np.array(frame["positions"]), steps))
    stencil = np.array([1.0, -8.0, 8.0, -1.0]) / (12 * CHECK_STEP)
    derivative = np.array(list(energies)).reshape(-1, 4) @ stencil
    return float(np.abs(derivative + np.array(frame["forces"]).ravel()).max())


# --- Work folder ----------------------------------------------------------------------------------


def read_frames(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Finished frames by split and number; a last line cut short by a kill is ignored."""
    frames = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            frame = json.loads(line)
        except json.JSONDecodeError:
            continue
        frames[frame["split"], frame["index"]] = frame
    return frames


def settings(seed: int) -> dict[str, Any]:
    """What a finished calculation depends on; a work folder made with other values is refused."""
    values = {
        "seed": seed,
        "start": START.positions.tolist(),
        "xc": XC,
        "basis": BASIS,
        "grid_level": GRID_LEVEL,
        "conv_tol": CONV_TOL,
        "conv_tol_grad": CONV_TOL_GRAD,
        "hessian_step": HESSIAN_STEP,
        "check_step": CHECK_STEP,
        "min_wavenumber": MIN_WAVENUMBER,
        "max_stretch": MAX_STRETCH,
        "max_energy": MAX_ENERGY,
        "train_temperatures": TRAIN_TEMPERATURES,
        "test_temperatures": TEST_TEMPERATURES,
        "decimals": DECIMALS,
    }
    return json.loads(json.dumps(values))  # as it reads back: tuples become lists


def cached(path: Path, compute: Callable[[], Any]) -> Any:
    """The JSON value stored at ``path``, computed and stored first if it is not there."""
    if not path.exists():
        value = compute()
        path.with_suffix(".tmp").write_text(json.dumps(value))
        path.with_suffix(".tmp").replace(path)
    return json.loads(path.read_text())


def compute_frames(pool: Executor, minimum: Minimum, options: Options) -> list[dict[str, Any]]:
    """All frames, training first, each appended to the work file as soon as it is finished."""
    path = options.work / "frames.jsonl"
    frames = read_frames(path)
    wanted = [("test", i) for i in range(options.test)]
    wanted += [("train", i) for i in range(options.train)]
    missing = [key for key in wanted if key not in frames]
    tasks = [pool.submit(make_frame, minimum, options.seed, *key) for key in missing]
    with path.open("a") as file:
        file.write("\n")  # closes a line cut short by a kill
        try:
            for done, task in enumerate(as_completed(tasks), start=1):
                frame = task.result()
                file.write(json.dumps(frame) + "\n")
                file.flush()
                frames[frame["split"], frame["index"]] = frame
                if done % 20 == 0 or done == len(tasks):
                    print(f"{done}/{len(tasks)} frames", flush=True)
        finally:
            for task in tasks:
                task.cancel()  # after an error or Ctrl-C, do not work through the rest unrecorded
    return [frames[key] for key in sorted(wanted, key=lambda k: (SPLITS.index(k[0]), k[1]))]


# --- Output ---------------------------------------------------------------------------------------


def to_atoms(frame: dict[str, Any]) -> Atoms:
    atoms = moved(np.array(frame["positions"]))
    atoms.info["temperature"] = frame["temperature"]
    energy = round(frame["energy"], DECIMALS)
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.array(frame["forces"]))
    return atoms


def extxyz(frames: Iterable[Atoms]) -> str:
    buffer = StringIO()
    ase.io.write(buffer, list(frames), format="extxyz")
    return buffer.getvalue()


def isolated_atoms(energies: dict[str, float]) -> list[Atoms]:
    frames = []
    for symbol, energy in energies.items():
        atoms = Atoms(symbol, [[0.0, 0.0, 0.0]])
        atoms.info["config_type"] = "IsolatedAtom"
        atoms.info["multiplicity"] = UNPAIRED[symbol] + 1
        atoms.calc = SinglePointCalculator(atoms, energy=round(energy, DECIMALS))
        frames.append(atoms)
    return frames


def statistics_row(name: str, frames: Sequence[dict[str, Any]], minimum: float) -> str:
    """A row of the README's table: frames, energies above the minimum [eV], forces [eV/Å]."""
    energy = np.array([f["energy"] for f in frames]) - minimum
    forces = np.array([f["forces"] for f in frames])
    numbers = [energy.mean(), energy.std(), energy.min(), energy.max()]
    numbers += [np.sqrt((forces**2).mean()), np.abs(forces).max()]
    return f"| {name} | {len(frames)} | " + " | ".join(f"{x:.3f}" for x in numbers) + " |"


def readme(
    options: Options,
    minimum: Minimum,
    frames: Sequence[dict[str, Any]],
    energies: dict[str, float],
    check: float,
    auxbasis: str,
) -> str:
    """The data set's README, every number taken from the data or from the constants above."""
    groups = {name: [f for f in frames if f["split"] == name] for name in SPLITS}
    for kelvin in TEST_TEMPERATURES:
        group = [f for f in groups["test"] if f["temperature"] == kelvin]
        groups[f"test, {kelvin:g} K"] = group
    rows = [statistics_row(k, group, minimum.energy) for k, group in groups.items() if group]
    atoms = [f"| {s} | {e:.{DECIMALS}f} | {UNPAIRED[s] + 1} |" for s, e in energies.items()]
    forces = np.array([f["forces"] for f in frames])
    torques = np.cross(np.array([f["positions"] for f in frames]), forces).sum(axis=1)
    programs = [f"{name} {version(name)}" for name in ("pyscf", "ase", "numpy", "scipy")]
    modes = ", ".join(f"{w:.0f}" for w in wavenumbers(minimum.curvatures))
    planarity = np.linalg.svd(minimum.positions - minimum.positions.mean(axis=0))[1][-1]
    refused = sum(f["refused"] for f in frames)
    newline = "\n"
    return f"""# formamide_pbe_def2svp

Thermally distorted formamide, HCONH2 (6 atoms), with density-functional energies and forces: small
enough to ship with the package, quick to train on. The molecule is isolated; there are no periodic
images.

| file | content |
|---|---|
| `train.xyz.xz` | {len(groups["train"])} frames, temperatures uniform in \
{TRAIN_TEMPERATURES[0]:g}-{TRAIN_TEMPERATURES[1]:g} K |
| `test.xyz.xz` | {len(groups["test"])} frames, alternately at \
{TEST_TEMPERATURES[0]:g} and {TEST_TEMPERATURES[1]:g} K, drawn independently of the training set |
| `isolated_atoms.xyz` | energies of the atoms H, C, N, O at the same level |

Extended XYZ, readable with `ase.io.read("train.xyz.xz", ":", format="extxyz")`. Keys: `energy`
(total energy of all electrons), `forces`, `temperature` (of the draw). The order of the atoms is
{", ".join(START.symbols)}.

**Units.** Å, eV, eV/Å, K, with Hartree and Bohr as in `ase.units` (CODATA 2014):
1 Ha = {units.Hartree:.9f} eV, 1 Bohr = {units.Bohr:.11f} Å. Positions, energies and forces have
{DECIMALS} decimals; positions were rounded *before* the calculation.

**Level of theory.** PBE/def2-SVP, all electrons, density fitting with PySCF's default auxiliary
basis ({auxbasis}), spin-restricted; PySCF grid level {GRID_LEVEL}; SCF converged to {CONV_TOL:g} Ha
in the energy and {CONV_TOL_GRAD:g} in the orbital gradient. The forces include the response of the
grid. No dispersion correction. The atoms: the same, spin-unrestricted in their ground-state
multiplicity, orbitals internally stable.

**Programs.** {", ".join(programs)}, Python {platform.python_version()}.

**Sampling.** Relaxed to forces below {MAX_FORCE:g} eV/Å (planar: rms distance from the plane
{planarity / np.sqrt(len(START)):.0e} Å); normal modes from central differences of the forces (step
{HESSIAN_STEP:g} Å). Every mass-weighted normal coordinate is drawn from the classical harmonic
distribution, variance kT/curvature; a mode below {MIN_WAVENUMBER:g} 1/cm (the NH2 wag) is drawn as
if it had {MIN_WAVENUMBER:g} 1/cm. Displacements are straight lines in Cartesian coordinates. A draw
is refused when a bond differs from the minimum by more than {MAX_STRETCH:.0%} or when the energy
exceeds the minimum by {MAX_ENERGY:g} eV ({refused} refused in all). Each frame is then rotated at
random. The draws are independent: this is not a trajectory, and not the canonical ensemble. The
temperature is a label of the draw: energies are on average higher than the harmonic
{harmonic_mean(TEST_TEMPERATURES[0]):.3f} eV at {TEST_TEMPERATURES[0]:g} K and \
{harmonic_mean(TEST_TEMPERATURES[1]):.3f} eV at {TEST_TEMPERATURES[1]:g} K, mostly because a large
NH2 wag along a straight line also stretches the N-H bonds. One molecule near its minimum, no
dissociation, no other conformer: a model trained on it knows nothing else.

Harmonic wavenumbers [1/cm]: {modes}.

**Statistics.** Energies [eV] above the minimum ({minimum.energy:.{DECIMALS}f} eV); force components
[eV/Å].

| frames | number | energy mean | std | min | max | force rms | max |
|---|---|---|---|---|---|---|---|
{newline.join(rows)}

**Checks.** Forces of the first training frame against five-point differences of the energy (step
{CHECK_STEP:g} Å, all {minimum.positions.size} coordinates): largest difference {check:.1e} eV/Å.
It is the finite convergence of the SCF: with an orbital gradient of 1e-8 the two agreed within
1e-6 eV/Å on the three coordinates tried. Largest net force of any frame:
{np.abs(forces.sum(axis=1)).max():.1e} eV/Å. Largest net torque: {np.abs(torques).max():.1e} eV (the
grid is not exactly rotation invariant). Other starting densities gave the oxygen atom an energy at
most 3e-5 eV lower, and the carbon atom the same.

| atom | energy [eV] | multiplicity |
|---|---|---|
{newline.join(atoms)}

**Licence.** CC0-1.0, https://creativecommons.org/publicdomain/zero/1.0/. Computed by the authors of
equizoo, who waive all rights; no data of others went into it.

**Regenerate.** With PySCF installed,

    python examples/make_dataset.py --output DIR --work DIR \\
        --train {len(groups["train"])} --test {len(groups["test"])} --seed {options.seed}

writes this folder, this file included. The draws are fixed by the seed; the last digits vary with
the processor and the linear-algebra library.
"""


def auxiliary_basis() -> str:
    """Name of the density-fitting basis that PySCF chooses."""
    from pyscf.df.addons import make_auxbasis

    chosen = make_auxbasis(mean_field(START, 0, GRID_LEVEL, CONV_TOL).mol)
    return ", ".join(sorted({str(name) for name in chosen.values()}))


def main(options: Options) -> None:
    """Computes what the work folder does not hold yet, then writes the output folder."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # inherited by the workers, which do all the numerical work
    options.work.mkdir(parents=True, exist_ok=True)
    options.output.mkdir(parents=True, exist_ok=True)
    wanted = settings(options.seed)
    if cached(options.work / "settings.json", lambda: wanted) != wanted:
        raise ValueError(
            f"{options.work} was made with other settings (see settings.json). Choose an empty "
            "--work folder, or restore the seed and constants it was made with."
        )

    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=spawn) as pool:
        stored = cached(
            options.work / "minimum.json",
            lambda: {k: np.asarray(v).tolist() for k, v in vars(find_minimum(pool)).items()},
        )
        minimum = Minimum(
            positions=np.array(stored["positions"]),
            energy=stored["energy"],
            curvatures=np.array(stored["curvatures"]),
            modes=np.array(stored["modes"]),
        )
        print("wavenumbers [1/cm]:", wavenumbers(minimum.curvatures).round(), flush=True)
        energies = cached(
            options.work / "atoms.json",
            lambda: dict(zip(UNPAIRED, pool.map(atom_energy, UNPAIRED), strict=True)),
        )
        print("atoms [eV]:", energies, flush=True)
        frames = compute_frames(pool, minimum, options)
        first = next(f for f in frames if f["split"] == "train")
        check = cached(options.work / "check.json", lambda: check_forces(pool, first))
        auxbasis = pool.submit(auxiliary_basis).result()

    for split in SPLITS:
        text = extxyz(to_atoms(f) for f in frames if f["split"] == split)
        packed = lzma.compress(text.encode(), preset=9)
        (options.output / f"{split}.xyz.xz").write_bytes(packed)
    (options.output / "isolated_atoms.xyz").write_text(extxyz(isolated_atoms(energies)))
    text = readme(options, minimum, frames, energies, check, auxbasis)
    (options.output / "README.md").write_text(text)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main(tyro.cli(Options))
