"""What there is: classes found by file name, released models found by their cards.

``TENSOR_PRODUCTS["gaunt"]`` imports ``equizoo/tensor_products/gaunt.py`` and returns the one
``TensorProduct`` defined there; adding a file adds an entry. ``MODELS["mace-3bpa"]`` is the front
matter of ``model_cards/mace-3bpa.md``. Listing names imports and reads nothing.
"""

import dataclasses
import fnmatch
import importlib
import importlib.util
import os
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ase.data import atomic_numbers

from equizoo.config import did_you_mean, from_dict
from equizoo.hub import WEIGHTS, sha256_of, split_front_matter
from equizoo.hub_client import HubAccess, download_folder
from equizoo.structure import EnergyReference

BUNDLED = Path(__file__).parent / "bundled"


class UnknownName(ValueError, KeyError):
    """A name that a registry does not hold; the message says which it does."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = ""):
        super().__init__(f"Unknown {kind} {name!r}.{did_you_mean(name, known)}{hint}")

    __str__ = ValueError.__str__  # KeyError's would print quotes and escapes


class FolderRegistry(Mapping[str, type]):
    """Classes by the name of the file that defines them, imported when asked for.

    Every file ``<package>/<name>.py`` whose name does not start with ``_`` defines exactly one
    subclass of ``<package>._base.<base>``. ``key`` is the word under which
    :mod:`equizoo.config` writes the name.
    """

    def __init__(self, package: str, base: str, key: str = "name"):
        self.package, self.base, self.key = package, base, key

    def __iter__(self) -> Iterator[str]:
        spec = importlib.util.find_spec(self.package)
        assert spec is not None  # a package of equizoo
        modules = pkgutil.iter_modules(spec.submodule_search_locations)
        return iter(sorted(m.name for m in modules if not m.ispkg and not m.name.startswith("_")))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in list(iter(self))

    def __getitem__(self, name: str) -> type:
        if name not in self:
            raise UnknownName(self.base, name, self)
        base = getattr(importlib.import_module(f"{self.package}._base"), self.base)
        module = importlib.import_module(f"{self.package}.{name}")
        found = {
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, base)
            and value.__module__ == module.__name__
        }
        if len(found) != 1:
            names = ", ".join(sorted(cls.__name__ for cls in found)) or "none"
            raise ValueError(
                f"{self.package}/{name}.py must define exactly one {self.base}, found {names}. "
                "One file holds one; start the names of helper files with '_'."
            )
        return found.pop()

    def name_of(self, thing: Any) -> str:
        """The name under which a class, or the class of an instance, is found here."""
        cls = thing if isinstance(thing, type) else type(thing)
        name = cls.__module__.rpartition(".")[2]
        if name not in self or self[name] is not cls:
            raise ValueError(
                f"{cls.__module__}.{cls.__name__} is not a registered {self.base}; expected a "
                f"class defined in a file of {self.package}. Known: {', '.join(self)}."
            )
        return name


TENSOR_PRODUCTS = FolderRegistry("equizoo.tensor_products", base="TensorProduct")
ARCHITECTURES = FolderRegistry("equizoo.zoo", base="ArchitectureConfig", key="architecture")


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """A data set that a model has seen, with what its owners ask for."""

    name: str
    license: str
    citation: str


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Other people's weights in their own format: fetched and converted on the user's machine."""

    format: Literal["mace-torch", "equiformer-v2"]
    file: str  # its name, also in a folder of files fetched by hand
    address: str  # https
    sha256: str | None  # null where nobody reports it
    terms: str | None = None  # what the user has to agree to, where that is more than a notice
    head: str | None = None  # the one that answers unless asked otherwise; null: the first


