"""The most memory that a command ever had resident, in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

# what ends up in the first argument has the process's own high-water mark
_COMMAND = """
import pathlib, sys
from equizoo.cli import main
main(sys.argv[2:])
pathlib.Path(sys.argv[1]).write_text(pathlib.Path("/proc/self/status").read_text())
"""


def peak_of(arguments: list[str], note: Path) -> float:
    """[MB], of ``equizoo`` with these arguments; ``note`` is a file to write it to meanwhile."""
    subprocess.run([sys.executable, "-c", _COMMAND, str(note), *arguments], check=True)
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", note.read_text())
    return int(kilobytes) / 1024
