"""Files to structures with typed labels: what is read, what is absent, what is left out and why.

Labels are found by explicit keys, raw: constraints never zero a force, units are never converted.
"""

import dataclasses
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from ase.data import chemical_symbols
from jaxtyping import Float

from equizoo.data.extxyz import to_extxyz
from equizoo.data.frames import OPENERS, Frame, file_format, read_frames
from equizoo.data.statistics import LABELS, Statistics
from equizoo.structure import EnergyReference, Structure, require_same_reference
from equizoo.whole_files import written_whole

_LOOKS_LIKE = {
    "energy": re.compile(r"energy|^e$|^e_|_e$|e_?tot|toten|^u0?$", re.IGNORECASE),
    "forces": re.compile(r"force|grad|^f$|^f_|_f$", re.IGNORECASE),
    "stress": re.compile(r"stress|virial", re.IGNORECASE),
}
_ASYMMETRY = 1e-3  # codes print components to a few digits; a transposed or mixed-up tensor is O(1)


@dataclasses.dataclass(frozen=True)
class LabelKeys:
    """The keys under which a file holds its labels; ``None`` means: do not read this label.

    With ``virial``, ``stress = -virial / |det cell|`` for frames that have no stress.
    """

    energy: str | None = "energy"  # [eV]
    forces: str | None = "forces"  # [eV/Å]
    stress: str | None = "stress"  # [eV/Å^3] tension positive; 6 (xx yy zz yz xz xy), 9 or 3x3
    virial: str | None = None  # [eV] 6, 9 or 3x3

    def __post_init__(self):
        names = self.names
        if len(set(names)) != len(names):
            raise ValueError(f"{self} reads two labels from one key; give each its own.")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(key for key in dataclasses.astuple(self) if key is not None)


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """How many frames were left out for one reason, and the first few of them."""

    count: int
    examples: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ReadReport:
    """What became of every frame: ``frames == kept + isolated_atoms + all that were left out``."""

    frames: int
    kept: int
    isolated_atoms: int  # marked single-atom frames, taken as reference energies
    labels: Mapping[str, int]  # kept frames that have energy, forces, stress
    left_out: Mapping[str, LeftOut]  # by reason
    unread: Mapping[str, int]  # keys that look like labels and were not read: number of frames

    def __str__(self) -> str:
        lines = [f"{self.frames} frames, {self.kept} kept, {self.isolated_atoms} isolated atoms"]
        lines += [f"  {label}: {count} of {self.kept}" for label, count in self.labels.items()]
        for reason, left in self.left_out.items():
            lines.append(f"  left out {left.count}: {reason} ({', '.join(left.examples)})")
        lines += [f"  not read: {key} ({count} frames)" for key, count in self.unread.items()]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Structures of one level of theory and one energy reference, and how they were read.

    ``structures`` may lie on a disk and be read when asked for. They then have ``statistics``, of
    themselves or of the larger set that they were chosen from.
    """

    structures: Sequence[Structure]
    energy_reference: EnergyReference
    level_of_theory: str
    isolated_atoms: Mapping[int, float]  # [eV] by atomic number
    report: ReadReport
    name: str = ""
    statistics: Statistics | None = None

    def __len__(self) -> int:
        return len(self.structures)

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that occur in the structures, sorted."""
        if self.statistics is not None:
            return self.statistics.elements
        return tuple(sorted({int(z) for s in self.structures for z in s.atomic_numbers}))


def join(datasets: Sequence[Dataset], name: str) -> Dataset:
    """Data sets one after the other, as one.

    Raises ``ValueError`` where levels of theory, energy references or isolated atoms differ.
    """
    first = datasets[0]
    atoms: dict[int, float] = {}
    reports = [other.report for other in datasets]
    for other in datasets:
        require_same_reference(first.energy_reference, other.energy_reference, f"Joining {name}")
        if other.level_of_theory != first.level_of_theory:
            raise ValueError(
                f"Joining {name} would mix {first.level_of_theory!r} ({first.name}) and "
                f"{other.level_of_theory!r} ({other.name}); choose sets of one level of theory."
            )
        for number, energy in other.isolated_atoms.items():
            if atoms.setdefault(number, energy) != energy:
                raise ValueError(
                    f"{other.name} has the isolated atom {number} at {energy} eV, others of {name} "
                    f"at {atoms[number]} eV."
                )
    report = joined_report(reports)
    structures = tuple(structure for other in datasets for structure in other.structures)
    return Dataset(structures, first.energy_reference, first.level_of_theory, atoms, report, name)


