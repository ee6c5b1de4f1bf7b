"""How much faster are the Equiformers here than their plain formulations, and where does time go?

V1: one block (attention and feed-forward network) against the same block made of e3nn's torch
building blocks, in a process of its own (``equiformer_e3nn.py``): energy, energy and its gradient
by the edge vectors, and the gradient of a loss of both by all parameters. V2: a model with direct
forces against the plain formulation in JAX (``equiformer_v2_plain.py``): energies and forces, and
the gradient of a loss by all parameters. Both have the same weights and inputs, and results are
compared before anything is timed; V2 on the grid of new models has a row of its own. Programs take
turns in one session, medians, float32. Then all parts of V1's block and of V2, each compiled by
itself, forward and with derivatives, as shares of the whole; what they leave of it, or take more
than it, is the remainder.

``EQUIZOO_TORCH_PYTHON=... python benchmarks/equiformer.py`` on an idle machine writes
``results/equiformer.csv`` and ``results/equiformer_parts.csv``; ``--smoke`` only looks that all of
it runs.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from equiformer_v2_plain import Plain
from flax import nnx

from equizoo.compile_cache import uncached
from equizoo.eval.benchmark_timing import (
    Program,
    compile_program,
    numerics,
    time_in_turns,
    write_table,
)
from equizoo.graph import (
    Budget,
    Graph,
    batch_frames,
    edge_vectors,
    gather_receivers,
    gather_senders,
)
from equizoo.layers.activation import ActivationConstant
from equizoo.layers.depthwise_in_frames import into_frames
from equizoo.layers.features import SCALAR, channels_of, gate, with_gates
from equizoo.layers.products import Products
from equizoo.layers.so2 import ends_in_frames
from equizoo.layers.sphere_grid import Grid
from equizoo.neighbors import NeighborLimit
from equizoo.structure import Structure
from equizoo.zoo import equiformer, equiformer_v2
from equizoo.zoo._base import energy_forces_stress
from equizoo.zoo.equiformer import EquiformerConfig, EquiformerLayer, Evaluation
from equizoo.zoo.equiformer_v2 import SIZES, EquiformerV2Config

HERE = Path(__file__).parent
ELEMENTS = (1, 6, 7, 8)
SMALL_V1 = {
    "irreps": "8x0e+4x1e+4x2e", "head_irreps": "4x0e+2x1e+2x2e", "ffn_irreps": "8x0e+4x1e+4x2e",
}  # fmt: skip
SMALL_V2 = {
    "channels": 8, "hidden_channels": 8, "ffn_channels": 8, "alpha_channels": 4, "edge_channels": 8,
    "value_channels": 2, "l_max": 3, "grid_points": 10, "num_basis": 16, "num_layers": 1,
}  # fmt: skip


def jittered_lattice(atoms: int) -> Structure:
    """A cubic crystal of random elements, atoms some 2.5 Å apart and displaced: many neighbours."""
    side = round(atoms ** (1 / 3))
    rng = np.random.default_rng(0)
    sites = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    positions = 2.5 * sites + rng.normal(0, 0.15, sites.shape)
    return Structure(
        rng.choice(ELEMENTS, len(sites)), positions, 2.5 * side * np.eye(3), (True, True, True)
    )


def batch_of(config, structure: Structure, flat: bool = False) -> Graph:
    """A batch of one; ``flat`` without a padded edge, as plain formulations have it."""
    frame = config.frame(structure)
    exact = Budget.of([frame])
    if flat:
        exact = dataclasses.replace(exact, slots=None, out_slots=None, edges=frame.num_edges)
    return jax.tree.map(jnp.asarray, batch_frames([frame], exact))


def relative(found, expected) -> float:
    """The largest difference over the largest number."""
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# ---- V2


def v2_programs(options) -> tuple[list[dict], dict[str, Program]]:
    """Rows without times, and the programs by row."""
    fields = SIZES["oc20_83m"] | {"num_layers": options.layers, "l_max": options.l_max}
    fields |= SMALL_V2 if options.smoke else {}
    limit = NeighborLimit(options.neighbors)
    config = EquiformerV2Config(
        atomic_numbers=ELEMENTS, cutoff=6.0, avg_num_neighbors=float(options.neighbors),
        **(fields | {"neighbor_limit": limit}),
    )  # fmt: skip
    graph = batch_of(config, jittered_lattice(options.atoms))
    flat = batch_of(config, jittered_lattice(options.atoms), flat=True)
    variants = {
        "plain": (config, flat),
        "equizoo": (config, graph),
        "equizoo, new grid": (dataclasses.replace(config, grid=Grid.GAUSS), graph),
        "equizoo, new grid, bfloat16": (
            dataclasses.replace(config, grid=Grid.GAUSS, products=Products.BFLOAT16), graph,
        ),
    }  # fmt: skip
    params = nnx.state(config.build(rngs=nnx.Rngs(0)), nnx.Param)
    rows, programs, results = [], {}, {}
    for name, (variant, batch) in variants.items():
        graphdef = nnx.graphdef(nnx.eval_shape(lambda v=variant: v.build(rngs=nnx.Rngs(0))))

        def outputs(params, batch, graphdef=graphdef, plain=name == "plain"):
            model = nnx.merge(graphdef, params)
            if plain:
                nodes, forces = Plain(model)(batch)
                keep = batch.node_mask
                return jnp.where(keep, nodes, 0).sum(), jnp.where(keep[:, None], forces, 0)
            prediction = energy_forces_stress(model, batch)
            return prediction.energy.sum(), prediction.forces

        def loss(params, batch, outputs=outputs):
            energy, forces = outputs(params, batch)
            return energy**2 + jnp.sum(forces**2)

        for mode, function in (("forward", outputs), ("step", jax.grad(loss))):
            program = compile_program(function, (params,), (batch,))
            programs[f"{name}/{mode}"] = program
            results[name, mode] = program.run()
            error = relative_tree(results[name, mode], results["plain", mode])
            rows.append(
                {
                    "architecture": "equiformer_v2", "implementation": name, "mode": mode,
                    "relative_difference": f"{error:.1e}",
                    "atoms": options.atoms, "edges": int(batch.edge_mask.sum()),
                    "slots": batch.num_edges, "layers": variant.num_layers,
                    "channels": variant.channels, "degree": variant.l_max,
                    "gflops": round((program.flops or 0) / 1e9, 3),
                    "memory_MB": round(program.memory / 1e6, 1),
                    "compile_s": round(program.compile_s, 1),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows, programs


def relative_tree(found, expected) -> float:
    """Of everything together, as a norm: single small parts do not decide."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    squares = [(float(jnp.sum((a - b) ** 2)), float(jnp.sum(b**2))) for a, b in pairs]
    return float(np.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares)))


