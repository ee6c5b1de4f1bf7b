"""Prepared data: a folder of ArrayRecord shards and one JSON file that says all about them.

Frames are read one at a time, in any order, by threads and processes alike; a data set may be
larger than memory. :mod:`equizoo.data.prepare` writes such folders.
"""

import abc
import bisect
import collections
import hashlib
import itertools
import json
import operator
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, overload

import numpy as np
from ase.data import atomic_numbers
from jaxtyping import Int

from equizoo.config import parse_json
from equizoo.data.readers import Dataset, LeftOut, ReadReport
from equizoo.data.records import decode
from equizoo.data.statistics import NeighborRule, Statistics
from equizoo.neighbors import Neighbors
from equizoo.registry import cache_folder
from equizoo.structure import EnergyReference, Structure

FORMAT, VERSION = "equizoo.prepared", 1
INDEX, SETTINGS = "dataset.json", "prepare.json"  # what is there, and how it came about
UNITS = {"length": "Å", "energy": "eV", "forces": "eV/Å", "stress": "eV/Å^3, tension positive"}
_OPEN_SHARDS = 64  # files that one process keeps open


class Shard(NamedTuple):
    """One file of records."""

    file: str
    frames: int
    num_bytes: int
    sha256: str


def is_prepared(path: Path) -> bool:
    """Whether a folder holds prepared data, or is to hold them."""
    return (path / INDEX).is_file() or (path / SETTINGS).is_file()


def open_prepared(folder: Path, *, verify: bool = True) -> Dataset:
    """The data set in a folder that ``equizoo prepare`` has finished; frames stay on the disk.

    Every shard is checked against its SHA-256, once on a machine for as long as it does not
    change; ``verify=False`` checks sizes alone. Raises ``ValueError`` for a folder of another
    format or version, and for a shard that is missing, cut short or altered.
    """
    index = read_index(folder)
    try:
        shards = tuple(Shard(**shard) for shard in index["shards"])
        statistics = Statistics.from_dict(index["statistics"])
        report = report_from_dict(index["report"])
        isolated = {atomic_numbers[s]: float(e) for s, e in index["isolated_atoms"].items()}
        reference = EnergyReference(index["energy_reference"])
        stored = bool(index["neighbors_stored"])
        level, name = str(index["level_of_theory"]), str(index["name"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / INDEX} is damaged ({error!r}). Prepare the data again."
        ) from error
    for shard in shards:
        _require_whole(folder, shard, verify)
    structures = PreparedStructures(folder, shards, statistics.rule if stored else None)
    if len(structures) != statistics.sizes.frames:
        raise ValueError(
            f"{folder / INDEX} is damaged: its shards hold {len(structures)} frames, its "
            f"statistics are of {statistics.sizes.frames}. Prepare the data again."
        )
    return Dataset(
        structures=structures,
        energy_reference=reference,
        level_of_theory=level,
        isolated_atoms=isolated,
        report=report,
        name=name,
        statistics=statistics,
    )


def read_index(folder: Path) -> dict[str, Any]:
    """What the JSON file of a prepared folder says; ``ValueError`` for another format."""
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no {INDEX}. Preparing it was not finished: run the same "
            "`equizoo prepare` again, which goes on from there."
        )
    index = parse_json(path.read_text("utf-8"), str(path))
    if index.get("format") != FORMAT:
        raise ValueError(f"{path} has the format {index.get('format')!r}, expected {FORMAT!r}.")
    if index.get("version") != VERSION:
        raise ValueError(
            f"{path} is of version {index.get('version')!r} of {FORMAT}; this equizoo reads "
            f"version {VERSION}. Upgrade equizoo if the number is larger, else prepare again."
        )
    return index


class Unread(Sequence[Structure]):
    """Structures that are read when asked for, and so should not be held. A slice is a selection,
    unread."""

    @overload
    def __getitem__(self, index: SupportsIndex) -> Structure: ...
    @overload
    def __getitem__(self, index: slice) -> "Selected": ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Selected(self, np.arange(*index.indices(len(self))))
        return self._at(index)

    @abc.abstractmethod
    def _at(self, index: SupportsIndex) -> Structure:
        """One structure; ``IndexError`` beyond the last."""


