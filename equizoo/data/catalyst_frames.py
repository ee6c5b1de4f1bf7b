"""One frame of OC20 or OC22, whatever file it comes from, and what a file of them can do."""

import abc
import dataclasses
import enum
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from equizoo.structure import EnergyReference, Structure


class Target(enum.StrEnum):
    """What a model is to learn of a frame.

    ``frame``: the frame's own energy and forces (S2EF). ``relaxed``: the energy that relaxing it
    leads to (direct IS2RE), without forces.
    """

    FRAME = "frame"
    RELAXED = "relaxed"


_LARGEST_ADSORPTION = 100.0  # [eV] 35 standard deviations of OC20's; totals are mostly larger


@dataclasses.dataclass(frozen=True, eq=False)
class CatalystFrame:
    """A surface with adsorbates, its labels as they stand in the file, and what OC20 says of it.

    For initial structures (IS2RE, IS2RS) ``relaxed_energy`` and ``relaxed_positions`` are the
    targets; energies all have ``energy_reference``, which is assumed, not known, unless
    ``reference_stated``. ``reference`` is the energy of the clean surface and the gas-phase
    molecules, total energy = adsorption energy + reference.

    Raises ``ValueError`` for an "adsorption energy" beyond 100 eV: it is a total energy.
    """

    structure: Structure
    sid: int  # system; without the prefix "random"
    fid: int | None  # frame of the system's relaxation; None where a system has one frame
    fixed: Bool[np.ndarray, " nodes"]  # atoms that relaxations hold, not trained on, not scored
    energy_reference: EnergyReference
    tags: Int[np.ndarray, " nodes"] | None = None  # 0 below the surface, 1 surface, 2 adsorbate
    reference: float | None = None  # [eV]
    relaxed_energy: float | None = None  # [eV]
    relaxed_positions: Float[np.ndarray, "nodes 3"] | None = None  # [Å]
    reference_stated: bool = True  # by the file, or by whoever opened it

    def __post_init__(self):
        nodes = self.structure.num_nodes
        for what in ("fixed", "tags", "relaxed_positions"):
            value = getattr(self, what)
            if value is not None and len(value) != nodes:
                raise ValueError(
                    f"Structure {self.structure.name}: {what} is for {len(value)} atoms, expected "
                    f"{nodes}."
                )
        if self.energy_reference == EnergyReference.ADSORPTION:
            for energy in (self.structure.energy, self.relaxed_energy):
                if energy is not None and abs(energy) > _LARGEST_ADSORPTION:
                    raise ValueError(
                        f"Structure {self.structure.name} has the energy {energy:.3f} eV, which is "
                        "no adsorption energy. If the file holds total energies, open it with "
                        "open_catalyst(..., energy_reference=EnergyReference.TOTAL); equizoo "
                        "prepare and leaderboard take --data-energy-reference total, a recipe "
                        'says "data_energy_reference": "total".'
                    )

    @property
    def id(self) -> str:
        """What leaderboards call it: ``sid_fid``, or ``sid`` where there is one frame."""
        return f"{self.sid}" if self.fid is None else f"{self.sid}_{self.fid}"

    @property
    def free(self) -> Bool[np.ndarray, " nodes"]:
        """Atoms that relaxations move, on which forces are trained and scored."""
        return ~self.fixed

    def in_reference(
        self, wanted: EnergyReference, reference: float | None = None
    ) -> "CatalystFrame":
        """The frame with its energies against ``wanted``, adsorption or total.

        ``reference`` [eV] stands in where the frame has none of its own. Raises ``ValueError``
        when none is known, and for other references: those need more than one number.
        """
        if wanted == self.energy_reference:
            return self
        sign = {
            (EnergyReference.TOTAL, EnergyReference.ADSORPTION): -1.0,
            (EnergyReference.ADSORPTION, EnergyReference.TOTAL): 1.0,
        }.get((self.energy_reference, wanted))
        if sign is None:
            raise ValueError(
                f"Structure {self.structure.name}: {self.energy_reference.value} energies cannot "
                f"become {wanted.value} ones here; expected adsorption and total."
            )
        reference = self.reference if self.reference is not None else reference
        if reference is None:
            raise ValueError(
                f"Structure {self.structure.name} (sid {self.sid}): {self.energy_reference.value} "
                f"to {wanted.value} energy needs the energy of its clean surface and gas-phase "
                "molecules, which is not known. OC20 has them in the .txt.xz files of S2EF and in "
                "oc20_ref.pkl (read_adsorption_references)."
            )

        def moved(energy: float | None) -> float | None:
            return None if energy is None else energy + sign * reference

        return dataclasses.replace(
            self,
            structure=dataclasses.replace(self.structure, energy=moved(self.structure.energy)),
            relaxed_energy=moved(self.relaxed_energy),
            energy_reference=wanted,
            reference=reference,
        )

    def to_structure(self) -> Structure:
        """The structure with ``sid``, ``fid``, ``fixed`` and ``tags`` carried in ``info``."""
        carried: dict[str, Any] = {"sid": self.sid, "fid": self.fid}
        carried |= {"fixed": self.fixed, "tags": self.tags}
        info = {key: value for key, value in carried.items() if value is not None}
        return dataclasses.replace(self.structure, info={**self.structure.info, **info})

    def to_direct_target(self) -> Structure:
        """The structure of direct IS2RE: initial positions, labelled by the relaxed energy alone.

        Raises ``ValueError`` when that is not known.
        """
        if self.relaxed_energy is None:
            raise ValueError(
                f"Structure {self.structure.name} has no relaxed energy; direct IS2RE needs the "
                "IS2RE files of a training or validation split."
            )
        structure = self.to_structure()
        return dataclasses.replace(structure, energy=self.relaxed_energy, forces=None)


class CatalystSource(abc.ABC):
    """Frames of one split, in the order of their files, read one at a time."""

    path: Path

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of frames, without reading them."""

    @abc.abstractmethod
    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[CatalystFrame]:
        """The frames from ``start`` up to ``stop``; those before are not decoded.

        Raises ``ValueError`` naming the file and frame that is damaged or lacks something.
        """

    def __iter__(self) -> Iterator[CatalystFrame]:
        return self.frames()

    def fingerprint(self) -> str:
        """A digest of the names, sizes and times of the files: another when they have changed."""
        digest = hashlib.sha256()
        folder = self.path if self.path.is_dir() else self.path.parent
        for file in sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path]:
            if file.is_file() and not file.name.endswith("-lock"):  # which reading an LMDB makes
                status = file.stat()
                facts = file.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns
                digest.update(repr(facts).encode())
        return digest.hexdigest()

    @property
    def num_atoms(self) -> Int[np.ndarray, " frames"] | None:
        """Atoms of every frame, where a file beside the data says so; else ``None``."""
        return None


def system_number(value: Any, where: str) -> int:
    """The number in ``random1000100``, ``1000100`` or ``1000100-frame-3``; else ``ValueError``."""
    text = str(value).removeprefix("random").partition("-frame-")[0]
    if not text.isdecimal():
        raise ValueError(
            f"{where}: the system is called {str(value)[:60]!r}; expected a number, or 'random' "
            "and a number, as in OC20 and OC22."
        )
    return int(text)


def frame_number(value: Any, where: str) -> int:
    """The number in ``frame39`` or ``39``; else ``ValueError``."""
    text = str(value).removeprefix("frame")
    if not text.isdecimal():
        raise ValueError(f"{where}: the frame is called {str(value)[:60]!r}; expected 'frame39'.")
    return int(text)
