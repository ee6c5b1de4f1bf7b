"""The certificate of a potential: checks of what it claims, as data, as text, as part of a card."""

import dataclasses
import enum
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from equizoo.config import format_json, from_dict, to_dict
from equizoo.eval.potential import DTYPES


class Verdict(enum.StrEnum):
    """What came of a check."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_CLAIMED = "not claimed"
    NOT_RUN = "not run"


@dataclasses.dataclass(frozen=True)
class Check:
    """One property: what was measured, what was allowed, and how it was done.

    ``values`` with a limit of the same name must not exceed it. Names end in the unit;
    ``relative`` ones are errors over the largest value of their kind.
    """

    name: str
    verdict: Verdict
    values: Mapping[str, float]
    limits: Mapping[str, float]
    how: str

    @classmethod
    def of(
        cls,
        name: str,
        values: Mapping[str, float],
        limits: Mapping[str, float],
        how: str,
        claimed: bool = True,
    ) -> "Check":
        """The check with its verdict; NaN fails."""
        within = all(values[key] <= limit for key, limit in limits.items() if key in values)
        verdict = Verdict.PASSED if within else Verdict.FAILED
        finite = {key: float(value) for key, value in values.items() if np.isfinite(value)}
        kept = {key: float(value) for key, value in limits.items() if key in values}
        return cls(name, verdict if claimed else Verdict.NOT_CLAIMED, finite, kept, how)

    @classmethod
    def left_out(cls, name: str, reason: str) -> "Check":
        return cls(name, Verdict.NOT_RUN, {}, {}, reason)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is done; everything is stated in the certificate."""

    frames: int = 4  # of the structures given, spread evenly, beside two generated ones
    turns: int = 4  # rotations, reflections, translations and orders of atoms for each
    timestep: float | None = None  # [fs] None: 0.5 where there is hydrogen, else 1
    nve_picoseconds: float = 2.0  # 0: left out
    md_picoseconds: float = 5.0  # 0: left out
    temperatures: tuple[float, ...] = (300.0, 500.0)  # [K]
    friction: float = 10.0  # [1/ps] of the thermostat
    replicas: int = 4  # structures in dynamics, at once
    dtype: str = "float32"  # of dynamics
    seed: int = 0

    def __post_init__(self):
        sizes = (self.frames, self.turns, self.replicas)
        if min(sizes) < 1 or min(self.nve_picoseconds, self.md_picoseconds) < 0:
            raise ValueError(
                f"frames, turns and replicas are {sizes}, dynamics last {self.nve_picoseconds} and "
                f"{self.md_picoseconds} ps; expected at least one each, and no negative time."
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}.")


@dataclasses.dataclass(frozen=True)
class Certificate:
    """All checks of one set of weights on one machine."""

    model: str
    sha256: str | None  # of model.safetensors
    structures: str  # where those of the checks come from
    settings: Settings
    device: str
    versions: Mapping[str, str]
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that claims did not stand."""
        return tuple(check.name for check in self.checks if check.verdict is Verdict.FAILED)

    def save(self, path: str | Path) -> None:
        """Writes the JSON that :meth:`load` reads."""
        Path(path).write_text(format_json(to_dict(self)), "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Certificate":
        """The certificate in a file; ``ValueError`` when it is none."""
        return from_dict(cls, json.loads(Path(path).read_text("utf-8")), str(path))

    def rows(self) -> list[tuple[str, str, str, str]]:
        """For tables: property, verdict, largest figures with their limits, how it was measured."""
        return [(c.name, str(c.verdict), "; ".join(_figures(c)), c.how) for c in self.checks]

    def front_matter(self) -> list[dict[str, Any]]:
        """For a card: a row for each check, with the words ``check`` and ``verdict``, and the
        numbers that had a limit, whose names end in their unit."""
        return [
            {"check": c.name, "verdict": str(c.verdict)}
            | {key: float(f"{c.values[key]:.3g}") for key in c.limits if key in c.values}
            for c in self.checks
        ]

    def markdown(self) -> str:
        """The section of a card."""
        lines = ["| property | verdict | measured |", "| --- | --- | --- |"]
        lines += [f"| {name} | {verdict} | {text} |" for name, verdict, text, _ in self.rows()]
        settings = self.settings
        lines += [
            "",
            f"Structures: {self.structures}. Seed {settings.seed}. Device: {self.device}. "
            + ", ".join(f"{name} {number}" for name, number in self.versions.items())
            + ".",
            "",
            *(f"- {name}: {how}." for name, _, _, how in self.rows() if how),
        ]
        return "\n".join(lines) + "\n"


def _figures(check: Check) -> list[str]:
    """Every value as "forces float64 3.2e-11 meV/Å (at most 1e-9)"."""
    figures = []
    for key, value in check.values.items():
        limit = f" (at most {check.limits[key]:.3g})" if key in check.limits else ""
        figures.append(f"{shown(key, value)}{limit}")
    return figures


def shown(key: str, value: float) -> str:
    """``forces_float64_meV_per_A: 3.2e-11`` as "forces float64 3.2e-11 meV/Å"."""
    name, unit = key, ""
    for suffix, symbol in UNITS.items():
        if key.endswith(suffix):
            name, unit = key.removesuffix(suffix), f" {symbol}".rstrip()
            break
    return f"{name.replace('_', ' ')} {value:.3g}{unit}"


UNITS = {  # ends of names, longest first
    "_meV_per_atom_per_ps": "meV/atom/ps",
    "_meV_per_atom": "meV/atom",
    "_meV_per_A3": "meV/Å³",
    "_meV_per_A": "meV/Å",
    "_meV": "meV",
    "_K": "K",
    "_fs": "fs",
    "_ps": "ps",
    "_relative": "of the largest",
}
