"""What a training run must know of all frames at once, from one pass over them.

Sums and largest values, so that parts of a data set are counted apart and added.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from jaxtyping import Float

from equizoo.graph import Frame
from equizoo.neighbors import NeighborLimit
from equizoo.structure import Structure

LABELS = ("energy", "forces", "stress")
_ROWS = 256  # compositions that are held before they are reduced


@dataclasses.dataclass(frozen=True)
class NeighborRule:
    """Which atoms are neighbours: those within a cutoff, or of them the nearest ones."""

    cutoff: float  # [Å]
    limit: NeighborLimit | None = None

    def __post_init__(self):
        if not self.cutoff > 0:
            raise ValueError(f"cutoff is {self.cutoff}, expected a positive length in Å.")

    def __str__(self) -> str:
        nearest = "" if self.limit is None else f", of them the {self.limit.count} nearest"
        return f"within {self.cutoff:g} Å{nearest}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of frames with their neighbours: what the shape of a batch is chosen from."""

    frames: int = 0
    nodes: int = 0  # atoms of all frames
    edges: int = 0  # neighbours of all atoms, each pair twice
    most_nodes: int = 0  # of one frame
    most_edges: int = 0  # of one frame
    max_in: int = 0  # neighbours of one atom
    max_out: int = 0  # atoms that one atom is a neighbour of
    elements: tuple[int, ...] = ()

    @classmethod
    def of(cls, frames: Iterable[Frame]) -> "Sizes":
        """Counted over frames, one at a time."""
        total = cls()
        for frame in frames:
            total = total + cls(
                frames=1,
                nodes=frame.num_nodes,
                edges=frame.num_edges,
                most_nodes=frame.num_nodes,
                most_edges=frame.num_edges,
                max_in=frame.max_in,
                max_out=frame.max_out,
                elements=tuple(np.unique(frame.structure.atomic_numbers).tolist()),
            )
        return total

    def __add__(self, other: "Sizes") -> "Sizes":
        """Those of both sets of frames together."""
        return Sizes(
            frames=self.frames + other.frames,
            nodes=self.nodes + other.nodes,
            edges=self.edges + other.edges,
            most_nodes=max(self.most_nodes, other.most_nodes),
            most_edges=max(self.most_edges, other.most_edges),
            max_in=max(self.max_in, other.max_in),
            max_out=max(self.max_out, other.max_out),
            elements=tuple(sorted({*self.elements, *other.elements})),
        )

    @property
    def mean_neighbors(self) -> float:
        """Neighbours per atom."""
        return self.edges / self.nodes