@dataclasses.dataclass(frozen=True)
class ModelEntry:
    """A released model: the front matter of its card; `model_cards/README.md` explains the fields.

    With a ``checkpoint`` the weights are other people's: what they do not state is null.

    Raises ``ValueError`` that lists everything contradictory or malformed.
    """

    name: str
    architecture: str
    tensor_product: str
    elements: tuple[str, ...]
    cutoff: float  # [Å]
    level_of_theory: str
    energy_reference: EnergyReference
    license_code: str
    license_weights: str
    license_data: str
    training_data: tuple[TrainingData, ...]
    training_hardware: str | None
    training_hours: float | None  # [h]
    parameters: int | None
    sha256: str | None  # of model.safetensors
    metrics: tuple[Mapping[str, str | float], ...]
    license: str  # this and the following lower fields are what the Hub's pages and search read
    library_name: Literal["equizoo"]
    tags: tuple[str, ...]
    datasets: tuple[str, ...]
    hub_repo: str | None = None
    hub_revision: str | None = None  # a full commit hash: tags and branches move
    speed: tuple[Mapping[str, str | float], ...] = ()
    certificate: tuple[Mapping[str, str | float], ...] = ()
    license_name: str | None = None
    license_link: str | None = None
    base_model: str | None = None
    pipeline_tag: str | None = None
    checkpoint: Checkpoint | None = None

    def __post_init__(self):
        commit, checkpoint = self.hub_revision, self.checkpoint
        facts = (self.training_hardware, self.training_hours, self.parameters, self.sha256)
        checks = {
            f"name {self.name!r} must be lower-case words joined by '-', '_' or '.'": re.fullmatch(
                r"[a-z0-9]+([-_.][a-z0-9]+)*", self.name
            ),
            "elements must be chemical symbols, each once": self.elements
            and len(set(self.elements)) == len(self.elements)
            and all(atomic_numbers.get(symbol, 0) > 0 for symbol in self.elements),
            "cutoff, parameters must be positive": self.cutoff > 0
            and (self.parameters is None or self.parameters > 0),
            "sha256 must be 64 hexadecimal digits": all(
                digits is None or re.fullmatch(r"[0-9a-f]{64}", digits)
                for digits in (self.sha256, checkpoint and checkpoint.sha256)
            ),
            "training_hardware, training_hours, parameters and sha256 may be null only with a "
            "checkpoint": checkpoint is not None or None not in facts,
            "a checkpoint is converted where it is used: sha256 and hub_repo must be null": (
                checkpoint is None or (self.sha256 is None and self.hub_repo is None)
            ),
            "checkpoint.address must start with https://, checkpoint.file be a bare file name": (
                checkpoint is None
                or (
                    checkpoint.address.startswith("https://")
                    and checkpoint.file == Path(checkpoint.file).name
                )
            ),
            "hub_revision must be a full commit hash (40 digits), given together with hub_repo": (
                (self.hub_repo is None) == (commit is None)
                and (commit is None or re.fullmatch(r"[0-9a-f]{40}", commit))
            ),
            "license 'other' needs license_name and license_link": self.license != "other"
            or (self.license_name and self.license_link),
        }
        problems = [problem for problem, fine in checks.items() if not fine]
        for field, words in (
            ("metrics", {"dataset", "split"}),
            ("speed", {"device", "dtype"}),
            ("certificate", {"check", "verdict"}),
        ):
            for i, row in enumerate(getattr(self, field)):
                if {key for key, value in row.items() if isinstance(value, str)} != words:
                    problems.append(
                        f"{field}[{i}] must hold the words {', '.join(sorted(words))}, and numbers "
                        f"under keys that end in their unit, got {dict(row)}"
                    )
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def source(self) -> Literal["bundled", "cached", "hub", "checkpoint"]:
        """Where the weights are: in the package, in the user's cache, or only on the Hub; or at
        the address of a checkpoint that is still to be converted."""
        folder = self._local_folder()
        if folder is None:
            return "hub" if self.checkpoint is None else "checkpoint"
        return "bundled" if folder.parent == BUNDLED else "cached"

    def _local_folder(self) -> Path | None:
        candidates = (BUNDLED / self.name, cache_folder() / "models" / self.name)
        return next((folder for folder in candidates if (folder / WEIGHTS).is_file()), None)


