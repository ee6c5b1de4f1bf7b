"""Pages that have generated parts between two marker lines."""

from collections.abc import Iterable


def page_with(page: str, part: str, begin: str, end: str) -> str:
    """The page with ``part`` between its lines ``begin`` and ``end``; what else it says is kept."""
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"the page lacks the lines {begin.strip()!r} and {end!r}.")
    return f"{before}{begin}{part}{end}{after}"


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = (header, ("---",) * len(header), *rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
