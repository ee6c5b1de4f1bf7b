"""Equiformer restated in torch of e3nn's parts, on a state dict in the layout of the original code.

Features are flat, for every irrep in turn, channel by channel its components. Products with
harmonics and gates are e3nn 0.4.4's, as in the original; nothing of equizoo is used.
"""

from typing import NamedTuple

import numpy as np
import torch
from e3nn import nn, o3
from e3nn.math import normalize2mom
from torch.nn import functional as F


def slices(irreps):
    return list(zip(o3.Irreps(irreps), o3.Irreps(irreps).slices(), strict=True))


def times(irreps, number):
    return o3.Irreps([(number * mul, ir) for mul, ir in o3.Irreps(irreps)])


class Product(torch.nn.Module):
    """Of features with harmonics, channel by channel, into ``keep`` and scalars.

    e3nn 0.4.4 has the Clebsch-Gordan coefficients of degrees 1, l, l (l > 1, in any order) with the
    other sign than its later versions and equizoo, so weights have it too.
    """

    def __init__(self, irreps, harmonics, keep):
        super().__init__()
        irreps, harmonics = o3.Irreps(irreps), o3.Irreps(harmonics)
        kept = {ir for _, ir in o3.Irreps(keep)} | {o3.Irrep("0e")}
        paths = [
            (i, j, out)
            for i, (_, first) in enumerate(irreps)
            for j, (_, second) in enumerate(harmonics)
            for out in first * second
            if out in kept
        ]
        order = sorted(range(len(paths)), key=lambda k: (paths[k][2].l, -paths[k][2].p, k))
        place = {path: index for index, path in enumerate(order)}
        outs = o3.Irreps([(irreps[paths[k][0]].mul, paths[k][2]) for k in order])
        self.irreps_out = outs.simplify()
        self.product = o3.TensorProduct(
            irreps, harmonics, outs,
            [(i, j, place[k], "uvu", True) for k, (i, j, _) in enumerate(paths)],
            irrep_normalization="component", path_normalization="none",
            internal_weights=False, shared_weights=False,
        )  # fmt: skip
        signs = []
        for i, j, out in paths:
            low, middle, high = sorted((irreps[i].ir.l, harmonics[j].ir.l, out.l))
            signs += irreps[i].mul * [-1.0 if low == 1 and middle == high > 1 else 1.0]
        self.signs = torch.tensor(signs, dtype=torch.float64)

    def forward(self, x, harmonics, weights):
        return self.product(x, harmonics, weights * self.signs)


class Edges(NamedTuple):
    source: torch.Tensor
    target: torch.Tensor
    harmonics: torch.Tensor
    basis: torch.Tensor
    envelope: torch.Tensor


