"""Does memory grow with the data, when they are prepared and when a model trains on them?

    python benchmarks/streaming_memory.py --out benchmarks/results/streaming_memory.csv

The real frames of `3bpa/train_300K` (found by EQUIZOO_DATA), as often as asked for, each time with
other displacements of 0.01 Å so that no two are alike, in one file of extended XYZ. `equizoo
prepare` turns it into a folder. `equizoo train` takes some steps with a small MACE on frames from
all over that folder and, for comparison, on the file itself, which is read into memory. Each is a
process of its own. A row: frames, sizes on the disk, seconds, and the largest resident size that
the process ever had.
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import ase
import ase.io
import numpy as np
import tyro
from _peak_memory import peak_of

from equizoo.data.datasets import load_dataset
from equizoo.eval.benchmark_timing import write_table
from equizoo.structure import Structure

DATA = "3bpa/train_300K"
DISPLACEMENT = 0.01  # [Å]


def displaced(structures: Sequence[Structure], copies: int) -> Iterator[list[ase.Atoms]]:
    """The frames, each time with other displacements, and energies that follow the forces."""
    for copy in range(copies):
        rng = np.random.default_rng(copy)
        yield [moved(s, DISPLACEMENT * rng.standard_normal(s.positions.shape)) for s in structures]


def moved(structure: Structure, by: np.ndarray) -> ase.Atoms:
    """To first order, so that the doctor finds energies and forces that agree."""
    return dataclasses.replace(
        structure,
        positions=structure.positions + by,
        energy=structure.energy - float(np.sum(structure.forces * by)),
    ).to_atoms()


def recipe(data: Path, train_frames: int) -> dict[str, object]:
    """Some steps of a small model."""
    return {
        "name": "streaming",
        "model": {
            "architecture": "mace",
            "format": 1,
            "cutoff": 5.0,
            "channels": 8,
            "hidden_l_max": 1,
            "l_max": 2,
            "correlation": 2,
        },
        "data": {
            "train": str(data),
            "num_valid": 50,
            "num_train": train_frames,
            "reference_energies": {"name": "least_squares", "minimum_norm": True},
        },
        "training": {"epochs": 1, "batch_size": 5},
    }


def main(out: Path, copies: tuple[int, ...] = (2, 20, 100), train_frames: int = 500) -> None:
    """Measures memory at each number of copies; writes OUT.

    Args:
        out: CSV file.
        copies: of the 500 frames.
        train_frames: of all, at random, that are trained on in each run.
    """
    structures = load_dataset(DATA).structures
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = {number: folder / f"{number}.extxyz" for number in copies}
        prepared = {number: folder / f"{number}.prepared" for number in copies}
        for number, file in files.items():
            for some in displaced(structures, number):
                ase.io.write(file, some, format="extxyz", append=True)

        def train(data: Path) -> list[str]:
            described, run = folder / "recipe.json", folder / f"run{time.time_ns()}"
            described.write_text(json.dumps(recipe(data, train_frames)))
            return ["train", str(described), "--out", str(run)]

        def measure(command: str, number: int, arguments: list[str]) -> None:
            begin = time.perf_counter()
            peak = peak_of(arguments, folder / "status")
            parts = [part.stat().st_size for part in prepared[number].rglob("*")]
            row = {
                "command": command,
                "frames": number * len(structures),
                "file_MB": round(files[number].stat().st_size / 1e6, 1),
                "folder_MB": round(sum(parts) / 1e6, 1),
                "seconds": round(time.perf_counter() - begin, 1),
                "peak_resident_MB": round(peak, 1),
            }
            rows.append(row)
            write_table(out, rows)
            print(row, flush=True)

        for number in copies:
            measure(
                "prepare", number, ["prepare", str(files[number]), "--out", str(prepared[number])]
            )
        for command, data in {"train on the folder": prepared, "train on the file": files}.items():
            for number in copies:
                peak_of(train(data[number]), folder / "status")  # compiles, which takes most memory
                measure(command, number, train(data[number]))


if __name__ == "__main__":
    tyro.cli(main)
