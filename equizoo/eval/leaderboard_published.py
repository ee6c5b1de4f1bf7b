"""Published results on OC20 and OC22, one number to a row of a data file, each with its source."""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from equizoo.eval.leaderboard_tasks import Task
from equizoo.eval.open_catalyst import average_of_splits

PUBLISHED = Path(__file__).parent / "published" / "open_catalyst.csv"
# metric of a row: key in our summaries, heading
_OURS = {
    "energy_mae": ("energy_mae_meV", "energy MAE [meV]"),
    "forces_mae": ("forces_mae_meV_per_A", "forces MAE [meV/Å]"),
    "forces_cosine": ("forces_cosine", "force cosine"),
    "EFwT": ("EFwT_percent", "EFwT [%]"),
    "EwT": ("EwT_percent", "EwT [%]"),
    "ADwT": ("ADwT_percent", "ADwT [%]"),
    "AFbT": (None, "AFbT [%]"),  # needs DFT on the server
}


@dataclasses.dataclass(frozen=True)
class PublishedNumber:
    """One number of one model on one split, or the mean over splits (``average``)."""

    task: str
    model: str
    trained_on: str
    metric: str
    unit: str
    part: str  # val or test
    split: str
    value: float
    source: str


def published_numbers() -> list[PublishedNumber]:
    """All rows of the file; ``ValueError`` for a metric that is not known."""
    with open(PUBLISHED, newline="", encoding="utf-8") as file:
        rows = [
            PublishedNumber(**(row | {"value": float(row["value"])}))  # type: ignore[arg-type]
            for row in csv.DictReader(file)
        ]
    if unknown := sorted({row.metric for row in rows} - set(_OURS)):
        raise ValueError(f"{PUBLISHED} has the metrics {unknown}, expected {', '.join(_OURS)}.")
    return rows


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A table: results on a split of a task, ours (if given) last."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    sources: tuple[str, ...]


def comparisons(
    task: Task,
    part: str,
    ours: Mapping[str, Mapping[str, Any]] | None = None,  # by split
    name: str = "",
) -> list[Comparison]:
    """What is published for every split of ``part`` and for their average, with ``ours``.

    Numbers are comparable where data, labels and energy reference are the official ones.
    """
    everything = [r for r in published_numbers() if (r.task, r.part) == (task.name, part)]
    summaries = dict(ours or {})
    if set(summaries) == set(task.splits):
        summaries["average"] = average_of_splits(summaries)
    tables = []
    for split in (*task.splits, "average"):
        rows = [row for row in everything if row.split == split]
        summary = summaries.get(split, {})
        if not rows and not summary:
            continue
        of_ours = [m for m, (key, _) in _OURS.items() if key in summary]
        metrics = [m for m in _OURS if m in of_ours or any(row.metric == m for row in rows)]
        tables.append(_table(f"{task.name}, {part} {split}", metrics, rows, summary, name))
    return tables


def _table(
    title: str,
    metrics: Sequence[str],
    rows: Sequence[PublishedNumber],
    summary: Mapping[str, Any],
    name: str,
) -> Comparison:
    sources = list(dict.fromkeys(row.source for row in rows))
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        found.setdefault((row.model, row.trained_on, row.source), {})[row.metric] = row.value
    lines = [
        (model, trained_on, *(_shown(values.get(m)) for m in metrics), f"[{1 + sources.index(s)}]")
        for (model, trained_on, s), values in found.items()
    ]
    if summary:
        own = (_shown(summary.get(_OURS[m][0] or "")) for m in metrics)
        lines.append((name or "this evaluation", "", *own, "computed here"))
    header = ("model", "trained on", *(_OURS[m][1] for m in metrics), "source")
    return Comparison(title, header, tuple(lines), tuple(sources))


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
