"""MACE: higher-order equivariant message passing.

Reference: Batatia et al. 2022, https://arxiv.org/abs/2206.07697; the ScaleShift form of its
published implementation.
"""

import dataclasses
import enum
from typing import Any

import e3nn_jax as e3nn
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from equizoo.graph import Graph, from_species_blocks, to_species_blocks
from equizoo.layers.activation import ActivationConstant
from equizoo.layers.harmonics import safe_norm, spherical_harmonics
from equizoo.layers.linear import EquivariantLinear, SpeciesLinear, normal_param
from equizoo.layers.mlp import ScalarMLP
from equizoo.layers.radial import bessel_basis, polynomial_envelope
from equizoo.tensor_products._base import TensorProduct, natural_irreps
from equizoo.tensor_products.clebsch_gordan import ClebschGordan
from equizoo.zoo._base import Architecture, ArchitectureConfig


class Interaction(enum.StrEnum):
    """How a layer treats the atom itself.

    ``real_agnostic``: messages pass a linear map per species, no self-connection.
    ``real_agnostic_residual``: the previous features, mapped per species, are added at the end.
    """

    REAL_AGNOSTIC = "real_agnostic"
    REAL_AGNOSTIC_RESIDUAL = "real_agnostic_residual"


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
    num_bessel: int = 8
    envelope_p: int = 5
    radial_widths: tuple[int, ...] = (64, 64, 64)
    readout_channels: int = 16
    scale: float = 1.0  # [eV] of the network's output
    shift: float = 0.0  # [eV] per atom
    zero_isolated: bool = True  # subtract what an isolated atom of the species would get
    activation: ActivationConstant = ActivationConstant.EXACT
    tensor_product: TensorProduct = ClebschGordan()  # over edges
    product_basis: TensorProduct = ClebschGordan()  # its power, over nodes

    def __post_init__(self):
        super().__post_init__()
        if not self.interactions:
            raise ValueError("interactions is empty, expected one entry per layer.")
        if not 0 <= self.hidden_l_max <= self.l_max:
            raise ValueError(
                f"hidden_l_max ({self.hidden_l_max}) must lie between 0 and l_max ({self.l_max})."
            )
        if self.zero_isolated and self.shift != 0:
            raise ValueError(
                f"shift is {self.shift} eV with zero_isolated=True, which makes isolated atoms "
                "their reference energy; set shift=0, or zero_isolated=False."
            )

    def build(self, *, rngs: nnx.Rngs) -> "MACE":
        return MACE(self, rngs=rngs)


SIZES: dict[str, dict[str, Any]] = {
    "paper_l0": {"channels": 256, "hidden_l_max": 0},
    "paper_l1": {"channels": 256, "hidden_l_max": 1},
    "paper_l2": {"channels": 256, "hidden_l_max": 2},
    "small": {"channels": 64, "hidden_l_max": 1},
}


class MACE(Architecture):
    """Two or more layers of (sum over neighbours, symmetric power, readout)."""

    config: MACEConfig

    def __init__(self, config: MACEConfig, *, rngs: nnx.Rngs):
        self.config = config
        num_species, channels = len(config.atomic_numbers), config.channels
        self.embedding = normal_param(rngs, (num_species, channels))
        layers, readouts = [], []
        irreps = natural_irreps(0)
        for index, kind in enumerate(config.interactions):
            last = index == len(config.interactions) - 1
            irreps_out = natural_irreps(0 if last else config.hidden_l_max)
            layers.append(MACELayer(config, kind, irreps, irreps_out, rngs=rngs))
            widths = (channels, config.readout_channels, 1) if last else (channels, 1)
            readouts.append(ScalarMLP(widths, activation=config.activation, rngs=rngs))
            irreps = irreps_out
        self.layers = nnx.List(layers)
        self.readouts = nnx.List(readouts)

    def node_energies(
        self, vectors: Float[Array, "edges 3"], graph: Graph
    ) -> Float[Array, " nodes"]:
        config = self.config
        energies = config.scale * self._readout_sum(vectors, graph) + config.shift
        if config.zero_isolated:
            lone = _lone_atoms(len(config.atomic_numbers))
            away = jnp.tile(jnp.array([[config.cutoff, 0, 0]], vectors.dtype), (lone.num_edges, 1))
            isolated = config.scale * self._readout_sum(away, lone) + config.shift
            energies = energies - isolated[graph.species]
        return energies

    def _readout_sum(
        self, vectors: Float[Array, "edges 3"], graph: Graph
    ) -> Float[Array, " nodes"]:
        config = self.config
        lengths = safe_norm(vectors)
        harmonics = spherical_harmonics(natural_irreps(config.l_max), vectors)
        envelope = polynomial_envelope(lengths, config.cutoff, config.envelope_p)
        radial = bessel_basis(lengths, config.cutoff, config.num_bessel) * envelope[:, None]
        embedding = self.embedding[...].astype(vectors.dtype)
        x = embedding[graph.species][:, None] / float(np.sqrt(len(config.atomic_numbers)))
        total = jnp.zeros(graph.num_nodes, vectors.dtype)
        for layer, readout in zip(self.layers, self.readouts, strict=True):
            x = layer(x, harmonics, radial, graph)
            total = total + readout(x[:, 0])[:, 0]
        return total


