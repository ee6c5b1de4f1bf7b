"""Puts what a potential claims to the test: symmetry, derivatives, precision, dynamics.

Every check measures, and holds what the architecture claims to a limit. What it does not claim
(mirror symmetry of an SO(3) model, a gradient of direct forces) is measured all the same and marked
so; what was left out says why.
"""

import dataclasses
import functools
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import jax
import numpy as np
from ase.data import chemical_symbols
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from equizoo import __version__
from equizoo.compile_cache import uncached
from equizoo.eval.certificate import Certificate, Check, Settings
from equizoo.eval.dynamics import NVE, Langevin, drift, simulate
from equizoo.eval.golden import golden_structures
from equizoo.eval.potential import DTYPES, Potential, Result
from equizoo.structure import Structure, spread
from equizoo.zoo._base import Symmetry

# Largest errors of forces over the largest force. Float64: thousands of roundings of 1e-16, summed.
# Float32: the same, and cancellation inside networks.
EXACT, SINGLE = 1e-9, 1e-3
DIFFERENCES = 1e-5  # finite differences of fourth order, over the largest of their kind
JUMP = 1e-2  # [meV/Å], [meV] of an atom that crosses the cutoff by 1e-4 Å
EXACT_ENERGY, SINGLE_ENERGY = 1e-5, 0.1  # [meV/atom]
DRIFT = 1.0  # [meV/atom/ps], 2.6 % of the kinetic energy at 300 K in a picosecond
CLOSEST, STRETCHED, HOT = 0.6, 1.5, 3.0  # of covalent radii, first bond length, temperature

_STEP = 1e-3  # [Å], and of strain: finite differences
_STENCIL = (-2 * _STEP, -_STEP, _STEP, 2 * _STEP)
_CROSSING = 1e-4  # [Å]
_MANY_ELEMENTS = 10
_LARGE = 64  # atoms, above which a crystal is not doubled


def certify(
    potential: Potential,
    structures: Sequence[Structure] = (),
    *,
    source: str = "",
    sha256: str | None = None,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    progress: Callable[[str], None] = lambda what: None,
) -> Certificate:
    """The certificate of a potential, from its behaviour on some of ``structures``.

    Static checks also use two generated structures, so they run without any; dynamics needs
    structures that the model is made for. ``source`` says where they come from. Raises as
    :meth:`Potential.predict` does.
    """
    # labels would not fit the structures moved, doubled or put in another order
    structures = [dataclasses.replace(s, energy=None, forces=None, stress=None) for s in structures]
    chosen = spread(structures, settings.frames)
    subjects = [*golden_structures(potential.config).values(), *chosen]
    bench = _Bench(potential, subjects, settings)
    replicas = spread(structures, settings.replicas)
    checks: list[Check] = []
    for check in _STATIC:
        progress(check.__name__.strip("_").replace("_", " "))
        checks += check(bench)
    checks += _dynamics(bench, replicas, progress)
    device = jax.devices()[0]
    return Certificate(
        model=potential.name,
        sha256=sha256,
        structures=f"2 generated, {len(chosen)} of {source or 'those given'}"
        if chosen
        else "2 generated",
        settings=dataclasses.replace(settings, timestep=bench.timestep),
        device=f"{device.platform} {device.device_kind} ({platform.machine()})",
        versions={"equizoo": __version__}
        | {name: version(name) for name in ("jax", "flax", "numpy")},
        checks=tuple(checks),
    )


class _Bench:
    """A potential, the structures it is put to the test with, and what it says of them."""

    def __init__(self, potential: Potential, subjects: list[Structure], settings: Settings):
        self.potential, self.subjects, self.settings = potential, subjects, settings
        self.config = potential.config
        self.rng = np.random.default_rng(settings.seed)

    @functools.cached_property
    def results(self) -> dict[str, list[Result]]:
        """Of the subjects as they are, by dtype."""
        return {dtype: self.predict(self.subjects, dtype) for dtype in DTYPES}

    @functools.cached_property
    def largest(self) -> float:
        """The largest force [eV/Å]."""
        return _largest(np.abs(r.forces).max() for r in self.results["float64"]) or 1.0

    @functools.cached_property
    def largest_stress(self) -> float:
        """The largest stress [eV/Å^3]."""
        stresses = [r.stress for r in self.results["float64"] if r.stress is not None]
        return _largest(np.abs(stress).max() for stress in stresses) or 1.0

    @property
    def timestep(self) -> float:  # [fs]
        light = 1 in self.config.atomic_numbers
        given = self.settings.timestep
        return given if given is not None else (0.5 if light else 1.0)

    def predict(self, structures: Sequence[Structure], dtype: str = "float64") -> list[Result]:
        return self.potential.predict(list(structures), dtype=dtype)


