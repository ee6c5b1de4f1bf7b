"""MACE: higher-order equivariant message passing.

Reference: Batatia et al. 2022, https://arxiv.org/abs/2206.07697; the ScaleShift form of its
published implementation, with the variants that its foundation models use.
"""

import abc
import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from equizoo.graph import (
    Graph,
    from_species_blocks,
    gather_receivers,
    gather_senders,
    sum_receivers,
    to_species_blocks,
)
from equizoo.layers.activation import ActivationConstant, Nonlinearity, normalized
from equizoo.layers.gate import gated
from equizoo.layers.harmonics import safe_norm, spherical_harmonics
from equizoo.layers.isolated import lone_atoms
from equizoo.layers.linear import (
    EquivariantLinear,
    SpeciesLinear,
    into_irreps,
    normal_param,
    shared_irreps,
)
from equizoo.layers.mlp import NormalizedMLP, ScalarMLP
from equizoo.layers.radial import (
    Bessel,
    DistanceTransform,
    RadialBasis,
    covalent_radii,
    polynomial_envelope,
)
from equizoo.layers.radial_spline import (
    Knots,
    NeighborDensities,
    Network,
    Places,
    RadialSpline,
    RadialTable,
)
from equizoo.layers.repulsion import ZBL
from equizoo.structure import Structure
from equizoo.tensor_products._base import TensorProduct, natural_irreps
from equizoo.tensor_products._machine_code import available as machine_code_available
from equizoo.tensor_products.clebsch_gordan import ClebschGordan
from equizoo.tensor_products.native import BoundNative, Native
from equizoo.zoo._base import Architecture, ArchitectureConfig, Kernels, Remat, layer_call


class Interaction(enum.StrEnum):
    """How a layer sums over neighbours and treats the atom itself.

    ``real_agnostic``: messages pass a linear map per species, no self-connection.
    ``..._residual``: instead the previous features, mapped per species, are added at the end.
    ``..._density...``: the sum is divided by one plus a density of neighbours that is learned,
    not by ``avg_num_neighbors``.
    ``..._attention_residual``: the radial network also sees scalars of both atoms; the
    self-connection is the same for all species.
    ``..._residual_nonlinear``: the radial network (with normalisation) also sees both species,
    messages are gated, the density is learned from the same scalars; self-connection likewise.
    """

    REAL_AGNOSTIC = "real_agnostic"
    REAL_AGNOSTIC_RESIDUAL = "real_agnostic_residual"
    REAL_AGNOSTIC_DENSITY = "real_agnostic_density"
    REAL_AGNOSTIC_DENSITY_RESIDUAL = "real_agnostic_density_residual"
    REAL_AGNOSTIC_ATTENTION_RESIDUAL = "real_agnostic_attention_residual"
    REAL_AGNOSTIC_RESIDUAL_NONLINEAR = "real_agnostic_residual_nonlinear"


class EnvelopeOn(enum.StrEnum):
    """What the envelope multiplies: the radial basis, or what the radial networks make of it."""

    BASIS = "basis"
    WEIGHTS = "weights"


class LastReadout(enum.StrEnum):
    """The last layer's readout: one hidden layer, none, or two with biases."""

    MLP = "mlp"
    LINEAR = "linear"
    BIASED_MLP = "biased_mlp"


@dataclasses.dataclass(frozen=True)
class EdgeFeatures:
    """What of a layer's features takes part in the product over edges."""

    channels: int
    l_max: int


@dataclasses.dataclass(frozen=True)
class Attention:
    """Sizes of the attention interaction: scalars of each atom, and its radial network."""

    channels: int = 64
    widths: tuple[int, ...] = (256, 256, 256)


@dataclasses.dataclass(frozen=True)
class Categorical:
    """One learned vector for each whole number from ``-offset``."""

    num_classes: int
    offset: int = 0
    kind: Literal["categorical"] = "categorical"


@dataclasses.dataclass(frozen=True)
class Continuous:
    """A small network of the number itself."""

    kind: Literal["continuous"] = "continuous"


@dataclasses.dataclass(frozen=True)
class GraphFeature:
    """A property of the whole structure that enters the features of its atoms."""

    quantity: Literal["charge", "spin"]  # [e]; multiplicity
    channels: int
    encoding: Categorical | Continuous


