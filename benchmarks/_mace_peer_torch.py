"""mace-torch, as a worker of ``mace_peers.py``: eager, as its calculator and its training are."""

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

from _mace_peer import WEIGHTS, Prepared, serve, training

os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # e3nn 0.4.4 with torch 2.6 and later


def imports() -> None:
    import mace.modules
    import mace.tools.train  # noqa: F401
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.set_default_dtype(torch.float32)


def prepare(case: dict[str, Any], variant: str) -> Prepared:
    import numpy as np

    model = _model(case, reduced=variant == "reduced")
    if variant == "default":
        _dump(model, Path(case["scratch"]) / WEIGHTS)
    batch = _batch(case)
    inputs = batch.to_dict()

    def evaluate() -> dict[str, Any]:
        return model(inputs, training=False, compute_force=True, compute_stress=False)

    result = evaluate()
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "energies": result["energy"].tolist(),
        "forces": np.asarray(result["forces"].detach()).tolist(),
        "compile_s": None,
    }
    if case["train"]:
        run = _step(case, model, batch)
        return Prepared(run=run, loss=run(), **found)
    return Prepared(run=evaluate, **found)


def _model(case: dict[str, Any], reduced: bool) -> Any:
    import numpy as np
    import torch
    from e3nn import o3
    from mace import modules

    torch.manual_seed(0)
    channels = case["channels"]
    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    irreps = [(channels, (degree, (-1) ** degree)) for degree in range(case["hidden_l_max"] + 1)]
    return modules.ScaleShiftMACE(
        r_max=case["cutoff"],
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=case["l_max"],
        interaction_cls=block,
        interaction_cls_first=block,
        num_interactions=2,
        num_elements=len(case["atomic_numbers"]),
        hidden_irreps=o3.Irreps(irreps),
        MLP_irreps=o3.Irreps("16x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=np.zeros(len(case["atomic_numbers"])),
        avg_num_neighbors=case["avg_num_neighbors"],
        atomic_numbers=case["atomic_numbers"],
        correlation=case["correlation"],
        radial_MLP=[64, 64, 64],
        radial_type="bessel",
        use_reduced_cg=reduced,
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    )


def _dump(model: Any, folder: Path) -> None:
    """Its weights for ours, by step one of our conversion, which needs nothing else of equizoo."""
    file = Path(__file__).parents[1] / "equizoo" / "zoo" / "_convert" / "mace_torch_dump.py"
    spec = importlib.util.spec_from_file_location("mace_torch_dump", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.dump_model(model, str(folder))


def _batch(case: dict[str, Any]) -> Any:
    import numpy as np
    from mace import data
    from mace.tools import torch_geometric, utils

    table = utils.AtomicNumberTable(case["atomic_numbers"])
    graphs = []
    for s in case["structures"]:
        labels = {} if s["forces"] is None else {"energy": s["energy"], "forces": s["forces"]}
        config = data.Configuration(
            atomic_numbers=np.array(s["numbers"]),
            positions=np.array(s["positions"]),
            properties={name: np.array(value) for name, value in labels.items()},
            property_weights=dict.fromkeys(labels, 1.0),
            cell=np.array(s["cell"]),
            pbc=tuple(s["pbc"]),
        )
        graphs.append(data.AtomicData.from_config(config, z_table=table, cutoff=case["cutoff"]))
    return torch_geometric.batch.Batch.from_data_list(graphs)


def _step(case: dict[str, Any], model: Any, batch: Any) -> Any:
    import torch
    from mace.modules.loss import WeightedEnergyForcesLoss
    from mace.tools.train import take_step
    from torch_ema import ExponentialMovingAverage

    settings = training(case)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=settings["rate"], amsgrad=True, weight_decay=settings["decay"]
    )
    ema = ExponentialMovingAverage(model.parameters(), decay=settings["ema"])
    loss = WeightedEnergyForcesLoss(settings["energy"], settings["forces"])
    wanted = {"forces": True, "virials": False, "stress": False}
    device = torch.device("cpu")

    def run() -> float:
        value, _ = take_step(model, loss, batch, optimizer, ema, wanted, settings["clip"], device)
        return float(value)

    return run


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    serve(prepare, imports, ("mace-torch", "torch", "e3nn"))
