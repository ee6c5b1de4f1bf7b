"""Writes symmetric_basis.json: the cubic polynomials 0e+1o+2e -> 1o, on which stored weights rest.

Run once, with the basis of the first release. A difference later means that weights already stored
have changed their meaning; regenerate only together with an upgrade of the weights' format.
"""

import json
from pathlib import Path

import e3nn_jax as e3nn
import numpy as np

from equizoo.tensor_products._symmetric import symmetric_basis

if __name__ == "__main__":
    basis = symmetric_basis(e3nn.Irreps("0e+1o+2e"), e3nn.Irrep("1o"), 3)
    places = np.argwhere(np.abs(basis) > 1e-12)
    entries = [[*map(int, place), float(f"{basis[tuple(place)]:.15g}")] for place in places]
    rows = ",\n".join(json.dumps(entry) for entry in entries)
    text = f'{{"shape": {list(basis.shape)}, "entries": [\n{rows}\n]}}\n'
    Path(__file__).with_name("symmetric_basis.json").write_text(text, "utf-8")