def joined_report(reports: Sequence[ReadReport]) -> ReadReport:
    """One report of all frames; of those left out for a reason, the first three are named."""
    left_out: dict[str, LeftOut] = {}
    for report in reports:
        for reason, left in report.left_out.items():
            before = left_out.get(reason, LeftOut(0, ()))
            examples = (before.examples + left.examples)[:3]
            left_out[reason] = LeftOut(before.count + left.count, examples)
    return ReadReport(
        frames=sum(report.frames for report in reports),
        kept=sum(report.kept for report in reports),
        isolated_atoms=sum(report.isolated_atoms for report in reports),
        labels=_counted([report.labels for report in reports]),
        left_out=left_out,
        unread=_counted([report.unread for report in reports]),
    )


def _counted(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {key: sum(c.get(key, 0) for c in counts) for c in counts for key in c}


def read_structures(
    path: str | os.PathLike,
    keys: LabelKeys = LabelKeys(),
    *,
    index: str | int | slice = ":",
    require: tuple[str, ...] = ("energy",),
    energy_reference: EnergyReference = EnergyReference.TOTAL,
    level_of_theory: str = "",
    isolated_atoms: str | os.PathLike | Mapping[int, float] | None = None,
    on_bad: Literal["raise", "skip"] = "raise",
    name: str = "",
) -> Dataset:
    """The structures of a file with the labels found under ``keys``, in eV and Å as they stand.

    A label in ``require`` that no frame has raises ``ValueError`` and lists the keys that look
    like it; a label that some frames lack is ``None`` there, and counted. Forces are those in the
    file, on constrained atoms too. Frames marked ``config_type=IsolatedAtom`` become
    ``isolated_atoms`` (added to those given as a mapping or a file); other single atoms stay
    structures.

    Raises ``ValueError`` when the file is truncated or damaged (naming file and frame) and when
    its format is not one of ``equizoo.data.frames.FORMATS``. Faults of single frames (NaN,
    infinity, an asymmetric stress, no volume) raise too, or with ``on_bad="skip"`` are left out
    and counted by reason in the report.
    """
    path = Path(path).expanduser()
    if unknown := [label for label in require if label not in LABELS]:
        raise ValueError(f"require={unknown} are not labels; expected some of {LABELS}.")
    energies = IsolatedEnergies()
    if isinstance(isolated_atoms, Mapping):
        for z, energy in isolated_atoms.items():
            energies.add(z, energy, "isolated_atoms")
    elif isolated_atoms is not None:
        energies.update(read_isolated_atoms(isolated_atoms, keys))
    labelling = Labelling(keys, on_bad, energies)
    frames = read_frames(path, index)
    structures = map(labelling.structure, frames)
    kept = [structure for structure in structures if structure is not None]
    report = labelling.report()
    if report.left_out and not kept and not report.isolated_atoms:
        raise ValueError(f"{path}: every frame was left out: {'; '.join(report.left_out)}")
    if kept:
        check_labels(path, report, keys, require, frames[0])
    return Dataset(
        structures=tuple(kept),
        energy_reference=energy_reference,
        level_of_theory=level_of_theory,
        isolated_atoms=MappingProxyType(dict(energies)),
        report=report,
        name=name or path.name,
    )


class Labelling:
    """Frames to structures with labels, one at a time; what becomes of each is counted.

    Single atoms that are marked as such go to ``isolated_atoms``, their energies [eV] by atomic
    number. Faults raise ``ValueError``, or with ``on_bad="skip"`` leave a frame out.
    """

    def __init__(
        self,
        keys: LabelKeys,
        on_bad: Literal["raise", "skip"] = "raise",
        isolated_atoms: "IsolatedEnergies | None" = None,
    ):
        self._keys, self._on_bad = keys, on_bad
        self.isolated_atoms = IsolatedEnergies() if isolated_atoms is None else isolated_atoms
        self._frames = self._kept = self._marked = 0
        self._labels: Counter[str] = Counter(dict.fromkeys(LABELS, 0))
        self._left_out: dict[str, list[str]] = {}
        self._found: Counter[str] = Counter()

    def structure(self, frame: Frame) -> Structure | None:
        """The frame with its labels; ``None`` for an isolated atom and one that is left out."""
        self._frames += 1
        self._found.update(_label_like_keys(frame))
        try:
            structure = labelled_structure(frame, self._keys)
            if _is_isolated(structure):
                self.isolated_atoms.add_structure(structure)
                self._marked += 1
                return None
        except ValueError as error:
            if self._on_bad == "raise":
                raise
            reason = str(error).replace(f"Structure {frame.name}", "").lstrip(": ")
            self._left_out.setdefault(reason, []).append(frame.name)
            return None
        self._kept += 1
        self._labels.update({k: int(getattr(structure, k) is not None) for k in LABELS})
        return structure

    def report(self) -> ReadReport:
        """What became of the frames so far."""
        left_out = {r: LeftOut(len(n), tuple(n[:3])) for r, n in self._left_out.items()}
        unread = {k: n for k, n in self._found.items() if k not in self._keys.names}
        return ReadReport(
            frames=self._frames,
            kept=self._kept,
            isolated_atoms=self._marked,
            labels=MappingProxyType(dict(self._labels)),
            left_out=MappingProxyType(left_out),
            unread=MappingProxyType(unread),
        )


def read_isolated_atoms(
    path: str | os.PathLike, keys: LabelKeys = LabelKeys()
) -> dict[int, float]:  # [eV]
    """Energies by atomic number from a file of single atoms, marked or not.

    Raises ``ValueError`` for a frame with more than one atom or without energy, and when two
    frames of one element disagree.
    """
    energies = IsolatedEnergies()
    for frame in read_frames(Path(path).expanduser(), ":"):
        energies.add_structure(labelled_structure(frame, keys))
    return dict(energies)


def write_structures(
    path: str | os.PathLike, structures: Iterable[Structure], keys: LabelKeys = LabelKeys()
) -> None:
    """Writes extended XYZ (``.xyz``, ``.extxyz``, with ``.xz``, ``.gz``, ``.bz2``), all or nothing.

    :func:`read_structures` with the same keys gives back every number exactly, which ASE's own
    writer (8 decimals) does not. Raises ``ValueError`` when the file exists, when a label has no
    key, and when an extra in ``info`` would not survive.
    """
    path = Path(path).expanduser()
    compression, ase_format = file_format(path)
    if ase_format != "extxyz":
        raise ValueError(f"{path}: structures are written as .xyz or .extxyz; got {path.name!r}.")
    if path.exists():
        raise ValueError(f"{path} exists. Nothing is overwritten: choose another name.")
    with (
        written_whole(path) as partial,
        OPENERS[compression](partial, "wt", encoding="utf-8", newline="\n") as file,
    ):
        for structure in structures:
            file.write(to_extxyz(structure, {label: getattr(keys, label) for label in LABELS}))


def stress_matrix(
    values: Float[np.ndarray, "..."],  # 6 in Voigt order xx yy zz yz xz xy, 9, or 3x3
) -> Float[np.ndarray, "3 3"]:
    """The symmetric 3x3 tensor; ``ValueError`` for another shape or an asymmetric tensor.

    Rounding in the file (up to 0.1 % of the largest component) is averaged away.
    """
    from ase.stress import voigt_6_to_full_3x3_stress

    if values.shape == (6,):
        return voigt_6_to_full_3x3_stress(values)
    if values.shape not in ((9,), (3, 3)):
        raise ValueError(f"a tensor has 6, 9 or 3x3 numbers, got shape {values.shape}")
    matrix = values.reshape(3, 3)
    asymmetry = np.abs(matrix - matrix.T).max()
    if asymmetry > _ASYMMETRY * np.abs(matrix).max() + 1e-6:
        raise ValueError(
            "the tensor is not symmetric; expected xx xy xz yx yy yz zx zy zz. Check the order"
        )
    return 0.5 * (matrix + matrix.T)


class IsolatedEnergies(dict[int, float]):
    """Energies [eV] by atomic number; two different ones for the same element raise."""

    def add(self, z: int, energy: float, where: str) -> None:
        if abs(self.setdefault(z, energy) - energy) > 1e-6:
            raise ValueError(
                f"Structure {where}: a second energy {energy} eV for the isolated atom "
                f"{chemical_symbols[z]}, first {self[z]} eV. Keep one."
            )

    def add_structure(self, structure: Structure) -> None:
        if structure.num_nodes != 1 or structure.energy is None:
            raise ValueError(
                f"Structure {structure.name}: an isolated atom is one atom with an energy; got "
                f"{structure.num_nodes} atoms, energy {structure.energy}."
            )
        self.add(int(structure.atomic_numbers[0]), structure.energy, structure.name)


def _is_isolated(structure: Structure) -> bool:
    kind = str(structure.info.get("config_type", "")).lower().replace("_", "").replace("-", "")
    return kind in ("isolatedatom", "isolatedatoms")


def labelled_structure(frame: Frame, keys: LabelKeys) -> Structure:
    structure = Structure.from_atoms(frame.atoms, frame.name)
    labels: dict[str, Any] = {label: _label(frame, getattr(keys, label), label) for label in LABELS}
    virial = _label(frame, keys.virial, "virial")
    shapes: dict[str, list[tuple[int, ...]]] = {
        "energy": [(), (1,)],
        "forces": [(structure.num_nodes, 3)],
    }
    for label, allowed in shapes.items():
        if labels[label] is not None and labels[label].shape not in allowed:
            raise ValueError(
                f"Structure {frame.name}: {label} ({getattr(keys, label)!r}) has shape "
                f"{labels[label].shape}, expected {allowed[0]}. Is it the right key?"
            )
    if labels["energy"] is not None:
        labels["energy"] = labels["energy"].item()
    try:
        if labels["stress"] is not None:
            labels["stress"] = stress_matrix(labels["stress"])
        if virial is not None:
            from_virial = _stress_from_virial(stress_matrix(virial), structure.cell)
            if labels["stress"] is None:
                labels["stress"] = from_virial
            elif not np.allclose(labels["stress"], from_virial, rtol=1e-2, atol=1e-5):
                raise ValueError("stress and -virial/volume disagree; check sign and units")
    except ValueError as error:
        raise ValueError(f"Structure {frame.name}: stress: {error}.") from error
    return dataclasses.replace(structure, **labels, info=_extras(frame, keys))


def _stress_from_virial(
    virial: Float[np.ndarray, "3 3"],  # [eV]
    cell: Float[np.ndarray, "3 3"],  # [Å]
) -> Float[np.ndarray, "3 3"]:
    volume = abs(np.linalg.det(cell))
    if volume == 0:
        raise ValueError("a virial needs a cell with volume")
    return -virial / volume


def _results(frame: Frame) -> Mapping[str, Any]:
    # Not atoms.get_forces(), which applies constraints: zeros on every fixed atom of a slab.
    return {} if frame.atoms.calc is None else frame.atoms.calc.results


def _label(frame: Frame, key: str | None, label: str) -> Float[np.ndarray, "..."] | None:
    if key is None:
        return None
    for source in (frame.comment, _results(frame), frame.atoms.info, frame.atoms.arrays):
        if key in source and source[key] is not None:
            values = np.asarray(source[key])
            if values.dtype.kind not in "iuf":  # 'energy' without a value is parsed as True
                raise ValueError(
                    f"Structure {frame.name}: {label} ({key!r}) is {source[key]!r}, expected "
                    "numbers. Remove the key where the label is absent."
                )
            return values.astype(np.float64)
    return None


def _extras(frame: Frame, keys: LabelKeys) -> Mapping[str, Any]:
    from ase.constraints import FixAtoms

    extras = {**_results(frame), **frame.atoms.info, **frame.atoms.arrays}
    fixed = [c.index for c in frame.atoms.constraints if isinstance(c, FixAtoms)]
    if fixed and "fixed" not in extras:
        extras["fixed"] = np.isin(np.arange(len(frame.atoms)), np.concatenate(fixed))
    known = {"numbers", "positions", *keys.names}
    return MappingProxyType({k: v for k, v in extras.items() if k not in known})


def label_like(key: str, value: Any, nodes: int) -> str | None:
    """The label ("energy", "forces", "stress") that something looks like by its name and shape."""
    shapes: dict[str, list[tuple[int, ...]]] = {
        "energy": [(), (1,)],
        "forces": [(nodes, 3)],
        "stress": [(6,), (9,), (3, 3)],
    }
    if np.asarray(value).dtype.kind not in "iuf":
        return None
    for label, pattern in _LOOKS_LIKE.items():
        if pattern.search(key) and np.shape(value) in shapes[label]:
            return label
    return None


def _label_like_keys(frame: Frame) -> list[str]:
    nodes = len(frame.atoms)
    sources = (frame.comment, _results(frame), frame.atoms.info, frame.atoms.arrays)
    values = {key: value for source in sources for key, value in source.items()}
    return [key for key, value in values.items() if label_like(key, value, nodes)]


def check_labels(
    path: Path,
    report: ReadReport,
    keys: LabelKeys,
    require: tuple[str, ...],
    first: Frame,
) -> None:
    """Raises for a required label that no frame has; warns when an optional one has other names."""
    for label in (label for label, count in report.labels.items() if count == 0):
        similar = [k for k in report.unread if _LOOKS_LIKE[label].search(k)]
        field = "virial" if similar and "virial" in similar[0].lower() else label
        hint = ""
        if similar:
            option = "" if field == "virial" else f" (--{field}-key {similar[0]})"
            hint = f" Pass keys=LabelKeys({field}={similar[0]!r}){option}."
        absent = f"{path}: no frame has {label} under the key {getattr(keys, label)!r}"
        if label in require:
            there = similar or sorted({*_extras(first, keys), *report.unread})
            raise ValueError(
                f"{absent}. Keys there: {', '.join(there) or 'none'}.{hint} In Python, "
                f"require without {label!r} reads structures that have none."
            )
        if similar and getattr(keys, label) is not None:
            names = ", ".join(similar)
            warnings.warn(f"{absent}; {names} is there and not read.{hint}", stacklevel=3)
