"""The inference form of a potential, and how far its forces can be from the potential's own."""

import dataclasses

import numpy as np

from equizoo.eval.golden import golden_structures
from equizoo.eval.potential import InferenceForm, Potential
from equizoo.structure import Structure

SAFETY = 10.0  # the bound, over the largest difference that was found
LARGE = 10.0  # [eV/Å] differences count in proportion where the largest force is above this
SCALES = (1.0, 0.85, 1.25)  # of golden structures: neighbours closer and farther than usual
_FIRST, _FINEST = 1e-7, 1e-10  # tolerances of radial functions


def measured_form(potential: Potential, tolerance: float) -> tuple[Potential, InferenceForm]:
    """See :meth:`equizoo.eval.potential.Potential.compile`."""
    if not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance} eV/Å, expected a positive number.")
    structures = probes(potential)
    exact = [result.forces for result in potential.predict(structures, dtype="float64")]

    def difference(of: Potential, dtype: str) -> float:
        found = [result.forces for result in of.predict(structures, dtype=dtype)]
        return max(
            float(np.abs(a - b).max()) * LARGE / max(LARGE, float(np.abs(b).max()))
            for a, b in zip(found, exact, strict=True)
        )

    fine = _FIRST
    while True:
        form = potential.with_inference_form(fine)
        bound = SAFETY * difference(form, "float64")
        if bound <= tolerance:
            return form, InferenceForm(fine, bound, difference(potential, "float32"))
        if fine <= _FINEST:
            raise ValueError(
                f"The forces of the inference form have a bound of {bound:.1e} eV/Å at best, but "
                f"tolerance is {tolerance:.1e}; allow more, or use the potential as it is."
            )
        fine = max(_FINEST, fine * 0.3 * tolerance / bound)


def probes(potential: Potential) -> list[Structure]:
    """Generated structures, for each head, that forces are compared on."""
    return [
        dataclasses.replace(
            structure,
            positions=scale * structure.positions,
            cell=scale * structure.cell,
            head=head,
        )
        for structure in golden_structures(potential.config).values()
        for scale in SCALES
        for head in potential.config.heads
    ]
