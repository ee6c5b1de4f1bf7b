"""Leaderboard files: written from parts, checked as the server would, scored where labels are.

Arrays are written and read in blocks, so that memory does not grow with their length.
"""

import contextlib
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from equizoo.data.catalyst_frames import CatalystSource
from equizoo.eval.leaderboard_parts import PartContent, PartFile
from equizoo.eval.leaderboard_tasks import TASKS, Kind, Layout, Task
from equizoo.eval.open_catalyst import IS2REMetrics, IS2RSMetrics, S2EFMetrics
from equizoo.structure import EnergyReference
from equizoo.whole_files import written_whole

_BLOCK = 1 << 22  # bytes read or written at a time
_ID = {
    Kind.S2EF: re.compile(r"\d+_\d+"),
    Kind.IS2RE: re.compile(r"\d+"),
    Kind.IS2RS: re.compile(r"\d+"),
}
_EXAMPLE = {Kind.S2EF: "'1000100_50'", Kind.IS2RE: "'1000100'", Kind.IS2RS: "'1000100'"}


# ---- writing -----------------------------------------------------------------------------------


def write_file(path: Path, task: Task, layout: Layout, parts: Sequence[PartFile]) -> None:
    """One ``.npz`` of all ``parts``, float32, always the same bytes for the same predictions.

    Raises ``ValueError`` when parts are missing, when an id comes twice, and when ``path`` exists.
    """
    if path.exists():
        raise ValueError(f"{path} exists. Nothing is overwritten: choose another name.")
    if missing := [part for part in parts if not part.path.exists()]:
        raise ValueError(f"{len(missing)} of {len(parts)} parts are missing: {missing[0].path}.")
    with written_whole(path) as partial:
        scratch = partial.with_suffix(".scratch")
        try:
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
                for split in task.splits:
                    of_split = [part for part in parts if part.split == split]
                    _write_split(archive, split, task, layout, of_split, scratch)
        finally:
            scratch.unlink(missing_ok=True)


def _write_split(
    archive: zipfile.ZipFile,
    split: str,
    task: Task,
    layout: Layout,
    parts: Sequence[PartFile],
    scratch: Path,
) -> None:
    free_only = layout is Layout.EVALAI and task.kind is Kind.S2EF
    ids, energy, rows = [], [], []
    for part in parts:
        content = PartContent.read(part)
        ids.append(content.ids)
        energy.append(content.energy)
        rows.append(_rows(content, free_only)[0])
    all_ids = np.concatenate(ids)
    order = np.argsort(all_ids, kind="stable")
    twice = np.flatnonzero(all_ids[order][1:] == all_ids[order][:-1])
    if len(twice):
        raise ValueError(f"{split} has the id {all_ids[order][twice[0]]!r} twice; clean the data.")
    if layout is Layout.SPACE:
        order = np.arange(len(all_ids))
    _put(archive, f"{split}_ids", [all_ids[order]])
    if task.kind.has_energy:
        _put(archive, f"{split}_energy", [np.concatenate(energy)[order]])
    if task.kind.vectors is None:
        return
    counts = np.concatenate(rows)
    blocks: Iterator[np.ndarray] = (_rows(PartContent.read(part), free_only)[1] for part in parts)
    if layout is Layout.EVALAI:
        blocks = _reordered(blocks, counts, order, scratch)
    shape = (int(counts.sum()), 3)
    _put(archive, f"{split}_{task.kind.vectors}", blocks, shape, np.dtype(np.float32))
    # as np.split wants them: without the end of the last
    _put(archive, f"{split}_chunk_idx", [np.cumsum(counts[order])[:-1]])


def _rows(
    content: PartContent, free_only: bool
) -> tuple[Int[np.ndarray, " systems"], Float[np.ndarray, "rows 3"]]:
    """How many rows of vectors each system has in the file, and those rows."""
    if not free_only:
        return content.num_atoms, content.vectors
    starts = np.cumsum(content.num_atoms) - content.num_atoms
    return np.add.reduceat(content.free.astype(np.int64), starts), content.vectors[content.free]


