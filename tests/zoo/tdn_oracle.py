"""TDN restated from its formulas under the names of the original's state dict.

Features are ``[atoms, (l_max + 1)^2, channels]``. Nothing of the package is used: only Wigner 3j
tensors and harmonics, those of e3nn_jax.
"""

import e3nn_jax as e3nn
import jax.numpy as jnp
import numpy as np


def degrees(l_max):
    return [slice(degree**2, (degree + 1) ** 2) for degree in range(l_max + 1)]


def couplings(l_max, unit_variance=False):
    """All Wigner 3j tensors, side by side; with unit variance of every result if asked for."""
    places = degrees(l_max)
    tensor = np.zeros([(l_max + 1) ** 2] * 3)
    for l_3, out in enumerate(places):
        pairs = [
            (l_1, l_2)
            for l_1 in range(l_max + 1)
            for l_2 in range(l_max + 1)
            if abs(l_1 - l_2) <= l_3 <= l_1 + l_2
        ]
        scale = np.sqrt((2 * l_3 + 1) / len(pairs)) if unit_variance else 1.0
        for l_1, l_2 in pairs:
            block = np.asarray(e3nn.clebsch_gordan(l_1, l_2, l_3))
            tensor[places[l_1], places[l_2], out] = scale * block
    return tensor


def sigmoid(x):
    return 1 / (1 + jnp.exp(-x))


def silu(x):
    return x * sigmoid(x)


class Oracle:
    """Outputs of the original for a list of edges; the envelope is not the original's."""

    def __init__(self, state, tensor, cutoff, avg_num_nodes, avg_degree, envelope=None):
        self.state, self.tensor, self.cutoff = state, jnp.asarray(tensor), cutoff
        self.avg_num_nodes, self.avg_degree, self.envelope = avg_num_nodes, avg_degree, envelope
        self.l_max = state["norm.affine_weight"].shape[0] - 1
        self.layers = len({n.split(".")[1] for n in state if n.startswith("blocks.")})

    def linear(self, name, x):
        y = jnp.einsum("nic,dc->nid", x, self.state[f"{name}.linear.weight"])
        if f"{name}.bias" in self.state:
            y = y.at[:, 0].add(self.state[f"{name}.bias"][0])
        return y

    def norm(self, name, x):
        columns = []
        for degree, place in enumerate(degrees(self.l_max)):
            part = x[:, place]
            if degree == 0:
                part = part - part.mean(axis=2, keepdims=True)
            inverse = ((part**2).mean(axis=(1, 2)) + 1e-5) ** -0.5
            part = part * inverse[:, None, None] * self.state[f"{name}.affine_weight"][degree]
            if degree == 0:
                part = part + self.state[f"{name}.affine_bias"]
            columns.append(part)
        return jnp.concatenate(columns, axis=1)

    def gate(self, x):
        half = x.shape[2] // 2
        values, gates = x[:, :, :half], x[:, :1, half:]
        return jnp.concatenate([silu(values[:, :1]), values[:, 1:] * sigmoid(gates)], axis=1)

    def radial(self, name):
        x = self.basis
        for k in (0, 3):
            x = x @ self.state[f"{name}.net.{k}.weight"].T + self.state[f"{name}.net.{k}.bias"]
            x = x - x.mean(axis=1, keepdims=True)
            x = x / jnp.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5)
            x = x * self.state[f"{name}.net.{k + 1}.weight"]
            x = silu(x + self.state[f"{name}.net.{k + 1}.bias"])
        return x @ self.state[f"{name}.net.6.weight"].T + self.state[f"{name}.offset"]

    def product(self, x, weights):
        return weights[:, None] * jnp.einsum("eic,ej,ijk->ekc", x, self.harmonics, self.tensor)

    def sum_edges(self, x):
        return jnp.zeros((self.atoms, *x.shape[1:])).at[self.receivers].add(x)

    def attention(self, name, x):
        senders, receivers = self.senders, self.receivers
        message = (
            self.linear(f"{name}.merge_src", x)[senders]
            + self.linear(f"{name}.merge_dst", x)[receivers]
        )
        weights = self.radial(f"{name}.rad")
        message = self.product(message, weights)
        dot = self.state[f"{name}.alpha_dot"]
        alpha = self.linear(f"{name}.lin_alpha", message)[:, 0].reshape(-1, *dot.shape)
        alpha = 0.6 * alpha + 0.4 * alpha * (2 * sigmoid(alpha) - 1)
        powers = jnp.exp((alpha * dot).sum(axis=2))
        if self.envelope is None:
            alpha = powers / self.sum_edges(powers)[receivers]
        else:
            powers = powers * self.envelope(self.lengths)[:, None]
            alpha = powers / (1 + self.sum_edges(powers)[receivers])
        values = self.product(self.gate(self.linear(f"{name}.lin_value", message)), weights)
        by_head = values.reshape(*values.shape[:2], *dot.shape) * alpha[:, None, :, None]
        return self.linear(f"{name}.proj", self.sum_edges(by_head.reshape(values.shape)))

    def __call__(self, vectors, numbers, senders, receivers):
        """Output of every atom, summed to the energy later, and forces; vectors point from receiver
        to sender, as in the original."""
        self.senders, self.receivers, self.atoms = senders, receivers, len(numbers)
        state = self.state
        self.lengths = jnp.linalg.norm(vectors, axis=1)
        irreps = e3nn.Irreps([(1, (degree, 1)) for degree in range(self.l_max + 1)])
        self.harmonics = e3nn.spherical_harmonics(irreps, vectors, True, "component").array
        u = state["rbf.weight"] * (self.lengths / self.cutoff)[:, None] + state["rbf.bias"]
        std = jnp.abs(state["rbf.std"]) + 1e-5
        normal = jnp.exp(-0.5 * ((u - state["rbf.mean"]) / std) ** 2)
        self.basis = normal / (std * np.sqrt(2 * np.pi))
        embedding = state["atom_embed.atom_type_lin.weight"].T[numbers]
        embedding = embedding + state["atom_embed.atom_type_lin.bias"]
        channels = embedding.shape[1]
        scalars = (
            state["edge_embed.exp.linear.weight"].sum(axis=1) + state["edge_embed.exp.bias"][0]
        )
        ones = jnp.zeros((len(senders), (self.l_max + 1) ** 2, channels)).at[:, 0].set(scalars)
        messages = self.linear("edge_embed.proj", self.product(ones, self.radial("edge_embed.rad")))
        if self.envelope is not None:
            messages = messages * self.envelope(self.lengths)[:, None, None]
        x = self.sum_edges(messages) / np.sqrt(self.avg_degree)
        x = x.at[:, 0].add(embedding)
        for k in range(self.layers):
            x = x + self.attention(f"blocks.{k}.attn", self.norm(f"blocks.{k}.norm1", x))
            hidden = self.linear(f"blocks.{k}.ffn.0", self.norm(f"blocks.{k}.norm2", x))
            x = x + self.linear(f"blocks.{k}.ffn.2", self.gate(hidden))
        x = self.norm("norm", x)
        hidden = self.linear("head.0", x)
        hidden = hidden.at[:, 0].set(silu(hidden[:, 0]))
        outputs = self.linear("head.2", hidden)[:, 0, 0] / np.sqrt(self.avg_num_nodes)
        forces = self.linear("force_proj", self.attention("force_head", x))[:, 1:4, 0]
        return outputs, forces


