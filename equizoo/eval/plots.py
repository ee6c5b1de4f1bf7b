"""Plots for cards and runs: predictions against labels, and errors against epochs."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers
from jaxtyping import Float

from equizoo.eval.evaluate import Evaluation
from equizoo.whole_files import written_whole

# Okabe and Ito's palette, told apart with any kind of colour vision, https://jfly.uni-koeln.de/color/
BLUE, VERMILION, BLACK, GREY = "#0072B2", "#D55E00", "#000000", "#888888"
_SERIES = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MANY = 2000  # points from which density says more than dots
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 160,
}


def parity_plot(evaluations: Evaluation | Sequence[Evaluation], path: str | Path) -> Path:
    """The file written: a row per evaluation, predicted against reference values with errors.

    Energies per atom, force components, and stress components where there are any. Raises
    ``ValueError`` when no evaluation has any of them.
    """
    if isinstance(evaluations, Evaluation):
        evaluations = [evaluations]
    columns = [
        column
        for column in _PARITY
        if any(len(getattr(evaluation, column[0])) for evaluation in evaluations)
    ]
    if not columns:
        raise ValueError(
            f"A parity plot needs at least one evaluation with labels; got {len(evaluations)} "
            "without."
        )
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure = _figure(3.6 * len(columns), 3.6 * len(evaluations))
        rows = figure.subfigures(len(evaluations), 1, squeeze=False)[:, 0]
        for evaluation, row in zip(evaluations, rows, strict=True):
            title = f"{evaluation.model} on {evaluation.dataset} ({evaluation.dtype})"
            row.suptitle(title, fontsize=10, fontweight="bold")
            axes = row.subplots(1, len(columns), squeeze=False)[0]
            for column, ax in zip(columns, axes, strict=True):
                _parity_panel(row, ax, evaluation, *column)
        return _save(figure, path)


def learning_curve(records: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """The file written: loss, errors and learning rate by epoch, on log scales.

    ``records`` are the rows of a run's ``metrics.jsonl``; a row may lack any key but ``epoch``, and
    panels without a value are left out. Raises ``ValueError`` when no row has anything to show.
    """
    panels = [
        (title, unit, {label: _series(records, key) for label, key in keys})
        for title, unit, keys in _CURVES
        if any(len(_series(records, key)[0]) for _, key in keys)
    ]
    if not panels:
        known = ", ".join(key for _, _, keys in _CURVES for _, key in keys)
        raise ValueError(f"No row has an epoch and a positive value of any of {known}.")
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        columns = min(2, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure = _figure(4.2 * columns, 2.7 * rows)
        axes = figure.subplots(rows, columns, squeeze=False)
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        for (title, unit, curves), ax in zip(panels, axes.flat, strict=False):
            _curve_panel(ax, title, unit, curves)
        return _save(figure, path)


def errors_by_element(metrics: Mapping[str, Mapping[str, Any]], path: str | Path) -> Path:
    """The file written: root mean square force errors on each element, a group of bars for each.

    ``metrics`` are those of evaluations, by data set. Raises ``ValueError`` when none has forces.
    """
    errors = {
        where: found[BY_ELEMENT]
        for where, found in metrics.items()
        if found.get("num_force_components")
    }
    if not errors:
        raise ValueError("None of the evaluations has forces, so there are no errors by element.")
    elements = sorted(
        {e for found in errors.values() for e in found}, key=lambda element: atomic_numbers[element]
    )
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure = _figure(max(4.2, 1.2 + 0.25 * len(elements) * (len(errors) + 1)), 2.9)
        ax = figure.subplots()
        width = 0.8 / len(errors)
        for i, (where, found) in enumerate(errors.items()):
            places = np.arange(len(elements)) + (i - (len(errors) - 1) / 2) * width
            heights = [found.get(element, 0.0) for element in elements]
            ax.bar(places, heights, 0.92 * width, label=where, color=_SERIES[i % len(_SERIES)])
        ax.set_xticks(range(len(elements)), elements)
        ax.set_ylabel("force RMSE [meV/Å]")
        ax.grid(axis="x", visible=False)
        figure.legend(loc="outside upper left", ncols=4, fontsize=8)
        return _save(figure, path)


BY_ELEMENT = "forces_rmse_meV_per_A_by_element"
_COUNTS = {
    "energy_per_atom": "num_energies",
    "forces": "num_force_components",
    "stress": "num_stress_components",
}
# Attribute of an evaluation, title, unit of the axes, and the metric's key and unit.
_PARITY = (
    ("energy_per_atom", "Energy per atom", "eV/atom", ("energy_{}_meV_per_atom", "meV/atom")),
    ("forces", "Force components", "eV/Å", ("forces_{}_meV_per_A", "meV/Å")),
    ("stress", "Stress components", "eV/Å³", ("stress_{}_meV_per_A3", "meV/Å³")),
)
# Title, unit, and the rows' keys by label.
_CURVES = (
    ("Training loss", "", (("training", "train_loss"),)),
    (
        "Energy RMSE",
        "meV/atom",
        (
            ("training", "train_energy_rmse_meV_per_atom"),
            ("validation", "valid_energy_rmse_meV_per_atom"),
        ),
    ),
    (
        "Force RMSE",
        "meV/Å",
        (
            ("training", "train_forces_rmse_meV_per_A"),
            ("validation", "valid_forces_rmse_meV_per_A"),
        ),
    ),
    (
        "Stress RMSE",
        "meV/Å³",
        (
            ("training", "train_stress_rmse_meV_per_A3"),
            ("validation", "valid_stress_rmse_meV_per_A3"),
        ),
    ),
    ("Learning rate", "", (("", "learning_rate"),)),
)


def throughput_plot(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Structures per second against batch size, a line for each way to share and to read it.

    Above it how much of the devices' time passes between steps. ``rows`` are those of
    :class:`equizoo.train.benchmark.Row`.
    """
    import matplotlib

    curves: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        parts = f"{row['microbatches']} microbatches on {row['devices']} devices, "
        reading = f"reading processes: {row['workers']}" if row["workers"] else "reading threads"
        curves.setdefault((parts if row["microbatches"] > 1 else "") + reading, []).append(row)
    with matplotlib.rc_context(_STYLE):
        figure = _figure(5.2, 4.6)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
        for color, (label, points) in zip(itertools.cycle(_SERIES), curves.items(), strict=False):
            points = sorted(points, key=lambda row: row["batch_size"])
            sizes = [row["batch_size"] for row in points]
            style = dict(color=color, marker="o", markersize=4, linewidth=1.2, label=label)
            below.plot(sizes, [row["structures_per_s"] for row in points], **style)
            above.plot(sizes, [100 * row["idle_share"] for row in points], **style)
        above.set_ylabel("device idle [%]")
        above.set_ylim(bottom=0)
        below.set_ylabel("structures per second")
        below.set_ylim(bottom=0)
        below.set_xticks(sorted({row["batch_size"] for row in rows}))
        below.set_xlabel("batch size")
        below.legend(fontsize=7)
        above.set_title(f"{rows[0]['recipe']}, {rows[0]['device']}, {rows[0]['cores']} cores")
        return _save(figure, path)


