"""Old databases of OC20 and OC22: LMDB files of pickled PyTorch Geometric records.

All of OC22, OC20's IS2RE and S2EF test splits, and what preprocessing by fairchem 1.x wrote.
Neither torch nor pickle is used, see :mod:`equizoo.data.pickled_tensors`. Edges stored in a file
are not read: a model has its own rule for neighbours.
"""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from equizoo.data.catalyst_frames import (
    CatalystFrame,
    CatalystSource,
    frame_number,
    system_number,
)
from equizoo.data.lmdb_files import LmdbFile
from equizoo.data.pickled_tensors import decode_row
from equizoo.structure import EnergyReference, Structure, require_same_reference

_ENERGY, _FORCES = ("y", "energy"), ("force", "forces")  # before and after fairchem's PR 726


class PyGLmdb(CatalystSource):
    """Rows "0" to "N-1" of one file, or of all ``*.lmdb`` of a folder in the order of names.

    Rows do not say what their energies are measured against, except those of OC22, which are
    total energies. ``energy_reference`` says it of others; without it they are adsorption
    energies, as released for OC20. Cells are periodic along all three axes.

    Raises :class:`equizoo.data.pickled_tensors.RefusedRow` for a row that is no record of tensors,
    and ``ValueError`` for one that is damaged or lacks a field.
    """

    def __init__(self, path: Path, energy_reference: EnergyReference | None = None):
        self.path = path
        self._declared = energy_reference
        paths = sorted(path.glob("*.lmdb")) if path.is_dir() else [path]
        if not paths:
            raise ValueError(f"{path} holds no *.lmdb; expected old LMDB files.")
        self._files = [LmdbFile(file) for file in paths]

    @functools.cached_property
    def _lengths(self) -> list[int]:
        return [_length(file) for file in self._files]

    def __len__(self) -> int:
        return sum(self._lengths)

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[CatalystFrame]:
        stop = len(self) if stop is None else min(stop, len(self))
        first = 0
        for file, length in zip(self._files, self._lengths, strict=True):
            for row in range(max(start - first, 0), min(stop - first, length)):
                where = f"{file.path}[{row}]"
                content = file.get(str(row))
                if content is None:
                    raise ValueError(f"{where}: there is no such row among {length}.")
                yield self._frame(decode_row(content, where), where, file.path.name, row)
            first += length

    @functools.cached_property
    def num_atoms(self) -> Int[np.ndarray, " frames"] | None:
        """Of ``metadata.npz`` beside the files; ``ValueError`` when it is of other data."""
        folder = self.path if self.path.is_dir() else self.path.parent
        if not (file := folder / "metadata.npz").is_file():
            return None
        with np.load(file, allow_pickle=False) as arrays:
            natoms = arrays.get("natoms")
        if natoms is None or natoms.shape != (len(self),):
            raise ValueError(
                f"{file}: natoms is {'missing' if natoms is None else natoms.shape}, expected one "
                f"number for each of {len(self)} rows. It belongs to other data: remove it."
            )
        return natoms.astype(np.int64)

    def _frame(self, row: Any, where: str, file: str, index: int) -> CatalystFrame:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a row is a {type(row).__name__}, expected a record.")
        numbers = _required(row, "atomic_numbers", where).astype(np.int64).reshape(-1)
        tags = row.get("tags")
        relaxed = row.get("pos_relaxed")
        # an initial structure's own energy is y_init, its target y_relaxed
        energy = _number(row, ("y_init",) if "y_relaxed" in row else _ENERGY)
        structure = Structure(
            atomic_numbers=numbers,
            positions=_vectors(_required(row, "pos", where)),
            cell=_vectors(_required(row, "cell", where)),
            pbc=(True, True, True),
            energy=energy,
            forces=next((_vectors(row[k]) for k in _FORCES if row.get(k) is not None), None),
            name=f"{file}[{index}]",
        )
        return CatalystFrame(
            structure=structure,
            sid=system_number(_item(row.get("sid")), where),
            fid=None if row.get("fid") is None else frame_number(_item(row["fid"]), where),
            fixed=_required(row, "fixed", where).reshape(-1) != 0,
            energy_reference=self._reference(row, where),
            reference_stated=self._declared is not None or _is_oc22(row),
            tags=None if tags is None else np.asarray(tags, np.int64).reshape(-1),
            relaxed_energy=_number(row, ("y_relaxed",)),
            relaxed_positions=None if relaxed is None else _vectors(relaxed),
        )

    def _reference(self, row: Mapping[str, Any], where: str) -> EnergyReference:
        if not _is_oc22(row):
            return self._declared or EnergyReference.ADSORPTION
        if self._declared is not None:
            require_same_reference(EnergyReference.TOTAL, self._declared, f"Reading {where} (OC22)")
        return EnergyReference.TOTAL


def _is_oc22(row: Mapping[str, Any]) -> bool:
    return bool(_item(row.get("oc22", 0)))


def _length(file: LmdbFile) -> int:
    stored = file.get("length")
    if stored is None:
        return len(file)
    length = decode_row(stored, f"{file.path}['length']")
    if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= len(file):
        raise ValueError(f"{file.path}: its length is {length!r}, with {len(file)} entries in it.")
    return length


def _required(row: Mapping[str, Any], key: str, where: str) -> np.ndarray:
    value = row.get(key)
    if not isinstance(value, np.ndarray):
        raise ValueError(
            f"{where}: {key} is {'missing' if value is None else type(value).__name__}, expected a "
            f"tensor. The row has {', '.join(map(str, row))}."
        )
    return value


def _vectors(tensor: Any) -> Float[np.ndarray, "n 3"]:
    return np.asarray(tensor, np.float64).reshape(-1, 3)


def _item(value: Any) -> Any:
    """A number that may be in a tensor of one element."""
    return value.reshape(-1)[0].item() if isinstance(value, np.ndarray) and value.size else value


def _number(row: Mapping[str, Any], keys: tuple[str, ...]) -> float | None:
    found = [_item(row[key]) for key in keys if row.get(key) is not None]
    return float(found[0]) if found else None
