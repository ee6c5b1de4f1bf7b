"""A published model is a folder, the same on disk, in the wheel and on the Hugging Face Hub.

``config.json`` rebuilds the model, ``model.safetensors`` holds its weights, ``golden.safetensors``
a small input with the outputs it must give, ``README.md`` is the card: YAML front matter, then
prose. This module moves arrays and text; what they mean is decided by its callers.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Shaped

from equizoo.config import format_json, parse_json

CONFIG, WEIGHTS, GOLDEN, CARD = (
    "config.json",
    "model.safetensors",
    "golden.safetensors",
    "README.md",
)
REQUIRED = (CONFIG, WEIGHTS, GOLDEN)
# Formats that can run code when opened, or usually carry a Python object.
REFUSED = frozenset(
    [".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".model", ".npz", ".joblib"]
)
_DTYPES = frozenset(
    ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
    + ["float16", "bfloat16", "float32", "float64"]
)


class Folder(NamedTuple):
    """The contents of a published model, read and not yet interpreted."""

    config: dict[str, Any]
    arrays: dict[str, np.ndarray]
    golden: dict[str, np.ndarray]
    card: str | None
    sha256: str  # of model.safetensors


def save_folder(
    path: str | Path,
    *,
    config: Mapping[str, Any],
    arrays: Mapping[str, Shaped[np.ndarray, "..."]],
    card: str | None,
    golden: Mapping[str, Shaped[np.ndarray, "..."]],
) -> str:
    """The SHA-256 of the weights written; afterwards ``path`` holds the whole model.

    All or nothing: the files are written to a folder beside ``path``, which is then renamed; after
    an error or an interruption ``path`` is as it was. Equal arrays give equal bytes. Raises
    ``ValueError`` when ``path`` exists and is not an empty folder, or when an array has a type
    that would not survive.
    """
    path = Path(path).expanduser().resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(
            f"{path} exists and is not an empty folder; expected a new one. Nothing is "
            "overwritten: choose another name, or delete it first."
        )
    weights = _to_bytes(arrays, WEIGHTS)
    contents = {CONFIG: format_json(config).encode(), WEIGHTS: weights}
    contents[GOLDEN] = _to_bytes(golden, GOLDEN)
    if card is not None:
        contents[CARD] = card.encode()
    # Not tempfile.mkdtemp, whose folders (and safetensors' files) only their owner may read.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        for name, content in contents.items():
            (partial / name).write_bytes(content)
        if path.exists():  # empty, but Windows renames onto nothing
            path.rmdir()
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return hashlib.sha256(weights).hexdigest()


def load_folder(path: str | Path, expected_sha256: str | None = None) -> Folder:
    """The contents of a model folder, with arrays in the exact type they were saved in.

    Raises ``ValueError`` when a file is missing, truncated or not what it should be, and when the
    weights do not have ``expected_sha256``. Never opens a pickle.
    """
    path = Path(path).expanduser()
    if path.suffix in REFUSED:
        raise ValueError(_refusal(path.name))
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; expected one holding {', '.join(REQUIRED)}.")
    found = sorted(file.name for file in path.iterdir())
    if missing := [name for name in REQUIRED if name not in found]:
        refused = [name for name in found if Path(name).suffix in REFUSED]
        hint = " " + _refusal(", ".join(refused)) if refused else ""
        raise ValueError(
            f"{path} lacks {', '.join(missing)}; expected {', '.join(REQUIRED)}, "
            f"found {', '.join(found) or 'nothing'}.{hint}"
        )
    sha256 = sha256_of(path / WEIGHTS)
    if expected_sha256 is not None and sha256 != expected_sha256:
        raise ValueError(
            f"{path / WEIGHTS} has SHA-256 {sha256}, expected {expected_sha256}: damaged, or "
            "another model's weights. Delete the folder and fetch it again."
        )
    config = parse_json((path / CONFIG).read_text(encoding="utf-8"), where=str(path / CONFIG))
    card = (path / CARD).read_text(encoding="utf-8") if CARD in found else None
    return Folder(config, _read(path / WEIGHTS), _read(path / GOLDEN), card, sha256)


def check_keys(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    where: str = WEIGHTS,
) -> None:
    """Raises one ``ValueError`` listing every missing, unexpected and misshapen array, if any."""
    problems = [f"missing {key} {expected[key]}" for key in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {key} {found[key]}" for key in sorted(found.keys() - expected.keys())]
    for key in sorted(found.keys() & expected.keys()):
        if tuple(found[key]) != tuple(expected[key]):
            problems.append(f"{key} has shape {found[key]}, expected {expected[key]}")
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(f"{where} does not hold the arrays that config.json asks for:\n{listed}")


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split_front_matter(text: str, where: str = "card") -> tuple[dict[str, Any], str]:
    """The YAML mapping between the first two ``---`` lines of a card, and the text after them."""
    import yaml

    head, separator, body = text.removeprefix("---\n").partition("\n---\n")
    if not text.startswith("---\n") or not separator:
        raise ValueError(
            f"{where} has no front matter; expected YAML between two '---' lines on top."
        )
    try:
        fields = yaml.safe_load(head)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} has front matter that is not valid YAML: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where} has front matter {fields!r}; expected 'key: value' lines.")
    return fields, body


def join_front_matter(fields: Mapping[str, Any], body: str) -> str:
    """A card that :func:`split_front_matter` takes apart into the same fields and body."""
    import yaml

    head = yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True, width=100)
    return f"---\n{head}---\n{body}"


def _to_bytes(arrays: Mapping[str, Shaped[np.ndarray, "..."]], where: str) -> bytes:
    refused = [
        f"{key} ({array.dtype})" for key, array in arrays.items() if array.dtype.name not in _DTYPES
    ]
    if refused:
        raise ValueError(
            f"{where} cannot hold {', '.join(refused)}; expected arrays of one of the types "
            f"{', '.join(sorted(_DTYPES))}."
        )
    # safetensors writes a transposed view wrongly, without an error. Not np.ascontiguousarray,
    # which turns a scalar into a vector.
    return safetensors.numpy.save({k: np.asarray(v, order="C") for k, v in arrays.items()})


def _read(file: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is truncated or not a safetensors file ({error}). Fetch it again."
        ) from error


def _refusal(names: str) -> str:
    return (
        f"{names} may run code when opened (pickle and kin), so equizoo reads no weights from it. "
        "Convert it to a folder in a separate, trusted step (equizoo convert)."
    )