class Equiformer:
    """``settings`` are equizoo's, as no checkpoint has them all; ``state`` float64 tensors."""

    def __init__(self, settings, harmonics, state):
        self.c, self.state = settings, state
        self.into_nodes = Product(settings.irreps, harmonics, settings.irreps)
        self.into_heads = Product(settings.irreps, harmonics, settings.head_irreps)
        self.harmonics = [ir.l for _, ir in o3.Irreps(harmonics)]
        self.leaky = normalize2mom(lambda x: 0.6 * x + 0.4 * x * (2 * torch.sigmoid(x) - 1))

    # ---- parts

    def linear(self, name, x, irreps_in, irreps_out):
        weight, start = self.state[f"{name}.tp.weight"], 0
        results = {
            str(ir): torch.zeros(len(x), mul, ir.dim, dtype=x.dtype)
            for mul, ir in o3.Irreps(irreps_out)
        }
        for (mul, ir), place in slices(irreps_in):
            if str(ir) in results:
                shape = (mul, results[str(ir)].shape[1])
                kernel = weight[start : start + shape[0] * shape[1]].reshape(shape)
                start += kernel.numel()
                copies = x[:, place].reshape(len(x), mul, ir.dim)
                results[str(ir)] = results[str(ir)] + torch.einsum("nui,uw->nwi", copies, kernel)
        assert start == len(weight)
        if f"{name}.bias.0" in self.state:
            results["0e"] = results["0e"] + self.state[f"{name}.bias.0"][None, :, None]
        return torch.cat([y.flatten(1) for y in results.values()], dim=1)

    def norm(self, name, x, irreps):
        results, start = [], 0
        for (mul, ir), place in slices(irreps):
            field = x[:, place].reshape(len(x), mul, ir.dim)
            scalar = ir == o3.Irrep("0e")
            if scalar:
                field = field - field.mean(dim=1, keepdim=True)
            mean = field.pow(2).mean(dim=(1, 2), keepdim=True)
            weight = self.state[f"{name}.affine_weight"][start : start + mul]
            start += mul
            field = field / (mean + 1e-5).sqrt() * weight[None, :, None]
            if scalar:
                field = field + self.state[f"{name}.affine_bias"][None, :, None]
            results.append(field.flatten(1))
        return torch.cat(results, dim=1)

    def radial(self, name, x):
        for k in (0, 3):
            x = F.linear(x, *(self.state[f"{name}.net.{k}.{part}"] for part in ("weight", "bias")))
            weight, bias = (self.state[f"{name}.net.{k + 1}.{part}"] for part in ("weight", "bias"))
            x = F.silu(F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5))
        return F.linear(x, self.state[f"{name}.net.6.weight"], self.state[f"{name}.offset"])

    def gated(self, name, x, irreps_in, irreps):
        """A linear map, then a gate whose output is ``irreps``."""
        irreps = o3.Irreps(irreps)
        scalars = o3.Irreps([(mul, ir) for mul, ir in irreps if ir == o3.Irrep("0e")])
        rest = o3.Irreps([(mul, ir) for mul, ir in irreps if ir != o3.Irrep("0e")])
        gates = o3.Irreps([(rest.num_irreps, "0e")])
        gate = nn.Gate(scalars, [F.silu], gates, [torch.sigmoid], rest)
        return gate(self.linear(name, x, irreps_in, gate.irreps_in.simplify()))

    # ---- blocks

    def edges(self, vectors, source, target):
        """``vectors`` from target to source [Å]."""
        c, n, r = self.c, self.c.num_basis, vectors.norm(dim=1)
        u, envelope = r / c.cutoff, torch.ones_like(r)
        if c.envelope_p is not None:
            assert c.envelope_p == 5
            envelope = 1 - 21 * u**5 + 35 * u**6 - 15 * u**7
        if c.radial_basis == "exp_normal":
            means = torch.linspace(np.exp(-c.cutoff), 1, n, dtype=r.dtype)
            beta = (2 / n * (1 - np.exp(-c.cutoff))) ** -2
            basis = torch.exp(-beta * (torch.exp(-5 * u)[:, None] - means) ** 2)
            basis = 0.5 * (torch.cos(np.pi * u) + 1)[:, None] * basis
        else:
            spread = self.state["rbf.std"].abs() + 1e-5
            x = self.state["rbf.weight"] * u[:, None] + self.state["rbf.bias"]
            basis = torch.exp(-0.5 * ((x - self.state["rbf.mean"]) / spread) ** 2)
            basis = basis / (spread * (2 * 3.14159) ** 0.5)
        harmonics = o3.spherical_harmonics(self.harmonics, vectors, True, "component")
        return Edges(source, target, harmonics, basis, envelope)

    def edge_degree(self, edges, nodes):
        c, name = self.c, "edge_deg_embed"
        ones = torch.ones(len(edges.source), 1, dtype=torch.float64)
        x = self.linear(f"{name}.exp", ones, "1x0e", c.irreps)
        x = self.into_nodes(x, edges.harmonics, self.radial(f"{name}.rad", edges.basis))
        x = self.linear(f"{name}.proj", x, self.into_nodes.irreps_out, c.irreps)
        summed = torch.zeros(nodes, x.shape[1], dtype=x.dtype)
        summed = summed.index_add(0, edges.target, x * edges.envelope[:, None])
        return summed / c.avg_num_neighbors**0.5

    def message(self, name, x, edges):
        """Scalars of attention ``[edges, heads, alphas]``, and values, irrep by irrep."""
        c, heads = self.c, times(self.c.head_irreps, self.c.num_heads)
        alphas = o3.Irreps(c.head_irreps)[0].mul
        x = (
            self.linear(f"{name}.merge_src", x, c.irreps, c.irreps)[edges.source]
            + self.linear(f"{name}.merge_dst", x, c.irreps, c.irreps)[edges.target]
        )
        if c.message == "nonlinear":
            weights = self.radial(f"{name}.sep_act.dtp_rad", edges.basis)
            x, wide = self.into_nodes(x, edges.harmonics, weights), self.into_nodes.irreps_out
            scalars = self.linear(f"{name}.sep_alpha", x, wide, f"{c.num_heads * alphas}x0e")
            values = self.gated(f"{name}.sep_act.lin", x, wide, c.irreps)
            weights = self.state[f"{name}.sep_value.dtp.tp.weight"].expand(len(x), -1)
            values = self.into_heads(values, edges.harmonics, weights)
            values = self.linear(f"{name}.sep_value.lin", values, self.into_heads.irreps_out, heads)
            return scalars.unflatten(1, (c.num_heads, -1)), values
        weights = self.radial(f"{name}.sep.dtp_rad", edges.basis)
        x = self.into_heads(x, edges.harmonics, weights)
        both = times((o3.Irreps(f"{alphas}x0e") + o3.Irreps(c.head_irreps)).simplify(), c.num_heads)
        x = self.linear(f"{name}.sep.lin", x, self.into_heads.irreps_out, both)
        end = both[0].mul
        scalars = x[:, :end].unflatten(1, (c.num_heads, -1))
        own = scalars[:, :, alphas:].flatten(1)
        return scalars[:, :, :alphas], torch.cat([own, x[:, end:]], dim=1)

    def attention(self, name, x, edges):
        c, heads = self.c, times(self.c.head_irreps, self.c.num_heads)
        scalars, values = self.message(name, x, edges)
        logits = torch.einsum("ehk,hk->eh", self.leaky(scalars), self.state[f"{name}.alpha_dot"][0])
        powers = logits.exp() * edges.envelope[:, None]
        total = torch.full((len(x), c.num_heads), 0.0 if c.envelope_p is None else 1.0).to(powers)
        share = powers / total.index_add(0, edges.target, powers)[edges.target]
        results = []
        for _, place in slices(heads):
            by_head = values[:, place].unflatten(1, (c.num_heads, -1)) * share[:, :, None]
            summed = torch.zeros(len(x), by_head[0].numel(), dtype=x.dtype)
            results.append(summed.index_add(0, edges.target, by_head.flatten(1)))
        return self.linear(f"{name}.proj", torch.cat(results, dim=1), heads, c.irreps)

    def feed_forward(self, name, x, irreps_out):
        c = self.c
        hidden = self.gated(f"{name}.fctp_1", x, c.irreps, c.ffn_irreps)
        return self.linear(f"{name}.fctp_2", hidden, c.ffn_irreps, irreps_out)

    def layer(self, k, x, edges):
        c, name = self.c, f"blocks.{k}"
        x = x + self.attention(f"{name}.ga", self.norm(f"{name}.norm_1", x, c.irreps), edges)
        out = f"{c.output_channels}x0e" if k == c.num_layers - 1 else c.irreps
        update = self.feed_forward(f"{name}.ffn", self.norm(f"{name}.norm_2", x, c.irreps), out)
        if f"{name}.ffn_shortcut.tp.weight" in self.state:
            x = self.linear(f"{name}.ffn_shortcut", x, c.irreps, out)
        return x + update

    # ---- the whole

    def energies(self, species, edges):
        c, out = self.c, f"{self.c.output_channels}x0e"
        rows = torch.eye(len(c.atomic_numbers), dtype=torch.float64)[species]
        x = self.linear("atom_embed.atom_type_lin", rows, f"{rows.shape[1]}x0e", c.irreps)
        x = x + self.edge_degree(edges, len(species))
        for k in range(c.num_layers):
            x = self.layer(k, x, edges)
        x = self.linear("head.0", self.norm("norm", x, out), out, out)
        x = self.linear("head.2", normalize2mom(F.silu)(x), out, "1x0e")
        return c.scale * x[:, 0] / c.avg_num_nodes**0.5 + c.shift
