"""The name of what computes."""

import contextlib
import functools
import platform
from pathlib import Path

import jax


@functools.cache
def device_name() -> str:
    """The kind of JAX's first device; of a CPU its model."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    with contextlib.suppress(OSError):  # only on Linux
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
