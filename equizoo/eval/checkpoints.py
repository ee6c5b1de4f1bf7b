"""Released checkpoints of other codes: fetched, verified, converted once, and kept."""

import hashlib
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from urllib.request import Request, urlopen

from ase.data import chemical_symbols

from equizoo.config import parse_json
from equizoo.eval.convert_equiformer_v2 import convert_equiformer_v2
from equizoo.eval.convert_mace_torch import WHY_CONSENT, convert_mace_torch
from equizoo.eval.potential import Potential, load
from equizoo.hub import CONFIG, sha256_of
from equizoo.registry import MODELS, ModelEntry, cache_folder
from equizoo.whole_files import written_whole


def require_license(entry: ModelEntry, accepted: str | None) -> None:
    """Raises ``ValueError`` showing the terms of a model that has some, until they are accepted."""
    assert entry.checkpoint is not None
    given = {accepted, *os.environ.get("EQUIZOO_ACCEPT_LICENSES", "").split(",")}
    if entry.checkpoint.terms is not None and entry.license_weights not in given:
        raise ValueError(
            f"{entry.name} is under {entry.license_weights}. {entry.checkpoint.terms} If you "
            f"agree: accept_license={entry.license_weights!r} (on the command line, once: equizoo "
            f"convert mace-torch {entry.name} --accept-license {entry.license_weights} --trust; or "
            "EQUIZOO_ACCEPT_LICENSES)."
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
        where = folder / CONFIG
        config = parse_json(where.read_text("utf-8"), str(where))
        _require_described(entry, config["atomic_numbers"], config["cutoff"])
        return folder
    require_license(entry, accept_license)
    potential = _CONVERTERS[entry.checkpoint.format](entry, trust, python)
    _require_described(entry, potential.config.atomic_numbers, potential.config.cutoff)
    if entry.checkpoint.head is not None:
        potential = potential.with_head(entry.checkpoint.head)
    potential.card = MODELS.text(entry.name) if entry.name in MODELS else None
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        potential.save(folder)
    except (ValueError, OSError):
        if entry.source != "cached":  # else another process was faster, with the same result
            raise
    return folder


def _require_described(entry: ModelEntry, numbers: Iterable[int], cutoff: float) -> None:
    """Whether this is what the card describes; a warning, whenever it is loaded, where nothing
    says which of the two is wrong."""
    assert entry.checkpoint is not None
    found = {chemical_symbols[z] for z in numbers}
    if found == set(entry.elements) and abs(cutoff - entry.cutoff) <= 1e-6:
        return
    message = (
        f"{entry.checkpoint.file} has cutoff {cutoff} Å and the elements "
        f"{' '.join(sorted(found))}; the card of {entry.name} says {entry.cutoff} Å and "
        f"{' '.join(sorted(entry.elements))}. The card may be wrong where its publishers "
        "state no SHA-256; or it is another file."
    )
    if entry.checkpoint.sha256 is not None:
        raise ValueError(message)
    warnings.warn(message, stacklevel=4)


def _mace_torch(entry: ModelEntry, trust: bool, python: str | Path | None) -> Potential:
    assert entry.checkpoint is not None
    if not trust:
        raise ValueError(
            f"{entry.name} is a checkpoint of mace-torch ({entry.checkpoint.address}), converted "
            f"when it is first loaded: {WHY_CONSENT} (on the command line, once: equizoo convert "
            f"mace-torch {entry.name} --trust)."
        )
    return convert_mace_torch(
        _checkpoint_file(entry),
        trust=trust,
        python=python,
        level_of_theory=entry.level_of_theory,
        energy_reference=entry.energy_reference,
        name=entry.name,
    )


def _equiformer_v2(entry: ModelEntry, trust: bool, python: str | Path | None) -> Potential:
    """Opening it runs no code, so that no trust is asked for."""
    return convert_equiformer_v2(
        _checkpoint_file(entry),
        python=python,
        level_of_theory=entry.level_of_theory,
        energy_reference=entry.energy_reference,
        name=entry.name,
    )


_CONVERTERS = {"mace-torch": _mace_torch, "equiformer-v2": _equiformer_v2}


def convert_released(
    name: str,
    format: str,
    out: Path | None = None,
    *,
    elements: Iterable[str] = (),
    trust: bool = False,
    accept_license: str | None = None,
    python: str | Path | None = None,
) -> Path:
    """The folder of a released checkpoint of one format: in the cache, and copied to ``out``.

    ``elements`` cuts the copy down. Raises ``ValueError`` as :func:`ensure_converted` does, and for
    models of another format or none.
    """
    entry, elements = MODELS[name], list(elements)
    if entry.checkpoint is None:
        raise ValueError(f"{name} needs no conversion; use it by its name.")
    if entry.checkpoint.format != format:
        raise ValueError(
            f"{name} is a checkpoint of {entry.checkpoint.format}, not of {format}; "
            f"equizoo convert {entry.checkpoint.format} {name}."
        )
    if elements and out is None:
        raise ValueError("--elements of a released checkpoint needs --out.")
    folder = ensure_converted(entry, trust=trust, accept_license=accept_license, python=python)
    if out is None:
        return folder
    potential = load(folder, check_golden=False)
    (potential.with_elements(elements) if elements else potential).save(out)
    return out


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
    digest = hashlib.sha256()
    with written_whole(target) as partial:
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
    return target
