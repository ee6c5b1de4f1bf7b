"""What of a data set does not suit a model: elements, energy reference, level of theory."""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
from ase.data import atomic_numbers, chemical_symbols

from equizoo.data.doctor import in_memory
from equizoo.data.doctor_elements import frames_with
from equizoo.data.doctor_findings import Finding, Verdict, named
from equizoo.data.readers import Dataset
from equizoo.data.reference_energies import interaction_energy
from equizoo.eval.potential import Potential, load
from equizoo.registry import MODELS
from equizoo.structure import EnergyReference, symbols

_BINDING = (-12.0, 4.0)  # [eV/atom] of total energies less those of isolated atoms


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What a data set is compared with."""

    name: str
    elements: tuple[int, ...]  # atomic numbers
    cutoff: float  # [Å]
    energy_reference: EnergyReference
    level_of_theory: str
    reference_energies: Mapping[int, float] | None = None  # [eV] by atomic number

    @classmethod
    def of(cls, potential: Potential) -> "ModelFacts":
        return cls(
            name=potential.name,
            elements=tuple(potential.config.atomic_numbers),
            cutoff=potential.config.cutoff,
            energy_reference=potential.energy_reference,
            level_of_theory=potential.level_of_theory,
            reference_energies={
                z: energy
                for z, energy in potential.reference_energies.items()
                if z not in potential.placeholders
            },
        )


def model_facts(name: str) -> ModelFacts:
    """The facts of a model of the zoo or a model folder; a checkpoint's are those on its card."""
    entry = MODELS.get(name)
    if entry is None or entry.source != "checkpoint":
        return ModelFacts.of(load(name, check_golden=False))
    return ModelFacts(
        name=entry.name,
        elements=tuple(atomic_numbers[symbol] for symbol in entry.elements),
        cutoff=entry.cutoff,
        energy_reference=entry.energy_reference,
        level_of_theory=entry.level_of_theory,
    )


def compare_with_model(dataset: Dataset, model: ModelFacts) -> Iterator[Finding]:
    """Findings about a data set to be used with a model; of one on a disk, about a sample."""
    dataset = in_memory(dataset)
    structures = dataset.structures
    unknown = [z for z in dataset.elements if z not in model.elements]
    check = "elements of the model"
    if unknown:
        frames = frames_with(structures, unknown)
        yield Finding(
            check,
            Verdict.ERROR,
            f"{model.name} has never seen {symbols(unknown)}",
            len(frames),
            named(structures, frames),
            "Leave these frames out, choose a model with these elements (equizoo models "
            f"--elements {' '.join(chemical_symbols[z] for z in dataset.elements)}), or teach them "
            f"to this one (equizoo finetune ... --new-elements {chemical_symbols[unknown[0]]}=OLD, "
            "a copy of one that it knows).",
        )
    else:
        yield Finding(check, Verdict.FINE, f"{model.name} knows all elements of the data")
    check = "energy reference of the model"
    data, wanted = dataset.energy_reference, model.energy_reference
    if data != wanted:
        yield Finding(
            check,
            Verdict.ERROR,
            f"{model.name} gives {wanted.value} energies, the data have {data.value} ones",
            len(structures),
            fix="Convert the data, or choose a model with the data's reference; see "
            "--energy-reference.",
        )
        return
    yield Finding(check, Verdict.FINE, f"{data.value} energies, in both")
    yield _level(dataset, model)
    yield from _scale(dataset, model)


def _level(dataset: Dataset, model: ModelFacts) -> Finding:
    check = "level of theory of the model"
    data, known = dataset.level_of_theory, model.level_of_theory
    if not data or not known:
        side = "of the data" if not data else f"of {model.name}"
        return Finding(check, Verdict.CANNOT_TELL, f"the level of theory {side} is not stated")
    if "".join(data.lower().split()) == "".join(known.lower().split()):
        return Finding(check, Verdict.FINE, f"{data}, in both")
    return Finding(
        check,
        Verdict.NOTE,
        f"{model.name} is {known}, the data are {data}",
        len(dataset),
        fix="Refit reference energies when fine-tuning (the default); errors of the unchanged "
        "model contain the difference.",
    )


def _scale(dataset: Dataset, model: ModelFacts) -> Iterator[Finding]:
    """Whether energies less the model's reference energies are those of bound atoms."""
    energies = model.reference_energies
    labelled = [
        s
        for s in dataset.structures
        if s.energy is not None and set(s.atomic_numbers.tolist()) <= set(energies or ())
    ]
    if not energies or not labelled or model.energy_reference != EnergyReference.TOTAL:
        return
    binding = [interaction_energy(s, energies) / s.num_nodes for s in labelled]
    low, high = _BINDING
    median = float(np.median(binding))
    check = "reference energies of the model"
    if low < median < high:
        message = f"the data's atoms are bound by {-median:.2f} eV/atom with them"
        yield Finding(check, Verdict.FINE, message)
        return
    same = dataset.level_of_theory == model.level_of_theory
    yield Finding(
        check,
        Verdict.WARNING if same else Verdict.NOTE,
        f"less them, the data's energies are {median:.4g} eV/atom: another scale than "
        f"{model.name}'s" + (", though the level of theory is the same" if same else ""),
        len(labelled),
        fix="Other units, pseudopotentials or charges? With reference_energies=from_model nothing "
        "could be learnt.",
    )
