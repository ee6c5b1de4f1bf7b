"""A worker of ``mace_peers.py``: one library, one case, one measurement at a time on request.

Needs nothing of equizoo, and no library before :func:`serve` has fixed the number of threads. One
JSON line on standard input is a request, one on standard output its answer; what libraries print
goes to standard error.
"""

import contextlib
import ctypes
import gc
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

WEIGHTS = "weights"  # folder in the case's scratch folder: a dump of mace-torch's model


class Prepared(NamedTuple):
    """A case of one library, compiled and warm."""

    run: Callable[[], Any]  # one evaluation or one training step; returns when it is done
    compile_s: float | None  # until the program is there; None: nothing is compiled
    parameters: int
    energies: list[float]  # [eV] of every structure
    forces: list[list[float]]  # [eV/Å] of all atoms
    loss: float | None = None  # of the first training step
    bytes: int | None = None  # temporaries of the program, where the compiler says


def serve(
    prepare: Callable[[dict[str, Any], str], Prepared],
    imports: Callable[[], None],
    distributions: tuple[str, ...],
) -> None:
    """Answers requests until standard input ends.

    Arguments of the process: the file of the case, the variant of the library, threads.
    """
    file, variant, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if hasattr(os, "sched_setaffinity"):  # JAX starts as many threads as there are cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    imports()
    imported = _memory_mb("VmRSS")
    prepared = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "prepare":
            prepared = prepare(json.loads(Path(file).read_text("utf-8")), variant)
            answer = prepared._asdict()
            del answer["run"]
            answer["imported_mb"] = imported
            answer["python"] = platform.python_version()
            answer["versions"] = " ".join(f"{name} {version(name)}" for name in distributions)
        elif request["do"] == "measure":
            assert prepared is not None
            prepared.run()  # others have used the caches since
            answer = {"ms": [_milliseconds(prepared.run) for _ in range(request["calls"])]}
        else:
            assert prepared is not None
            answer = {"peak_mb": _peak_mb(prepared.run)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def training(case: dict[str, Any]) -> dict[str, float]:
    """The settings of a training step: the same for all."""
    return {"energy": 1.0, "forces": 10.0, "rate": 0.01, "clip": 10.0, "ema": 0.99, "decay": 5e-7}


def _milliseconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _peak_mb(run: Callable[[], Any]) -> float:
    """The most memory resident during a call; since the start where the system cannot forget.

    What is free already, such as a compiler's memory, is given back to the system first.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # only on Linux
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    run()
    return _memory_mb("VmHWM")


def _memory_mb(field: str) -> float:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text("utf-8").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
