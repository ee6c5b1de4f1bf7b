"""Run as a process: trains the tiny problem in a folder, so that a test can kill it.

``python tiny_run.py FOLDER SECONDS_PER_STEP``: the pause makes room for a signal in mid-epoch.
"""

import sys
from pathlib import Path

from conftest import frames_of, losses_written, make_structures, packing_for, tiny_model

from equizoo.train.config import LossWeights, Optimizer, SecondStage, TrainConfig
from equizoo.train.loop import fit

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
    with losses_written(folder / "losses.txt", pause):
        return fit(tiny_model(), frames[:18], frames[18:], packing_for(frames), CONFIG, folder)


if __name__ == "__main__":
    fitted = run(Path(sys.argv[1]), float(sys.argv[2]))
    print("finished" if fitted.finished else "interrupted")
