"""Several processes that train one model: their places, what they agree on, who writes.

Every process runs the same program on its own devices and reads its own part of the data. A single
process is the first of one; then nothing here communicates.
"""

import contextlib
import functools
import json
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

P = ParamSpec("P")
T = TypeVar("T")

_PLACE = re.compile(r"(?P<index>\d+)/(?P<number>\d+)@(?P<address>\S+:\d+)")


def join(place: str) -> None:
    """Joins the other processes, before anything else is done with JAX.

    ``place`` is ``auto``, for what SLURM, Open MPI, Kubernetes or a TPU pod says, or
    ``INDEX/NUMBER@ADDRESS:PORT``, the last two of the process with index 0. Raises ``ValueError``
    for another form.
    """
    if place == "auto":
        jax.distributed.initialize()
        return
    found = _PLACE.fullmatch(place)
    if found is None or int(found["index"]) >= int(found["number"]):
        raise ValueError(
            f"{place!r} is no place among processes; expected auto, or INDEX/NUMBER@ADDRESS:PORT "
            "with INDEX from 0 to NUMBER - 1, such as 0/2@node1:1234."
        )
    jax.distributed.initialize(found["address"], int(found["number"]), int(found["index"]))


def is_first() -> bool:
    """Whether this process is the one that writes files and talks."""
    return jax.process_index() == 0


def gathered(value: Any) -> list[Any]:
    """What each process gave, in their order; values must be representable in JSON."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.array([len(data)], np.int32)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def on_first(action: Callable[[], Any]) -> None:
    """Does it on the first process alone; the others wait, and raise ``ValueError`` if it fails."""
    problem: Exception | None = None
    if is_first():
        try:
            action()
        except Exception as error:  # whatever it is, the others must not wait for ever
            problem = error
    told = gathered("" if problem is None else f"{type(problem).__name__}: {problem}")[0]
    if problem is not None:
        raise problem
    if told:
        raise ValueError(f"The first process stopped: {told}")


class Termination:
    """Notes a SIGTERM instead of dying of it, so that the step in progress can be saved.

    A second one ends the process at once. Either is heard when a compilation in progress is over.
    Of several processes one may get it: all then stop after the same step.
    """

    def __enter__(self) -> "Termination":
        self.noted = False  # by this process, if it is alone
        self._alone = jax.process_count() == 1
        self._handling = _on_sigterm(self._note)
        self._handling.__enter__()
        return self

    def _note(self) -> None:
        if self.noted:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        self.noted = True

    def after(self, step: int) -> bool:
        """Whether to stop after this step; every process asks after every one."""
        return self.noted if self._alone else multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *error: Any) -> None:
        self._handling.__exit__(*error)


class _Stopped(BaseException):
    """No ``Exception``, so that nobody takes it for an error and goes on."""


def stoppable(function: Callable[P, T]) -> Callable[P, T | None]:
    """The function, with ``None`` for a result where SIGTERM comes before its end.

    It is left where it is, except within a :class:`Termination`: what it writes must be whole at
    any time. Of several processes, or in another thread than the main one, nothing is handled.
    """

    def stop() -> None:
        raise _Stopped

    @functools.wraps(function)
    def stopped_or_done(*args: P.args, **kwargs: P.kwargs) -> T | None:
        with contextlib.suppress(_Stopped), _on_sigterm(stop):
            return function(*args, **kwargs)
        return None

    return stopped_or_done


@contextlib.contextmanager
def _on_sigterm(action: Callable[[], None]) -> Iterator[None]:
    """Within it the signal has this effect, for a process alone, in its main thread."""
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
