"""LMDB files for reading: opened once for a process, which the library demands."""

import functools
from pathlib import Path
from typing import Any


class LmdbFile:
    """The values of one database file by key."""

    def __init__(self, path: Path):
        status = path.stat()
        self.path = path
        self._environment = _environment(
            str(path.resolve()), status.st_ino, status.st_mtime_ns, status.st_size
        )

    def __len__(self) -> int:
        return int(self._environment.stat()["entries"])

    def get(self, key: str) -> bytes | None:
        """A copy of the value, or ``None``."""
        with self._environment.begin() as transaction:
            return transaction.get(key.encode())

    def names(self) -> list[str]:
        """All keys, in the order of their bytes."""
        with self._environment.begin() as transaction:
            cursor = transaction.cursor()
            return [key.decode() for key in cursor.iternext(keys=True, values=False)]


@functools.cache
def _environment(path: str, *version: int) -> Any:
    import lmdb

    try:
        # no lock file beside the data, which may be on a medium that cannot be written
        return lmdb.open(
            path, subdir=False, readonly=True, lock=False, readahead=False, meminit=False
        )
    except lmdb.Error as error:
        raise ValueError(f"{path}: no LMDB file, or damaged ({error}). Fetch it again.") from error
