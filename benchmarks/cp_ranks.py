"""How few products of three vectors add up to all couplings of degrees 0 to L, exactly?

For equal weights and bare Wigner 3j tensors: all couplings, those with ``l_1 + l_2 + l_3`` even,
and those with it odd. Writes ``results/cp_ranks.csv``, a row for each rank that was tried, and with
``--tables`` the factors of the ranks in ``EXACT``, which the package ships. Ranks below are upper
bounds: what was not found may exist. An hour on one core, most of it for L = 3.

Run as ``python benchmarks/cp_ranks.py [--tables]``; with ``--fits`` it writes only the approximate
factors that the package ships, those of the published sizes of TDN.
"""

import csv
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import e3nn_jax as e3nn
import numpy as np
import scipy

from equizoo.tensor_products._cp import FITS, SOLVER, Factors, relative_error, search
from equizoo.tensor_products.cp_decomposed import TABLES, CPDecomposed, Schedule, table_target

RESULTS = Path(__file__).with_name("results") / "cp_ranks.csv"
# (couplings, L) -> terms, and random starts to try
EXACT = {
    ("all", 1): (8, 4),
    ("even", 1): (6, 4),
    ("odd", 1): (5, 4),
    ("all", 2): (30, 4),
    ("even", 2): (18, 40),
    ("odd", 2): (20, 80),
    ("all", 3): (90, 2),
    ("even", 3): (54, 4),
    ("odd", 3): (80, 2),
}
BELOW = {
    ("all", 1): (4, 5, 6, 7),
    ("even", 1): (4, 5),
    ("odd", 1): (3, 4),
    ("all", 2): (10, 15, 20, 24, 26, 28, 29),
    ("even", 2): (14, 16, 17),
    ("odd", 2): (16, 18, 19),
}


def main(write_tables: bool) -> None:
    rows = []
    for (kind, l_max), (exact, starts) in EXACT.items():
        target = table_target(kind, l_max)
        for rank in (*BELOW.get((kind, l_max), ()), exact):
            factors, tried = search(target, rank, starts if rank == exact else 8)
            error = relative_error(target, factors)
            rows.append(row(kind, l_max, rank, tried, error, factors))
            print(rows[-1], flush=True)
        if write_tables and error < 1e-14:
            np.savez(TABLES / f"{kind}_{l_max}.npz", **factors._asdict())
    with open(RESULTS, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_fits() -> None:
    """As they are found when first bound, in a cache that is empty."""
    for shipped in FITS.glob("*.npz"):
        shipped.unlink()
    FITS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["EQUIZOO_CACHE"] = cache
        for l_max in (1, 2, 3):
            irreps = e3nn.Irreps([(1, (degree, 1)) for degree in range(l_max + 1)])
            bound = CPDecomposed(Schedule.SEVEN_L2).bind(irreps, irreps, irreps)
            print(f"L = {l_max}: {bound.terms} terms, defect {bound.defect:.4f}", flush=True)
        for found in sorted((Path(cache) / "cp").glob("*.npz")):
            shutil.copy(found, FITS)


def row(kind: str, l_max: int, rank: int, tried: int, error: float, factors: Factors) -> dict:
    return {
        "couplings": kind,
        "l_max": l_max,
        "terms": rank,
        "starts": tried,
        "relative_error": f"{error:.1e}",
        "largest_entry": f"{max(np.abs(part).max() for part in factors):.2f}",
        "solver": SOLVER,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "dtype": "float64",
    }


if __name__ == "__main__":
    if "--fits" in sys.argv[1:]:
        write_fits()
    else:
        main(write_tables="--tables" in sys.argv[1:])
