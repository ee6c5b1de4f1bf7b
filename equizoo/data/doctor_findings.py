"""What a check of a data set says, and all of it together."""

import dataclasses
import enum
from collections.abc import Iterable, Sequence
from typing import Any

from equizoo.structure import Structure

_EXAMPLES = 5


class Verdict(enum.StrEnum):
    """How much a finding matters.

    ``error``: training on this learns something false, or a reported error means nothing.
    ``warning``: probably not meant. ``note``: good to know. ``cannot tell``: the data do not hold
    what the check needs. ``fine``: checked, nothing found.
    """

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"
    CANNOT_TELL = "cannot tell"
    FINE = "fine"


_ORDER = tuple(Verdict)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that a check found: how many frames, which for example, and the likely fix."""

    check: str
    verdict: Verdict
    message: str
    count: int = 0  # frames concerned, or what the message counts
    examples: tuple[str, ...] = ()  # names of frames, "file.xyz[12]"
    fix: str = ""

    def __str__(self) -> str:
        where = f" ({', '.join(self.examples)})" if self.examples else ""
        fix = f" {self.fix}" if self.fix else ""
        return f"{self.check}: {self.message}{where}.{fix}"


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """All findings on a data set, the gravest first."""

    name: str
    frames: int
    findings: tuple[Finding, ...]

    def of(self, verdict: Verdict) -> tuple[Finding, ...]:
        """The findings with this verdict."""
        return tuple(f for f in self.findings if f.verdict == verdict)

    @property
    def errors(self) -> tuple[Finding, ...]:
        return self.of(Verdict.ERROR)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return self.of(Verdict.WARNING)

    def with_findings(self, more: Iterable[Finding]) -> "Diagnosis":
        """These findings and ``more``."""
        findings = sorted([*self.findings, *more], key=lambda f: _ORDER.index(f.verdict))
        return dataclasses.replace(self, findings=tuple(findings))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and words, for JSON."""
        counts = {verdict.value: len(self.of(verdict)) for verdict in Verdict}
        findings = [dataclasses.asdict(finding) for finding in self.findings]
        return {"data": self.name, "frames": self.frames, "counts": counts, "findings": findings}


def named(structures: Sequence[Structure], chosen: Iterable[Any]) -> tuple[str, ...]:
    """Names of the first few of the frames with these indices."""
    indices = [int(i) for i in chosen][:_EXAMPLES]
    return tuple(structures[i].name or f"frame {i}" for i in indices)
