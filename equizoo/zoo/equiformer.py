"""Equiformer: attention over neighbours with messages of irreps.

Reference: Liao and Smidt 2022, https://arxiv.org/abs/2206.11990, and its published implementation.
"""

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import e3nn_jax as e3nn
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from equizoo.graph import (
    Graph,
    gather_receivers,
    gather_senders,
    softmax_receivers,
    sum_receivers,
)
from equizoo.layers.activation import ActivationConstant, normalized_silu
from equizoo.layers.depthwise import Depthwise, depthwise
from equizoo.layers.depthwise_in_frames import (
    Frames,
    frames_of,
    in_frames,
    into_frames,
    summed_from_frames,
)
from equizoo.layers.distance_basis import RadialBasis
from equizoo.layers.features import (
    SCALAR,
    Features,
    FeaturesLinear,
    add,
    channels_of,
    gate,
    irreps_of,
    with_gates,
)
from equizoo.layers.force_encoding import ForceInput
from equizoo.layers.gating import normalized_smooth_leaky_relu
from equizoo.layers.harmonics import safe_norm, spherical_harmonics
from equizoo.layers.isolated import lone_atoms
from equizoo.layers.linear import normal_param
from equizoo.layers.norm import FeaturesNorm
from equizoo.layers.radial import polynomial_envelope
from equizoo.layers.radial_network import RadialNetwork, uniform_param
from equizoo.layers.stochastic import dropout, keep_path, split_keys
from equizoo.tensor_products._base import TensorProduct
from equizoo.tensor_products.clebsch_gordan import ClebschGordan
from equizoo.zoo._base import Architecture, ArchitectureConfig, Symmetry

PI = 3.14159  # as published, in learned Gaussians


class Message(enum.StrEnum):
    """How messages are made of products with harmonics.

    ``linear``: one product, then a linear map. ``nonlinear``: a product, a linear map and a gate,
    then a second product and a linear map.
    """

    LINEAR = "linear"
    NONLINEAR = "nonlinear"


