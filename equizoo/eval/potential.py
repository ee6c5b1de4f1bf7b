"""A model with its physics around it: energies, forces and stress of structures of any size."""

import contextlib
import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.data import atomic_numbers as number_of
from ase.data import chemical_symbols
from flax import nnx
from jaxtyping import Float

from equizoo import hub
from equizoo.config import from_dict, to_dict
from equizoo.eval.golden import check_golden_outputs, golden_outputs
from equizoo.eval.packing import BudgetSet, pack
from equizoo.graph import Budget, Frame, Graph, batch_frames, unbatch_nodes
from equizoo.host_memory import keep_freed_memory
from equizoo.hub_client import HubAccess, Upload
from equizoo.registry import ARCHITECTURES, MODELS, find_model_folder
from equizoo.structure import EnergyReference, Structure, symbols
from equizoo.zoo._base import (
    Architecture,
    ArchitectureConfig,
    Kernels,
    Prediction,
    energy_forces_stress,
)

DTYPES = ("float32", "float64")
BATCH_NODES = 512  # atoms in a batch, padding included
_WINDOW = 16  # batches whose frames are held at a time


class Result(NamedTuple):
    """What a potential says of one structure."""

    energy: float  # [eV] with reference energies
    forces: Float[np.ndarray, "nodes 3"]  # [eV/Å]
    # [eV/Å^3] None unless periodic along all three axes, and for models with direct forces
    stress: Float[np.ndarray, "3 3"] | None
    node_energies: Float[np.ndarray, " nodes"]  # [eV] with reference energies

    def label(self, structure: Structure) -> Structure:
        """``structure`` with energy, forces and stress from here, whatever labels it had."""
        return dataclasses.replace(
            structure, energy=self.energy, forces=self.forces, stress=self.stress
        )


