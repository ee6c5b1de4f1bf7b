"""How fast is our MACE beside mace-torch and InstaDeep's mlip, and does it say the same?

Energy and forces of 216 silicon atoms (28 neighbours each) and of thirty-two molecules, and a
training step on five: the same structures, hyper-parameters, float32 and number of threads for
all. Every library runs in a process of its own environment that stays alive; they take turns, one
measurement at a time, so that all meet the same state of the machine and only one computes. What is
timed is the evaluation of a batch (mlip and ours: of the compiled program), neighbour lists apart.
Our model has the weights of mace-torch's, so its row has the difference of energies and forces
(of a training step: of the first loss).

Rows by library and variant: ``mace-torch:reduced`` has the smaller basis of couplings
(``use_reduced_cg``); ``equizoo:system-malloc`` leaves freed memory to the C library's defaults,
which ``equizoo.load`` does not (``host_memory.py``); ``equizoo:native`` has its sums over
neighbours in machine code (``Potential.with_kernels``), and so has ``equizoo:compiled``, the
inference form (``Potential.compile``), which is not for training. ``peak_mb`` is what the process
holds at most during a call after the first, ``imported_mb`` what it held before it had a model.

Writes ``results/mace_peers.csv``. On an idle machine, with ``3bpa`` at hand (``EQUIZOO_DATA``):

    python benchmarks/mace_peers.py --torch-python MACE/bin/python --mlip-python MLIP/bin/python

or with EQUIZOO_TORCH_PYTHON and EQUIZOO_MLIP_PYTHON. The environments need mace-torch and
safetensors, and mlip. Without one of them its rows say so.
"""

import argparse
import csv
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import ase.build
import numpy as np

from equizoo.data.datasets import load_dataset
from equizoo.device import device_name
from equizoo.eval.benchmark_timing import environment
from equizoo.neighbors import neighbor_list

HERE = Path(__file__).parent
CUTOFF = 5.0  # [Å] 28 neighbours in silicon: shells at 2.35, 3.84 and 4.50, the next at 5.43
WORKERS = {
    "equizoo": "_mace_peer_equizoo.py",
    "mace-torch": "_mace_peer_torch.py",
    "mlip": "_mace_peer_mlip.py",
}
LIBRARIES = (
    "mace-torch",
    "mace-torch:reduced",
    "mlip",
    "equizoo",
    "equizoo:native",
    "equizoo:compiled",
    "equizoo:system-malloc",
)
NOT_TRAINED = "equizoo:compiled"
SAME = 1e-4  # relative: more than rounding in float32, and the two models are not the same


@dataclasses.dataclass(frozen=True)
class Case:
    """What is computed."""

    name: str
    structures: Callable[[], list[dict[str, Any]]]
    channels: int
    hidden_l_max: int
    train: bool = False


@dataclasses.dataclass
class Row:
    """One library in one case; blank where it does not apply."""

    case: str
    library: str
    task: str
    channels: int
    hidden_l_max: int
    structures: int
    atoms: int
    neighbours: float  # mean
    median_ms: float | None = None
    min_ms: float | None = None
    ms_per_atom: float | None = None
    times_ours: float | None = None  # median over that of equizoo
    repeats: int | None = None
    compile_s: float | None = None
    imported_mb: float | None = None
    peak_mb: float | None = None
    program_mb: float | None = None  # temporaries, as the compiler states them
    parameters: int | None = None
    energy_error_eV_per_atom: float | None = None  # largest, against mace-torch with our weights
    forces_error_eV_per_A: float | None = None
    forces_max_eV_per_A: float | None = None  # to compare that with
    loss_error: float | None = None  # relative
    dtype: str = "float32"
    threads: int | None = None
    device: str = ""
    python: str = ""
    versions: str = ""
    commit: str = ""
    malloc: str = ""  # GLIBC_TUNABLES, the same for all
    skipped: str = ""


