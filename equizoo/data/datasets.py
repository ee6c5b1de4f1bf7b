"""Named data sets: where each file is, what it holds, and that it is the very file meant.

The files themselves are not part of equizoo, apart from the bundled ones. A name is looked up in
the package, in the folders of ``EQUIZOO_DATA``, in the cache, and then at its public address;
wherever found, the decompressed content must have the SHA-256 written here.
"""

import dataclasses
import fnmatch
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast
from urllib.request import Request, urlopen

import numpy as np

from equizoo.data.catalyst import is_catalyst, read_catalyst
from equizoo.data.catalyst_frames import Target
from equizoo.data.catalyst_references import read_adsorption_references
from equizoo.data.frames import DAMAGE, OPENERS
from equizoo.data.prepared import is_prepared, open_prepared, selection
from equizoo.data.readers import (
    Dataset,
    LabelKeys,
    join,
    read_isolated_atoms,
    read_structures,
)
from equizoo.registry import BUNDLED, UnknownName, cache_folder
from equizoo.structure import EnergyReference, require_same_reference
from equizoo.whole_files import written_whole

Where = Literal["bundled", "local", "cached", "download", "missing"]


@dataclasses.dataclass(frozen=True)
class DataSource:
    """One split of a named data set, with all that is needed to find, verify and cite it."""

    name: str
    file: str  # below a data folder; there also as .xz, .gz or .bz2
    level_of_theory: str
    licence: str
    citation: str
    page: str  # where the owners publish the set
    sha256: str | None = None  # of the decompressed content; None for a file inside the package
    num_bytes: int | None = None  # decompressed
    url: str | None = None  # the same bytes in public, if anywhere
    units: str = "eV, eV/Å, eV/Å^3 (tension positive), Å"
    energy_reference: EnergyReference = EnergyReference.TOTAL
    keys: LabelKeys = dataclasses.field(default_factory=LabelKeys)
    require: tuple[str, ...] = ("energy", "forces")
    isolated_atoms: Mapping[int, float] | str | None = None  # [eV] by atomic number, or a file
    target: Target = Target.FRAME  # of databases of OC20 and OC22
    weights_releasable: bool = True  # whether weights trained on it may be published
    notes: str = ""  # noise, duplicates, changes to the original

    @property
    def bundled(self) -> bool:
        return self.sha256 is None


class DatasetRow(NamedTuple):
    """One line of :func:`list_datasets`."""

    name: str
    where: Where
    level_of_theory: str
    energy_reference: EnergyReference
    licence: str
    weights_releasable: bool
    notes: str


