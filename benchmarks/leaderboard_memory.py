"""Does the memory of a run for a leaderboard grow with the data?

    python benchmarks/leaderboard_memory.py --out results/leaderboard_memory.csv

Runs `equizoo leaderboard oc20-s2ef` on the real frames of `oc20_relax/s2ef_val` (found by
EQUIZOO_DATA), arranged as four splits, once as they are and once ten times over under other frame
numbers, each in a process of its own, with a small MACE of random weights. A row: frames, atoms,
parts, size of the file, seconds, and the largest resident size that the process ever had.
"""

import csv
import json
import lzma
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import tyro
from _peak_memory import peak_of
from flax import nnx

from equizoo.data.catalyst import open_catalyst
from equizoo.data.datasets import DATASETS, find_file
from equizoo.eval.benchmark_timing import environment
from equizoo.eval.leaderboard_tasks import TASKS
from equizoo.eval.potential import Potential
from equizoo.structure import EnergyReference
from equizoo.zoo.mace import MACEConfig

TASK = TASKS["oc20-s2ef"]
IN_FILE = 250  # frames; the archives have up to 5000


def sample() -> tuple[list[str], list[str]]:
    """Texts of the real frames, and the lines that name them."""
    path = find_file(DATASETS["oc20_relax/s2ef_val"])
    with lzma.open(path, "rt", encoding="utf-8") as file:
        texts = ["".join([n, *(next(file) for _ in range(1 + int(n)))]) for n in file]
    with lzma.open(path.with_name("0.txt.xz"), "rt", encoding="utf-8") as file:
        return texts, file.readlines()


def arrange(folder: Path, texts: list[str], lines: list[str], copies: int) -> dict[str, int]:
    """Splits of equal size in the layout of the archives; the number of frames of each."""
    count = len(texts) // len(TASK.splits)
    for number, split in enumerate(TASK.splits):
        (folder / f"test_{split}").mkdir(parents=True)
        some = range(number * count, (number + 1) * count)
        frames = [(texts[i], renamed(lines[i], copy)) for copy in range(copies) for i in some]
        for file, start in enumerate(range(0, len(frames), IN_FILE)):
            columns = zip(*frames[start : start + IN_FILE], strict=True)
            for name, column in zip(("extxyz", "txt"), columns, strict=True):
                path = folder / f"test_{split}" / f"{file}.{name}.xz"
                path.write_bytes(lzma.compress("".join(column).encode(), preset=1))
    return dict.fromkeys(TASK.splits, count * copies)


def renamed(line: str, copy: int) -> str:
    """The same frame of the same system under a number that only this copy has."""
    return re.sub(r"frame(\d+)", lambda found: f"frame{int(found[1]) + 10_000 * copy}", line)


def save_small_model(folder: Path, data: Path) -> None:
    """Random weights for the elements of the data."""
    elements: set[int] = set()
    for split in TASK.splits:
        for frame in open_catalyst(data / f"test_{split}"):
            elements.update(np.unique(frame.structure.atomic_numbers).tolist())
    config = MACEConfig(
        atomic_numbers=tuple(sorted(elements)),
        cutoff=4.0,
        avg_num_neighbors=20.0,
        channels=8,
        hidden_l_max=1,
        l_max=2,
        correlation=2,
    )
    Potential(
        config.build(rngs=nnx.Rngs(0)),
        reference_energies=dict.fromkeys(config.atomic_numbers, 0.0),
        energy_reference=EnergyReference.ADSORPTION,
        level_of_theory="none",
    ).save(folder)


def main(
    out: Path, copies: tuple[int, ...] = (1, 10), part_size: int = 32, batch_nodes: int = 512
) -> None:
    """Measures memory at each number of copies; adds rows to OUT.

    Args:
        out: CSV file.
        copies: of the sample, one run each.
        part_size: systems in a part; small, so that even the sample has several.
        batch_nodes: atoms in a batch.
    """
    texts, lines = sample()
    used = len(TASK.splits) * (len(texts) // len(TASK.splits))
    atoms = sum(int(text.split("\n", 1)[0]) for text in texts[:used])
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = {number: folder / f"data{number}" for number in copies}
        counts = {number: arrange(data[number], texts, lines, number) for number in copies}
        save_small_model(folder / "model", data[copies[0]])

        def run(number: int, file: Path) -> float:
            (folder / "counts.json").write_text(json.dumps(counts[number]))
            arguments = ["leaderboard", TASK.name, str(folder / "model"), str(data[number])]
            arguments += ["--out", str(file), "--counts", str(folder / "counts.json")]
            arguments += ["--part-size", str(part_size), "--batch-nodes", str(batch_nodes)]
            return peak_of(arguments, folder / "status")

        run(copies[0], folder / "first.npz")  # compiles, so that no run below has to
        for number in copies:
            file = folder / f"{number}.npz"
            begin = time.perf_counter()
            peak = run(number, file)
            seconds = time.perf_counter() - begin
            parts = list(file.with_name(f"{file.name}.parts").rglob("[0-9]*.npz"))
            row = {
                "copies": number,
                "frames": sum(counts[number].values()),
                "atoms": number * atoms,
                "parts": len(parts),
                "part_size": part_size,
                "batch_nodes": batch_nodes,
                "file_MB": round(file.stat().st_size / 1e6, 2),
                "seconds": round(seconds, 1),
                "peak_resident_MB": round(peak, 1),
            }
            rows.append(row | environment()._asdict())
            print(row, flush=True)
    new = not out.exists()
    with open(out, "a", newline="", encoding="utf-8") as file_of_rows:
        writer = csv.DictWriter(file_of_rows, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    tyro.cli(main)
