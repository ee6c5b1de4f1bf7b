"""EquiformerV2 restated in torch from its formulas, on a state dict in the checkpoints' layout.

Features are ``[n, (l_max + 1)^2, channels]``, degree by degree, orders from ``-l`` to ``l``; those
that are kept in the frame of an edge are sorted by order. Nothing of equizoo is used, nor of the
published code: harmonics and the published grid are e3nn's. Autograd goes through all of it.
"""

from typing import NamedTuple

import numpy as np
import torch
from e3nn import o3
from torch.nn import functional as F


def harmonics(l_max, directions):
    return o3.spherical_harmonics(list(range(l_max + 1)), directions, False, "component")


def rotations_to_y(directions):
    """The shortest rotation; where ``y < 0``, half a turn about x and then the shortest."""
    half_turn = torch.diag(torch.tensor([1.0, -1.0, -1.0]).to(directions))
    below = (directions[:, 1] < 0)[:, None, None]
    first = torch.where(below, half_turn, torch.eye(3).to(directions))
    x, y, z = torch.einsum("eij,ej->ei", first, directions).unbind(1)
    zero = torch.zeros_like(x)
    # Rodrigues' formula about the cross product of the direction and y
    cross = torch.stack([-z, zero, x], dim=1)
    generator = torch.stack(
        [
            torch.stack([zero, -cross[:, 2], cross[:, 1]], dim=1),
            torch.stack([cross[:, 2], zero, -cross[:, 0]], dim=1),
            torch.stack([-cross[:, 1], cross[:, 0], zero], dim=1),
        ],
        dim=1,
    )
    shortest = torch.eye(3).to(x) + generator + generator @ generator / (1 + y)[:, None, None]
    return shortest @ first


def wigner(rotations, l_max):
    """``D`` with ``Y(R r) = D Y(r)``, solved for on points at random."""
    points = torch.as_tensor(np.random.default_rng(0).normal(size=(4 * (2 * l_max + 1), 3)))
    points = points / points.norm(dim=1, keepdim=True)
    before = harmonics(l_max, points)
    after = harmonics(l_max, torch.einsum("eij,pj->epi", rotations, points))
    result = torch.zeros(len(rotations), before.shape[1], before.shape[1], dtype=before.dtype)
    for degree in range(l_max + 1):
        place = slice(degree**2, (degree + 1) ** 2)
        solved = torch.linalg.pinv(before[:, place]) @ after[:, :, place]
        result[:, place, place] = solved.transpose(1, 2)
    return result


def published_grid(l_max, points, m_max):
    """e3nn's, for both transforms ``[latitude, longitude, component]``."""
    to = o3.ToS2Grid(l_max, (points, points), "component")
    back = o3.FromS2Grid((points, points), l_max, "component")
    return (
        torch.einsum("mbi,am->bai", to.shb, to.sha),
        torch.einsum("am,mbi->bai", back.sha, back.shb),
    )


