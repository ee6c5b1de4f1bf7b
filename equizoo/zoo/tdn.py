"""Tensor decomposition network: Equiformer made uniform, one weight for all couplings of an edge.

With one weight per channel the product of an edge is one matrix, the same for all layers and
channels, so it needs no decomposition: exact is the default. The published form, a canonical
polyadic (CP) decomposition of the couplings, is another tensor product.

Reference: Lin et al. 2025, https://arxiv.org/abs/2507.01131, and its published implementation.
"""

import dataclasses
import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from equizoo.graph import (
    Graph,
    gather_receivers,
    gather_senders,
    softmax_receivers,
    sum_graphs,
    sum_receivers,
)
from equizoo.layers.distance_basis import RadialBasis
from equizoo.layers.gating import smooth_leaky_relu
from equizoo.layers.harmonics import safe_norm, spherical_harmonics
from equizoo.layers.isolated import lone_atoms
from equizoo.layers.norm import EPSILON
from equizoo.layers.radial import polynomial_envelope
from equizoo.layers.radial_network import Affine, RadialNetwork, uniform_param
from equizoo.layers.stochastic import dropout, split_keys
from equizoo.neighbors import NeighborLimit
from equizoo.tensor_products._base import BoundProduct, TensorProduct, single_copies
from equizoo.tensor_products.cp_decomposed import CPDecomposed, Normalization, Schedule, Tolerance
from equizoo.tensor_products.shared_weights import Form, SharedWeights
from equizoo.zoo._base import Architecture, ArchitectureConfig, Forces, Symmetry


class Parity(enum.StrEnum):
    """What features know of reflections.

    ``ignored``: every degree once, all couplings, SO(3) alone (0e+1e+2e), as published.
    ``natural``: the parity of harmonics (0e+1o+2e), O(3), even couplings alone. ``both``: true and
    pseudo-tensors (0e+1o+2e+0o+1e+2o), O(3) and all couplings, twice the components.
    """

    IGNORED = "ignored"
    NATURAL = "natural"
    BOTH = "both"


class Linear(enum.StrEnum):
    """Whether degrees share the weights of linear maps (as published) or have their own."""

    SHARED = "shared"
    PER_DEGREE = "per_degree"


class Isolated(enum.StrEnum):
    """Energy of an atom without neighbours: zero either way.

    ``subtracted``: less than others by what the model says of such an atom, a continuous function.
    ``deleted``: left out, as published, while the last neighbour's leaving makes a jump.
    """

    SUBTRACTED = "subtracted"
    DELETED = "deleted"


