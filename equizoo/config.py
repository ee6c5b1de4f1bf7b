"""Frozen dataclasses to and from JSON: the dataclass is the schema, nothing is declared twice.

Fields may be ``int``, ``float``, ``str``, ``bool``, ``None``, enums, ``Literal``, unions, tuples,
``dict[str, ...]`` and dataclasses of these; ``Any`` is taken as it stands. A class whose base
declares ``registry: ClassVar = <FolderRegistry>`` is *named*: it is written as
``{"<registry.key>": "<file name>", <fields>}`` and read by looking the name up, so a field
annotated with the base holds any of the registry's classes; the bare string ``"gaunt"`` is short
for ``{"name": "gaunt"}``.

A named class may declare ``format: ClassVar[int]``. The number is written next to the name; files
of an older format pass through ``upgrade_1_to_2(fields) -> fields`` and so on, functions in the
module of the class. A file without the number has format 1.
"""

import contextlib
import copy
import dataclasses
import difflib
import enum
import json
import math
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that names the closest known word, or else all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    listed = f" Known: {', '.join(known) or 'none'}."
    return f" Did you mean {close[0]!r}?{listed}" if close else listed


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as a JSON-able dict: ``from_dict(type(config), to_dict(config)) == config``.

    Raises ``ValueError`` where a field does not hold what its annotation says, since such a file
    could not be read back. Whole numbers in float fields are written as floats.
    """
    cls = type(config)
    return _encode(from_dict(cls, _encode(config), where=f"this {cls.__name__}"))


def from_dict(cls: type[T], mapping: Mapping[str, Any] | str, where: str = "config.json") -> T:
    """An instance of ``cls`` (for a base with a registry: of the class named in ``mapping``).

    Raises one ``ValueError`` that lists every unknown, missing, mistyped or invalid field by its
    path. Nothing is cast, except a whole number where a float is expected. Fields with a default
    may be absent.
    """
    problems: list[str] = []
    config = _decode(mapping, cls, "", problems)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(f"{where} does not describe a valid {cls.__name__}:\n{listed}")
    return config


def to_json(config: Any) -> str:
    """The text of a JSON file that :func:`from_json` reads back to an equal dataclass."""
    return format_json(to_dict(config))


def from_json(cls: type[T], text: str, where: str = "config.json") -> T:
    """An instance of ``cls`` from the text of a JSON file; errors as in :func:`from_dict`."""
    return from_dict(cls, parse_json(text, where), where)


def format_json(mapping: Mapping[str, Any]) -> str:
    """Indented JSON, in the order of ``mapping``; NaN and infinity raise ``ValueError``."""
    return json.dumps(mapping, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def parse_json(text: str, where: str) -> dict[str, Any]:
    """The one JSON object in ``text``; ``ValueError`` for anything else, NaN and infinity too."""

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        mapping = json.loads(text, parse_constant=refuse)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}.") from error
    if not isinstance(mapping, dict):
        raise ValueError(f"{where} holds a JSON {type(mapping).__name__}, expected an object {{}}.")
    return mapping


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        head = {}
        if (registry := getattr(value, "registry", None)) is not None:
            head[registry.key] = registry.name_of(value)
            if hasattr(value, "format"):
                head["format"] = value.format
        return head | {name: _encode(getattr(value, name)) for name in fields}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    return value


def _decode(value: Any, hint: Any, path: str, problems: list[str]) -> Any:
    """``value`` as an instance of ``hint``; meaningless if it appends to ``problems``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _decode_union(value, arguments, path, problems)
    if origin is tuple and isinstance(value, (list, tuple)):
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(arguments) == len(value):
            pairs = enumerate(zip(value, arguments, strict=True))
            return tuple(_decode(v, h, f"{path}[{i}]", problems) for i, (v, h) in pairs)
    elif origin in (dict, Mapping) and isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {k: _decode(v, arguments[1], _join(path, k), problems) for k, v in value.items()}
    elif origin is Literal:
        for allowed in arguments:
            if type(allowed) is type(value) and allowed == value:
                return allowed
    elif dataclasses.is_dataclass(hint) or hasattr(hint, "registry"):
        return _decode_dataclass(value, hint, path, problems)
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        for member in hint:
            if type(member.value) is type(value) and member.value == value:
                return member
        hint = Literal[tuple(member.value for member in hint)]
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):  # an integer that no float is
                if math.isfinite(number := float(value)):
                    return number
    elif hint in (int, str, bool, types.NoneType):
        if type(value) is hint:
            return value
    elif origin not in (tuple, dict, Mapping):
        raise TypeError(f"{path}: config fields cannot be annotated {hint}; see equizoo.config.")
    problems.append(f"{path or 'value'}: expected {_describe(hint)}, got {_received(value)}")