def _largest(values: Iterable[float]) -> float:
    """0 if there are none, NaN if one is NaN, which the built-in ``max`` would overlook."""
    return float(np.max([0.0, *values]))


# ---- symmetry ----------------------------------------------------------------------------------

Turn = tuple[Structure, Float[np.ndarray, "3 3"], np.ndarray]  # moved, by what, order of atoms


def _rotation(bench: _Bench) -> Iterator[Check]:
    """Energies stay, forces and stress turn along."""
    how = f"{bench.settings.turns} random rotations of each structure"
    yield _symmetry(bench, "rotation", how, lambda s: _turned(s, _random_rotation(bench.rng)))


def _reflection(bench: _Bench) -> Iterator[Check]:
    how = f"{bench.settings.turns} random rotations with an inversion"
    claimed = bench.config.symmetry is Symmetry.O3
    turn = lambda s: _turned(s, -_random_rotation(bench.rng))  # noqa: E731
    yield _symmetry(bench, "reflection", how, turn, claimed)


def _translation(bench: _Bench) -> Iterator[Check]:
    def moved(s: Structure) -> Turn:
        jumps = bench.rng.integers(-2, 3, (s.num_nodes, 3)) * np.array(s.pbc)
        shift = bench.rng.uniform(-20, 20, (1, 3)) + jumps @ s.cell
        positions = s.positions + shift
        return dataclasses.replace(s, positions=positions), np.eye(3), np.arange(s.num_nodes)

    how = (
        f"{bench.settings.turns} shifts of up to 20 Å along each axis, atoms of crystals moved by "
        "lattice vectors besides"
    )
    yield _symmetry(bench, "translation", how, moved)


def _permutation(bench: _Bench) -> Iterator[Check]:
    def shuffled(s: Structure) -> Turn:
        order = bench.rng.permutation(s.num_nodes)
        numbers, positions = s.atomic_numbers[order], s.positions[order]
        return (
            dataclasses.replace(s, atomic_numbers=numbers, positions=positions),
            np.eye(3),
            order,
        )

    how = f"{bench.settings.turns} random orders of the atoms"
    yield _symmetry(bench, "permutation", how, shuffled)


def _symmetry(
    bench: _Bench, name: str, how: str, turn: Callable[[Structure], Turn], claimed: bool = True
) -> Check:
    turns = [turn(s) for s in bench.subjects for _ in range(bench.settings.turns)]
    values: dict[str, float] = {}
    for dtype in DTYPES:
        base = [r for r in bench.results[dtype] for _ in range(bench.settings.turns)]
        moved = bench.predict([structure for structure, _, _ in turns], dtype)
        forces, energies, stresses = [], [], []
        for before, after, (structure, matrix, order) in zip(base, moved, turns, strict=True):
            expected = before.forces[order] @ matrix.T
            forces.append(np.abs(after.forces - expected).max())
            energies.append(abs(after.energy - before.energy) / structure.num_nodes)
            if before.stress is not None and after.stress is not None:
                difference = after.stress - matrix @ before.stress @ matrix.T
                stresses.append(np.abs(difference).max())
        values |= {
            f"energy_{dtype}_meV_per_atom": 1e3 * _largest(energies),
            f"forces_{dtype}_meV_per_A": 1e3 * _largest(forces),
            f"forces_{dtype}_relative": _largest(forces) / bench.largest,
        }
        if stresses:
            values[f"stress_{dtype}_meV_per_A3"] = 1e3 * _largest(stresses)
            values[f"stress_{dtype}_relative"] = _largest(stresses) / bench.largest_stress
    defect = bench.config.defect
    limits = {
        f"{quantity}_{dtype}_relative": max(allowed, defect)
        for dtype, allowed in (("float64", EXACT), ("float32", SINGLE))
        for quantity in ("forces", "stress")
    } | {
        f"energy_{dtype}_meV_per_atom": max(allowed, 1e3 * defect * bench.largest)
        for dtype, allowed in (("float64", EXACT_ENERGY), ("float32", SINGLE_ENERGY))
    }
    return Check.of(name, values, limits, how, claimed)


def _random_rotation(rng: np.random.Generator) -> Float[np.ndarray, "3 3"]:
    return np.asarray(Rotation.random(random_state=rng).as_matrix())


