"""A converted model, its weights in float64 and its heads several, as the start of fine-tuning."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from equizoo.data.readers import write_structures
from equizoo.data.reference_energies import FromModel
from equizoo.eval.convert_mace_torch import convert_mace_torch
from equizoo.eval.golden import golden_structures
from equizoo.train.finetune import finetune
from equizoo.train.finetune_settings import FinetuneSettings
from equizoo.train.recipe import DataConfig

DUMP = Path(__file__).parent.parent / "golden" / "mace_torch" / "density"


def test_one_head_is_trained_in_float32(tmp_path):
    potential = convert_mace_torch(DUMP).with_head("molecules")
    cluster = golden_structures(potential.config)["cluster"]
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(4):
        moved = cluster.positions + 0.05 * rng.normal(size=cluster.positions.shape)
        frame = dataclasses.replace(cluster, positions=moved)
        result = potential.predict(frame, dtype="float64")
        frames.append(dataclasses.replace(frame, energy=result.energy, forces=result.forces))
    write_structures(tmp_path / "frames.xyz", frames)
    data = DataConfig(
        train=str(tmp_path / "frames.xyz"), num_valid=1, reference_energies=FromModel()
    )
    training = FinetuneSettings(epochs=1, batch_size=2)
    with jax.enable_x64(False):
        tuned = finetune(potential, data, tmp_path / "run", training=training)
    assert tuned.before["valid"]["forces_mae_meV_per_A"] < 0.1  # its own labels, to rounding
    found = tuned.run.potential
    assert found.config.heads == ("molecules",) == potential.only_head().config.heads
    assert found.config.scale == potential.config.scale[1]
    leaves = jax.tree.leaves(nnx.state(found.model, nnx.Param))
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
