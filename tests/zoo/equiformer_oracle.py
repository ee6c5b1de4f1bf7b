"""Equiformer restated from its formulas, in the layout and under the names of the original code.

Features are flat: for every irrep in turn, channel by channel its components ('mul_ir' of e3nn).
Weights of a linear map are one vector, for every irrep in turn a matrix ``[in, out]``; those of a
product with harmonics are one number for each (irrep, harmonic, result, channel). Nothing of the
package is used: only Clebsch-Gordan coefficients and harmonics, those of e3nn_jax.
"""

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np

SILU, SIGMOID, LEAKY = 1.676532470331, 1.846228545339, 1.529087143556853  # unit second moment


def blocks(irreps):
    """(copies, irrep, place of its columns) of every entry."""
    irreps = e3nn.Irreps(irreps)
    return [(mul, ir, s) for (mul, ir), s in zip(irreps, irreps.slices(), strict=True)]


def linear(state, name, x, irreps_in, irreps_out):
    weight, start, columns = state[f"{name}.tp.weight"], 0, {}
    for mul_in, ir_in, place in blocks(irreps_in):
        for mul_out, ir_out, _ in blocks(irreps_out):
            if ir_in == ir_out:
                matrix = weight[start : start + mul_in * mul_out].reshape(mul_in, mul_out)
                start += mul_in * mul_out
                copies = x[:, place].reshape(len(x), mul_in, ir_in.dim)
                y = jnp.einsum("nui,uw->nwi", copies, matrix).reshape(len(x), -1)
                columns[ir_out] = columns.get(ir_out, 0) + y
    assert start == len(weight)
    if f"{name}.bias.0" in state:
        columns[e3nn.Irrep("0e")] = columns[e3nn.Irrep("0e")] + state[f"{name}.bias.0"]
    return jnp.concatenate(
        [columns.get(ir, jnp.zeros((len(x), mul * ir.dim))) for mul, ir, _ in blocks(irreps_out)],
        axis=1,
    )


def instructions(irreps, harmonics, keep):
    """(entry of the features, of the harmonics, irrep of the result), in the original order."""
    kept = {ir for _, ir in e3nn.Irreps(keep)} | {e3nn.Irrep("0e")}
    return [
        (i, j, ir)
        for i, (_, ir_1) in enumerate(e3nn.Irreps(irreps))
        for j, (_, ir_2) in enumerate(e3nn.Irreps(harmonics))
        for ir in sorted(set(ir_1 * ir_2), key=lambda ir: ir.l)
        if ir in kept
    ]


def product_irreps(irreps, harmonics, keep):
    """The results by degree, even before odd, each irrep's in the order of instructions."""
    found = instructions(irreps, harmonics, keep)
    order = sorted(range(len(found)), key=lambda k: (found[k][2].l, -found[k][2].p, k))
    content = [(e3nn.Irreps(irreps)[found[k][0]].mul, found[k][2]) for k in order]
    return order, str(e3nn.Irreps(content).simplify())


def product(x, y, weights, irreps, harmonics, keep):
    """'uvu', path normalisation 'none', irreps normalised to 'component'."""
    places, others = blocks(irreps), blocks(harmonics)
    results, start = [], 0
    for i, j, ir in instructions(irreps, harmonics, keep):
        mul, ir_1, place = places[i]
        _, ir_2, other = others[j]
        constants = np.sqrt(ir.dim) * e3nn.clebsch_gordan(ir_1.l, ir_2.l, ir.l)
        copies = x[:, place].reshape(len(x), mul, ir_1.dim)
        w = weights[:, start : start + mul]
        start += mul
        z = jnp.einsum("eui,ej,ijk,eu->euk", copies, y[:, other], jnp.asarray(constants), w)
        results.append(z.reshape(len(x), -1))
    assert start == weights.shape[1]
    order, _ = product_irreps(irreps, harmonics, keep)
    return jnp.concatenate([results[k] for k in order], axis=1)


