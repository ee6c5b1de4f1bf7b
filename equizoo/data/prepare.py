"""Any readable data to a folder of prepared data: streaming, resumable, by several processes.

The work is cut into parts of so many frames as they stand in their source; a part becomes one
shard and a note of what is in it, each written whole or not at all. What was interrupted goes on
with the parts that have no note, and gives the same bytes as if it had not been.
"""

import concurrent.futures
import contextlib
import dataclasses
import difflib
import functools
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase.data import chemical_symbols

from equizoo.config import format_json, parse_json
from equizoo.data.catalyst import (
    is_catalyst,
    labelled_frame,
    open_catalyst,
    require_stated_reference,
)
from equizoo.data.catalyst_frames import Target
from equizoo.data.catalyst_references import read_adsorption_references
from equizoo.data.datasets import Origin, find_origins
from equizoo.data.frames import iter_frames
from equizoo.data.prepared import (
    FORMAT,
    INDEX,
    SETTINGS,
    UNITS,
    VERSION,
    Shard,
    open_prepared,
    report_from_dict,
    report_to_dict,
    sha256_of_file,
    write_index,
)
from equizoo.data.readers import (
    Dataset,
    IsolatedEnergies,
    LabelKeys,
    Labelling,
    ReadReport,
    check_labels,
    joined_report,
)
from equizoo.data.records import encode
from equizoo.data.reference_energies import fit_reduced
from equizoo.data.statistics import (
    LABELS,
    Counting,
    NeighborRule,
    Statistics,
    rule_from_dict,
    rule_to_dict,
)
from equizoo.graph import make_frame
from equizoo.structure import EnergyReference, Structure, require_same_reference
from equizoo.whole_files import written_whole

NOTES = "parts"  # in the folder, until all parts are there
STOP = "stop"  # among them, while workers are to end
FIRST_LOOK = 50  # frames of a source that are read before anything is written
WITHIN_5A = NeighborRule(5.0)
_WRITER = "group_size:1,zstd:3,max_parallelism:1"

Progress = Callable[[int, int], None]  # parts and frames that are done


def prepare(
    sources: Sequence[str | os.PathLike],
    folder: str | os.PathLike,
    *,
    keys: LabelKeys | None = None,
    energy_reference: EnergyReference | None = None,
    data_energy_reference: EnergyReference | None = None,
    adsorption_references: str | os.PathLike | None = None,
    level_of_theory: str | None = None,
    target: Target | None = None,
    rule: NeighborRule = WITHIN_5A,
    store_neighbors: bool = False,
    frames_per_shard: int = 4096,
    workers: int = 1,
    on_bad: Literal["raise", "skip"] = "raise",
    name: str = "",
    progress: Progress | None = None,
) -> Dataset:
    """The sources as one data set in ``folder``, opened; see :func:`equizoo.data.load_dataset`.

    A source is what :func:`load_dataset` takes. Neighbours are counted by ``rule``, and their
    lists stored on request. The same call goes on where an interrupted one stopped; ``workers``
    may differ between the two. Several of them start new processes, so a script needs
    ``if __name__ == "__main__":`` around the call.

    Raises ``ValueError`` for sources that do not go together (level of theory, energy reference,
    isolated atoms), for a folder with other things or of other settings in it, when a source has
    changed since, and as the readers do; with ``on_bad="skip"`` faulty frames are left out
    and counted; rows of OC20's and OC22's files that cannot be read at all raise nevertheless.
    """
    folder = Path(folder).expanduser()
    if frames_per_shard < 1 or workers < 1:
        raise ValueError(
            f"frames_per_shard ({frames_per_shard}) and workers ({workers}) must be at least 1."
        )
    origins = [
        origin
        for source in sources
        for origin in find_origins(
            source,
            keys,
            energy_reference=energy_reference,
            data_energy_reference=data_energy_reference,
            adsorption_references=adsorption_references,
            level_of_theory=level_of_theory,
            target=target,
        )
    ]
    if not origins:
        raise ValueError("There are no sources to prepare; expected at least one.")
    _require_one_level(origins)
    settings = {
        "version": VERSION,
        "name": name or ", ".join(origin.name for origin in origins),
        "frames_per_shard": frames_per_shard,
        "neighbors": rule_to_dict(rule),
        "store_neighbors": store_neighbors,
        "on_bad": on_bad,
        "sources": [_described(origin) for origin in origins],
    }
    for origin in origins:
        _first_look(origin)
    _open_folder(folder, settings)
    with _alone(folder):
        if not (folder / INDEX).is_file():
            for partial in [*folder.glob(".*.partial"), *(folder / NOTES).glob(".*.partial")]:
                partial.unlink()
            (folder / NOTES / STOP).unlink(missing_ok=True)  # of a process killed meanwhile
            _work_all(folder, settings, workers, progress)
            _finish(folder, settings)
        for note in (folder / NOTES).glob("*.json"):
            note.unlink()
        with contextlib.suppress(OSError):
            (folder / NOTES).rmdir()
    return open_prepared(folder)


