"""Run as a process, one of several: trains the tiny problem, in parts, with the other ones.

``python hosts_run.py FOLDER SECONDS_PER_STEP PLACE``; see :func:`equizoo.train.hosts.join`.
"""

import sys
from pathlib import Path

from equizoo.train import hosts

if __name__ == "__main__":
    hosts.join(sys.argv[3])  # before anything is on a device

import jax
import numpy as np
from conftest import frames_of, losses_written, make_structures, packing_for, tiny_model

from equizoo.train.config import LossWeights, Optimizer, TrainConfig
from equizoo.train.loop import fit

PARTS = 4
CONFIG = TrainConfig(
    epochs=4,
    batch_size=2 * PARTS,
    microbatches=PARTS,
    loss=LossWeights(energy=1.0, forces=1.0, stress=1.0),
    optimizer=Optimizer(learning_rate=0.01),
    checkpoint_every=2,
)


def problem():
    """Frames to train on, frames to validate on, packing of one part."""
    frames = frames_of(make_structures(32))
    return frames[:24], frames[24:], packing_for(frames, CONFIG.batch_size // PARTS)


def run(folder: Path, pause: float) -> None:
    train, valid, packing = problem()
    with losses_written(folder / f"losses-{jax.process_index()}.txt", pause):
        fitted = fit(tiny_model(), train, valid, packing, CONFIG, folder)
    params = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(fitted.params))
    (folder / f"params-{jax.process_index()}").write_bytes(params)
    print("finished" if fitted.finished else "interrupted", len(jax.devices()))


if __name__ == "__main__":
    run(Path(sys.argv[1]), float(sys.argv[2]))
