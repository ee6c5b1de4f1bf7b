"""A block of Equiformer made of e3nn's torch building blocks: a baseline of speed, in a process.

``python equiformer_e3nn.py FOLDER THREADS`` reads ``block.json`` and ``arrays.npz`` there, which
``equiformer.py`` writes, and then answers lines on its standard input: ``forward``, ``forces`` and
``step`` run once (seconds on standard output), ``results`` writes ``results.npz``. Nothing of
equizoo is imported. Products are ``o3.TensorProduct`` with 'uvu' instructions, linear maps
``o3.Linear``, gates ``e3nn.nn.Gate``; e3nn compiles them with TorchScript as it does by default.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from e3nn import nn as e3nn_nn
from e3nn import o3

SMOOTH_LEAKY_RELU = 1.531320475574866  # its second moment becomes one, as e3nn's sample has it


def param(array):
    return torch.nn.Parameter(torch.tensor(array))


class Arrays(dict):
    """Weights under the dotted names of equizoo's modules."""

    def below(self, name):
        start = f"{name}."
        return Arrays({k.removeprefix(start): v for k, v in self.items() if k.startswith(start)})


class Linear(torch.nn.Module):
    """``o3.Linear`` with given kernels ``[in, out]`` by irrep; e3nn divides by sqrt(in)."""

    def __init__(self, arrays, irreps_in, irreps_out):
        super().__init__()
        bias = "bias" in arrays
        self.linear = o3.Linear(irreps_in, irreps_out, biases=bias)
        with torch.no_grad():
            start, scales = 0, torch.ones(self.linear.weight.numel())
            for instruction in self.linear.instructions:
                if instruction.i_in < 0:  # that of the bias
                    continue
                ir = self.linear.irreps_in[instruction.i_in].ir
                kernel = torch.tensor(arrays[f"kernels.{ir}"])
                place = slice(start, start := start + kernel.numel())
                scales[place] = len(kernel) ** 0.5
                self.linear.weight[place] = kernel.flatten() * scales[place]
            self.scales = scales
            if bias:
                self.linear.bias.copy_(torch.tensor(arrays["bias"]))

    def forward(self, x):
        return self.linear(x)


class Norm(torch.nn.Module):
    """Each irrep over its root mean square; scalars centred first."""

    def __init__(self, arrays, irreps):
        super().__init__()
        self.irreps = o3.Irreps(irreps)
        self.weights = torch.nn.ParameterList(
            [
                param(arrays["scalars.weight" if ir.l == 0 else f"weights.{ir}"])
                for _, ir in self.irreps
            ]
        )
        self.bias = param(arrays["scalars.bias"])

    def forward(self, x):
        results = []
        for (mul, ir), place, weight in zip(
            self.irreps, self.irreps.slices(), self.weights, strict=True
        ):
            block = x[:, place].reshape(len(x), mul, ir.dim)
            if ir.l == 0:
                block = block - block.mean(dim=1, keepdim=True)
            inverse = torch.rsqrt(block.pow(2).mean(dim=(1, 2), keepdim=True) + 1e-5)
            block = block * inverse * weight[None, :, None]
            if ir.l == 0:
                block = block + self.bias[None, :, None]
            results.append(block.reshape(len(x), -1))
        return torch.cat(results, dim=1)


