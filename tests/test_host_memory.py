"""Freed memory is kept where the C library can do it, and only where nobody has decided."""

import os
import platform
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")

PROGRAM = """
import resource
from equizoo.host_memory import keep_freed_memory
print(keep_freed_memory())
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def touch(): bytearray(1 << 28)
touch()
before = faults()
for _ in range(5): touch()
print(faults() - before)
"""


def run(**settings):
    unset = ("GLIBC_TUNABLES", "EQUIZOO_MALLOC")
    env = {k: v for k, v in os.environ.items() if k not in unset and not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", PROGRAM]
    out = subprocess.run(command, env=env | settings, capture_output=True, text=True, check=True)
    used, faults = out.stdout.split()
    return used == "True", int(faults)


@glibc
def test_pages_are_touched_once():
    used, kept = run()
    assert used
    unused, given_back = run(EQUIZOO_MALLOC="system")
    assert not unused
    # five times 64k pages of 4 KB, or 128 of 2 MB where the system takes those for all
    assert 20 * max(kept, 1) < given_back


@glibc
@pytest.mark.parametrize("setting", ["GLIBC_TUNABLES", "MALLOC_ARENA_MAX"])
def test_settings_of_the_user_are_left_alone(setting):
    used, _ = run(**{setting: "glibc.malloc.tcache_count=7" if "TUN" in setting else "3"})
    assert not used


def test_loading_a_model_asks_for_it(monkeypatch):
    from equizoo.eval import potential

    asked = []
    monkeypatch.setattr(potential, "keep_freed_memory", lambda: asked.append(True))
    potential.load("mace-3bpa", check_golden=False)
    assert asked
