"""Compiled programs and their times: compilation apart, every call awaited, programs in turns."""

import contextlib
import csv
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from equizoo import __version__
from equizoo.device import device_name


class Program(NamedTuple):
    """A compiled function together with its arguments."""

    run: Callable[[], Any]  # one call, returns when the result is there
    compile_s: float  # tracing, lowering and compiling
    bytes: int  # arguments and results: what must be moved at least
    memory: int  # [bytes] those and the temporaries
    flops: float | None  # as XLA counts them; None if it does not


class Timing(NamedTuple):
    """Times of several calls [ms]."""

    median_ms: float
    min_ms: float
    repeats: int


class Environment(NamedTuple):
    """Where and with what something was timed."""

    device: str
    cores: int  # that this process may use
    precision: str  # of matrix products
    python: str
    jax: str
    jaxlib: str
    equizoo: str
    commit: str  # "" outside a checkout, ends in "-dirty" if files differ from it


@contextlib.contextmanager
def numerics(dtype: str) -> Iterator[None]:
    """JAX as a stranger has it, but with x64 as ``dtype`` needs it and full matrix products."""
    with (
        jax.enable_x64(dtype == "float64"),
        jax.default_matmul_precision("highest"),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def compile_program(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    constants: Sequence[Any] = (),
    backward: bool = False,
) -> Program:
    """``function(*arguments, *constants)``, compiled.

    With ``backward`` its result together with the vector-Jacobian product for all of
    ``arguments``. The cotangent is one more argument, as in a model, where it comes from what
    follows: if it were computed from the result, a compiler could evaluate the function again
    inside every derivative.
    """

    def with_derivatives(cotangent, *values):
        chosen, rest = values[: len(arguments)], values[len(arguments) :]
        result, pull = jax.vjp(lambda *chosen: function(*chosen, *rest), *chosen)
        return result, pull(cotangent)

    called = function
    values = jax.tree.map(jnp.asarray, (*arguments, *constants))
    if backward:
        called = with_derivatives
        shapes = jax.eval_shape(function, *values)
        values = (jax.tree.map(_cotangent, shapes), *values)
    start = time.perf_counter()
    lowered = jax.jit(lambda *values: called(*values)).lower(*values)
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    floor = sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((values, lowered.out_info))
    )
    memory = compiled.memory_analysis()
    temporary = memory.temp_size_in_bytes if memory else 0  # not every backend says
    costs = compiled.cost_analysis() or {}
    return Program(
        run=lambda: jax.block_until_ready(compiled(*values)),
        compile_s=seconds,
        bytes=floor,
        memory=floor + temporary,
        flops=costs.get("flops"),
    )


def _cotangent(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape.shape), shape.dtype)


def time_in_turns(
    programs: Sequence[Callable[[], Any]],
    seconds: float = 1.0,
    repeats: tuple[int, int] = (10, 100),
) -> list[Timing]:
    """Times of programs that take turns, so that all meet the same state of the machine.

    Each is called once to warm up, then as often as all together take about ``seconds`` times
    their number, within ``repeats``.
    """
    for run in programs:
        run()
    start = time.perf_counter()
    first = [_seconds(run) for run in programs]
    each_round = (time.perf_counter() - start) / max(len(programs), 1)
    rounds = min(max(math.ceil(seconds / max(each_round, 1e-9)), repeats[0]), repeats[1])
    times = np.array([first] + [[_seconds(run) for run in programs] for _ in range(rounds - 1)])
    return [Timing(1e3 * float(np.median(t)), 1e3 * float(t.min()), rounds) for t in times.T]


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def environment() -> Environment:
    """Of this process; matrix products are those of :func:`numerics`."""
    affinity = getattr(os, "sched_getaffinity", None)  # only on Linux
    return Environment(
        device=device_name(),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        precision="highest",
        python=platform.python_version(),
        jax=jax.__version__,
        jaxlib=installed_version("jaxlib"),
        equizoo=__version__,
        commit=_commit(Path(__file__).parents[2]),
    )


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], **facts: Any) -> None:
    """Writes rows as CSV, each with the :func:`environment` and ``facts``; blank what it lacks."""
    common = environment()._asdict() | facts
    columns = dict.fromkeys(key for row in rows for key in row)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *common], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **common} for row in rows)


def installed_version(distribution: str) -> str:
    """The version of an installed distribution, or nothing."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _commit(folder: Path) -> str:
    """The commit of a checkout; nothing is locked or written."""
    if not (folder / ".git").exists():
        return ""
    command = ["git", "--no-optional-locks", "-C", str(folder), "describe"]
    options = ["--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError):
        found = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        return found.stdout.strip()
    return ""
