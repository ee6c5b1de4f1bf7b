"""Prints those of the XLA flags given that the installed jaxlib knows: others end its process."""

import os
import subprocess
import sys


def is_known(flag: str) -> bool:
    start = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
    return subprocess.run(start, env=environment, capture_output=True).returncode == 0


if __name__ == "__main__":
    print(*filter(is_known, sys.argv[1:]))
