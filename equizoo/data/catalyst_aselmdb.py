"""ASE-LMDB files of fairchem (``.aselmdb``): LMDB, zlib and JSON, and nothing else.

Keys are ids from "1"; values are ASE rows, whose arrays are written
``{"__ndarray__": [shape, dtype, flat]}``.
"""

import functools
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from equizoo.data.catalyst_frames import (
    CatalystFrame,
    CatalystSource,
    frame_number,
    system_number,
)
from equizoo.data.lmdb_files import LmdbFile
from equizoo.structure import EnergyReference, Structure

_DTYPES = ("float64", "float32", "int64", "int32", "int16", "int8", "uint8", "bool")


class AseLmdb(CatalystSource):
    """The rows of one file, or of all ``*.aselmdb`` of a folder in the order of names.

    Rows do not say what their energies are measured against; without ``energy_reference`` they are
    total energies, what ASE's calculators give. Raises ``ValueError`` for a damaged row.
    """

    def __init__(self, path: Path, energy_reference: EnergyReference | None = None):
        self.path = path
        self._declared = energy_reference
        paths = sorted(path.glob("*.aselmdb")) if path.is_dir() else [path]
        if not paths:
            raise ValueError(f"{path} holds no *.aselmdb; expected ASE-LMDB files.")
        self._files = [LmdbFile(file) for file in paths]

    @functools.cached_property
    def _ids(self) -> list[list[int]]:
        return [sorted(int(k) for k in file.names() if k.isdecimal()) for file in self._files]

    def __len__(self) -> int:
        return sum(map(len, self._ids))

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[CatalystFrame]:
        stop = len(self) if stop is None else min(stop, len(self))
        first = 0
        for file, ids in zip(self._files, self._ids, strict=True):
            for number in ids[max(start - first, 0) : max(stop - first, 0)]:
                where = f"{file.path}[{number}]"
                yield self._frame(_decode(file.get(str(number)), where), where, file.path.name)
            first += len(ids)

    def _frame(self, row: Mapping[str, Any], where: str, file: str) -> CatalystFrame:
        try:
            numbers = np.asarray(row["numbers"], np.int64)
            positions = np.asarray(row["positions"], np.float64)
            a, b, c = (bool(p) for p in row.get("pbc", (False, False, False)))
            cell = np.asarray(row.get("cell", np.zeros((3, 3))), np.float64).reshape(3, 3)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{where}: no row of atoms ({error!r}).") from error
        carried = {**row.get("key_value_pairs", {}), **row.get("data", {})}
        forces, tags = row.get("forces"), row.get("tags")
        relaxed = carried.get("pos_relaxed")
        fid = carried.get("fid")
        if fid is None and "-frame-" in str(carried.get("sid")):
            fid = str(carried["sid"]).partition("-frame-")[2]
        return CatalystFrame(
            structure=Structure(
                atomic_numbers=numbers,
                positions=positions,
                cell=cell,
                pbc=(a, b, c),
                energy=None if row.get("energy") is None else float(row["energy"]),
                forces=None if forces is None else np.asarray(forces, np.float64),
                name=f"{file}{where[where.rindex('[') :]}",
            ),
            sid=system_number(carried.get("sid"), where),
            fid=None if fid is None else frame_number(fid, where),
            fixed=_fixed(row.get("constraints") or (), len(numbers), where),
            energy_reference=self._declared or EnergyReference.TOTAL,
            reference_stated=self._declared is not None,
            tags=None if tags is None else np.asarray(tags, np.int64),
            relaxed_energy=None if (y := carried.get("y_relaxed")) is None else float(y),
            relaxed_positions=None if relaxed is None else np.asarray(relaxed, np.float64),
        )


def _decode(content: bytes | None, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(zlib.decompress(content or b""), object_hook=_array)
    except (zlib.error, ValueError, TypeError) as error:
        raise ValueError(f"{where}: damaged ({error}). Fetch the file again.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row is a {type(row).__name__}, expected a JSON object.")
    return row


def _array(item: dict[str, Any]) -> Any:
    if "__ndarray__" not in item:
        return item
    shape, dtype, flat = item["__ndarray__"]
    if dtype not in _DTYPES:
        raise ValueError(f"an array has dtype {str(dtype)[:40]!r}")
    return np.array(flat, dtype).reshape(shape)


def _fixed(constraints: Any, nodes: int, where: str) -> np.ndarray:
    fixed = np.zeros(nodes, bool)
    for constraint in constraints:
        if constraint.get("name") != "FixAtoms":
            raise ValueError(
                f"{where}: has the constraint {str(constraint.get('name'))[:40]}; expected "
                "FixAtoms, which is all that OC20 and OC22 have."
            )
        fixed[np.asarray(constraint["kwargs"]["indices"], np.int64)] = True
    return fixed
