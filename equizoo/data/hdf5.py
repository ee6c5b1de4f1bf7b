"""HDF5 files in the layout of MACE: ``config_batch_<i>/config_<j>``, with labels and weights.

Needs h5py (``pip install 'equizoo[hdf5]'``). A label that is absent stands there as the text
"None", or as zeros of weight zero; both are absent here. Files of an older layout have the labels
beside the positions instead of in ``properties``.
"""

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

HDF5 = "mace-hdf5"
_STRUCTURE = {"atomic_numbers", "positions", "cell", "pbc", "properties", "property_weights"}
_OLD_LABELS = ("energy", "forces", "stress", "virials", "dipole", "charges", "polarizability")
_STATE = {"total_charge": "charge", "total_spin": "spin"}


def iter_hdf5(path: Path) -> Iterator[Callable[[], Atoms]]:
    """What reads each configuration, in the order of their numbers; labels are in ``info``.

    A stress is made of the virials where a configuration has these alone:
    ``stress = -virials / |det cell|``. Raises ``ValueError`` without h5py and for other layouts.
    """
    try:
        import h5py
    except ImportError as error:
        raise ValueError(
            f"{path}: reading HDF5 needs h5py. Install it: pip install 'equizoo[hdf5]'."
        ) from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path}: damaged, truncated or not HDF5 ({error}).") from error
    batches = _numbered(file, "config_batch_")
    if not batches:
        raise ValueError(
            f"{path} has no group config_batch_0, as MACE's preprocessing writes; there are "
            f"{', '.join(list(file)[:5]) or 'none'}."
        )
    for batch in batches:
        for name in _numbered(file[batch], "config_"):
            # the file stays open for as long as one of these is there
            yield functools.partial(_atoms, file[batch][name], f"{path}/{batch}/{name}")


def _numbered(group: Any, prefix: str) -> list[str]:
    """Members called ``prefix`` and a number, in the order of these numbers."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)")
    found = [(int(match[1]), name) for name in group if (match := pattern.fullmatch(name))]
    return [name for _, name in sorted(found)]


def _atoms(group: Any, where: str) -> Atoms:
    try:
        values = {name: _value(group[name]) for name in group if name not in _STRUCTURE}
        if "properties" in group:
            labels = {name: _value(group["properties"][name]) for name in group["properties"]}
            stored = group.get("property_weights", {})
            weights = {name: _value(stored[name]) for name in stored}
        else:
            labels = {name: values.pop(name, None) for name in _OLD_LABELS}
            weights = {name: values.pop(f"{name}_weight", None) for name in _OLD_LABELS}
        cell, pbc = (_value(group[name]) for name in ("cell", "pbc"))
        atoms = Atoms(
            numbers=np.asarray(_value(group["atomic_numbers"]), np.int64),
            positions=np.asarray(_value(group["positions"]), np.float64),
            cell=np.zeros((3, 3)) if cell is None else np.asarray(cell, np.float64).reshape(3, 3),
            pbc=False if pbc is None else np.asarray(pbc, bool),
        )
    except (KeyError, OSError, ValueError, TypeError) as error:
        raise ValueError(f"{where} is no configuration of MACE ({error!r}).") from error
    absent = {name for name, weight in weights.items() if weight is not None and not np.any(weight)}
    if values.get("weight") is not None and not np.any(values["weight"]):
        absent = set(labels)
    labels = {k: v for k, v in labels.items() if v is not None and k not in absent}
    virials = labels.pop("virials", None)
    if virials is not None and "stress" not in labels and atoms.cell.rank == 3:
        labels["stress"] = -np.asarray(virials, np.float64) / atoms.cell.volume
    atoms.info |= {key: value for key, value in values.items() if value is not None}
    atoms.info |= {_STATE.get(key, key): _squeezed(key, value) for key, value in labels.items()}
    return atoms


def _value(dataset: Any) -> Any:
    value = dataset[()]
    value = value.decode("utf-8") if isinstance(value, bytes) else value
    return None if isinstance(value, str) and value == "None" else value


def _squeezed(key: str, value: Any) -> Any:
    """One number, or one 3x3 tensor, of those labels that stand in an array of one."""
    shape = np.shape(value)
    single = key in ("energy", *_STATE) and shape == (1,)
    return value[0] if single or (key == "stress" and shape == (1, 3, 3)) else value
