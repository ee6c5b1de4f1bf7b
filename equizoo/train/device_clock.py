"""How busy a run keeps its devices."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax


class DeviceClock:
    """Seconds of steps on the device, and between them.

    A step is noted before it is asked for; a thread waits for its end meanwhile, so that the host
    may do what it likes. What :meth:`pause` ends (validation, checkpoints) is counted as neither.
    """

    def __init__(self):
        self.busy, self.idle = 0.0, 0.0  # [s]
        self._watch = ThreadPoolExecutor(1, "device clock")
        self._running: tuple[float, Future[float]] | None = None

    def step(self, asked: float, result: Any) -> None:
        """``result`` was asked for at the time ``asked`` (of ``time.monotonic``)."""
        ended = self.pause()
        if ended is not None:
            self.idle += max(asked - ended, 0.0)
        self._running = asked, self._watch.submit(_end, result)

    def pause(self) -> float | None:
        """When the step that was noted last ended; waits for that, and forgets it."""
        if self._running is None:
            return None
        started, end = self._running
        self._running = None
        self.busy += end.result() - started
        return end.result()

    def row(self, structures: int) -> dict[str, float]:
        """Figures since the last call, in which so many structures were in steps; none of none."""
        self.pause()
        total = self.busy + self.idle
        if not total:
            return {}
        row = {"idle_share": self.idle / total, "structures_per_s": structures / total}
        self.busy, self.idle = 0.0, 0.0
        return row

    def close(self) -> None:
        self._watch.shutdown(wait=False)


def _end(result: Any) -> float:
    jax.block_until_ready(result)
    return time.monotonic()
