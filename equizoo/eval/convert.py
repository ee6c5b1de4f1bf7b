"""Checkpoints of mace-torch to potentials, on the user's machine and with the user's consent."""

import hashlib
import os
import subprocess
import sys
import tempfile
import uuid
import warnings
from collections.abc import Iterable
from pathlib import Path
from urllib.request import Request, urlopen

from ase.data import chemical_symbols

from equizoo.config import from_dict
from equizoo.eval.potential import Potential, _rebuild
from equizoo.hub import sha256_of
from equizoo.registry import MODELS, ModelEntry, cache_folder
from equizoo.structure import EnergyReference
from equizoo.zoo._base import ArchitectureConfig
from equizoo.zoo._convert import mace_torch_dump
from equizoo.zoo._convert.mace_torch import convert, read_dump

_CONSENT = (
    "it is a pickled Python object, and opening it runs whatever code its author put in. Only if "
    "you trust where it comes from: trust=True (on the command line --trust)."
)


def dump_mace_torch(
    file: str | Path, folder: str | Path, *, trust: bool = False, python: str | Path | None = None
) -> None:
    """Writes a mace-torch model as plain arrays and JSON to a new ``folder``.

    Runs in a process of ``python``: an interpreter that has mace-torch, by default the one named
    in ``EQUIZOO_TORCH_PYTHON``, else this one. Raises ``ValueError`` without ``trust``, for a file
    that holds no such model, and where mace-torch is missing.
    """
    file, folder = Path(file).expanduser(), Path(folder).expanduser()
    if not file.is_file():
        raise ValueError(f"{file} is not a file; expected a model of mace-torch (.model).")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; choose another name.")
    if not trust:
        raise ValueError(f"{file}: {_CONSENT}")
    program = str(python or os.environ.get("EQUIZOO_TORCH_PYTHON") or sys.executable)
    command = [program, str(Path(mace_torch_dump.__file__).resolve())]
    command += [str(file.resolve()), str(folder.resolve())]
    try:
        run = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"{program} could not be started ({error}); expected a Python.") from error
    if run.returncode:
        lines = run.stderr.strip().splitlines() or ["no message"]
        missing = "ModuleNotFoundError" in run.stderr or "ImportError" in run.stderr
        hint = (
            " That Python lacks what the checkpoint needs: give one that has mace-torch "
            "(--python, or EQUIZOO_TORCH_PYTHON; 'pip install mace-torch safetensors' makes one), "
            "or run equizoo/zoo/_convert/mace_torch_dump.py there and give its folder here."
        )
        raise ValueError(f"{file} could not be opened: {lines[-1]}.{hint if missing else ''}")


def convert_mace_torch(
    source: str | Path,
    *,
    trust: bool = False,
    python: str | Path | None = None,
    level_of_theory: str = "as in the checkpoint",
    energy_reference: EnergyReference = EnergyReference.TOTAL,
    elements: Iterable[str] = (),
    name: str = "",
) -> Potential:
    """The potential in a ``.model`` file of mace-torch, or in a dump of one; equal to rounding.

    ``elements`` cuts it down to those. Raises ``ValueError`` as :func:`dump_mace_torch` does, and
    for models that have no counterpart here.
    """
    source = Path(source).expanduser()
    if source.is_dir():
        dump = read_dump(source)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            dump_mace_torch(source, Path(temporary) / "dump", trust=trust, python=python)
            dump = read_dump(Path(temporary) / "dump")
    converted = convert(dump)
    config = from_dict(ArchitectureConfig, converted.config, str(source))
    potential = Potential(
        _rebuild(config, converted.arrays, str(source)),
        reference_energies=converted.reference_energies,
        energy_reference=energy_reference,
        level_of_theory=dict.fromkeys(config.heads, level_of_theory),
        name=name or source.stem,
        source=converted.source,
    )
    return potential.with_elements(elements) if (elements := list(elements)) else potential


# ---- released models ---------------------------------------------------------------------------


