"""Training checkpoints as torch writes them, opened without running code in them."""

import collections
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

if not os.environ.get("EQUIZOO_PARITY"):
    reason = "torch is not installed here; 'make parity' makes an environment that has it"
    pytest.importorskip("torch", reason=reason)

import torch

from equizoo.eval.convert_equiformer_v2 import convert_equiformer_v2, dump_equiformer_v2
from equizoo.eval.convert_tdn import convert_tdn, dump_tdn
from equizoo.structure import EnergyReference
from equizoo.zoo._convert import equiformer_v2_dump, tdn_dump

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("eval", "zoo")]
import tdn_oracle
import test_convert_equiformer_v2 as small


class RunsCode:
    """A value whose unpickling makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def tensors(state, prefix=""):
    return collections.OrderedDict(
        (prefix + name, torch.tensor(np.asarray(value, np.float32)))
        for name, value in state.items()
    )


def beside(state):
    """What trainers save with the weights."""
    weight = torch.nn.Parameter(next(iter(state.values())))
    optimizer = torch.optim.AdamW([weight], amsgrad=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return {
        "epoch": 3.5,
        "step": np.int64(700),
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0).state_dict(),
        "val_metrics": collections.defaultdict(
            dict, forces_mae={"metric": np.float64(0.02), "total": 1.5, "numel": 75}
        ),
        "best_val_metric": np.float64(0.02),
        "amp": None,
    }


def fairchem():
    """(the file's contents, the same in NumPy)."""
    state = small.random_state(small.SETTINGS, num_basis=5)
    average = {name: value + 0.01 for name, value in state.items()}
    state["energy_lin_ref"] = np.linspace(-1, 0, 10)
    arrays = tensors(state, "module.module.")
    normalizers = {
        name: {"mean": torch.tensor(mean), "std": torch.tensor(std)}
        for name, mean, std in (("target", 0.5, 2.0), ("grad_target", 0.0, 1.5))
    }
    ema = {"decay": 0.999, "num_updates": 700, "shadow_params": list(tensors(average).values())}
    config = {"model": "equiformer_v2", "model_attributes": small.SETTINGS}
    whole = {"state_dict": arrays, "normalizers": normalizers, "ema": ema, "config": config}
    return whole | beside(arrays), state | average


def tdn():
    state = tdn_oracle.random_state(1, channels=4, num_layers=1, num_heads=2, num_basis=3, rows=80)
    average = {name: value + 0.01 for name, value in state.items()}
    arrays = tensors(state, "module._orig_mod.")
    ema = {"decay": 0.999, "num_updates": 700, "shadow_params": list(tensors(average).values())}
    whole = {"model_state_dict": arrays, "ema_state_dict": ema, "epoch": 3}
    whole["optimizer_state_dict"] = beside(arrays)["optimizer"]
    return whole, average


def test_fairchem(tmp_path):
    whole, expected = fairchem()
    torch.save(whole, file := tmp_path / "checkpoint.pt")
    dump_equiformer_v2(file, tmp_path / "dump")
    arrays = safetensors.numpy.load_file(tmp_path / "dump" / equiformer_v2_dump.ARRAYS)
    assert sorted(arrays) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(arrays[name], np.float32(value), err_msg=name)
    options = {"energy_reference": EnergyReference.TOTAL, "elements": ["H", "O"]}
    found, last = (
        convert_equiformer_v2(file, raw=raw, **options).predict(small.WATER, dtype="float64")
        for raw in (False, True)
    )
    same = convert_equiformer_v2(tmp_path / "dump", **options).predict(small.WATER, dtype="float64")
    np.testing.assert_array_equal(found.forces, same.forces)
    assert np.abs(found.forces - last.forces).max() > 1e-3
    # The linear fit enters with the scale of the energies.
    whole["state_dict"]["module.module.energy_lin_ref"] += 1.0
    torch.save(whole, file)
    shifted = convert_equiformer_v2(file, **options).predict(small.WATER, dtype="float64")
    assert shifted.energy - found.energy == pytest.approx(3 * 2.0, abs=1e-4)


def test_tdn(tmp_path):
    whole, expected = tdn()
    torch.save(whole, file := tmp_path / "tdn.pth")
    factors = tdn_oracle.random_factors(1, 7)
    torch.save(dict(tensors(factors)), cache := tmp_path / "cp_init.pt")
    with pytest.raises(ValueError, match="no factors of the decomposition"):
        dump_tdn(file, tmp_path / "dump")
    assert not (tmp_path / "dump").exists()
    dump_tdn(file, tmp_path / "dump", factors=cache)
    arrays = safetensors.numpy.load_file(tmp_path / "dump" / tdn_dump.ARRAYS)
    for name, value in (expected | factors).items():
        np.testing.assert_array_equal(arrays.pop(name), np.float32(value), err_msg=name)
    assert not arrays
    found, last = (
        convert_tdn(file, factors=cache, raw=raw).predict(small.WATER, dtype="float64")
        for raw in (False, True)
    )
    same = convert_tdn(tmp_path / "dump").predict(small.WATER, dtype="float64")
    np.testing.assert_array_equal(found.forces, same.forces)
    assert np.abs(found.forces - last.forces).max() > 1e-6


def test_code_is_not_run(tmp_path):
    touched = tmp_path / "touched"
    for contents, dump in ((fairchem()[0], dump_equiformer_v2), (tdn()[0], dump_tdn)):
        torch.save(contents | {"extra": RunsCode(touched)}, file := tmp_path / "checkpoint.pt")
        with pytest.raises(ValueError, match="that could run code"):
            dump(file, tmp_path / "dump")
        assert not touched.exists() and not (tmp_path / "dump").exists()
    torch.load(file, weights_only=False)  # it would have
    assert touched.exists()