def _turned(structure: Structure, matrix: Float[np.ndarray, "3 3"]) -> Turn:
    return _mapped(structure, matrix), matrix, np.arange(structure.num_nodes)


def _mapped(structure: Structure, matrix: Float[np.ndarray, "3 3"]) -> Structure:
    return dataclasses.replace(
        structure, positions=structure.positions @ matrix.T, cell=structure.cell @ matrix.T
    )


# ---- derivatives ------------------------------------------------------------------------------


def _derivatives(bench: _Bench) -> Iterator[Check]:
    """Where energies jump at the cutoff, a difference across the jump is no derivative."""
    results = bench.results["float64"]
    claimed = bench.config.conservative and bench.config.smooth
    moved, found = [], []
    for structure, result in zip(bench.subjects, results, strict=True):
        for _ in range(_DIRECTIONS):
            along = _unit(bench.rng.normal(size=(structure.num_nodes, 3)))
            moved += [
                dataclasses.replace(structure, positions=structure.positions + t * along)
                for t in _STENCIL
            ]
            found.append(float(np.sum(result.forces * along)))
    errors = np.abs(_slopes(bench.predict(moved)) + np.array(found))
    yield Check.of(
        "forces are the gradient",
        {"forces_meV_per_A": 1e3 * errors.max(), "forces_relative": errors.max() / bench.largest},
        {"forces_relative": DIFFERENCES},
        f"float64, along {_DIRECTIONS} random directions of each structure, {_FOURTH}",
        claimed,
    )

    name = "stress is the derivative by strain"
    crystals = [
        (structure, result.stress)
        for structure, result in zip(bench.subjects, results, strict=True)
        if result.stress is not None
    ]
    if not crystals:
        yield Check.left_out(name, "the model gives no stress")
        return
    moved, found, volumes = [], [], []
    for structure, stress in crystals:
        for _ in range(_DIRECTIONS):
            strain = bench.rng.normal(size=(3, 3))
            strain = _unit(strain + strain.T)
            moved += [_mapped(structure, np.eye(3) + t * strain) for t in _STENCIL]
            found.append(float(np.sum(stress * strain)))
            volumes.append(abs(float(np.linalg.det(structure.cell))))
    errors = np.abs(_slopes(bench.predict(moved)) / np.array(volumes) - np.array(found))
    yield Check.of(
        name,
        {
            "stress_meV_per_A3": 1e3 * errors.max(),
            "stress_relative": errors.max() / bench.largest_stress,
        },
        {"stress_relative": DIFFERENCES},
        f"float64, along {_DIRECTIONS} random strains of each of {len(crystals)} crystals, "
        f"{_FOURTH}",
        claimed,
    )


_DIRECTIONS = 3
_FOURTH = f"central differences of fourth order with steps of {_STEP}"


def _unit(array: Float[np.ndarray, "rows 3"]) -> Float[np.ndarray, "rows 3"]:
    return array / np.linalg.norm(array)


def _slopes(results: Sequence[Result]) -> Float[np.ndarray, " directions"]:
    """Derivatives at zero, each from the energies at the four points of the stencil."""
    a, b, c, d = np.array([r.energy for r in results]).reshape(-1, 4).T
    return (a - d + 8 * (c - b)) / (12 * _STEP)


# ---- locality ---------------------------------------------------------------------------------


def _cutoff(bench: _Bench) -> Iterator[Check]:
    """An atom that approaches a cluster crosses the cutoff of the outermost atom, and no other."""
    cluster = bench.subjects[0]
    outward = _unit(bench.rng.normal(size=(1, 3)))
    outermost = cluster.positions[int(np.argmax(cluster.positions @ outward[0]))]
    numbers = bench.config.atomic_numbers[:_MANY_ELEMENTS]
    pairs = []
    for number in numbers:
        for distance in (bench.config.cutoff - _CROSSING, bench.config.cutoff + _CROSSING):
            probe = outermost[None] + distance * outward
            pairs.append(
                dataclasses.replace(
                    cluster,
                    atomic_numbers=np.append(cluster.atomic_numbers, number),
                    positions=np.concatenate([cluster.positions, probe]),
                )
            )
    results = bench.predict(pairs)
    steps = list(zip(results[::2], results[1::2], strict=True))
    symbols = " ".join(chemical_symbols[z] for z in numbers)
    yield Check.of(
        "smooth at the cutoff",
        {
            "energy_jump_meV": 1e3 * _largest(abs(a.energy - b.energy) for a, b in steps),
            "force_jump_meV_per_A": 1e3
            * _largest(np.abs(a.forces - b.forces).max() for a, b in steps),
        },
        {"energy_jump_meV": JUMP, "force_jump_meV_per_A": JUMP},
        f"float64, an atom of {symbols} from {_CROSSING} Å within the cutoff of a cluster's "
        f"outermost atom to {_CROSSING} Å beyond",
        bench.config.smooth,
    )