def require_license(entry: ModelEntry, accepted: str | None) -> None:
    """Raises ``ValueError`` showing the terms of a model that has some, until they are accepted."""
    assert entry.checkpoint is not None
    given = {accepted, *os.environ.get("EQUIZOO_ACCEPT_LICENSES", "").split(",")}
    if entry.checkpoint.terms is not None and entry.license_weights not in given:
        raise ValueError(
            f"{entry.name} is under {entry.license_weights}. {entry.checkpoint.terms} If you "
            f"agree: accept_license={entry.license_weights!r} (on the command line "
            f"--accept-license {entry.license_weights}, or EQUIZOO_ACCEPT_LICENSES)."
        )


def ensure_converted(
    entry: ModelEntry,
    *,
    trust: bool = False,
    accept_license: str | None = None,
    python: str | Path | None = None,
) -> Path:
    """The folder in the cache that holds a released checkpoint in our form.

    The first time it is fetched, checked against the SHA-256 on its card where there is one, and
    converted; its licence's terms, if any, have to be accepted then. Raises ``ValueError`` without
    consent, and when the file is not the one that the card describes.
    """
    assert entry.checkpoint is not None
    folder = cache_folder() / "models" / entry.name
    if entry.source == "cached":
        return folder
    require_license(entry, accept_license)
    if not trust:
        raise ValueError(
            f"{entry.name} is a checkpoint of mace-torch ({entry.checkpoint.address}), converted "
            f"when it is first loaded: {_CONSENT}"
        )
    file = _checkpoint_file(entry)
    potential = convert_mace_torch(
        file, trust=trust, python=python, level_of_theory=entry.level_of_theory, name=entry.name
    )
    found = {chemical_symbols[z] for z in potential.config.atomic_numbers}
    if found != set(entry.elements) or abs(potential.config.cutoff - entry.cutoff) > 1e-6:
        message = (
            f"{file} has cutoff {potential.config.cutoff} Å and the elements "
            f"{' '.join(sorted(found))}; the card of {entry.name} says {entry.cutoff} Å and "
            f"{' '.join(sorted(entry.elements))}. The card may be wrong where its publishers "
            "state no SHA-256; or it is another file."
        )
        if entry.checkpoint.sha256 is None:
            warnings.warn(message, stacklevel=2)
        else:
            raise ValueError(message)
    if entry.checkpoint.head is not None:
        potential = potential.with_head(entry.checkpoint.head)
    card = MODELS.folder / f"{entry.name}.md"
    potential.card = card.read_text("utf-8") if card.is_file() else None
    folder.parent.mkdir(parents=True, exist_ok=True)
    potential.save(folder)
    return folder


def _checkpoint_file(entry: ModelEntry) -> Path:
    """Verified: in a folder of ``EQUIZOO_CHECKPOINTS``, in the cache, or fetched to there."""
    assert entry.checkpoint is not None
    name, expected = entry.checkpoint.file, entry.checkpoint.sha256
    named = os.environ.get("EQUIZOO_CHECKPOINTS", "").split(os.pathsep)
    cached = cache_folder() / "checkpoints" / name
    places = [Path(folder).expanduser() / name for folder in named if folder] + [cached]
    for place in places:
        if place.is_file():
            found = sha256_of(place)
            if expected is not None and found != expected:
                raise ValueError(
                    f"{place} has SHA-256 {found}, expected {expected} (the card of "
                    f"{entry.name}): damaged, or another file. Delete it and try again."
                )
            return place
    return _download(entry, cached)


def _download(entry: ModelEntry, target: Path) -> Path:
    assert entry.checkpoint is not None
    address, expected = entry.checkpoint.address, entry.checkpoint.sha256
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    digest = hashlib.sha256()
    try:
        try:
            request = Request(address, headers={"User-Agent": "equizoo"})
            with urlopen(request, timeout=60) as response, open(partial, "wb") as out:
                if not response.geturl().startswith("https://"):
                    raise OSError(f"redirected to {response.geturl()}")
                while block := response.read(1 << 20):
                    digest.update(block)
                    out.write(block)
        except OSError as error:
            raise ConnectionError(
                f"{entry.name} could not be fetched from {address} ({error}). Without a network, "
                f"put {target.name} into a folder and name that folder in EQUIZOO_CHECKPOINTS."
            ) from error
        if expected is not None and digest.hexdigest() != expected:
            raise ValueError(
                f"{address} has SHA-256 {digest.hexdigest()}, expected {expected} (the card of "
                f"{entry.name}). Try again; if it stays so, the public file has changed."
            )
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target
