"""Compiled programs kept between processes, where nobody else can put any."""

import contextlib
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

from equizoo.registry import cache_folder


def use_compile_cache() -> Path | None:
    """The folder that JAX keeps compiled programs in from now on; ``None`` if there is none.

    A folder that JAX already has is left alone (``JAX_COMPILATION_CACHE_DIR``), else it is
    ``jax`` in :func:`equizoo.registry.cache_folder`, readable by the user alone. Loading a program
    runs it, so a folder that belongs to somebody else, or that others could exchange, is not used;
    a warning says why. ``JAX_ENABLE_COMPILATION_CACHE=0`` turns caching off.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if given := jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return Path(given)
    folder = cache_folder() / "jax"
    try:
        make_private(folder)
    except (OSError, ValueError) as error:
        message = f"Compiled programs are not kept: {error}"
        warnings.warn(message, stacklevel=2)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    compilation_cache.reset_cache()  # JAX looks at the setting once, at its first compilation
    return folder


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Every program is compiled: none is read from JAX's cache on disk."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    def enable(enabled: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()  # JAX looks at the setting once

    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    enable(False)
    try:
        yield
    finally:
        enable(before)


def make_private(folder: Path) -> None:
    """Makes ``folder`` if need be, of mode 0700.

    Raises ``ValueError`` when it is a link or a file, belongs to another user, or lies in a folder
    where others may rename what they do not own.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{folder} is a link, expected a folder; set EQUIZOO_CACHE to another.")
    if not hasattr(os, "geteuid"):  # folders of a Windows user are private to begin with
        return
    if found.st_uid != os.geteuid():
        raise ValueError(
            f"{folder} belongs to user {found.st_uid}, expected {os.geteuid()}; set EQUIZOO_CACHE "
            "to a folder of your own."
        )
    for above in folder.resolve().parents:
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise ValueError(
                f"{above} is writable by everybody, who could exchange {folder}; set EQUIZOO_CACHE "
                "to a folder of your own."
            )
    if stat.S_IMODE(found.st_mode) != 0o700:
        folder.chmod(0o700)