def load_dataset(
    name_or_path: str | os.PathLike,
    keys: LabelKeys | None = None,
    *,
    index: str | int | slice = ":",
    require: tuple[str, ...] | None = None,
    energy_reference: EnergyReference | None = None,
    data_energy_reference: EnergyReference | None = None,
    adsorption_references: str | os.PathLike | None = None,
    level_of_theory: str | None = None,
    isolated_atoms: str | os.PathLike | Mapping[int, float] | None = None,
    on_bad: Literal["raise", "skip"] = "raise",
    target: Target | None = None,
) -> Dataset:
    """The data set of a registered name (:func:`list_datasets`), or else of a file.

    A pattern such as ``rmd17/*_train_01`` is all sets whose names match, one after the other; they
    must be of one level of theory and one energy reference. What a registered set knows of itself
    (keys, level of theory, energy reference, isolated atoms) is the default; for a file see
    :func:`equizoo.data.read_structures`. A folder or database of OC20 or OC22 is read whole and
    labelled by ``target``. Its energies are converted to ``energy_reference``, by the file
    ``adsorption_references`` (``oc20_ref.pkl``) where a frame has no reference of its own;
    ``data_energy_reference`` says what they are where the file does not. A folder made by
    ``equizoo prepare`` is not read but opened: its frames stay on the disk.

    Raises ``ValueError`` for an unknown name, content other than that registered, an energy
    reference or level of theory that contradicts the registered one, and a database of OC20 whose
    energy reference nobody states; ``ConnectionError`` when a download fails.
    """
    if names := _matching(str(name_or_path)):
        options: dict[str, Any] = dict(index=index, require=require, on_bad=on_bad)
        options |= dict(energy_reference=energy_reference, level_of_theory=level_of_theory)
        options |= dict(isolated_atoms=isolated_atoms, target=target)
        options |= dict(data_energy_reference=data_energy_reference)
        options |= dict(adsorption_references=adsorption_references)
        return join([load_dataset(name, keys, **options) for name in names], str(name_or_path))
    energies = energy_reference, data_energy_reference, adsorption_references
    source, path = _located(name_or_path, *energies, level_of_theory)
    if is_prepared(path):
        given = dict(keys=keys, isolated_atoms=isolated_atoms, target=target)
        given |= dict(adsorption_references=adsorption_references)
        stated = energy_reference, data_energy_reference
        return _prepared(path, given, index, require, stated, level_of_theory)
    if is_catalyst(path):
        if keys is not None or index != ":" or isolated_atoms is not None:
            raise ValueError(
                f"{path} is data of OC20 or OC22, read whole and by its own keys; leave out keys, "
                "index and isolated_atoms."
            )
        return read_catalyst(
            path,
            target=source.target if target is None else target,
            data_energy_reference=source.energy_reference
            if source.name in DATASETS
            else data_energy_reference,
            energy_reference=energy_reference,
            adsorption_references=None
            if adsorption_references is None
            else read_adsorption_references(Path(adsorption_references).expanduser()),
            level_of_theory=source.level_of_theory if level_of_theory is None else level_of_theory,
            name=source.name,
        )
    return read_structures(
        path,
        source.keys if keys is None else keys,
        index=index,
        require=source.require if require is None else require,
        energy_reference=_of_plain(path, *energies) or source.energy_reference,
        level_of_theory=source.level_of_theory if level_of_theory is None else level_of_theory,
        isolated_atoms=_isolated_atoms(source) if isolated_atoms is None else isolated_atoms,
        on_bad=on_bad,
        name=source.name,
    )


def _located(
    name_or_path: str | os.PathLike,
    energy_reference: EnergyReference | None,
    data_energy_reference: EnergyReference | None,
    adsorption_references: str | os.PathLike | None,
    level_of_theory: str | None,
) -> tuple[DataSource, Path]:
    """What is known of a registered set or of a file, and where it is."""
    if (source := DATASETS.get(str(name_or_path))) is None:
        path = Path(name_or_path).expanduser()
        if not path.exists():
            raise UnknownName("data set", str(name_or_path), DATASETS, " It is no file either.")
        return DataSource(str(path), "", "", "", "", "", require=("energy",)), path
    path = find_file(source)
    if energy_reference is not None and adsorption_references is None:
        require_same_reference(energy_reference, source.energy_reference, source.name)
    if data_energy_reference is not None:
        require_same_reference(data_energy_reference, source.energy_reference, source.name)
    if level_of_theory not in (None, source.level_of_theory):
        raise ValueError(f"{source.name} is {source.level_of_theory!r}, not {level_of_theory!r}.")
    return source, path


def _of_plain(
    path: Path,
    energy_reference: EnergyReference | None,
    data_energy_reference: EnergyReference | None,
    adsorption_references: str | os.PathLike | None,
) -> EnergyReference | None:
    """What the energies of a file are said to be; only those of OC20 and OC22 can be converted."""
    stated = data_energy_reference or energy_reference
    if adsorption_references is not None or (energy_reference or stated) != stated:
        raise ValueError(
            f"{path} is no data of OC20 or OC22, whose energies alone can be converted; leave out "
            "adsorption_references, and say by energy_reference what its energies are."
        )
    return stated


def _isolated_atoms(source: DataSource) -> Mapping[int, float] | None:  # [eV]
    if isinstance(source.isolated_atoms, str):
        return read_isolated_atoms(BUNDLED / source.isolated_atoms)
    return source.isolated_atoms


