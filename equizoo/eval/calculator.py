"""A potential as an ASE calculator."""

from collections.abc import Sequence

from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from equizoo.compile_cache import use_compile_cache
from equizoo.eval.packing import budget_with_headroom
from equizoo.eval.potential import DTYPES, Potential
from equizoo.graph import Budget, Frame
from equizoo.structure import state_of

HEADROOM = 1.25  # of the number of neighbours, over what the structure has when first seen


class EquizooCalculator(Calculator):
    """Energy, forces and stress of a potential for ASE's dynamics and relaxations.

    Room for a quarter more neighbours is kept, so that a run compiles once, and again only when the
    structure has become denser than that. ``stress`` exists for cells periodic along all three
    axes (xx, yy, zz, yz, xz, xy, tension positive), ``energies`` are per atom with reference
    energies. Compiled programs are kept for the next process, see
    :func:`equizoo.compile_cache.use_compile_cache`.
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]

    def __init__(self, potential: Potential, dtype: str = "float32"):
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
        use_compile_cache()
        self.potential, self.dtype = potential, dtype
        self._budgets: dict[int, Budget] = {}  # by number of atoms

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Fills ``results``; all properties come from one evaluation. Errors as in ``predict``."""
        super().calculate(atoms, properties, system_changes)
        frame = self.potential.frame(self.atoms, "atoms")
        prediction = self.potential.evaluate_batch([frame], self._budget(frame), self.dtype)
        (result,) = self.potential.results([frame], prediction)
        self.results = {
            "energy": result.energy,
            "free_energy": result.energy,
            "energies": result.node_energies,
            "forces": result.forces,
        }
        if result.stress is not None:
            self.results["stress"] = full_3x3_to_voigt_6_stress(result.stress)

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What has changed since the last evaluation, charge, spin and head in ``info`` too."""
        changes = super().check_state(atoms, tol)
        if self.atoms is not None and state_of(self.atoms.info) != state_of(atoms.info):
            changes.append("info")
        return changes

    def _budget(self, frame: Frame) -> Budget:
        budget = self._budgets.get(frame.num_nodes)
        if budget is None or not budget.fits([frame]):
            budget = self._budgets[frame.num_nodes] = budget_with_headroom(
                frame, HEADROOM, self.potential.config.cost_of_flat
            )
        return budget