class CardRegistry(Mapping[str, ModelEntry]):
    """Released models by name, read from the cards ``<name>.md`` of a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(f.stem for f in self.folder.glob("*.md") if f.name != "README.md"))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in list(iter(self))

    def text(self, name: str) -> str:
        """The whole card."""
        if name not in self:
            raise UnknownName("model", name, self)
        return (self.folder / f"{name}.md").read_text("utf-8")

    def __getitem__(self, name: str) -> ModelEntry:
        where = f"model_cards/{name}.md"
        fields, _ = split_front_matter(self.text(name), where)
        entry = from_dict(ModelEntry, fields, where)
        if entry.name != name:
            raise ValueError(f"{where} says name: {entry.name}; expected the file's own name.")
        return entry


def _cards_folder() -> Path:
    """In the wheel the cards are package data; in a checkout they lie beside the package."""
    package = Path(__file__).parent
    packaged = package / "model_cards"
    return packaged if packaged.is_dir() else package.parent / "model_cards"


MODELS = CardRegistry(_cards_folder())


def shown_elements(elements: Sequence[str]) -> str:
    """Chemical symbols for a table: all of a few, else their number with the first and last."""
    if len(elements) <= 12:
        return " ".join(elements)
    return f"{len(elements)} elements {elements[0]}–{elements[-1]}"


def list_models(
    pattern: str = "*",
    *,
    elements: Iterable[str] | None = None,
    architecture: str | None = None,
    tensor_product: str | None = None,
    license: str | None = None,
    level_of_theory: str | None = None,
    dataset: str | None = None,
    max_error: Mapping[str, float] | None = None,
    models: Mapping[str, ModelEntry] = MODELS,
) -> list[ModelEntry]:
    """Released models that satisfy every condition given, by name.

    The words are glob patterns without regard to case (``"mace*"``, ``"wb97x*"``); ``license`` is
    that of the weights; a model must cover all ``elements``. ``dataset`` (``"3bpa/*"``) chooses
    models whose card states errors on it; ``max_error`` bounds errors by their name on the card
    (``{"forces_mae_meV_per_A": 20.0}``): a model must state each, and not exceed it on any of the
    data sets chosen. Raises ``ValueError`` for a symbol that is no element, and for an error that
    no card states.
    """
    wanted = set(elements or ())
    if unknown := sorted(symbol for symbol in wanted if atomic_numbers.get(symbol, 0) < 1):
        raise ValueError(f"{', '.join(map(repr, unknown))}: no such element; expected 'H', 'Pt'.")

    limits = max_error or {}
    stated = {key for entry in models.values() for row in entry.metrics for key in row}
    for key in limits:
        if key not in stated - {"dataset", "split"}:
            raise ValueError(f"No card states the error {key!r}.{did_you_mean(key, stated)}")

    def accurate(entry: ModelEntry) -> bool:
        rows = [
            row
            for row in entry.metrics
            if dataset is None
            or fnmatch.fnmatchcase(f"{row['dataset']}/{row['split']}".lower(), dataset.lower())
        ]
        found = {key: [row[key] for row in rows if key in row] for key in limits}
        return (bool(rows) or dataset is None) and all(
            values and all(float(value) <= limits[key] for value in values)
            for key, values in found.items()
        )

    def matches(entry: ModelEntry) -> bool:
        words = (
            (pattern, entry.name),
            (architecture, entry.architecture),
            (tensor_product, entry.tensor_product),
            (license, entry.license_weights),
            (level_of_theory, entry.level_of_theory),
        )
        return (
            wanted <= set(entry.elements)
            and accurate(entry)
            and all(
                glob is None or fnmatch.fnmatchcase(word.lower(), glob.lower())
                for glob, word in words
            )
        )

    return [entry for entry in models.values() if matches(entry)]


def find_model_folder(
    spec: str | Path,
    *,
    models: Mapping[str, ModelEntry] = MODELS,
    access: HubAccess = HubAccess(),  # noqa: B008 - frozen
) -> Path:
    """The folder with the model that ``spec`` names, fetched from the Hub when necessary.

    ``"name"`` is a released model, whose weights are checked against the SHA-256 on its card;
    ``"name@revision"`` is the same repository at another commit, tag or branch, unchecked;
    ``"hf-hub:organisation/name[@revision]"`` is any repository; ``"local-dir:path"`` or an existing
    path is a folder on disk. Raises ``ValueError`` when there is no such thing, or the weights are
    not those of the card; ``ConnectionError`` when the Hub is needed and out of reach.
    """
    scheme, _, rest = str(spec).partition(":")
    if scheme == "hf-hub":
        repo, _, revision = rest.partition("@")
        return download_folder(repo, revision or None, access)
    if scheme == "local-dir":
        folder = Path(rest).expanduser()
        if not folder.is_dir():
            raise ValueError(f"{spec}: {folder} is not a folder; expected one with {WEIGHTS}.")
        return folder
    name, _, revision = str(spec).partition("@")
    if name in models:
        return _released_folder(models[name], revision, access)
    if (path := Path(spec).expanduser()).exists():
        return path
    hint = " Or give hf-hub:organisation/name, or local-dir:path."
    raise UnknownName("model", str(spec), models, hint)


def _released_folder(entry: ModelEntry, revision: str, access: HubAccess) -> Path:
    folder = None if revision else entry._local_folder()
    expected = entry.sha256 if revision in ("", entry.hub_revision) else None
    if folder is not None:
        if expected is not None and sha256_of(folder / WEIGHTS) != expected:
            raise ValueError(
                f"{folder / WEIGHTS} does not have the SHA-256 on the card of {entry.name} "
                f"({expected}): damaged, or replaced. Delete the folder and load the model again."
            )
        return folder
    if entry.checkpoint is not None:
        raise ValueError(
            f"{entry.name} is a checkpoint that has not been converted here yet; do so once "
            f"with equizoo.load({entry.name!r}), or on the command line: equizoo convert "
            f"{entry.checkpoint.format} {entry.name}; it says what has to be agreed to."
        )
    if entry.hub_repo is None:
        places = f"{BUNDLED / entry.name} or {cache_folder() / 'models' / entry.name}"
        raise ValueError(f"{entry.name} is not on the Hub; expected its weights in {places}.")
    return download_folder(entry.hub_repo, revision or entry.hub_revision, access, expected)


def cache_folder() -> Path:
    """Where equizoo keeps models of its own: ``$EQUIZOO_CACHE``, else ``~/.cache/equizoo``."""
    if folder := os.environ.get("EQUIZOO_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "equizoo"
