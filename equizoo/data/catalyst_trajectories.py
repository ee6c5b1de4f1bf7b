"""Raw relaxations of OC20 (IS2RE, IS2RS): one ``<system>.extxyz.xz`` each, and ``system.txt``."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from equizoo.data.catalyst_frames import CatalystFrame, CatalystSource, system_number
from equizoo.data.catalyst_s2ef import fixed_atoms, without_extras
from equizoo.data.frames import parse_xyz, xyz_texts
from equizoo.structure import EnergyReference


class Trajectories(CatalystSource):
    """Initial structures with the last frame of their relaxation as target, total energies.

    Every line ``random<sid>,<reference energy>`` of a ``system.txt`` is one system, whose file is
    beside it; both may lie in sub-folders. A reference of exactly zero stands for one that is not
    known.
    """

    def __init__(self, path: Path):
        self.path = path
        self._systems: list[tuple[Path, float]] = []
        for listing in sorted(path.rglob("system.txt")):
            for number, line in enumerate(listing.read_text("utf-8").split(), 1):
                parts = line.split(",")
                if len(parts) != 2:
                    raise ValueError(
                        f"{listing}, line {number}: {line[:60]!r}; expected random1234,-67.8."
                    )
                self._systems.append((listing.with_name(f"{parts[0]}.extxyz.xz"), float(parts[1])))
        if not self._systems:
            raise ValueError(f"{path} holds no system.txt with systems in it.")

    def __len__(self) -> int:
        return len(self._systems)

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[CatalystFrame]:
        for index in range(*slice(start, stop).indices(len(self))):
            first = last = None
            for last in self.trajectory(index):
                first = last if first is None else first
            if first is None or last is None:
                raise ValueError(f"{self._systems[index][0]} holds no frames.")
            if (first.structure.atomic_numbers != last.structure.atomic_numbers).any():
                raise ValueError(f"{self._systems[index][0]}: atoms change along the relaxation.")
            yield dataclasses.replace(
                first,
                fid=None,
                relaxed_energy=last.structure.energy,
                relaxed_positions=last.structure.positions,
            )

    def trajectory(self, index: int) -> Iterator[CatalystFrame]:
        """Every frame of one relaxation, in order, with ``fid`` counted from zero."""
        path, reference = self._systems[index]
        if not path.is_file():
            raise ValueError(f"{path} is missing; its system.txt names it.")
        sid = system_number(path.name.removesuffix(".extxyz.xz"), str(path))
        for fid, text in enumerate(xyz_texts(path, ".xz")):
            frame = parse_xyz(text, f"{path}[{fid}]", f"{path.name}[{fid}]")
            yield CatalystFrame(
                structure=without_extras(frame),
                sid=sid,
                fid=fid,
                fixed=fixed_atoms(frame),
                energy_reference=EnergyReference.TOTAL,
                tags=frame.atoms.get_tags().astype(np.int64) if frame.atoms.has("tags") else None,
                reference=reference if reference != 0.0 else None,
            )
