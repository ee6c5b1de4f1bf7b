"""Draws the two figures of docs/choosing-a-tensor-product.md from the results beside this file.

One shows what a sum over neighbours costs with each product, by degree; the other what MACE's error
is with each after the same number of epochs, against the time of a training step.
Run: ``python benchmarks/choosing.py``.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from equizoo.eval.benchmark import BACKWARD
from equizoo.eval.benchmark_peers import Comparison
from equizoo.eval.benchmark_plots import look_of
from equizoo.eval.plots import _STYLE, BLACK

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
PEER = "e3nn_jax"
_MARKS = (50, 100, 200, 400, 800)  # [ms]

Rows = Sequence[Mapping[str, str]]


def read(name: str) -> Rows:
    """The rows of a file of results."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def cost(rows: Rows, path: Path) -> None:
    """Time of ``convolve`` with derivatives against degree, a curve for each product."""
    rows = [
        row
        for row in rows
        if (row["mode"], row["direction"]) == (Comparison.CONVOLVE, BACKWARD) and row["median_ms"]
    ]
    figure, ax = plt.subplots(figsize=(7.6, 4), layout="constrained")
    for variant in sorted({row["variant"] for row in rows if row["library"] == "equizoo"}):
        mine = [row for row in rows if row["variant"] == variant]
        same_map = mine[0]["map"] == "clebsch_gordan"
        look = look_of(variant) | {"linestyle": "-" if same_map else ":"}
        ax.plot(*_curve(mine), label=variant, **look)
    peer = [row for row in rows if row["library"] == PEER]
    ax.plot(*_curve(peer), label=f"e3nn-jax: {peer[0]['variant']}", color=BLACK, linestyle="--")
    ax.set(yscale="log", xlabel="l_max", ylabel="ms", xticks=[1, 2, 3, 4])
    nodes, channels = peer[0]["nodes"], peer[0]["channels"]
    ax.set_title(
        f"Sum over neighbours with its derivatives: {nodes} atoms, {channels} channels\n"
        "solid and dashed: all couplings, a weight each; dotted: another family of maps",
        fontsize=9,
    )
    figure.legend(fontsize=7, loc="outside right center")
    figure.savefig(path)
    plt.close(figure)


def accuracy(rows: Rows, path: Path) -> None:
    """Force error of MACE after equal epochs against time of a training step."""
    figure, ax = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for row in rows:
        x, y = float(row["step_median_ms"]), float(row["test_300K_forces_rmse_meV_per_A"])
        ax.plot(x, y, **look_of(row["product"]) | {"linestyle": "", "markersize": 8})
        ax.annotate(row["product"], (x, y), xytext=(6, 5), textcoords="offset points", fontsize=8)
    ax.set(xscale="log", xlabel="training step [ms]", ylabel="force RMSE on test_300K [meV/Å]")
    ax.minorticks_off()
    ax.set_xticks(_MARKS, [str(mark) for mark in _MARKS])
    ax.set_title(f"MACE on 3BPA after {rows[0]['epochs']} epochs, one seed, by product")
    ax.margins(x=0.25, y=0.15)
    figure.savefig(path)
    plt.close(figure)


def _curve(rows: Rows) -> tuple[list[int], list[float]]:
    points = sorted((int(row["l_max"]), float(row["median_ms"])) for row in rows)
    return [l_max for l_max, _ in points], [time for _, time in points]


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with matplotlib.rc_context(_STYLE):
        cost(read("tensor_products_sidebyside.csv"), IMAGES / "products-cost.png")
        accuracy(read("mace_products.csv"), IMAGES / "products-accuracy.png")


if __name__ == "__main__":
    main()
