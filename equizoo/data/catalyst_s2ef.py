"""Raw S2EF folders of OC20: ``0.extxyz.xz`` with ``0.txt.xz``, up to 5000 frames to a pair."""

import dataclasses
import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ase.constraints import FixAtoms
from jaxtyping import Bool

from equizoo.data.catalyst_frames import (
    CatalystFrame,
    CatalystSource,
    frame_number,
    system_number,
)
from equizoo.data.frames import DAMAGE, Frame, parse_xyz, xyz_texts
from equizoo.data.readers import LabelKeys, labelled_structure
from equizoo.structure import EnergyReference, Structure

_KEYS = LabelKeys(stress=None)


class S2EFFolder(CatalystSource):
    """Frames with total energies, forces on all atoms, and the reference of each.

    A line ``random<sid>,frame<fid>,<reference energy>`` of the text belongs to each frame. A
    reference of exactly zero stands for one that is not known: no clean surface has that energy.
    Raises ``ValueError`` where the two files of a pair do not match.
    """

    def __init__(self, path: Path):
        self.path = path
        self._pairs = []
        for frames in sorted(path.glob("*.extxyz.xz"), key=_natural):
            lines = frames.with_name(frames.name.replace(".extxyz.xz", ".txt.xz"))
            if not lines.is_file():
                raise ValueError(f"{frames} has no {lines.name} beside it, which says its frames.")
            self._pairs.append((frames, lines, _count(lines)))
        if not self._pairs:
            raise ValueError(f"{path} holds no *.extxyz.xz; expected a raw S2EF folder.")

    def __len__(self) -> int:
        return sum(count for _, _, count in self._pairs)

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[CatalystFrame]:
        stop = len(self) if stop is None else min(stop, len(self))
        first = 0
        for frames, lines, count in self._pairs:
            if first < stop and first + count > start:
                whole = stop >= first + count
                yield from _read(frames, lines, max(start - first, 0), stop - first, whole)
            first += count


def _read(
    path: Path, lines_path: Path, start: int, stop: int, whole: bool
) -> Iterator[CatalystFrame]:
    texts = xyz_texts(path, ".xz")
    with lzma.open(lines_path, "rt", encoding="utf-8") as lines:
        for index, line in enumerate(lines):
            if index >= stop:
                return
            text = next(texts, None)
            if text is None:
                raise ValueError(f"{path} ends after {index} frames; {lines_path.name} has more.")
            if index >= start:
                where = f"{path}[{index}]"
                yield _frame(parse_xyz(text, where, f"{path.name}[{index}]"), line, where)
    if whole and next(texts, None) is not None:
        raise ValueError(f"{path} has more frames than {lines_path.name} has lines.")


def _frame(frame: Frame, line: str, where: str) -> CatalystFrame:
    parts = line.strip().split(",")
    if len(parts) != 3:
        raise ValueError(
            f"{where}: its line is {line.strip()[:60]!r}; expected random1234,frame5,-67.8."
        )
    reference = float(parts[2])
    return CatalystFrame(
        structure=without_extras(frame),
        sid=system_number(parts[0], where),
        fid=frame_number(parts[1], where),
        fixed=fixed_atoms(frame),
        energy_reference=EnergyReference.TOTAL,
        tags=frame.atoms.get_tags().astype(np.int64) if frame.atoms.has("tags") else None,
        reference=reference if reference != 0.0 else None,
    )


def without_extras(frame: Frame) -> Structure:
    """The frame as a structure with energy and forces, of all atoms, and nothing carried."""
    return dataclasses.replace(labelled_structure(frame, _KEYS), info={})


def fixed_atoms(frame: Frame) -> Bool[np.ndarray, " nodes"]:
    """Atoms that a ``move_mask`` or another ``FixAtoms`` holds."""
    fixed = np.zeros(len(frame.atoms), bool)
    for constraint in frame.atoms.constraints:
        if isinstance(constraint, FixAtoms):
            fixed[constraint.index] = True
    return fixed


def _count(path: Path) -> int:
    try:
        with lzma.open(path, "rb") as lines:
            return sum(1 for line in lines if line.strip())
    except DAMAGE as error:
        raise ValueError(f"{path}: damaged or truncated ({error}). Fetch it again.") from error


def _natural(path: Path) -> tuple[int, str]:
    stem = path.name.partition(".")[0]
    return (int(stem) if stem.isdecimal() else 0, path.name)
