"""How far converted models are from mace-torch: a row for each model and quantity compared."""

import csv
import importlib.metadata
import os
from pathlib import Path

from equizoo.whole_files import written_whole

_largest: dict[tuple[str, str], float] = {}


def record(quantity: str, error: float) -> None:
    """Keeps the largest relative error of a quantity in the test that runs."""
    test = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].rpartition(" ")[0]
    key = (test.removeprefix("test_").removeprefix("equal_to_mace_torch"), quantity)
    _largest[key] = max(error, _largest.get(key, 0.0))


def write(path: Path) -> None:
    """The CSV file; whole or not at all."""
    versions = {name: importlib.metadata.version(name) for name in ("mace-torch", "torch", "jax")}
    with written_whole(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "quantity", "largest_relative_error", *versions])
        for (test, quantity), error in _largest.items():
            name = test.strip("[]").replace("_", " ")
            writer.writerow([name, quantity, f"{error:.1e}", *versions.values()])
