"""Run as a process: trains the tiny problem in a folder, so that a test can kill it.

``python tiny_run.py FOLDER SECONDS_PER_STEP``: the pause makes room for a signal in mid-epoch.
"""

import sys
import time
from pathlib import Path

import numpy as np
from conftest import frames_of, make_structures, packing_for, tiny_model

import equizoo.train.loop as loop
from equizoo.train.config import LossWeights, Optimizer, SecondStage, TrainConfig

CONFIG = TrainConfig(
    epochs=6,
    batch_size=3,
    loss=LossWeights(energy=1.0, forces=1.0, stress=1.0),
    second_stage=SecondStage(start=0.6, loss=LossWeights(energy=10.0, forces=1.0)),
    optimizer=Optimizer(learning_rate=0.01, schedule="plateau", plateau_patience=0),
    checkpoint_every=3,
)


def run(folder: Path, pause: float = 0.0):
    frames = frames_of(make_structures(24))
    losses = open(folder / "losses.txt", "a")  # noqa: SIM115 - must survive a kill line by line
    accumulate = loop._accumulate

    def observed(progress, report, frames):
        losses.write(f"{np.asarray(report.loss).tobytes().hex()}\n")
        losses.flush()
        time.sleep(pause)
        accumulate(progress, report, frames)

    loop._accumulate = observed
    try:
        return loop.fit(tiny_model(), frames[:18], frames[18:], packing_for(frames), CONFIG, folder)
    finally:
        loop._accumulate = accumulate


if __name__ == "__main__":
    fitted = run(Path(sys.argv[1]), float(sys.argv[2]))
    print("finished" if fitted.finished else "interrupted")