class Potential:
    r"""A trained architecture, its reference energies, and what its energies are measured against.

    .. math:: E = \sum_i (E^0_{Z_i} + \epsilon_i)

    The network gives :math:`\epsilon_i` in ``float32`` or ``float64``; reference energies are added
    and the sum is taken in float64 on the host. Programs are compiled once per dtype and static
    shape, and shared by :meth:`predict` and all calculators. Weights are those that ``model`` has
    when the potential is made.

    A model with several heads has reference energies and a level of theory for each, by its name.
    ``head`` (the first unless given) answers for structures that name none.

    Raises ``ValueError`` when ``reference_energies`` are not those of exactly the model's elements,
    or the model has state that is not a parameter.
    """

    def __init__(
        self,
        model: Architecture,
        *,
        # [eV] by atomic number; with several heads, such a mapping for each of them
        reference_energies: Mapping[int, float] | Mapping[str, Mapping[int, float]],
        energy_reference: EnergyReference,
        level_of_theory: str | Mapping[str, str],
        name: str = "",
        card: str | None = None,
        head: str | None = None,
        source: Mapping[str, str] | None = None,
    ):
        self.model = model
        self.config: ArchitectureConfig = model.config
        self.energy_reference = EnergyReference(energy_reference)
        self.name = name or ARCHITECTURES.name_of(model.config)
        self.card = card
        self.source = dict(source or {})  # file and SHA-256 that weights were converted from
        self.revision: str | None = None  # the Hub's commit that it was loaded from
        self._set_heads(
            {
                key: _checked_energies(energies, self.config)
                for key, energies in _by_head(reference_energies, self.config).items()
            },
            _by_head(level_of_theory, self.config),
        )
        self._choose_head(self.config.heads[0] if head is None else head)
        # elements whose reference energies are those of others; see with_new_elements
        self.placeholders: frozenset[int] = frozenset()
        self.force_bound: float | None = None  # [eV/Å] of an inference form; see compile
        self.inference: InferenceForm | None = None  # what compile has found out
        self._form: Potential | None = None
        self._graphdef, self._params = _split(model)
        self._params_in: dict[str, nnx.State] = {}
        self._forget_programs()

    def __repr__(self) -> str:
        fields = ", ".join(f"{key}={value!r}" for key, value in self.describe().items())
        return f"Potential({fields})"

    @property
    def num_programs(self) -> int:
        """How many programs have been compiled so far, over all shapes and dtypes."""
        return len(self._traces)

    def model_sha256(self) -> str:
        """A digest of all that predictions depend on: equal for equal models.

        Weights in the order of their names, the configuration, reference energies of all heads and
        what they are measured against, and the head in use.
        """
        digest = hashlib.sha256()
        for array in jax.tree.leaves(jax.device_get(self._params)):
            digest.update(np.ascontiguousarray(array).tobytes())
        energies = {head: sorted(of_head.items()) for head, of_head in self._energies.items()}
        facts = self.config, sorted(energies.items()), str(self.energy_reference), self.head
        digest.update(repr(facts).encode())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What one needs to know before use, in words and numbers; JSON-able."""
        config = self.config
        several = {"heads": list(config.heads), "head": self.head} if len(config.heads) > 1 else {}
        return {
            "name": self.name,
            "architecture": ARCHITECTURES.name_of(config),
            "elements": [chemical_symbols[z] for z in config.atomic_numbers],
            "cutoff_A": config.cutoff,
            "parameters": sum(array.size for array in jax.tree.leaves(self._params)),
            "level_of_theory": self.level_of_theory,
            "energy_reference": str(self.energy_reference),
            "symmetry": str(config.symmetry),
            "smooth": config.smooth,
            "conservative": config.conservative,
            **({} if self.revision is None else {"revision": self.revision}),
            **({} if self.force_bound is None else {"force_bound_eV_A": self.force_bound}),
            **several,
        }

    def with_reference_energies(
        self,
        reference_energies: Mapping[int, float],  # [eV] by atomic number
        level_of_theory: str,
    ) -> "Potential":
        """The same network at another level of theory; compiled programs are shared.

        Of a model with several heads, the one in use.
        """
        other = copy.copy(self)
        energies = _checked_energies(reference_energies, self.config)
        other._set_heads(
            self._energies | {self.head: energies}, self._levels | {self.head: level_of_theory}
        )
        other.card, other.placeholders = None, frozenset()
        other._choose_head(self.head)
        other._form = None
        return other

    def with_parameters(self, params: nnx.State, name: str) -> "Potential":
        """The same model with other weights, trained further, and no card yet."""
        self._refuse_inference_form("with_parameters")
        model = nnx.merge(nnx.graphdef(self.model), params)
        other = self._with_model(model, self._energies)
        other.name, other.card, other.source = name, None, {}
        return other

    @property
    def isolated_energies(self) -> Float[np.ndarray, "heads species"]:  # [eV]
        """Reference energies, for each head in the order of the model's elements."""
        return self._isolated

    # ---- parts of a model

    def with_head(self, head: str) -> "Potential":
        """The same model, answering with another of its heads; compiled programs are shared."""
        other = copy.copy(self)
        other._choose_head(head)
        other._form = None
        return other

    def only_head(self) -> "Potential":
        """The model with the head in use alone, equal to rounding: to continue training it."""
        self._refuse_inference_form("only_head")
        if len(self.config.heads) == 1:
            return self
        return self._with_model(self.model.with_head(self.head), self.reference_energies)

    def with_elements(self, elements: Iterable[str]) -> "Potential":
        """The model for some of its elements (chemical symbols) alone, equal to rounding.

        It is smaller: tables of the other elements are gone. Raises ``ValueError`` for elements
        that the model does not have, and architectures that cannot be cut.
        """
        self._refuse_inference_form("with_elements")
        known = {chemical_symbols[z]: z for z in self.config.atomic_numbers}
        elements = list(elements)
        if unknown := sorted(set(elements) - set(known)):
            raise ValueError(
                f"The model does not have {', '.join(unknown)}; expected some of "
                f"{', '.join(known)}."
            )
        model = self.model.with_elements([known[symbol] for symbol in elements])
        kept = set(model.config.atomic_numbers)
        energies = {
            head: {z: e for z, e in energies.items() if z in kept}
            for head, energies in self._energies.items()
        }
        return self._with_model(model, energies)

    def with_new_elements(self, like: Mapping[str, str]) -> "Potential":
        """The model with further elements (chemical symbols), to be trained on data that have them.

        Each starts as a copy of the element of the model that it is ``like``, its reference energy
        included, which stands for nothing (:attr:`placeholders`) until
        :meth:`with_reference_energies` replaces it. Predictions without them equal those of before,
        to rounding. Raises ``ValueError`` for elements that the model has already, and where those
        that they are to be like are not the model's.
        """
        self._refuse_inference_form("with_new_elements")
        known = self.config.atomic_numbers
        if wrong := [s for s in (*like, *like.values()) if s not in chemical_symbols[1:]]:
            raise ValueError(f"{wrong} are no chemical symbols; expected e.g. {{'Si': 'C'}}.")
        origins = {number_of[new]: number_of[old] for new, old in like.items()}
        if already := sorted(set(origins) & set(known)):
            raise ValueError(f"The model knows {symbols(already)} already; leave them out.")
        if missing := sorted(set(origins.values()) - set(known)):
            raise ValueError(
                f"The model does not know {symbols(missing)}, which new elements are to be like; "
                f"expected some of {symbols(known)}."
            )
        model = self.model.with_elements([*known, *origins], origins)
        energies = {
            head: {z: energies[origins.get(z, z)] for z in model.config.atomic_numbers}
            for head, energies in self._energies.items()
        }
        larger = self._with_model(model, energies)
        larger.card, larger.placeholders = None, self.placeholders | set(origins)
        return larger

    def compile(
        self,
        elements: Iterable[str] | None = None,
        tolerance: float = 1e-5,  # [eV/Å]
    ) -> "Potential":
        """The inference form: the same predictions from less work, with a bound on the error.

        Radial networks become splines, whose energies are smooth and whose forces are exact
        derivatives. On a CPU with llvmlite sums over neighbours are machine code that takes its
        weights from them (see :meth:`with_kernels`); elsewhere the first layer sums before there
        are channels. With ``elements`` (chemical symbols), of these alone.

        :attr:`force_bound` of the result [eV/Å] is ten times the largest difference of a force
        component to this potential, both in float64, on generated structures that hold all elements
        (:func:`equizoo.eval.inference.probes`), for every head; in a structure with a force
        above 10 eV/Å in proportion to its largest. Measured, not proven, for other structures.
        Without ``elements`` calculators of this potential use the form from then on where the bound
        is below what float32 changes, see :meth:`calculator`. The form cannot be saved, changed or
        trained; its head and reference energies can be exchanged.

        Compiles three programs at least, to compare them. Raises ``ValueError`` when the bound
        cannot be brought down to ``tolerance``, and for models that have no such form.
        """
        from equizoo.eval.inference import measured_form  # which builds on this module

        self._refuse_inference_form("compile")
        chosen = self if elements is None else self.with_elements(elements)
        form, chosen.inference = measured_form(chosen, tolerance)
        form.force_bound, chosen._form = chosen.inference.force_bound, form
        return form

    def with_kernels(self, kernels: Kernels | str) -> "Potential":
        """The same potential with sums over neighbours by other ``kernels``: ``native`` is machine
        code of our own, on the CPU, faster and equal to rounding (MACE).

        Its config says so, and it can be saved and loaded anywhere: where there is no such code
        XLA does the same. Raises ``ValueError`` for kernels that the architecture does not have, or
        on a CPU without llvmlite.
        """
        self._refuse_inference_form("with_kernels")
        other = self._with_model(self.model.with_kernels(Kernels(kernels)), self._energies)
        other.revision = self.revision
        return other

    def with_inference_form(self, tolerance: float) -> "Potential":
        """:meth:`compile` to a ``tolerance`` relative to radial functions; nothing is measured."""
        self._refuse_inference_form("with_inference_form")
        form = self._with_model(self.model.inference_form(tolerance), self._energies)
        form.revision, form.force_bound = self.revision, np.inf
        return form

    def _refuse_inference_form(self, what: str) -> None:
        if self.force_bound is not None:
            raise ValueError(
                f"{what} is not for the inference form of a model, whose parameters are tables; "
                "do it with the potential that was compiled, and compile the result."
            )

    def _with_model(self, model: Architecture, energies: Any) -> "Potential":
        levels = {head: self._levels[head] for head in model.config.heads}
        other = Potential(
            model,
            reference_energies=energies,
            energy_reference=self.energy_reference,
            level_of_theory=levels,
            name=self.name,
            card=self.card,
            head=self.head,
            source=self.source,
        )
        other.placeholders = self.placeholders & set(model.config.atomic_numbers)
        return other

    def _set_heads(
        self, energies: Mapping[str, Mapping[int, float]], levels: Mapping[str, str]
    ) -> None:
        self._energies, self._levels = dict(energies), dict(levels)
        rows = [list(self._energies[head].values()) for head in self.config.heads]
        self._isolated = np.array(rows, np.float64)  # [eV] by head and species

    def _choose_head(self, head: str) -> None:
        self.config.head_index(head)  # or it raises
        self.head = head
        self.reference_energies = dict(self._energies[head])
        self.level_of_theory = self._levels[head]

    # ---- predictions

    @overload
    def predict(
        self,
        atoms: Atoms | Structure,
        *,
        dtype: str = ...,
        batch_nodes: int = ...,
        progress: bool = ...,
    ) -> Result: ...

    @overload
    def predict(
        self,
        atoms: Iterable[Atoms | Structure],
        *,
        dtype: str = ...,
        batch_nodes: int = ...,
        progress: bool = ...,
    ) -> list[Result]: ...

    def predict(
        self,
        atoms: Atoms | Structure | Iterable[Atoms | Structure],
        *,
        dtype: str = "float32",
        batch_nodes: int = BATCH_NODES,
        progress: bool = False,
    ) -> Result | list[Result]:
        """Energy, forces and stress of one structure, or a list of them in the order given.

        Raises ``ValueError`` for an element that the model does not know, positions that are not
        finite, a periodic cell without volume, and when there is nothing to predict.
        """
        if isinstance(atoms, (Atoms, Structure)):
            return next(self.predict_stream([atoms], dtype=dtype, batch_nodes=batch_nodes))
        stream = self.predict_stream(atoms, dtype=dtype, batch_nodes=batch_nodes, progress=progress)
        results = list(stream)
        if not results:
            raise ValueError(
                "predict got no structures; expected ase.Atoms, a Structure, or an iterable of "
                "them with at least one."
            )
        return results

    def predict_stream(
        self,
        structures: Iterable[Atoms | Structure],
        *,
        dtype: str = "float32",
        batch_nodes: int = BATCH_NODES,
        progress: bool = False,
        budgets: BudgetSet | None = None,
    ) -> Iterator[Result]:
        """The results one after the other, in order; holds a few batches in memory at a time.

        The shapes of batches, and with them the last digits, depend on what was predicted before.
        With ``budgets``, see :meth:`plan_budgets`, they depend on those and the structures alone.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
        if batch_nodes < 2:
            raise ValueError(f"batch_nodes is {batch_nodes}, expected at least 2.")
        frames = (self.frame(s, f"structures[{i}]") for i, s in enumerate(structures))
        first_window = True
        with _progress_bar(progress, structures) as advance:
            while window := _take(frames, _WINDOW * batch_nodes):
                yield from self._predict_window(
                    window, dtype, batch_nodes, first_window, budgets or self._budgets[dtype]
                )
                advance(len(window))
                first_window = False

    def plan_budgets(
        self, structures: Iterable[Atoms | Structure], *, batch_nodes: int = BATCH_NODES
    ) -> BudgetSet:
        """The shapes of batches that suit ``structures``; nothing is compiled."""
        budgets = BudgetSet.of(self.config)
        frames = [self.frame(s, f"structures[{i}]") for i, s in enumerate(structures)]
        for members in pack(frames, batch_nodes):
            budgets.choose([frames[index] for index in members], batch_nodes, remainder=False)
        return budgets

    def _predict_window(
        self,
        frames: Sequence[Frame],
        dtype: str,
        batch_nodes: int,
        first_window: bool,
        budgets: BudgetSet,
    ) -> list[Result]:
        batches = pack(frames, batch_nodes)
        running = []
        for number, members in enumerate(batches):
            held = [frames[index] for index in members]
            last = number == len(batches) - 1
            remainder = last and not (first_window and number == 0)
            budget = budgets.choose(held, batch_nodes, remainder=remainder)
            running.append(self.evaluate_batch(held, budget, dtype))
        results: dict[int, Result] = {}
        for members, prediction in zip(batches, running, strict=True):
            cut = self.results([frames[index] for index in members], prediction)
            results.update(zip(members, cut, strict=True))
        return [results[index] for index in range(len(frames))]

    def frame(self, structure: Any, name: str = "", skin: float = 0.0) -> Frame:
        """The structure (or ``ase.Atoms``) with its neighbours; ``name`` is for error messages.

        ``skin`` [Å] as in :meth:`equizoo.zoo._base.ArchitectureConfig.frame`.
        """
        if isinstance(structure, Atoms):
            structure = Structure.from_atoms(structure, name)
        elif not isinstance(structure, Structure):
            raise ValueError(
                f"{name or 'structure'} is a {type(structure).__name__}, expected ase.Atoms or "
                "equizoo.structure.Structure."
            )
        head = self.head
        if structure.head is not None and len(self.config.heads) > 1:
            head = structure.head
        return self.config.frame(structure, head, skin)

    def budget(self, frames: Sequence[Frame], dtype: str, batch_nodes: int) -> Budget:
        """The static shape that :meth:`predict` evaluates such a batch in."""
        return self._budgets[dtype].choose(frames, batch_nodes, remainder=False)

    def evaluate_batch(self, frames: Sequence[Frame], budget: Budget, dtype: str) -> Prediction:
        """The network's output for one padded batch, still on the device."""
        with numerics(dtype):
            graph = batch_frames(frames, budget, np.dtype(dtype).type)
            return self._program(self._params_as(dtype), graph)

    def results(self, frames: Sequence[Frame], prediction: Prediction) -> list[Result]:
        """The outputs of a batch cut into structures, reference energies added."""
        forces, stress, interaction = jax.device_get(
            (prediction.forces, prediction.stress, prediction.node_energies)
        )
        forces = unbatch_nodes(np.asarray(forces, np.float64), frames)
        interaction = unbatch_nodes(np.asarray(interaction, np.float64), frames)
        results = []
        for index, frame in enumerate(frames):
            nodes = interaction[index] + self._isolated[frame.head, frame.species]
            has_stress = stress is not None and all(frame.structure.pbc)
            results.append(
                Result(
                    energy=float(nodes.sum()),
                    forces=forces[index],
                    stress=np.asarray(stress[index], np.float64) if has_stress else None,
                    node_energies=nodes,
                )
            )
        return results

    def recompiled(self) -> "Potential":
        """The same potential, with no program compiled yet."""
        other = copy.copy(self)
        other._forget_programs()
        return other

    def network(self, dtype: str) -> tuple[Callable[[Any, Graph], Prediction], Any]:
        """What a batch is evaluated with, to be traced into larger programs, and its parameters.

        Energies are without reference energies. Trace and run it under :func:`numerics`.
        """
        graphdef = self._graphdef

        def evaluate(params: Any, graph: Graph) -> Prediction:
            return energy_forces_stress(nnx.merge(graphdef, params), graph)

        with numerics(dtype):
            return evaluate, self._params_as(dtype)

    def _forget_programs(self) -> None:
        self._budgets = {dtype: BudgetSet.of(self.config) for dtype in DTYPES}
        self._traces: list[int] = []  # nodes of every program compiled
        self._program = jax.jit(self._trace)

    def _trace(self, params, graph) -> Prediction:
        self._traces.append(graph.num_nodes)  # Python runs once per compilation, not per call
        return energy_forces_stress(nnx.merge(self._graphdef, params), graph)

    def _params_as(self, dtype: str):
        if dtype not in self._params_in:
            self._params_in[dtype] = jax.tree.map(lambda x: jnp.asarray(x, dtype), self._params)
        return self._params_in[dtype]

    # ---- ASE and files

    def calculator(self, dtype: str = "float32") -> Calculator:
        """An ASE calculator that shares this potential's compiled programs.

        In float32 it has the inference form if :meth:`compile` was called, now or before the model
        was saved, and found its bound to be below what float32 itself changes. To have one or the
        other: ``potential.compile().calculator()`` and ``EquizooCalculator(potential)``.
        """
        from equizoo.eval.calculator import EquizooCalculator

        known = self.inference
        if dtype != "float32" or known is None or not known.force_bound < known.rounding:
            return EquizooCalculator(self, dtype)
        if self._form is None:
            self._form = self.with_inference_form(known.tolerance)
            self._form.force_bound = known.force_bound
        return EquizooCalculator(self._form, dtype)

    def save(self, folder: str | Path, golden: bool = True) -> str:
        """Writes a model folder that :func:`load` reads back exactly; the SHA-256 of the weights.

        ``golden`` adds a few generated structures with their outputs, which loading checks. Raises
        ``ValueError`` when the folder exists and is not empty, and while reference energies of new
        elements mean nothing; an inference form, which is made anew from the saved model.
        """
        self._refuse_inference_form("save")
        if self.placeholders:
            raise ValueError(
                f"The model has no reference energies for {symbols(sorted(self.placeholders))} "
                "yet; fine-tune it, or give them with with_reference_energies."
            )
        block: dict[str, Any] = {
            "energy_reference": str(self.energy_reference),
            "level_of_theory": self.level_of_theory,
            "reference_energies": _by_symbol(self.reference_energies),
        }
        if self.source:
            block["source"] = self.source
        if self.inference is not None:
            block["inference"] = dataclasses.asdict(self.inference)
        if len(self.config.heads) > 1:
            block["head"] = self.head
            block["heads"] = {
                head: {
                    "level_of_theory": self._levels[head],
                    "reference_energies": _by_symbol(self._energies[head]),
                }
                for head in self.config.heads
            }
        flat = nnx.to_flat_state(self._params)
        return hub.save_folder(
            folder,
            config=to_dict(self.config) | {"potential": block},
            arrays={_key(path): np.asarray(param[...]) for path, param in flat},
            card=self.card,
            golden=golden_outputs(self.predict, self.config) if golden else {},
        )

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> Upload | None:
        """:meth:`save` under the name that libraries of the Hub have for it.

        With ``push_to_hub`` also :meth:`push_to_hub` with ``options``, to ``repo_id`` or else the
        name of the folder. Nothing is overwritten: raises ``ValueError`` when the folder exists and
        is not empty, and for options without ``push_to_hub``.
        """
        if (options or repo_id) and not push_to_hub:
            given = ", ".join([*options, *(["repo_id"] if repo_id else [])])
            raise ValueError(f"{given} given without push_to_hub=True; expected both or neither.")
        self.save(save_directory)
        return (
            self.push_to_hub(repo_id or Path(save_directory).name, **options)
            if push_to_hub
            else None
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push model using equizoo",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        parent_commit: str | None = None,
        tag: str | None = None,
    ) -> Upload:
        """Where the model is on the Hugging Face Hub afterwards: configuration, weights, golden
        outputs and card, in one commit of ``repo_id`` (made if it is not there).

        Raises as :func:`equizoo.hub_client.upload_files` does.
        """
        from equizoo.eval.publish import push  # which builds on this module

        options = dict(private=private, token=token, branch=branch, create_pr=create_pr)
        options |= dict(parent_commit=parent_commit, tag=tag)
        return push(self, repo_id, message=commit_message, **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        check_golden: bool = True,
    ) -> "Potential":
        """:func:`load` with the keywords that libraries of the Hub have; a folder, a released
        model, or ``organisation/name`` on the Hub."""
        spec = str(pretrained_model_name_or_path)
        if ":" not in spec and spec.count("/") == 1 and not Path(spec).expanduser().exists():
            spec = f"hf-hub:{spec}"
        if revision is not None:
            spec = f"{spec}@{revision}"
        access = HubAccess(token, cache_dir, force_download, local_files_only)
        return load(spec, check_golden=check_golden, access=access)