def _size_consistency(bench: _Bench) -> Iterator[Check]:
    """Two molecules far apart are twice the molecule, a doubled cell is twice the crystal."""
    doubled, before = [], []
    for structure, result in zip(bench.subjects, bench.results["float64"], strict=True):
        if not any(structure.pbc):
            reach = np.ptp(structure.positions, axis=0).max() + 2 * bench.config.cutoff
            doubled.append(_twice(structure, np.array([[reach, 0.0, 0.0]]), structure.cell))
            before.append(result)
        elif all(structure.pbc) and structure.num_nodes <= _LARGE:
            cell = structure.cell * np.array([[2.0], [1.0], [1.0]])
            doubled.append(_twice(structure, structure.cell[:1], cell))
            before.append(result)
    energies, forces = [], []
    for one, two in zip(before, bench.predict(doubled), strict=True):
        energies.append(abs(two.energy - 2 * one.energy) / len(two.forces))
        difference = two.forces - np.concatenate([one.forces] * 2)
        forces.append(np.abs(difference).max())
    yield Check.of(
        "size consistency",
        {
            "energy_meV_per_atom": 1e3 * _largest(energies),
            "forces_meV_per_A": 1e3 * _largest(forces),
            "forces_relative": _largest(forces) / bench.largest,
        },
        {"forces_relative": max(EXACT, bench.config.defect), "energy_meV_per_atom": EXACT_ENERGY},
        f"float64, {len(doubled)} structures twice: far apart, or as a doubled cell",
    )


def _twice(
    structure: Structure, shift: Float[np.ndarray, "1 3"], cell: Float[np.ndarray, "3 3"]
) -> Structure:
    positions = np.concatenate([structure.positions, structure.positions + shift])
    numbers = np.concatenate([structure.atomic_numbers] * 2)
    return dataclasses.replace(
        structure, positions=positions, atomic_numbers=numbers, cell=cell,
        charge=2 * structure.charge,
    )  # fmt: skip


# ---- numerics ---------------------------------------------------------------------------------


def _determinism(bench: _Bench) -> Iterator[Check]:
    base = bench.results["float32"]
    again = [bench.predict(bench.subjects, "float32") for _ in range(2)]
    with uncached():
        anew = bench.potential.recompiled().predict(bench.subjects, dtype="float32")
    yield Check.of(
        "the same from run to run",
        {
            "forces_repeated_meV_per_A": _largest(_differences(base, o)[1] for o in again),
            "forces_compiled_anew_meV_per_A": _differences(base, anew)[1],
        },
        {"forces_repeated_meV_per_A": 0.0, "forces_compiled_anew_meV_per_A": 0.0},
        "float32, evaluated three times, and by a program compiled anew: bit for bit",
    )


def _precision(bench: _Bench) -> Iterator[Check]:
    single, double = (bench.results[dtype] for dtype in ("float32", "float64"))
    energy, forces = _differences(single, double)
    errors = np.concatenate(
        [np.ravel(a.forces - b.forces) for a, b in zip(single, double, strict=True)]
    )
    rms = 1e3 * float(np.sqrt(np.mean(errors**2)))
    yield Check.of(
        "float32 against float64",
        {
            "energy_meV_per_atom": energy,
            "forces_meV_per_A": forces,
            "forces_rms_meV_per_A": rms,
            "forces_relative": 1e-3 * forces / bench.largest,
        },
        {"energy_meV_per_atom": SINGLE_ENERGY, "forces_relative": SINGLE},
        f"largest over {len(double)} structures",
    )


def _differences(one: Sequence[Result], other: Sequence[Result]) -> tuple[float, float]:
    """Largest of energies per atom [meV] and of force components [meV/Å]."""
    pairs = list(zip(one, other, strict=True))
    return (
        1e3 * _largest(abs(a.energy - b.energy) / len(a.forces) for a, b in pairs),
        1e3 * _largest(np.abs(a.forces - b.forces).max() for a, b in pairs),
    )


# ---- dynamics ---------------------------------------------------------------------------------


