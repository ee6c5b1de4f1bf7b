"""Fine-tuning: a potential's weights moved to new data, and what it forgot on the way."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ase.data import chemical_symbols
from flax import nnx

from equizoo.config import to_dict
from equizoo.data.pipeline import THREADS, Reading
from equizoo.data.reference_energies import FromModel
from equizoo.eval.doctor import ModelFacts, compare_with_model
from equizoo.eval.potential import Potential
from equizoo.structure import require_same_reference, symbols
from equizoo.train.config import TrainConfig
from equizoo.train.finetune_settings import SUITED_TO_DATA, FinetuneSettings
from equizoo.train.forgetting import old_data
from equizoo.train.hosts import on_first, stoppable
from equizoo.train.progress import BOARDS, Board
from equizoo.train.recipe import (
    Baseline,
    DataConfig,
    Prepared,
    RunResult,
    errors_on,
    examine_run,
    prepare_data,
    run_fit,
)
from equizoo.train.replay import BASE, LabelsFrom, Replay, nameless, two_headed
from equizoo.train.run_folder import FRAMES, data_facts, open_run_folder, require_usable
from equizoo.zoo._base import Architecture


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """A fine-tuned potential with its errors before and after, on new and on old data."""

    run: RunResult
    before: Mapping[str, Mapping[str, Any]]  # base model: metrics by data set
    after: Mapping[str, Mapping[str, Any]]  # fine-tuned model, same data sets


@stoppable
def finetune(
    base: Potential,
    data: DataConfig,
    folder: str | Path,
    *,
    training: TrainConfig | FinetuneSettings = SUITED_TO_DATA,
    old: tuple[str, ...] | None = None,  # data sets on which forgetting is measured
    name: str = "",
    replay: Replay | None = None,
    new_elements: Mapping[str, str] | None = None,  # chemical symbols: new, and what it is like
    resume: bool = False,
    reading: Reading = THREADS,
    boards: Sequence[Board] = BOARDS,
) -> Finetuned | None:
    """Continues training ``base`` on new data; ``None`` when stopped by SIGTERM (resume later).

    With ``replay`` the model gets a second head, which goes on with base data meanwhile; the first
    answers, unless the other is asked for (``potential.with_head("base")``). Both are saved.
    ``training`` is given in full or as settings that suit the number of frames to train on.
    ``new_elements`` that the data have and the model lacks start as copies of some that it has,
    ``{"Si": "C"}``; see :meth:`Potential.with_new_elements`.

    Reference energies are resolved first (by default the base model's, refitted to the new data's
    level of theory), so weights need not learn a constant. Elements that no frame to train on has
    keep the base model's, which is warned of. Errors of the base model on the new data are measured
    with the new reference energies; on ``old`` data (by default :func:`old_data`) each model uses
    its own.

    Raises ``ValueError`` when the data's energy reference is not the model's, the data have
    elements that the model lacks or none of the new ones, when the doctor finds errors in them
    (unless ``data.checks`` says otherwise), and for the folder as
    :func:`equizoo.train.recipe.train` does.
    """
    folder = Path(folder)
    on_first(lambda: require_usable(folder, resume))
    name = name or f"{base.name}-finetuned"
    remembered = old_data(base.only_head(), old, replay)
    prepared = prepare_data(data)
    if isinstance(training, FinetuneSettings):
        training = training.for_frames(len(prepared.train))
    facts = {
        "finetune": base.name,
        "model_sha256": base.model_sha256(),
        "data": to_dict(data),
        "training": to_dict(training),
        "old": list(remembered),
        "replay": None if replay is None else to_dict(replay),
        "new_elements": dict(new_elements or {}),
    }
    if replay is not None:
        remembered = {old_name: nameless(dataset) for old_name, dataset in remembered.items()}
        prepared = Prepared(
            nameless(prepared.train),
            nameless(prepared.valid),
            {test: nameless(dataset) for test, dataset in prepared.test.items()},
        )
    known = base = base.only_head()
    if new_elements:
        base = base.with_new_elements(new_elements)
        if absent := sorted(base.placeholders - set(prepared.train.elements)):
            raise ValueError(
                f"{symbols(absent)} are to be new elements, but {data.train} has none to learn "
                "from; leave them out."
            )
    _require_known_elements(base, prepared)
    _say_if_stress_is_left_out(base, prepared, training)
    require_same_reference(base.energy_reference, prepared.train.energy_reference, "Fine-tuning")
    _say_which_energies_stay(prepared, data)
    e0 = data.reference_energies.resolve(prepared.train, base)
    rebased = base.with_reference_energies(
        dict(base.reference_energies) | e0, prepared.train.level_of_theory
    )

    # Of another level of theory for new elements, since their own are not known at the base's.
    original = base.with_reference_energies(
        dict(rebased.reference_energies) | dict(known.reference_energies), known.level_of_theory
    )
    start = rebased
    if replay is not None:
        start = two_headed(original, rebased)
        prepared = dataclasses.replace(prepared, replayed=replay.frames(original))

    def begin() -> None:
        if not resume:
            facts_of_model = ModelFacts.of(base)
            unsuited = compare_with_model(prepared.train, facts_of_model)
            examine_run(prepared, data, facts_of_model.cutoff, unsuited)
        parts = {"train": prepared.train, "valid": prepared.valid}
        replayed = {} if prepared.replayed is None else {"replayed": prepared.replayed}
        if replay is not None and replay.labels is LabelsFrom.DATA:
            frames = data_facts(parts | replayed)
        else:  # labels that a model gives differ in the last digits between machines
            frames = data_facts(parts, replayed)
        open_run_folder(folder, facts | {FRAMES: frames}, resume)

    on_first(begin)
    before = errors_on(rebased, prepared.reported) | errors_on(known, remembered)

    def on_remembered(tuned: Potential) -> Potential:
        """At the base model's level of theory."""
        if replay is not None:
            return tuned.with_head(BASE)
        return tuned.with_reference_energies(original.reference_energies, original.level_of_theory)

    run = run_fit(
        start.with_parameters(_in_float32(start.model), name),
        prepared,
        training,
        folder,
        reading,
        boards,
        Baseline(before, remembered, on_remembered),
    )
    return None if run is None else Finetuned(run, before, run.metrics)


