"""Figures of the benchmark of tensor products, with the points of the paper beside ours."""

import csv
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from equizoo.eval.benchmark import MODES
from equizoo.eval.benchmark_peers import Comparison
from equizoo.eval.benchmark_rows import Row
from equizoo.eval.plots import _STYLE, BLACK, GREY, _figure, _save
from equizoo.registry import TENSOR_PRODUCTS

# Each product has one colour and marker in all figures, by its place in the registry.
_COLORS = (
    *("#4363D8", "#E6194B", "#3CB44B", "#F58231", "#911EB4", "#42D4F4", "#9A6324", "#F032E6"),
    *("#469990", "#000075", "#808000", "#800000", "#E0B000", "#7F7F7F", "#C08BD8", "#8FB339"),
    *("#FF9DA7", "#1B7837", "#5E4FA2"),
)
_MARKERS = "osD^vP*Xph<>"
_PUBLISHED = Path(__file__).parent / "published" / "price_of_freedom.csv"


class Published(NamedTuple):
    """A point of The Price of Freedom, with the product of ours that it belongs to."""

    method: str
    variant: str
    mode: str
    device: str
    products: int  # in a call: the batch of the paper, which has one channel
    l_max: int
    walltime_ms: float
    expressivity: int | None


class _Panel(NamedTuple):
    title: str
    unit: str
    ours: Callable[[Row], float | None]
    theirs: Callable[[Published], float | None]


_PANELS = (
    _Panel(
        "Operations", "GFLOP",
        lambda row: row.flops and 1e-9 * row.flops, lambda point: None,
    ),
    _Panel("Walltime", "ms", lambda row: row.median_ms, lambda point: point.walltime_ms),
    _Panel("Throughput", "GFLOP/s", lambda row: row.gflop_per_s, lambda point: None),
    _Panel(
        "Operations per expressivity", "GFLOP",
        lambda row: row.flops and row.expressivity and 1e-9 * row.flops / row.expressivity,
        lambda point: None,
    ),
    _Panel(
        "Walltime per expressivity", "µs",
        lambda row: row.us_per_expressivity,
        lambda point: point.expressivity and 1e3 * point.walltime_ms / point.expressivity,
    ),
)  # fmt: skip