def _dynamics(
    bench: _Bench, replicas: Sequence[Structure], progress: Callable[[str], None]
) -> list[Check]:
    """On a CPU all runs at the same time: small programs side by side keep its cores busier."""
    runs = [functools.partial(_conservation, bench, replicas, progress)]
    for temperature in bench.settings.temperatures:
        runs.append(functools.partial(_stability, bench, replicas, temperature, progress))
    at_once = len(runs) if jax.default_backend() == "cpu" else 1
    with ThreadPoolExecutor(at_once) as threads:
        return list(threads.map(lambda run: run(), runs))


def _conservation(
    bench: _Bench, replicas: Sequence[Structure], progress: Callable[[str], None]
) -> Check:
    settings, name = bench.settings, "energy is conserved (NVE)"
    if reason := _no_dynamics(replicas, settings.nve_picoseconds):
        return Check.left_out(name, reason)
    ran = simulate(
        bench.potential,
        replicas,
        NVE(temperature=300.0),
        timestep=bench.timestep,
        picoseconds=settings.nve_picoseconds,
        dtype=settings.dtype,
        seed=settings.seed,
        progress=_told(progress, name),
    )
    how = (
        f"{settings.dtype} forces, velocity Verlet with {bench.timestep} fs for {ran.time[-1]:g} "
        f"ps of {settings.nve_picoseconds:g} from 300 K, {len(replicas)} replicas at once"
    )
    values = drift(ran, [s.num_nodes for s in replicas]) if len(ran.time) > 1 else {}
    values |= {"unfinished": 0.0 if ran.finished else 1.0}
    limits = {"drift_meV_per_atom_per_ps": DRIFT, "unfinished": 0.0}
    return Check.of(name, values, limits, how, bench.config.conservative)


def _stability(
    bench: _Bench,
    replicas: Sequence[Structure],
    temperature: float,
    progress: Callable[[str], None],
) -> Check:
    settings, name = bench.settings, f"stable at {temperature:g} K"
    if reason := _no_dynamics(replicas, settings.md_picoseconds):
        return Check.left_out(name, reason)
    ran = simulate(
        bench.potential,
        replicas,
        Langevin(temperature, settings.friction),
        timestep=bench.timestep,
        picoseconds=settings.md_picoseconds,
        dtype=settings.dtype,
        seed=settings.seed,
        progress=_told(progress, name),
    )
    broken = (ran.closest < CLOSEST) | (ran.stretch > STRETCHED)
    # the few degrees of freedom of small molecules fluctuate by themselves
    broken |= ran.temperature > HOT * temperature * (1 + 3 / np.sqrt(_degrees(replicas)))[None]
    stable_until = [
        float(ran.time[np.argmax(column)] if column.any() else ran.time[-1]) for column in broken.T
    ]
    unstable = len(replicas) if not ran.finished else int(broken.any(axis=0).sum())
    values = {
        "unstable_replicas": float(unstable),
        "replicas": float(len(replicas)),
        "stable_until_ps": min(stable_until),
        "mean_temperature_K": float(ran.temperature[len(ran.time) // 2 :].mean()),
        "closest_over_covalent_radii": float(ran.closest.min()),
        "longest_bond_over_its_start": float(ran.stretch.max()),
    }
    how = (
        f"{settings.dtype} forces, Langevin (BAOAB) with {bench.timestep} fs and friction "
        f"{settings.friction:g}/ps for {ran.time[-1]:g} ps of {settings.md_picoseconds:g}, "
        f"{len(replicas)} replicas at once; unstable: two atoms closer than {CLOSEST} of their "
        f"covalent radii, a molecule's bond {STRETCHED} times as long as at the start, {HOT:g} "
        "times as hot as wanted (times 1 + 3/sqrt(3N) for N atoms), or forces that are not finite"
    )
    return Check.of(name, values, {"unstable_replicas": 0.0}, how)


def _no_dynamics(replicas: Sequence[Structure], picoseconds: float) -> str:
    if picoseconds == 0:
        return "left out by the settings (0 ps)"
    return "" if replicas else "no structures were given that the model is made for"


def _degrees(structures: Sequence[Structure]) -> Float[np.ndarray, " replicas"]:
    return np.array([3.0 * s.num_nodes for s in structures])


def _told(progress: Callable[[str], None], name: str) -> Callable[[int, int], None]:
    return lambda done, steps: progress(f"{name}: step {done} of {steps}")


_STATIC = (
    *(_rotation, _reflection, _translation, _permutation, _derivatives, _cutoff),
    *(_size_consistency, _determinism, _precision),
)