def _parity_panel(
    figure: Any, ax: Any, evaluation: Evaluation, kind: str, title: str, unit: str, error: tuple
) -> None:
    points = getattr(evaluation, kind)
    if not len(points):
        ax.set_axis_off()
        return
    key, error_unit = error
    errors = ((name, evaluation.metrics[key.format(name.lower())]) for name in ("MAE", "RMSE"))
    total = evaluation.metrics.get(_COUNTS[kind], len(points))
    shown = f", {len(points):,} of {total:,}" if total > len(points) else ""
    ax.set_title(f"{title}{shown}")
    _draw_parity(figure, ax, points, unit)
    _note(ax, "\n".join(f"{name} {_digits(value)} {error_unit}" for name, value in errors))


def _draw_parity(figure: Any, ax: Any, points: Float[np.ndarray, "points 2"], unit: str) -> None:
    reference, predicted = points.T
    low, high = points.min(), points.max()
    # Total energies of thousands of eV vary by less than one: ticks are readable around zero.
    middle = round(float(reference.mean()), 2)
    shift = middle if abs(middle) > 20 * (high - low) else 0.0
    reference, predicted, low, high = (x - shift for x in (reference, predicted, low, high))
    margin = 0.05 * (high - low) or 0.1
    limits = low - margin, high + margin
    if len(points) > _MANY:
        cells = ax.hexbin(
            reference, predicted, gridsize=60, extent=2 * limits, bins="log", cmap="cividis",
            mincnt=1, linewidths=0.1,
        )  # fmt: skip
        bar = figure.colorbar(cells, ax=ax, shrink=0.7, pad=0.02, aspect=25)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7)
        bar.set_label("count", fontsize=8)
    else:
        size, alpha = (14, 0.8) if len(points) < 200 else (6, 0.5)
        ax.scatter(reference, predicted, s=size, color=BLUE, alpha=alpha, linewidths=0)
    ax.plot(limits, limits, color=GREY, linewidth=0.9, zorder=0.5 if len(points) <= _MANY else 3)
    ax.set(xlim=limits, ylim=limits, aspect="equal")
    ax.locator_params(nbins=5)
    ax.set_yticks([t for t in ax.get_xticks() if limits[0] <= t <= limits[1]])
    ax.set_xticks(ax.get_yticks())
    offset = f" {'+' if shift < 0 else '−'} {abs(shift):.2f}" if shift else ""
    ax.set_xlabel(f"reference{offset} [{unit}]")
    ax.set_ylabel(f"predicted{offset} [{unit}]")


