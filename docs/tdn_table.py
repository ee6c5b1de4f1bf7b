"""Rewrites the table of throughput in docs/tdn.md from its data file: `make readme`."""

import csv
from pathlib import Path

from marked_pages import page_with, table

PAGE = Path(__file__).parent / "tdn.md"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
BEGIN, END = "<!-- throughput:begin -->\n", "<!-- throughput:end -->"
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


def generated_page(page: str) -> str:
    """The page with the table between its marker lines."""
    return page_with(page, throughput_table(), BEGIN, END)


if __name__ == "__main__":
    PAGE.write_text(generated_page(PAGE.read_text("utf-8")), "utf-8")
