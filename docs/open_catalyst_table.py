"""Rewrites the published results in docs/oc20-oc22.md from their data file: `make readme`."""

from pathlib import Path

from equizoo.eval.leaderboard_published import Comparison, comparisons
from equizoo.eval.leaderboard_tasks import TASKS

PAGE = Path(__file__).parent / "oc20-oc22.md"
BEGIN, END = "<!-- published:begin -->\n", "<!-- published:end -->"


def published_tables() -> str:
    """Markdown: a table for every task, part and split that anything is published on."""
    every = [
        table
        for task in TASKS.values()
        for part in ("val", "test")
        for table in comparisons(task, part)
    ]
    sources = list(dict.fromkeys(source for table in every for source in table.sources))
    return "\n".join(_markdown(table, sources) for table in every) + "\n" + _listed(sources)


def page_with(page: str, tables: str) -> str:
    """The page with ``tables`` between its two marker lines."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks the lines {BEGIN.strip()!r} and {END!r}.")
    return f"{before}{begin}{tables}{end}{after}"


def _markdown(table: Comparison, sources: list[str]) -> str:
    """A source's number in the table becomes its number on the page."""
    numbers = {f"[{i}]": f"[{1 + sources.index(s)}]" for i, s in enumerate(table.sources, 1)}
    rows = [(*row[:-1], numbers[row[-1]]) for row in table.rows]
    lines = [table.header, tuple("---" for _ in table.header), *rows]
    return f"**{table.title}**\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _listed(sources: list[str]) -> str:
    return "".join(f"- [{number}] {source}\n" for number, source in enumerate(sources, 1))


if __name__ == "__main__":
    PAGE.write_text(page_with(PAGE.read_text("utf-8"), published_tables()), "utf-8")
