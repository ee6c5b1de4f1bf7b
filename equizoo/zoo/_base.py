"""What every architecture answers, and energy, forces and stress from it."""

import abc
import dataclasses
import enum
import functools
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from equizoo.graph import (
    Budget,
    Frame,
    Graph,
    edge_vectors,
    make_frame,
    sum_graphs,
    sum_receivers,
    sum_senders,
)
from equizoo.neighbors import NeighborLimit, Neighbors
from equizoo.registry import ARCHITECTURES
from equizoo.structure import Structure
from equizoo.tensor_products.native import Native


class Symmetry(enum.StrEnum):
    """The group under which energies are invariant: with reflections (O3) or without (SO3)."""

    O3 = "O3"
    SO3 = "SO3"


class Forces(enum.StrEnum):
    """Where forces come from: minus the ``gradient`` of the energy, or a ``direct`` head."""

    GRADIENT = "gradient"
    DIRECT = "direct"


class Remat(enum.StrEnum):
    """What is computed a second time for derivatives instead of being kept: nothing, or layers."""

    NONE = "none"
    LAYERS = "layers"


class Kernels(enum.StrEnum):
    """Who computes sums over neighbours: ``xla``, or machine code of our own, on the CPU (see
    :class:`equizoo.tensor_products.native.Native`). They differ in rounding alone."""

    XLA = "xla"
    NATIVE = "native"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArchitectureConfig(abc.ABC):
    """Everything needed to rebuild an architecture; the fields all of them share."""

    registry: ClassVar = ARCHITECTURES
    format: ClassVar[int] = 1
    heads: ClassVar[tuple[str, ...]] = ("default",)  # levels of theory it was trained on together

    atomic_numbers: tuple[int, ...]  # in the order of species
    cutoff: float  # [Å]
    avg_num_neighbors: float  # mean in-degree on the training set

    def __post_init__(self):
        if not self.atomic_numbers or len(set(self.atomic_numbers)) != len(self.atomic_numbers):
            raise ValueError(
                f"atomic_numbers is {self.atomic_numbers}, expected one or more different elements."
            )
        if not self.cutoff > 0 or not self.avg_num_neighbors > 0:
            raise ValueError(
                f"cutoff ({self.cutoff} Å) and avg_num_neighbors ({self.avg_num_neighbors}) must "
                "be positive."
            )

    @property
    def symmetry(self) -> Symmetry:
        """The group under which energies are invariant."""
        return Symmetry.O3

    @property
    def smooth(self) -> bool:
        """Whether the energy has a continuous gradient as atoms cross the cutoff."""
        return True

    @property
    def conservative(self) -> bool:
        """Whether forces are minus the gradient of the energy; else a head predicts them."""
        return True

    @property
    def denoises(self) -> bool:
        """Whether the model takes forces of corrupted structures and finds out their noise."""
        return False

    @property
    def limit(self) -> NeighborLimit | None:
        """Which neighbours within the cutoff an atom sees; None: all."""
        return None

    @property
    def cost_of_flat(self) -> float:
        """An edge of the flat layout against one in rows, see :class:`Budget`."""
        return Budget.COST_OF_FLAT

    @property
    def defect(self) -> float:
        """How far energies and forces may be, relative to the largest, from those of the structure
        turned; 0 for nothing but rounding."""
        return 0.0

    @property
    def knows_charge(self) -> bool:
        """Whether predictions depend on the charge of a structure."""
        return False

    def require(self, structure: Structure) -> None:
        """Raises ``ValueError`` for a structure that the model has no meaning for, in its state
        (charge, spin) rather than its elements; the default accepts all, and warns of a charge that
        it does not know."""
        if structure.charge and not self.knows_charge:
            warnings.warn(
                f"A structure has charge {structure.charge:+g} e. The model does not know charges: "
                "its energy is that of whatever charges its training data had, mostly none.",
                stacklevel=2,
            )

    def frame(
        self,
        structure: Structure,
        head: str | None = None,
        skin: float = 0.0,
        neighbors: Neighbors | None = None,
    ) -> Frame:
        """The structure with the neighbours that the model sees; ``head`` is the first by default.
        ``neighbors`` are these very ones, where known already.

        With ``skin`` [Å] also with those that are farther than the cutoff by as much, for
        :func:`within_cutoff`. Raises ``ValueError`` for elements and states that the model was not
        made for, and for a skin where only the nearest neighbours are seen.
        """
        self.require(structure)
        if skin and self.limit is not None:
            raise ValueError(
                f"skin is {skin} Å, but the model sees only the nearest {self.limit.count} "
                "neighbours, which must be found anew for every step: leave it at 0."
            )
        return make_frame(
            structure,
            self.cutoff + skin,
            self.atomic_numbers,
            head=0 if head is None else self.head_index(head),
            limit=self.limit,
            neighbors=neighbors,
        )

    def head_index(self, head: str) -> int:
        """The place of a head among all; ``ValueError`` if it is none of them."""
        if head not in self.heads:
            raise ValueError(f"head is {head!r}, expected one of {', '.join(self.heads)}.")
        return self.heads.index(head)

    def for_elements(self, atomic_numbers: tuple[int, ...]) -> "ArchitectureConfig":
        """The config of the same model for these elements instead."""
        return dataclasses.replace(self, atomic_numbers=atomic_numbers)

    @abc.abstractmethod
    def build(self, *, rngs: nnx.Rngs) -> "Architecture":
        """The model with freshly drawn weights."""