def gate_irreps(irreps):
    gates = sum(mul for mul, ir, _ in blocks(irreps) if str(ir) != "0e")
    ((scalars, _, _),) = [b for b in blocks(irreps) if str(b[1]) == "0e"]
    rest = [(mul, ir) for mul, ir, _ in blocks(irreps) if str(ir) != "0e"]
    return str(e3nn.Irreps([(scalars + gates, "0e"), *rest])), scalars, gates


def gate(x, irreps):
    _, scalars, gates = gate_irreps(irreps)
    factors = SIGMOID * jax.nn.sigmoid(x[:, scalars : scalars + gates])
    columns = [SILU * x[:, :scalars] * jax.nn.sigmoid(x[:, :scalars])]
    start, used = scalars + gates, 0
    for mul, ir, _ in blocks(irreps):
        if str(ir) != "0e":
            copies = x[:, start : start + mul * ir.dim].reshape(len(x), mul, ir.dim)
            columns.append((copies * factors[:, used : used + mul, None]).reshape(len(x), -1))
            start, used = start + mul * ir.dim, used + mul
    return jnp.concatenate(columns, axis=1)


def layer_norm(state, name, x):
    centered = x - x.mean(axis=1, keepdims=True)
    variance = (centered**2).mean(axis=1, keepdims=True)
    return centered / jnp.sqrt(variance + 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]


def radial(state, name, x):
    for k in (0, 3):
        x = x @ state[f"{name}.net.{k}.weight"].T + state[f"{name}.net.{k}.bias"]
        x = layer_norm(state, f"{name}.net.{k + 1}", x)
        x = x * jax.nn.sigmoid(x)
    return x @ state[f"{name}.net.6.weight"].T + state[f"{name}.offset"]


def norm(state, name, x, irreps):
    columns, start = [], 0
    for mul, ir, place in blocks(irreps):
        field = x[:, place].reshape(len(x), mul, ir.dim)
        scalar = str(ir) == "0e"
        if scalar:
            field = field - field.mean(axis=1, keepdims=True)
        inverse = (jnp.mean(field**2, axis=(1, 2)) + 1e-5) ** -0.5
        weight = state[f"{name}.affine_weight"][start : start + mul]
        start += mul
        field = field * inverse[:, None, None] * weight[None, :, None]
        if scalar:
            field = field + state[f"{name}.affine_bias"][None, :, None]
        columns.append(field.reshape(len(x), -1))
    return jnp.concatenate(columns, axis=1)


def to_heads(x, head_irreps, num_heads):
    """``[edges, heads, dim of a head]``."""
    wide = [(num_heads * mul, ir) for mul, ir, _ in blocks(head_irreps)]
    parts = [
        x[:, place].reshape(len(x), num_heads, -1) for _, _, place in blocks(e3nn.Irreps(wide))
    ]
    return jnp.concatenate(parts, axis=2)


def from_heads(x, head_irreps):
    parts = [x[:, :, place].reshape(len(x), -1) for _, _, place in blocks(head_irreps)]
    return jnp.concatenate(parts, axis=1)


def wide(irreps, times):
    return str(e3nn.Irreps([(times * mul, ir) for mul, ir, _ in blocks(irreps)]))


