"""Rewrites the tables of speed in docs/equiformer.md from their data files: `make readme`."""

import csv
from pathlib import Path

from marked_pages import page_with, table

PAGE = Path(__file__).parent / "equiformer.md"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
END = "<!-- speed:end -->"
_MODES = {"forward": "energy", "forces": "energy, forces", "step": "training step"}
_MODES_V2 = {"forward": "energy, forces of the head", "step": "training step"}


def speed_table(architecture: str) -> str:
    """Markdown: milliseconds, ratio to the first implementation, and difference from it."""
    with open(RESULTS / "equiformer.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["architecture"] == architecture]
    peer = f"e3nn, {rows[0]['peer']}" if rows[0]["peer"] else rows[0]["implementation"]
    modes = _MODES if architecture == "equiformer" else _MODES_V2
    return table(
        ("computes", "implementation", "ms", "times as fast", "difference", "GFLOP"),
        (
            (
                modes[row["mode"]],
                peer
                if row["implementation"] == rows[0]["implementation"]
                else row["implementation"],
                f"{float(row['median_ms']):.0f}",
                f"{float(row['speedup']):.2f}",
                row["relative_difference"] if float(row["relative_difference"]) else "–",
                f"{float(row['gflops']):.1f}" if row["gflops"] else "",
            )
            for mode in modes
            for row in rows
            if row["mode"] == mode
        ),
    )


def generated_page(page: str) -> str:
    """The page with these tables between their marker lines."""
    for architecture in ("equiformer", "equiformer_v2"):
        begin = f"<!-- speed of {architecture}:begin -->\n"
        page = page_with(page, speed_table(architecture), begin, END)
    return page


if __name__ == "__main__":
    PAGE.write_text(generated_page(PAGE.read_text("utf-8")), "utf-8")
