"""What step one of a conversion wrote: settings and arrays, as plain data."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from equizoo.config import parse_json


class Dump(NamedTuple):
    """A checkpoint as plain data."""

    settings: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    where: str

    @property
    def source(self) -> Mapping[str, str]:
        """Name and SHA-256 of the checkpoint's file, where known."""
        return self.settings.get("source", {})


def read_folder(folder: str | Path, program: ModuleType) -> Dump:
    """The dump that ``program`` wrote to a folder; ``ValueError`` where it is not one."""
    folder, name = Path(folder), Path(str(program.__file__)).name
    settings_file, arrays_file = folder / program.SETTINGS, folder / program.ARRAYS
    if missing := [file.name for file in (settings_file, arrays_file) if not file.is_file()]:
        raise ValueError(
            f"{folder} lacks {' and '.join(missing)}; expected a folder that {name} wrote."
        )
    settings = parse_json(settings_file.read_text("utf-8"), str(settings_file))
    found = settings.get("format"), settings.get("version")
    if found != (program.FORMAT, program.VERSION):
        raise ValueError(
            f"{settings_file} has format {found[0]!r}, version {found[1]!r}; expected "
            f"{program.FORMAT!r}, version {program.VERSION!r}. Write it again with the {name} of "
            "this version."
        )
    try:
        arrays = safetensors.numpy.load_file(arrays_file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{arrays_file} is truncated or damaged: {error}.") from error
    return Dump(settings, arrays, str(folder))
