"""Rewrites the tables in docs/tdn.md from model cards and data files: `make readme`."""

import csv
from collections.abc import Callable
from pathlib import Path

from marked_pages import page_with, table

from equizoo.registry import MODELS

PAGE = Path(__file__).parent / "tdn.md"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
PLAIN, PUBLISHED = "Equiformer, plain", "TDN CP 7L2 (published)"


def throughput_table() -> str:
    """Markdown: structures per second, and ratios to the plain Equiformer and to CP."""
    with open(RESULTS / "tdn_throughput.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rates = {
        (row["computes"], row["l_max"], row["model"]): float(row["structures_per_s"])
        for row in rows
    }

    def of(computes: str, l_max: str, model: str) -> tuple[str, ...]:
        rate = rates.get((computes, l_max, model))
        if rate is None:
            return "not measured", "", ""
        ratios = (rate / rates[computes, l_max, other] for other in (PLAIN, PUBLISHED))
        return f"{rate:.3g}", *(f"{ratio:.2f}" for ratio in ratios)

    return table(
        (
            *("L", "model", "parameters", "energies per second", "over plain", "over CP"),
            *("with forces", "over plain", "over CP"),
        ),
        (
            (
                row["l_max"],
                row["model"],
                f"{int(row['parameters']):,}",
                *of("energy", row["l_max"], row["model"]),
                *of("energy and forces", row["l_max"], row["model"]),
            )
            for row in rows
            if row["computes"] == "energy"
        ),
    )


def accuracy_table() -> str:
    """Markdown: errors of the released models of 3BPA, best forces first, as their cards have."""
    found = [
        (row, model)
        for model in MODELS.values()
        for row in model.metrics
        if (row["dataset"], row["split"]) == ("3bpa", "test_300K")
    ]
    return table(
        ("model", "product", "parameters", "forces, RMSE [meV/Å]", "energy, RMSE [meV]"),
        (
            (
                f"[`{model.name}`](../model_cards/{model.name}.md)",
                model.tensor_product,
                f"{model.parameters:,}",
                f"{row['forces_rmse_meV_per_A']:.1f}",
                f"{row['energy_rmse_meV']:.1f}",
            )
            for row, model in sorted(found, key=lambda pair: pair[0]["forces_rmse_meV_per_A"])
        ),
    )


TABLES: dict[str, Callable[[], str]] = {
    "throughput": throughput_table,
    "accuracy": accuracy_table,
}


def generated_page(page: str) -> str:
    """The page with these tables between their marker lines."""
    for name, made in TABLES.items():
        page = page_with(page, made(), f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->")
    return page


if __name__ == "__main__":
    PAGE.write_text(generated_page(PAGE.read_text("utf-8")), "utf-8")
