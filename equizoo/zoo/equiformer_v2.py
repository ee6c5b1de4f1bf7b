"""EquiformerV2: attention with convolutions in the frames of edges, and activations on spheres.

Reference: Liao et al. 2023, https://arxiv.org/abs/2306.12059, and its published implementation.
"""

import dataclasses
import enum
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from equizoo.graph import Graph, softmax_receivers, sum_graphs
from equizoo.layers.distance_basis import gaussian_smearing
from equizoo.layers.force_encoding import ForceInput
from equizoo.layers.gating import smooth_leaky_relu
from equizoo.layers.harmonics import safe_norm
from equizoo.layers.isolated import lone_atoms
from equizoo.layers.linear import normal_param
from equizoo.layers.norm import LayerNorm
from equizoo.layers.products import Products
from equizoo.layers.radial import polynomial_envelope
from equizoo.layers.radial_network import Affine, RadialNetwork, uniform_param
from equizoo.layers.so2 import (
    SO2Linear,
    ends_in_frames,
    frame_order,
    frame_rows,
    frame_scales,
    sum_from_frames,
)
from equizoo.layers.sphere_grid import Grid, grid_matrices
from equizoo.layers.stochastic import dropout, keep_path, split_keys
from equizoo.layers.uniform import JointNorm, SeparateNorm, UniformLinear
from equizoo.neighbors import NeighborLimit
from equizoo.tensor_products._base import natural_irreps
from equizoo.zoo._base import Architecture, ArchitectureConfig, Forces, Symmetry