class Output(enum.StrEnum):
    """What outputs of atoms sum to: the ``total`` energy, or, as published for PubChemQCR, the
    energy ``per_atom``: then a part of a structure depends on the size of the whole."""

    TOTAL = "total"
    PER_ATOM = "per_atom"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TDNConfig(ArchitectureConfig):
    """Options of TDN; the defaults are the paper's for PubChemQCR, but for an exact product, the
    forces, the envelope and isolated atoms (:data:`PUBLISHED` has those).

    ``tensor_product`` may be any. ``SharedWeights()`` has one weight for each channel and is exact;
    ``LowRankWeights(K)`` has ``K``, up to one for each coupling, and is exact;
    ``SharedWeights(CPDecomposed(...), Form.PRODUCT)`` is the paper's, with ``defect``.
    """

    channels: int = 256  # of every degree
    l_max: int = 1
    parity: Parity = Parity.IGNORED
    num_layers: int = 6
    num_heads: int = 4
    radial_basis: RadialBasis = RadialBasis.GAUSSIAN
    num_basis: int = 256
    radial_widths: tuple[int, ...] = (64, 64)
    linear: Linear = Linear.SHARED
    forces: Forces = Forces.GRADIENT
    envelope_p: int | None = 5  # makes energies smooth at the cutoff; None: as published
    isolated: Isolated = Isolated.SUBTRACTED
    neighbor_limit: NeighborLimit | None = None
    alpha_dropout: float = 0.2  # of attention weights, while training
    avg_num_nodes: float = 36.6  # atoms per structure: those of PubChemQCR-S
    output: Output = Output.TOTAL
    scale: float = 1.0  # [eV] of the network's energy
    force_scale: float = 1.0  # [eV/Å] of the network's direct forces
    tensor_product: TensorProduct = SharedWeights()  # over edges

    def __post_init__(self):
        super().__post_init__()
        if self.channels % self.num_heads:
            raise ValueError(
                f"channels ({self.channels}) must be a multiple of num_heads ({self.num_heads})."
            )
        if self.l_max < 1 or self.num_layers < 1:
            raise ValueError(
                f"l_max ({self.l_max}) and num_layers ({self.num_layers}) must be at least 1."
            )
        if not 0 <= self.alpha_dropout < 1:
            raise ValueError(f"alpha_dropout is {self.alpha_dropout}, expected a rate in [0, 1).")

    @property
    def irreps(self) -> str:
        """Of the features, each with all channels."""
        return "+".join(_irreps(self.l_max, self.parity))

    @property
    def harmonics(self) -> str:
        """Of edges: all degrees up to ``l_max``, in their own parity unless that is ignored."""
        return "+".join(_irreps(self.l_max, self.parity)[: self.l_max + 1])

    @property
    def product(self) -> BoundProduct:
        """The tensor product of features with harmonics."""
        return self.tensor_product.bind(self.irreps, self.harmonics, self.irreps)

    @property
    def symmetry(self) -> Symmetry:
        return Symmetry.SO3 if self.parity == Parity.IGNORED else Symmetry.O3

    @property
    def smooth(self) -> bool:
        continuous = self.isolated == Isolated.SUBTRACTED and self.neighbor_limit is None
        return self.envelope_p is not None and continuous

    @property
    def conservative(self) -> bool:
        return self.forces == Forces.GRADIENT

    @property
    def limit(self) -> NeighborLimit | None:
        return self.neighbor_limit

    @property
    def cost_of_flat(self) -> float:
        in_rows = self.tensor_product == SharedWeights(form=Form.NEIGHBORS)
        # else nearly all work is done for each edge alone
        return super().cost_of_flat if in_rows else 1.0

    @property
    def defect(self) -> float:
        """Of the product, times the products that follow on one another: to first order, as if
        their errors were all of one sign and nothing in between weakened or amplified them.
        Forces of a head that symmetry makes zero are so to this part of usual ones."""
        depth = 2 * self.num_layers + (1 if self.conservative else 3)
        return 0.0 if self.product.exact else depth * self.product.defect

    def build(self, *, rngs: nnx.Rngs) -> "TDN":
        return TDN(self, rngs=rngs)


def _irreps(l_max: int, parity: Parity) -> list[str]:
    degrees = range(l_max + 1)
    if parity == Parity.IGNORED:
        return [f"{degree}e" for degree in degrees]
    true, pseudo = ([f"{d}{'eo'[(d + k) % 2]}" for d in degrees] for k in (0, 1))
    return true + (pseudo if parity == Parity.BOTH else [])


def published_product(rank: int | Schedule | Tolerance = Schedule.SEVEN_L2) -> TensorProduct:
    """The paper's: bare couplings, decomposed into as many terms, each multiplied per channel."""
    return SharedWeights(CPDecomposed(rank, Normalization.WIGNER), Form.PRODUCT)


PUBLISHED: dict[str, Any] = {
    "forces": Forces.DIRECT,
    "envelope_p": None,
    "isolated": Isolated.DELETED,
    "tensor_product": published_product(),
}
SIZES: dict[str, dict[str, Any]] = {
    "pubchemqcr": PUBLISHED | {"output": Output.PER_ATOM},
    **{f"paper_l{l_max}": PUBLISHED | {"l_max": l_max, "num_heads": 8} for l_max in (1, 2, 3)},
    **{f"exact_l{l_max}": {"l_max": l_max, "num_heads": 8} for l_max in (1, 2, 3)},
}


class Edges(NamedTuple):
    """What all layers share: harmonics, the product prepared with them, radial basis, envelope."""

    harmonics: Float[Array, "edges dim_harmonics"]
    prepared: Any
    basis: Float[Array, "edges num_basis"]
    envelope: Float[Array, " edges"] | None


