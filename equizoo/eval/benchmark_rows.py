"""One row for each point of a benchmark, and the CSV files that hold them."""

import csv
import dataclasses
import os
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from equizoo.eval.benchmark_timing import Environment, Program, Timing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One point: what was timed, how long it took, and where.

    ``None`` is what does not apply or was not measured; ``skipped`` then says why.
    """

    library: str = "equizoo"
    variant: str = ""
    options: str = ""
    mode: str = ""  # SISO, SIMO, MIMO, or a comparison
    l_max: int = 0
    irreps_1: str = ""
    irreps_2: str = ""
    irreps_out: str = ""
    channels: int = 0
    channels_2: int = 0
    batch: int = 0  # items of the second factor: edges of a convolution
    nodes: int | None = None  # of a convolution
    weights: str = ""  # their shape, items x weights x channels; "" where all are one
    dtype: str = ""
    direction: str = ""
    map: str = ""  # the product of ours that computes the same
    couplings: int | None = None  # that the map contains
    num_weights: int | None = None
    bind_s: float | None = None  # constants of the product
    compile_s: float | None = None
    median_ms: float | None = None
    min_ms: float | None = None
    repeats: int | None = None
    flops: int | None = None  # of a forward call, as the product states them
    gflop_per_s: float | None = None
    xla_flops: float | None = None  # of a call, as XLA counts them
    bytes: int | None = None  # arguments and results: what must be moved at least
    gb_per_s: float | None = None
    expressivity: int | None = None
    us_per_expressivity: float | None = None
    max_error: float | None = None  # against float64, relative to the root mean square
    skipped: str = ""  # the reason; "" if measured
    library_version: str = ""
    device: str = ""
    cores: int = 0
    precision: str = ""
    python: str = ""
    jax: str = ""
    jaxlib: str = ""
    equizoo: str = ""
    commit: str = ""

    def replace(self, **changes: Any) -> "Row":
        """A copy with other values."""
        return dataclasses.replace(self, **changes)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What is timed."""
        return tuple(getattr(self, name) for name in _IDENTITY)

    @property
    def point(self) -> tuple[Any, ...]:
        """What is timed and where."""
        return (*self.identity, *(getattr(self, name) for name in Environment._fields))

    def timed(self, program: Program, timing: Timing) -> "Row":
        """The row with the times of a program."""
        return self.compiled(program).replace(
            **timing._asdict(), gb_per_s=1e-6 * program.bytes / timing.median_ms
        )

    def compiled(self, program: Program) -> "Row":
        """The row with what is known of a program before it runs."""
        return self.replace(
            compile_s=program.compile_s, bytes=program.bytes, xla_flops=program.flops
        )


_IDENTITY = (
    *("library", "variant", "options", "mode", "l_max", "channels", "channels_2", "batch"),
    *("nodes", "dtype", "direction"),
)
COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def write_rows(rows: Iterable[Row], path: str | Path) -> None:
    """Adds rows to a file, each flushed to disk before the next is asked for.

    Raises ``ValueError`` if the file exists with other columns.
    """
    path = Path(path)
    new = not path.exists() or not read_rows(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w" if new else "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({name: _text(getattr(row, name)) for name in COLUMNS})
            file.flush()
            os.fsync(file.fileno())


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a file; ``ValueError`` if its columns are not those of :class:`Row`."""
    if not Path(path).stat().st_size:
        return []
    with Path(path).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        found = tuple(reader.fieldnames or ())
        if found != COLUMNS:
            other = sorted(set(found) ^ set(COLUMNS)) or "in another order"
            raise ValueError(
                f"{path} does not have the columns of this version's benchmark ({other}). Choose "
                "another folder, or move the file away."
            )
        return [Row(**{name: _value(name, text) for name, text in r.items()}) for r in reader]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def _value(name: str, text: str) -> Any:
    annotation = _TYPES[name]
    if isinstance(annotation, types.UnionType):
        if not text:
            return None
        annotation = typing.get_args(annotation)[0]
    return annotation(text)


_TYPES: dict[str, Any] = typing.get_type_hints(Row)