def published_points() -> list[Published]:
    """Times of the paper on an RTX A5500; the expressivity as the paper counts it."""
    with _PUBLISHED.open(encoding="utf-8", newline="") as file:
        return [
            Published(
                row["method"], row["variant"], row["mode"], row["device"], int(row["products"]),
                int(row["l_max"]), float(row["walltime_ms"]),
                int(row["expressivity"]) if row["expressivity"] else None,
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip


def figures(rows: Iterable[Row], folder: str | Path) -> list[Path]:
    """The files written: of both protocols, what there is."""
    rows = list(rows)
    swept = [row for row in rows if row.mode in MODES]
    beside = [row for row in rows if row.mode not in MODES]
    return sweep_figures(swept, folder) + side_by_side_figures(beside, folder)


def sweep_figures(rows: Iterable[Row], folder: str | Path) -> list[Path]:
    """The files written: one for each device, mode, size and direction that was measured.

    Operations, walltime and throughput against the degree, and the first two divided by the
    expressivity. Published points are drawn where a call computes as many products.
    """
    measured = sorted(_latest(rows), key=_figure_key)
    files = []
    for key, group in itertools.groupby(measured, key=_figure_key):
        files.append(_sweep_figure(list(group), Path(folder) / f"{_file_name('sweep', key)}.png"))
    return files


def side_by_side_figures(rows: Iterable[Row], folder: str | Path) -> list[Path]:
    """The files written: one for each device and size, times by comparison and direction.

    The same map as ``clebsch_gordan`` in full lines, other libraries dashed, other maps dotted.
    """
    measured = sorted(_latest(rows), key=_size_key)
    files = []
    for size, group in itertools.groupby(measured, key=_size_key):
        path = Path(folder) / f"{_file_name('sidebyside', size)}.png"
        files.append(_side_by_side_figure(list(group), path))
    return files


def _latest(rows: Iterable[Row]) -> list[Row]:
    """Those that were measured, of every point on a device the last."""
    last = {(*row.identity, row.device, row.cores): row for row in rows}
    return [row for row in last.values() if row.median_ms is not None]


def _figure_key(row: Row) -> tuple[Any, ...]:
    size = row.channels, row.batch
    return row.device, row.cores, row.mode, *size, row.dtype, row.direction


def _size_key(row: Row) -> tuple[Any, ...]:
    return row.device, row.cores, row.channels


def _curve_key(row: Row) -> tuple[Any, ...]:
    return row.library, row.variant, row.map, row.batch


def _file_name(protocol: str, key: tuple[Any, ...]) -> str:
    words = "_".join(str(part) for part in ("tensor_products", protocol, *key))
    kept = (c if c.isalnum() or c in "-_" else "-" for c in words.replace("+", "-"))
    return "-".join(filter(None, "".join(kept).split("-")))


def _sweep_figure(rows: list[Row], path: Path) -> Path:
    import matplotlib

    first = rows[0]
    points = [
        point
        for point in published_points()
        if (point.mode, point.products) == (first.mode, first.channels * first.batch)
        and first.direction == "forward"
    ]
    panels = [panel for panel in _PANELS if any(panel.ours(row) for row in rows)]
    with matplotlib.rc_context(_STYLE):
        columns = 3
        lines = -(-(len(panels) + 1) // columns)  # and one for the legend
        figure = _figure(4.0 * columns, 3.3 * lines)
        axes = list(figure.subplots(lines, columns, squeeze=False).flat)
        figure.suptitle(
            f"{first.mode}, {first.direction}: {first.batch} × {first.channels} products, "
            f"{first.dtype}, {first.device}, {_cores(first)}",
            fontsize=10,
            fontweight="bold",
        )
        for panel, ax in zip(panels, axes, strict=False):
            for variant in _variants(rows):
                mine = [row for row in rows if row.variant == variant]
                _line(ax, [(row.l_max, panel.ours(row)) for row in mine], **look_of(variant))
            for method in dict.fromkeys(point.method for point in points):
                theirs = [point for point in points if point.method == method]
                values = [(point.l_max, panel.theirs(point)) for point in theirs]
                _line(ax, values, **_hollow(theirs[0].variant))
            _finish(ax, panel.title, panel.unit)
        rest = axes[len(panels) :]
        for ax in rest:
            ax.set_axis_off()
        entries = [(variant, look_of(variant)) for variant in _variants(rows)]
        groups = [("equizoo", entries)]
        if points:
            named = {point.method: _hollow(point.variant) for point in points}
            device = points[0].device.removeprefix("NVIDIA ")
            groups.append((f"published, {device}", list(named.items())))
        _legends(rest[0], groups, loc="upper left", bbox_to_anchor=(-0.1, 1.05), borderaxespad=0)
        return _save(figure, path)


def _side_by_side_figure(rows: list[Row], path: Path) -> Path:
    import matplotlib

    comparisons = [str(c) for c in Comparison if any(row.mode == c for row in rows)]
    directions = sorted({row.direction for row in rows})
    others = sorted({_other(row) for row in rows if row.library != "equizoo"})
    with matplotlib.rc_context(_STYLE):
        figure = _figure(2.9 * len(comparisons) + 2.8, 3.0 * len(directions) + 0.3)
        axes = figure.subplots(len(directions), len(comparisons), squeeze=False)
        figure.suptitle(
            f"{rows[0].channels} channels, {rows[0].dtype}, {rows[0].device}, {_cores(rows[0])}",
            fontsize=10,
            fontweight="bold",
        )
        for (line, direction), (column, comparison) in itertools.product(
            enumerate(directions), enumerate(comparisons)
        ):
            ax = axes[line, column]
            here = [row for row in rows if (row.mode, row.direction) == (comparison, direction)]
            for _, curve in itertools.groupby(sorted(here, key=_curve_key), key=_curve_key):
                mine = list(curve)
                values = [(row.l_max, row.median_ms) for row in mine]
                _line(ax, values, **_side_look(mine[0], others))
            _finish(ax, f"{comparison}, {_sizes(here)}\n{direction}", "ms")
        same = [row for row in rows if row.library == "equizoo" and row.map == "clebsch_gordan"]
        rest = [row for row in rows if row.library == "equizoo" and row.map != "clebsch_gordan"]
        groups = [
            ("other libraries", [(name, _other_look(others.index(name))) for name in others]),
            ("clebsch_gordan and its equals", [(v, look_of(v)) for v in _variants(same)]),
            ("other maps", [(v, _dotted(v)) for v in _variants(rest)]),
        ]
        _legends(figure, [group for group in groups if group[1]], loc="outside right upper")
        return _save(figure, path)


def _line(ax: Any, values: Sequence[tuple[int, float | None]], **look: Any) -> None:
    there = sorted((x, y) for x, y in values if y)
    if there:
        ax.plot(*zip(*there, strict=True), **look)


def _finish(ax: Any, title: str, unit: str) -> None:
    ax.set_title(title, loc="left")
    ax.set_xlabel("l_max")
    ax.set_ylabel(unit)
    if ax.lines:
        ax.set_yscale("log")
        degrees = sorted({int(x) for line in ax.lines for x in line.get_xdata()})
        ax.set_xticks(degrees)
        ax.set_xlim(degrees[0] - 0.4, degrees[-1] + 0.4)


def _legends(
    place: Any, groups: Sequence[tuple[str, Sequence[tuple[str, dict[str, Any]]]]], **where: Any
) -> None:
    """One column, under one heading after another."""
    from matplotlib.lines import Line2D

    handles, labels = [], []
    for title, entries in groups:
        handles += [Line2D([], [], linestyle="none")]
        labels += [title]
        handles += [Line2D([], [], **look) for _, look in entries]
        labels += [name for name, _ in entries]
    legend = place.legend(
        handles, labels, fontsize=7.5, labelspacing=0.35, handlelength=2.6, **where
    )
    for title in legend.get_texts():
        if title.get_text() in {title for title, _ in groups}:
            title.set_fontweight("bold")


def _variants(rows: Iterable[Row]) -> list[str]:
    return sorted({row.variant for row in rows})


def look_of(variant: str) -> dict[str, Any]:
    """Colour and marker of a product, the same in all figures, as options of matplotlib."""
    known = list(TENSOR_PRODUCTS)
    place = known.index(variant) if variant in known else len(known)
    return {
        "color": _COLORS[place % len(_COLORS)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.3,
    }


def _hollow(variant: str) -> dict[str, Any]:
    return look_of(variant) | {
        "markerfacecolor": "white",
        "linestyle": (0, (4, 2)),
        "linewidth": 1.0,
    }


def _dotted(variant: str) -> dict[str, Any]:
    return look_of(variant) | {"linestyle": ":", "markersize": 3, "linewidth": 1.0, "alpha": 0.8}


def _other(row: Row) -> str:
    same = "" if row.map == "clebsch_gordan" else f" (as {row.map})"
    return f"{row.library} {row.variant}{same}"


def _other_look(place: int) -> dict[str, Any]:
    return {
        "color": (BLACK, GREY)[place % 2],
        "marker": _MARKERS[place % len(_MARKERS)],
        "markerfacecolor": "white",
        "markersize": 5.5,
        "linestyle": (0, (4, 2)),
        "linewidth": 1.2,
    }


def _side_look(row: Row, others: Sequence[str]) -> dict[str, Any]:
    if row.library != "equizoo":
        return _other_look(list(others).index(_other(row)))
    return look_of(row.variant) if row.map == "clebsch_gordan" else _dotted(row.variant)


def _sizes(rows: Sequence[Row]) -> str:
    items = ", ".join(map(str, sorted({row.batch for row in rows})))
    nodes = sorted({row.nodes for row in rows if row.nodes})
    return f"{nodes[0]} nodes, {items} edges" if nodes else f"batch {items}"


def _cores(row: Row) -> str:
    return f"{row.cores} cores"
