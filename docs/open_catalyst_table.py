"""Rewrites the tables in docs/oc20-oc22.md from their data files: `make readme`."""

import csv
from pathlib import Path

from marked_pages import page_with, table

from equizoo.eval.leaderboard_published import Comparison, comparisons
from equizoo.eval.leaderboard_tasks import TASKS

PAGE = Path(__file__).parent / "oc20-oc22.md"
BEGIN, END = "<!-- published:begin -->\n", "<!-- published:end -->"
BEGIN_TRIED, END_TRIED = "<!-- tried:begin -->\n", "<!-- tried:end -->"
TRIED = Path(__file__).parents[1] / "benchmarks" / "results" / "oc20_recipes.csv"


def published_tables() -> str:
    """Markdown: a table for every task, part and split that anything is published on."""
    every = [
        comparison
        for task in TASKS.values()
        for part in ("val", "test")
        for comparison in comparisons(task, part)
    ]
    sources = list(dict.fromkeys(source for each in every for source in each.sources))
    return "\n".join(_markdown(each, sources) for each in every) + "\n" + _listed(sources)


_LOSSES = ("first_epoch", "last_epoch", "of_references", "after")


def tried_table() -> str:
    """Markdown: what became of each recipe on the sample."""
    with open(TRIED, newline="") as file:
        rows = list(csv.DictReader(file))
    losses = ("first epoch", "last epoch", "references alone", "after training")
    return table(
        ("recipe", "parameters", "steps", *losses),
        (
            (
                f"`{row['recipe']}`",
                f"{int(row['parameters']):,}",
                row["steps"],
                *(f"{float(row[f'loss_{which}']):.2f}" for which in _LOSSES),
            )
            for row in rows
        ),
    )


def generated_page(page: str) -> str:
    """The page with these tables between their marker lines."""
    page = page_with(page, tried_table(), BEGIN_TRIED, END_TRIED)
    return page_with(page, published_tables(), BEGIN, END)


def _markdown(comparison: Comparison, sources: list[str]) -> str:
    """A source's number in the table becomes its number on the page."""
    numbers = {f"[{i}]": f"[{1 + sources.index(s)}]" for i, s in enumerate(comparison.sources, 1)}
    rows = ((*row[:-1], numbers[row[-1]]) for row in comparison.rows)
    return f"**{comparison.title}**\n\n{table(comparison.header, rows)}"


def _listed(sources: list[str]) -> str:
    return "".join(f"- [{number}] {source}\n" for number, source in enumerate(sources, 1))


if __name__ == "__main__":
    PAGE.write_text(generated_page(PAGE.read_text("utf-8")), "utf-8")