@dataclasses.dataclass(frozen=True)
class InferenceForm:
    """What :meth:`Potential.compile` has found out about a model."""

    tolerance: float  # of radial functions, relative, that it took
    force_bound: float  # [eV/Å] see Potential.compile
    rounding: float  # [eV/Å] the largest difference between float32 and float64, likewise


@dataclasses.dataclass(frozen=True)
class _HeadBlock:
    """One of several heads."""

    level_of_theory: str
    reference_energies: dict[str, float]  # [eV] by chemical symbol


@dataclasses.dataclass(frozen=True)
class _PotentialBlock:
    """The key ``potential`` of config.json; what is not under ``heads`` is of the head in use."""

    energy_reference: EnergyReference
    level_of_theory: str
    reference_energies: dict[str, float]  # [eV] by chemical symbol
    head: str | None = None
    heads: dict[str, _HeadBlock] = dataclasses.field(default_factory=dict)
    source: dict[str, str] = dataclasses.field(default_factory=dict)
    inference: InferenceForm | None = None


def load(
    spec: str | Path,
    *,
    check_golden: bool = True,
    head: str | None = None,
    trust: bool = False,
    accept_license: str | None = None,
    access: HubAccess = HubAccess(),  # noqa: B008 - frozen
) -> Potential:
    """The potential that ``spec`` names: a released model, a folder, ``hf-hub:organisation/name``.

    With ``check_golden`` the outputs stored with the model are reproduced first. ``head`` chooses
    among those of a model with several; ``access`` says how the Hub is reached (token, cache).

    Some released models are other people's checkpoints (``entry.checkpoint``), converted on this
    machine when first loaded and then kept. Opening such a checkpoint runs code that it brings,
    which ``trust=True`` allows, and needs mace-torch; ``accept_license`` names its licence where
    that has terms to agree to (``entry.license_weights``).

    Raises ``ValueError`` when the folder is incomplete, its arrays are not those that its
    configuration asks for (all problems listed), or the outputs differ; see
    :func:`equizoo.registry.find_model_folder` for names.
    """
    keep_freed_memory()
    if str(spec) in MODELS and MODELS[str(spec)].checkpoint is not None:
        from equizoo.eval.checkpoints import ensure_converted  # which builds on this module

        ensure_converted(MODELS[str(spec)], trust=trust, accept_license=accept_license)
    folder = find_model_folder(spec, access=access)
    contents = hub.load_folder(folder)
    where = str(folder / hub.CONFIG)
    config_dict = dict(contents.config)
    block = config_dict.pop("potential", None)
    if block is None:
        raise ValueError(
            f"{where} has no 'potential'; expected energy_reference, level_of_theory and "
            "reference_energies under that key. Write the folder with Potential.save."
        )
    config = from_dict(ArchitectureConfig, config_dict, where)
    block = from_dict(_PotentialBlock, block, f"'potential' in {where}")
    heads: Mapping[str, _HeadBlock | _PotentialBlock] = block.heads or {config.heads[0]: block}
    if unknown := sorted(
        set().union(*(b.reference_energies for b in heads.values())) - {*number_of}
    ):
        raise ValueError(f"{where}: reference_energies of unknown elements {', '.join(unknown)}.")
    if set(heads) != set(config.heads):
        raise ValueError(
            f"{where}: 'potential' has heads {', '.join(heads)}, expected those of the model, "
            f"{', '.join(config.heads)}."
        )
    potential = Potential(
        _rebuild(config, contents.arrays, str(folder / hub.WEIGHTS)),
        reference_energies={
            name: {number_of[s]: e for s, e in part.reference_energies.items()}
            for name, part in heads.items()
        },
        energy_reference=block.energy_reference,
        level_of_theory={name: part.level_of_theory for name, part in heads.items()},
        name=_name(spec, folder),
        card=contents.card,
        head=block.head,
        source=block.source,
    )
    potential.inference = block.inference
    if potential.card is None and str(spec) in MODELS:  # not in its folder in the package
        potential.card = MODELS.text(str(spec))
    if folder.parent.name == "snapshots":  # of the Hub's cache, where folders are named by commit
        potential.revision = folder.name
    if check_golden:
        check_golden_outputs(potential.predict, contents.golden, str(folder / hub.GOLDEN))
    return potential if head is None else potential.with_head(head)