def silicon() -> list[dict[str, Any]]:
    """3 x 3 x 3 cells of diamond, displaced by 0.05 Å."""
    atoms = ase.build.bulk("Si", "diamond", a=5.43, cubic=True).repeat(3)
    atoms.rattle(0.05, seed=0)
    return [_plain(atoms.numbers, atoms.positions, np.array(atoms.cell), (True,) * 3)]


def molecules(count: int, labels: bool) -> list[dict[str, Any]]:
    """Frames of 3BPA, 27 atoms each; energies without those of isolated atoms."""
    dataset = load_dataset("3bpa/train_300K")
    isolated = dataset.isolated_atoms
    chosen = []
    for s in dataset.structures[:count]:
        plain = _plain(s.atomic_numbers, s.positions, np.zeros((3, 3)), (False,) * 3)
        if labels:
            assert s.energy is not None and s.forces is not None and isolated is not None
            plain["energy"] = s.energy - sum(isolated[int(z)] for z in s.atomic_numbers)
            plain["forces"] = s.forces.tolist()
        chosen.append(plain)
    return chosen


def _plain(numbers, positions, cell, pbc) -> dict[str, Any]:
    return {
        "numbers": [int(z) for z in numbers],
        "positions": positions.tolist(),
        "cell": cell.tolist(),
        "pbc": list(pbc),
        "energy": None,
        "forces": None,
    }


CASES = (
    Case("silicon-216-64x1", silicon, channels=64, hidden_l_max=1),
    Case("silicon-216-128x2", silicon, channels=128, hidden_l_max=2),
    Case("3bpa-32-64x1", lambda: molecules(32, labels=False), channels=64, hidden_l_max=1),
    Case("3bpa-5-64x1-step", lambda: molecules(5, labels=True), 64, 1, train=True),
)


class Worker:
    """A process of one library; asked one thing at a time."""

    def __init__(self, library: str, python: str, file: Path, threads: int):
        self.library = library
        name, _, variant = library.partition(":")
        command = [python, str(HERE / WORKERS[name]), str(file), variant or "default", str(threads)]
        unwanted = ("JAX_COMPILATION_CACHE_DIR", "PYTHONPATH")  # of this process, not of others
        env = {key: value for key, value in os.environ.items() if key not in unwanted}
        env |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
        if name == "equizoo":
            env["PYTHONPATH"] = str(HERE.parent)
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env=env,
            text=True, encoding="utf-8",
        )  # fmt: skip

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer; ``RuntimeError`` with the last line that the process wrote if it failed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.errors.seek(0)
            lines = self.errors.read().strip().splitlines() or ["no message"]
            raise RuntimeError(f"{self.library} failed: {lines[-1]}")
        return json.loads(line)

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


def run_case(
    case: Case, libraries: Sequence[str], pythons: dict[str, str], options: argparse.Namespace
) -> list[Row]:
    """The rows of a case."""
    structures = case.structures()
    atoms = sum(len(s["numbers"]) for s in structures)
    neighbours = _num_neighbours(structures) / atoms
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "case.json"
        description = {
            "channels": case.channels,
            "hidden_l_max": case.hidden_l_max,
            "l_max": 3,
            "correlation": 3,
            "cutoff": CUTOFF,
            "avg_num_neighbors": neighbours,
            "atomic_numbers": sorted({z for s in structures for z in s["numbers"]}),
            "train": case.train,
            "structures": structures,
            "scratch": scratch,
        }
        file.write_text(json.dumps(description), "utf-8")
        rows = {
            library: Row(
                case=case.name,
                library=library,
                task="training step" if case.train else "energy and forces",
                channels=case.channels,
                hidden_l_max=case.hidden_l_max,
                structures=len(structures),
                atoms=atoms,
                neighbours=round(neighbours, 2),
                threads=options.threads,
                device=device_name(),
                commit=environment().commit,
                malloc=os.environ.get("GLIBC_TUNABLES", ""),
            )
            for library in libraries
            if not (case.train and library == NOT_TRAINED)
        }
        _measure(case, rows, pythons, file, options)
    return list(rows.values())