def _prepared(
    folder: Path,
    given: Mapping[str, Any],
    index: str | int | slice,
    require: tuple[str, ...] | None,
    stated: tuple[EnergyReference | None, ...],
    level_of_theory: str | None,
) -> Dataset:
    """A prepared folder, of which nothing can be chosen anew but frames."""
    if chosen := [name for name, value in given.items() if value is not None]:
        raise ValueError(
            f"{folder} was prepared with its labels and references; {', '.join(chosen)} cannot be "
            "chosen any more. Leave it out here, and give it to `equizoo prepare`."
        )
    dataset = open_prepared(folder)
    for energy_reference in stated:
        require_same_reference(
            energy_reference or dataset.energy_reference, dataset.energy_reference, str(folder)
        )
    if level_of_theory not in (None, dataset.level_of_theory):
        raise ValueError(f"{folder} is {dataset.level_of_theory!r}, not {level_of_theory!r}.")
    if absent := [label for label in require or () if not dataset.report.labels.get(label)]:
        raise ValueError(f"{folder}: no frame has {', '.join(absent)}; prepare it with these keys.")
    if index == ":":
        return dataset
    if not isinstance(index, slice):
        from ase.io.formats import string2index

        index = string2index(index) if isinstance(index, str) else index
    numbers = np.arange(len(dataset))
    chosen_frames = np.atleast_1d(numbers[cast(int | slice, index)])
    return dataclasses.replace(dataset, structures=selection(dataset.structures, chosen_frames))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """One file, folder or database to read frames from, and how."""

    name: str
    path: Path
    keys: LabelKeys
    require: tuple[str, ...]
    energy_reference: EnergyReference | None  # None: that of its frames
    references: Path | None  # adsorption references of systems, for converting
    converted_to: EnergyReference | None  # of data of OC20 and OC22; None: as it is
    level_of_theory: str
    isolated_atoms: Mapping[int, float]  # [eV] known beside its frames
    target: Target


def find_origins(
    name_or_path: str | os.PathLike,
    keys: LabelKeys | None = None,
    *,
    energy_reference: EnergyReference | None = None,
    data_energy_reference: EnergyReference | None = None,
    adsorption_references: str | os.PathLike | None = None,
    level_of_theory: str | None = None,
    target: Target | None = None,
) -> list[Origin]:
    """Where the frames of a data set are, of each that matches a pattern, without reading them.

    Arguments and errors as of :func:`load_dataset`; a folder of ``*.h5`` is each of these.
    """
    options: dict[str, Any] = dict(energy_reference=energy_reference, target=target)
    options |= dict(level_of_theory=level_of_theory, data_energy_reference=data_energy_reference)
    options |= dict(adsorption_references=adsorption_references)
    if names := _matching(str(name_or_path)):
        return [origin for name in names for origin in find_origins(name, keys, **options)]
    energies = energy_reference, data_energy_reference, adsorption_references
    source, path = _located(name_or_path, *energies, level_of_theory)
    if is_prepared(path):
        raise ValueError(f"{path} is prepared already; give the files it was made of.")
    if path.is_dir() and (files := sorted([*path.glob("*.h5"), *path.glob("*.hdf5")], key=_order)):
        return [origin for file in files for origin in find_origins(file, keys, **options)]
    named = source.name in DATASETS
    catalyst = is_catalyst(path)
    if catalyst and keys is not None:
        raise ValueError(f"{path} is data of OC20 or OC22, read by its own keys; leave out keys.")
    references = None
    if catalyst:  # rows of OC20 and OC22 may say; a registered name does
        stated = source.energy_reference if named else data_energy_reference
        if adsorption_references is not None:
            references = Path(adsorption_references).expanduser().resolve()
    else:
        stated = _of_plain(path, *energies) or source.energy_reference
    return [
        Origin(
            name=source.name,
            path=path,
            keys=source.keys if keys is None else keys,
            require=source.require,
            energy_reference=stated,
            references=references,
            converted_to=energy_reference if catalyst else None,
            level_of_theory=source.level_of_theory if level_of_theory is None else level_of_theory,
            isolated_atoms=_isolated_atoms(source) or {},
            target=source.target if target is None else target,
        )
    ]


