"""A digest of frames, by which a run knows the data that it was begun with."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from equizoo.data.prepared import Chained, PreparedStructures, Selected
from equizoo.structure import Structure


def fingerprint(structures: Sequence[Structure], *, labels: bool = True) -> str:
    """The SHA-256 of the frames in their order: atoms, cell, state, fixed atoms, and ``labels``.

    Names and whatever else ``info`` has do not count. Prepared data are known by the SHA-256 of
    their shards, labels included, so that none of their frames is read; hence they are others than
    equal frames in memory.
    """
    digest = hashlib.sha256()
    _take_in(digest, structures, labels)
    return digest.hexdigest()


def _take_in(digest: Any, structures: Sequence[Structure], labels: bool) -> None:
    if isinstance(structures, Selected):
        digest.update(f"{len(structures)} of ".encode())
        digest.update(np.asarray(structures.indices, "<i8").tobytes())
        _take_in(digest, structures.structures, labels)
    elif isinstance(structures, Chained):
        digest.update(f"{len(structures.parts)} parts ".encode())
        for part in structures.parts:
            _take_in(digest, part, labels)
    elif isinstance(structures, PreparedStructures):
        digest.update(repr([(shard.frames, shard.sha256) for shard in structures.shards]).encode())
    else:
        for structure in structures:
            digest.update(_frame(structure, labels))


def _frame(s: Structure, labels: bool) -> bytes:
    labelled = (s.energy, s.forces, s.stress) if labels else ()
    arrays = (s.positions, s.cell, *(x for x in labelled if x is not None))
    there = [x is not None for x in labelled]
    state = float(s.charge), float(s.spin), s.head
    facts = repr((s.num_nodes, [bool(x) for x in s.pbc], state, there)).encode()
    numbers = np.asarray(s.atomic_numbers, "<i4").tobytes() + s.free.tobytes()
    return b"".join([facts, numbers, *(np.asarray(x, "<f8").tobytes() for x in arrays)])
