"""What OC20 and OC22 energies are measured against: references of systems, sums over elements."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from equizoo.data.catalyst_frames import system_number
from equizoo.data.pickled_tensors import decode_row
from equizoo.structure import symbols

_PLAUSIBLE = 1000.0  # [eV] per atom; elements that were not in a fit have up to 1e12


def read_adsorption_references(path: Path) -> dict[int, float]:  # [eV]
    """By ``sid``, what to add to an adsorption energy for the total one.

    From ``oc20_ref.pkl`` of OC22's release, a dictionary ``"random<sid>"`` to eV, decoded without
    running anything in it. Raises ``ValueError`` for anything else.
    """
    content = decode_row(path.read_bytes(), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dictionary.")
    references: dict[int, float] = {}
    for key, value in content.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{path}: {str(key)[:40]!r} has no number, expected an energy in eV.")
        references[system_number(key, str(path))] = float(value)
    return references


def read_linear_reference(
    path: Path, elements: tuple[int, ...] | None = None
) -> dict[int, float]:  # [eV]
    r"""By atomic number, the coefficients :math:`c_Z` of :math:`E_{ref} = \sum_i c_{Z_i}`.

    From a file such as ``oc22_linfit_coeffs.npz``, key ``coeff``. Its entries for elements outside
    of the fit are arbitrary and up to 1e12 eV: they are left out, so that asking for them raises
    in :func:`equizoo.data.reference_energies.reference_energy`. ``elements`` says which were in
    the fit; without it those with a plausible energy, not zero and below 1000 eV.

    Raises ``ValueError`` when the file has no such array, or an element of ``elements`` has no
    plausible energy in it.
    """
    with np.load(path, allow_pickle=False) as arrays:
        if "coeff" not in arrays:
            raise ValueError(f"{path} has {', '.join(arrays)}; expected the array 'coeff'.")
        coefficients = np.asarray(arrays["coeff"], np.float64)
    if coefficients.ndim != 1:
        raise ValueError(f"{path}: coeff has shape {coefficients.shape}, expected one per element.")
    fitted = {
        z: float(coefficients[z])
        for z in range(1, len(coefficients))
        if 0 < abs(coefficients[z]) < _PLAUSIBLE
    }
    if elements is None:
        return fitted
    if missing := [z for z in elements if z not in fitted]:
        raise ValueError(
            f"{path} has no energy for {symbols(missing)}, not in its fit. Use the "
            "reference that the model was trained with."
        )
    return {z: fitted[z] for z in elements}


def reference_of(references: Mapping[int, float], sid: int) -> float:  # [eV]
    """The reference of a system; ``ValueError`` when it is not known."""
    if sid not in references:
        raise ValueError(
            f"There is no reference energy for system {sid} among {len(references)}; they are of "
            "another data set, or of other splits."
        )
    return references[sid]