def _say_which_energies_stay(prepared: Prepared, data: DataConfig) -> None:
    """Of elements in other data than those to train on, unless all are to stay."""
    if isinstance(data.reference_energies, FromModel):
        return
    for part, dataset in prepared.reported.items():
        if unseen := sorted(set(dataset.elements) - set(prepared.train.elements)):
            warnings.warn(
                f"{symbols(unseen)}: in {part} data, but in no frame to train on. Their reference "
                "energies stay the base model's, so energies there are off by what its level of "
                "theory differs from the data's.",
                stacklevel=4,
            )


def _say_if_stress_is_left_out(base: Potential, prepared: Prepared, training: TrainConfig) -> None:
    stages = [training.loss] + ([training.second_stage.loss] if training.second_stage else [])
    labelled = prepared.train.report.labels.get("stress", 0)
    if labelled and base.config.conservative and not any(loss.stress for loss in stages):
        warnings.warn(
            f"{labelled} structures have stress labels, which the loss does not weigh; give "
            "stress_weight (--stress-weight) to learn them.",
            stacklevel=4,
        )


def _require_known_elements(base: Potential, prepared: Prepared) -> None:
    known = base.config.atomic_numbers
    for part, dataset in prepared.parts.items():
        if unknown := sorted(set(dataset.elements) - set(known)):
            raise ValueError(
                f"{base.name} knows {symbols(known)}; the data ({part}) also have "
                f"{symbols(unknown)}. Say which of the model's elements each is to start like, "
                f"with new_elements (--new-elements {chemical_symbols[unknown[0]]}=...)."
            )


def _in_float32(model: Architecture) -> nnx.State:
    """Parameters in the precision that training runs in; converted models have more."""
    params = nnx.state(model, nnx.Param)
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float32)), params)
