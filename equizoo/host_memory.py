"""How the C library deals with the large arrays of a program that runs again and again."""

import contextlib
import ctypes
import functools
import os

# of mallopt(3), in glibc's malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_KEPT = 2**31 - 1  # [bytes] the most that this parameter can say


@functools.cache
def keep_freed_memory() -> bool:
    """Whether the C library now keeps what is freed, up to 2 GB, for what is allocated next.

    By default glibc gives each large array back to the system, and a program that runs again pays
    for every page of it anew: energy and forces take 1.5 times as long. This holds for the whole
    process and has to come before JAX starts its threads, so :func:`equizoo.load` calls it. Whoever
    has settings of their own for glibc (``GLIBC_TUNABLES``, ``MALLOC_...``), or sets
    ``EQUIZOO_MALLOC=system``, is left alone, as is every other C library.
    """
    own = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if own or os.environ.get("EQUIZOO_MALLOC") == "system":
        return False
    with contextlib.suppress(OSError, AttributeError):  # another system, another C library
        library = ctypes.CDLL("libc.so.6")
        settings = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: _KEPT, _TOP_PAD: 2**26}
        return min(library.mallopt(name, value) for name, value in settings.items()) == 1
    return False