def _measure(
    case: Case,
    rows: dict[str, Row],
    pythons: dict[str, str],
    file: Path,
    options: argparse.Namespace,
) -> None:
    workers: dict[str, Worker] = {}
    answers: dict[str, dict[str, Any]] = {}
    try:
        for library, row in rows.items():
            python = pythons.get(library.partition(":")[0])
            if python is None:
                row.skipped = "no environment given"
                continue
            worker = Worker(library, python, file, options.threads)
            try:
                answers[library] = worker.ask(do="prepare")
                workers[library] = worker
            except (RuntimeError, OSError) as error:
                row.skipped = str(error)
                worker.stop()
        times: dict[str, list[float]] = {library: [] for library in workers}
        for _ in range(options.rounds):
            for library, worker in workers.items():
                times[library] += worker.ask(do="measure", calls=options.calls)["ms"]
        for library, worker in workers.items():
            rows[library].peak_mb = worker.ask(do="memory")["peak_mb"]
    finally:
        for worker in workers.values():
            worker.stop()
    for library, found in times.items():
        _fill(rows[library], answers[library], found)
    if "equizoo" in times:
        for library in times:
            rows[library].times_ours = median(times[library]) / median(times["equizoo"])
    for library in rows:
        if library.startswith("equizoo") and library in answers and "mace-torch" in answers:
            _compare(rows[library], answers[library], answers["mace-torch"])


def _fill(row: Row, answer: dict[str, Any], times: list[float]) -> None:
    row.median_ms, row.min_ms, row.repeats = median(times), min(times), len(times)
    row.ms_per_atom = row.median_ms / row.atoms
    row.compile_s, row.imported_mb = answer["compile_s"], answer["imported_mb"]
    row.program_mb = None if answer["bytes"] is None else answer["bytes"] / 2**20
    row.parameters, row.python = answer["parameters"], answer["python"]
    row.versions = answer["versions"]


def _compare(row: Row, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    energies = np.array(ours["energies"]) - np.array(theirs["energies"])
    forces = np.array(ours["forces"]) - np.array(theirs["forces"])
    row.energy_error_eV_per_atom = float(np.abs(energies).max()) * row.structures / row.atoms
    row.forces_error_eV_per_A = float(np.abs(forces).max())
    row.forces_max_eV_per_A = float(np.abs(theirs["forces"]).max())
    if row.forces_error_eV_per_A > SAME * row.forces_max_eV_per_A:
        row.skipped = "not the same model: forces differ by more than rounding"
    if ours["loss"] is not None:
        row.loss_error = abs(ours["loss"] / theirs["loss"] - 1)


def _num_neighbours(structures: Sequence[dict[str, Any]]) -> int:
    return sum(
        len(
            neighbor_list(
                np.array(s["positions"]), np.array(s["cell"]), tuple(s["pbc"]), CUTOFF
            ).senders
        )
        for s in structures
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "mace_peers.csv")
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES))
    parser.add_argument("--rounds", type=int, default=15, help="turns of every library")
    parser.add_argument("--calls", type=int, default=3, help="timed calls in a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--torch-python", default=os.environ.get("EQUIZOO_TORCH_PYTHON"))
    parser.add_argument("--mlip-python", default=os.environ.get("EQUIZOO_MLIP_PYTHON"))
    options = parser.parse_args()
    given = {"mace-torch": options.torch_python, "mlip": options.mlip_python}
    pythons = {name: python for name, python in given.items() if python}
    pythons["equizoo"] = sys.executable
    # the model of mace-torch first: its weights become ours
    libraries = sorted(options.libraries, key=lambda name: not name.startswith("mace-torch"))
    rows: list[Row] = []
    for case in (case for case in CASES if case.name in options.cases):
        for row in run_case(case, libraries, pythons, options):
            rows.append(row)
            time = row.skipped if row.median_ms is None else f"{row.median_ms:.1f} ms"
            ratio = "" if row.times_ours is None else f", {row.times_ours:.2f} times ours"
            print(f"{row.case}, {row.library}: {time}{ratio}", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
            writer.writeheader()
            writer.writerows(dataclasses.asdict(row) for row in rows)


if __name__ == "__main__":
    main()