# ---- what is to be done ------------------------------------------------------------------------


def _require_one_level(origins: Sequence[Origin]) -> None:
    first = origins[0]
    for other in origins[1:]:
        if other.level_of_theory != first.level_of_theory:
            raise ValueError(
                f"{first.name} is {first.level_of_theory!r} and {other.name} "
                f"{other.level_of_theory!r}; one prepared folder is of one level of theory. "
                "Prepare two, or state the level of theory."
            )


def _described(origin: Origin) -> dict[str, Any]:
    """The origin as plain values, with what tells whether its files have changed."""
    files = sorted(origin.path.rglob("*")) if origin.path.is_dir() else [origin.path]
    stats = [file.stat() for file in files if file.is_file()]
    fields = dataclasses.asdict(origin)
    if (references := fields.pop("references")) is not None:
        fields |= {"references": str(references), "references_sha256": sha256_of_file(references)}
    return {
        **fields,
        "path": str(origin.path.resolve()),
        "isolated_atoms": _by_symbol(origin.isolated_atoms),
        "num_bytes": sum(status.st_size for status in stats),
        "changed_ns": max((status.st_mtime_ns for status in stats), default=0),
    }


def _origin(described: Mapping[str, Any]) -> Origin:
    beside = ("num_bytes", "changed_ns", "references_sha256")
    fields = {k: v for k, v in described.items() if k not in beside}
    energy_references = {
        key: None if (value := fields[key]) is None else EnergyReference(value)
        for key in ("energy_reference", "converted_to")
    }
    isolated = {chemical_symbols.index(s): e for s, e in fields["isolated_atoms"].items()}
    return Origin(
        **{
            **fields,
            **energy_references,
            "path": Path(fields["path"]),
            "references": Path(fields["references"]) if "references" in fields else None,
            "keys": LabelKeys(**fields["keys"]),
            "require": tuple(fields["require"]),
            "isolated_atoms": isolated,
            "target": Target(fields["target"]),
        }
    )


def _first_look(origin: Origin) -> None:
    """Raises for labels under other names before hours are spent on reading without them."""
    if is_catalyst(origin.path):
        for first in open_catalyst(origin.path, origin.energy_reference).frames(stop=1):
            require_stated_reference(first)
        return
    labelling = Labelling(origin.keys, "skip")
    frames = [make() for make in itertools.islice(iter_frames(origin.path), FIRST_LOOK)]
    if not frames:
        raise ValueError(f"{origin.path} holds no frames; expected at least one.")
    for frame in frames:
        labelling.structure(frame)
    report = labelling.report()
    if report.kept and (report.unread or len(frames) < FIRST_LOOK):  # the latter: the whole file
        check_labels(origin.path, report, origin.keys, origin.require, frames[0])