class Depthwise(torch.nn.Module):
    """The product with harmonics channel by channel; weights ``[edges or 1, num_weights]``."""

    def __init__(self, facts, couplings):
        super().__init__()
        irreps, harmonics = o3.Irreps(facts["irreps"]), o3.Irreps(facts["harmonics"])
        outs, instructions = [], [None] * len(facts["paths"])
        for place, number in enumerate(facts["order"]):
            first, second, ir = facts["paths"][number]
            outs.append((irreps[first].mul, ir))
            instructions[number] = (first, second, place, "uvu", True)
        self.product = o3.TensorProduct(
            irreps, harmonics, o3.Irreps(outs), instructions, irrep_normalization="component",
            path_normalization="none", shared_weights=False, internal_weights=False,
        )  # fmt: skip
        signs = []
        for first, second, ir in facts["paths"]:
            degrees = irreps[first].ir.l, harmonics[second].ir.l, o3.Irrep(ir).l
            ours = torch.tensor(couplings["couplings.{}_{}_{}".format(*degrees)])
            sign = torch.sign((ours * o3.wigner_3j(*degrees).to(ours.dtype)).sum())
            signs.append(sign.repeat(irreps[first].mul))
        self.register_buffer("signs", torch.cat(signs).float())
        self.irreps_out = o3.Irreps(outs).simplify()

    def forward(self, x, harmonics, weights):
        return self.product(x, harmonics, (weights * self.signs).expand(len(x), -1))


class Radial(torch.nn.Module):
    def __init__(self, arrays, count):
        super().__init__()
        layers = []
        for k in range(count):
            kernel, bias = arrays[f"maps.{k}.kernel"], arrays[f"maps.{k}.bias"]
            linear = torch.nn.Linear(*kernel.shape)
            linear.weight, linear.bias = param(kernel.T.copy()), param(bias)
            layers.append(linear)
            if k < count - 1:
                norm = torch.nn.LayerNorm(len(bias))
                norm.weight = param(arrays[f"norms.{k}.weight"])
                norm.bias = param(arrays[f"norms.{k}.bias"])
                layers += [norm, torch.nn.SiLU()]
        self.network = torch.nn.Sequential(*layers)

    def forward(self, x):
        return self.network(x)


def gate(irreps):
    irreps = o3.Irreps(irreps)
    scalars = o3.Irreps([(mul, ir) for mul, ir in irreps if ir.l == 0])
    gated = o3.Irreps([(mul, ir) for mul, ir in irreps if ir.l > 0])
    gates = o3.Irreps([(gated.num_irreps, "0e")])
    return e3nn_nn.Gate(scalars, [torch.nn.functional.silu], gates, [torch.sigmoid], gated)