class Oracle:
    """Energy [eV] of positions, species and a list of edges under a state dict."""

    def __init__(self, config, state):
        self.config, self.state = config, state
        self.sh = config.harmonics

    def attention(self, name, x, y, basis, envelope, source, target):
        c, state = self.config, self.state
        message = linear(state, f"{name}.merge_src", x, c.irreps, c.irreps)[source]
        message = message + linear(state, f"{name}.merge_dst", x, c.irreps, c.irreps)[target]
        values_irreps = wide(c.head_irreps, c.num_heads)
        k = blocks(c.head_irreps)[0][0]
        if c.message == "nonlinear":
            _, wide_1 = product_irreps(c.irreps, self.sh, c.irreps)
            weights = radial(state, f"{name}.sep_act.dtp_rad", basis)
            message = product(message, y, weights, c.irreps, self.sh, c.irreps)
            alpha_irreps = f"{c.num_heads * k}x0e"
            alpha = linear(state, f"{name}.sep_alpha", message, wide_1, alpha_irreps)
            alpha = alpha.reshape(len(source), c.num_heads, k)
            gated, _, _ = gate_irreps(c.irreps)
            value = gate(linear(state, f"{name}.sep_act.lin", message, wide_1, gated), c.irreps)
            _, wide_2 = product_irreps(c.irreps, self.sh, c.head_irreps)
            shared = jnp.tile(state[f"{name}.sep_value.dtp.tp.weight"][None], (len(source), 1))
            value = product(value, y, shared, c.irreps, self.sh, c.head_irreps)
            value = linear(state, f"{name}.sep_value.lin", value, wide_2, values_irreps)
            value = to_heads(value, c.head_irreps, c.num_heads)
        else:
            _, wide_2 = product_irreps(c.irreps, self.sh, c.head_irreps)
            weights = radial(state, f"{name}.sep.dtp_rad", basis)
            message = product(message, y, weights, c.irreps, self.sh, c.head_irreps)
            each = e3nn.Irreps(f"{k}x0e") + e3nn.Irreps(c.head_irreps)
            each = str(each.simplify())
            both = linear(state, f"{name}.sep.lin", message, wide_2, wide(each, c.num_heads))
            both = to_heads(both, each, c.num_heads)
            alpha, value = both[:, :, :k], both[:, :, k:]
        alpha = LEAKY * (0.6 * alpha + 0.4 * alpha * (2 * jax.nn.sigmoid(alpha) - 1))
        logits = jnp.einsum("ehk,hk->eh", alpha, state[f"{name}.alpha_dot"][0])
        powers = jnp.exp(logits) * envelope[:, None]
        total = jnp.zeros((len(x), c.num_heads)).at[target].add(powers)
        total = total if c.envelope_p is None else total + 1
        weighted = value * (powers / total[target])[:, :, None]
        summed = jnp.zeros((len(x), *weighted.shape[1:])).at[target].add(weighted)
        summed = from_heads(summed, c.head_irreps)
        return linear(state, f"{name}.proj", summed, values_irreps, c.irreps)

    def block(self, name, x, irreps_out, *edges):
        c, state = self.config, self.state
        x = x + self.attention(f"{name}.ga", norm(state, f"{name}.norm_1", x, c.irreps), *edges)
        hidden = norm(state, f"{name}.norm_2", x, c.irreps)
        gated, _, _ = gate_irreps(c.ffn_irreps)
        hidden = gate(linear(state, f"{name}.ffn.fctp_1", hidden, c.irreps, gated), c.ffn_irreps)
        hidden = linear(state, f"{name}.ffn.fctp_2", hidden, c.ffn_irreps, irreps_out)
        if f"{name}.ffn_shortcut.tp.weight" in state:
            x = linear(state, f"{name}.ffn_shortcut", x, c.irreps, irreps_out)
        return x + hidden

    def basis(self, r):
        c, n = self.config, self.config.num_basis
        u = r / c.cutoff
        if c.radial_basis == "exp_normal":
            means = np.linspace(np.exp(-c.cutoff), 1, n)
            beta = (2 / n * (1 - np.exp(-c.cutoff))) ** -2
            return (0.5 * (jnp.cos(np.pi * u) + 1))[:, None] * jnp.exp(
                -beta * (jnp.exp(-5 * u)[:, None] - means) ** 2
            )
        if c.radial_basis == "gaussian":
            std = jnp.abs(self.state["rbf.std"]) + 1e-5
            x = self.state["rbf.weight"] * u[:, None] + self.state["rbf.bias"]
            return jnp.exp(-0.5 * ((x - self.state["rbf.mean"]) / std) ** 2) / (
                std * (2 * 3.14159) ** 0.5
            )
        waves = jnp.sin(self.state["rbf.rbf.frequencies"] * u[:, None]) / u[:, None]
        smooth = 1 - 21 * u**5 + 35 * u**6 - 15 * u**7
        return smooth[:, None] * np.sqrt(2 / c.cutoff**3) * waves

    def edge_degree(self, y, basis, envelope, target, nodes):
        c, state, name = self.config, self.state, "edge_deg_embed"
        ones = jnp.ones((len(y), 1))
        x = linear(state, f"{name}.exp", ones, "1x0e", c.irreps)
        weights = radial(state, f"{name}.rad", basis)
        x = product(x, y, weights, c.irreps, self.sh, c.irreps)
        _, wide_1 = product_irreps(c.irreps, self.sh, c.irreps)
        x = linear(state, f"{name}.proj", x, wide_1, c.irreps) * envelope[:, None]
        return jnp.zeros((nodes, x.shape[1])).at[target].add(x) / np.sqrt(c.avg_num_neighbors)

    def energy(self, positions, shifts, species, source, target):
        """``shifts`` are those of the vector from source to target [Å]."""
        c, state = self.config, self.state
        d = positions[source] - positions[target] - shifts
        r = jnp.sqrt(jnp.sum(d**2, axis=1))
        u = r / c.cutoff
        envelope = (
            jnp.ones_like(u) if c.envelope_p is None else 1 - 21 * u**5 + 35 * u**6 - 15 * u**7
        )
        y = e3nn.spherical_harmonics(
            e3nn.Irreps(self.sh), d / r[:, None], normalize=False, normalization="component"
        ).array
        basis = self.basis(r)
        one_hot = jax.nn.one_hot(species, len(c.atomic_numbers), dtype=d.dtype)
        x = linear(state, "atom_embed.atom_type_lin", one_hot, f"{one_hot.shape[1]}x0e", c.irreps)
        x = x + self.edge_degree(y, basis, envelope, target, len(species))
        outputs = f"{c.output_channels}x0e"
        for k in range(c.num_layers):
            irreps_out = outputs if k == c.num_layers - 1 else c.irreps
            x = self.block(f"blocks.{k}", x, irreps_out, y, basis, envelope, source, target)
        x = linear(state, "head.0", norm(state, "norm", x, outputs), outputs, outputs)
        x = linear(state, "head.2", SILU * x * jax.nn.sigmoid(x), outputs, "1x0e")
        total = jnp.sum(x) / np.sqrt(c.avg_num_nodes)
        return c.scale * total + c.shift * len(species)