class TDN(Architecture):
    """Layers of attention over neighbours and feed-forward networks, then heads."""

    species_tables = {"embedding": False}
    unit_kernels = False

    config: TDNConfig

    def __init__(self, config: TDNConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels = config.channels
        self.embedding = uniform_param(rngs, (len(config.atomic_numbers), channels), 1.0)
        self.embedding_bias = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.basis = config.radial_basis.build(config.cutoff, config.num_basis, rngs=rngs)
        self.edge_degree = EdgeDegree(config, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = IrrepNorm(config, rngs=rngs)
        self.head_1 = Affine(channels, channels, rngs=rngs)
        self.head_2 = Affine(channels, 1, rngs=rngs)
        self.force_head = None if config.conservative else ForceHead(config, rngs=rngs)

    def node_energies(
        self, vectors: Float[Array, "edges 3"], graph: Graph
    ) -> Float[Array, " nodes"]:
        x, _ = self._features(vectors, graph, self.key)
        return self._energies(x, graph)

    def energies_and_forces(
        self, vectors: Float[Array, "edges 3"], graph: Graph
    ) -> tuple[Float[Array, " nodes"], Float[Array, "nodes 3"]]:
        assert self.force_head is not None  # the config says that forces are direct
        feature_key, force_key = split_keys(self.key, 2)
        x, edges = self._features(vectors, graph, feature_key)
        forces = self.config.force_scale * self.force_head(x, edges, graph, force_key)
        return self._energies(x, graph), forces * _has_neighbors(graph, x.dtype)[:, None]

    def _features(
        self, vectors: Float[Array, "edges 3"], graph: Graph, key: Array | None
    ) -> tuple[Float[Array, "nodes dim channels"], Edges]:
        config, edges = self.config, self._edges(vectors)
        embedding = self.embedding[...].astype(vectors.dtype)[graph.species]
        embedding = embedding + self.embedding_bias[...].astype(vectors.dtype)[None]
        x = self.edge_degree(edges, graph)
        x = x + _among_zeros(embedding, x.shape[1])
        for layer, layer_key in zip(self.layers, split_keys(key, config.num_layers), strict=True):
            x = layer(x, edges, graph, layer_key)
        return self.norm(x), edges

    def _edges(self, vectors: Float[Array, "edges 3"]) -> Edges:
        config, lengths = self.config, safe_norm(vectors)
        # published models take harmonics of the vector from receiver to sender
        harmonics = spherical_harmonics(single_copies(config.harmonics), -vectors)
        return Edges(
            harmonics=harmonics,
            prepared=config.product.prepare(harmonics[..., None]),
            basis=self.basis(lengths),
            envelope=None
            if config.envelope_p is None
            else polynomial_envelope(lengths, config.cutoff, config.envelope_p),
        )

    def _energies(
        self, x: Float[Array, "nodes dim channels"], graph: Graph
    ) -> Float[Array, " nodes"]:
        config, energies = self.config, self._scaled(x)
        if config.isolated == Isolated.DELETED:
            energies = energies * _has_neighbors(graph, x.dtype)
        else:
            away, lone = lone_atoms(len(config.atomic_numbers), config.cutoff, x.dtype)
            energies = energies - self._scaled(self._features(away, lone, None)[0])[graph.species]
        if config.output == Output.PER_ATOM:
            energies = energies * sum_graphs(jnp.ones_like(energies), graph)[graph.node_graph]
        return energies

    def _scaled(self, x: Float[Array, "nodes dim channels"]) -> Float[Array, " nodes"]:
        hidden = jax.nn.silu(self.head_1(x[:, 0]))
        return self.config.scale / self.config.avg_num_nodes**0.5 * self.head_2(hidden)[:, 0]


def _has_neighbors(graph: Graph, dtype: jnp.dtype) -> Float[Array, " nodes"]:
    return (sum_receivers(graph.edge_mask.astype(dtype), graph) > 0).astype(dtype)


def _among_zeros(x: Float[Array, "n channels"], dim: int) -> Float[Array, "n dim channels"]:
    """Features that have these scalars, and nothing else."""
    return jnp.pad(x[:, None], ((0, 0), (0, dim - 1), (0, 0)))


class IrrepLinear(nnx.Module):
    """``y_{l m d} = sum_c W_{c d} x_{l m c} + b_d``, the bias for scalars alone; see Linear.

    Of a sum of ``count`` features: ``count b``.
    """

    def __init__(
        self, config: TDNConfig, channels_out: int, *, use_bias: bool = True, rngs: nnx.Rngs
    ):
        self.config = config
        irreps = single_copies(config.irreps)
        count = len(irreps) if config.linear == Linear.PER_DEGREE else 1
        shape = (count, config.channels, channels_out)
        self.kernels = uniform_param(rngs, shape, config.channels**-0.5)
        self.bias = nnx.Param(jnp.zeros(channels_out, jnp.float32)) if use_bias else None

    def __call__(
        self, x: Float[Array, "n dim channels"], count: Float[Array, "n 1"] | None = None
    ) -> Float[Array, "n dim channels_out"]:
        kernels = self.kernels[...].astype(x.dtype)
        if self.config.linear == Linear.SHARED:
            y = x @ kernels[0]
        else:
            places = single_copies(self.config.irreps).slices()
            parts = [x[:, s] @ kernel for s, kernel in zip(places, kernels, strict=True)]
            y = jnp.concatenate(parts, axis=1)
        if self.bias is None:
            return y
        bias = self.bias[...].astype(x.dtype)[None]
        return y + _among_zeros(bias if count is None else count * bias, x.shape[1])


class IrrepNorm(nnx.Module):
    r"""Every irrep over its root mean square, times a weight for each channel.

    .. math:: y_{l m c} = \gamma_{l c} \, x_{l m c} \Big/
        \sqrt{\tfrac{1}{C (2l + 1)} \textstyle\sum_{m c} x_{l m c}^2 + \epsilon}

    Scalars are centred over their channels first and get a bias last.
    """

    def __init__(self, config: TDNConfig, *, rngs: nnx.Rngs):
        del rngs  # nothing random
        self.config = config
        irreps = single_copies(config.irreps)
        self.weights = nnx.Param(jnp.ones((len(irreps), config.channels), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(config.channels, jnp.float32))

    def __call__(self, x: Float[Array, "n dim channels"]) -> Float[Array, "n dim channels"]:
        weights, bias = self.weights[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        results = []
        for index, place in enumerate(single_copies(self.config.irreps).slices()):
            part = x[:, place]
            if index == 0:
                part = part - jnp.mean(part, axis=2, keepdims=True)
            mean = jnp.mean(part**2, axis=(1, 2), keepdims=True)
            part = part * jax.lax.rsqrt(mean + EPSILON) * weights[index, None, None]
            results.append(part + bias[None, None] if index == 0 else part)
        return jnp.concatenate(results, axis=1)


class Gate(nnx.Module):
    """A linear map, SiLU of its scalars; all else times a sigmoid of scalars, one per channel.

    Pseudo-scalars are gated as vectors are, since SiLU would break their parity.
    """

    def __init__(self, config: TDNConfig, *, rngs: nnx.Rngs):
        self.values = IrrepLinear(config, config.channels, rngs=rngs)
        self.gates = Affine(config.channels, config.channels, rngs=rngs)

    def __call__(self, x: Float[Array, "n dim channels"]) -> Float[Array, "n dim channels"]:
        gates = jax.nn.sigmoid(self.gates(x[:, 0]))
        # split, not indexing: its transpose is one concatenation
        scalars, rest = jax.lax.split(self.values(x), [1, x.shape[1] - 1], axis=1)
        return jnp.concatenate([jax.nn.silu(scalars), rest * gates[:, None]], axis=1)


class EdgeWeights(nnx.Module):
    """Weights of the product from the length of an edge, a network of its own for each use."""

    def __init__(self, config: TDNConfig, *, rngs: nnx.Rngs):
        self.config = config
        outputs = config.product.num_weights * config.channels
        widths = (config.num_basis, *config.radial_widths, outputs)
        self.network = RadialNetwork(widths, offset_bound=widths[-2] ** -0.5, rngs=rngs)

    def __call__(
        self, basis: Float[Array, "edges num_basis"]
    ) -> Float[Array, "edges num_weights channels"]:
        weights = self.network(basis)
        return weights.reshape(len(weights), -1, self.config.channels)


class EdgeDegree(nnx.Module):
    """Constants times harmonics, with radial weights, summed over neighbours."""

    def __init__(self, config: TDNConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.constants = Affine(config.channels, config.channels, rngs=rngs)  # of ones
        self.radial = EdgeWeights(config, rngs=rngs)
        self.linear = IrrepLinear(config, config.channels, rngs=rngs)

    def __call__(self, edges: Edges, graph: Graph) -> Float[Array, "nodes dim channels"]:
        config, dtype = self.config, edges.basis.dtype
        scalars = self.constants(jnp.ones((1, config.channels), dtype))
        scalars = _among_zeros(scalars, single_copies(config.irreps).dim)
        x = jnp.broadcast_to(scalars, (graph.num_edges, *scalars.shape[1:]))
        envelope = jnp.ones_like(edges.basis[:, 0]) if edges.envelope is None else edges.envelope
        weights = self.radial(edges.basis) * envelope[:, None, None]
        summed = config.product.collect(x, edges.harmonics, edges.prepared, weights, graph)
        count = sum_receivers(envelope, graph)
        return self.linear(summed, count[:, None]) / config.avg_num_neighbors**0.5


class Layer(nnx.Module):
    """Attention and a feed-forward network, each of normalised features and added to them."""

    def __init__(self, config: TDNConfig, *, rngs: nnx.Rngs):
        self.norm_1 = IrrepNorm(config, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.norm_2 = IrrepNorm(config, rngs=rngs)
        self.ffn_1 = Gate(config, rngs=rngs)
        self.ffn_2 = IrrepLinear(config, config.channels, rngs=rngs)

    def __call__(
        self, x: Float[Array, "nodes dim channels"], edges: Edges, graph: Graph, key: Array | None
    ) -> Float[Array, "nodes dim channels"]:
        x = x + self.attention(self.norm_1(x), edges, graph, key)
        return x + self.ffn_2(self.ffn_1(self.norm_2(x)))


class Attention(nnx.Module):
    r"""Values of messages, weighted by a softmax of their scalars and summed over neighbours.

    .. math:: m_{ij} = w_{ij} \odot T_{ij} (W_s x_j + W_t x_i), \quad
        x_i' = W \sum_j a_{ij} \, w_{ij} \odot T_{ij} \, \mathrm{gate}(m_{ij}), \quad
        a_{ij} = \mathrm{softmax}_j \left( a^T \sigma(W_a m_{ij}^{l=0}) \right)

    with the matrix :math:`T_{ij}` of the edge, and radial weights :math:`w_{ij}` used twice. For
    each head a part of the channels.
    """

    def __init__(self, config: TDNConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels, heads = config.channels, config.num_heads
        self.from_sender = IrrepLinear(config, channels, rngs=rngs)
        self.from_receiver = IrrepLinear(config, channels, use_bias=False, rngs=rngs)
        self.radial = EdgeWeights(config, rngs=rngs)
        self.to_alpha = Affine(channels, channels, rngs=rngs)
        shape = heads, channels // heads
        self.dot = uniform_param(rngs, shape, (6 / sum(shape)) ** 0.5)
        self.gate = Gate(config, rngs=rngs)
        self.linear = IrrepLinear(config, channels, rngs=rngs)

    def __call__(
        self, x: Float[Array, "nodes dim channels"], edges: Edges, graph: Graph, key: Array | None
    ) -> Float[Array, "nodes dim channels"]:
        config = self.config
        senders, receivers = self.from_sender(x), self.from_receiver(x)
        message = gather_senders(senders, graph) + gather_receivers(receivers, graph)
        weights = self.radial(edges.basis)
        message = config.product.apply(message, edges.prepared, weights)
        alpha = softmax_receivers(self._logits(message[:, 0]), graph, edges.envelope)
        alpha = dropout(alpha, config.alpha_dropout, key)
        # the product is linear in its weights, which are fewer than its results
        weights = weights * jnp.repeat(alpha, config.channels // config.num_heads, axis=1)[:, None]
        summed = config.product.collect(
            self.gate(message), edges.harmonics, edges.prepared, weights, graph
        )
        return self.linear(summed)

    def _logits(self, scalars: Float[Array, "edges channels"]) -> Float[Array, "edges heads"]:
        alphas = smooth_leaky_relu(self.to_alpha(scalars))
        by_head = alphas.reshape(len(alphas), self.config.num_heads, -1)
        return jnp.einsum("ehk,hk->eh", by_head, self.dot[...].astype(alphas.dtype))


class ForceHead(nnx.Module):
    """Attention, and one vector of its results."""

    def __init__(self, config: TDNConfig, *, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs=rngs)
        self.linear = IrrepLinear(config, 1, rngs=rngs)

    def __call__(
        self, x: Float[Array, "nodes dim channels"], edges: Edges, graph: Graph, key: Array | None
    ) -> Float[Array, "nodes 3"]:
        return self.linear(self.attention(x, edges, graph, key))[:, 1:4, 0]
