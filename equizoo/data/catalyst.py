"""OC20 and OC22 as released: one call for all layouts, told apart by what is there."""

import os
from collections.abc import Mapping
from pathlib import Path

from equizoo.data.catalyst_aselmdb import AseLmdb
from equizoo.data.catalyst_frames import CatalystFrame, CatalystSource, Target
from equizoo.data.catalyst_lmdb import PyGLmdb
from equizoo.data.catalyst_references import reference_of
from equizoo.data.catalyst_s2ef import S2EFFolder
from equizoo.data.catalyst_trajectories import Trajectories
from equizoo.data.readers import Dataset, ReadReport
from equizoo.structure import EnergyReference, Structure, require_same_reference


def open_catalyst(
    path: str | os.PathLike, energy_reference: EnergyReference | None = None
) -> CatalystSource:
    """The frames of a file or folder of OC20 or OC22.

    A folder of ``*.extxyz.xz`` with ``*.txt.xz`` (S2EF) or with ``system.txt`` (relaxations), or
    ``*.lmdb`` or ``*.aselmdb``, in a folder or alone. ``energy_reference`` says what the energies
    *in the file* are, where its rows do not: see :class:`equizoo.data.catalyst_lmdb.PyGLmdb` and
    :class:`equizoo.data.catalyst_aselmdb.AseLmdb`. To convert, use
    :meth:`equizoo.data.catalyst_frames.CatalystFrame.in_reference`.

    Raises ``ValueError`` when nothing there is of these, and when ``energy_reference`` contradicts
    the data.
    """
    path = Path(path).expanduser()
    if path.suffix == ".aselmdb" or (path.is_dir() and any(path.glob("*.aselmdb"))):
        return AseLmdb(_existing(path), energy_reference)
    if path.suffix == ".lmdb" or (path.is_dir() and any(path.glob("*.lmdb"))):
        return PyGLmdb(_existing(path), energy_reference)
    raw: CatalystSource
    if path.is_dir() and any(path.rglob("system.txt")):
        raw = Trajectories(path)
    elif path.is_dir() and any(path.glob("*.extxyz.xz")):
        raw = S2EFFolder(path)
    else:
        raise ValueError(
            f"{path} is no data of OC20 or OC22; expected a folder with *.extxyz.xz and *.txt.xz "
            "(S2EF) or system.txt (relaxations), or *.lmdb or *.aselmdb. Name the folder that "
            "holds these files."
        )
    if energy_reference is not None:
        require_same_reference(
            energy_reference, EnergyReference.TOTAL, f"Reading {path}, which holds total energies,"
        )
    return raw


def is_catalyst(path: Path) -> bool:
    """Whether :func:`open_catalyst` is for it: a folder, or a database file."""
    return path.is_dir() or path.suffix in (".lmdb", ".aselmdb")


def read_catalyst(
    path: str | os.PathLike,
    *,
    target: Target = Target.FRAME,
    data_energy_reference: EnergyReference | None = None,
    energy_reference: EnergyReference | None = None,
    adsorption_references: Mapping[int, float] | None = None,  # [eV] by sid
    level_of_theory: str = "",
    name: str = "",
) -> Dataset:
    """All frames of a file or folder of OC20 or OC22 as a data set in memory.

    Structures have ``fixed``, ``tags``, ``sid`` and ``fid`` in ``info``. Energies are converted to
    ``energy_reference`` if that is given, with ``adsorption_references`` where a frame has none of
    its own; ``data_energy_reference`` is that of the file, see :func:`open_catalyst`. Raises
    ``ValueError`` for frames without the ``target``, without what converting needs, whose energies
    nobody says the reference of, and where energies of two kinds would mix.
    """
    structures: list[Structure] = []
    reference: EnergyReference | None = energy_reference
    for frame in open_catalyst(path, data_energy_reference):
        if reference is None:
            reference = frame.energy_reference
        elif energy_reference is None:
            require_same_reference(reference, frame.energy_reference, f"Reading {path}")
        structures.append(labelled_frame(frame, reference, target, adsorption_references))
    if reference is None:
        raise ValueError(f"{path} holds no frames; expected at least one.")
    labels = {
        label: sum(getattr(s, label) is not None for s in structures)
        for label in ("energy", "forces", "stress")
    }
    count = len(structures)
    report = ReadReport(count, count, 0, labels, {}, {})
    named = name or Path(path).name
    return Dataset(tuple(structures), reference, level_of_theory, {}, report, named)


def labelled_frame(
    frame: CatalystFrame,
    reference: EnergyReference,
    target: Target,
    adsorption_references: Mapping[int, float] | None = None,  # [eV] by sid
) -> Structure:
    """What a model is to learn of a frame, its energy against ``reference``.

    Raises ``ValueError`` for a frame without the target, without what converting needs, and one
    whose energy reference is not stated.
    """
    require_stated_reference(frame)
    known = None
    if adsorption_references is not None and reference != frame.energy_reference:
        known = frame.reference or reference_of(adsorption_references, frame.sid)
    frame = frame.in_reference(reference, known)
    relaxed = target is Target.RELAXED
    structure = frame.to_direct_target() if relaxed else frame.to_structure()
    if structure.energy is None:
        raise ValueError(
            f"Structure {frame.structure.name} has no energy; test splits are not for training."
        )
    return structure


def require_stated_reference(frame: CatalystFrame) -> None:
    """Raises ``ValueError`` where neither the file nor who reads it says what energies are."""
    if not frame.reference_stated:
        raise ValueError(
            f"Structure {frame.structure.name}: its file does not say what its energies are "
            "measured against, and learning the wrong ones goes unnoticed. Say it: "
            "data_energy_reference (--data-energy-reference) adsorption for OC20's databases as "
            "released, total for DFT energies as they are."
        )


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"{path} does not exist; check the path.")
    return path