class Block(torch.nn.Module):
    """Attention by non-linear messages and a feed-forward network, as equizoo's."""

    def __init__(self, facts, arrays):
        super().__init__()
        irreps, attention = o3.Irreps(facts["irreps"]), arrays.below("attention")
        self.facts = facts
        self.norm_1 = Norm(arrays.below("norm_1"), irreps)
        self.norm_2 = Norm(arrays.below("norm_2"), irreps)
        self.senders = Linear(attention.below("from_sender"), irreps, irreps)
        self.receivers = Linear(attention.below("from_receiver"), irreps, irreps)
        self.first = Depthwise(facts["into_nodes"], arrays)
        self.second = Depthwise(facts["into_heads"], arrays)
        self.radial = Radial(attention.below("radial"), facts["num_maps"])
        wide = self.first.irreps_out
        alphas = attention["to_alpha.kernels.0e"].shape[1]
        self.to_alpha = Linear(attention.below("to_alpha"), wide, f"{alphas}x0e")
        self.gate, self.gate_ffn = gate(irreps), gate(facts["ffn_irreps"])
        self.to_gate = Linear(attention.below("to_gate"), wide, self.gate.irreps_in.simplify())
        self.weights = param(attention["weights"])
        self.heads = o3.Irreps(facts["heads"])
        self.to_value = Linear(attention.below("to_value"), self.second.irreps_out, self.heads)
        self.dot = param(attention["dot"])
        self.linear = Linear(attention.below("linear"), self.heads, irreps)
        self.ffn_1 = Linear(arrays.below("ffn_1"), irreps, self.gate_ffn.irreps_in.simplify())
        self.ffn_2 = Linear(arrays.below("ffn_2"), facts["ffn_irreps"], irreps)

    def basis(self, r):
        cutoff, count = self.facts["cutoff"], self.facts["num_basis"]
        start = float(np.exp(-cutoff))
        means = torch.linspace(start, 1, count)
        beta = (2 / count * (1 - start)) ** -2
        gaussians = torch.exp(-beta * (torch.exp(-5 / cutoff * r)[:, None] - means) ** 2)
        return 0.5 * (1 + torch.cos(np.pi * r / cutoff))[:, None] * gaussians

    def forward(self, x, vectors, senders, receivers):
        lengths = vectors.norm(dim=1)
        degrees = list(range(self.facts["l_max"] + 1))
        harmonics = o3.spherical_harmonics(degrees, -vectors, True, "component")
        x = x + self.attention(self.norm_1(x), harmonics, self.basis(lengths), senders, receivers)
        return x + self.ffn_2(self.gate_ffn(self.ffn_1(self.norm_2(x))))

    def attention(self, x, harmonics, basis, senders, receivers):
        num_heads, edges = self.facts["num_heads"], len(basis)
        message = self.senders(x)[senders] + self.receivers(x)[receivers]
        message = self.first(message, harmonics, self.radial(basis))
        alpha = self.to_alpha(message).reshape(edges, num_heads, -1)
        alpha = SMOOTH_LEAKY_RELU * alpha * (0.2 + 0.8 * torch.sigmoid(alpha))
        logits = torch.einsum("ehk,hk->eh", alpha, self.dot)
        index = receivers[:, None].expand(-1, num_heads)
        top = torch.full((len(x), num_heads), -torch.inf)
        top = top.scatter_reduce(0, index, logits.detach(), "amax")
        powers = torch.exp(logits - top[receivers])
        total = torch.zeros(len(x), num_heads).index_add(0, receivers, powers)
        share = powers / total[receivers]
        values = self.second(self.gate(self.to_gate(message)), harmonics, self.weights[None])
        values = self.to_value(values)
        weighted = []
        for place in self.heads.slices():
            by_head = values[:, place].reshape(edges, num_heads, -1)
            weighted.append((by_head * share[:, :, None]).reshape(edges, -1))
        values = torch.cat(weighted, dim=1)
        summed = torch.zeros(len(x), values.shape[1]).index_add(0, receivers, values)
        return self.linear(summed)


def main(folder, threads):
    torch.set_num_threads(threads)
    facts = json.loads((folder / "block.json").read_text())
    with np.load(folder / "arrays.npz") as stored:
        arrays = Arrays({name: stored[name] for name in stored.files})
    block = Block(facts, arrays)
    x = torch.tensor(arrays["x"])
    senders, receivers = (torch.tensor(arrays[k]).long() for k in ("senders", "receivers"))
    held = {}

    def energy(vectors):
        return 0.5 * block(x, vectors, senders, receivers).pow(2).sum() / len(x)

    def run(what):
        vectors = torch.tensor(arrays["vectors"], requires_grad=what != "forward")
        if what == "forward":
            with torch.no_grad():
                held["energy"] = energy(vectors)
            return
        value = energy(vectors)
        (gradient,) = torch.autograd.grad(value, vectors, create_graph=what == "step")
        held["energy"], held["gradient"] = value, gradient
        if what == "step":
            block.zero_grad()
            (value + gradient.pow(2).sum()).backward()

    for line in sys.stdin:
        what = line.strip()
        if what == "results":
            run("step")
            for module in block.modules():
                if isinstance(module, Linear):  # by the weights as they act
                    module.linear.weight.grad *= module.scales
            norm = sum(p.grad.pow(2).sum() for p in block.parameters() if p.grad is not None)
            np.savez(
                folder / "results.npz",
                energy=held["energy"].item(),
                gradient=held["gradient"].detach().numpy(),
                norm=norm.sqrt().item(),
                torch=torch.__version__,
                parameters=sum(p.numel() for p in block.parameters()),
            )
            print("done", flush=True)
            continue
        start = time.perf_counter()
        run(what)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
