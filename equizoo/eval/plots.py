"""Plots for cards and runs: predictions against labels, and errors against epochs."""

import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from equizoo.eval.evaluate import Evaluation

# Okabe and Ito's palette, told apart with any kind of colour vision, https://jfly.uni-koeln.de/color/
BLUE, VERMILION, BLACK, GREY = "#0072B2", "#D55E00", "#000000", "#888888"
_MANY = 2000  # points from which density says more than dots
_STYLE = {
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
    ``ValueError`` when there is no evaluation.
    """
    if isinstance(evaluations, Evaluation):
        evaluations = [evaluations]
    if not evaluations:
        raise ValueError("A parity plot needs at least one evaluation; got none.")
    columns = [
        column
        for column in _PARITY
        if any(len(getattr(evaluation, column[0])) for evaluation in evaluations)
    ]
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure, axes = _grid(len(evaluations), len(columns), width=3.6, height=3.5)
        for evaluation, row in zip(evaluations, axes, strict=True):
            for (kind, title, unit, errors), ax in zip(columns, row, strict=True):
                points = getattr(evaluation, kind)
                if not len(points):
                    ax.set_axis_off()
                    continue
                _parity_panel(figure, ax, points, unit)
                lines = [
                    f"{name} {evaluation.metrics[key.format(name.lower())]:.3g} {text}"
                    for name in ("MAE", "RMSE")
                    for key, text in [errors]
                ]
                _note(ax, "\n".join(lines))
                ax.set_title(title)
        titles = [f"{e.model} on {e.dataset} ({e.dtype})" for e in evaluations]
        if len(titles) == 1:
            figure.suptitle(titles[0], fontsize=11, fontweight="bold")
        else:
            for title, row in zip(titles, axes, strict=True):
                row[0].set_title(title, loc="left", fontweight="bold", fontsize=9, pad=20)
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
        figure, axes = _grid(math.ceil(len(panels) / columns), columns, width=4.2, height=2.7)
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        for (title, unit, curves), ax in zip(panels, axes.flat, strict=False):
            _curve_panel(ax, title, unit, curves)
        return _save(figure, path)


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


def _parity_panel(figure: Any, ax: Any, points: np.ndarray, unit: str) -> None:
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
            _note(ax, f"best {values[best]:.3g} {unit}, epoch {epochs[best]:g}", right=True)
    ax.set_yscale("log")
    ax.set_title(title, loc="left")
    ax.set_xlabel("epoch")
    ax.set_ylabel(unit)
    if len(curves) > 1:
        ax.legend(loc="lower left", fontsize=8)


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of the rows that have a positive finite value: what a log axis can show."""
    pairs = [
        (row["epoch"], row[key])
        for row in records
        if row.get(key) is not None and math.isfinite(row[key]) and row[key] > 0
    ]
    return [epoch for epoch, _ in pairs], [value for _, value in pairs]


def _note(ax: Any, text: str, right: bool = False) -> None:
    x, side = (0.97, "right") if right else (0.04, "left")
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
    ax.text(x, 0.96, text, transform=ax.transAxes, ha=side, va="top", fontsize=8, bbox=box)


def _grid(rows: int, columns: int, *, width: float, height: float) -> tuple[Any, np.ndarray]:
    from matplotlib.figure import Figure

    # Not pyplot: no window system, no global list of figures.
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, path: str | Path) -> Path:
    """Written beside and renamed, so that no reader sees half a file."""
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        figure.savefig(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