class Part(NamedTuple):
    """What the whole has ``times``; without arguments to derive by, derivatives cost nothing."""

    name: str
    times: int
    forward: Program
    with_derivatives: Program


def compiled(name: str, times: int, function: Callable, arguments=(), constants=()) -> Part:
    """Derivatives are by ``arguments``."""
    forward = compile_program(function, arguments, constants)
    if not arguments:
        return Part(name, times, forward, forward)
    return Part(name, times, forward, compile_program(function, arguments, constants, True))


def of_module(module, call: Callable, used: Sequence[str] | None = None):
    """``call(module, ...)`` with parameters as first argument, and those of the children ``used``.

    All by default.
    """

    def chosen(path, leaf):
        return used is None or path[0] in used

    graphdef, params, rest = nnx.split(module, chosen, ...)
    return lambda params, *values: call(nnx.merge(graphdef, params, rest), *values), params


def v2_parts(options, grid: Grid) -> tuple[Part, list[Part]]:
    """A V2 model with direct forces, and all its parts but embeddings and sums of features."""
    fields = SIZES["oc20_83m"] | {"num_layers": options.layers, "l_max": options.l_max}
    fields |= (SMALL_V2 if options.smoke else {}) | {"grid": grid}
    config = EquiformerV2Config(
        atomic_numbers=ELEMENTS, cutoff=6.0, avg_num_neighbors=float(options.neighbors),
        **(fields | {"neighbor_limit": NeighborLimit(options.neighbors)}),
    )  # fmt: skip
    graph = batch_of(config, jittered_lattice(options.atoms))
    model = config.build(rngs=nnx.Rngs(0))
    layer, layers = model.layers[0], config.num_layers
    attention, blocks = layer.attention, config.num_layers + 1  # with the head of forces
    vectors = edge_vectors(graph, config.cutoff)
    edges = equiformer_v2.edges_of(config, vectors)
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    count, components, dim = edges.rows.shape
    x = draw(graph.num_nodes, dim, config.channels)
    hidden = draw(count, components, config.hidden_channels)
    values = draw(count, components, config.num_heads * config.value_channels)
    summed = draw(graph.num_nodes, dim, values.shape[2])
    alphas = draw(count, config.num_heads * config.alpha_channels)

    def part(name, times, module, call, arguments=(), constants=(), used=None):
        """By parameters too."""
        function, params = of_module(module, call, used)
        return compiled(name, times, function, (params, *arguments), constants)

    def outputs(model, graph):
        prediction = energy_forces_stress(model, graph)
        return prediction.energy, prediction.forces

    def apply(module, *values):
        return module(*values)

    whole = part("whole", 1, model, outputs, (), (graph,))
    return whole, [
        compiled(
            "frames and basis", 1, lambda v: equiformer_v2.edges_of(config, v), (), (vectors,)
        ),
        part("edge-degree embedding", 1, model.edge_degree, apply, (), (edges, graph)),
        part("norms", 2 * layers + 1, layer.norm_1, apply, (x,)),
        part("radial weights", blocks, attention.weights, apply, (), (edges.basis, graph)),
        compiled("gather and turn", blocks, ends_in_frames, (x,), (edges.rows, graph)),
        part(
            "convolution 1", blocks, attention.conv_1, apply,
            (draw(count, components, 2 * config.channels),
             draw(count, attention.conv_1.num_weights)),
        ),
        compiled(
            "activation on the sphere", blocks, lambda h, g: attention._activated(h, g),
            (hidden, draw(count, config.hidden_channels)),
        ),
        part("convolution 2", blocks, attention.conv_2, apply, (hidden,)),
        part(
            "softmax", blocks, attention, lambda m, *rest: m._alpha(*rest), (alphas,),
            (edges, graph), used=("norm", "dot"),
        ),
        compiled(
            "weigh, turn back and sum", blocks, lambda *rest: attention._summed(*rest),
            (values, draw(count, config.num_heads)), (edges, graph),
        ),
        part("linear after the sum", layers, attention.linear, apply, (summed,)),
        part("linear of the force head", 1, model.force_head.linear, apply, (summed,)),
        part("feed-forward", layers, layer.ffn, apply, (x,)),
        part("energy head", 1, model.energy_head, apply, (x,)),
    ]  # fmt: skip


