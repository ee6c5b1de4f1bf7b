"""Writes symmetric_basis.json: the polynomials on which the weights of a symmetric power rest.

The cubic polynomials 0e+1o+2e -> 1o in full, and of all bases up to degree three one projection.
Run once, with the basis of the first release. A difference later means that weights already stored
have changed their meaning; regenerate only together with an upgrade of the weights' format.
"""

import json
from pathlib import Path

import e3nn_jax as e3nn
import numpy as np

from equizoo.tensor_products._symmetric import symmetric_basis


def natural(l_max):
    return e3nn.Irreps([(1, (degree, (-1) ** degree)) for degree in range(l_max + 1)])


def projections():
    """Of each basis the product of its coefficients with fixed numbers on the monomials."""
    found = {}
    for l_max in (1, 2, 3):
        for _, ir in natural(l_max):
            for order in (1, 2, 3):
                basis = symmetric_basis(natural(l_max), ir, order)
                numbers = np.cos(np.arange(basis.shape[2]) ** 1.5)
                found[f"{l_max}:{ir}:{order}"] = (basis @ numbers).round(13).tolist()
    return found


if __name__ == "__main__":
    basis = symmetric_basis(natural(2), e3nn.Irrep("1o"), 3)
    places = np.argwhere(np.abs(basis) > 1e-12)
    entries = [[*map(int, place), float(f"{basis[tuple(place)]:.15g}")] for place in places]
    rows = {
        "shape": list(basis.shape),
        "entries": entries,
        "projections": projections(),
    }
    text = json.dumps(rows).replace("], [", "],\n[").replace("]], ", "]],\n")
    Path(__file__).with_name("symmetric_basis.json").write_text(text + "\n", "utf-8")
