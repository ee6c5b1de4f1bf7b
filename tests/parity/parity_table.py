"""How far models are from what torch computes: a row for each model and quantity compared.

Each test file has a table of its own, with the versions of what it compares with.
"""

import csv
import importlib.metadata
import os
import re
from pathlib import Path

from equizoo.whole_files import written_whole

TABLES = {
    "test_mace_torch": ("mace_parity.csv", ("mace-torch", "torch", "jax")),
    "test_equiformer_torch": ("equiformer_parity.csv", ("e3nn", "torch", "jax")),
}

_largest: dict[tuple[str, str, str], float] = {}


def record(quantity: str, error: float) -> None:
    """Keeps the largest relative error of a quantity in the test that runs."""
    file, _, test = os.environ["PYTEST_CURRENT_TEST"].partition("::")
    model = re.sub(r"^test_((blocks_)?equal_to_(mace_)?torch(_v1)?)?", "", test.rpartition(" ")[0])
    key = (Path(file).stem, model.strip("[]").replace("_", " "), quantity)
    _largest[key] = max(error, _largest.get(key, 0.0))


def write(folder: Path) -> None:
    """The CSV file of every test file that ran; whole or not at all."""
    for stem, (name, peers) in TABLES.items():
        rows = {key[1:]: error for key, error in _largest.items() if key[0] == stem}
        if not rows:
            continue
        versions = {peer: importlib.metadata.version(peer) for peer in peers}
        with written_whole(folder / name) as partial, partial.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["model", "quantity", "largest_relative_error", *versions])
            for (model, quantity), error in rows.items():
                writer.writerow([model, quantity, f"{error:.1e}", *versions.values()])