def gauss_grid(l_max, points, m_max):
    """Gauss's latitudes, half as many; longitudes as orders up to ``m_max`` in features need."""
    cosines, weights = np.polynomial.legendre.leggauss((points + 1) // 2)
    longitudes = points if m_max == l_max else min(points, 4 * m_max + 2)
    alpha = 2 * np.pi * np.arange(longitudes) / longitudes
    c, a = np.meshgrid(cosines, alpha, indexing="ij")
    s = np.sqrt(1 - c**2)
    values = harmonics(l_max, torch.as_tensor(np.stack([s * np.sin(a), c, s * np.cos(a)], axis=-1)))
    degree = np.repeat(np.arange(l_max + 1), 2 * np.arange(l_max + 1) + 1)
    factor = torch.as_tensor(np.sqrt((2 * degree + 1) * (l_max + 1)))
    weights = torch.as_tensor(weights / weights.sum() / longitudes)
    return values / factor, weights[:, None, None] * values * factor


class Edges(NamedTuple):
    numbers: torch.Tensor  # of the nodes
    source: torch.Tensor
    target: torch.Tensor
    rows: torch.Tensor  # [edges, kept components, components]
    basis: torch.Tensor
    envelope: torch.Tensor | None


class EquiformerV2:
    """``settings`` are those of a checkpoint, ``state`` its float64 tensors."""

    def __init__(self, settings, state, *, grid=published_grid, envelope_p=None):
        self.s, self.state, self.grid, self.envelope_p = settings, state, grid, envelope_p
        (self.l_max,), (self.m_max,) = settings["lmax_list"], settings["mmax_list"]
        signed = [0] + [sign * m for m in range(1, self.m_max + 1) for sign in (1, -1)]
        kept = [(degree, m) for m in signed for degree in range(abs(m), self.l_max + 1)]
        self.kept = torch.tensor([degree**2 + degree + m for degree, m in kept])
        self.rescaled = torch.tensor(
            [
                ((2 * degree + 1) / (2 * self.m_max + 1)) ** 0.5 if degree > self.m_max else 1.0
                for degree, _ in kept
            ],
            dtype=torch.float64,
        )
        self.degree = torch.tensor([d for d in range(self.l_max + 1) for _ in range(2 * d + 1)])

    # ---- parts

    def linear(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def layer_norm(self, name, x):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

    def so3_linear(self, name, x):
        y = torch.einsum("nic,ioc->nio", x, self.state[f"{name}.weight"][self.degree])
        bias = torch.zeros_like(y)
        bias[:, 0] = self.state[f"{name}.bias"]
        return y + bias

    def norm(self, name, x):
        weight, scalars, rest = self.state[f"{name}.affine_weight"], x[:, :1], x[:, 1:]
        if self.s["norm_type"] == "layer_norm_sh":
            balance = 1 / (2 * self.degree[1:].to(x) + 1) / self.l_max
            mean = torch.einsum("nic,i->n", rest**2, balance) / x.shape[2]
            rest = rest / (mean + 1e-5).sqrt()[:, None, None] * weight[self.degree[1:] - 1]
            return torch.cat([self.layer_norm(f"{name}.norm_l0", scalars), rest], dim=1)
        x = torch.cat([scalars - scalars.mean(dim=2, keepdim=True), rest], dim=1)
        balance = 1 / (2 * self.degree.to(x) + 1) / (self.l_max + 1)
        mean = torch.einsum("nic,i->n", x**2, balance) / x.shape[2]
        x = x / (mean + 1e-5).sqrt()[:, None, None] * weight[self.degree]
        return torch.cat([x[:, :1] + self.state[f"{name}.affine_bias"], x[:, 1:]], dim=1)

    def radial_weights(self, embeddings, network, edges):
        """From the length of an edge and the elements at its ends."""
        source, target = (
            self.state[f"{embeddings}.{end}_embedding.weight"] for end in ("source", "target")
        )
        x = torch.cat(
            [edges.basis, source[edges.numbers[edges.source]], target[edges.numbers[edges.target]]],
            dim=1,
        )
        for k in (0, 3):
            x = F.silu(self.layer_norm(f"{network}.{k + 1}", self.linear(f"{network}.{k}", x)))
        return self.linear(f"{network}.6", x)

    def so2_convolution(self, name, x, extra=0, weights=None):
        """``extra`` scalars, and kept components; those of orders m and -m as complex numbers."""
        scalars, results, start, used = None, [], 0, 0
        for m in range(self.m_max + 1):
            count = self.l_max - m + 1
            part = x[:, start : start + count]
            if m > 0:
                part = torch.complex(part, x[:, start + count : start + 2 * count])
            start += count if m == 0 else 2 * count
            part = part.flatten(1)
            if weights is not None:
                part = part * weights[:, used : used + part.shape[1]]
                used += part.shape[1]
            if m == 0:
                y = self.linear(f"{name}.fc_m0", part)
                scalars, y = y[:, :extra], y[:, extra:]
                results.append(y.unflatten(1, (count, -1)))
            else:
                real, imaginary = self.state[f"{name}.so2_m_conv.{m - 1}.fc.weight"].chunk(2)
                y = F.linear(part, torch.complex(real, imaginary)).unflatten(1, (count, -1))
                results += [y.real, y.imag]
        return scalars, torch.cat(results, dim=1)

    def sphere_activation(self, x, gates):
        """Kept components to values on the grid, SiLU, and back; degree 0 is SiLU of ``gates``."""
        to, back = (
            matrix[..., self.kept] * self.rescaled
            for matrix in self.grid(self.l_max, self.s["grid_resolution"], self.m_max)
        )
        values = F.silu(torch.einsum("bai,eic->ebac", to, x))
        x = torch.einsum("bai,ebac->eic", back, values)
        return torch.cat([F.silu(gates)[:, None], x[:, 1:]], dim=1)

    def turned_back(self, x, edges):
        """Kept components of edges out of their frames, summed at the targets."""
        x = torch.einsum("eki,ekc->eic", edges.rows, x * self.rescaled[:, None])
        summed = torch.zeros(len(edges.numbers), *x.shape[1:], dtype=x.dtype)
        return summed.index_add(0, edges.target, x)

    def attention_weights(self, name, alphas, edges):
        """Of each edge and head, from the scalars of the first convolution."""
        x = self.layer_norm(f"{name}.alpha_norm", alphas.unflatten(1, (self.s["num_heads"], -1)))
        x = 0.6 * x + 0.4 * x * (2 * torch.sigmoid(x) - 1)
        powers = torch.einsum("ehk,hk->eh", x, self.state[f"{name}.alpha_dot"]).exp()
        floor = 0.0
        if edges.envelope is not None:
            powers, floor = powers * edges.envelope[:, None], 1.0
        total = torch.full((len(edges.numbers), powers.shape[1]), floor, dtype=powers.dtype)
        return powers / total.index_add(0, edges.target, powers)[edges.target]

    # ---- blocks

    def edges(self, vectors, numbers, source, target):
        """``vectors`` from target to source [Å]."""
        lengths, cutoff = vectors.norm(dim=1), self.s["max_radius"]
        width = self.state["edge_degree_embedding.rad_func.net.0.weight"].shape[1]
        size = width - 2 * self.state["edge_degree_embedding.source_embedding.weight"].shape[1]
        centers = torch.linspace(0, cutoff, size, dtype=torch.float64)
        spread = 2 * cutoff / (size - 1)
        u, p, envelope = lengths / cutoff, self.envelope_p, None
        if p is not None:
            envelope = 1 - (p + 1) * (p + 2) / 2 * u**p + p * (p + 2) * u ** (p + 1)
            envelope = envelope - p * (p + 1) / 2 * u ** (p + 2)
        rows = wigner(rotations_to_y(vectors / lengths[:, None]), self.l_max)[:, self.kept]
        basis = torch.exp(-0.5 * ((lengths[:, None] - centers) / spread) ** 2)
        return Edges(numbers, source, target, rows, basis, envelope)

    def edge_degree(self, edges):
        name = "edge_degree_embedding"
        axial = self.radial_weights(name, f"{name}.rad_func.net", edges)
        if edges.envelope is not None:
            axial = axial * edges.envelope[:, None]
        axial = axial.unflatten(1, (self.l_max + 1, -1))
        others = torch.zeros(
            len(axial), len(self.kept) - self.l_max - 1, axial.shape[2], dtype=axial.dtype
        )
        return self.turned_back(torch.cat([axial, others], dim=1), edges) / self.s["avg_degree"]

    def attention(self, name, x, edges):
        ends = torch.cat([x[edges.source], x[edges.target]], dim=2)
        message = torch.einsum("eki,eic->ekc", edges.rows, ends)
        weights = self.radial_weights(name, f"{name}.so2_conv_1.rad_func.net", edges)
        alphas = self.s["num_heads"] * self.s["attn_alpha_channels"]
        extra = alphas + self.s["attn_hidden_channels"]
        scalars, message = self.so2_convolution(f"{name}.so2_conv_1", message, extra, weights)
        message = self.sphere_activation(message, scalars[:, alphas:])
        _, message = self.so2_convolution(f"{name}.so2_conv_2", message)
        share = self.attention_weights(name, scalars[:, :alphas], edges)
        share = share.repeat_interleave(self.s["attn_value_channels"], dim=1)
        return self.so3_linear(f"{name}.proj", self.turned_back(message * share[:, None], edges))

    def feed_forward(self, name, x):
        scalars = F.silu(self.linear(f"{name}.scalar_mlp.0", x[:, 0]))
        to, back = self.grid(self.l_max, self.s["grid_resolution"], self.l_max)
        values = torch.einsum("bai,nic->nbac", to, self.so3_linear(f"{name}.so3_linear_1", x))
        for k in (0, 2):
            values = F.silu(self.linear(f"{name}.grid_mlp.{k}", values))
        x = torch.einsum("bai,nbac->nic", back, self.linear(f"{name}.grid_mlp.4", values))
        x = torch.cat([scalars[:, None], x[:, 1:]], dim=1)
        return self.so3_linear(f"{name}.so3_linear_2", x)

    def layer(self, k, x, edges):
        x = x + self.attention(f"blocks.{k}.ga", self.norm(f"blocks.{k}.norm_1", x), edges)
        return x + self.feed_forward(f"blocks.{k}.ffn", self.norm(f"blocks.{k}.norm_2", x))

    # ---- the whole

    def features(self, edges):
        x = self.edge_degree(edges)
        scalars = x[:, :1] + self.state["sphere_embedding.weight"][edges.numbers][:, None]
        x = torch.cat([scalars, x[:, 1:]], dim=1)
        for k in range(self.s["num_layers"]):
            x = self.layer(k, x, edges)
        return self.norm("norm", x)

    def energies(self, x):
        return self.feed_forward("energy_block", x)[:, 0, 0] / self.s["avg_num_nodes"]

    def forces(self, x, edges):
        return self.attention("force_block", x, edges)[:, 1:4, 0]