class Evaluation(enum.StrEnum):
    """Where products of messages are evaluated; the map is the same.

    ``in_frames``: with the edge as polar axis, where exact products are a few numbers, see
    ``layers/depthwise_in_frames.py``; products that are not exact as they are. ``as_given``: by
    the tensor product itself, always.
    """

    IN_FRAMES = "in_frames"
    AS_GIVEN = "as_given"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EquiformerConfig(ArchitectureConfig):
    """Options of Equiformer; the defaults are the paper's for MD17 at degree 2, but for the
    envelope.

    ``irreps`` with even parity alone (0e+1e+2e) tell a molecule from its mirror image: energies are
    invariant under SO(3). With both parities, the harmonics have their natural one and energies
    are invariant under O(3).
    """

    irreps: str = "128x0e+64x1e+32x2e"  # of the nodes
    head_irreps: str = "32x0e+16x1e+8x2e"  # of the values of each attention head
    ffn_irreps: str = "384x0e+192x1e+96x2e"  # inside feed-forward networks
    output_channels: int = 512  # scalars after the last layer
    num_layers: int = 6
    num_heads: int = 4
    message: Message = Message.NONLINEAR
    radial_basis: RadialBasis = RadialBasis.EXP_NORMAL  # of MD17; gaussian: QM9, OC20
    num_basis: int = 32
    radial_widths: tuple[int, ...] = (64, 64)
    envelope_p: int | None = 5  # makes energies smooth at the cutoff; None: as published
    alpha_dropout: float = 0.0  # of attention weights, while training
    drop_path: float = 0.0  # of a layer's update for a whole graph, while training
    avg_num_nodes: float = 18.03065905448718  # atoms per structure: QM9's, which MD17 shares
    scale: float = 1.0  # [eV] of the network's output
    shift: float = 0.0  # [eV] per atom
    zero_isolated: bool = True  # subtract what an isolated atom of the species would get
    activation: ActivationConstant = ActivationConstant.EXACT
    tensor_product: TensorProduct = ClebschGordan()  # over edges
    evaluation: Evaluation = Evaluation.IN_FRAMES
    force_input: ForceInput | None = None  # and a head for noise, to train with denoising

    def __post_init__(self):
        super().__post_init__()
        for field in ("head_irreps", "ffn_irreps"):
            if set(channels_of(getattr(self, field))) != set(channels_of(self.irreps)):
                raise ValueError(
                    f"{field} is '{getattr(self, field)}', expected the irreps of "
                    f"'{self.irreps}' with channels of its own."
                )
        for field in ("alpha_dropout", "drop_path"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, expected a rate in [0, 1).")
        if self.num_layers < 1:
            raise ValueError(f"num_layers is {self.num_layers}, expected at least 1.")
        if self.zero_isolated and self.shift != 0:
            raise ValueError(
                f"shift is {self.shift} eV with zero_isolated=True, which makes isolated atoms "
                "their reference energy; set shift=0, or zero_isolated=False."
            )
        if self.force_input is not None and self.vector not in channels_of(self.irreps):
            raise ValueError(
                f"Noise of positions is of irrep {self.vector}, which '{self.irreps}' lacks; add "
                "it, or set force_input=None."
            )

    @property
    def symmetry(self) -> Symmetry:
        parities = {ir.p for _, ir in e3nn.Irreps(self.irreps)}
        return Symmetry.O3 if -1 in parities else Symmetry.SO3

    @property
    def smooth(self) -> bool:
        return self.envelope_p is not None

    @property
    def cost_of_flat(self) -> float:
        return 1.25  # most work is done for each edge alone

    @property
    def denoises(self) -> bool:
        return self.force_input is not None

    @property
    def vector(self) -> str:
        """The irrep of positions: where all parities are even, they say nothing."""
        return "1o" if self.symmetry is Symmetry.O3 else "1e"

    @property
    def output_irreps(self) -> str:
        """After the last layer: scalars, and for a head of noise the others in proportion."""
        channels = channels_of(self.irreps)
        if not self.denoises:
            return f"{self.output_channels}x{SCALAR}"
        ratio = self.output_channels / channels[SCALAR]
        others = {ir: max(round(ratio * mul), 1) for ir, mul in channels.items()}
        return irreps_of(others | {SCALAR: self.output_channels})

    @property
    def harmonics(self) -> str:
        """Of edges: all degrees up to the highest of ``irreps``."""
        sign = -1 if self.symmetry is Symmetry.O3 else 1
        degrees = range(e3nn.Irreps(self.irreps).lmax + 1)
        return str(e3nn.Irreps([(1, (degree, sign**degree)) for degree in degrees]))

    def build(self, *, rngs: nnx.Rngs) -> "Equiformer":
        return Equiformer(self, rngs=rngs)


_DEGREE_3 = {
    "irreps": "128x0e+64x1e+64x2e+32x3e",
    "head_irreps": "32x0e+16x1e+16x2e+8x3e",
    "ffn_irreps": "384x0e+192x1e+192x2e+96x3e",
}
_BOTH_PARITIES = {
    "irreps": "128x0e+32x0o+32x1e+32x1o+16x2e+16x2o",
    "head_irreps": "32x0e+8x0o+8x1e+8x1o+4x2e+4x2o",
    "ffn_irreps": "384x0e+96x0o+96x1e+96x1o+48x2e+48x2o",
}
SIZES: dict[str, dict[str, Any]] = {
    "md17_l2": {"envelope_p": None},
    "md17_l3": {"envelope_p": None} | _DEGREE_3,
    "md17_l2_e3": {"envelope_p": None, "radial_basis": RadialBasis.GAUSSIAN, "num_basis": 128}
    | _BOTH_PARITIES,
    "l2": {},
    "l3": _DEGREE_3,
}


class Edges(NamedTuple):
    """What all layers share: products prepared, frames if any, radial basis, envelope."""

    prepared: dict[Depthwise, dict[str, Any]]
    frames: Frames | None
    basis: Float[Array, "edges num_basis"]
    envelope: Float[Array, " edges"] | None


class Equiformer(Architecture):
    """Layers of attention over neighbours and feed-forward networks, then an energy per atom."""

    species_tables = {"embedding": False}
    unit_kernels = False

    config: EquiformerConfig

    def __init__(self, config: EquiformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        scalars = channels_of(config.irreps)[SCALAR]
        outputs, energies = config.output_irreps, f"{config.output_channels}x{SCALAR}"
        self.embedding = normal_param(rngs, (len(config.atomic_numbers), scalars))
        self.embedding_bias = nnx.Param(jnp.zeros(scalars, jnp.float32))
        self.basis = config.radial_basis.build(config.cutoff, config.num_basis, pi=PI, rngs=rngs)
        self.edge_degree = EdgeDegree(config, rngs=rngs)
        last = config.num_layers - 1
        self.layers = nnx.List(
            [
                EquiformerLayer(config, outputs if i == last else config.irreps, rngs=rngs)
                for i in range(config.num_layers)
            ]
        )
        self.norm = FeaturesNorm(outputs, rngs=rngs)
        self.head_1 = FeaturesLinear(outputs, energies, rngs=rngs)
        self.head_2 = FeaturesLinear(energies, f"1x{SCALAR}", rngs=rngs)
        denoises, encoded = config.denoises, "+".join(_encoded_irreps(config))
        self.force_embedding = (
            FeaturesLinear(encoded, _matching(config), rngs=rngs) if denoises else None
        )
        self.noise_head = (
            Attention(config, outputs, f"1x{config.vector}", rngs=rngs) if denoises else None
        )

    def node_energies(
        self, vectors: Float[Array, "edges 3"], graph: Graph
    ) -> Float[Array, " nodes"]:
        x, _ = self._features(vectors, graph, self.key)
        return self._energies(x, graph)

    def denoise(
        self, vectors: Float[Array, "edges 3"], graph: Graph
    ) -> tuple[Float[Array, " nodes"], Float[Array, "nodes 3"] | None, Float[Array, "nodes 3"]]:
        if self.noise_head is None:
            return super().denoise(vectors, graph)
        x, edges = self._features(vectors, graph, self.key)
        noise = self.noise_head(x, edges, graph, None)[self.config.vector][:, :, 0]
        return self._energies(x, graph), None, noise

    def _features(
        self, vectors: Float[Array, "edges 3"], graph: Graph, key: Array | None
    ) -> tuple[Features, Edges]:
        config, dtype = self.config, vectors.dtype
        edges = edges_of(config, self.basis, vectors)
        embedding = self.embedding[...].astype(dtype) + self.embedding_bias[...].astype(dtype)[None]
        x = self.edge_degree(edges, graph)
        x[SCALAR] = x[SCALAR] + embedding[graph.species][:, None]
        if config.force_input is not None and self.force_embedding is not None:
            encoded = {
                ir: config.force_input.encoded(e3nn.Irreps(ir), graph, dtype)[..., None]
                for ir in _encoded_irreps(config)
            }
            x = x | add(self.force_embedding(encoded), x)
        for layer, layer_key in zip(self.layers, split_keys(key, config.num_layers), strict=True):
            x = layer(x, edges, graph, layer_key)
        return self.norm(x), edges

    def _energies(self, x: Features, graph: Graph) -> Float[Array, " nodes"]:
        config = self.config
        energies = self._scaled(x)
        if config.zero_isolated:
            num_species, dtype = len(config.atomic_numbers), x[SCALAR].dtype
            away, lone = lone_atoms(num_species, config.cutoff, dtype)
            energies = energies - self._scaled(self._features(away, lone, None)[0])[graph.species]
        return energies

    def _scaled(self, x: Features) -> Float[Array, " nodes"]:
        config = self.config
        hidden = self.head_1(x)
        hidden[SCALAR] = normalized_silu(config.activation)(hidden[SCALAR])
        outputs = self.head_2(hidden)[SCALAR][:, 0, 0] / float(np.sqrt(config.avg_num_nodes))
        return config.scale * outputs + config.shift


def edges_of(
    config: EquiformerConfig,
    basis: Callable[[Float[Array, " edges"]], Float[Array, "edges num_basis"]],
    vectors: Float[Array, "edges 3"],
) -> Edges:
    """What layers need of edge vectors."""
    lengths = safe_norm(vectors)
    # published models take harmonics of the vector from receiver to sender
    harmonics = spherical_harmonics(e3nn.Irreps(config.harmonics), -vectors)
    products = set(_products(config))
    turns = config.evaluation == Evaluation.IN_FRAMES and all(map(in_frames, products))
    return Edges(
        prepared={product: product.prepare(harmonics) for product in products},
        frames=frames_of(-vectors, config.irreps) if turns else None,
        basis=basis(lengths),
        envelope=None
        if config.envelope_p is None
        else polynomial_envelope(lengths, config.cutoff, config.envelope_p),
    )


def _encoded_irreps(config: EquiformerConfig) -> list[str]:
    """Those harmonics of forces that the nodes have channels of."""
    channels = channels_of(config.irreps)
    return [str(ir) for _, ir in e3nn.Irreps(config.harmonics) if str(ir) in channels]


def _matching(config: EquiformerConfig) -> str:
    """The nodes' channels of those."""
    channels = channels_of(config.irreps)
    return irreps_of({ir: channels[ir] for ir in _encoded_irreps(config)})


def _products(config: EquiformerConfig) -> tuple[Depthwise, Depthwise]:
    """Of messages, into the irreps of nodes and into those of attention heads."""
    return (
        depthwise(config.tensor_product, config.irreps, config.harmonics, config.irreps),
        depthwise(config.tensor_product, config.irreps, config.harmonics, config.head_irreps),
    )


def _heads(config: EquiformerConfig) -> str:
    """The values of all heads side by side, head by head."""
    channels = channels_of(config.head_irreps)
    return irreps_of({ir: config.num_heads * mul for ir, mul in channels.items()})


class EdgeDegree(nnx.Module):
    """Constants times harmonics, with radial weights, summed over neighbours."""

    def __init__(self, config: EquiformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        product = _products(config)[0]
        scalars = channels_of(config.irreps)[SCALAR]
        self.constants = normal_param(rngs, (scalars,))
        self.bias = nnx.Param(jnp.zeros(scalars, jnp.float32))
        self.radial = _radial(config, product, rngs)
        self.linear = FeaturesLinear(product.irreps_out, config.irreps, rngs=rngs)

    def __call__(self, edges: Edges, graph: Graph) -> Features:
        config, dtype = self.config, edges.basis.dtype
        product = _products(config)[0]
        constants = self.constants[...].astype(dtype) + self.bias[...].astype(dtype)
        x = jnp.broadcast_to(constants, (graph.num_edges, 1, len(constants)))
        envelope = jnp.ones_like(edges.basis[:, 0]) if edges.envelope is None else edges.envelope
        weights = self.radial(edges.basis, product.weights_of[SCALAR]) * envelope[:, None]
        messages = product.of_factor(SCALAR, x, edges.prepared[product], weights)
        # the linear map is of sums: there are fewer atoms than edges
        summed = {
            ir: jnp.zeros((graph.num_nodes, e3nn.Irrep(ir).dim, mul), dtype)
            for ir, mul in channels_of(product.irreps_out).items()
        }
        for ir, place in product.results_of[SCALAR].items():
            summed[ir] = summed[ir].at[:, :, place].set(sum_receivers(messages[ir], graph))
        degrees = self.linear(summed, sum_receivers(envelope, graph)[:, None])
        norm = float(np.sqrt(config.avg_num_neighbors))
        return {ir: array / norm for ir, array in degrees.items()}


class EquiformerLayer(nnx.Module):
    """Attention and a feed-forward network, each of normalised features and added to them."""

    def __init__(self, config: EquiformerConfig, irreps_out: str, *, rngs: nnx.Rngs):
        self.config = config
        self.norm_1 = FeaturesNorm(config.irreps, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.norm_2 = FeaturesNorm(config.irreps, rngs=rngs)
        self.ffn_1 = FeaturesLinear(config.irreps, with_gates(config.ffn_irreps), rngs=rngs)
        self.ffn_2 = FeaturesLinear(config.ffn_irreps, irreps_out, rngs=rngs)
        same = irreps_out == config.irreps
        self.shortcut = None if same else FeaturesLinear(config.irreps, irreps_out, rngs=rngs)

    def __call__(self, x: Features, edges: Edges, graph: Graph, key: Array | None) -> Features:
        for_attention, for_first, for_second = split_keys(key, 3)
        update = self.attention(self.norm_1(x), edges, graph, for_attention)
        x = add(x, self._kept(update, graph, for_first))
        hidden = self.ffn_1(self.norm_2(x))
        update = self.ffn_2(gate(hidden, self.config.ffn_irreps, self.config.activation))
        x = x if self.shortcut is None else self.shortcut(x)
        return add(x, self._kept(update, graph, for_second))

    def _kept(self, x: Features, graph: Graph, key: Array | None) -> Features:
        factor = keep_path(graph, self.config.drop_path, key, x[SCALAR].dtype)
        return {ir: array * factor[:, None, None] for ir, array in x.items()}


class Attention(nnx.Module):
    r"""Values of messages, weighted by a softmax of their scalars and summed over neighbours.

    .. math:: x_i' = W \sum_j a_{ij} v_{ij}, \quad
        a_{ij} = \mathrm{softmax}_j \left( a^T \sigma(s_{ij}) \right), \quad
        (s_{ij}, v_{ij}) = \mathrm{message}(W_s x_j + W_t x_i, Y(d_{ij}))

    for each head; see :class:`Message`.
    """

    def __init__(
        self,
        config: EquiformerConfig,
        irreps_in: str | None = None,  # None: those of the nodes
        irreps_out: str | None = None,  # likewise
        *,
        rngs: nnx.Rngs,
    ):
        self.config = config
        irreps, heads, num_heads = config.irreps, _heads(config), config.num_heads
        irreps_in = irreps if irreps_in is None else irreps_in
        into_nodes, into_heads = _products(config)
        alphas = channels_of(config.head_irreps)[SCALAR]
        self.from_sender = FeaturesLinear(irreps_in, irreps, rngs=rngs)
        self.from_receiver = FeaturesLinear(irreps_in, irreps, use_bias=False, rngs=rngs)
        if config.message == Message.NONLINEAR:
            self.radial = _radial(config, into_nodes, rngs)
            scalars = f"{num_heads * alphas}x{SCALAR}"
            self.to_alpha = FeaturesLinear(into_nodes.irreps_out, scalars, rngs=rngs)
            self.to_gate = FeaturesLinear(into_nodes.irreps_out, with_gates(irreps), rngs=rngs)
            self.weights = normal_param(rngs, (into_heads.num_weights,))
            self.to_value = FeaturesLinear(into_heads.irreps_out, heads, rngs=rngs)
        else:
            self.radial = _radial(config, into_heads, rngs)
            channels = channels_of(heads)
            both = irreps_of(channels | {SCALAR: channels[SCALAR] + num_heads * alphas})
            self.to_both = FeaturesLinear(into_heads.irreps_out, both, rngs=rngs)
        self.dot = uniform_param(rngs, (num_heads, alphas), (6 / (num_heads + alphas)) ** 0.5)
        self.linear = (
            FeaturesLinear(heads, irreps, rngs=rngs)
            if irreps_out is None
            else FeaturesLinear(heads, irreps_out, use_bias=False, rngs=rngs)
        )

    def __call__(self, x: Features, edges: Edges, graph: Graph, key: Array | None) -> Features:
        config = self.config
        senders, receivers = self.from_sender(x), self.from_receiver(x)
        message = {
            ir: gather_senders(senders[ir], graph) + gather_receivers(receivers[ir], graph)
            for ir in senders
        }
        if edges.frames is not None:
            message = into_frames(message, edges.frames)
        if config.message == Message.NONLINEAR:
            scalars, values = self._nonlinear(message, edges)
        else:
            scalars, values = self._linear(message, edges)
        alpha = dropout(self._alpha(scalars, edges, graph), config.alpha_dropout, key)
        return self.linear(self._summed(values, alpha, edges, graph))

    def _alpha(
        self, scalars: Float[Array, "edges heads alphas"], edges: Edges, graph: Graph
    ) -> Float[Array, "edges heads"]:
        scalars = normalized_smooth_leaky_relu(scalars, self.config.activation)
        logits = jnp.einsum("ehk,hk->eh", scalars, self.dot[...].astype(scalars.dtype))
        return softmax_receivers(logits, graph, edges.envelope)

    def _summed(
        self,
        values: dict[str, Float[Array, "edges _ _"]],
        alpha: Float[Array, "edges heads"],
        edges: Edges,
        graph: Graph,
    ) -> Features:
        weighted = {}
        for ir, value in values.items():
            by_head = value.reshape(*value.shape[:2], self.config.num_heads, -1)
            weighted[ir] = (by_head * alpha[:, None, :, None]).reshape(value.shape)
        if edges.frames is not None:
            return summed_from_frames(weighted, edges.frames, graph)
        return {ir: sum_receivers(value, graph) for ir, value in weighted.items()}

    def _nonlinear(
        self, message: Features, edges: Edges
    ) -> tuple[Float[Array, "edges heads alphas"], Features]:
        config = self.config
        into_nodes, into_heads = _products(config)
        linears, weights = [self.to_alpha, self.to_gate], self.radial(edges.basis)
        alphas, gated = _mapped_product(into_nodes, message, edges, weights, linears)
        scalars = alphas[SCALAR].reshape(len(edges.basis), config.num_heads, -1)
        values = gate(gated, config.irreps, config.activation)
        weights = self.weights[...].astype(edges.basis.dtype)[None]
        (values,) = _mapped_product(into_heads, values, edges, weights, [self.to_value])
        return scalars, values

    def _linear(
        self, message: Features, edges: Edges
    ) -> tuple[Float[Array, "edges heads alphas"], Features]:
        config = self.config
        product, weights = _products(config)[1], self.radial(edges.basis)
        (values,) = _mapped_product(product, message, edges, weights, [self.to_both])
        # of every head first the scalars of its weight, then those of its value
        scalars = values[SCALAR].reshape(len(edges.basis), config.num_heads, -1)
        alphas = channels_of(config.head_irreps)[SCALAR]
        values[SCALAR] = scalars[:, :, alphas:].reshape(len(edges.basis), 1, -1)
        return scalars[:, :, :alphas], values


def _mapped_product(
    product: Depthwise,
    x: Features,
    edges: Edges,
    weights: Float[Array, "batch_w num_weights"],
    linears: Sequence[FeaturesLinear],
) -> list[Features]:
    """What linear maps make of a product of features with the harmonics of edges."""
    turned = in_frames(product)
    if edges.frames is not None and turned is not None:
        return turned(x, weights, linears)
    whole = product(x, edges.prepared[product], weights)
    return [linear(whole) for linear in linears]


def _radial(config: EquiformerConfig, product: Depthwise, rngs: nnx.Rngs) -> RadialNetwork:
    widths = (config.num_basis, *config.radial_widths, product.num_weights)
    return RadialNetwork(widths, offset_bound=widths[-2] ** -0.5, rngs=rngs)
