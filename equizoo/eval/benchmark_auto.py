"""The table of the product ``auto``: which of the equal forms is fastest on this device."""

from collections.abc import Iterable
from pathlib import Path

import jax

from equizoo.eval.benchmark import BACKWARD, Limits, SideBySide
from equizoo.eval.benchmark_peers import Comparison
from equizoo.eval.benchmark_rows import Row
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
    """For each operation, degree and size the candidate with the fastest forward and backward."""
    times: dict[Choice, float] = {}
    for row in rows:
        operation = _OPERATIONS.get(row.mode)
        if row.median_ms is None or row.direction != BACKWARD or operation is None:
            continue
        if row.variant in CANDIDATES[operation]:
            where = jax.default_backend(), row.device, operation, row.l_max, row.batch
            times[Choice(*where, row.variant)] = row.median_ms  # the last measurement counts
    best: dict[tuple, Choice] = {}
    for choice in sorted(times, key=lambda choice: times[choice], reverse=True):
        best[choice[:-1]] = choice
    return list(best.values())


def write_choices(rows: Iterable[Row], folder: str | Path) -> Path:
    """The file with :func:`fastest`, for ``Auto(table=...)``."""
    path = Path(folder) / TABLE.name
    write_table(fastest(rows), path)
    return path