class Architecture(nnx.Module):
    """A model of interatomic interaction: one method.

    ``key`` is set while training and drives whatever is random then, such as dropout; without it
    a model is a function. ``remat``, one of ``remats``, is set then too.
    """

    remats: ClassVar[frozenset[Remat]] = frozenset([Remat.NONE])
    kernels: ClassVar[frozenset[Kernels]] = frozenset([Kernels.XLA])
    # Parameters with a row for every species, by a part of their path; true: the row is divided by
    # the root of the number of species, as if it came from a linear map of a one-hot vector.
    # None: species are in parameters in another way, and elements cannot be exchanged.
    species_tables: ClassVar[Mapping[str, bool] | None] = None
    # Kernels of linear maps are of order one, and the maps divide by the root of their inputs;
    # false: kernels are drawn that much smaller.
    unit_kernels: ClassVar[bool] = True

    config: ArchitectureConfig
    key: Array | None = None
    remat: Remat = Remat.NONE

    @abc.abstractmethod
    def node_energies(
        self, vectors: Float[Array, "edges 3"], graph: Graph
    ) -> Float[Array, " nodes"]:
        """Interaction energy of every atom [eV], without reference energies; a function of the edge
        vectors, species, the graph's head, charge and spin (and of ``key``) alone, anything on
        padded nodes."""

    def energies_and_forces(
        self, vectors: Float[Array, "edges 3"], graph: Graph
    ) -> tuple[Float[Array, " nodes"], Float[Array, "nodes 3"]]:
        """``node_energies``, and forces [eV/Å] of a head, where the config is not conservative."""
        raise ValueError(
            f"{type(self).__name__} has no head for forces; its config must be conservative, so "
            "that they are minus the gradient of the energy."
        )

    def denoise(
        self, vectors: Float[Array, "edges 3"], graph: Graph
    ) -> tuple[Float[Array, " nodes"], Float[Array, "nodes 3"] | None, Float[Array, "nodes 3"]]:
        """``node_energies``, forces [eV/Å] of a head or ``None`` where they are the gradient, and
        the noise on every atom in units of its largest standard deviation, given ``graph``'s
        ``given_forces``."""
        raise ValueError(
            f"{type(self).__name__} has no head for noise; set its config's force_input, or train "
            "without Denoising."
        )

    def with_elements(
        self, atomic_numbers: Collection[int], like: Mapping[int, int] | None = None
    ) -> "Architecture":
        """The model for these elements: equal for those that it has, which keep their order.

        Others come after them, each as a copy of the one of the model's elements that it is
        ``like``. Raises ``ValueError`` for elements that are neither, and where species are not
        rows of tables.
        """
        if (per_species := self.species_tables) is None:
            raise ValueError(
                f"{type(self).__name__} does not say which of its parameters belong to an element "
                "(species_tables), so it can have no others; train it anew."
            )
        known, origin = self.config.atomic_numbers, dict(like or {})
        if unknown := sorted(z for z in atomic_numbers if origin.get(z, z) not in known):
            raise ValueError(
                f"atomic_numbers asks for {unknown}, which the model does not have; expected some "
                f"of {list(known)}."
            )
        if not atomic_numbers:
            raise ValueError("atomic_numbers is empty, expected at least one element.")
        chosen = [z for z in known if z in atomic_numbers]
        chosen += sorted(set(atomic_numbers) - set(known))
        rows = jnp.array([known.index(z if z in known else origin[z]) for z in chosen])
        factor = float(np.sqrt(len(chosen) / len(known)))

        def select(path: tuple, value: Array) -> Array:
            tables = [one_hot for part, one_hot in per_species.items() if part in path]
            if not tables:
                return value
            return value[rows] * (factor if any(tables) else 1.0)

        return self._rebuilt(self.config.for_elements(tuple(chosen)), select)

    def _rebuilt(
        self, config: ArchitectureConfig, select: Callable[[tuple, Array], Array]
    ) -> "Architecture":
        """The model of another config, each parameter made from the one of the same name."""
        graphdef, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
        old = dict(nnx.to_flat_state(nnx.state(self)))
        with jax.enable_x64(True):  # float64 weights stay float64
            new = [
                (path, param.replace(select(path, jnp.asarray(old[path][...]))))
                for path, param in nnx.to_flat_state(state)
            ]
        return nnx.merge(graphdef, nnx.from_flat_state(new))

    def with_kernels(self, kernels: Kernels) -> "Architecture":
        """The same model with sums over neighbours computed so, which its config then says.

        Raises ``ValueError`` for kernels that the architecture does not have, or that need a
        library which is not installed.
        """
        if kernels not in self.kernels:
            raise ValueError(
                f"kernels is {kernels.value!r}, which {type(self).__name__} does not have; "
                f"expected one of {', '.join(sorted(self.kernels))}."
            )
        if kernels is Kernels.XLA:
            return self
        config: Any = self.config
        product = Native.made_for(config.tensor_product)
        config = dataclasses.replace(config, tensor_product=product)
        return self._rebuilt(config, lambda path, value: value)

    def inference_form(self, tolerance: float) -> "Architecture":
        """The model with parts of it tabulated, to about ``tolerance`` of their largest values: it
        has other parameters, and is not for training. ``ValueError`` where there is no such form.
        """
        raise ValueError(
            f"{type(self).__name__} has no inference form; use the potential as it is. "
            "Architectures that have one: mace."
        )

    def with_head(self, head: str) -> "Architecture":
        """The model with one of its heads only, equal for it; ``ValueError`` where it cannot."""
        raise ValueError(f"{type(self).__name__} has no heads to choose from.")

    def with_copied_heads(self, heads: Sequence[str]) -> "Architecture":
        """The model of one head with several that equal it; ``ValueError`` where it cannot."""
        raise ValueError(
            f"{type(self).__name__} has one head, and cannot have more. Architectures that can: "
            "mace."
        )