def _order(path: Path) -> tuple[int, str]:
    """Files called ``train_<number>.h5`` in the order of the numbers."""
    digits = "".join(c if c.isdecimal() else " " for c in path.stem).split()
    return (int(digits[-1]) if digits else 0, path.name)


def _matching(pattern: str) -> list[str]:
    """Registered names that match a pattern; none for what is a name or a file itself."""
    if not set(pattern) & set("*?[") or pattern in DATASETS or Path(pattern).exists():
        return []
    return fnmatch.filter(DATASETS, pattern)


def list_datasets(pattern: str = "*") -> tuple[DatasetRow, ...]:
    """The registered data sets whose names match, and where each would be taken from."""
    return tuple(
        DatasetRow(
            s.name,
            _where(s),
            s.level_of_theory,
            s.energy_reference,
            s.licence,
            s.weights_releasable,
            s.notes,
        )
        for s in DATASETS.values()
        if fnmatch.fnmatchcase(s.name, pattern)
    )


def find_file(source: DataSource) -> Path:
    """The verified file of a data set, downloaded into the cache if nowhere else.

    Raises ``ValueError`` when its content is not what was registered, and when it is nowhere and
    has no public address; ``ConnectionError`` when the download fails.
    """
    if (path := _present(source)) is None:
        if source.url is None:
            raise ValueError(
                f"{source.name} is not on this machine and has no public address with these very "
                f"bytes. Original: {source.page} ({source.citation}) {source.notes} Put "
                f"{source.file} (or .xz) into a folder named in EQUIZOO_DATA."
            )
        return _download(source, cache_folder() / "data" / source.file)
    if source.sha256 is not None and (found := content_sha256(path)) != source.sha256:
        raise ValueError(
            f"{path} is not {source.name}: its content has SHA-256 {found}, expected "
            f"{source.sha256}. It is damaged or another version: delete it and fetch it again "
            f"({source.url or source.page})."
        )
    return path


