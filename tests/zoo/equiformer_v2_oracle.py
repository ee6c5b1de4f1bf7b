"""EquiformerV2 restated from its formulas, on a state dict under the names of the original code.

Coefficients are ordered by degree, ``[n, (l_max + 1)^2, channels]``; matrices are ``[out, in]``.
Nothing of the package is used: harmonics and Wigner matrices are those of e3nn_jax.
"""

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np


def silu(x):
    return x / (1 + jnp.exp(-x))


def degrees(l_max):
    return [degree for degree in range(l_max + 1) for _ in range(2 * degree + 1)]


def orders(l_max):
    return [m for degree in range(l_max + 1) for m in range(-degree, degree + 1)]


def published_frames(vectors, seed):
    """Rotations that take each vector to y, their angle about it from a random vector."""
    y = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    z = np.cross(y, np.random.default_rng(seed).normal(size=y.shape))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    return np.stack([np.cross(y, z), y, z], axis=1)


def wigner(rotations, l_max):
    irreps = e3nn.Irreps([(1, (degree, 1)) for degree in range(l_max + 1)])
    return jax.jit(jax.vmap(irreps.D_from_matrix))(jnp.asarray(rotations))


def grid(l_max, n):
    """To values ``[beta, alpha, i]`` and back, e3nn's S2 grid in 'component' normalisation."""
    beta, alpha = (np.arange(n) + 0.5) * np.pi / n, 2 * np.pi * np.arange(n) / n
    b, a = np.meshgrid(beta, alpha, indexing="ij")
    points = np.stack([np.sin(b) * np.sin(a), np.cos(b), np.sin(b) * np.cos(a)], axis=-1)
    irreps = e3nn.Irreps([(1, (degree, (-1) ** degree)) for degree in range(l_max + 1)])
    harmonics = np.asarray(
        e3nn.spherical_harmonics(irreps, jnp.asarray(points), False, "component").array
    )
    factor = np.sqrt([(2 * degree + 1) * (l_max + 1) for degree in degrees(l_max)])
    k = np.arange(n // 2)
    weights = np.array(
        [np.sin(x) * sum(np.sin((2 * j + 1) * x) / (2 * j + 1) for j in k) for x in beta]
    )
    weights = weights / weights.sum() / n
    return harmonics / factor, harmonics * factor * weights[:, None, None]


class Oracle:
    """Energies and direct forces, normalised as the network gives them, for a list of edges.

    ``settings`` are the original's. ``rotations`` are the frames of edges.
    """

    def __init__(self, settings, state, num_basis):
        self.s, self.state, self.num_basis = settings, state, num_basis
        self.l_max, self.m_max = settings["lmax_list"][0], settings["mmax_list"][0]
        self.kept = [i for i, m in enumerate(orders(self.l_max)) if abs(m) <= self.m_max]
        self.scale = np.array(
            [
                np.sqrt((2 * degree + 1) / (2 * self.m_max + 1)) if degree > self.m_max else 1.0
                for degree in degrees(self.l_max)
            ]
        )

    def linear(self, name, x):
        y = jnp.einsum("...i,oi->...o", x, self.state[f"{name}.weight"])
        bias = self.state.get(f"{name}.bias")
        return y if bias is None else y + bias

    def so3_linear(self, name, x):
        weight = self.state[f"{name}.weight"][np.array(degrees(self.l_max))]
        y = jnp.einsum("nmi,moi->nmo", x, weight)
        return y.at[:, 0].add(self.state[f"{name}.bias"])

    def layer_norm(self, name, x):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / jnp.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def norm(self, name, x):
        degree = np.array(degrees(self.l_max))
        weight = self.state[f"{name}.affine_weight"]
        if self.s["norm_type"] == "layer_norm_sh":
            mean = sum((x[:, degree == k] ** 2).mean(axis=(1, 2)) for k in range(1, self.l_max + 1))
            rest = x[:, 1:] / jnp.sqrt(mean / self.l_max + 1e-5)[:, None, None]
            first = self.layer_norm(f"{name}.norm_l0", x[:, :1])
            return jnp.concatenate([first, rest * weight[degree[1:] - 1]], axis=1)
        x = x.at[:, 0].add(-x[:, 0].mean(axis=1, keepdims=True))
        mean = sum((x[:, degree == k] ** 2).mean(axis=(1, 2)) for k in range(self.l_max + 1))
        x = x / jnp.sqrt(mean / (self.l_max + 1) + 1e-5)[:, None, None] * weight[degree]
        return x.at[:, 0].add(self.state[f"{name}.affine_bias"])

    def radial(self, name, x):
        for k in (0, 3):
            x = self.layer_norm(f"{name}.{k + 1}", self.linear(f"{name}.{k}", x))
            x = silu(x)
        return self.linear(f"{name}.6", x)

    def edge_scalars(self, name):
        source = self.state[f"{name}.source_embedding.weight"][self.numbers[self.source]]
        target = self.state[f"{name}.target_embedding.weight"][self.numbers[self.target]]
        return jnp.concatenate([self.basis, source, target], axis=1)

    def rotate_back(self, x):
        """``x`` holds the kept components by degree."""
        rows = self.wigner[:, np.array(self.kept)] * self.scale[self.kept][:, None]
        return jnp.einsum("eki,ekc->eic", rows, x)

    def so2_conv(self, name, x, out, extra=0, weights=None):
        """On kept components by degree; ``extra`` scalars first."""
        kept_m = np.array(orders(self.l_max))[self.kept]
        result, used = {}, 0
        for m in range(self.m_max + 1):
            plus, minus = np.flatnonzero(kept_m == m), np.flatnonzero(kept_m == -m)
            width = len(plus) * x.shape[2]
            factor = 1 if weights is None else weights[:, used : used + width]
            used += width
            real = x[:, plus].reshape(len(x), -1) * factor
            if m == 0:
                y = self.linear(f"{name}.fc_m0", real)
                scalars, y = y[:, :extra], y[:, extra:]
                for k, index in enumerate(plus):
                    result[index] = y[:, k * out : (k + 1) * out]
                continue
            imaginary = x[:, minus].reshape(len(x), -1) * factor
            both = self.state[f"{name}.so2_m_conv.{m - 1}.fc.weight"]
            u, v = both[: len(both) // 2], both[len(both) // 2 :]
            y = real @ u.T - imaginary @ v.T, imaginary @ u.T + real @ v.T
            for part, place in zip(y, (plus, minus), strict=True):
                for k, index in enumerate(place):
                    result[index] = part[:, k * out : (k + 1) * out]
        return scalars, jnp.stack([result[k] for k in range(len(kept_m))], axis=1)

    def attention(self, name, x):
        s = self.s
        heads, alphas, hidden = (
            s["num_heads"], s["attn_alpha_channels"], s["attn_hidden_channels"],
        )  # fmt: skip
        ends = jnp.concatenate([x[self.source], x[self.target]], axis=2)
        message = jnp.einsum("eki,eic->ekc", self.wigner[:, np.array(self.kept)], ends)
        weights = self.radial(f"{name}.so2_conv_1.rad_func.net", self.edge_scalars(name))
        extra = heads * alphas + hidden
        scalars, message = self.so2_conv(f"{name}.so2_conv_1", message, hidden, extra, weights)
        to, back = (
            matrix[..., self.kept] * self.scale[self.kept]
            for matrix in grid(self.l_max, s["grid_resolution"])
        )
        values = silu(jnp.einsum("bai,zic->zbac", to, message))
        message = jnp.einsum("bai,zbac->zic", back, values)
        message = message.at[:, 0].set(silu(scalars[:, heads * alphas :]))
        width = heads * s["attn_value_channels"]
        _, message = self.so2_conv(f"{name}.so2_conv_2", message, width)
        alpha = scalars[:, : heads * alphas].reshape(-1, heads, alphas)
        alpha = self.layer_norm(f"{name}.alpha_norm", alpha)
        alpha = 0.6 * alpha + 0.4 * alpha * (2 / (1 + jnp.exp(-alpha)) - 1)
        powers = jnp.exp(jnp.einsum("ehk,hk->eh", alpha, self.state[f"{name}.alpha_dot"]))
        total = jnp.zeros((len(x), heads)).at[self.target].add(powers)
        share = jnp.repeat(powers / total[self.target], s["attn_value_channels"], axis=1)
        message = self.rotate_back(message * share[:, None])
        summed = jnp.zeros((len(x), *message.shape[1:])).at[self.target].add(message)
        return self.so3_linear(f"{name}.proj", summed)

    def ffn(self, name, x):
        scalars = silu(self.linear(f"{name}.scalar_mlp.0", x[:, 0]))
        to, back = grid(self.l_max, self.s["grid_resolution"])
        values = jnp.einsum("bai,zic->zbac", to, self.so3_linear(f"{name}.so3_linear_1", x))
        values = silu(self.linear(f"{name}.grid_mlp.0", values))
        values = silu(self.linear(f"{name}.grid_mlp.2", values))
        values = self.linear(f"{name}.grid_mlp.4", values)
        x = jnp.einsum("bai,zbac->zic", back, values).at[:, 0].set(scalars)
        return self.so3_linear(f"{name}.so3_linear_2", x)

    def __call__(self, vectors, numbers, source, target, rotations):
        """``vectors`` from target to source [Å]; energy of the whole, forces."""
        s, cutoff = self.s, self.s["max_radius"]
        self.numbers, self.source, self.target = numbers, source, target
        r = np.linalg.norm(vectors, axis=1)
        centers = np.linspace(0, cutoff, self.num_basis)
        width = 2 * (centers[1] - centers[0])
        self.basis = jnp.asarray(np.exp(-0.5 * ((r[:, None] - centers) / width) ** 2))
        self.wigner = wigner(rotations, self.l_max)
        axial = self.radial(
            "edge_degree_embedding.rad_func.net", self.edge_scalars("edge_degree_embedding")
        )
        axial = axial.reshape(len(r), self.l_max + 1, -1)
        kept_m = np.array(orders(self.l_max))[self.kept]
        message = jnp.zeros((len(r), len(kept_m), axial.shape[2]))
        message = message.at[:, np.flatnonzero(kept_m == 0)].set(axial)
        message = self.rotate_back(message)
        x = jnp.zeros((len(numbers), *message.shape[1:])).at[target].add(message) / s["avg_degree"]
        x = x.at[:, 0].add(self.state["sphere_embedding.weight"][numbers])
        for k in range(s["num_layers"]):
            x = x + self.attention(f"blocks.{k}.ga", self.norm(f"blocks.{k}.norm_1", x))
            x = x + self.ffn(f"blocks.{k}.ffn", self.norm(f"blocks.{k}.norm_2", x))
        x = self.norm("norm", x)
        energy = self.ffn("energy_block", x)[:, 0].sum() / s["avg_num_nodes"]
        return energy, self.attention("force_block", x)[:, 1:4, 0]


def random_state(settings, num_basis, seed=0):
    """A state dict of these settings with the original's names and shapes."""
    rng, state = np.random.default_rng(seed), {}
    s, (l_max,), (m_max,) = settings, settings["lmax_list"], settings["mmax_list"]
    rows, channels, width = s["max_num_elements"], s["sphere_channels"], s["edge_channels"]
    heads, hidden = s["num_heads"], s["attn_hidden_channels"]
    values, wide = heads * s["attn_value_channels"], s["ffn_hidden_channels"]

    def put(name, *shape, around=0.0, size=None):
        size = shape[-1] ** -0.5 if size is None else size
        state[name] = around + size * rng.normal(size=shape)

    def linear(name, out, into, bias=True):
        put(f"{name}.weight", out, into)
        if bias:
            put(f"{name}.bias", out, size=0.2)

    def so3(name, out, into):
        put(f"{name}.weight", l_max + 1, out, into)
        put(f"{name}.bias", out, size=0.2)

    def layer_norm(name, size):
        put(f"{name}.weight", size, around=1.0, size=0.2)
        put(f"{name}.bias", size, size=0.2)

    def embeddings(name):
        put(f"{name}.source_embedding.weight", rows, width)
        put(f"{name}.target_embedding.weight", rows, width)

    def radial(name, out):
        for k, (a, b) in zip((0, 3), ((num_basis + 2 * width, width), (width, width)), strict=True):
            linear(f"{name}.net.{k}", b, a)
            layer_norm(f"{name}.net.{k + 1}", b)
        linear(f"{name}.net.6", out, width)

    def so2(name, into, out, extra=0):
        linear(f"{name}.fc_m0", extra + (l_max + 1) * out, (l_max + 1) * into)
        for m in range(1, m_max + 1):
            count = l_max - m + 1
            put(f"{name}.so2_m_conv.{m - 1}.fc.weight", 2 * count * out, count * into)

    def norm(name):
        if s["norm_type"] == "layer_norm_sh":
            put(f"{name}.affine_weight", l_max, channels, around=1.0, size=0.2)
            layer_norm(f"{name}.norm_l0", channels)
        else:
            put(f"{name}.affine_weight", l_max + 1, channels, around=1.0, size=0.2)
            put(f"{name}.affine_bias", channels, size=0.2)

    def attention(name, out):
        put(f"{name}.alpha_dot", heads, s["attn_alpha_channels"], size=1.0)
        embeddings(name)
        extra = heads * s["attn_alpha_channels"] + hidden
        so2(f"{name}.so2_conv_1", 2 * channels, hidden, extra)
        weights = sum(l_max - m + 1 for m in range(m_max + 1)) * 2 * channels
        radial(f"{name}.so2_conv_1.rad_func", weights)
        layer_norm(f"{name}.alpha_norm", s["attn_alpha_channels"])
        so2(f"{name}.so2_conv_2", hidden, values)
        so3(f"{name}.proj", out, values)

    def ffn(name, out):
        so3(f"{name}.so3_linear_1", wide, channels)
        linear(f"{name}.scalar_mlp.0", wide, channels)
        for k in (0, 2, 4):
            linear(f"{name}.grid_mlp.{k}", wide, wide, bias=False)
        so3(f"{name}.so3_linear_2", out, wide)

    put("sphere_embedding.weight", rows, channels, size=1.0)
    embeddings("edge_degree_embedding")
    radial("edge_degree_embedding.rad_func", (l_max + 1) * channels)
    for k in range(s["num_layers"]):
        norm(f"blocks.{k}.norm_1")
        attention(f"blocks.{k}.ga", channels)
        norm(f"blocks.{k}.norm_2")
        ffn(f"blocks.{k}.ffn", channels)
    norm("norm")
    ffn("energy_block", 1)
    attention("force_block", 1)
    return state