class MACELayer(nnx.Module):
    """Sum over neighbours, then products of up to ``correlation`` of the sums."""

    def __init__(
        self,
        config: MACEConfig,
        kind: Interaction,
        irreps_in: e3nn.Irreps,
        irreps_out: e3nn.Irreps,
        *,
        rngs: nnx.Rngs,
    ):
        self.config, self.kind = config, kind
        self.irreps_in, self.irreps_out = str(irreps_in), str(irreps_out)
        channels, num_species = config.channels, len(config.atomic_numbers)
        messages = natural_irreps(config.l_max)
        product, power = self._products()
        self.linear_up = EquivariantLinear(irreps_in, irreps_in, channels, channels, rngs=rngs)
        self.radial = ScalarMLP(
            (config.num_bessel, *config.radial_widths, channels * product.num_weights),
            activation=config.activation,
            rngs=rngs,
        )
        self.linear = EquivariantLinear(
            product.irreps_paths, messages, channels, channels, rngs=rngs
        )
        residual = kind is Interaction.REAL_AGNOSTIC_RESIDUAL
        self.species_linear = SpeciesLinear(
            irreps_in if residual else messages,
            irreps_out if residual else messages,
            channels,
            num_species,
            rngs=rngs,
        )
        self.product_weights = normal_param(
            rngs, (num_species, power.num_weights, channels), power.num_weights**-0.5
        )
        self.product_linear = EquivariantLinear(
            irreps_out, irreps_out, channels, channels, rngs=rngs
        )

    def _products(self):
        config, messages = self.config, natural_irreps(self.config.l_max)
        return (
            config.tensor_product.bind(self.irreps_in, messages, messages),
            config.product_basis.bind_power(messages, self.irreps_out, config.correlation),
        )

    def __call__(
        self,
        x: Float[Array, "nodes dim_in channels"],
        harmonics: Float[Array, "edges dim_harmonics"],
        radial: Float[Array, "edges num_bessel"],
        graph: Graph,
    ) -> Float[Array, "nodes dim_out channels"]:
        product, power = self._products()
        weights = self.radial(radial).reshape(graph.num_edges, product.num_weights, -1)
        summed = product.convolve(self.linear_up(x), harmonics, weights, graph)
        messages = self.linear(summed) / self.config.avg_num_neighbors
        if self.kind is Interaction.REAL_AGNOSTIC:
            messages = self.species_linear(messages, graph)
        block_weights = self.product_weights[...].astype(x.dtype)[graph.block_species]
        products = power(to_species_blocks(messages, graph), block_weights)
        result = self.product_linear(from_species_blocks(products, graph))
        if self.kind is Interaction.REAL_AGNOSTIC_RESIDUAL:
            result = result + self.species_linear(x, graph)
        return result


def _lone_atoms(num_species: int) -> Graph:
    """One atom of every species, each without neighbours."""
    nodes = np.arange(num_species, dtype=np.int32)
    return Graph(
        positions=np.zeros((num_species, 3), np.float32),
        species=nodes,
        node_graph=nodes,
        node_mask=np.ones(num_species, bool),
        cell=np.zeros((num_species, 3, 3), np.float32),
        graph_mask=np.ones(num_species, bool),
        senders=nodes,
        receivers=nodes,
        shifts=np.zeros((num_species, 3), np.float32),
        edge_mask=np.zeros(num_species, bool),
        outgoing=np.full((num_species, 1), num_species, np.int32),
        species_blocks=nodes[:, None],
        block_species=nodes,
        block_slot=nodes,
    )
