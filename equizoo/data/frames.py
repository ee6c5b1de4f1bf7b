"""Files to ASE frames, each with its name; a file that ends inside a frame gives nothing at all."""

import bz2
import fnmatch
import functools
import gzip
import io
import itertools
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

from ase import Atoms

from equizoo.data.hdf5 import HDF5, iter_hdf5

OPENERS: Mapping[str, Callable[..., Any]] = {
    "": open,
    ".xz": lzma.open,
    ".gz": gzip.open,
    ".bz2": bz2.open,
}
# File name -> ASE format. Each is text, JSON, SQLite or plain arrays; none unpickles or runs code.
FORMATS = {
    "*.extxyz": "extxyz",
    "*.xyz": "extxyz",
    "*.traj": "traj",
    "*.db": "db",
    "*.h5": HDF5,
    "*.hdf5": HDF5,
    "*.json": "json",
    "*.cif": "cif",
    "*.xsf": "xsf",
    "*.pwo": "espresso-out",
    "*vasprun*.xml": "vasp-xml",
    "*outcar*": "vasp-out",
    "*xdatcar*": "vasp-xdatcar",
    "*poscar*": "vasp",
    "*contcar*": "vasp",
    "*.vasp": "vasp",
}
DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError)


class Frame(NamedTuple):
    """Atoms as ASE reads them."""

    name: str  # "file.xyz[12]"
    atoms: Atoms
    # Of extended XYZ: the items as they stand, before ASE takes the stress to Voigt.
    comment: Mapping[str, Any] = MappingProxyType({})


def file_format(path: Path) -> tuple[str, str]:
    """Compression suffix and ASE format by the file's name."""
    compression = path.suffix if path.suffix in OPENERS else ""
    stem = path.name.removesuffix(compression).lower()
    for pattern, ase_format in FORMATS.items():
        if fnmatch.fnmatch(stem, pattern):
            if compression and ase_format != "extxyz":
                raise ValueError(f"{path}: only .xyz and .extxyz are read compressed; unpack it.")
            return compression, ase_format
    raise ValueError(
        f"{path}: unknown format; expected one of {', '.join(FORMATS)} (xyz also with .xz, .gz, "
        ".bz2). Formats that can run code when opened are never read: convert the file to .extxyz."
    )