# ---- our parameters in the original layout -----------------------------------------------------


def original_state(config, model):
    """The state dict that the original code would have for this model."""
    state = {}

    def put(name, value):
        state[name] = jnp.asarray(np.asarray(value, np.float64))

    def put_linear(name, layer, irreps_in):
        order = [str(ir) for _, ir in e3nn.Irreps(irreps_in)]
        kernels = {ir: np.asarray(kernel[...]) for ir, kernel in layer.kernels.items()}
        put(
            f"{name}.tp.weight", np.concatenate([kernels[i].ravel() for i in order if i in kernels])
        )
        if layer.bias is not None:
            put(f"{name}.bias.0", layer.bias[...])

    def reordered(weights, keep):
        """From (irrep, result, harmonic) as in ours to (irrep, harmonic, result), last axis."""
        found = instructions(config.irreps, config.harmonics, keep)
        muls = [mul for mul, _, _ in blocks(config.irreps)]
        ours = sorted(range(len(found)), key=lambda k: (found[k][0], found[k][2], found[k][1]))
        ends = np.cumsum([muls[found[k][0]] for k in ours])[:-1]
        pieces = dict(zip(ours, np.split(np.asarray(weights), ends, axis=-1), strict=True))
        return np.concatenate([pieces[k] for k in range(len(found))], axis=-1)

    def put_radial(name, network, keep):
        for k, affine, layer in zip((0, 3), network.maps[:-1], network.norms, strict=True):
            put(f"{name}.net.{k}.weight", affine.kernel[...].T)
            put(f"{name}.net.{k}.bias", affine.bias[...])
            put(f"{name}.net.{k + 1}.weight", layer.weight[...])
            put(f"{name}.net.{k + 1}.bias", layer.bias[...])
        put(f"{name}.net.6.weight", reordered(network.maps[-1].kernel[...], keep).T)
        put(f"{name}.offset", reordered(network.maps[-1].bias[...], keep))

    def put_norm(name, layer, irreps):
        scalars = {"0e": layer.scalars.weight[...]}
        weights = scalars | {ir: w[...] for ir, w in layer.weights.items()}
        ordered = [weights[str(ir)] for _, ir in e3nn.Irreps(irreps)]
        put(f"{name}.affine_weight", np.concatenate(ordered))
        put(f"{name}.affine_bias", layer.scalars.bias[...])

    _, wide_1 = product_irreps(config.irreps, config.harmonics, config.irreps)
    _, wide_2 = product_irreps(config.irreps, config.harmonics, config.head_irreps)
    put("atom_embed.atom_type_lin.tp.weight", model.embedding[...].ravel())
    put("atom_embed.atom_type_lin.bias.0", model.embedding_bias[...])
    if config.radial_basis == "gaussian":
        named = {"mean": "means", "std": "widths", "weight": "weight", "bias": "bias"}
        for theirs, ours in named.items():
            put(f"rbf.{theirs}", getattr(model.basis, ours)[...])
    elif config.radial_basis == "bessel":
        put("rbf.rbf.frequencies", model.basis.frequencies[...])
    degree = model.edge_degree
    put("edge_deg_embed.exp.tp.weight", degree.constants[...])
    put("edge_deg_embed.exp.bias.0", degree.bias[...])
    put_radial("edge_deg_embed.rad", degree.radial, config.irreps)
    put_linear("edge_deg_embed.proj", degree.linear, wide_1)
    for k, layer in enumerate(model.layers):
        name, attention = f"blocks.{k}", layer.attention
        put_norm(f"{name}.norm_1", layer.norm_1, config.irreps)
        put_norm(f"{name}.norm_2", layer.norm_2, config.irreps)
        put_linear(f"{name}.ga.merge_src", attention.from_sender, config.irreps)
        put_linear(f"{name}.ga.merge_dst", attention.from_receiver, config.irreps)
        if config.message == "nonlinear":
            put_radial(f"{name}.ga.sep_act.dtp_rad", attention.radial, config.irreps)
            put_linear(f"{name}.ga.sep_alpha", attention.to_alpha, wide_1)
            put_linear(f"{name}.ga.sep_act.lin", attention.to_gate, wide_1)
            shared = reordered(attention.weights[...], config.head_irreps)
            put(f"{name}.ga.sep_value.dtp.tp.weight", shared)
            put_linear(f"{name}.ga.sep_value.lin", attention.to_value, wide_2)
        else:
            put_radial(f"{name}.ga.sep.dtp_rad", attention.radial, config.head_irreps)
            put_linear(f"{name}.ga.sep.lin", attention.to_both, wide_2)
        put(f"{name}.ga.alpha_dot", attention.dot[...][None])
        put_linear(f"{name}.ga.proj", attention.linear, config.head_irreps)
        put_linear(f"{name}.ffn.fctp_1", layer.ffn_1, config.irreps)
        put_linear(f"{name}.ffn.fctp_2", layer.ffn_2, config.ffn_irreps)
        if layer.shortcut is not None:
            put_linear(f"{name}.ffn_shortcut", layer.shortcut, config.irreps)
    outputs = f"{config.output_channels}x0e"
    put_norm("norm", model.norm, outputs)
    put_linear("head.0", model.head_1, outputs)
    put_linear("head.2", model.head_2, outputs)
    return state
