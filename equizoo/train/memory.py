"""What a training step takes of the device's memory, before the first one runs."""

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax

from equizoo.train.config import WhenTooLarge
from equizoo.zoo._base import Remat

CONTROL_GROUPS = Path("/sys/fs/cgroup")
SHARE = 0.9  # of what is free, that a step may take


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Memory of one step, as the compiler states it, and of the device."""

    state: int  # [bytes] weights, their average, the optimizer: whatever the batch
    batch: int  # [bytes] the batch, and what its evaluation and derivatives hold
    free: int | None  # [bytes] on the device beside the state; None: unknown
    batch_size: int  # structures

    @property
    def fits(self) -> bool:
        """Whether there is room for the batch; true where nobody knows."""
        return self.free is None or self.batch <= SHARE * self.free

    @property
    def proposed(self) -> int:
        """A batch size that would fit, if memory grows in proportion to it; 0: none."""
        if self.free is None:
            return self.batch_size
        return min(self.batch_size, int(SHARE * self.free * self.batch_size / max(self.batch, 1)))

    def __str__(self) -> str:
        free = "an unknown amount" if self.free is None else f"{self.free / 1e9:.2f} GB"
        return (
            f"a training step with batch size {self.batch_size} takes {self.batch / 1e9:.2f} GB "
            f"beside {self.state / 1e9:.2f} GB of weights and optimizer; {free} is free"
        )


def forecast(compiled: Any, state: Any, batch_size: int) -> Forecast | None:
    """The forecast for a compiled step of ``state`` (on the device already); ``None`` where the
    backend does not say."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    total = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    batch = total - found.alias_size_in_bytes - held
    return Forecast(held, max(batch, 0), free_memory(), batch_size)


def require_fit(
    found: Forecast, policy: WhenTooLarge, remats: Collection[Remat] = (Remat.NONE,)
) -> None:
    """``ValueError`` (or a warning, as asked for) with what would help, where a step does not fit:
    a batch size, and those of ``remats`` that the model offers."""
    if found.fits:
        return
    advice = (
        f"batch_size={found.proposed} should fit"
        if found.proposed
        else "not even one structure would fit; choose a smaller model or smaller structures"
    )
    message = f"Out of memory ahead: {found}. {advice}"
    if Remat.LAYERS in remats:
        message += ", or recompute activations with remat=layers"
    message += "."
    if policy is WhenTooLarge.REFUSE:
        raise ValueError(message + " To try it all the same: when_too_large=warn.")
    warnings.warn(message, stacklevel=2)


def free_memory() -> int | None:
    """[bytes] that the first device can still give; of a CPU what the system says is available."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    rooms = [room() for room in (_available, _control_group)]
    return min((room for room in rooms if room is not None), default=None)


def _available() -> int | None:
    with contextlib.suppress(OSError):  # only on Linux
        for line in Path("/proc/meminfo").read_text("utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    names = getattr(os, "sysconf_names", {})
    if "SC_AVPHYS_PAGES" in names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _control_group() -> int | None:
    """What a container or a batch system leaves to this process; ``None``: no limit.

    Files that were read stay in memory while nobody needs it, and count as used there.
    """
    with contextlib.suppress(OSError, ValueError):
        group = Path("/proc/self/cgroup").read_text("utf-8").strip().rpartition(":")[2]
        folder = CONTROL_GROUPS / group.lstrip("/")
        limit, used = (
            int((folder / name).read_text("utf-8")) for name in ("memory.max", "memory.current")
        )
        rows = (line.split() for line in (folder / "memory.stat").read_text("utf-8").splitlines())
        reclaimable = sum(int(row[1]) for row in rows if row[0] == "inactive_file")
        return max(limit - used + reclaimable, 0)
    return None


def peak_memory() -> int | None:
    """[bytes] the most that the first device held so far; of a CPU the most of this process.
    ``None`` where nobody knows."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
