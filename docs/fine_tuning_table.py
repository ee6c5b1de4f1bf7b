"""Rewrites the tables in docs/fine-tuning.md from measured runs: `make readme`."""

import csv
from pathlib import Path

from marked_pages import page_with, table

PAGE = Path(__file__).parent / "fine-tuning.md"
CURVES = Path(__file__).parents[1] / "benchmarks" / "results" / "finetuning_curves.csv"
METHODS = {
    "scratch": "from scratch",
    "naive": "all weights",
    "frozen": "first layer frozen",
    "low_rank": "low rank 8",
    "replay": "replay",
}
TITLES = {
    "acac": "acetylacetone",
    "ethanol_extrap": "ethanol",
    "rmd17": "toluene",
    "mlearn": "silicon",
}
BUDGET, BATCH = "400", "2"


def measured() -> list[dict[str, str]]:
    """All runs."""
    with open(CURVES, newline="") as file:
        return list(csv.DictReader(file))


def _title(row: dict[str, str]) -> str:
    return TITLES[row["train"].split("/")[0]]


def _rounded(value: str) -> str:
    return f"{float(value):.0f}" if value else "—"


def methods_table() -> str:
    """Markdown: force errors on new data and on old, by data, number of frames and method."""
    runs = [row for row in measured() if (row["budget"], row["batch_size"]) == (BUDGET, BATCH)]
    cases = sorted({(list(TITLES.values()).index(_title(r)), int(r["frames"])) for r in runs})
    found = {(_title(row), int(row["frames"]), row["method"]): row for row in runs}

    def cells(title: str, frames: int) -> list[str]:
        made = []
        of = [found.get((title, frames, method)) for method in METHODS]
        best = min(float(row["forces_rmse"]) for row in of if row)
        for row in of:
            if row is None:
                made.append("—")
                continue
            new = _rounded(row["forces_rmse"])
            if all(of) and float(row["forces_rmse"]) == best:
                new = f"**{new}**"
            forgotten = row["old_forces_rmse"]
            made.append(f"{new} ({_rounded(forgotten)})" if forgotten else new)
        return made

    titles = list(TITLES.values())
    return table(
        ("new data", "frames", *METHODS.values()),
        ((titles[i], str(frames), *cells(titles[i], frames)) for i, frames in cases),
    )


def budgets_table() -> str:
    """Markdown: force errors by number of steps, where more than one was tried."""
    runs = [row for row in measured() if row["batch_size"] == BATCH]
    found = {
        (_title(r), r["method"], int(r["frames"]), int(r["budget"])): r["forces_rmse"] for r in runs
    }
    budgets = sorted({budget for *_, budget in found})
    rows = []
    for title, method, frames in sorted({key[:3] for key in found}):
        of = [found.get((title, method, frames, budget)) for budget in budgets]
        if sum(error is not None for error in of) > 1:
            errors = (_rounded(error) if error else "—" for error in of)
            rows.append((title, str(frames), METHODS[method], *errors))
    return table(("new data", "frames", "method", *(f"{b} steps" for b in budgets)), rows)


def generated_page(page: str) -> str:
    """The page with these tables between their marker lines."""
    for name, made in {"methods": methods_table, "budgets": budgets_table}.items():
        page = page_with(page, made(), f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->")
    return page


if __name__ == "__main__":
    PAGE.write_text(generated_page(PAGE.read_text("utf-8")), "utf-8")