# ---- V1


def v1_config(options) -> EquiformerConfig:
    return EquiformerConfig(
        atomic_numbers=ELEMENTS, cutoff=5.0, avg_num_neighbors=20.0, envelope_p=None,
        activation=ActivationConstant.TORCH, num_layers=2, **(SMALL_V1 if options.smoke else {}),
    )  # fmt: skip


class Worker:
    """The block of e3nn, in a process; its answers are timed by the caller."""

    def __init__(self, python: str, folder: Path, threads: int):
        program = HERE / "equiformer_e3nn.py"
        environment = os.environ | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
        environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [python, str(program), str(folder), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def ask(self, what: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        if not (answer := self._process.stdout.readline()):
            raise RuntimeError(f"The torch process ended (code {self._process.wait()}).")
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def basis_of(config: EquiformerConfig):
    return config.radial_basis.build(config.cutoff, config.num_basis, rngs=nnx.Rngs(0))


def v1_problem(options):
    """Layer, features, edge vectors and graph."""
    config = v1_config(options)
    graph = batch_of(config, jittered_lattice(options.atoms))
    layer = EquiformerLayer(config, config.irreps, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    x = {
        ir: jnp.asarray(
            rng.normal(size=(graph.num_nodes, e3nn.Irrep(ir).dim, mul)), jnp.float32
        ) * graph.node_mask[:, None, None]
        for ir, mul in channels_of(config.irreps).items()
    }  # fmt: skip
    return config, graph, layer, x, edge_vectors(graph, config.cutoff)


def v1_functions(config, graphdef) -> dict[str, Callable]:
    def energy(params, x, vectors, graph):
        edges = equiformer.edges_of(config, basis_of(config), vectors)
        x = nnx.merge(graphdef, params)(x, edges, graph, None)
        squares = sum(jnp.sum(a**2 * graph.node_mask[:, None, None]) for a in x.values())
        return 0.5 * squares / graph.node_mask.sum()

    def forces(params, x, vectors, graph):
        value, gradient = jax.value_and_grad(energy, argnums=2)(params, x, vectors, graph)
        return value, jnp.where(graph.edge_mask[:, None], gradient, 0)

    def step(params, x, vectors, graph):
        def loss(params):
            value, gradient = forces(params, x, vectors, graph)
            return value + jnp.sum(gradient**2)

        return jax.grad(loss)(params)

    return {"forward": energy, "forces": forces, "step": step}


def write_block(folder: Path, config, layer, x, vectors, graph) -> None:
    """What the torch process needs: weights by name, couplings, the order of paths, inputs."""
    arrays = {
        ".".join(map(str, path)): np.asarray(leaf[...])
        for path, leaf in nnx.to_flat_state(nnx.state(layer))
    }
    real, edges = np.asarray(graph.node_mask), np.asarray(graph.edge_mask)
    flat = [np.swapaxes(np.asarray(a)[real], 1, 2).reshape(real.sum(), -1) for a in x.values()]
    arrays |= {
        "x": np.concatenate(flat, axis=1),
        "vectors": np.asarray(vectors)[edges],
        "senders": np.asarray(graph.senders)[edges],
        "receivers": np.asarray(graph.receivers)[edges],
    }
    products = dict(zip(("into_nodes", "into_heads"), equiformer._products(config), strict=True))
    facts: dict[str, Any] = {
        "irreps": config.irreps, "ffn_irreps": config.ffn_irreps,
        "heads": equiformer._heads(config), "num_heads": config.num_heads,
        "cutoff": config.cutoff, "num_basis": config.num_basis,
        "num_maps": len(config.radial_widths) + 1, "l_max": e3nn.Irreps(config.irreps).lmax,
    }  # fmt: skip
    for name, product in products.items():
        paths = []
        for first, (ir, bound) in enumerate(product.products.items()):
            for path in bound.paths:
                paths.append((first, path.index_2, str(path.ir_out)))
                degrees = e3nn.Irrep(ir).l, path.ir_2.l, path.ir_out.l
                arrays["couplings.{}_{}_{}".format(*degrees)] = np.asarray(
                    e3nn.clebsch_gordan(*degrees), np.float64
                )
        order = sorted(range(len(paths)), key=lambda k, paths=paths: e3nn.Irrep(paths[k][2]))
        facts[name] = {
            "irreps": config.irreps, "harmonics": config.harmonics, "paths": paths, "order": order,
        }  # fmt: skip
    (folder / "block.json").write_text(json.dumps(facts))
    np.savez(folder / "arrays.npz", **arrays)


def v1_programs(options, folder: Path) -> tuple[list[dict], dict[str, Callable[[], Any]], Worker]:
    config, graph, layer, x, vectors = v1_problem(options)
    write_block(folder, config, layer, x, vectors, graph)
    worker = Worker(options.python, folder, options.threads)
    worker.ask("results")
    with np.load(folder / "results.npz") as stored:
        theirs = {name: stored[name] for name in stored.files}
    given = dataclasses.replace(config, evaluation=Evaluation.AS_GIVEN)
    forms = {"equizoo": config, "equizoo, products as given": given}
    rows, runs = [], {}
    for mode in ("forward", "forces", "step"):
        runs[f"e3nn/{mode}"] = lambda mode=mode: worker.ask(mode)
        programs = {}
        for name, form in forms.items():
            graphdef, params = nnx.split(EquiformerLayer(form, form.irreps, rngs=nnx.Rngs(0)))
            function = v1_functions(form, graphdef)[mode]
            programs[name] = compile_program(function, (params,), (x, vectors, graph))
            runs[f"{name}/{mode}"] = programs[name].run
        for name in ("e3nn", *forms):
            ours, error = name in forms, 0.0
            if ours:
                program = programs[name]
                result = program.run()
                if mode == "step":
                    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(result)))
                    error = abs(float(norm) / float(theirs["norm"]) - 1)
                elif mode == "forces":
                    gradient = np.asarray(result[1])[np.asarray(graph.edge_mask)]
                    error = relative(gradient, theirs["gradient"])
                else:
                    error = relative(result, theirs["energy"])
            rows.append(
                {
                    "architecture": "equiformer", "implementation": name, "mode": mode,
                    "relative_difference": f"{error:.1e}" if ours else "0",
                    "atoms": options.atoms, "edges": int(graph.edge_mask.sum()),
                    "slots": graph.num_edges, "layers": 1,
                    "channels": config.irreps, "degree": e3nn.Irreps(config.irreps).lmax,
                    "gflops": round((program.flops or 0) / 1e9, 3) if ours else "",
                    "memory_MB": round(program.memory / 1e6, 1) if ours else "",
                    "compile_s": round(program.compile_s, 1) if ours else "",
                    "peer": f"torch {theirs['torch']}",
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows, runs, worker


def v1_parts(options) -> tuple[Part, list[Part]]:
    """A layer of V1 with its edges, and all its parts but sums of features."""
    config, graph, layer, x, vectors = v1_problem(options)
    attention, products = layer.attention, equiformer._products(config)
    edges = equiformer.edges_of(config, basis_of(config), vectors)
    rng = np.random.default_rng(2)

    def like(irreps: str, count: int):
        return {
            ir: jnp.asarray(rng.normal(size=(count, e3nn.Irrep(ir).dim, mul)), jnp.float32)
            for ir, mul in channels_of(irreps).items()
        }

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def part(name, times, module, call, *arguments, constants=(), used=None):
        """By parameters too."""
        function, params = of_module(module, call, used)
        return compiled(name, times, function, (params, *arguments), constants)

    def apply(module, *values):
        return module(*values)

    def ends(attention, x, graph):
        senders, receivers = attention.from_sender(x), attention.from_receiver(x)
        return {
            ir: gather_senders(senders[ir], graph) + gather_receivers(receivers[ir], graph)
            for ir in senders
        }

    def made_of_edges(vectors):
        edges = equiformer.edges_of(config, basis_of(config), vectors)
        return edges.frames, edges.basis

    def first(attention, x, weights):
        linears = [attention.to_alpha, attention.to_gate]
        return equiformer._mapped_product(products[0], x, edges, weights, linears)

    def second(attention, x, weights):
        linears = [attention.to_value]
        return equiformer._mapped_product(products[1], x, edges, weights, linears)

    count, heads = graph.num_edges, equiformer._heads(config)
    weights = [draw(n, p.num_weights) for n, p in zip((count, 1), products, strict=True)]
    alphas = draw(count, config.num_heads, channels_of(config.head_irreps)[SCALAR])
    hidden = like(with_gates(config.ffn_irreps), graph.num_nodes)

    def gated(irreps):
        return lambda x: gate(x, irreps, config.activation)

    whole = part(
        "whole", 1, layer,
        lambda layer, x, vectors, graph: layer(
            x, equiformer.edges_of(config, basis_of(config), vectors), graph, None
        ),
        x, vectors, constants=(graph,),
    )  # fmt: skip
    return whole, [
        compiled("edges", 1, made_of_edges, (vectors,)),
        part("norms", 2, layer.norm_1, apply, x),
        part(
            "linear maps of ends, gathered", 1, attention, ends, x, constants=(graph,),
            used=("from_sender", "from_receiver"),
        ),
        part("radial weights", 1, attention.radial, apply, edges.basis),
        compiled("into frames", 1, into_frames, (like(config.irreps, count), edges.frames)),
        part(
            "first product and its linear maps", 1, attention, first, like(config.irreps, count),
            weights[0], used=("to_alpha", "to_gate"),
        ),
        part(
            "softmax", 1, attention, lambda m, a, graph: m._alpha(a, edges, graph), alphas,
            constants=(graph,), used=("dot",),
        ),
        compiled(
            "gates of messages", 1, gated(config.irreps), (like(with_gates(config.irreps), count),)
        ),
        part(
            "second product and its linear map", 1, attention, second, like(config.irreps, count),
            weights[1], used=("to_value",),
        ),
        compiled(
            "weigh, turn back and sum", 1,
            lambda y, a, frames, graph: attention._summed(
                y, a, edges._replace(frames=frames), graph
            ),
            (like(heads, count), draw(count, config.num_heads), edges.frames), (graph,),
        ),
        part("linear maps of heads", 1, attention.linear, apply, like(heads, graph.num_nodes)),
        part("linear map into the feed-forward", 1, layer.ffn_1, apply, x),
        compiled("gates of the feed-forward", 1, gated(config.ffn_irreps), (hidden,)),
        part(
            "linear map out of the feed-forward", 1, layer.ffn_2, apply,
            like(config.ffn_irreps, graph.num_nodes),
        ),
    ]  # fmt: skip


# ---- tables


def timed(rows: list[dict], runs: dict[str, Callable[[], Any]], baseline: str, options) -> None:
    timings = time_in_turns(
        list(runs.values()), seconds=options.seconds, repeats=(2, 3) if options.smoke else (5, 50)
    )
    medians = {name: timing.median_ms for name, timing in zip(runs, timings, strict=True)}
    for row, timing in zip(rows, timings, strict=True):
        row["median_ms"], row["min_ms"] = round(timing.median_ms, 3), round(timing.min_ms, 3)
        row["repeats"] = timing.repeats
        row["speedup"] = round(medians[f"{baseline}/{row['mode']}"] / timing.median_ms, 2)
        print(
            {k: row[k] for k in ("architecture", "implementation", "mode", "median_ms", "speedup")}
        )


def parts_table(architecture: str, whole: Part, parts: Sequence[Part], options) -> list[dict]:
    """Each part times how often the whole has it; the whole; and what parts leave of it."""
    everything = [*parts, whole]
    runs = [run for part in everything for run in (part.forward.run, part.with_derivatives.run)]
    timings = time_in_turns(
        runs, seconds=options.seconds / 10, repeats=(2, 3) if options.smoke else (5, 50)
    )
    rows = []
    for part, first, second in zip(everything, timings[::2], timings[1::2], strict=True):
        rows.append(
            {
                "part": part.name, "times": part.times,
                "forward_ms": part.times * first.median_ms,
                "with_derivatives_ms": part.times * second.median_ms,
                "gflops_forward": part.times * (part.forward.flops or 0) / 1e9,
                "gflops_with_derivatives": part.times * (part.with_derivatives.flops or 0) / 1e9,
                "memory_MB": round(part.forward.memory / 1e6, 1),
            }
        )  # fmt: skip
    *of_parts, of_whole = rows
    measured = [key for key in of_whole if key.endswith("_ms") or key.startswith("gflops")]
    remainder: dict = {"part": "remainder", "times": 1, "memory_MB": ""}
    remainder |= {key: of_whole[key] - sum(row[key] for row in of_parts) for key in measured}
    rows = [*of_parts, remainder, of_whole]
    for row in rows:
        for mode in ("forward", "with_derivatives"):
            row[f"share_{mode}"] = round(row[f"{mode}_ms"] / of_whole[f"{mode}_ms"], 3)
    rows = [
        {"architecture": architecture}
        | {key: round(value, 3) if key in measured else value for key, value in row.items()}
        for row in rows
    ]
    for row in rows:
        print(row, flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", nargs="+", default=["equiformer", "equiformer_v2"])
    parser.add_argument("--atoms", type=int, default=64, help="a cube of an integer")
    parser.add_argument("--neighbors", type=int, default=20, help="of each atom in V2")
    parser.add_argument("--layers", type=int, default=2, help="of V2")
    parser.add_argument("--l-max", type=int, default=6, help="of V2")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each program")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--python", default=os.environ.get("EQUIZOO_TORCH_PYTHON", sys.executable),
        help="with torch and e3nn; by default the one EQUIZOO_TORCH_PYTHON names",
    )  # fmt: skip
    parser.add_argument("--smoke", action="store_true", help="tiny, and times that mean nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args(arguments)
    rows: list[dict] = []
    parts: list[dict] = []
    with numerics("float32"), uncached(), tempfile.TemporaryDirectory() as folder:
        if "equiformer" in options.architectures:
            own, runs, worker = v1_programs(options, Path(folder))
            timed(own, runs, "e3nn", options)
            worker.close()
            rows += own
            parts += parts_table("equiformer", *v1_parts(options), options)
        if "equiformer_v2" in options.architectures:
            own, programs = v2_programs(options)
            timed(own, {name: p.run for name, p in programs.items()}, "plain", options)
            rows += own
            for grid in Grid:
                name = f"equiformer_v2, {grid} grid"
                parts += parts_table(name, *v2_parts(options, grid), options)
    facts = {"dtype": "float32", "threads": options.threads}
    write_table(options.out / "equiformer.csv", rows, **facts)
    write_table(options.out / "equiformer_parts.csv", parts, **facts)


if __name__ == "__main__":
    main()