def content_sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's decompressed content: equal for ``x.xyz`` and any ``x.xyz.xz``."""
    path = Path(path)
    try:
        with OPENERS[path.suffix if path.suffix in OPENERS else ""](path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
    except DAMAGE as error:
        raise ValueError(f"{path}: damaged or truncated ({error}). Fetch it again.") from error
    return digest.hexdigest()


def _folders(source: DataSource) -> dict[Where, list[Path]]:
    if source.bundled:
        return {"bundled": [BUNDLED]}
    named = [
        Path(f).expanduser() for f in os.environ.get("EQUIZOO_DATA", "").split(os.pathsep) if f
    ]
    return {"local": named, "cached": [cache_folder() / "data"]}


def _candidates(source: DataSource) -> Iterator[tuple[Where, Path]]:
    for kind, folders in _folders(source).items():
        for folder in folders:
            for suffix in OPENERS:
                path = folder / f"{source.file}{suffix}"
                if path.is_file():
                    yield kind, path


def _present(source: DataSource) -> Path | None:
    return next((path for _, path in _candidates(source)), None)


def _where(source: DataSource) -> Where:
    absent: Where = "download" if source.url else "missing"
    return next((kind for kind, _ in _candidates(source)), absent)


def _download(source: DataSource, target: Path) -> Path:
    """``target``, holding the verified content of ``source.url``; no trace of it after an error."""
    assert source.url is not None and source.num_bytes is not None  # stated together
    if not source.url.startswith("https://"):
        raise ValueError(f"{source.name}: {source.url} is not an https address.")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        request = Request(source.url, headers={"User-Agent": "equizoo"})
        with urlopen(request, timeout=60) as response:
            if not response.geturl().startswith("https://"):
                raise OSError(f"redirected to {response.geturl()}")
            content = response.read(source.num_bytes + 1)  # more than expected is enough
    except OSError as error:
        raise ConnectionError(
            f"{source.name} could not be fetched from {source.url} ({error}). Without a "
            f"network, put {source.file} into a folder and name that folder in EQUIZOO_DATA."
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if len(content) != source.num_bytes or found != source.sha256:
        raise ValueError(
            f"{source.url} is not {source.name}: got {len(content)} bytes with SHA-256 "
            f"{found}, expected {source.num_bytes} bytes with {source.sha256}. Try again; if "
            "it stays so, the public file has changed."
        )
    with written_whole(target) as partial:
        partial.write_bytes(content)
    return target


_BOTNET = "https://github.com/davkovacs/BOTNet-datasets"
_BOTNET_RAW = (
    "https://raw.githubusercontent.com/davkovacs/BOTNet-datasets/"
    "29e6d467317e4b5967b7ea5cbee54de953fa0d45/"
)
_BATATIA = "Batatia et al. 2022, https://arxiv.org/abs/2205.06643"
# What is common to the files of a folder; a longer prefix overrides a shorter one.
_COMMON = {
    "3bpa/": {
        "level_of_theory": "wB97X/6-31G(d)",
        "licence": "MIT",
        "citation": "Kovacs et al. 2021, https://doi.org/10.1021/acs.jctc.1c00647",
        "page": _BOTNET,
        "url": _BOTNET_RAW + "dataset_3BPA/",
        "isolated_atoms": {
            1: -13.587222780835477,
            6: -1029.4889999855063,
            7: -1484.9814568572233,
            8: -2041.9816003861047,
        },
    },
    "acac/": {
        "level_of_theory": "UHF-PBE-D3/def2-SVP",
        "licence": "MIT",
        "citation": _BATATIA,
        "page": _BOTNET,
        "url": _BOTNET_RAW + "dataset_acac/",
        "isolated_atoms": {
            1: -13.568422178253735,
            6: -1026.8538996116154,
            8: -2037.796869412825,
        },
    },
    "ethanol_extrap/": {
        "level_of_theory": "PBE/def2-SVP",
        "licence": "MIT (geometries CC0-1.0)",
        "citation": _BATATIA,
        "page": _BOTNET,
        "url": _BOTNET_RAW + "dataset_ethanol/",
        "isolated_atoms": {
            1: -13.568422383046626,
            6: -1025.2770951782686,
            7: -1479.0665594928669,
            8: -2035.5709809589698,
        },
    },
    "rmd17/": {
        "level_of_theory": "PBE/def2-SVP",
        "licence": "CC0-1.0",
        "citation": "Christensen & von Lilienfeld 2020, https://doi.org/10.1088/2632-2153/abba6f",
        "page": "https://doi.org/10.6084/m9.figshare.12672038",
        "isolated_atoms": {1: -13.568422, 6: -1025.277095, 7: -1479.066559, 8: -2035.570981},
        "notes": "Split 01, converted with 0.04336411531 eV per kcal/mol; isolated atoms from "
        "gncs/botnet. Never train on more than 1000 frames of a molecule.",
    },
    "mlearn/": {
        "level_of_theory": "PBE (VASP)",
        "licence": "BSD-3-Clause",
        "citation": "Zuo et al. 2020, https://doi.org/10.1021/acs.jpca.9b08723",
        "page": "https://github.com/materialsvirtuallab/mlearn (commit 10c427a5)",
        "require": ("energy", "forces", "stress"),
        "notes": "Stress converted from VASP's kB, in the order each element's files use. Up to "
        "29 % of the test frames are symmetry-equivalent to training frames.",
    },
    "mlearn/Li_": {
        "notes": "Stress converted from VASP's kB. Shear stresses of 2-atom cells are noise: do "
        "not score them. 3 of 29 test frames are symmetry-equivalent to training frames.",
    },
    "mlearn/Cu_train": {
        "licence": "BSD-3-Clause; NIST public service terms",
        "page": "https://github.com/usnistgov/alignn (commit a8be0bed), first 262 entries of Cu",
    },
    "mlearn/Ni_train": {
        "licence": "BSD-3-Clause; NIST public service terms",
        "page": "https://github.com/usnistgov/alignn (commit a8be0bed), first 263 entries of Ni",
    },
    "monbtaw/": {
        "level_of_theory": "PBE (VASP)",
        "licence": "BSD-3-Clause",
        "citation": "Li et al. 2020, npj Comput. Mater. 6, 70",
        "page": "https://github.com/materialsvirtuallab/maml (commit f7c0b6f6)",
        "require": ("energy", "forces", "stress"),
        "notes": "Stress converted from VASP's kB. 381 of 5282 training frames are "
        "symmetry-equivalent to another one; no test frame is.",
    },
    "water_deepmd/": {
        "level_of_theory": "unstated (presumed PBE0+TS)",
        "licence": "LGPL-3.0-or-later",
        "citation": "Zhang et al. 2018, Phys. Rev. Lett. 120, 143001",
        "page": "https://github.com/deepmodeling/deepmd-kit (commit bc902daf)",
        "weights_releasable": False,
        "notes": "Stored in float32: energies step by 2 meV. Net force up to 0.35 eV/Å. No stress.",
    },
    "phonon_rd/": {
        "level_of_theory": "PBEsol (VASP)",
        "licence": "BSD-3-Clause",
        "citation": "Togo & Seko 2024, J. Chem. Phys. 160, 211001",
        "page": "https://github.com/phonopy/phono3py (commit 2dc8200a)",
        "notes": "Random displacements; *_ideal is the undisplaced cell, without labels.",
    },
    "phonon_rd/KCl_": {
        "level_of_theory": "unstated (VASP)",
        "page": "https://github.com/phonopy/phonopy (commit 3a3e0f09)",
        "notes": "Displacements of 0.03 to 1.49 Å with forces up to 1720 eV/Å: filter, or use as a "
        "stress test.",
    },
    "oc20_relax/": {
        "level_of_theory": "RPBE (VASP)",
        "licence": "CC-BY-4.0",
        "citation": "Chanussot et al. 2021, ACS Catal. 11, 6059",
        "page": "https://github.com/facebookresearch/fairchem (commit c18e4215)",
        "weights_releasable": False,
        "notes": "Total energies, not adsorption energies. Relaxations with trial steps of up to "
        "356 eV/Å. Some systems could belong to a hidden test split of OC20.",
    },
    "oc20_relax/lmdb/is2re/train/": {"name": "oc20_relax/is2re_train", "target": Target.RELAXED},
    "oc22_sample/": {
        "level_of_theory": "PBE+U (VASP)",
        "licence": "CC-BY-4.0",
        "citation": "Tran et al. 2023, ACS Catal. 13, 3066",
        "page": "https://github.com/facebookresearch/fairchem (commit 63fe5e21)",
        "weights_releasable": False,
        "notes": "16 frames, for readers and not for accuracy.",
    },
}
# By folder: file, SHA-256 and size of its decompressed content.
_FILES = {
    "3bpa": """
test_300K.xyz 8678c4c2e3ce3d628faa0792ccaa9b60970ba5a13ce4db9de83f99bbe42622ef 5023260
train_300K.xyz d109971fab90e2231ad931a83eb704c8d940f5c7d7a8de27fe3b84ea18634c0a 1504880
""",
    "acac": """
test_MD_300K.xyz 2291f3186a3cc6a5e05e92952c84a9237ca53f862d78fd3316a769360719ec43 1144100
train_300K.xyz 8f5706d6902360555a5be59395612d2afc3489a75688388a58e7275fdad68af3 880100
""",
    "ethanol_extrap": """
test_MD.xyz b8726933d5b9083989d8e3cc7013c18e0950cf0cbc6f6cd570fdb9759001031c 1110863
train.xyz a26a16d8910581fa321fedc3bd3dfe31f2460e8cbfdc7a8f65243f4fd7250dd0 1115876
""",
    "rmd17": """
aspirin_train_01.xyz 1a4ab0c332176346ad5ba6d3218638e5ca699befdffaaf8fd87c217eb9a1c07a 2288601
azobenzene_test_01.xyz f7a9fb8fd4f1cf814fa3240a0cd13b92dd8c4433ceee4ca412892abd4978cdc9 2603795
azobenzene_train_01.xyz d4e0e8826e2e330abf372f83db32bd147a4b2f25bda525ce1029264a27ff0151 2603815
benzene_test_01.xyz f9bd478a15f158566c22d42497515dbfa98feaa1d00d7f54185900d657e8d928 1342992
benzene_train_01.xyz a7c305ba87e33c16b90d9c36f09c08c59ca8e2da01d442a1d793ba561e078154 1343009
ethanol_test_01.xyz 42dfa5c40ed0dcbfba1dfdbc11d002f512c54cb5e75204f0e0f46b87226a464d 1026968
ethanol_train_01.xyz 338e352281f4cf9efc9b63186555fb805e4b00797d3487cf498fb23be91d58bf 1026955
malonaldehyde_train_01.xyz 83248fa1c8ac911057f1a66349cf8c79ad1fef62fa80b54f0d9bf82363908321 1026974
naphthalene_test_01.xyz 3ca7ac460a96244e5977405e45e34a4618068e2df76d65aab0fb38c95864f770 1973797
naphthalene_train_01.xyz a09c9083995665e58385aa288e746e989ab4def43014af360ad3a5d2541a9e91 1973806
salicylic_test_01.xyz 116e9c7781542a1a9b3daf336de9771f9f9dfdfdcaa567ddaad282f502b60293 1763796
salicylic_train_01.xyz 36640f935c607200ed71b53e29cea66c5ca4bebf7e8c0b42bb07ee1e5eaf03d4 1763803
toluene_test_01.xyz db42ae75933b32bd826db2c6f757302d784a9d1bba870593465f9cd760ef7122 1657944
toluene_train_01.xyz 40956794a03a55d0cb5c7f0404d8cb4e8805dbafddc1d6c150c62a750c4328cb 1658005
""",
    "mlearn": """
Cu_test.xyz 0fa653fd016c2c123a7335b112d5c57bfcd5d3aa88354851c4f8c9aa53286883 346187
Cu_train.xyz 2ca5f034cce6d9864088bed6180869585a6936df9f6ceb2c633278e4f9fa3754 2968896
Li_test.xyz d17d2e0231564a285cd62f411f27f1887fc477b8a8b2eecf85f0b486331e5943 151231
Li_train.xyz 11e4889a6313fbe825c85a0e773cd74454e73ad1018e99619a31bf60b5efb827 1321464
Mo_train.xyz 6c5474840cf2f3083e1f1f48984423dc29e16b84aba78389d46f3c1521b376eb 1140059
Ni_test.xyz eb24027893191c32bb2650ce8bdf47caf0b76dd9322ed8e1a47f1507f8819d09 344245
Ni_train.xyz 25c548160c64f3077d5334cd617bf0e84c32ad071230cc77827b402a53bfdf57 2970677
Si_test.xyz 2068133291ad906c9963fbacd422f63308df2a76a13b474b97ff466d06655695 170566
Si_train.xyz 5ecca3ecc2bc433b584067176e9cea75d9385ab2f0de9020331e965178c3b1f8 1478612
""",
    "monbtaw": """
test_elements_binaries.xyz fbf4594ad2b35616e6f931ff736c35c9272b5c14917163aa5a42d05f188741fe 998190
train_binaries.xyz b38cbd9c8935b6d5083ef55a6f3e7d6aa623220f359b470dd18c0b24ec221fa6 7966710
train_elements.xyz 3d337e01e501b9675b8e8dc81d824a05bdae65424b48647e4ad45e33c5de80e7 5225328
""",
    "water_deepmd": """
train.xyz 198f637feedc1b4a5d0b78c267d6b250330eff7bf43b9d9004c11f8d9afbd84b 4884936
val.xyz 6e9216971914a02d8ea0f75ede3ba433db97eadcde30baecf7d74a23a471ed08 1628300
""",
    "phonon_rd": """
KCl_222_rattle_ideal.xyz 2ec168895abb66b080f8adb9a41409eff59e625bda61dccce6784f2a58719ef3 3600
NaCl_222_ideal.xyz e323726a2b6d717bd406a68e1a365b2d6b5d7944ef2f05a2b20cd48d562362b8 3630
NaCl_444_ideal.xyz c65f58816e8b296858614d494f4e4afd3718b181082c49f6c86ee3ea2f74d50f 27820
Si_111_ideal.xyz 6fa67e0c1b4df87ce120bb544618be96ecb210172bda21abd7dbe426b97799ea 579
Si_222_ideal.xyz fe3248d215d22075022f9696b8d2dfc327f805c4e64f2f1e2887067132c8756b 3607
KCl_222_rattle.xyz 91b61a14b6ba2a912a334859445f6ec9e7049ac56bd8625a2e980fa7f3e78610 825516
NaCl_222.xyz 13e688c5b5530c3365540d3a221ca93121ddd388dfade28aefc0db72f82cb7af 690991
NaCl_444.xyz ba6025331f25de805c1873eab0e86bbdfa5fc82cc3b0852388fe826a02b4408f 107898
Si_111.xyz 8fcd74f9a0e7ca2b8f0f77ad0027499a52a990c9229fea620d3e1a83761561a9 20039
Si_222.xyz 1ff7bf20b8dd46ffc3771228e66fb45c6d7fea86a7188b1872331df4440cabc9 13773
""",
    "oc20_relax": """
lmdb/is2re/train/data.lmdb 549d1135ffd9f436bf1ef6bcca88f5aadc2bef0111684a574282eb6cad035011 192512
s2ef_train/0.extxyz 33656b0d94332fc00ae1e9fc9ed064b1ef3eff66fd08a0e95b9191296151400f 37820745
s2ef_val/0.extxyz 0f6bd4653e31b89bf5fd7d2cda00145112ca1219eddc63d5202c0c08a3ff9509 2288577
""",
    "oc22_sample": """
oc22_train16.xyz aa6d4833e592d65efe7c0a4c724875b94aa50927653b13f39104f5988a333059 162955
""",
}


def _name(file: str) -> str:
    return str(Path(file).parent if Path(file).stem == "0" else Path(file).with_suffix(""))


def _sources():
    folder = "datasets/formamide_pbe_def2svp"
    for split in ("train", "test"):
        yield DataSource(
            name=f"formamide/{split}",
            file=f"{folder}/{split}.xyz",
            level_of_theory="PBE/def2-SVP",
            licence="CC0-1.0",
            citation="computed for equizoo",
            page=f"{folder}/README.md in the package",
            isolated_atoms=f"{folder}/isolated_atoms.xyz",
        )
    yield DataSource(
        name="mace-3bpa/replay",
        file="datasets/mace_3bpa_replay/frames.xyz",
        level_of_theory="predictions of mace-3bpa",
        licence="CC0-1.0",
        citation="computed for equizoo",
        page="datasets/mace_3bpa_replay/README.md in the package",
        notes="its labels are the model's own: errors are departures from mace-3bpa",
    )
    for line in (f"{d}/{row}" for d, rows in _FILES.items() for row in rows.strip().split("\n")):
        file, sha256, num_bytes = line.split()
        fields = {"name": _name(file)}
        for prefix in sorted(_COMMON):
            if file.startswith(prefix):
                fields |= _COMMON[prefix]
        if "url" in fields:
            fields["url"] += Path(file).name
        if "_ideal" in file:
            fields["require"] = ()
        yield DataSource(file=file, sha256=sha256, num_bytes=int(num_bytes), **fields)


DATASETS: Mapping[str, DataSource] = MappingProxyType({s.name: s for s in _sources()})