@dataclasses.dataclass(frozen=True, kw_only=True)
class MACEConfig(ArchitectureConfig):
    """Options of MACE; the defaults are the paper's for molecules."""

    channels: int = 256
    hidden_l_max: int = 2  # hidden irreps 0e + 1o + ... + this degree
    l_max: int = 3  # of the harmonics and of the messages
    correlation: int = 3  # body order of a layer's product minus one
    interactions: tuple[Interaction, ...] = (
        Interaction.REAL_AGNOSTIC_RESIDUAL,
        Interaction.REAL_AGNOSTIC_RESIDUAL,
    )  # one per layer
    num_bessel: int = 8  # functions of the radial basis, whichever it is
    envelope_p: int = 5
    radial_widths: tuple[int, ...] = (64, 64, 64)
    readout_channels: int = 16  # of each head
    scale: float | tuple[float, ...] = 1.0  # [eV] of the network's output, for each head or all
    shift: float | tuple[float, ...] = 0.0  # [eV] per atom, for each head or all
    zero_isolated: bool = True  # subtract what an isolated atom of the species would get
    activation: ActivationConstant = ActivationConstant.EXACT
    tensor_product: TensorProduct = ClebschGordan()  # over edges
    product_basis: TensorProduct = ClebschGordan()  # its power, over nodes
    radial_basis: RadialBasis = Bessel()
    distance_transform: DistanceTransform | None = None  # of the argument of the radial basis
    envelope_on: EnvelopeOn = EnvelopeOn.BASIS
    repulsion: ZBL | None = None  # added to the network's output before it is scaled
    heads: tuple[str, ...] = ("default",)  # type: ignore[misc]  # a field where the base has none
    last_readout: LastReadout = LastReadout.MLP
    readout_activation: Nonlinearity = Nonlinearity.SILU
    edge_features: tuple[EdgeFeatures, ...] = ()  # one per layer; empty: all the features there are
    attention: Attention = Attention()
    density_widths: tuple[int, ...] = (64,)  # of the nonlinear interaction's density
    joint_embedding: tuple[GraphFeature, ...] = ()
    embedding_readout: bool = False  # an energy of the embedding alone, unscaled

    def __post_init__(self):
        super().__post_init__()
        if not self.interactions:
            raise ValueError("interactions is empty, expected one entry per layer.")
        if not 0 <= self.hidden_l_max <= self.l_max:
            raise ValueError(
                f"hidden_l_max ({self.hidden_l_max}) must lie between 0 and l_max ({self.l_max})."
            )
        if not self.heads or len(set(self.heads)) != len(self.heads):
            raise ValueError(f"heads is {self.heads}, expected one or more different names.")
        for name in ("scale", "shift"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != len(self.heads):
                raise ValueError(
                    f"{name} has {len(value)} values for {len(self.heads)} heads; expected one "
                    "for each, or a single number."
                )
        if self.zero_isolated and np.any(np.array(self.shift) != 0):
            raise ValueError(
                f"shift is {self.shift} eV with zero_isolated=True, which makes isolated atoms "
                "their reference energy; set shift=0, or zero_isolated=False."
            )
        if self.zero_isolated and self.joint_embedding:
            raise ValueError(
                "joint_embedding with zero_isolated=True would measure charged systems against "
                "charged atoms; set zero_isolated=False."
            )
        if self.edge_features and len(self.edge_features) != len(self.interactions):
            raise ValueError(
                f"edge_features has {len(self.edge_features)} entries for "
                f"{len(self.interactions)} layers; expected one for each, or none."
            )
        if self.embedding_readout and not self.joint_embedding:
            raise ValueError("embedding_readout needs a joint_embedding to read.")
        for part in (self.distance_transform, self.repulsion):
            if part is not None:
                covalent_radii(self.atomic_numbers, part.radii)

    @property
    def smooth(self) -> bool:
        # radial networks of these do not vanish where their basis does
        return self.envelope_on is not EnvelopeOn.BASIS or not set(self.interactions) & _SEES_ATOMS

    @property
    def cost_of_flat(self) -> float:
        # machine code finds a node's edges wherever they start, and leaves padding out
        native = isinstance(self.tensor_product, Native) and machine_code_available()
        return 1.0 if native else super().cost_of_flat

    @property
    def knows_charge(self) -> bool:
        return any(feature.quantity == "charge" for feature in self.joint_embedding)

    def require(self, structure: Structure) -> None:
        super().require(structure)
        for feature in self.joint_embedding:
            value, encoding = getattr(structure, feature.quantity), feature.encoding
            if isinstance(encoding, Categorical):
                last = encoding.num_classes - 1 - encoding.offset
                if value != int(value) or not -encoding.offset <= value <= last:
                    raise ValueError(
                        f"Structure {structure.name or '(unnamed)'} has {feature.quantity} "
                        f"{value:g}; the model knows whole numbers from {-encoding.offset} to "
                        f"{last}."
                    )

    def for_elements(self, atomic_numbers: tuple[int, ...]) -> "MACEConfig":
        standard = dict(zip(atomic_numbers, covalent_radii(atomic_numbers).tolist(), strict=True))

        def chosen(part: Any) -> Any:
            if part is None or part.radii is None:
                return part
            radii = standard | dict(zip(self.atomic_numbers, part.radii, strict=True))
            return dataclasses.replace(part, radii=tuple(radii[z] for z in atomic_numbers))

        return dataclasses.replace(
            self,
            atomic_numbers=atomic_numbers,
            distance_transform=chosen(self.distance_transform),
            repulsion=chosen(self.repulsion),
        )

    def build(self, *, rngs: nnx.Rngs) -> "MACE":
        return MACE(self, rngs=rngs)


_RESIDUAL = frozenset(kind for kind in Interaction if "residual" in kind.value)
_DENSITY = frozenset(kind for kind in Interaction if "density" in kind.value)
_SEES_ATOMS = frozenset(
    [Interaction.REAL_AGNOSTIC_ATTENTION_RESIDUAL, Interaction.REAL_AGNOSTIC_RESIDUAL_NONLINEAR]
)

SIZES: dict[str, dict[str, Any]] = {
    "paper_l0": {"channels": 256, "hidden_l_max": 0},
    "paper_l1": {"channels": 256, "hidden_l_max": 1},
    "paper_l2": {"channels": 256, "hidden_l_max": 2},
    "small": {"channels": 64, "hidden_l_max": 1},
}


# Of inference forms.
_MOST_KINDS = 5  # of 15 pairs, with some 50 MB of tables for each layer
_INTERVALS, _FINE = 400, 1e-6  # so many pieces of a spline for such a tolerance, and at least
_MOST_IN_TABLE = 2**21  # pieces of all outputs; at six numbers of 8 bytes each, 100 MB a layer
_VANISHED = 1e-9  # an envelope below this counts as this


class Edges(NamedTuple):
    """What layers see of the edges."""

    harmonics: Float[Array, "edges dim_harmonics"]
    radial: Float[Array, "edges num_basis"]
    envelope: Float[Array, " edges"] | None  # where it is not a factor of ``radial``
    places: Places | None = None  # of splines in place of networks, see MACE.inference_form

    def enveloped(self, x: Float[Array, "edges features"]) -> Float[Array, "edges features"]:
        """``x`` so that it vanishes at the cutoff, if ``radial`` does not see to that."""
        return x if self.envelope is None else x * self.envelope[:, None]


class MACE(Architecture):
    """Layers of (sum over neighbours, symmetric power, readout)."""

    remats = frozenset(Remat)
    kernels = frozenset(Kernels)
    species_tables = {
        "embedding": True,
        "source_embedding": True,
        "target_embedding": True,
        "species_linear": True,
        "product_weights": False,
    }

    config: MACEConfig
    knots: Knots | None = None  # of an inference form

    def __init__(self, config: MACEConfig, *, rngs: nnx.Rngs):
        self.config = config
        num_species, channels = len(config.atomic_numbers), config.channels
        self.embedding = normal_param(rngs, (num_species, channels))
        layers, readouts = [], []
        irreps = natural_irreps(0)
        for index, kind in enumerate(config.interactions):
            last = index == len(config.interactions) - 1
            irreps_out = natural_irreps(0 if last else config.hidden_l_max)
            layer = _LAYERS.get(kind, AgnosticLayer)
            layers.append(layer(config, index, irreps, irreps_out, rngs=rngs))
            how = config.last_readout if last else LastReadout.LINEAR
            readouts.append(Readout(config, how, rngs=rngs))
            irreps = irreps_out
        self.layers = nnx.List(layers)
        self.readouts = nnx.List(readouts)
        if config.joint_embedding:
            self.joint_embedding = JointEmbedding(config, rngs=rngs)
        if config.embedding_readout:
            self.embedding_readout = Readout(config, LastReadout.LINEAR, rngs=rngs)

    def node_energies(
        self, vectors: Float[Array, "edges 3"], graph: Graph
    ) -> Float[Array, " nodes"]:
        energies = self._with_isolated(vectors, graph)
        if self.config.zero_isolated:
            num_species, num_heads = len(self.config.atomic_numbers), len(self.config.heads)
            away, lone = lone_atoms(num_species, self.config.cutoff, vectors.dtype, num_heads)
            isolated = self._with_isolated(away, lone)
            energies = energies - isolated[graph.species + num_species * _node_heads(graph)]
        return energies

    def _with_isolated(
        self, vectors: Float[Array, "edges 3"], graph: Graph
    ) -> Float[Array, " nodes"]:
        config = self.config
        lengths = safe_norm(vectors)
        edges = self._edges(vectors, lengths, graph)
        embedding = self.embedding[...].astype(vectors.dtype)
        x = embedding[graph.species][:, None] / float(np.sqrt(len(config.atomic_numbers)))
        if config.joint_embedding:
            x = x + self.joint_embedding(graph, vectors.dtype)[:, None]
        heads = _node_heads(graph)
        unscaled = jnp.zeros(graph.num_nodes, vectors.dtype)
        if config.embedding_readout:
            unscaled = self.embedding_readout(x[:, 0], heads)
        total = jnp.zeros(graph.num_nodes, vectors.dtype)
        if config.repulsion is not None:
            total = sum_receivers(self._half_repulsion(config.repulsion, lengths, graph), graph)
        for layer, readout in zip(self.layers, self.readouts, strict=True):
            x = layer_call(layer, self.remat)(x, edges, graph)
            total = total + readout(x[:, 0], heads)
        scale, shift = (
            jnp.asarray(np.broadcast_to(value, len(config.heads)), vectors.dtype)[heads]
            for value in (config.scale, config.shift)
        )
        return scale * total + shift + unscaled

    def _edges(
        self, vectors: Float[Array, "edges 3"], lengths: Float[Array, " edges"], graph: Graph
    ) -> Edges:
        config = self.config
        harmonics = spherical_harmonics(natural_irreps(config.l_max), vectors)
        envelope = polynomial_envelope(lengths, config.cutoff, config.envelope_p)
        argument = lengths
        if (transform := config.distance_transform) is not None:
            argument = transform(lengths, self._radii(transform.radii, lengths, graph))
        radial = config.radial_basis(argument, config.cutoff, config.num_bessel)
        places = None
        if self.knots is not None:
            kinds = graph.species[graph.senders], graph.species[graph.receivers]
            places = self.knots.places(lengths, kinds if self.knots.num_kinds > 1 else None)
        if config.envelope_on is not EnvelopeOn.BASIS:
            return Edges(harmonics, radial, envelope, places)
        if places is not None:
            places = places._replace(powers=places.powers * envelope[:, None])
        return Edges(harmonics, radial * envelope[:, None], None, places)

    def _radii(
        self, radii: tuple[float, ...] | None, like: Float[Array, " edges"], graph: Graph
    ) -> Float[Array, " edges"]:
        """The sum of the radii of the two atoms of each edge."""
        table = jnp.asarray(covalent_radii(self.config.atomic_numbers, radii), like.dtype)
        return table[graph.species[graph.senders]] + table[graph.species[graph.receivers]]

    def _half_repulsion(
        self, repulsion: ZBL, lengths: Float[Array, " edges"], graph: Graph
    ) -> Float[Array, " edges"]:
        pairs = graph.species[graph.senders], graph.species[graph.receivers]
        radii = self._radii(repulsion.radii, lengths, graph)
        return repulsion(lengths, pairs, self.config.atomic_numbers, radii) / 2

    def inference_form(self, tolerance: float) -> "MACE":
        config = self.config
        native = machine_code_available()
        model = cast(MACE, self.with_kernels(Kernels.NATIVE)) if native else nnx.clone(self)
        layers = [layer for layer in model.layers if isinstance(layer, AgnosticLayer)]
        if self.knots is not None or not layers:
            raise ValueError(
                "The radial networks of this model are splines already, or see the atoms "
                f"({', '.join(config.interactions)}), so that no spline can replace them: use the "
                "model as it is."
            )
        kinds = 1 if config.distance_transform is None else len(config.atomic_numbers)
        if kinds > _MOST_KINDS:
            raise ValueError(
                f"The model has {kinds} elements, and its distance_transform makes radial networks "
                f"differ between their pairs; at most {_MOST_KINDS} are tabulated. Choose those "
                'that you need: elements=["Si", "O"].'
            )
        # derivatives of a quintic spline err by the fifth power of its step
        intervals = math.ceil(_INTERVALS * (_FINE / tolerance) ** 0.2)
        model.knots = Knots(config.cutoff, max(_INTERVALS, intervals), kinds)
        with jax.enable_x64(True), jax.default_matmul_precision("highest"):
            for layer in layers:
                layer.tabulate(model.knots, tolerance)
            first = model.layers[0]
            if not native and isinstance(first, AgnosticLayer) and not config.joint_embedding:
                first.sum_densities(self.embedding[...])
        return model

    def with_head(self, head: str) -> "Architecture":
        config = self.config
        number, index = len(config.heads), config.head_index(head)

        def of_head(value: Any) -> Any:
            return value[index] if isinstance(value, tuple) else value

        smaller = dataclasses.replace(
            config, heads=(head,), scale=of_head(config.scale), shift=of_head(config.shift)
        )

        def select(path: tuple, value: Array) -> Array:
            if path[0] not in ("readouts", "embedding_readout"):
                return value
            columns = jnp.split(value, number, axis=-1)[index]
            if "kernels" not in path or path[-1] == 0:
                return columns
            return jnp.split(columns, number, axis=0)[index] * float(number**-0.5)

        return self._rebuilt(smaller, select)

    def with_copied_heads(self, heads: Sequence[str]) -> "Architecture":
        config, number = self.config, len(heads)
        if len(config.heads) != 1:
            raise ValueError(f"The model has heads {config.heads} already; expected one.")

        def of_all(value: Any) -> Any:
            return value * number if isinstance(value, tuple) else value

        larger = dataclasses.replace(
            config, heads=tuple(heads), scale=of_all(config.scale), shift=of_all(config.shift)
        )

        def copied(path: tuple, value: Array) -> Array:
            if path[0] not in ("readouts", "embedding_readout"):
                return value
            if "kernels" not in path or path[-1] == 0:
                return jnp.concatenate([value] * number, axis=-1)
            # no head reads the hidden channels of another
            return jnp.kron(jnp.eye(number, dtype=value.dtype), value) * float(number**0.5)

        return self._rebuilt(larger, copied)


class MACELayer(nnx.Module):
    """Sum over neighbours, then products of up to ``correlation`` of the sums.

    An interface: kinds of interaction differ in :meth:`_build` and :meth:`_interact`.
    """

    def __init__(
        self,
        config: MACEConfig,
        index: int,
        irreps_in: e3nn.Irreps,
        irreps_out: e3nn.Irreps,
        *,
        rngs: nnx.Rngs,
    ):
        self.config, self.kind = config, config.interactions[index]
        self.irreps_in, self.irreps_out = str(irreps_in), str(irreps_out)
        features = EdgeFeatures(config.channels, config.hidden_l_max)
        if config.edge_features:
            features = config.edge_features[index]
        edge_irreps = shared_irreps(irreps_in, natural_irreps(features.l_max))
        self.edge_irreps, self.edge_channels = str(edge_irreps), features.channels
        channels, num_species = config.channels, len(config.atomic_numbers)
        product, power = self._products()
        self.linear_up = EquivariantLinear(
            irreps_in, edge_irreps, channels, features.channels, rngs=rngs
        )
        self._build(product.num_weights * features.channels, product.irreps_paths, rngs)
        self.product_weights = normal_param(
            rngs, (num_species, power.num_weights, channels), power.num_weights**-0.5
        )
        self.product_linear = EquivariantLinear(
            irreps_out, irreps_out, channels, channels, rngs=rngs
        )

    @abc.abstractmethod
    def _build(self, num_weights: int, irreps_paths: e3nn.Irreps, rngs: nnx.Rngs) -> None:
        """Makes the parameters of the interaction; the product takes ``num_weights`` per edge."""

    @abc.abstractmethod
    def _interact(
        self, x: Float[Array, "nodes dim_in channels"], edges: Edges, graph: Graph
    ) -> tuple[
        Float[Array, "nodes dim_messages channels"], Float[Array, "nodes dim_out channels"] | None
    ]:
        """The sums over neighbours, and what is added to the products of them, if anything."""

    def __call__(
        self, x: Float[Array, "nodes dim_in channels"], edges: Edges, graph: Graph
    ) -> Float[Array, "nodes dim_out channels"]:
        messages, connection = self._interact(x, edges, graph)
        _, power = self._products()
        block_weights = self.product_weights[...].astype(x.dtype)[graph.block_species]
        products = power(to_species_blocks(messages, graph), block_weights)
        result = self.product_linear(from_species_blocks(products, graph))
        return result if connection is None else result + connection

    def _products(self):
        config, messages = self.config, natural_irreps(self.config.l_max)
        return (
            config.tensor_product.bind(self.edge_irreps, messages, messages),
            config.product_basis.bind_power(messages, self.irreps_out, config.correlation),
        )

    def _convolve(
        self,
        up: Float[Array, "nodes dim_edge edge_channels"],
        weights: Float[Array, "edges weights"],
        edges: Edges,
        graph: Graph,
    ) -> Float[Array, "nodes dim_paths edge_channels"]:
        product, _ = self._products()
        weights = edges.enveloped(weights).reshape(graph.num_edges, product.num_weights, -1)
        return product.convolve(up, edges.harmonics, weights, graph)

    def _scalar_mlp(self, widths: tuple[int, ...], rngs: nnx.Rngs) -> ScalarMLP:
        return ScalarMLP(widths, activation=self.config.activation, rngs=rngs)


class AgnosticLayer(MACELayer):
    """``real_agnostic`` and its variants with density and residual."""

    densities: NeighborDensities | None = None  # instead of the convolution; inference forms only

    def _build(self, num_weights, irreps_paths, rngs):
        config, messages = self.config, natural_irreps(self.config.l_max)
        residual = self.kind in _RESIDUAL
        self.radial = self._scalar_mlp(
            (config.num_bessel, *config.radial_widths, num_weights), rngs
        )
        self.linear = EquivariantLinear(
            irreps_paths, messages, self.edge_channels, config.channels, rngs=rngs
        )
        self.species_linear = SpeciesLinear(
            e3nn.Irreps(self.irreps_in) if residual else messages,
            e3nn.Irreps(self.irreps_out) if residual else messages,
            config.channels,
            len(config.atomic_numbers),
            rngs=rngs,
        )
        if self.kind in _DENSITY:
            self.density = self._scalar_mlp((config.num_bessel, 1), rngs)

    def _interact(self, x, edges, graph):
        seen = edges.radial if edges.places is None else edges.places
        if self.densities is None:
            messages = self.linear(self._summed(self.linear_up(x), seen, edges, graph))
        else:
            messages = self.densities(seen, edges.enveloped(edges.harmonics), graph)
        if self.kind in _DENSITY:
            messages = messages / (1 + _density(self.density, seen, edges, graph))
        else:
            messages = messages / self.config.avg_num_neighbors
        if self.kind in _RESIDUAL:
            return messages, self.species_linear(x, graph)
        return self.species_linear(messages, graph), None

    def _summed(
        self,
        up: Float[Array, "nodes dim_edge edge_channels"],
        seen: Float[Array, "edges num_basis"] | Places,
        edges: Edges,
        graph: Graph,
    ) -> Float[Array, "nodes dim_paths edge_channels"]:
        product, _ = self._products()
        if isinstance(self.radial, RadialTable) and isinstance(seen, Places):
            arrays = up, edges.harmonics, self.radial.table[...].astype(up.dtype)
            if product.applies(graph, *arrays):
                powers = edges.enveloped(seen.powers)
                return product.convolve_tabulated(*arrays, seen.rows, powers, graph)
        return self._convolve(up, self.radial(seen), edges, graph)

    def tabulate(self, knots: Knots, tolerance: float) -> None:
        """Makes splines of the radial networks."""
        config = self.config
        basis, transform = config.radial_basis, config.distance_transform
        on_basis = config.envelope_on is EnvelopeOn.BASIS

        def envelope(r: Any) -> Array:
            return polynomial_envelope(jnp.asarray(r), config.cutoff, config.envelope_p)

        def of_distance(network: ScalarMLP) -> Network:
            @jax.jit
            def of_radii(r: Array, radii: Array) -> Array:
                argument = r if transform is None else transform(r, radii)
                x = basis(argument, config.cutoff, config.num_bessel)
                if not on_basis:
                    return network(x)
                # zero goes to zero, so network(f x) / f has a limit where the envelope f vanishes
                f = jnp.maximum(envelope(r), _VANISHED)[:, None]
                return network(x * f) / f

            def of_pair(r: np.ndarray, pair: tuple[int, int]) -> np.ndarray:
                radii = 0.0
                if transform is not None:
                    table = covalent_radii(config.atomic_numbers, transform.radii)
                    radii = float(table[list(pair)].sum())
                return np.asarray(of_radii(jnp.asarray(r), jnp.full(len(r), radii)))

            return of_pair

        def spline(network: ScalarMLP) -> RadialSpline:
            function = of_distance(network)
            return RadialSpline(function, lambda r: np.asarray(envelope(r)), knots, tolerance)

        product, _ = self._products()
        outputs = product.num_weights * self.edge_channels
        rows = len(knots.pairs) * knots.intervals
        if isinstance(product, BoundNative) and rows * outputs <= _MOST_IN_TABLE:
            self.radial = RadialTable(of_distance(self.radial), knots)
        else:
            self.radial = spline(self.radial)
        if self.kind in _DENSITY:
            self.density = spline(self.density)

    def sum_densities(self, embedding: Float[Array, "species channels"]) -> None:
        """Makes densities of neighbours of the convolution, if that is less work: of features that
        are the species' rows of ``embedding``."""
        messages, (product, _) = natural_irreps(self.config.l_max), self._products()
        number, num_species = self.radial.functions.number, len(embedding)
        if not product.exact or product.on_harmonics:  # densities are no harmonics
            return
        if number * num_species > product.num_weights * self.edge_channels:
            return

        @jax.jit
        def kernels(embedding: Array) -> dict[str, Array]:
            up = self.linear_up(embedding[:, None] / float(np.sqrt(num_species)))
            up = jnp.repeat(up, number, axis=0)
            weights = jnp.tile(self.radial.kernel[...], (num_species, 1))
            weights = weights.reshape(len(up), product.num_weights, -1)
            found = {}
            for (_, ir), place in zip(messages, messages.slices(), strict=True):
                # by symmetry any component tells the factor of all of them
                unit = jnp.zeros((len(up), messages.dim, 1)).at[:, place.start].set(1)
                mapped = self.linear(product.per_path(up, unit, weights))
                found[str(ir)] = mapped[:, place.start]
            return found

        found = kernels(embedding.astype(jnp.float64))
        self.densities = NeighborDensities(self.radial.functions, messages, found)
        del self.radial, self.linear_up, self.linear


class AttentionLayer(MACELayer):
    """``real_agnostic_attention_residual``."""

    def _build(self, num_weights, irreps_paths, rngs):
        config = self.config
        irreps_in, scalars = e3nn.Irreps(self.irreps_in), natural_irreps(0)
        size = config.attention.channels
        self.linear_down = EquivariantLinear(irreps_in, scalars, config.channels, size, rngs=rngs)
        widths = (config.num_bessel + 2 * size, *config.attention.widths, num_weights)
        self.radial = self._scalar_mlp(widths, rngs)
        self.linear = EquivariantLinear(
            irreps_paths,
            natural_irreps(config.l_max),
            self.edge_channels,
            config.channels,
            rngs=rngs,
        )
        self.skip_linear = _skip_linear(self, rngs)

    def _interact(self, x, edges, graph):
        down = self.linear_down(x)[:, 0]
        pair = gather_senders(down, graph), gather_receivers(down, graph)
        weights = self.radial(jnp.concatenate([edges.radial, *pair], axis=1))
        summed = self._convolve(self.linear_up(x), weights, edges, graph)
        return self.linear(summed) / self.config.avg_num_neighbors, _skip(self, x)


class NonlinearLayer(MACELayer):
    """``real_agnostic_residual_nonlinear``.

    Reference: Batatia et al. 2025, https://arxiv.org/abs/2510.25380.
    """

    def _build(self, num_weights, irreps_paths, rngs):
        config, messages = self.config, natural_irreps(self.config.l_max)
        edge_irreps, size = e3nn.Irreps(self.edge_irreps), self.edge_channels
        table = len(config.atomic_numbers), config.channels
        self.source_embedding = normal_param(rngs, table, 1e-3)
        self.target_embedding = normal_param(rngs, table, 1e-3)
        scalars = config.num_bessel + 2 * config.channels
        self.radial = NormalizedMLP((scalars, *config.radial_widths, num_weights), rngs=rngs)
        self.density = NormalizedMLP((scalars, *config.density_widths, 1), rngs=rngs)
        self.alpha = nnx.Param(jnp.asarray(20.0, jnp.float32))
        self.beta = nnx.Param(jnp.asarray(0.0, jnp.float32))

        def linear(irreps_in, irreps_out, size_in, size_out):
            return EquivariantLinear(irreps_in, irreps_out, size_in, size_out, rngs=rngs)

        gates = config.channels * config.l_max  # one for each irrep above degree 0
        self.linear = linear(irreps_paths, messages, size, config.channels)
        self.gate_linear = linear(irreps_paths, natural_irreps(0), size, gates)
        reached = shared_irreps(edge_irreps, messages)
        self.residual_linear = linear(edge_irreps, reached, size, config.channels)
        self.residual_gate_linear = linear(edge_irreps, natural_irreps(0), size, gates)
        self.linear_out = linear(messages, messages, config.channels, config.channels)
        self.skip_linear = _skip_linear(self, rngs)

    def _interact(self, x, edges, graph):
        config, messages = self.config, natural_irreps(self.config.l_max)
        up = self.linear_up(x)
        norm = float(np.sqrt(len(config.atomic_numbers)))
        species = graph.species[graph.senders], graph.species[graph.receivers]
        tables = self.source_embedding, self.target_embedding
        seen = [t[...].astype(x.dtype)[s] / norm for t, s in zip(tables, species, strict=True)]
        features = jnp.concatenate([edges.radial, *seen], axis=1)
        summed = self._convolve(up, self.radial(features), edges, graph)
        alpha, beta = self.alpha[...].astype(x.dtype), self.beta[...].astype(x.dtype)
        density = alpha + beta * _density(self.density, features, edges, graph)
        edge_irreps = e3nn.Irreps(self.edge_irreps)
        residual = into_irreps(
            self.residual_linear(up), shared_irreps(edge_irreps, messages), messages
        )
        result = self.linear(summed) / density + residual
        gates = self.gate_linear(summed) / density + self.residual_gate_linear(up)
        gates = gates.reshape(graph.num_nodes, config.l_max, config.channels)
        result = self.linear_out(gated(result, gates, messages, config.activation))
        return result, _skip(self, x)


_LAYERS: dict[Interaction, type[MACELayer]] = {
    Interaction.REAL_AGNOSTIC_ATTENTION_RESIDUAL: AttentionLayer,
    Interaction.REAL_AGNOSTIC_RESIDUAL_NONLINEAR: NonlinearLayer,
}


def _skip_linear(layer: MACELayer, rngs: nnx.Rngs) -> EquivariantLinear:
    channels, irreps_in = layer.config.channels, e3nn.Irreps(layer.irreps_in)
    kept = shared_irreps(irreps_in, e3nn.Irreps(layer.irreps_out))
    return EquivariantLinear(irreps_in, kept, channels, channels, rngs=rngs)


def _skip(
    layer: AttentionLayer | NonlinearLayer, x: Float[Array, "nodes dim_in channels"]
) -> Array:
    irreps_in, irreps_out = e3nn.Irreps(layer.irreps_in), e3nn.Irreps(layer.irreps_out)
    return into_irreps(layer.skip_linear(x), shared_irreps(irreps_in, irreps_out), irreps_out)


def _density(
    network: ScalarMLP | NormalizedMLP | RadialSpline,
    features: Float[Array, "edges features"] | Places,
    edges: Edges,
    graph: Graph,
) -> Float[Array, "nodes 1 1"]:
    """The sum over neighbours of a learned number between 0 and 1."""
    values = edges.enveloped(jnp.tanh(network(features) ** 2))
    return sum_receivers(values, graph)[:, :, None]


class Readout(nnx.Module):
    """Energy of every atom from its scalars, for each head through hidden channels of its own."""

    def __init__(self, config: MACEConfig, how: LastReadout, *, rngs: nnx.Rngs):
        self.config = config
        number, hidden = len(config.heads), len(config.heads) * config.readout_channels
        layers = {LastReadout.LINEAR: 0, LastReadout.MLP: 1, LastReadout.BIASED_MLP: 2}[how]
        widths = (config.channels, *([hidden] * layers), number)
        shapes = list(zip(widths[:-1], widths[1:], strict=True))
        self.kernels = nnx.List([normal_param(rngs, shape) for shape in shapes])
        self.biased = how is LastReadout.BIASED_MLP
        if self.biased:  # all but the first
            self.biases = nnx.List([nnx.Param(jnp.zeros(w, jnp.float32)) for w in widths[2:]])

    def __call__(
        self, x: Float[Array, "nodes channels"], heads: Int[Array, " nodes"]
    ) -> Float[Array, " nodes"]:
        config, number = self.config, len(self.config.heads)
        activation = normalized(config.readout_activation, config.activation)
        mine = (heads[:, None] == jnp.arange(number, dtype=heads.dtype)[None]).astype(x.dtype)
        for index, param in enumerate(self.kernels):
            kernel = param[...].astype(x.dtype)
            x = x @ (kernel / float(np.sqrt(kernel.shape[0])))
            if self.biased and index:
                x = x + self.biases[index - 1][...].astype(x.dtype)[None]
            if index < len(self.kernels) - 1:
                x = activation(x)
                if number > 1:
                    x = (x.reshape(len(x), number, -1) * mine[:, :, None]).reshape(x.shape)
        return x[:, 0] if number == 1 else jnp.sum(x * mine, axis=1)


class JointEmbedding(nnx.Module):
    """Features of the atoms from properties of their structure."""

    def __init__(self, config: MACEConfig, *, rngs: nnx.Rngs):
        self.config = config
        tables: dict[str, nnx.Param] = {}
        networks: dict[str, BiasedPair] = {}
        for feature in config.joint_embedding:
            size, encoding = feature.channels, feature.encoding
            if isinstance(encoding, Categorical):
                tables[feature.quantity] = normal_param(rngs, (encoding.num_classes, size))
            else:
                networks[feature.quantity] = BiasedPair(size, rngs=rngs)
        total = sum(feature.channels for feature in config.joint_embedding)
        self.tables, self.networks = nnx.Dict(tables), nnx.Dict(networks)
        self.kernel = normal_param(rngs, (total, config.channels), total**-0.5)

    def __call__(self, graph: Graph, dtype: Any) -> Float[Array, "nodes channels"]:
        parts = []
        for feature in self.config.joint_embedding:
            default = 0.0 if feature.quantity == "charge" else 1.0
            values = getattr(graph, feature.quantity)
            values = jnp.full(graph.num_graphs, default) if values is None else values
            if isinstance(feature.encoding, Categorical):
                index = jnp.round(values).astype(jnp.int32) + feature.encoding.offset
                parts.append(self.tables[feature.quantity][...].astype(dtype)[index])
            else:
                parts.append(self.networks[feature.quantity](values.astype(dtype)[:, None]))
        joined = jnp.concatenate(parts, axis=1) @ self.kernel[...].astype(dtype)
        return jax.nn.silu(joined)[graph.node_graph]


class BiasedPair(nnx.Module):
    """One number to ``size`` numbers: two linear maps with biases, SiLU between."""

    def __init__(self, size: int, *, rngs: nnx.Rngs):
        self.kernel_1 = normal_param(rngs, (1, size))
        self.kernel_2 = normal_param(rngs, (size, size), size**-0.5)
        self.bias_1 = nnx.Param(jnp.zeros(size, jnp.float32))
        self.bias_2 = nnx.Param(jnp.zeros(size, jnp.float32))

    def __call__(self, x: Float[Array, "graphs 1"]) -> Float[Array, "graphs size"]:
        k_1, b_1, k_2, b_2 = (
            param[...].astype(x.dtype)
            for param in (self.kernel_1, self.bias_1, self.kernel_2, self.bias_2)
        )
        return jax.nn.silu(x @ k_1 + b_1[None]) @ k_2 + b_2[None]


def _node_heads(graph: Graph) -> Int[Array, " nodes"]:
    if graph.head is None:
        return jnp.zeros(graph.num_nodes, jnp.int32)
    return jnp.asarray(graph.head)[graph.node_graph]
