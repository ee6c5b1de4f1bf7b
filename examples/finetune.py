"""Fine-tunes a released model on a few frames, and loads the result: a taste only."""

import tempfile
from pathlib import Path

import equizoo
from equizoo.data import RefitFromModel, load_dataset, write_structures
from equizoo.train.finetune import finetune
from equizoo.train.finetune_settings import FinetuneSettings
from equizoo.train.recipe import DataConfig

with tempfile.TemporaryDirectory() as folder:
    frames, run = Path(folder, "frames.xyz"), Path(folder, "run")
    write_structures(frames, load_dataset("formamide/train", index=":40").structures)  # your own

    data = DataConfig(
        train=str(frames),
        num_valid=8,  # frames split off, by which the best weights are chosen
        reference_energies=RefitFromModel(),  # to the level of theory of the frames
    )
    tuned = finetune(
        equizoo.load("mace-3bpa"), data, run, training=FinetuneSettings(epochs=4, batch_size=4)
    )
    if tuned is None:
        raise SystemExit("interrupted")

    for dataset, errors in tuned.after.items():
        before, after = (
            metrics["forces_rmse_meV_per_A"] for metrics in (tuned.before[dataset], errors)
        )
        print(f"{dataset}: force RMSE {before:.1f} meV/Å before, {after:.1f} meV/Å after")

    potential = equizoo.load(run / "model")
    print(potential)
