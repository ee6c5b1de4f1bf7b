"""Rewrites the published results in docs/oc20-oc22.md from their data file: `make readme`."""

from pathlib import Path

from marked_pages import page_with, table

from equizoo.eval.leaderboard_published import Comparison, comparisons
from equizoo.eval.leaderboard_tasks import TASKS

PAGE = Path(__file__).parent / "oc20-oc22.md"
BEGIN, END = "<!-- published:begin -->\n", "<!-- published:end -->"


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


def published_page(page: str) -> str:
    """The page with these tables between its two marker lines."""
    return page_with(page, published_tables(), BEGIN, END)


def _markdown(comparison: Comparison, sources: list[str]) -> str:
    """A source's number in the table becomes its number on the page."""
    numbers = {f"[{i}]": f"[{1 + sources.index(s)}]" for i, s in enumerate(comparison.sources, 1)}
    rows = ((*row[:-1], numbers[row[-1]]) for row in comparison.rows)
    return f"**{comparison.title}**\n\n{table(comparison.header, rows)}"


def _listed(sources: list[str]) -> str:
    return "".join(f"- [{number}] {source}\n" for number, source in enumerate(sources, 1))


if __name__ == "__main__":
    PAGE.write_text(published_page(PAGE.read_text("utf-8")), "utf-8")