class Triangle(NamedTuple):
    """A least-squares problem reduced to as many rows as it has unknowns, with equal solutions.

    ``R`` of the QR decomposition of [compositions | energies]: reducing it again with more rows is
    as exact as decomposing all rows together, which squaring them (normal equations) is not.
    """

    elements: tuple[int, ...]  # atomic numbers, sorted; one column each
    rows: Float[np.ndarray, "rows columns"]  # the last column: energies [eV]

    @property
    def counts(self) -> Float[np.ndarray, "rows elements"]:
        return self.rows[:, :-1]

    @property
    def energies(self) -> Float[np.ndarray, " rows"]:  # [eV]
        return self.rows[:, -1]

    @classmethod
    def of(cls, structures: Sequence[Structure]) -> "Triangle":
        """The compositions and energies of those structures that have an energy."""
        labelled = [s for s in structures if s.energy is not None]
        tallies = [Counter(s.atomic_numbers.tolist()) for s in labelled]
        elements = tuple(sorted(set().union(*tallies)))
        rows = np.array(
            [[*(t[z] for z in elements), s.energy] for t, s in zip(tallies, labelled, strict=True)],
            np.float64,
        )
        return cls(elements, rows.reshape(len(labelled), len(elements) + 1)).reduced()

    def reduced(self) -> "Triangle":
        if len(self.rows) <= self.rows.shape[1]:
            return self
        return Triangle(self.elements, np.asarray(np.linalg.qr(self.rows, mode="r")))

    def __add__(self, other: object) -> "Triangle":
        """The problem of both sets of structures together."""
        assert isinstance(other, Triangle)
        elements = tuple(sorted({*self.elements, *other.elements}))
        parts = []
        for part in (self, other):
            rows = np.zeros((len(part.rows), len(elements) + 1))
            columns = [elements.index(z) for z in part.elements] + [-1]
            rows[:, columns] = part.rows
            parts.append(rows)
        return Triangle(elements, np.concatenate(parts)).reduced()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """Counts over all frames of a data set; written to JSON, see :meth:`to_dict`."""

    rule: NeighborRule
    sizes: Sizes
    atoms: Mapping[str, int]  # by chemical symbol
    labels: Mapping[str, int]  # frames that have energy, forces, stress
    squared_forces: float  # [eV^2/Å^2] sum over components
    force_components: int
    compositions: Triangle

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that occur, sorted."""
        return self.sizes.elements

    @property
    def forces_rms(self) -> float | None:  # [eV/Å]
        if not self.force_components:
            return None
        return float(np.sqrt(self.squared_forces / self.force_components))

    def __add__(self, other: "Statistics") -> "Statistics":
        """Those of both sets of frames together, which have neighbours by the same rule."""
        if self.rule != other.rule:
            raise ValueError(
                f"Neighbours were counted {self.rule} and {other.rule}; expected one rule. "
                "Prepare both with the same cutoff."
            )
        return Statistics(
            rule=self.rule,
            sizes=self.sizes + other.sizes,
            atoms=_added(self.atoms, other.atoms),
            labels=_added(self.labels, other.labels),
            squared_forces=self.squared_forces + other.squared_forces,
            force_components=self.force_components + other.force_components,
            compositions=self.compositions + other.compositions,
        )

    def to_dict(self) -> dict:
        """Plain values that :meth:`from_dict` reads back, every number as it was."""
        sizes = dataclasses.asdict(self.sizes)
        return {
            "frames": sizes.pop("frames"),
            "elements": {symbol: self.atoms[symbol] for symbol in _symbols(sizes.pop("elements"))},
            "labels": dict(self.labels),
            "neighbors": rule_to_dict(self.rule),
            "sizes": sizes,
            "squared_forces": self.squared_forces,
            "force_components": self.force_components,
            "compositions": {
                "elements": list(_symbols(self.compositions.elements)),
                "rows": self.compositions.rows.tolist(),
            },
        }

    @classmethod
    def from_dict(cls, fields: Mapping) -> "Statistics":
        elements = tuple(sorted(atomic_numbers[symbol] for symbol in fields["elements"]))
        stored = fields["compositions"]
        columns = tuple(atomic_numbers[symbol] for symbol in stored["elements"])
        rows = np.array(stored["rows"], np.float64).reshape(len(stored["rows"]), len(columns) + 1)
        return cls(
            rule=rule_from_dict(fields["neighbors"]),
            sizes=Sizes(frames=fields["frames"], elements=elements, **fields["sizes"]),
            atoms=dict(fields["elements"]),
            labels=dict(fields["labels"]),
            squared_forces=fields["squared_forces"],
            force_components=fields["force_components"],
            compositions=Triangle(columns, rows),
        )


class Counting:
    """Statistics in the making, one frame at a time; what it holds does not grow with them."""

    def __init__(self, rule: NeighborRule):
        self._rule = rule
        self._sizes = Sizes()
        self._atoms: Counter[str] = Counter()
        self._labels = Counter(dict.fromkeys(LABELS, 0))
        self._squares, self._components = 0.0, 0
        self._triangle = Triangle.of([])
        self._held: list[Structure] = []

    def add(self, frame: Frame) -> None:
        structure = frame.structure
        self._sizes = self._sizes + Sizes.of([frame])
        self._atoms.update(_symbols(structure.atomic_numbers.tolist()))
        self._labels.update({k: int(getattr(structure, k) is not None) for k in LABELS})
        if structure.forces is not None:
            self._squares += float(np.sum(structure.forces**2))
            self._components += structure.forces.size
        self._held.append(structure)
        if len(self._held) == _ROWS:
            self._reduce()

    def result(self) -> Statistics:
        self._reduce()
        return Statistics(
            rule=self._rule,
            sizes=self._sizes,
            atoms=dict(self._atoms),
            labels=dict(self._labels),
            squared_forces=self._squares,
            force_components=self._components,
            compositions=self._triangle,
        )

    def _reduce(self) -> None:
        self._triangle = self._triangle + Triangle.of(self._held)
        self._held.clear()


def rule_to_dict(rule: NeighborRule) -> dict:
    """The rule as plain values."""
    limit = None if rule.limit is None else dataclasses.asdict(rule.limit)
    return {"cutoff": rule.cutoff, "limit": limit}


def rule_from_dict(fields: Mapping) -> NeighborRule:
    """The inverse of :func:`rule_to_dict`."""
    limit = fields["limit"]
    return NeighborRule(fields["cutoff"], None if limit is None else NeighborLimit(**limit))


def _added(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in {**a, **b}}


def _symbols(numbers: Iterable[int]) -> tuple[str, ...]:
    return tuple(chemical_symbols[z] for z in numbers)
