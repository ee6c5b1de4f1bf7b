"""Structures to extended XYZ, exactly: every number is read back as it was."""

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from equizoo.structure import USUAL_STATE, Structure, state_of


def to_extxyz(structure: Structure, keys: Mapping[str, str | None]) -> str:
    """One frame of text, its labels under ``keys``.

    Unlike ASE's writer, which keeps 8 decimals. Charge, spin and head are written where they are
    not the usual ones. Raises ``ValueError`` for a label without a key
    and for an extra in ``info`` that would not survive.
    """
    columns: dict[str, Any] = {"pos": structure.positions}
    comment: dict[str, str] = {}
    for label, key in keys.items():
        value = getattr(structure, label)
        if value is None:
            continue
        if key is None:
            raise ValueError(
                f"Structure {structure.name} has {label}, and no key to write it under."
            )
        if label == "forces":
            columns[key] = value
        else:
            comment[key] = _comment_item(key, value, structure.name)
    state = structure.state
    for key, value in state.items():
        if value is not None and value != USUAL_STATE[key]:
            comment[key] = _comment_item(key, value, structure.name)
    reserved = {"Lattice", "Properties", "pbc", "species", "pos", "Z", "move_mask"}
    for key, value in structure.info.items():
        if key in state and state_of({key: value}) == {key: state[key]}:
            comment[key] = _comment_item(key, value, structure.name)  # the same, as it was read
            continue
        per_atom = _is_column(key, value, structure.num_nodes)  # which ASE reads as something else
        misread = key == "charge" and per_atom or key in state and state_of({key: value})
        if key in reserved or key in columns or key in comment or misread:
            raise ValueError(
                f"Structure {structure.name}: the extra info[{key!r}] would be taken for something "
                "else. Rename it, or write the labels under other keys (LabelKeys)."
            )
        if _is_column(key, value, structure.num_nodes):
            columns[key] = value
        else:
            comment[key] = _comment_item(key, value, structure.name)
    kinds = {"f": "R", "i": "I", "u": "I", "b": "L"}
    blocks = {k: np.asarray(v).reshape(structure.num_nodes, -1) for k, v in columns.items()}
    properties = [f"{k}:{kinds[b.dtype.kind]}:{b.shape[1]}" for k, b in blocks.items()]
    head = [f"Properties={':'.join(['species:S:1', *properties])}"]
    if structure.cell.any():
        head.insert(0, f'Lattice="{" ".join(map(repr, structure.cell.ravel().tolist()))}"')
    head += [*comment.values(), 'pbc="{} {} {}"'.format(*("FT"[p] for p in structure.pbc))]
    rows = [
        " ".join([chemical_symbols[z], *(_word(x) for b in blocks.values() for x in b[i].tolist())])
        for i, z in enumerate(structure.atomic_numbers)
    ]
    return "\n".join([str(structure.num_nodes), " ".join(head), *rows]) + "\n"


def _word(value: Any) -> str:
    return "FT"[value] if isinstance(value, bool) else repr(value)


def _is_column(key: str, value: Any, nodes: int) -> bool:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iufb":
        return False
    per_atom = value.ndim in (1, 2) and len(value) == nodes and (value.shape + (2,))[1] > 1
    return per_atom and re.fullmatch(r"[A-Za-z_][\w-]*", key) is not None


def _comment_item(key: str, value: Any, name: str) -> str:
    """``key=value`` in a form that ASE's reader gives back equal, or else ``ValueError``."""
    from ase.io.extxyz import key_val_dict_to_str, key_val_str_to_dict

    if isinstance(value, (np.ndarray, np.generic)):
        value = value.astype(np.float64) if value.dtype.kind == "f" else value
        value = value.item() if value.ndim == 0 else value
    plain = isinstance(value, (bool, int, float, str, np.ndarray))
    forms = [value] if plain else []
    if not isinstance(value, np.ndarray):
        with contextlib.suppress(TypeError):
            forms.append("_JSON " + json.dumps(value))
    for form in forms:
        text = key_val_dict_to_str({key: form})
        back = key_val_str_to_dict(text)
        same = list(back) == [key] and np.array_equal(back[key], value)
        if same and "\n" not in text and isinstance(value, str) == isinstance(back[key], str):
            return text
    raise ValueError(
        f"Structure {name}: the extra info[{key!r}] = {value!r} cannot be written to extended XYZ "
        "unchanged. Drop it with dataclasses.replace(structure, info={...})."
    )
