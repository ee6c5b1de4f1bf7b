"""The table of the product ``auto``: which of the equal forms is fastest on this device."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from equizoo.eval.benchmark import BACKWARD, Limits, SideBySide
from equizoo.eval.benchmark_peers import Comparison
from equizoo.eval.benchmark_rows import Row
from equizoo.eval.benchmark_timing import environment
from equizoo.tensor_products.auto import CANDIDATES, TABLE, Choice, Operation, write_table

_OPERATIONS: dict[str, Operation] = {
    Comparison.EDGE_WEIGHTED: "edge",
    Comparison.CHANNELWISE: "channelwise",
    Comparison.CONVOLVE: "convolve",
}


def auto_plan(limits: Limits) -> SideBySide:
    """The candidates of ``Auto``, and nothing else, over degrees and sizes."""
    return SideBySide(
        comparisons=tuple(_OPERATIONS),
        variants=tuple(sorted(set().union(*CANDIDATES.values()))),
        l_max=tuple(range(1, 7)),
        batch=(100, 1000, 10000),
        with_peers=False,
        limits=limits,
        file_name="tensor_products_auto.csv",
    )


def fastest(rows: Iterable[Row]) -> list[Choice]:
    """For each operation, degree and size the candidate with the fastest forward and backward.

    Of rows measured on this device, at the largest number of channels that all candidates with a
    row there have.
    """
    here = environment()
    times: dict[tuple[Any, ...], dict[int, dict[str, float]]] = {}  # by channels and candidate
    for row in rows:
        operation = _OPERATIONS.get(row.mode)
        if row.median_ms is None or row.direction != BACKWARD or operation is None:
            continue
        if row.variant in CANDIDATES[operation] and row.device == here.device:
            where = jax.default_backend(), row.device, operation, row.l_max, row.batch
            of_channels = times.setdefault(where, {}).setdefault(row.channels, {})
            of_channels[row.variant] = row.median_ms  # the last measurement counts
    best = []
    for where, by_channels in times.items():
        most = max(map(len, by_channels.values()))
        measured = by_channels[max(c for c, found in by_channels.items() if len(found) == most)]
        best.append(Choice(*where, min(measured, key=lambda variant: measured[variant])))
    return best


def write_choices(rows: Iterable[Row], folder: str | Path) -> Path:
    """The file with :func:`fastest`, for ``Auto(table=...)``."""
    path = Path(folder) / TABLE.name
    write_table(fastest(rows), path)
    return path
