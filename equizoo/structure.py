"""One frame of atomistic data on the host, in float64, with the labels it really has."""

import dataclasses
import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from jaxtyping import Bool, Float, Int

_Item = TypeVar("_Item")


def symbols(elements: Iterable[int]) -> str:
    """Chemical symbols of atomic numbers, with commas."""
    return ", ".join(chemical_symbols[z] for z in elements)


def spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most ``count`` of the items, evenly from first to last."""
    indices = np.linspace(0, len(items) - 1, min(count, len(items)))
    return [items[index] for index in np.unique(indices.round().astype(int)).tolist()]


class EnergyReference(enum.StrEnum):
    """What an energy is measured against; two different ones are never compared or mixed.

    ``total``: all electrons (or valence electrons), as the electronic-structure code prints it.
    ``adsorption``: adsorbed system minus clean surface minus gas-phase references (OC20).
    ``formation``: relative to the elements in their reference phases.
    ``atomisation``: relative to isolated atoms at the same level of theory.
    """

    TOTAL = "total"
    ADSORPTION = "adsorption"
    FORMATION = "formation"
    ATOMISATION = "atomisation"


def require_same_reference(a: EnergyReference, b: EnergyReference, what: str) -> None:
    """Raises ``ValueError`` when two energy references differ; ``what`` names the operation."""
    if a != b:
        raise ValueError(
            f"{what} would mix two energy references, {a.value!r} and {b.value!r}. "
            "Convert the data to the model's reference, or choose a model with the data's."
        )


USUAL_STATE = {"charge": 0.0, "spin": 1.0, "head": None}  # of a structure that says nothing of it


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """Atoms in a cell with optional labels. A label that is absent is ``None``, never zero.

    Arrays are float64 and read-only by agreement; build altered copies with
    ``dataclasses.replace``. Raises ``ValueError`` on non-finite numbers, mismatched lengths, or a
    periodic cell without volume.
    """

    atomic_numbers: Int[np.ndarray, " nodes"]
    positions: Float[np.ndarray, "nodes 3"]  # [Å]
    cell: Float[np.ndarray, "3 3"]  # [Å] rows are lattice vectors, zeros if aperiodic
    pbc: tuple[bool, bool, bool] = (False, False, False)
    energy: float | None = None  # [eV]
    forces: Float[np.ndarray, "nodes 3"] | None = None  # [eV/Å]
    stress: Float[np.ndarray, "3 3"] | None = None  # [eV/Å^3] tension positive
    charge: float = 0.0  # [e] of the whole structure
    spin: float = 1.0  # multiplicity 2S + 1
    head: str | None = None  # of a model with several; None: the one it is asked for
    name: str = ""  # where the frame came from, for error messages: "file.xyz[12]"
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # carried; see also free

    def __post_init__(self):
        where = f"Structure {self.name or '(unnamed)'}"
        nodes = len(self.atomic_numbers)
        if nodes == 0:
            raise ValueError(f"{where} has no atoms; expected at least one.")
        if (self.atomic_numbers < 1).any() or (self.atomic_numbers > 118).any():
            raise ValueError(f"{where}: atomic numbers must lie in 1..118; remove dummy atoms 'X'.")
        for label, array, shape in (
            ("positions", self.positions, (nodes, 3)),
            ("cell", self.cell, (3, 3)),
            ("forces", self.forces, (nodes, 3)),
            ("stress", self.stress, (3, 3)),
            ("energy", self.energy, ()),
            ("charge", self.charge, ()),
            ("spin", self.spin, ()),
        ):
            if array is None:
                continue
            if np.shape(array) != shape:
                raise ValueError(f"{where}: {label} has shape {np.shape(array)}, expected {shape}.")
            if not np.isfinite(array).all():
                raise ValueError(
                    f"{where}: {label} holds NaN or infinity. Drop the frame, or remove the label "
                    "so that it counts as absent."
                )
        if any(self.pbc):
            periodic = self.cell[list(self.pbc)]
            gram = np.linalg.det(periodic @ periodic.T)
            scale = np.prod(np.sum(periodic**2, axis=1))
            if not gram > 1e-10 * scale:
                raise ValueError(
                    f"{where}: periodic along {self.pbc} but the lattice vectors there are zero or "
                    "parallel (zero volume). Set the cell, or pbc=False."
                )

    def __getstate__(self) -> dict[str, Any]:
        # for worker processes: a mapping proxy cannot be sent
        return {**self.__dict__, "info": dict(self.info)}

    @property
    def num_nodes(self) -> int:
        return len(self.atomic_numbers)

    @property
    def state(self) -> dict[str, Any]:
        """Charge, spin and head, as :func:`state_of` has them."""
        return {"charge": self.charge, "spin": self.spin, "head": self.head}

    @property
    def free(self) -> Bool[np.ndarray, " nodes"]:
        """The atoms that ``info["fixed"]``, one number or truth value for each, does not hold."""
        fixed = np.asarray(self.info.get("fixed"))
        if fixed.shape != (self.num_nodes,) or fixed.dtype.kind not in "biuf":
            return np.ones(self.num_nodes, bool)  # none, or something of the file's own
        return fixed == 0

    @classmethod
    def from_atoms(cls, atoms: Atoms, name: str = "") -> "Structure":
        """A structure without labels: results of an attached calculator are not labels.

        ``atoms.info`` may hold ``charge`` [e], ``spin`` (multiplicity) and ``head``.
        """
        a, b, c = (bool(p) for p in atoms.pbc)
        return cls(
            atomic_numbers=np.array(atoms.numbers, dtype=np.int64),
            positions=np.array(atoms.positions, dtype=np.float64),
            cell=np.array(atoms.cell.array, dtype=np.float64),
            pbc=(a, b, c),
            name=name,
            **state_of(atoms.info),
        )

    def to_atoms(self) -> Atoms:
        """ASE atoms with the labels present as results of a ``SinglePointCalculator``.

        ``atoms.info`` has ``charge``, ``spin`` and ``head`` where they are not the usual ones.
        """
        from ase.calculators.singlepoint import SinglePointCalculator
        from ase.stress import full_3x3_to_voigt_6_stress

        atoms = Atoms(self.atomic_numbers, self.positions, cell=self.cell, pbc=self.pbc)
        state = self.state.items()
        atoms.info |= {key: value for key, value in state if value != USUAL_STATE[key]}
        stress = None if self.stress is None else full_3x3_to_voigt_6_stress(self.stress)
        results = {"energy": self.energy, "forces": self.forces, "stress": stress}
        results = {key: value for key, value in results.items() if value is not None}
        if results:
            atoms.calc = SinglePointCalculator(atoms, **results)
        return atoms


def state_of(info: Mapping[str, Any]) -> dict[str, Any]:
    """The fields ``charge``, ``spin`` and ``head`` of a structure as far as ``info`` has them.

    Anything else under these keys (a file may use them for something of its own, such as a charge
    per atom) is left alone.
    """
    state: dict[str, Any] = {}
    for key in ("charge", "spin"):
        value = np.asarray(info.get(key))
        if value.dtype.kind in "iuf" and value.shape == () and np.isfinite(value):
            state[key] = float(value)
    if isinstance(head := info.get("head"), str):
        state["head"] = head
    return state
