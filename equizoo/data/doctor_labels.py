"""Labels that are there and not read, cannot be read, or are zeros where nothing was computed."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from equizoo.data.doctor_findings import Finding, Verdict, named
from equizoo.data.doctor_frames import FrameFacts
from equizoo.data.readers import LABELS, Dataset, LabelKeys, label_like, stress_matrix
from equizoo.structure import Structure

_SAME = 1e-5  # relative: the same number, printed by another program


def unread(dataset: Dataset, keys: LabelKeys) -> Iterator[Finding]:
    """Keys of the file that look like labels and are not read."""
    structures = dataset.structures
    having: dict[tuple[str, str], list[int]] = {}
    for i, structure in enumerate(structures):
        for key, value in structure.info.items():
            if label := label_like(key, value, structure.num_nodes):
                having.setdefault((label, key), []).append(i)
    for (label, key), frames in having.items():
        yield _judged(structures, keys, label, key, frames)
    for label in LABELS:
        lacking = [i for i, s in enumerate(structures) if getattr(s, label) is None]
        if 0 < len(lacking) < len(structures):
            yield Finding(
                "labels",
                Verdict.NOTE,
                f"{len(lacking)} of {len(structures)} frames have no {label}",
                len(lacking),
                named(structures, lacking),
                "They count as absent, never as zero.",
            )
    unlabelled = not any(getattr(s, label) is not None for s in structures for label in LABELS)
    if unlabelled and not having:
        yield Finding(
            "labels",
            Verdict.WARNING,
            "no frame has energy, forces or stress, and no key looks like one: nothing to learn",
            len(structures),
            fix=f"Expected the keys {', '.join(keys.names)}; say which ones the file has.",
        )


def _judged(
    structures: Sequence[Structure], keys: LabelKeys, label: str, key: str, frames: list[int]
) -> Finding:
    check = "unread labels"
    virial = label == "stress" and "virial" in key.lower()
    wanted = getattr(keys, label)
    if wanted is None:
        message = f"{key!r} looks like {label}, which are not to be read"
        return Finding(check, Verdict.NOTE, message, len(frames))
    lacking = [i for i in frames if getattr(structures[i], label) is None]
    if lacking:
        field = "virial" if virial else label
        sign = " (a gradient has the opposite sign)" if "grad" in key.lower() else ""
        option = f"--{label}-key {key}, or " if not virial else ""
        return Finding(
            check,
            Verdict.WARNING if label == "stress" else Verdict.ERROR,
            f"{key!r} looks like {label} and is not read: {wanted!r} is, which these frames do not "
            "have",
            len(lacking),
            named(structures, lacking),
            f"Say so with {option}LabelKeys({field}={key!r}){sign}.",
        )
    read = np.concatenate([np.ravel(getattr(structures[i], label)) for i in frames])
    other = np.concatenate([_flat(structures[i], label, key) for i in frames])
    scale = np.abs(read).max() or 1.0
    if np.abs(read - other).max() <= _SAME * scale:
        return Finding(check, Verdict.NOTE, f"{key!r} is the same as {wanted!r}", len(frames))
    factor = float(np.median(read / np.where(other == 0, np.nan, other)))
    largest = np.abs(read - other).max()
    if label == "energy" and largest < 5e-3 * min(structures[i].num_nodes for i in frames):
        message = f"{key!r} differs from {wanted!r}, which is read, by up to {largest:.2g} eV"
        return Finding(check, Verdict.NOTE, message, len(frames))
    if (
        np.isfinite(factor)
        and abs(factor - 1) > 0.01
        and np.abs(read - factor * other).max() <= 1e-3 * scale
    ):
        message = f"{wanted!r} is {factor:.6g} times {key!r}: the same in another unit or sign"
        return Finding(check, Verdict.NOTE, message, len(frames))
    return Finding(
        check,
        Verdict.WARNING,
        f"{key!r} looks like {label} too, and differs from {wanted!r}, which is read, by up to "
        f"{largest:.3g}",
        len(frames),
        named(structures, frames),
        "Which of them is meant?",
    )


def _flat(structure: Structure, label: str, key: str) -> Float[np.ndarray, " values"]:
    values = np.asarray(structure.info[key], dtype=np.float64)
    if label != "stress":
        return values.ravel()
    try:
        return stress_matrix(values).ravel()
    except ValueError:  # asymmetric, as no stress is: it differs
        return np.full(9, np.nan_to_num(values.ravel()[0]) + 1.0)


def unreadable(dataset: Dataset) -> Iterator[Finding]:
    """Frames that had to be left out when reading: NaN, no volume, labels of a wrong shape."""
    for reason, left in dataset.report.left_out.items():
        yield Finding(
            "unreadable frames",
            Verdict.ERROR,
            reason.rstrip("."),
            left.count,
            left.examples,
            "Training refuses such a file; repair the frames or leave them out.",
        )


def zeros(dataset: Dataset, facts: Sequence[FrameFacts]) -> Iterator[Finding]:
    """Zeros that stand for something else: constrained atoms, labels that were not computed."""
    structures = dataset.structures
    several = [i for i, s in enumerate(structures) if s.num_nodes > 1]
    blank = [i for i in several if facts[i].zero_forces.all() and facts[i].unexplained_zeros > 0]
    if blank:
        yield Finding(
            "zeroed forces",
            Verdict.ERROR,
            "all forces of a frame are exactly zero, and not by symmetry",
            len(blank),
            named(structures, blank),
            "Forces that were not computed must be absent: remove the column in these frames.",
        )
    yield from _constrained(structures, facts, sorted(set(several) - set(blank)))
    energies = [i for i in several if structures[i].energy == 0]
    if energies:
        yield Finding(
            "zeroed energies",
            Verdict.ERROR,
            "energies are exactly zero",
            len(energies),
            named(structures, energies),
            "Energies that were not computed must be absent: remove the key in these frames.",
        )
    stresses = [i for i in several if (t := structures[i].stress) is not None and not t.any()]
    if stresses:
        yield Finding(
            "zeroed stresses",
            Verdict.ERROR,
            "all components of the stress are exactly zero",
            len(stresses),
            named(structures, stresses),
            "A stress that was not computed must be absent: remove the key in these frames.",
        )


def _constrained(
    structures: Sequence[Structure], facts: Sequence[FrameFacts], several: Sequence[int]
) -> Iterator[Finding]:
    """Single atoms with zero force: by a constraint the others' forces do not add up to zero."""
    partly = [i for i in several if facts[i].unexplained_zeros > 0]
    by_constraint = [
        i
        for i in partly
        if facts[i].net_force_ratio > 0.01 or _is_fixed(structures[i].info, facts[i])
    ]
    if by_constraint:
        atoms = sum(facts[i].unexplained_zeros for i in by_constraint)
        yield Finding(
            "zeroed forces",
            Verdict.ERROR,
            f"{atoms} atoms have exactly no force, without symmetry, and the remaining forces of "
            "these frames do not add up to zero or the atoms are marked as fixed",
            len(by_constraint),
            named(structures, by_constraint),
            "A constraint (ASE's FixAtoms) was applied: write atoms.get_forces("
            "apply_constraint=False), or leave out these forces.",
        )
    rest = sorted(set(partly) - set(by_constraint))
    if rest:
        yield Finding(
            "zeroed forces",
            Verdict.NOTE,
            "single atoms have exactly no force, and all forces add up to zero",
            len(rest),
            named(structures, rest),
        )


def _is_fixed(info: Mapping[str, object], facts: FrameFacts) -> bool:
    fixed = np.asarray(info.get("fixed", False), dtype=bool)
    some = fixed.shape == facts.zero_forces.shape and 0 < fixed.sum() < len(fixed)
    return bool(some and np.array_equal(fixed, facts.zero_forces))