def describe(spec: str | Path) -> dict[str, Any]:
    """What there is to know of a model before use, without compiling it; see :func:`load`.

    Of a checkpoint that is still to be fetched and converted it is what its card says.
    """
    entry = MODELS.get(str(spec))
    if entry is None or entry.checkpoint is None or entry.source != "checkpoint":
        return load(spec, check_golden=False).describe()
    return {
        "name": entry.name,
        "architecture": entry.architecture,
        "elements": list(entry.elements),
        "cutoff_A": entry.cutoff,
        "level_of_theory": entry.level_of_theory,
        "energy_reference": str(entry.energy_reference),
        "checkpoint": entry.checkpoint.address,
    }


def _rebuild(
    config: ArchitectureConfig, arrays: Mapping[str, np.ndarray], where: str
) -> Architecture:
    abstract = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    graphdef, params = _split(abstract)
    flat = nnx.to_flat_state(params)
    expected = {_key(path): tuple(param.shape) for path, param in flat}
    hub.check_keys({key: array.shape for key, array in arrays.items()}, expected, where)
    with jax.enable_x64(True):  # else float64 weights would be rounded on the way in
        values = [(path, param.replace(jnp.asarray(arrays[_key(path)]))) for path, param in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(values))


def _split(model: Architecture):
    params = nnx.state(model, nnx.Param)
    known = {path for path, _ in nnx.to_flat_state(params)}
    everything = [path for path, _ in nnx.to_flat_state(nnx.state(model))]
    if other := [_key(path) for path in everything if path not in known]:
        raise ValueError(
            f"{type(model).__name__} has state beside its parameters: {', '.join(other)}; expected "
            "nnx.Param only. Recompute constants from the config where they are used."
        )
    return nnx.graphdef(model), params