class Norm(enum.StrEnum):
    """How layers normalise: degree 0 apart from the others (``separate``), or all ``joint``."""

    SEPARATE = "separate"
    JOINT = "joint"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EquiformerV2Config(ArchitectureConfig):
    """Options of EquiformerV2; the defaults are the paper's for OC20 2M, but for the forces and the
    envelope.

    Activations act on values at the points of a grid on the sphere, so results turn with the
    structure only up to ``defect``, which shrinks fast as ``grid_points`` grows.

    With ``Forces.GRADIENT`` frames of edges are differentiated through. Their angle about the edge
    is a smooth function of its direction but for the equator ``y = 0``, where it jumps; the energy
    depends on it, and jumps, by what the grid fails to resolve.
    """

    channels: int = 128
    hidden_channels: int = 64  # of messages
    ffn_channels: int = 128  # inside feed-forward networks
    alpha_channels: int = 64  # of the attention weight of each head
    value_channels: int = 16  # of the value of each head
    edge_channels: int = 128  # of radial networks and of the elements in them
    num_layers: int = 12
    num_heads: int = 8
    l_max: int = 6
    m_max: int = 2  # in the frames of edges
    num_basis: int = 600
    grid_points: int = 18  # of the sphere
    grid: Grid = Grid.GAUSS  # published: Grid.FEJER
    norm: Norm = Norm.SEPARATE
    products: Products = Products.FULL  # of convolutions in frames and feed-forward networks
    forces: Forces = Forces.GRADIENT
    envelope_p: int | None = 5  # makes energies smooth at the cutoff; None: as published
    neighbor_limit: NeighborLimit | None = None  # published: the 20 nearest; energies then jump
    alpha_dropout: float = 0.1  # of attention weights, while training
    drop_path: float = 0.05  # of a layer's update for a whole graph, while training
    avg_num_nodes: float = 77.81317  # atoms per structure: OC20's
    scale: float = 1.0  # [eV] of the network's energy
    force_scale: float = 1.0  # [eV/Å] of the network's direct forces
    offset: float = 0.0  # [eV] per structure
    zero_isolated: bool = True  # subtract what an isolated atom of the species would get
    force_input: ForceInput | None = None  # and a head for noise, to train with denoising

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.m_max <= self.l_max:
            raise ValueError(f"m_max ({self.m_max}) must lie between 1 and l_max ({self.l_max}).")
        for field in ("alpha_dropout", "drop_path"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, expected a rate in [0, 1).")
        if self.num_layers < 1:
            raise ValueError(f"num_layers is {self.num_layers}, expected at least 1.")
        if self.zero_isolated and self.offset != 0:
            raise ValueError(
                f"offset is {self.offset} eV with zero_isolated=True, which makes isolated atoms "
                "their reference energy; set offset=0, or zero_isolated=False."
            )
        grid_matrices(
            self.l_max, self.grid_points, self.grid
        )  # raises where the grid is too coarse

    @property
    def symmetry(self) -> Symmetry:
        return Symmetry.SO3

    @property
    def smooth(self) -> bool:
        return self.envelope_p is not None and self.neighbor_limit is None

    @property
    def conservative(self) -> bool:
        return self.forces == Forces.GRADIENT

    @property
    def denoises(self) -> bool:
        return self.force_input is not None

    @property
    def limit(self) -> NeighborLimit | None:
        return self.neighbor_limit

    @property
    def defect(self) -> float:
        """Bounds the largest deviations that were found with random weights, by
        ``benchmarks/equiformer_defect.py``: tenfold smaller with each power of functions of degree
        ``l_max`` that the grid resolves, of which there are ``(grid_points - 1) / l_max``."""
        unresolved = 10 ** -((self.grid_points - 1) / self.l_max)
        if self.grid is Grid.GAUSS:
            unresolved += 2e-6  # by its 4 m_max + 2 longitudes, however many points
        # derivatives grow with the degree; and the orders that are left in frames are scaled up
        largest = 5 * self.l_max * math.sqrt(self.num_layers) if self.conservative else 50.0
        largest *= math.sqrt((2 * self.l_max + 1) / (2 * self.m_max + 1))
        rounded = 0.0 if self.products is Products.FULL else 5e-2
        return largest * unresolved + rounded

    def build(self, *, rngs: nnx.Rngs) -> "EquiformerV2":
        return EquiformerV2(self, rngs=rngs)


_PUBLISHED: dict[str, Any] = {
    "forces": Forces.DIRECT,
    "envelope_p": None,
    "neighbor_limit": NeighborLimit(20),
    "zero_isolated": False,
    "grid": Grid.FEJER,
}
SIZES: dict[str, dict[str, Any]] = {
    "oc20_83m": _PUBLISHED,
    "oc20_31m": _PUBLISHED | {"num_layers": 8, "l_max": 4, "drop_path": 0.1},
    "oc20_153m": _PUBLISHED | {"num_layers": 20, "m_max": 3, "drop_path": 0.1},
    "oc22_121m": _PUBLISHED
    | {"num_layers": 18, "drop_path": 0.1, "neighbor_limit": NeighborLimit(20, tolerance=0.01)},
}


class Edges(NamedTuple):
    """What all layers share: frames, radial basis, envelope."""

    rows: Float[Array, "edges components dim"]
    basis: Float[Array, "edges num_basis"]
    envelope: Float[Array, " edges"] | None


class EquiformerV2(Architecture):
    """Layers of attention over neighbours and feed-forward networks on spheres, then heads."""

    species_tables = {"embedding": False, "senders": False, "receivers": False}
    unit_kernels = False

    config: EquiformerV2Config

    def __init__(self, config: EquiformerV2Config, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = normal_param(rngs, (len(config.atomic_numbers), config.channels))
        self.edge_degree = EdgeDegree(config, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = _norm(config, rngs)
        self.energy_head = FeedForward(config, 1, rngs=rngs)
        direct = config.forces == Forces.DIRECT
        self.force_head = Attention(config, 1, dropout=0.0, rngs=rngs) if direct else None
        denoises = config.denoises
        self.force_embedding = (
            UniformLinear(config.l_max, 1, config.channels, rngs=rngs) if denoises else None
        )
        self.noise_head = Attention(config, 1, dropout=0.0, rngs=rngs) if denoises else None

    def node_energies(
        self, vectors: Float[Array, "edges 3"], graph: Graph
    ) -> Float[Array, " nodes"]:
        x, _ = self._features(vectors, graph, self.key)
        return self._energies(x, graph)

    def energies_and_forces(
        self, vectors: Float[Array, "edges 3"], graph: Graph
    ) -> tuple[Float[Array, " nodes"], Float[Array, "nodes 3"]]:
        x, edges = self._features(vectors, graph, self.key)
        return self._energies(x, graph), self._forces(x, edges, graph)

    def denoise(
        self, vectors: Float[Array, "edges 3"], graph: Graph
    ) -> tuple[Float[Array, " nodes"], Float[Array, "nodes 3"] | None, Float[Array, "nodes 3"]]:
        if self.noise_head is None:
            return super().denoise(vectors, graph)
        x, edges = self._features(vectors, graph, self.key)
        noise = self.noise_head(x, edges, graph, None)[:, 1:4, 0]
        forces = None if self.force_head is None else self._forces(x, edges, graph)
        return self._energies(x, graph), forces, noise

    def _forces(
        self, x: Float[Array, "nodes dim channels"], edges: Edges, graph: Graph
    ) -> Float[Array, "nodes 3"]:
        assert self.force_head is not None  # the config says that forces are direct
        return self.config.force_scale * self.force_head(x, edges, graph, None)[:, 1:4, 0]

    def _features(
        self, vectors: Float[Array, "edges 3"], graph: Graph, key: Array | None
    ) -> tuple[Float[Array, "nodes dim channels"], Edges]:
        config, edges = self.config, edges_of(self.config, vectors)
        embedding = self.embedding[...].astype(vectors.dtype)[graph.species]
        x = self.edge_degree(edges, graph).at[:, 0].add(embedding)
        if config.force_input is not None and self.force_embedding is not None:
            irreps = natural_irreps(config.l_max)
            x = x + self.force_embedding(
                config.force_input.encoded(irreps, graph, x.dtype)[..., None]
            )
        for layer, layer_key in zip(self.layers, split_keys(key, config.num_layers), strict=True):
            x = layer(x, edges, graph, layer_key)
        return self.norm(x), edges

    def _energies(
        self, x: Float[Array, "nodes dim channels"], graph: Graph
    ) -> Float[Array, " nodes"]:
        config, energies = self.config, self._scaled(x)
        if config.zero_isolated:
            away, lone = lone_atoms(len(config.atomic_numbers), config.cutoff, x.dtype)
            isolated = self._scaled(self._features(away, lone, None)[0])
            energies = energies - isolated[graph.species]
        if config.offset:
            nodes = sum_graphs(jnp.ones_like(energies), graph)
            energies = energies + config.offset / jnp.maximum(nodes, 1)[graph.node_graph]
        return energies

    def _scaled(self, x: Float[Array, "nodes dim channels"]) -> Float[Array, " nodes"]:
        return self.config.scale / self.config.avg_num_nodes * self.energy_head(x)[:, 0, 0]


def edges_of(config: EquiformerV2Config, vectors: Float[Array, "edges 3"]) -> Edges:
    """What layers need of edge vectors."""
    lengths = safe_norm(vectors)
    return Edges(
        # published models take the vector from receiver to sender
        rows=frame_rows(-vectors, config.l_max, config.m_max),
        basis=gaussian_smearing(lengths, config.cutoff, config.num_basis),
        envelope=None
        if config.envelope_p is None
        else polynomial_envelope(lengths, config.cutoff, config.envelope_p),
    )


class EdgeFeatures(nnx.Module):
    """Weights of an edge from its length and the elements at its ends."""

    def __init__(self, config: EquiformerV2Config, num_weights: int, *, rngs: nnx.Rngs):
        width, num_species = config.edge_channels, len(config.atomic_numbers)
        self.senders = uniform_param(rngs, (num_species, width), 1e-3)
        self.receivers = uniform_param(rngs, (num_species, width), 1e-3)
        self.network = RadialNetwork(
            (config.num_basis + 2 * width, width, width, num_weights), rngs=rngs
        )

    def __call__(
        self, basis: Float[Array, "edges num_basis"], graph: Graph
    ) -> Float[Array, "edges num_weights"]:
        senders = self.senders[...].astype(basis.dtype)[graph.species[graph.senders]]
        receivers = self.receivers[...].astype(basis.dtype)[graph.species[graph.receivers]]
        return self.network(jnp.concatenate([basis, senders, receivers], axis=1))


class EdgeDegree(nnx.Module):
    """Axial features of each edge, a function of its length and elements, summed over edges."""

    def __init__(self, config: EquiformerV2Config, *, rngs: nnx.Rngs):
        self.config = config
        self.weights = EdgeFeatures(config, (config.l_max + 1) * config.channels, rngs=rngs)

    def __call__(self, edges: Edges, graph: Graph) -> Float[Array, "nodes dim channels"]:
        config = self.config
        axial = self.weights(edges.basis, graph)
        if edges.envelope is not None:
            axial = axial * edges.envelope[:, None]
        axial = axial.reshape(graph.num_edges, config.l_max + 1, config.channels)
        scales = frame_scales(config.l_max, config.m_max)[: config.l_max + 1]
        axial = axial * jnp.asarray(scales, axial.dtype)[None, :, None]
        rows = edges.rows[:, : config.l_max + 1]
        return sum_from_frames(axial, rows, graph) / config.avg_num_neighbors


class Layer(nnx.Module):
    """Attention and a feed-forward network, each of normalised features and added to them."""

    def __init__(self, config: EquiformerV2Config, *, rngs: nnx.Rngs):
        self.config = config
        self.norm_1 = _norm(config, rngs)
        self.attention = Attention(config, config.channels, dropout=config.alpha_dropout, rngs=rngs)
        self.norm_2 = _norm(config, rngs)
        self.ffn = FeedForward(config, config.channels, rngs=rngs)

    def __call__(
        self, x: Float[Array, "nodes dim channels"], edges: Edges, graph: Graph, key: Array | None
    ) -> Float[Array, "nodes dim channels"]:
        rate, (for_attention, first, second) = self.config.drop_path, split_keys(key, 3)
        update = self.attention(self.norm_1(x), edges, graph, for_attention)
        x = x + update * keep_path(graph, rate, first, x.dtype)[:, None, None]
        update = self.ffn(self.norm_2(x))
        return x + update * keep_path(graph, rate, second, x.dtype)[:, None, None]


class Attention(nnx.Module):
    r"""Values made in the frame of each edge, weighted by a softmax and summed over neighbours.

    .. math:: x_i' = W \sum_j a_{ij} D_{ij}^T \, C_2 \, \sigma(h_{ij}), \quad
        (s_{ij}, g_{ij}, h_{ij}) = C_1 \left( w_{ij} \, D_{ij} (x_j \oplus x_i) \right), \quad
        a_{ij} = \mathrm{softmax}_j \left( a^T \sigma'(\mathrm{LN}(s_{ij})) \right)

    with :math:`C` maps that commute with rotations about the edge and :math:`\sigma` acting on the
    sphere, but for degree 0, which is SiLU of :math:`g_{ij}`. ``LN`` is the paper's attention
    re-normalisation.
    """

    def __init__(
        self, config: EquiformerV2Config, channels_out: int, *, dropout: float, rngs: nnx.Rngs
    ):
        self.config, self.dropout = config, dropout
        l_max, m_max, hidden = config.l_max, config.m_max, config.hidden_channels
        heads, alphas = config.num_heads, config.alpha_channels
        values = heads * config.value_channels
        self.conv_1 = SO2Linear(
            l_max,
            m_max,
            2 * config.channels,
            hidden,
            scalars=heads * alphas + hidden,
            products=config.products,
            rngs=rngs,
        )
        self.weights = EdgeFeatures(config, self.conv_1.num_weights, rngs=rngs)
        self.conv_2 = SO2Linear(l_max, m_max, hidden, values, products=config.products, rngs=rngs)
        self.norm = LayerNorm(alphas, rngs=rngs)
        self.dot = uniform_param(rngs, (heads, alphas), alphas**-0.5)
        self.linear = UniformLinear(l_max, values, channels_out, rngs=rngs)

    def __call__(
        self, x: Float[Array, "nodes dim channels"], edges: Edges, graph: Graph, key: Array | None
    ) -> Float[Array, "nodes dim channels_out"]:
        config = self.config
        in_frame = ends_in_frames(x, edges.rows, graph)
        scalars, hidden = self.conv_1(in_frame, self.weights(edges.basis, graph))
        alphas, gates = jnp.split(scalars, [config.num_heads * config.alpha_channels], axis=1)
        _, values = self.conv_2(self._activated(hidden, gates))
        alpha = dropout(self._alpha(alphas, edges, graph), self.dropout, key)
        return self.linear(self._summed(values, alpha, edges, graph))

    def _alpha(
        self, alphas: Float[Array, "edges _"], edges: Edges, graph: Graph
    ) -> Float[Array, "edges heads"]:
        by_head = alphas.reshape(len(alphas), self.config.num_heads, -1)
        scalars = smooth_leaky_relu(self.norm(by_head))
        logits = jnp.einsum("ehk,hk->eh", scalars, self.dot[...].astype(alphas.dtype))
        return softmax_receivers(logits, graph, edges.envelope)

    def _summed(
        self,
        values: Float[Array, "edges components values"],
        alpha: Float[Array, "edges heads"],
        edges: Edges,
        graph: Graph,
    ) -> Float[Array, "nodes dim values"]:
        config = self.config
        by_head = values.reshape(*values.shape[:2], config.num_heads, -1)
        weighted = (by_head * alpha[:, None, :, None]).reshape(values.shape)
        scales = jnp.asarray(frame_scales(config.l_max, config.m_max), values.dtype)
        return sum_from_frames(weighted * scales[None, :, None], edges.rows, graph)

    def _activated(
        self, x: Float[Array, "edges components hidden"], gates: Float[Array, "edges hidden"]
    ) -> Float[Array, "edges components hidden"]:
        """SiLU on the sphere; degree 0 is SiLU of other scalars (separable S2 activation)."""
        config = self.config
        order = frame_order(config.l_max, config.m_max)
        scales = frame_scales(config.l_max, config.m_max)
        to, back = (
            jnp.asarray(matrix[:, order] * scales, x.dtype)
            for matrix in grid_matrices(config.l_max, config.grid_points, config.grid, config.m_max)
        )
        values = jax.nn.silu(jnp.einsum("pk,ekc->epc", to, x))
        rest = jnp.einsum("pk,epc->ekc", back[:, 1:], values)
        return jnp.concatenate([jax.nn.silu(gates)[:, None], rest], axis=1)


class FeedForward(nnx.Module):
    """A network at each point of the sphere; degree 0 is one of scalars alone."""

    def __init__(self, config: EquiformerV2Config, channels_out: int, *, rngs: nnx.Rngs):
        self.config = config
        hidden, products = config.ffn_channels, config.products
        self.linear_1 = UniformLinear(
            config.l_max, config.channels, hidden, products=products, rngs=rngs
        )
        self.scalars = Affine(config.channels, hidden, rngs=rngs)
        self.pointwise = nnx.List(
            [uniform_param(rngs, (hidden, hidden), hidden**-0.5) for _ in range(3)]
        )
        self.linear_2 = UniformLinear(
            config.l_max, hidden, channels_out, products=products, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "nodes dim channels"]
    ) -> Float[Array, "nodes dim channels_out"]:
        config = self.config
        to, back = (
            jnp.asarray(matrix, x.dtype)
            for matrix in grid_matrices(config.l_max, config.grid_points, config.grid)
        )
        scalars = jax.nn.silu(self.scalars(x[:, 0]))
        first, second, third = (param[...].astype(x.dtype) for param in self.pointwise)
        # what is linear before and after the sphere acts on coefficients, fewer than points
        of = config.products.of
        values = jnp.einsum("pi,nic->npc", to, of(self.linear_1(x), first))
        values = jax.nn.silu(of(jax.nn.silu(values), second))
        rest = of(jnp.einsum("pi,npc->nic", back[:, 1:], values), third)
        return self.linear_2(jnp.concatenate([scalars[:, None], rest], axis=1))


def _norm(config: EquiformerV2Config, rngs: nnx.Rngs) -> SeparateNorm | JointNorm:
    kind = SeparateNorm if config.norm == Norm.SEPARATE else JointNorm
    return kind(config.l_max, config.channels, rngs=rngs)