def read_frames(path: Path, index: str | int | slice) -> list[Frame]:
    """The frames of a file that ``index`` chooses; ``ValueError`` when it is damaged or empty."""
    compression, ase_format = file_format(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected structures to read. Check the path.")
    if ase_format == "extxyz":
        texts = _select(list(xyz_texts(path, compression)), index)
        frames = [parse_xyz(text, f"{path}[{i}]", f"{path.name}[{i}]") for i, text in texts]
    else:
        frames = [make() for _, make in _select(list(iter_frames(path)), index)]
    if not frames:
        raise ValueError(f"{path} holds no frames (index {index!r}); expected at least one.")
    return frames


def _select(items: list, index: str | int | slice) -> list[tuple[int, Any]]:
    from ase.io.formats import string2index

    pairs = list(enumerate(items))
    # ASE annotates the result with the argument's type too.
    chosen = cast(int | slice, string2index(index)) if isinstance(index, str) else index
    if isinstance(chosen, slice):
        return pairs[chosen]
    if not -len(pairs) <= chosen < len(pairs):
        raise ValueError(f"index {index} is outside the file's {len(pairs)} frames.")
    return [pairs[chosen]]


def iter_frames(path: Path) -> Iterator[Callable[[], Frame]]:
    """What makes each frame of a file, in order; those not called for are hardly read.

    Raises ``ValueError`` where the file is damaged, after the frames before that place.
    """
    compression, ase_format = file_format(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected structures to read. Check the path.")
    if ase_format == "extxyz":
        for i, text in enumerate(xyz_texts(path, compression)):
            yield functools.partial(parse_xyz, text, f"{path}[{i}]", f"{path.name}[{i}]")
    elif ase_format == HDF5:
        for i, read in enumerate(iter_hdf5(path)):
            yield functools.partial(_named, f"{path.name}[{i}]", read)
    else:
        for i, atoms in enumerate(_iter_with_ase(path, ase_format)):
            yield functools.partial(Frame, f"{path.name}[{i}]", atoms)


def _named(name: str, read: Callable[[], Atoms]) -> Frame:
    return Frame(name, read())


def _iter_with_ase(path: Path, ase_format: str) -> Iterator[Atoms]:
    count = 0
    try:
        if ase_format in ("db", "json"):
            import ase.db

            with ase.db.connect(path, type=ase_format, serial=True) as rows:
                for row in rows.select():
                    atoms = row.toatoms()
                    atoms.info |= {**row.key_value_pairs, **row.data}
                    yield atoms
                    count += 1
        else:
            from ase.io import iread

            options: dict[str, Any] = dict(parallel=False, do_not_split_by_at_sign=True)
            for atoms in iread(str(path), ":", format=ase_format, **options):
                yield atoms
                count += 1
    except Exception as error:  # ASE's parsers raise nearly anything on a damaged file
        raise ValueError(
            f"{path}: damaged, truncated or not {ase_format}; reading stopped after "
            f"{count} frames ({type(error).__name__}: {error})."
        ) from error


def xyz_texts(path: Path, compression: str) -> Iterator[str]:
    """The text of every frame. ASE's reader stops silently at an empty line; this one does not."""
    held = ""  # the frame before, which lines of cell vectors may still follow
    count = 0
    try:
        with OPENERS[compression](path, "rt", encoding="utf-8-sig") as lines:
            for line in lines:
                if not line.strip():
                    continue
                if line.lstrip().startswith("VEC") and held:  # cell vectors as pseudo-atoms
                    held += line
                    continue
                if held:
                    yield held
                if not line.strip().isdecimal():
                    raise ValueError(
                        f"{path}[{count}]: expected the number of atoms, got "
                        f"{line.strip()[:60]!r}. Is the atom count of the frame before it right?"
                    )
                body = list(itertools.islice(lines, int(line) + 1))
                if len(body) <= int(line) or _last_number_is_cut(body):
                    raise ValueError(
                        f"{path}[{count}]: the file ends inside this frame of "
                        f"{int(line)} atoms. It is truncated, or the atom count is wrong."
                    )
                held = line + "".join(body)
                count += 1
    except DAMAGE as error:
        raise ValueError(
            f"{path}: damaged or truncated after frame {count - 1} ({error}). Fetch it again."
        ) from error
    if held:
        yield held


def _last_number_is_cut(body: list[str]) -> bool:
    """Whether the file ends without a newline in rows of one width, the last of them shorter."""
    if len(body) < 4 or body[-1].endswith("\n"):
        return False
    *rows, last = (row.rstrip() for row in body[1:])
    return len({len(row) for row in rows}) == 1 and len(last) < len(rows[0])


def parse_xyz(text: str, where: str, name: str) -> Frame:
    """The frame in a text of :func:`xyz_texts`; ``ValueError`` naming ``where`` if it is none."""
    from ase.io.extxyz import key_val_str_to_dict, read_xyz

    comment: dict[str, Any] = {}

    def parse(line: str) -> dict[str, Any]:
        comment.update(key_val_str_to_dict(line))
        return dict(comment)

    try:
        _check_columns(text)
        (atoms,) = read_xyz(io.StringIO(text), slice(0, 1), properties_parser=parse)
    except Exception as error:  # ASE's parser raises nearly anything on a damaged frame
        raise ValueError(f"{where}: not a frame of extended XYZ ({error}).") from error
    return Frame(name, atoms, comment)


def _check_columns(text: str) -> None:
    """ASE drops surplus columns, which come from a wrong ``Properties`` or a wrong atom count."""
    _, comment, *rows = text.removesuffix("\n").split("\n")
    if match := re.search(r'Properties\s*=\s*"?([^\s"]+)', comment):
        expected = sum(int(columns) for columns in match[1].split(":")[2::3])
        for i, row in enumerate(rows):
            if len(row.split()) != expected and not row.lstrip().startswith("VEC"):
                raise ValueError(
                    f"atom {i} has {len(row.split())} columns, Properties asks for {expected}"
                )
