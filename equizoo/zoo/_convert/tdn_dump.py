"""Step one of converting a TDN checkpoint: its arrays as plain files.

It needs torch, numpy and safetensors, nothing of equizoo, so that it can be copied to where those
are installed:

    python tdn_dump.py CHECKPOINT.pth FOLDER [--raw] [--factors CACHE.pt]

writes ``FOLDER/tdn.json`` and ``FOLDER/tdn.safetensors``, which equizoo reads anywhere. Weights are
the exponential moving average where the checkpoint has one, those of the last step with ``--raw``.
The factors of the decomposition are taken from the checkpoint, else from the file of the training
run's cache, ``tmp/cp_init_lmax..._rank..._modeuvu.pt``. Files are opened with torch's
``weights_only``: no code in them is run.
"""

import hashlib
import json
import re
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FORMAT = "equizoo-tdn-dump"
VERSION = 1
SETTINGS, ARRAYS = "tdn.json", "tdn.safetensors"
FACTORS = ("cp_a", "cp_b", "cp_c")  # [dim, terms] of the features, the harmonics, the result

_WRAPPERS = re.compile(r"^module\.|(?:^|(?<=\.))_orig_mod\.")  # of distribution, of compilation
_FACTOR = re.compile(r"(?:^|\.)(cp_[abc])$")


def dump_file(source: str, folder: str, raw: bool = False, factors: str | None = None) -> None:
    """Writes the dump of the checkpoint in ``source``; ``ValueError`` where it cannot be one."""
    checkpoint = _load(source)
    cache = None if factors is None else _load(factors)
    settings, arrays = contents(checkpoint, cache, raw=raw)
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    settings["source"] = {"file": Path(source).name, "sha256": digest}
    write(settings, arrays, folder)


def contents(
    checkpoint: Mapping[str, Any], cache: Mapping[str, Any] | None = None, raw: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and arrays of a checkpoint, and of the cache file for the factors of the
    decomposition; tensors may be torch's or numpy's."""
    state = checkpoint.get("model_state_dict", checkpoint)
    if not any(name.endswith("alpha_dot") for name in state):
        raise ValueError(
            f"it has {', '.join(map(str, list(state)[:6]))}, and is no TDN: expected the state "
            "dict of a model, or a checkpoint of a training run with its model_state_dict."
        )
    found = {_WRAPPERS.sub("", name): _array(value, name) for name, value in state.items()}
    arrays = {name: value for name, value in found.items() if not _FACTOR.search(name)}
    average = None if raw else checkpoint.get("ema_state_dict")
    if average is not None:
        arrays = _averaged(arrays, average["shadow_params"])
    inside = {name: value for name, value in found.items() if _FACTOR.search(name)}
    settings = {
        "format": FORMAT,
        "version": VERSION,
        "weights": "moving average" if average is not None else "last step",
        "factors": "checkpoint" if inside else "cache file",
    }
    return settings, arrays | _factors(inside, cache)


def _factors(inside: Mapping[str, Any], cache: Mapping[str, Any] | None) -> dict[str, Any]:
    """One set: all products of a model are fitted once, and share the file of the cache."""
    import numpy as np

    if not inside and cache is None:
        raise ValueError(
            "it has no factors of the decomposition (cp_a, cp_b, cp_c), without which the model is "
            "not determined; give the file of the training run's cache, tmp/cp_init_*.pt, with "
            "--factors."
        )
    given = inside or {name: _array(value, name) for name, value in (cache or {}).items()}
    result: dict[str, Any] = {}
    for name, value in given.items():
        if (match := _FACTOR.search(name)) is None:
            continue
        first = result.setdefault(match[1], value)
        if first.shape != value.shape or not np.array_equal(first, value):
            raise ValueError(f"{name} differs from the {match[1]} of other products in the model.")
    if missing := [name for name in FACTORS if name not in result]:
        raise ValueError(f"the factors lack {', '.join(missing)}.")
    return result


def write(settings: Mapping[str, Any], arrays: Mapping[str, Any], folder: str) -> None:
    """Both files, in a folder that appears when they are complete; it may exist, empty."""
    import safetensors.numpy

    out = Path(folder)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; choose another name.")
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    (partial / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    (partial / ARRAYS).write_bytes(safetensors.numpy.save(dict(arrays)))
    partial.rename(out)  # replaces an empty folder


def _averaged(arrays: Mapping[str, Any], shadow: Sequence[Any]) -> dict[str, Any]:
    """The average is a list in the order of the trained parameters: all but the factors."""
    values = [_array(value, f"ema shadow_params[{i}]") for i, value in enumerate(shadow)]
    if [array.shape for array in arrays.values()] != [value.shape for value in values]:
        raise ValueError(
            f"the moving average has {len(values)} arrays whose shapes are not those of the "
            f"{len(arrays)} parameters in their order; convert the weights of the last step, --raw."
        )
    return dict(zip(arrays, values, strict=True))


def _array(value: Any, name: str) -> Any:
    import numpy as np

    array = np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise ValueError(f"{name} has type {array.dtype} or holds NaN; expected finite numbers.")
    return np.array(array, np.float32, order="C")


def _load(source: str) -> Mapping[str, Any]:
    import torch

    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{source} holds {found[1] if found else 'objects'} beside tensors, numbers and "
            "containers, and is not opened: that could run code. Save its model_state_dict alone."
        ) from error


if __name__ == "__main__":
    arguments = sys.argv[1:]
    cache_file = None
    if "--factors" in arguments[:-1]:
        place = arguments.index("--factors")
        cache_file = arguments[place + 1]
        del arguments[place : place + 2]
    paths = [argument for argument in arguments if argument != "--raw"]
    if len(paths) != 2 or any(path.startswith("--") for path in paths):
        sys.exit("usage: python tdn_dump.py CHECKPOINT.pth FOLDER [--raw] [--factors CACHE.pt]")
    try:
        dump_file(paths[0], paths[1], raw="--raw" in arguments, factors=cache_file)
    except ValueError as error:
        sys.exit(f"{paths[0]}: {error}")