def _open_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    path, text = folder / SETTINGS, format_json(json.loads(json.dumps(settings)))
    if path.is_file():
        if (before := path.read_text("utf-8")) != text:
            lines = difflib.unified_diff(
                before.splitlines(), text.splitlines(), "in the folder", "asked for", lineterm=""
            )
            raise ValueError(
                f"{folder} was begun with other settings, or a source has changed since. Choose "
                "another folder, or delete it.\n" + "\n".join(lines)
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"The output folder {folder} is not empty; choose another.")
    (folder / NOTES).mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        partial.write_text(text, "utf-8")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder; ``ValueError`` when another process does."""
    import fcntl

    with (folder / SETTINGS).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"Another process prepares {folder} right now; wait for it.") from None
        yield


# ---- the work ---------------------------------------------------------------------------------


def _work_all(
    folder: Path, settings: Mapping[str, Any], workers: int, progress: Progress | None
) -> None:
    if workers == 1:
        _work(folder, settings, 0, 1, None, progress)
        return
    # new processes, not forks: the threads of JAX do not survive forking
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        running = [
            pool.submit(_work, folder, settings, number, workers, os.getpid())
            for number in range(workers)
        ]
        try:
            while pending := concurrent.futures.wait(running, timeout=0.5).not_done:
                if any(r.done() and r.exception() is not None for r in running):
                    (folder / NOTES / STOP).touch()
                if progress is not None:
                    notes = _notes(folder)
                    progress(len(notes), sum(_note(note)["shard"]["frames"] for note in notes))
                del pending
        finally:
            (folder / NOTES / STOP).unlink(missing_ok=True)
        finished = [future.result() for future in running]  # raises what a worker has
        if not all(finished):
            raise ValueError(
                f"Preparing {folder} was stopped before all was read; run the same command again."
            )


def _work(
    folder: Path,
    settings: Mapping[str, Any],
    worker: int,
    workers: int,
    parent: int | None,
    progress: Progress | None = None,
) -> bool:
    """Makes every ``workers``-th part that is not there; ``False`` when told to stop before the
    end, or its parent is gone."""
    parts = frames = 0
    stop = folder / NOTES / STOP
    for number, described in enumerate(settings["sources"]):
        origin = _origin(described)

        def wanted(part: int, number: int = number) -> bool:
            mine = part % workers == worker
            return mine and not (folder / NOTES / f"{_part_name(number, part)}.json").is_file()

        for part, structures in _parts(origin, settings, wanted):
            if parent is not None and (os.getppid() != parent or stop.exists()):
                return False
            note = _make(folder, settings, _part_name(number, part), structures)
            parts, frames = parts + 1, frames + note["shard"]["frames"]
            if progress is not None:
                progress(parts, frames)
    return True


class _PartOfSource:
    """The structures of one part, read as they are asked for, and then what became of them."""

    def __init__(self, structures: Iterator[Structure], outcome: Callable[[], dict[str, Any]]):
        self.structures, self.outcome = structures, outcome


def _parts(
    origin: Origin, settings: Mapping[str, Any], wanted: Callable[[int], bool]
) -> Iterator[tuple[int, _PartOfSource]]:
    size = settings["frames_per_shard"]
    if is_catalyst(origin.path):
        source = open_catalyst(origin.path, origin.energy_reference)
        references = None
        if origin.references is not None:
            references = read_adsorption_references(origin.references)
        for part, start in enumerate(range(0, len(source), size)):
            if wanted(part):
                stop = min(start + size, len(source))
                frames_of_part = source.frames(start, stop)
                yield part, _catalyst_part(origin, frames_of_part, references, settings["on_bad"])
        return
    frames = iter_frames(origin.path)
    for part in itertools.count():
        first = next(frames, None)
        if first is None:
            return
        rest = itertools.chain([first], itertools.islice(frames, size - 1))
        if not wanted(part):
            for _ in rest:
                pass
            continue
        labelling = Labelling(origin.keys, settings["on_bad"])
        structures = (labelling.structure(make()) for make in rest)
        kept = (structure for structure in structures if structure is not None)
        yield part, _PartOfSource(kept, functools.partial(_outcome, labelling, origin))


def _outcome(labelling: Labelling, origin: Origin) -> dict[str, Any]:
    assert origin.energy_reference is not None
    return {
        "report": report_to_dict(labelling.report()),
        "isolated_atoms": _by_symbol(labelling.isolated_atoms),
        "energy_reference": origin.energy_reference.value,
    }


def _catalyst_part(
    origin: Origin,
    frames: Iterator[Any],
    references: Mapping[int, float] | None,  # [eV] by sid
    on_bad: str,
) -> _PartOfSource:
    counts: dict[str, Any] = {"frames": 0, "left_out": {}}
    labels = dict.fromkeys(LABELS, 0)
    reference: EnergyReference | None = origin.converted_to

    def structures() -> Iterator[Structure]:
        nonlocal reference
        for frame in frames:
            counts["frames"] += 1
            if reference is None:
                reference = frame.energy_reference
            elif origin.converted_to is None:
                require_same_reference(reference, frame.energy_reference, f"Reading {origin.path}")
            try:
                structure = labelled_frame(frame, reference, origin.target, references)
            except ValueError as error:
                if on_bad == "raise":
                    raise
                reason = str(error).replace(f"Structure {frame.structure.name}", "").strip(": ")
                left = counts["left_out"].setdefault(reason, {"count": 0, "examples": []})
                left["count"] += 1
                left["examples"] = [*left["examples"], frame.structure.name][:3]
                continue
            for label in LABELS:
                labels[label] += getattr(structure, label) is not None
            yield structure

    def outcome() -> dict[str, Any]:
        left_out = sum(left["count"] for left in counts["left_out"].values())
        report = counts | {"kept": counts["frames"] - left_out, "isolated_atoms": 0}
        return {
            "report": report | {"labels": labels, "unread": {}},
            "isolated_atoms": {},
            "energy_reference": None if reference is None else reference.value,
        }

    return _PartOfSource(structures(), outcome)


def _make(
    folder: Path, settings: Mapping[str, Any], name: str, part: _PartOfSource
) -> dict[str, Any]:
    """Writes the shard of a part, and then its note."""
    from array_record.python import array_record_module

    rule = rule_from_dict(settings["neighbors"])
    counting = Counting(rule)
    shard = folder / f"{name}.arrayrecord"
    with written_whole(shard) as partial:
        writer = array_record_module.ArrayRecordWriter(str(partial), _WRITER)
        try:
            for structure in part.structures:
                elements = np.unique(structure.atomic_numbers).tolist()
                frame = make_frame(structure, rule.cutoff, elements, limit=rule.limit)
                counting.add(frame)
                neighbors = frame.neighbors if settings["store_neighbors"] else None
                writer.write(encode(structure, neighbors))
        finally:
            writer.close()
        _to_disk(partial)
        statistics = counting.result()
        facts = Shard(
            file=shard.name,
            frames=statistics.sizes.frames,
            num_bytes=partial.stat().st_size,
            sha256=sha256_of_file(partial),
        )
    note = {"shard": facts._asdict(), "statistics": statistics.to_dict()} | part.outcome()
    with written_whole(folder / NOTES / f"{name}.json") as partial:
        write_index(partial, note)
        _to_disk(partial)
    return note


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _part_name(source: int, part: int) -> str:
    return f"{source:04d}-{part:07d}"


def _notes(folder: Path) -> list[Path]:
    return sorted((folder / NOTES).glob("[0-9]*.json"))


def _note(path: Path) -> dict[str, Any]:
    return parse_json(path.read_text("utf-8"), str(path))


# ---- the end ----------------------------------------------------------------------------------


def _finish(folder: Path, settings: Mapping[str, Any]) -> None:
    """Adds the notes up, and writes what makes the folder a data set."""
    origins = [_origin(described) for described in settings["sources"]]
    isolated = IsolatedEnergies()
    for origin in origins:
        for z, energy in origin.isolated_atoms.items():
            isolated.add(z, energy, origin.name)
    shards: list[dict[str, Any]] = []
    reports: dict[int, list[ReadReport]] = {number: [] for number in range(len(origins))}
    statistics: Statistics | None = None
    reference: EnergyReference | None = None
    for path in _notes(folder):
        note = _note(path)
        source = origins[number := int(path.name.partition("-")[0])]
        reports[number].append(report_from_dict(note["report"]))
        for symbol, energy in note["isolated_atoms"].items():
            isolated.add(chemical_symbols.index(symbol), energy, source.name)
        if not note["shard"]["frames"]:
            (folder / note["shard"]["file"]).unlink(missing_ok=True)
            continue
        shards.append(note["shard"])
        found = EnergyReference(note["energy_reference"])
        require_same_reference(reference or found, found, f"Preparing {folder}")
        reference = found
        counted = Statistics.from_dict(note["statistics"])
        statistics = counted if statistics is None else statistics + counted
    report = joined_report([report for part in reports.values() for report in part])
    if statistics is None or reference is None:
        reasons = "; ".join(report.left_out) or "there were none but isolated atoms"
        raise ValueError(f"{folder}: no frame was kept: {reasons}.")
    for number, origin in enumerate(origins):
        whole = joined_report(reports[number])
        if not is_catalyst(origin.path) and whole.kept:
            first = next(iter_frames(origin.path))()
            check_labels(origin.path, whole, origin.keys, origin.require, first)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "name": settings["name"],
        "sources": [origin.name for origin in origins],
        "units": UNITS,
        "energy_reference": reference.value,
        "level_of_theory": origins[0].level_of_theory,
        "isolated_atoms": _by_symbol(isolated),
        "neighbors_stored": settings["store_neighbors"],
        "summary": summary(statistics),
        "report": report_to_dict(report),
        "statistics": statistics.to_dict(),
        "shards": shards,
    }
    with written_whole(folder / INDEX) as partial:
        write_index(partial, index)
        _to_disk(partial)


def summary(statistics: Statistics) -> dict[str, Any]:
    """What a reader wants to know first, worked out from the statistics."""
    sizes = statistics.sizes
    energies: dict[str, float] | None = None
    why: str | None = None
    try:
        energies = _by_symbol(fit_reduced(statistics.compositions))
    except ValueError as error:
        why = str(error)
    return {
        "frames": sizes.frames,
        "atoms": sizes.nodes,
        "atoms_per_frame": {"mean": sizes.nodes / sizes.frames, "largest": sizes.most_nodes},
        "elements": dict(statistics.atoms),
        "label_coverage": {k: n / sizes.frames for k, n in statistics.labels.items()},
        "forces_rms_eV_per_A": statistics.forces_rms,
        "neighbors": str(statistics.rule),
        "neighbors_per_atom": {"mean": sizes.mean_neighbors, "largest": sizes.max_in},
        "least_squares_E0_eV": energies,
        "least_squares_E0_missing_because": why,
    }


def _by_symbol(energies: Mapping[int, float]) -> dict[str, float]:
    return {chemical_symbols[z]: energies[z] for z in sorted(energies)}
