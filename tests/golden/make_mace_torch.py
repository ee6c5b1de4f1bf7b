"""Tiny models of mace-torch as dumps, with what mace-torch 0.3.16 says of two structures (float64).

Run in the environment of `make parity`; the files are never made anew to make a test pass.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "parity"))

import torch_models as peers
from e3nn import o3
from mace.modules.blocks import NonLinearBiasReadoutBlock

from equizoo.zoo._convert.mace_torch_dump import dump_model

STATES = {
    "total_charge": {"type": "categorical", "per": "graph", "num_classes": 5, "offset": 2,
                     "emb_dim": 3, "in_dim": 1},
    "total_spin": {"type": "continuous", "per": "graph", "in_dim": 1, "emb_dim": 2},
}  # fmt: skip
MODELS = {
    "agnostic": {"first": "agnostic", "later": "residual"},
    "density": {
        "first": "density", "later": "density_residual", "distance_transform": "Agnesi",
        "pair_repulsion": True, "heads": ("bulk", "molecules"), "correlation": 2,
    },
    "nonlinear": {
        "first": "nonlinear", "later": "nonlinear", "apply_cutoff": False, "correlation": 2,
        "readout_cls": NonLinearBiasReadoutBlock, "edge_irreps": o3.Irreps("1x0e+1x1o"),
        "embedding_specs": STATES, "use_embedding_readout": True,
    },
}  # fmt: skip

for name, fields in MODELS.items():
    model = peers.build(**{"max_ell": 1, "channels": 2, "num_bessel": 4, "seed": 3} | fields)
    dump_model(model, str(HERE / "mace_torch" / name))
    outputs = []
    for atoms in (peers.molecule(nodes=5), peers.crystal(nodes=3)):
        charge, spin, head = 1, 2, model.heads[-1]
        energy, forces, stress = peers.evaluate(model, atoms, head, charge, spin)
        outputs.append(
            {
                "numbers": atoms.numbers.tolist(),
                "positions": atoms.positions.tolist(),
                "cell": atoms.cell.tolist(),
                "pbc": atoms.pbc.tolist(),
                "info": {"charge": charge, "spin": spin, "head": head},
                "energy": energy,
                "forces": forces.tolist(),
                "stress": None if stress is None else stress.tolist(),
            }
        )
    text = json.dumps(outputs, indent=1) + "\n"
    (HERE / "mace_torch" / name / "outputs.json").write_text(text)