def random_state(l_max, channels, num_layers, num_heads, num_basis, rows, widths=(6, 5), seed=0):
    """Arrays under the names, in the shapes and in the order of the original."""
    rng = np.random.default_rng(seed)
    state = {}

    def put(name, *shape, size=0.3, around=0.0):
        state[name] = (around + size * rng.normal(size=shape)).astype(np.float32)

    def linear(name, out, bias=True):
        if bias:
            put(f"{name}.bias", 1, out)
        put(f"{name}.linear.weight", out, channels, size=channels**-0.5)

    def radial(name):
        sizes = (num_basis, *widths, channels)
        put(f"{name}.offset", channels)
        for k, index in enumerate((0, 3, 6)):
            put(f"{name}.net.{index}.weight", sizes[k + 1], sizes[k], size=sizes[k] ** -0.5)
            if index < 6:
                put(f"{name}.net.{index}.bias", sizes[k + 1])
                put(f"{name}.net.{index + 1}.weight", sizes[k + 1], around=1.0, size=0.2)
                put(f"{name}.net.{index + 1}.bias", sizes[k + 1])

    def norm(name):
        put(f"{name}.affine_weight", l_max + 1, 1, channels, around=1.0, size=0.2)
        put(f"{name}.affine_bias", 1, 1, channels)

    def attention(name):
        put(f"{name}.alpha_dot", num_heads, channels // num_heads, size=1.0)
        linear(f"{name}.merge_src", channels)
        linear(f"{name}.merge_dst", channels, bias=False)
        radial(f"{name}.rad")
        linear(f"{name}.lin_alpha", channels)
        linear(f"{name}.lin_value", 2 * channels)
        linear(f"{name}.proj", channels)

    put("atom_embed.atom_type_lin.weight", channels, rows, size=1.0)
    put("atom_embed.atom_type_lin.bias", channels)
    linear("edge_embed.exp", channels)
    radial("edge_embed.rad")
    linear("edge_embed.proj", channels)
    state["rbf.mean"] = rng.uniform(0, 1, (1, num_basis)).astype(np.float32)
    state["rbf.std"] = rng.uniform(0.2, 1, (1, num_basis)).astype(np.float32)
    put("rbf.weight", 1, 1, around=1.0)
    put("rbf.bias", 1, 1)
    for k in range(num_layers):
        norm(f"blocks.{k}.norm1")
        attention(f"blocks.{k}.attn")
        norm(f"blocks.{k}.norm2")
        linear(f"blocks.{k}.ffn.0", 2 * channels)
        linear(f"blocks.{k}.ffn.2", channels)
    norm("norm")
    linear("head.0", channels)
    linear("head.2", 1)
    attention("force_head")
    linear("force_proj", 1)
    return state


def random_factors(l_max, terms, seed=0):
    """``cp_a``, ``cp_b``, ``cp_c``, that stand for no equivariant tensor."""
    rng = np.random.default_rng(seed)
    shape = ((l_max + 1) ** 2, terms)
    return {name: rng.normal(size=shape).astype(np.float32) for name in ("cp_a", "cp_b", "cp_c")}
