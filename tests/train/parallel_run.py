"""Run as a process: some steps of the tiny problem, in parts, on the devices that there are.

``python parallel_run.py FOLDER LAST_STEP``; how many devices is said in ``XLA_FLAGS``.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from conftest import every_step, frames_of, make_structures, packing_for, tiny_model

from equizoo.train.config import LossWeights, Optimizer, TrainConfig
from equizoo.train.loop import fit

PARTS = 8
CONFIG = TrainConfig(
    epochs=3,
    batch_size=2 * PARTS,
    microbatches=PARTS,
    loss=LossWeights(energy=1.0, forces=1.0, stress=1.0),
    optimizer=Optimizer(learning_rate=0.01),
    checkpoint_every=2,
)


def run(folder: Path, last_step: int) -> None:
    frames = frames_of(make_structures(7 * PARTS))
    losses: list[float] = []
    devices: list[int] = []

    def see(report):
        losses.append(float(report.loss))
        devices.append(len(report.loss.sharding.device_set))
        if len(losses) == last_step:
            raise KeyboardInterrupt

    try:
        packing = packing_for(frames, CONFIG.batch_size // PARTS)
        with every_step(see):
            fitted = fit(tiny_model(), frames[:-PARTS], frames[-PARTS:], packing, CONFIG, folder)
        params = [np.asarray(leaf).ravel().tolist() for leaf in jax.tree.leaves(fitted.params)]
    except KeyboardInterrupt:
        params = []
    print(json.dumps({"losses": losses, "devices": devices, "params": sum(params, [])}))


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