def _reordered(
    blocks: Iterator[Float[np.ndarray, "rows 3"]],
    counts: Int[np.ndarray, " systems"],
    order: Int[np.ndarray, " systems"],
    scratch: Path,
) -> Iterator[Float[np.ndarray, "rows 3"]]:
    """The rows of systems in another order, by way of a file."""
    with open(scratch, "wb") as file:
        for block in blocks:
            file.write(np.ascontiguousarray(block).tobytes())
    if not counts.sum():
        return
    rows = np.memmap(scratch, np.float32, "r", shape=(int(counts.sum()), 3))
    ends = np.cumsum(counts)
    for some in np.array_split(order, max(1, len(order) // 1000)):
        yield np.concatenate([rows[ends[i] - counts[i] : ends[i]] for i in some])


def _put(
    archive: zipfile.ZipFile,
    name: str,
    blocks: Iterator[np.ndarray] | Sequence[np.ndarray],
    shape: tuple[int, ...] | None = None,
    dtype: np.dtype | None = None,
) -> None:
    """An array of the archive, from its blocks; ``shape`` and ``dtype`` are those of a single."""
    if shape is None or dtype is None:
        (single,) = blocks
        shape, dtype, blocks = single.shape, single.dtype, [single]
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            assert block.dtype == dtype
            file.write(np.ascontiguousarray(block).tobytes())


# ---- checking ----------------------------------------------------------------------------------


class Checked(NamedTuple):
    """What a file that passed is for, and how many systems and rows of vectors each split has."""

    task: Task
    systems: Mapping[str, int]
    rows: Mapping[str, int]
    dtypes: Mapping[str, str]


def check_file(
    path: Path, task: Task | None = None, counts: Mapping[str, int] | None = None
) -> Checked:
    """What the file holds, once all that the server would refuse has been looked for.

    ``task`` is told from the arrays unless given; ``counts`` are the official ones of the test
    splits unless given. Raises ``ValueError`` listing all problems: missing splits or arrays,
    another number of systems, duplicate or malformed ids, object arrays, lengths that do not match,
    a wrong ``chunk_idx``, numbers that are not finite.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            task = task or _told_task(names, path)
            checker = _Checker(archive, task, counts or task.counts["test"])
            for split in task.splits:
                checker.split(split)
    except (zipfile.BadZipFile, OSError, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: no .npz file, or damaged ({error}).") from error
    wanted = {name for split in task.splits for name in task.arrays(split)}
    checker.problems += [f"{n} is no array of {task.name}" for n in names if n not in wanted]
    if checker.problems:
        raise ValueError(
            f"{path} would be refused for {task.name}:\n  " + "\n  ".join(checker.problems)
        )
    return Checked(task, checker.systems, checker.rows, checker.dtypes)


def _told_task(names: Sequence[str], path: Path) -> Task:
    """The task whose arrays are most like those in the file."""
    alike = {t: len(_arrays(t) & set(names)) - len(_arrays(t) - set(names)) for t in TASKS}
    best = max(alike.values())
    found = [name for name, likeness in alike.items() if likeness == best]
    if len(found) != 1 or not set(names) & _arrays(found[0]):
        raise ValueError(
            f"{path} has the arrays {', '.join(names)[:200] or 'none'}, from which its leaderboard "
            f"cannot be told; say it with --task: {', '.join(TASKS)}."
        )
    return TASKS[found[0]]


def _arrays(task: str) -> set[str]:
    return {name for split in TASKS[task].splits for name in TASKS[task].arrays(split)}


class _Checker:
    """Problems of a file, one split after the other."""

    def __init__(self, archive: zipfile.ZipFile, task: Task, counts: Mapping[str, int]):
        self.archive, self.task, self.counts = archive, task, counts
        self.there = set(archive.namelist())
        self.problems: list[str] = []
        self.systems: dict[str, int] = {}
        self.rows: dict[str, int] = {}
        self.dtypes: dict[str, str] = {}

    def split(self, split: str) -> None:
        names = self.task.arrays(split)
        if not any(f"{name}.npy" in self.there for name in names):
            self.problems.append(f"the split {split} is missing")
            return
        if missing := [name for name in names if f"{name}.npy" not in self.there]:
            self.problems.append(f"{', '.join(missing)} missing")
            return
        self._ids(split)
        systems = self.systems.get(split)
        if self.task.kind.has_energy:
            self._floats(f"{split}_energy", (systems,))
        vectors = self.task.kind.vectors
        if vectors is not None:
            shape = self._floats(f"{split}_{vectors}", (None, 3))
            if shape is not None:
                self.rows[split] = shape[0]
                self._chunks(split, shape[0], systems)

    def _ids(self, split: str) -> None:
        name = f"{split}_ids"
        with self._open(name) as array:
            if array is None:
                return
            if len(array.shape) != 1 or array.dtype.kind != "U":
                self.problems.append(
                    f"{name} is {array.dtype} of shape {array.shape}, expected text of one axis"
                )
                return
            ids = array.whole()
        self.systems[split] = len(ids)
        if len(ids) != self.counts[split]:
            self.problems.append(f"{name}: {len(ids)} systems, expected {self.counts[split]}")
        unique, times = np.unique(ids, return_counts=True)
        if len(unique) != len(ids):
            self.problems.append(
                f"{name}: {len(ids) - len(unique)} ids come again, such as "
                f"{str(unique[times.argmax()])!r}"
            )
        pattern = _ID[self.task.kind]
        if other := [str(i) for i in unique.tolist() if not pattern.fullmatch(i)]:
            self.problems.append(
                f"{name}: {len(other)} ids such as {other[0][:40]!r}, expected "
                f"{_EXAMPLE[self.task.kind]}"
            )

    def _floats(self, name: str, expected: tuple[int | None, ...]) -> tuple[int, ...] | None:
        """The shape, where it and the numbers are right."""
        with self._open(name) as array:
            if array is None:
                return None
            fits = len(array.shape) == len(expected) and all(
                e is None or n == e for n, e in zip(array.shape, expected, strict=True)
            )
            if not fits or array.dtype.kind != "f":
                wanted = str(expected).replace("None", "any")
                self.problems.append(
                    f"{name} is {array.dtype} of shape {array.shape}, expected floats of {wanted}"
                )
                return None
            bad = sum(int(np.sum(~np.isfinite(block))) for block in array.blocks())
            if bad:
                self.problems.append(f"{name}: {bad} numbers are not finite")
            self.dtypes[name] = str(array.dtype)
            return array.shape

    def _chunks(self, split: str, rows: int, systems: int | None) -> None:
        name = f"{split}_chunk_idx"
        with self._open(name) as array:
            if array is None:
                return
            if array.dtype.kind not in "iu" or len(array.shape) != 1:
                self.problems.append(
                    f"{name} is {array.dtype} of shape {array.shape}, expected integers of one axis"
                )
                return
            ends = array.whole().astype(np.int64)
        if systems is not None and len(ends) != systems - 1:
            self.problems.append(
                f"{name} has {len(ends)} entries, expected {systems - 1}: the ends of all systems "
                "but the last"
            )
        bounds = np.concatenate([[0], ends, [rows]])
        if (np.diff(bounds) <= 0).any():
            where = int(np.argmax(np.diff(bounds) <= 0))
            self.problems.append(
                f"{name} does not rise from above 0 to below {rows}: system {where} would have "
                f"rows {bounds[where]} to {bounds[where + 1]}"
            )

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator["_Array | None"]:
        with self.archive.open(f"{name}.npy") as file:
            try:
                array: _Array | None = _Array(file)
            except ValueError as error:
                self.problems.append(f"{name}: {error}")
                array = None
            yield array


class _Array:
    """An array of an archive, read in blocks; pickled objects are refused by their dtype."""

    def __init__(self, file: Any):
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"an array of format {version}, expected (1, 0)")
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        self.shape, fortran, self.dtype = read(file)
        if self.dtype.hasobject:
            raise ValueError("an array of objects, which servers refuse; give it one dtype")
        if fortran and len(self.shape) > 1:
            raise ValueError("an array in Fortran order, expected C order")
        self._file = file

    def blocks(self) -> Iterator[np.ndarray]:
        """All numbers, some at a time, without their shape."""
        left = int(np.prod(self.shape)) * self.dtype.itemsize
        block = max(_BLOCK // self.dtype.itemsize, 1) * self.dtype.itemsize
        while left:
            content = self._file.read(min(block, left))
            if not content or len(content) % self.dtype.itemsize:
                raise EOFError("an array ends too early")
            left -= len(content)
            yield np.frombuffer(content, self.dtype)

    def whole(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, self.dtype), *self.blocks()]).reshape(self.shape)


# ---- scoring -----------------------------------------------------------------------------------


def score_file(
    path: Path,
    task: Task,
    layout: Layout,
    sources: Mapping[str, CatalystSource],
    energy_reference: EnergyReference | None = None,
) -> dict[str, dict[str, float | int]]:
    """The metrics of every split from a file and the labels of ``sources``.

    Energies in the file are of the task's reference unless ``energy_reference`` says otherwise;
    labels are converted to it where a frame has what that needs. Holds one split of the file in
    memory. Raises ``ValueError`` for systems that the file lacks, lengths that do not match
    ``layout``, and data without labels.
    """
    reference = energy_reference or task.energy_reference
    return {
        split: _score_split(path, split, task, layout, source, reference)
        for split, source in sources.items()
    }


def _score_split(
    path: Path,
    split: str,
    task: Task,
    layout: Layout,
    source: CatalystSource,
    reference: EnergyReference,
) -> dict[str, float | int]:
    with np.load(path, allow_pickle=False) as arrays:
        if absent := [name for name in task.arrays(split) if name not in arrays]:
            raise ValueError(f"{path} has no {', '.join(absent)}, arrays of {task.name}.")
        ids, *values = (arrays[name] for name in task.arrays(split))
    where = {str(system): row for row, system in enumerate(ids)}
    energy = values.pop(0) if task.kind.has_energy else None
    vectors = np.split(values[0], values[1]) if values else None
    s2ef, is2re, is2rs = S2EFMetrics(reference), IS2REMetrics(reference), IS2RSMetrics()
    for given in source:
        frame = given if task.kind is Kind.IS2RS else given.in_reference(reference)
        row = where.get(frame.id if task.kind is Kind.S2EF else str(frame.sid))
        if row is None:
            raise ValueError(f"{path} has no {split} {frame.id}, which the data has.")
        if task.kind is Kind.IS2RE and energy is not None:
            is2re.add(frame, float(energy[row]))
            continue
        assert vectors is not None
        atoms = frame.free if (layout, task.kind) == (Layout.EVALAI, Kind.S2EF) else slice(None)
        full = np.zeros((frame.structure.num_nodes, 3))
        if len(vectors[row]) != len(full[atoms]):
            raise ValueError(
                f"{path} has {len(vectors[row])} vectors for {split} {frame.id}, which has "
                f"{len(full)} atoms, {int(frame.free.sum())} of them free. Is its layout another "
                "than --layout says?"
            )
        full[atoms] = vectors[row]
        if energy is None:
            is2rs.add(frame, full)
        else:
            s2ef.add(frame, float(energy[row]), full)
    metrics = {Kind.S2EF: s2ef, Kind.IS2RE: is2re, Kind.IS2RS: is2rs}[task.kind]
    return metrics.summary()