def _key(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)


def _name(spec: str | Path, folder: Path) -> str:
    name, _, _ = str(spec).partition("@")
    if name in MODELS:
        return name
    return name.removeprefix("hf-hub:") if name.startswith("hf-hub:") else folder.resolve().name


def _by_head(value: Any, config: ArchitectureConfig) -> dict[str, Any]:
    """One thing for each head, as given by name or, where there is one head, by itself."""
    named = isinstance(value, Mapping) and value and all(isinstance(key, str) for key in value)
    found = dict(value) if named else {config.heads[0]: value}
    if set(found) != set(config.heads):
        raise ValueError(
            f"Reference energies and level of theory are given for {', '.join(found)}; expected "
            f"them for each of the model's heads {', '.join(config.heads)}. Potential.only_head "
            "makes a model with one."
        )
    return {head: found[head] for head in config.heads}


def _by_symbol(energies: Mapping[int, float]) -> dict[str, float]:
    return {chemical_symbols[z]: energy for z, energy in energies.items()}


def _checked_energies(energies: Mapping[int, float], config: ArchitectureConfig):
    """In the order of the model's elements."""
    difference = set(energies) ^ set(config.atomic_numbers)
    if difference or not all(np.isfinite(energy) for energy in energies.values()):
        raise ValueError(
            f"reference_energies are given for {symbols(energies) or 'nothing'}; expected one "
            f"finite energy for each of the model's elements {symbols(config.atomic_numbers)}. "
            "Give 0.0 where there is no reference."
        )
    return {z: float(energies[z]) for z in config.atomic_numbers}


@contextlib.contextmanager
def numerics(dtype: str) -> Iterator[None]:
    """float64 where it is asked for and only there; matrix products in full precision."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        yield


@contextlib.contextmanager
def _progress_bar(shown: bool, structures: Iterable[Any]) -> Iterator[Callable[[int], None]]:
    """A function that advances the bar by some structures."""
    if not shown:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        total = len(structures) if isinstance(structures, Sized) else None
        task = bar.add_task("predict", total=total)
        yield lambda count: bar.advance(task, count)


def _take(frames: Iterator[Frame], nodes: int) -> list[Frame]:
    """The next frames, until they have ``nodes`` atoms together."""
    taken: list[Frame] = []
    for frame in frames:
        taken.append(frame)
        nodes -= frame.num_nodes
        if nodes <= 0:
            break
    return taken
