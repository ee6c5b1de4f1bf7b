"""Step one of converting an EquiformerV2 checkpoint: its arrays and settings as plain files.

It needs torch, numpy and safetensors, nothing of equizoo, so that it can be copied to where those
are installed:

    python equiformer_v2_dump.py CHECKPOINT.pt FOLDER [--raw]

writes ``FOLDER/equiformer_v2.json`` and ``FOLDER/equiformer_v2.safetensors``, which equizoo reads
anywhere. Weights are the exponential moving average where the checkpoint has one, those of the last
step with ``--raw``. The file is opened with torch's ``weights_only``: no code in it is run.
"""

import hashlib
import json
import re
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FORMAT = "equizoo-equiformer-v2-dump"
VERSION = 1
SETTINGS, ARRAYS = "equiformer_v2.json", "equiformer_v2.safetensors"

# Wrappers of the model, in front of its own names; and heads that later versions keep apart.
_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.|backbone\.|output_heads\.[^.]+\.)+")
# Constants that follow from the settings.
_BUFFERS = re.compile(
    r"(?:^|\.)(?:SO3_rotation|SO3_grid|mappingReduced|distance_expansion)\."
    r"|\.(?:expand_index|balance_degree_weight|to_grid_mat|from_grid_mat|l_harmonic|m_harmonic"
    r"|m_complex|res_size|to_m|m_size)$"
)
_UNTRAINED = ("energy_lin_ref",)  # parameters that the average leaves out


def dump_file(source: str, folder: str, raw: bool = False) -> None:
    """Writes the dump of the checkpoint in ``source``; ``ValueError`` where it cannot be one."""
    import torch

    try:
        with torch.serialization.safe_globals(_plain()):
            checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        raise ValueError(
            f"it holds {found[1] if found else 'objects'} beside tensors, numbers and containers, "
            "and is not opened: that could run code. Save its state_dict, ema, config, normalizers "
            "and elementrefs alone."
        ) from error
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    settings, arrays = contents(checkpoint, raw=raw)
    settings["source"] = {"file": Path(source).name, "sha256": digest}
    write(settings, arrays, folder)


def contents(
    checkpoint: Mapping[str, Any], raw: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and arrays of a checkpoint; tensors may be torch's or numpy's."""
    if "state_dict" not in checkpoint:
        raise ValueError(
            f"the checkpoint has {', '.join(list(checkpoint)[:8])} but no state_dict; give the .pt "
            "file of a fairchem 1.x run."
        )
    names = {_PREFIX.sub("", key): key for key in checkpoint["state_dict"]}
    arrays = {
        name: _array(checkpoint["state_dict"][key], key)
        for name, key in names.items()
        if not _BUFFERS.search(name)
    }
    average = None if raw else checkpoint.get("ema")
    if average is not None:
        arrays |= _average(arrays, average["shadow_params"])
    settings = {
        "format": FORMAT,
        "version": VERSION,
        "weights": "moving average" if average is not None else "last step",
        "model": _model(checkpoint.get("config", {})),
        "normalizers": _normalizers(checkpoint.get("normalizers") or {}),
        "element_references": _element_references(checkpoint.get("elementrefs") or {}),
    }
    return settings, arrays


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


def _average(arrays: Mapping[str, Any], shadow: Sequence[Any]) -> dict[str, Any]:
    """The average is a list in the order of the trained parameters."""
    names = [name for name in arrays if name not in _UNTRAINED]
    values = [_array(value, f"ema.shadow_params[{i}]") for i, value in enumerate(shadow)]
    shapes = [arrays[name].shape for name in names]
    if shapes != [value.shape for value in values]:
        raise ValueError(
            f"the moving average has {len(values)} arrays whose shapes are not those of the "
            f"{len(names)} parameters in their order; convert the weights of the last step, --raw."
        )
    return dict(zip(names, values, strict=True))


def _model(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's settings; older files keep its name and its attributes apart."""
    model = config.get("model_attributes", config.get("model"))
    if isinstance(model, Mapping) and isinstance(model.get("backbone"), Mapping):
        model = model["backbone"]
    if not isinstance(model, Mapping):
        raise ValueError("the checkpoint's config has neither 'model' nor 'model_attributes'.")
    return json.loads(json.dumps(dict(model)))


def _normalizers(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    ours = {"target": "energy", "grad_target": "forces", "energy": "energy", "forces": "forces"}
    return {
        ours[name]: {key: float(_array(value[key], name)) for key in ("mean", "std")}
        for name, value in found.items()
        if name in ours
    }


def _element_references(found: Mapping[str, Any]) -> list[float] | None:
    energy = found.get("energy")
    if energy is None:
        return None
    return [float(x) for x in _array(energy["element_references"], "elementrefs").ravel()]


def _array(value: Any, name: str) -> Any:
    import numpy as np

    array = np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
    if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        raise ValueError(f"{name} has type {array.dtype} or holds NaN; expected finite numbers.")
    return np.array(array, order="C")


def _plain() -> list[Any]:
    """What metrics and settings hold beside tensors: containers, and numbers of numpy."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]  # under its names in numpy 1 and 2
    names = [f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")]
    dtypes = [type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64")]
    # Into a defaultdict torch puts nothing, even where it is allowed.
    containers = [(_dict, "collections.defaultdict"), dict, list, int, float]
    return [*containers, np.dtype, *dtypes, *((scalar, name) for name in names)]


def _dict(factory: Any = None) -> dict[Any, Any]:
    """A plain one in the place of a defaultdict."""
    return {}


if __name__ == "__main__":
    flags = [argument for argument in sys.argv[1:] if argument.startswith("--")]
    paths = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    if len(paths) != 2 or set(flags) - {"--raw"}:
        sys.exit("usage: python equiformer_v2_dump.py CHECKPOINT.pt FOLDER [--raw]")
    try:
        dump_file(paths[0], paths[1], raw="--raw" in flags)
    except ValueError as error:
        sys.exit(f"{paths[0]}: {error}")