class PreparedStructures(Unread):
    """The frames of prepared data.

    Goes to other processes as its path; each opens the files for itself.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], stored: NeighborRule | None = None):
        self.folder, self.shards = folder, tuple(shards)
        self.stored = stored  # the rule of the neighbours in the records; None: there are none
        self._ends = list(itertools.accumulate(shard.frames for shard in shards))
        self._start_reading()

    def _start_reading(self) -> None:
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _at(self, index: SupportsIndex) -> Structure:
        return self.with_neighbors(index)[0]

    def with_neighbors(self, index: SupportsIndex) -> tuple[Structure, Neighbors | None]:
        """A frame and its stored neighbours; ``ValueError`` naming a damaged shard."""
        position = range(len(self))[operator.index(index)]
        number = bisect.bisect_right(self._ends, position)
        shard = self.shards[number]
        within = position - (self._ends[number] - shard.frames)
        where = f"{self.folder / shard.file}[{within}]"
        try:
            record = self._reader(number).read([within])[0]
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"{where} cannot be read ({error}). The shard is damaged: prepare the data again."
            ) from error
        return decode(record, where)

    def _reader(self, number: int) -> Any:
        from array_record.python import array_record_module

        with self._lock:
            if (reader := self._readers.get(number)) is None:
                reader = array_record_module.ArrayRecordReader(
                    str(self.folder / self.shards[number].file),
                    "readahead_buffer_size:0,max_parallelism:0",
                    file_reader_buffer_size=32768,
                )
                if reader.num_records() != self.shards[number].frames:
                    raise IndexError(
                        f"{reader.num_records()} records, expected {self.shards[number].frames}"
                    )
                self._readers[number] = reader
                if len(self._readers) > _OPEN_SHARDS:  # closes when no thread reads from it
                    self._readers.popitem(last=False)
            self._readers.move_to_end(number)
            return reader

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_readers", "_lock")
        return {key: value for key, value in self.__dict__.items() if key not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_reading()


class Selected(Unread):
    """Some structures of a sequence, in an order of their own."""

    def __init__(self, structures: Sequence[Structure], indices: Int[np.ndarray, " selected"]):
        self.structures, self.indices = structures, indices

    def __len__(self) -> int:
        return len(self.indices)

    def _at(self, index: SupportsIndex) -> Structure:
        return self.structures[int(self.indices[index])]


class Chained(Unread):
    """Sequences of structures one after the other."""

    def __init__(self, parts: Sequence[Sequence[Structure]]):
        self.parts = tuple(parts)
        self._ends = list(itertools.accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _at(self, index: SupportsIndex) -> Structure:
        part, within = self.locate(index)
        return part[within]

    def locate(self, index: SupportsIndex) -> tuple[Sequence[Structure], int]:
        """The part that a structure is of, and its place there."""
        position = range(len(self))[operator.index(index)]
        number = bisect.bisect_right(self._ends, position)
        return self.parts[number], position - (self._ends[number] - len(self.parts[number]))


def is_lazy(structures: Sequence[Structure]) -> bool:
    """Whether structures are read when asked for, and so should not be held."""
    return isinstance(structures, Unread)


def selection(structures: Sequence[Structure], indices: Int[np.ndarray, " n"]) -> Sequence:
    """Some of the structures: unread where they are, else a tuple."""
    if is_lazy(structures):
        return Selected(structures, np.asarray(indices))
    return tuple(structures[i] for i in indices)


def chain(parts: Sequence[Sequence[Structure]]) -> Sequence[Structure]:
    """Structures one after the other: unread where one of the parts is, else a tuple."""
    if any(map(is_lazy, parts)):
        return Chained(parts)
    return tuple(itertools.chain(*parts))


def with_stored_neighbors(
    structures: Sequence[Structure], index: int, rule: NeighborRule
) -> tuple[Structure, Neighbors | None]:
    """A structure, and its neighbours where they are stored by this very rule."""
    if isinstance(structures, Selected):
        return with_stored_neighbors(structures.structures, int(structures.indices[index]), rule)
    if isinstance(structures, Chained):
        return with_stored_neighbors(*structures.locate(index), rule)
    if not isinstance(structures, PreparedStructures):
        return structures[index], None
    structure, neighbors = structures.with_neighbors(index)
    return structure, neighbors if structures.stored == rule else None


# ---- checks -------------------------------------------------------------------------------------


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_whole(folder: Path, shard: Shard, verify: bool) -> None:
    path = folder / shard.file
    if path.parent != folder or not path.is_file():
        raise ValueError(f"{path} is missing; {INDEX} names it. Copy it too, or prepare again.")
    status = path.stat()
    if status.st_size != shard.num_bytes:
        raise ValueError(
            f"{path} has {status.st_size} bytes, expected {shard.num_bytes}: it is cut short or "
            "altered. Copy it again, or prepare the data again."
        )
    if not verify:
        return
    # the file as it is now: any change to it makes this another name
    facts = (str(path.resolve()), status.st_ino, status.st_mtime_ns, status.st_size, shard.sha256)
    stamp = cache_folder() / "verified" / hashlib.sha256(repr(facts).encode()).hexdigest()
    if stamp.exists():
        return
    if (found := sha256_of_file(path)) != shard.sha256:
        raise ValueError(
            f"{path} has SHA-256 {found}, expected {shard.sha256}: it is damaged or altered. Copy "
            "it again, or prepare the data again."
        )
    try:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
    except OSError:  # nowhere to remember it: checked again next time
        return


# ---- reports as JSON ----------------------------------------------------------------------------


def report_to_dict(report: ReadReport) -> dict[str, Any]:
    """The report as plain values."""
    return {
        "frames": report.frames,
        "kept": report.kept,
        "isolated_atoms": report.isolated_atoms,
        "labels": dict(report.labels),
        "left_out": {
            reason: {"count": left.count, "examples": list(left.examples)}
            for reason, left in report.left_out.items()
        },
        "unread": dict(report.unread),
    }


def report_from_dict(fields: Mapping[str, Any]) -> ReadReport:
    """The inverse of :func:`report_to_dict`."""
    left_out = {
        reason: LeftOut(left["count"], tuple(left["examples"]))
        for reason, left in fields["left_out"].items()
    }
    return ReadReport(**{**fields, "left_out": left_out})


def write_index(path: Path, index: Mapping[str, Any]) -> None:
    """Writes the JSON file of a prepared folder."""
    path.write_text(
        json.dumps(index, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8"
    )
