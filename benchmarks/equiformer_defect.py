"""How far do EquiformerV2's energies and forces deviate under rotations, by degree and grid?

Models with random weights on a cluster of 8 atoms and on the same turned, float64: rotations at
random, so that frames of edges are at other angles. A row for each degree, highest order in frames,
kind and points of the grid, and number of layers; what ``EquiformerV2Config.defect`` says stands
beside what was found. Forces are those of the head and the gradient, deviations relative to the
largest force; that of the energy, per atom, is over the largest force too [Å], as certificates have
it. ``products`` other than full are in float32, and compared with themselves.

``python benchmarks/equiformer_defect.py`` writes ``results/equiformer_defect.csv``; ``--smoke``
only looks that it runs.
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.spatial.transform import Rotation

from equizoo.eval.benchmark_timing import write_table
from equizoo.graph import Budget, Graph, batch_frames, edge_vectors, sum_receivers, sum_senders
from equizoo.layers.products import Products
from equizoo.layers.sphere_grid import Grid
from equizoo.structure import Structure
from equizoo.zoo._base import Forces
from equizoo.zoo.equiformer_v2 import EquiformerV2Config

RESULTS = Path(__file__).with_name("results") / "equiformer_defect.csv"
ELEMENTS = (1, 6, 8)
CUTOFF = 4.0  # [Å]
SMALL = {
    "channels": 16, "hidden_channels": 16, "ffn_channels": 16, "alpha_channels": 8,
    "value_channels": 8, "edge_channels": 16, "num_heads": 2, "num_basis": 16,
}  # fmt: skip
POINTS = {2: (6, 8, 10, 12, 14, 18), 4: (10, 12, 14, 16, 18, 22), 6: (14, 16, 18, 20, 22, 26)}


def cluster(atoms: int = 8) -> Structure:
    """Atoms at random, at least 0.9 Å apart."""
    rng, positions = np.random.default_rng(0), np.zeros((0, 3))
    while len(positions) < atoms:
        new = 1.4 * rng.normal(size=3)
        if (np.linalg.norm(positions - new, axis=1) > 0.9).all():
            positions = np.concatenate([positions, new[None]])
    return Structure(np.resize(ELEMENTS, atoms), positions, np.zeros((3, 3)))


def configurations() -> Iterator[EquiformerV2Config]:
    def config(l_max, points, grid, m_max=2, num_layers=2, products=Products.FULL):
        return EquiformerV2Config(
            atomic_numbers=ELEMENTS, cutoff=CUTOFF, avg_num_neighbors=6.0, avg_num_nodes=1.0,
            l_max=l_max, m_max=m_max, grid_points=points, grid=grid, num_layers=num_layers,
            products=products, forces=Forces.DIRECT, **SMALL,
        )  # fmt: skip

    for l_max, all_points in POINTS.items():
        for points, grid in itertools.product(all_points, Grid):
            yield config(l_max, points, grid)
    for m_max, grid in itertools.product((1, 4), Grid):
        yield config(4, 14, grid, m_max=m_max)
    for l_max, points, m_max in ((2, 18, 1), (4, 30, 3), (4, 36, 4)):  # what longitudes leave
        yield config(l_max, points, Grid.GAUSS, m_max=m_max)
    for l_max, points, num_layers in ((2, 8, 12), (4, 14, 8), (6, 18, 6)):
        for grid in Grid:
            yield config(l_max, points, grid, num_layers=num_layers)
    yield config(4, 22, Grid.GAUSS, products=Products.BFLOAT16)


@functools.partial(jax.jit, static_argnums=0)
def outputs(graphdef, params, graph: Graph):
    """Energy, forces of the head, and minus the gradient."""
    model = nnx.merge(graphdef, params)

    def total(vectors):
        nodes, forces = model.energies_and_forces(vectors, graph)
        return jnp.where(graph.node_mask, nodes, 0).sum(), forces

    vectors = edge_vectors(graph, model.config.cutoff)
    (energy, direct), gradient = jax.value_and_grad(total, has_aux=True)(vectors)
    return energy, direct, sum_senders(gradient, graph) - sum_receivers(gradient, graph)


def measure(config: EquiformerV2Config, models: int, rotations: int) -> dict[str, float]:
    """The largest and the median deviation of each kind."""
    structure, found = cluster(), {"direct": [], "gradient": [], "energy": []}
    dtype = np.float64 if config.products is Products.FULL else np.float32
    turns = [np.eye(3), *Rotation.random(rotations, random_state=0).as_matrix()]
    graphs = []
    for turn in turns:
        frame = config.frame(dataclasses.replace(structure, positions=structure.positions @ turn.T))
        graphs.append(batch_frames([frame], Budget.of([frame]), dtype))
    for seed in range(models):
        graphdef, params = nnx.split(config.build(rngs=nnx.Rngs(seed)))
        (energy, *forces), *others = [
            jax.tree.map(np.asarray, outputs(graphdef, params, graph)) for graph in graphs
        ]
        largest = [np.abs(f).max() for f in forces]
        for turn, (turned_energy, *turned_forces) in zip(turns[1:], others, strict=True):
            for name, scale, before, after in zip(
                ("direct", "gradient"), largest, forces, turned_forces, strict=True
            ):
                found[name].append(np.abs(after - before @ turn.T).max() / scale)
            atoms = structure.num_nodes
            found["energy"].append(abs(turned_energy - energy) / atoms / largest[1])
    return {
        f"{name}_{kind}": float(of(values))
        for name, values in found.items()
        for kind, of in (("largest", np.max), ("median", np.median))
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--l-max", type=int, nargs="+", default=list(POINTS))
    parser.add_argument("--models", type=int, default=4, help="with weights of other seeds")
    parser.add_argument("--rotations", type=int, default=6)
    parser.add_argument("--smoke", action="store_true", help="one configuration, one model")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    configs = [config for config in configurations() if config.l_max in options.l_max]
    if options.smoke:
        configs, options.models, options.rotations = configs[:1], 1, 1
    jax.config.update("jax_enable_x64", True)
    rows: list[dict[str, Any]] = []
    for config in configs:
        found = measure(config, options.models, options.rotations)
        row: dict[str, Any] = {
            "l_max": config.l_max, "m_max": config.m_max, "grid": str(config.grid),
            "points": config.grid_points, "layers": config.num_layers,
            "products": str(config.products),
        }  # fmt: skip
        for forces in Forces:
            stated = dataclasses.replace(config, forces=forces).defect
            row[f"{forces}_stated"] = f"{stated:.1e}"
            row[f"{forces}_margin"] = round(stated / found[f"{forces}_largest"], 1)
        rows.append(row | {name: f"{value:.1e}" for name, value in found.items()})
        print(rows[-1], flush=True)
        jax.clear_caches()
    write_table(options.out, rows, models=options.models, rotations=options.rotations)


if __name__ == "__main__":
    main()
