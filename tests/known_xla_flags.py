"""Prints those of the XLA flags given that the installed jaxlib knows: others end its process."""

import os
import subprocess
import sys


def is_known(flag: str) -> bool:
    start = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
    return subprocess.run(start, env=environment, capture_output=True).returncode == 0


if __name__ == "__main__":
    for flag in sys.argv[1:]:
        if is_known(flag):
            print(flag, end=" ")
        else:
            print(f"this jaxlib does not know {flag}: compiling takes longer", file=sys.stderr)