def _curve_panel(ax: Any, title: str, unit: str, curves: Mapping[str, tuple[list, list]]) -> None:
    colors = {"training": GREY, "validation": VERMILION, "": BLUE}
    for label, (epochs, values) in curves.items():
        if not epochs:
            continue
        ax.plot(epochs, values, color=colors[label], linewidth=1.4, label=label or None)
        if len(epochs) == 1:
            ax.plot(epochs, values, "o", color=colors[label], markersize=4)
        if label == "validation":
            best = int(np.argmin(values))
            ax.plot(epochs[best], values[best], "o", color=colors[label], markersize=4)
            _note(ax, f"best {_digits(values[best])} {unit}, epoch {epochs[best]:g}", right=True)
    ax.set_yscale("log")
    ax.set_title(title, loc="left")
    ax.set_xlabel("epoch")
    ax.set_ylabel(unit)
    if len(curves) > 1:
        ax.legend(loc="lower left", fontsize=8)


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of the rows that have a positive finite value: what a log axis can show."""
    pairs = [
        (float(row["epoch"]), float(row[key]))
        for row in records
        if row.get(key) is not None and math.isfinite(row[key]) and row[key] > 0
    ]
    return [epoch for epoch, _ in pairs], [value for _, value in pairs]


def _digits(value: float) -> str:
    """Three digits, without an exponent for large numbers."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _note(ax: Any, text: str, right: bool = False) -> None:
    x, side = (0.97, "right") if right else (0.04, "left")
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
    ax.text(x, 0.96, text, transform=ax.transAxes, ha=side, va="top", fontsize=8, bbox=box)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    # Not pyplot: no window system, no global list of figures.
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: str | Path) -> Path:
    """Written beside and renamed, so that no reader sees half a file."""
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        figure.savefig(partial, format=path.suffix.removeprefix(".") or "png")
    return path
