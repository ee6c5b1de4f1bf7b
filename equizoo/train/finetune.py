"""Fine-tuning: a potential's weights moved to new data, and what it forgot on the way."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from equizoo.config import to_dict
from equizoo.data.datasets import load_dataset
from equizoo.data.readers import Dataset
from equizoo.data.reference_energies import ReferenceEnergies, RefitFromModel
from equizoo.eval.evaluate import evaluate
from equizoo.eval.potential import Potential
from equizoo.structure import require_same_reference
from equizoo.train.config import LossWeights, Optimizer, TrainConfig
from equizoo.train.recipe import (
    DataConfig,
    Recipe,
    RunResult,
    open_run_folder,
    prepare_data,
    run_fit,
)


def finetune_training(epochs: int = 40, learning_rate: float = 1e-3, **options: Any) -> TrainConfig:
    """The default settings of a fine-tuning run: from-scratch ones at a tenth of the rate."""
    frozen = options.pop("frozen", ())
    return TrainConfig(
        epochs=epochs,
        loss=LossWeights(energy=100.0, forces=10.0),
        optimizer=Optimizer(
            learning_rate=learning_rate, ema_decay=0.99, warmup_steps=20, frozen=frozen
        ),
        **options,
    )


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """A fine-tuned potential with its errors before and after, on new and on old data."""

    run: RunResult
    before: Mapping[str, Mapping[str, Any]]  # base model: metrics by data set
    after: Mapping[str, Mapping[str, Any]]  # fine-tuned model, same data sets


def finetune(
    base: Potential,
    data: DataConfig,
    folder: str | Path,
    *,
    training: TrainConfig | None = None,
    old: tuple[str, ...] = (),  # data sets on which forgetting is measured
    name: str = "",
    resume: bool = False,
) -> Finetuned | None:
    """Continues training ``base`` on new data; ``None`` when stopped by SIGTERM.

    Reference energies are resolved first (by default the base model's, refitted to the new data's
    level of theory), so weights need not learn a constant. Errors of the base model on the new data
    are measured with the new reference energies; on ``old`` data each model uses its own.

    Raises ``ValueError`` when the data's energy reference is not the model's, or the data have
    elements that the model lacks.
    """
    folder = Path(folder)
    training = training or finetune_training()
    recipe = Recipe(name=name or f"{base.name}-finetuned", data=data, training=training)
    facts = {
        "finetune": base.name,
        "data": to_dict(data),
        "training": to_dict(training),
        "old": list(old),
    }
    prepared = prepare_data(data)
    require_same_reference(base.energy_reference, prepared.train.energy_reference, "Fine-tuning")
    open_run_folder(folder, facts, resume)
    e0 = new_reference_energies(base, data.reference_energies, prepared.train)
    rebased = base.with_reference_energies(
        dict(base.reference_energies) | e0, prepared.train.level_of_theory
    )
    new = {"valid": prepared.valid} | {t: load_dataset(t, data.keys) for t in data.test}
    remembered = {name: load_dataset(name) for name in old}
    before = {name: dict(evaluate(rebased, d).metrics) for name, d in new.items()}
    before |= {name: dict(evaluate(base, d).metrics) for name, d in remembered.items()}
    run = run_fit(base.model, prepared, rebased.reference_energies, recipe, folder)
    if run is None:
        return None
    after = dict(run.metrics)
    # old data are at the base model's level of theory
    restored = run.potential.with_reference_energies(base.reference_energies, base.level_of_theory)
    after |= {name: dict(evaluate(restored, d).metrics) for name, d in remembered.items()}
    return Finetuned(run, before, after)


def new_reference_energies(
    base: Potential, choice: ReferenceEnergies, dataset: Dataset
) -> dict[int, float]:  # [eV]
    """Reference energies for the data's level of theory, by the chosen rule."""
    residuals = None
    if isinstance(choice, RefitFromModel):
        labelled = [s for s in dataset.structures if s.energy is not None]
        energies = [s.energy for s in labelled if s.energy is not None]
        predicted = base.predict(labelled) if labelled else []
        residuals = np.array(
            [e - r.energy for e, r in zip(energies, predicted, strict=True)], np.float64
        )
    return choice.resolve(dataset, base.reference_energies, residuals)