def _decode_union(value: Any, hints: tuple[Any, ...], path: str, problems: list[str]) -> Any:
    if value is None and types.NoneType in hints:
        return None
    hints = tuple(hint for hint in hints if hint is not types.NoneType)
    if len(hints) == 1:
        return _decode(value, hints[0], path, problems)
    for hint in hints:
        failures: list[str] = []
        decoded = _decode(value, hint, path, failures)
        if not failures:
            return decoded
    expected = " or ".join(_describe(hint) for hint in hints)
    problems.append(f"{path}: expected {expected}, got {_received(value)}")


def _decode_dataclass(value: Any, cls: Any, path: str, problems: list[str]) -> Any:
    before = len(problems)
    registry = getattr(cls, "registry", None)
    if registry is not None and isinstance(value, str):
        value = {registry.key: value}
    if not isinstance(value, Mapping):
        problems.append(f"{path or 'value'}: expected {_describe(cls)}, got {_received(value)}")
        return None
    value = dict(value)
    if registry is not None:
        cls = _named_class(value.pop(registry.key, None), cls, path, problems)
        if cls is None:
            return None
        if hasattr(cls, "format"):
            value = _upgrade(value, cls, path, problems)
            if value is None:
                return None
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for name in value:
        if name not in fields:
            problems.append(f"{_join(path, name)}: unknown field.{did_you_mean(str(name), fields)}")
    arguments = {}
    for name, field in fields.items():
        if name in value:
            arguments[name] = _decode(value[name], hints[name], _join(path, name), problems)
        elif field.default is field.default_factory is dataclasses.MISSING:
            problems.append(f"{_join(path, name)}: missing, expected {_describe(hints[name])}")
    if len(problems) == before:
        try:
            return cls(**arguments)
        except ValueError as error:
            problems.append(f"{path}: {error}" if path else str(error))


def _named_class(name: Any, cls: Any, path: str, problems: list[str]) -> type | None:
    registry = cls.registry
    path = _join(path, registry.key)
    if not isinstance(name, str):
        found = "missing" if name is None else f"got {_received(name)}"
        problems.append(f"{path}: {found}, expected one of {', '.join(registry)}")
    elif name not in registry:
        problems.append(f"{path}: unknown {name!r}.{did_you_mean(name, registry)}")
    elif not issubclass(registry[name], cls):
        problems.append(f"{path}: expected {registry.name_of(cls)!r}, got {name!r}")
    else:
        return registry[name]
    return None


def _upgrade(fields: dict, cls: Any, path: str, problems: list[str]) -> dict | None:
    path = _join(path, "format")
    fields = copy.deepcopy(fields)  # upgrades may edit nested objects, which are the caller's
    written = fields.pop("format", 1)
    if type(written) is not int or not 1 <= written <= cls.format:
        problems.append(
            f"{path}: expected 1 to {cls.format} for {cls.__name__}, got {written!r}. "
            "If a newer equizoo wrote the file, upgrade equizoo"
        )
        return None
    for old in range(written, cls.format):
        name = f"upgrade_{old}_to_{old + 1}"
        try:
            fields = getattr(sys.modules[cls.__module__], name)(fields)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            problems.append(f"{path}: {cls.__module__}.{name} failed: {error!r}")
            return None
    return fields


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(allowed) for allowed in typing.get_args(hint))
    if dataclasses.is_dataclass(hint) or hasattr(hint, "registry"):
        return f"the fields of {hint.__name__}"
    return hint.__name__ if type(hint) is type else str(hint)


def _received(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"
