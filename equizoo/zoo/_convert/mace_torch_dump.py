"""Step one of converting a mace-torch model: its arrays and settings as plain files.

A ``.model`` file is a pickled Python object: opening it runs whatever code its author put in. This
file alone does that, in a process of its own, on request. It needs torch and mace-torch (and
safetensors), nothing of equizoo, so that it can be copied to where those are installed:

    python mace_torch_dump.py FILE.model FOLDER

writes ``FOLDER/mace.json`` and ``FOLDER/mace.safetensors``, which equizoo reads anywhere.
"""

import hashlib
import json
import os
import sys
import uuid
from pathlib import Path
from typing import Any

FORMAT = "equizoo-mace-dump"
VERSION = 1
SETTINGS, ARRAYS = "mace.json", "mace.safetensors"
MODEL_CLASSES = ("MACE", "ScaleShiftMACE")
# Constants that follow from the irreps, and buffers of generated code.
LEFT_OUT = ("_w3j", "output_mask", "_zeroed", "conv_tp.weight", "graph_opt")


def dump_file(source: str, folder: str) -> None:
    """Writes the dump of the model in ``source``; ``ValueError`` where it cannot be one."""
    # e3nn 0.4.4 reads a constants file of its own in a way that torch 2.6 and later refuse
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    import torch

    model = torch.load(source, map_location="cpu", weights_only=False)
    if isinstance(model, dict):
        raise ValueError(
            f"{source} holds a dictionary ({', '.join(list(model)[:5])}), not a model: a training "
            "checkpoint. Give the .model file that mace_run_train wrote at its end."
        )
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    dump_model(model, folder, {"file": Path(source).name, "sha256": digest})


def dump_model(model: Any, folder: str, source: dict[str, str] | None = None) -> None:
    """Writes the dump of a mace-torch model in memory; ``ValueError`` for what is not covered."""
    import numpy as np
    import safetensors.numpy

    name = type(model).__name__
    if name not in MODEL_CLASSES:
        raise ValueError(
            f"the model is a {name}, expected one of {', '.join(MODEL_CLASSES)}. TorchScript files "
            "(_compiled.model), and models with dipoles, long-range charges or adapters are not "
            "covered: give the plain .model file, with adapters merged."
        )
    if not hasattr(model.products[0].symmetric_contractions, "contractions"):
        raise ValueError(
            "the model is in cuEquivariance's layout; convert it back first with mace-torch's own "
            "command mace_cueq_to_e3nn."
        )
    arrays = {}
    for key, value in model.state_dict().items():
        if any(part in key for part in LEFT_OUT) or value.numel() == 0:
            continue
        array = np.asarray(value.detach().cpu().numpy(), order="C")
        if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
            raise ValueError(f"{key} has type {array.dtype} or holds NaN; expected finite numbers.")
        arrays[key] = array
    settings = {
        "format": FORMAT,
        "version": VERSION,
        "class": name,
        "source": source or {},
        "made_by": _versions(),
        "model": _settings(model),
    }
    out = Path(folder)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    (partial / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    (partial / ARRAYS).write_bytes(safetensors.numpy.save(arrays))
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    os.rename(partial, out)


def _settings(model: Any) -> dict[str, Any]:
    """What is not in the state dict."""
    radial = model.radial_embedding
    transform = getattr(radial, "distance_transform", None)
    return {
        "heads": [str(head) for head in getattr(model, "heads", None) or ["Default"]],
        "apply_cutoff": bool(getattr(model, "apply_cutoff", True)),
        "use_so3": bool(getattr(model, "use_so3", False)),
        "use_agnostic_product": bool(getattr(model, "use_agnostic_product", False)),
        "harmonics": str(model.spherical_harmonics.irreps_out),
        "radial_basis": type(radial.bessel_fn).__name__,
        "radial_size": int(radial.out_dim),
        "gaussian_coefficient": getattr(radial.bessel_fn, "coeff", None),
        "distance_transform": None if transform is None else type(transform).__name__,
        "pair_repulsion": bool(getattr(model, "pair_repulsion", False)),
        "embedding_specs": getattr(model, "embedding_specs", None),
        "embedding_readout": hasattr(model, "embedding_readout"),
        "interactions": [_interaction(block) for block in model.interactions],
        "products": [
            {
                "irreps": str(block.linear.irreps_out),
                "correlation": [
                    len(contraction.weights) + 1
                    for contraction in block.symmetric_contractions.contractions
                ],
                "self_connection": bool(block.use_sc),
            }
            for block in model.products
        ],
        "readouts": [_readout(block) for block in model.readouts],
    }


def _interaction(block: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "class": type(block).__name__,
        "avg_num_neighbors": float(block.avg_num_neighbors),
        "node_irreps": str(block.node_feats_irreps),
        "edge_irreps": str(block.linear_up.irreps_out),
        "target_irreps": str(block.target_irreps),
        "hidden_irreps": str(block.hidden_irreps),
        "activations": {},
    }
    layer = getattr(block.conv_tp_weights, "layer0", None)
    if layer is not None:
        settings["activations"]["radial"] = _activation(layer.act)
    gate = getattr(block, "equivariant_nonlin", None)
    if gate is not None and hasattr(gate, "_scalar_cst"):
        scalar, gates = gate._act_scalar, gate._act_gate
        settings["activations"]["scalars"] = [scalar.__name__, gate._scalar_cst]
        settings["activations"]["gates"] = [gates.__name__, gate._gate_cst]
    elif gate is not None:  # e3nn's Gate, in earlier versions
        settings["activations"]["scalars"] = _activation(gate.act_scalars.acts[0])
        settings["activations"]["gates"] = _activation(gate.act_gates.acts[0])
    return settings


def _readout(block: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"class": type(block).__name__, "activation": None}
    if hasattr(block, "non_linearity"):
        settings["activation"] = _activation(block.non_linearity.acts[0])
    return settings


def _activation(act: Any) -> list[Any] | None:
    """The name of a function and the constant that it is multiplied by."""
    if act is None:
        return None
    function = getattr(act, "f", act)
    return [getattr(function, "__name__", str(function)), float(getattr(act, "cst", 1.0))]


def _versions() -> dict[str, str]:
    from importlib import metadata

    names = ("mace-torch", "torch", "e3nn")
    return {name: metadata.version(name) for name in names}


if __name__ == "__main__":
    try:
        dump_file(*sys.argv[1:3])
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