def layer_call(layer: nnx.Module, remat: Remat) -> Callable[..., Any]:
    """A layer as a function of its arguments, which are all that derivatives keep if asked for."""
    if remat is Remat.NONE:
        return layer
    graphdef, params = nnx.split(layer)

    @jax.checkpoint
    def call(params, *arguments):
        return nnx.merge(graphdef, params)(*arguments)

    return functools.partial(call, params)


class Prediction(NamedTuple):
    """Energies without reference energies, and their exact derivatives or direct forces."""

    energy: Float[Array, " graphs"]  # [eV]
    forces: Float[Array, "nodes 3"]  # [eV/Å]
    stress: Float[Array, "graphs 3 3"] | None  # [eV/Å^3] zero where no cell; None: direct forces
    node_energies: Float[Array, " nodes"]  # [eV]
    noise: Float[Array, "nodes 3"] | None = None  # over its scale; None: not asked for


def energy_forces_stress(model: Architecture, graph: Graph) -> Prediction:
    r"""Energy, forces and stress of every graph of a batch.

    With :math:`g_e = \partial E / \partial d_e` on the vector from sender to receiver,

    .. math:: F_i = \sum_{e \text{ out of } i} g_e - \sum_{e \text{ into } i} g_e, \qquad
        \sigma = \frac{1}{|\det \mathrm{cell}|} \,\mathrm{sym} \sum_e d_e \otimes g_e.

    An architecture whose config is not conservative predicts forces itself, and no stress. A graph
    with ``given_forces`` asks for the noise too.
    """
    vectors = edge_vectors(graph, model.config.cutoff)
    if not model.config.conservative:
        nodes, forces, noise = _outputs(model, vectors, graph)
        nodes = jnp.where(graph.node_mask, nodes, 0)
        forces = jnp.where(graph.node_mask[:, None], forces, 0)
        return Prediction(sum_graphs(nodes, graph), forces, None, nodes, noise)

    def total(vectors):
        nodes, _, noise = _outputs(model, vectors, graph)
        nodes = jnp.where(graph.node_mask, nodes, 0)
        return jnp.sum(nodes), (nodes, noise)

    gradient, (nodes, noise) = jax.grad(total, has_aux=True)(vectors)
    forces = sum_senders(gradient, graph) - sum_receivers(gradient, graph)
    virial = sum_graphs(sum_receivers(vectors[:, :, None] * gradient[:, None, :], graph), graph)
    volume = jnp.abs(jnp.linalg.det(graph.cell))[:, None, None]
    stress = jnp.where(volume > 0, virial / jnp.where(volume > 0, volume, 1), 0)
    return Prediction(
        energy=sum_graphs(nodes, graph),
        forces=forces,
        stress=(stress + jnp.swapaxes(stress, 1, 2)) / 2,
        node_energies=nodes,
        noise=noise,
    )


def _outputs(model: Architecture, vectors: Float[Array, "edges 3"], graph: Graph):
    """Node energies, forces of a head and noise, the last two ``None`` where not asked for."""
    if graph.given_forces is not None:
        nodes, forces, noise = model.denoise(vectors, graph)
        return nodes, forces, jnp.where(graph.node_mask[:, None], noise, 0)
    if not model.config.conservative:
        return *model.energies_and_forces(vectors, graph), None
    return model.node_energies(vectors, graph), None, None
