"""What does TDN's decomposition cost and save: equivariance, accuracy, time?

Four questions, one command each, results in ``results/tdn_*.csv`` with a figure beside each:

``deviation``  How far are forces from turning with the structure, by rank, next to the theorem's
               bound (3.1) and to ours? Random weights, or those of a model folder (``--model``).
``dynamics``   Which forms conserve energy and angular momentum, in 5 ps of a molecule? Those
               of the model folders or names ``--model``: each as it is, and where its product is
               the exact one, with that replaced by decompositions.
``ranks``      What does a smaller rank cost in accuracy, and what does it save in time? The model
               of ``recipes/tdn-3bpa.json`` with each rank, and with more weights for the couplings
               (the dial), after equal numbers of epochs by one seed.
``throughput`` How fast are the exact and the published form, beside Equiformer, at the paper's
               sizes (256 channels, 6 layers, 8 heads) and L = 1, 2, 3? Published on an A100:
               770.8, 312.4, 220.4 against 311.7, 71.9, 26.1 structures/s.

Run on an idle machine: ``python benchmarks/tdn.py throughput``; ``dynamics`` and ``ranks`` need the
data (``EQUIZOO_DATA``). ``--smoke`` shrinks each to see that it runs.
"""

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ase.build import molecule
from flax import nnx
from scipy.spatial.transform import Rotation

from equizoo.compile_cache import uncached
from equizoo.config import to_dict
from equizoo.eval.benchmark_timing import Program, compile_program, time_in_turns, write_table
from equizoo.eval.dynamics import NVE, drift, simulate
from equizoo.eval.plots import _STYLE, BLACK, BLUE, VERMILION
from equizoo.eval.potential import Potential, load
from equizoo.graph import Budget, batch_frames, edge_vectors
from equizoo.layers.distance_basis import RadialBasis
from equizoo.structure import Structure, spread
from equizoo.tensor_products._base import TensorProduct
from equizoo.tensor_products.clebsch_gordan import ClebschGordan
from equizoo.tensor_products.clebsch_gordan_dense import ClebschGordanDense
from equizoo.tensor_products.cp_decomposed import BoundCP, CPDecomposed, Schedule, table_target
from equizoo.tensor_products.low_rank_weights import LowRankWeights
from equizoo.tensor_products.shared_weights import Form, SharedWeights
from equizoo.train.recipe import load_recipe, train
from equizoo.zoo._base import Architecture, ArchitectureConfig, energy_forces_stress
from equizoo.zoo.equiformer import EquiformerConfig, Evaluation
from equizoo.zoo.tdn import Parity, TDNConfig, published_product

HERE = Path(__file__).parent
PUBLISHED_ON_A100 = {1: (770.8, 311.7), 2: (312.4, 71.9), 3: (220.4, 26.1)}  # TDN, Equiformer
ELEMENTS = (1, 6, 7, 8)
CUTOFF, ATOMS, NEIGHBORS = 4.5, 37, 18.6  # [Å]; PubChemQCR-S

Row = dict[str, Any]


# ---- deviation -----------------------------------------------------------------------------------


def theorem_bound(l_max: int, terms: int) -> float:
    r"""Theorem 3.1 relative to the norm of the couplings, its constants left out.

    .. math:: \sqrt{\textstyle\sum_n \sum_{k > \lfloor R^{1/3} \rfloor} (\sigma^{(n)}_k)^2}
        \; / \; \|M\|_F
    """
    tensor = table_target("all", l_max)
    kept = int(np.floor(terms ** (1 / 3) + 1e-9))
    tails = [
        np.linalg.svd(np.moveaxis(tensor, n, 0).reshape(len(tensor), -1), compute_uv=False)[kept:]
        for n in range(3)
    ]
    return float(np.linalg.norm(np.concatenate(tails)) / np.linalg.norm(tensor))


def worst_case(product: BoundCP) -> float:
    """Our bound for unit arguments, relative to the norm of the couplings as the theorem's is."""
    return product.defect_bound / float(np.linalg.norm(np.sum(product.dense(), axis=0)))


def product_deviation(config: TDNConfig, rotations: Sequence[np.ndarray]) -> float:
    """Root mean square over rotations, features and directions, relative to the result's."""
    product, rng = config.product, np.random.default_rng(0)
    x = rng.normal(size=(256, product.irreps_1.dim, 1))
    y = rng.normal(size=(256, product.irreps_2.dim, 1))
    ones = jnp.ones((1, 1, 1))
    call = jax.jit(lambda x, y: product(x, y, ones))
    reference, errors = np.asarray(call(x, y)), []
    for matrix in rotations:
        turn = np.asarray(product.irreps_1.D_from_matrix(matrix))
        found = call(np.einsum("ij,bjc->bic", turn, x), np.einsum("ij,bjc->bic", turn, y))
        errors.append(np.mean((found - np.einsum("ij,bjc->bic", turn, reference)) ** 2))
    return float(np.sqrt(np.mean(errors) / np.mean(reference**2)))


def force_deviations(
    model: Architecture, structures: Sequence[Structure], rotations: Sequence[np.ndarray]
) -> tuple[float, float]:
    """Root mean square and largest, relative to the root mean square force of each structure."""
    evaluate, squares, worst = predictor(model), [], 0.0
    for structure in structures:
        turned = [
            dataclasses.replace(structure, positions=structure.positions @ matrix.T)
            for matrix in (np.eye(3), *rotations)
        ]
        forces = evaluate(turned)[:, : structure.num_nodes]
        expected = np.einsum("nj,rij->rni", forces[0], np.stack(rotations))
        scale = np.sqrt(np.mean(np.sum(forces[0] ** 2, axis=1)))
        errors = np.linalg.norm(forces[1:] - expected, axis=2) / scale
        squares.append(np.mean(errors**2))
        worst = max(worst, float(errors.max()))
    return float(np.sqrt(np.mean(squares))), worst


def predictor(model: Architecture) -> Callable[[Sequence[Structure]], np.ndarray]:
    """Forces ``[structures, nodes, 3]`` of structures with equally many atoms, one at a time."""
    graphdef, state = nnx.split(model)
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state)
    forces = jax.jit(lambda s, graph: energy_forces_stress(nnx.merge(graphdef, s), graph).forces)

    def evaluate(structures: Sequence[Structure]) -> np.ndarray:
        frames = [model.config.frame(structure) for structure in structures]
        budget = Budget.of(frames)
        graphs = [batch_frames([frame], budget, np.float64) for frame in frames]
        return np.stack([np.asarray(forces(state, graph)) for graph in graphs])

    return evaluate


def approximate(schedule: Schedule) -> TensorProduct:
    """The map of ``SharedWeights()``, scaled as it is, but for the terms that are left out; the
    paper's has bare couplings, another map even when exact."""
    return SharedWeights(CPDecomposed(schedule), Form.PRODUCT)


def forms(options: argparse.Namespace) -> dict[str, TensorProduct]:
    return {s.value: approximate(s) for s in options.schedules} | {"matrix": SharedWeights()}


def deviation(options: argparse.Namespace) -> list[Row]:
    rotations = [Rotation.random(random_state=s).as_matrix() for s in range(options.rotations)]
    structures = molecules(2 if options.smoke else 8)
    rows: list[Row] = []
    for source, config, weights in models_to_turn(options):
        for name, product in forms(options).items():
            changed = dataclasses.replace(config, tensor_product=product)
            model = changed.build(rngs=nnx.Rngs(0))
            if weights is not None:
                nnx.update(model, weights)
            bound = changed.product
            inner = getattr(bound, "_product", None)
            terms = inner.terms if isinstance(inner, BoundCP) else None
            rms, worst = force_deviations(model, structures, rotations)
            rows.append(
                {
                    "l_max": config.l_max,
                    "form": name,
                    "terms": terms,
                    "theorem_bound": theorem_bound(config.l_max, terms) if terms else None,
                    "product_defect": bound.defect,
                    "product_worst_case": worst_case(inner) if terms else None,
                    "product_measured": product_deviation(changed, rotations),
                    "declared_by_config": changed.defect,
                    "force_deviation_rms": rms,
                    "force_deviation_max": worst,
                    "weights": source,
                    "rotations": len(rotations),
                    "structures": len(structures),
                }
            )
            print(rows[-1], flush=True)
    return rows


def models_to_turn(
    options: argparse.Namespace,
) -> Iterator[tuple[str, TDNConfig, nnx.State | None]]:
    for name in options.model:
        model = load(name).model
        config = model.config
        if not isinstance(config, TDNConfig) or config.parity != Parity.IGNORED:
            raise SystemExit(f"{name} is not a TDN with ignored parity.")
        if config.product.num_weights != 1:
            raise SystemExit(f"{name} has several weights per channel; ranks need one.")
        yield name, config, nnx.state(model)
    for l_max in () if options.model else options.l_max:
        yield "random", tdn_config(options, SharedWeights(), l_max), None


def plot_deviation(rows: Sequence[Row], path: Path) -> None:
    with figure(path, "terms of the decomposition", "relative deviation") as axes:
        axes.set_xscale("log")
        axes.set_yscale("log")
        columns = {
            "theorem_bound": ("theorem 3.1", BLACK, "--"),
            "product_defect": ("ours, closed form", BLUE, "-"),
            "force_deviation_rms": ("forces, measured", VERMILION, "-"),
        }
        for l_max in sorted({row["l_max"] for row in rows}):
            mine = sorted((r for r in rows if r["l_max"] == l_max and r["terms"]), key=_terms)
            for column, (label, color, style) in columns.items():
                x, y = [r["terms"] for r in mine], [max(r[column], 1e-16) for r in mine]
                marker = "osd^"[l_max % 4]
                axes.plot(x, y, style, color=color, marker=marker, label=f"{label}, L = {l_max}")
        axes.legend(fontsize=7)


def _terms(row: Row) -> int:
    return row["terms"]


# ---- dynamics ------------------------------------------------------------------------------------


def dynamics(options: argparse.Namespace) -> list[Row]:
    """Constant-energy trajectories from the same starts, the same velocities and 300 K."""
    from equizoo.data.datasets import load_dataset

    if not options.model:
        raise SystemExit("Dynamics wants trained weights: --model tdn-3bpa")
    frames = load_dataset("3bpa/test_300K", index=":").structures
    starts = spread(frames, 2 if options.smoke else 4)
    rows: list[Row] = []
    for source in options.model:
        trained = load(source)
        config = trained.model.config
        if not isinstance(config, TDNConfig):
            raise SystemExit(f"{source} is not a TDN.")
        products = {"as trained": config.tensor_product}
        if config.tensor_product == SharedWeights():
            products = forms(options)
        for name, product in products.items():
            model = dataclasses.replace(config, tensor_product=product).build(rngs=nnx.Rngs(0))
            nnx.update(model, nnx.state(trained.model))
            potential = Potential(
                model,
                reference_energies=trained.reference_energies,
                energy_reference=trained.energy_reference,
                level_of_theory=trained.level_of_theory,
                name=name,
            )
            ran = simulate(
                potential,
                starts,
                NVE(300.0),
                timestep=0.5,
                picoseconds=0.01 if options.smoke else options.picoseconds,
            )
            spin = ran.angular_momentum - ran.angular_momentum[0]
            scale = np.linalg.norm(ran.angular_momentum[0], axis=-1)
            rows.append(
                {
                    "weights": source,
                    "form": name,
                    "forces": str(config.forces),
                    "defect": model.config.defect,
                    "replicas": len(starts),
                    "timestep_fs": 0.5,
                    "picoseconds": round(float(ran.time[-1]), 4),
                    "finished": ran.finished,
                    **drift(ran, [s.num_nodes for s in starts]),
                    "angular_momentum_hbar": float(scale.mean()),
                    "angular_momentum_change_hbar": float(np.linalg.norm(spin, axis=-1).max()),
                    "mean_temperature_K": float(ran.temperature[len(ran.time) // 2 :].mean()),
                    "trajectory": ran,
                }
            )
            print({k: v for k, v in rows[-1].items() if k != "trajectory"}, flush=True)
    return rows


def plot_dynamics(rows: Sequence[Row], path: Path) -> None:
    with figure(path, "time [ps]", "change of angular momentum [ħ]") as axes:
        axes.set_yscale("log")
        for row in rows:
            ran = row["trajectory"]
            change = np.linalg.norm(ran.angular_momentum - ran.angular_momentum[0], axis=-1)
            mean = np.maximum(change.mean(axis=1)[1:], 1e-12)
            axes.plot(ran.time[1:], mean, label=f"{row['form']}, forces: {row['forces']}")
        axes.legend(fontsize=7)


# ---- ranks ---------------------------------------------------------------------------------------


def ranks(options: argparse.Namespace) -> list[Row]:
    recipe = load_recipe(HERE.parent / "recipes" / "tdn-3bpa.json")
    products: dict[str, TensorProduct] = {
        f"CP {schedule.value}": approximate(schedule) for schedule in options.schedules
    }
    products |= {"exact, K = 1": SharedWeights()}
    products |= {f"exact, K = {k}": LowRankWeights(k) for k in options.dial}
    products |= {"exact, one per degree": CPDecomposed(), "exact, all couplings": ClebschGordan()}
    extra = {"linear": "per_degree"}  # the last step of the dial
    runs = [(name, product, {}) for name, product in products.items()]
    runs.append(("exact, all couplings, linear maps per degree", ClebschGordan(), extra))
    rows: list[Row] = []
    for number, (name, product, fields) in enumerate(runs):
        model = {**recipe.model, **fields, "tensor_product": to_dict(product)}
        training = dataclasses.replace(recipe.training, epochs=options.epochs)
        if options.smoke:
            model |= {"channels": 4, "num_heads": 2, "num_layers": 1, "l_max": 1}
            training = dataclasses.replace(training, batch_size=50)
        changed = dataclasses.replace(
            recipe, name=f"tdn-ranks-{number}", model=model, training=training
        )
        result = train(changed, options.runs / str(number))
        assert result is not None  # nobody stops a benchmark
        metrics = result.metrics["3bpa/test_300K"]
        trained = result.potential.model
        rows.append(
            {
                "product": name,
                "defect": trained.config.product.defect,
                "parameters": parameters(trained.config),
                "epochs": options.epochs,
                "forces_rmse_meV_per_A": metrics["forces_rmse_meV_per_A"],
                "energy_rmse_meV": metrics["energy_rmse_meV"],
                "hours": round(result.fitted.seconds / 3600, 3),
                "model": trained,
            }
        )
        print({key: value for key, value in rows[-1].items() if key != "model"}, flush=True)
    graph = batch_of([recipe_frame(rows[0]["model"].config)] * (2 if options.smoke else 10))
    programs = [program(row.pop("model"), graph, True) for row in rows]
    add_times(rows, programs, graph, options)
    return rows


def recipe_frame(config: ArchitectureConfig):
    from equizoo.data.datasets import load_dataset

    return config.frame(load_dataset("3bpa/test_300K", index=":1").structures[0])


def plot_ranks(rows: Sequence[Row], path: Path) -> None:
    with figure(path, "structures per second, energy and forces", "force RMSE [meV/Å]") as axes:
        for row in rows:
            exact = row["product"].startswith("exact")
            x, y = row["structures_per_s"], row["forces_rmse_meV_per_A"]
            axes.plot(x, y, "o" if exact else "s", color=BLUE if exact else VERMILION)
            axes.annotate(row["product"], (x, y), (4, 4), textcoords="offset points", fontsize=7)


# ---- throughput ----------------------------------------------------------------------------------


def tdn_config(options: argparse.Namespace, product: TensorProduct, l_max: int) -> TDNConfig:
    small = {"channels": 8, "num_heads": 2, "num_layers": 2, "num_basis": 8}
    size = small if options.smoke else {"num_heads": 8}
    return TDNConfig(
        **base(), l_max=l_max, tensor_product=product, avg_num_nodes=36.6, alpha_dropout=0.0, **size
    )


def equiformer_config(
    options: argparse.Namespace, product: TensorProduct, evaluation: Evaluation, l_max: int
) -> EquiformerConfig:
    """As many channels of every degree as TDN, as in the paper's comparison."""
    wide, head, heads = (8, 4, 2) if options.smoke else (256, 32, 8)

    def irreps(channels: int) -> str:
        return "+".join(f"{channels}x{degree}e" for degree in range(l_max + 1))

    return EquiformerConfig(
        **base(),
        irreps=irreps(wide),
        head_irreps=irreps(head),
        ffn_irreps=irreps(wide),
        output_channels=wide,
        num_layers=2 if options.smoke else 6,
        num_heads=heads,
        radial_basis=RadialBasis.GAUSSIAN,
        num_basis=8 if options.smoke else 256,
        avg_num_nodes=36.6,
        tensor_product=product,
        evaluation=evaluation,
    )


def base() -> dict[str, Any]:
    return {"atomic_numbers": ELEMENTS, "cutoff": CUTOFF, "avg_num_neighbors": NEIGHBORS}


def throughput(options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for l_max in options.l_max:
        tdn = functools.partial(tdn_config, options, l_max=l_max)
        equiformer = functools.partial(equiformer_config, options, l_max=l_max)
        configs = {
            "TDN exact, matrix": tdn(SharedWeights()),
            "TDN exact, neighbours first": tdn(SharedWeights(form=Form.NEIGHBORS)),
            "TDN bfloat16 matrices": tdn(SharedWeights(form=Form.BFLOAT16)),
            "TDN K = 2": tdn(LowRankWeights(2)),
            "TDN CP 7L2 (published)": tdn(published_product()),
            "TDN CP exact": tdn(published_product(Schedule.EXACT)),
            "Equiformer": equiformer(ClebschGordan(), Evaluation.IN_FRAMES),
            "Equiformer, products as given": equiformer(ClebschGordan(), Evaluation.AS_GIVEN),
            "Equiformer, plain": equiformer(ClebschGordanDense(), Evaluation.AS_GIVEN),
        }
        frame = next(iter(configs.values())).frame(typical())
        graph = batch_of([frame] * (2 if options.smoke else options.batch))
        for forces in (False, True):
            found, programs = [], []
            for name, config in configs.items():
                model = config.build(rngs=nnx.Rngs(0))
                programs.append(program(model, graph, forces))
                found.append(
                    {
                        "l_max": l_max,
                        "model": name,
                        "parameters": parameters(config),
                        "computes": "energy and forces" if forces else "energy",
                        "defect": config.defect,
                        "published_A100_per_s": published(name, l_max),
                    }
                )
            add_times(found, programs, graph, options)
            rows += found
            options.save(rows)  # the largest take long
    return rows


def published(name: str, l_max: int) -> float | None:
    """Structures per second, direct forces, batches of 128."""
    tdn, equiformer = PUBLISHED_ON_A100.get(l_max, (None, None))
    return {"TDN CP 7L2 (published)": tdn, "Equiformer": equiformer}.get(name)


def plot_throughput(rows: Sequence[Row], path: Path) -> None:
    style = {"TDN": "-", "Equiformer": "--"}
    with figure(path, "highest degree L", "structures per second, energy and forces", 8.0) as axes:
        axes.set_yscale("log")
        mine = [row for row in rows if row["computes"] == "energy and forces"]
        for name in dict.fromkeys(row["model"] for row in mine):
            line = [row for row in mine if row["model"] == name]
            x, y = [row["l_max"] for row in line], [row["structures_per_s"] for row in line]
            kind = name.split(maxsplit=1)[0].rstrip(",")
            axes.plot(x, y, f"o{style[kind]}", label=name)
        axes.set_xticks(sorted({row["l_max"] for row in mine}))
        axes.figure.legend(fontsize=7, loc="outside right upper")


# ---- shared --------------------------------------------------------------------------------------


def molecules(count: int) -> list[Structure]:
    """Of ASE's collection, distorted: elements H, C, N, O, larger ones first."""
    rng = np.random.default_rng(0)
    names = ("C7NH5", "trans-butane", "C6H6", "C4H4NH", "CH3CONH2", "C5H8", "CH3COOH", "C2H6NH")
    known = [molecule(name) for name in names[:count]]
    return [
        Structure(
            atoms.numbers,
            atoms.positions + 0.05 * rng.normal(size=(len(atoms), 3)),
            np.zeros((3, 3)),
        )
        for atoms in known
    ]


def typical() -> Structure:
    """A cluster with as many atoms and neighbours as structures of PubChemQCR-S have on average."""
    rng, sites = np.random.default_rng(0), np.indices((7, 7, 7)).reshape(3, -1).T - 3.0
    sites = sites[np.argsort(np.linalg.norm(sites, axis=1), kind="stable")[:ATOMS]]
    sites += 0.1 * rng.normal(size=sites.shape)
    lengths = np.linalg.norm(sites[:, None] - sites[None], axis=2)
    spacing = CUTOFF / np.sort(lengths, axis=None)[ATOMS + round(ATOMS * NEIGHBORS)]
    return Structure(rng.choice(ELEMENTS, ATOMS), spacing * sites, np.zeros((3, 3)))


def batch_of(frames: Sequence[Any]):
    nodes = sum(frame.num_nodes for frame in frames)
    return batch_frames(frames, Budget.of(frames, nodes=nodes, graphs=len(frames)), np.float32)


def program(model: Architecture, graph: Any, forces: bool) -> Program:
    """A model's energies, or energies and forces, in float32."""
    graphdef, state = nnx.split(model)
    cutoff = model.config.cutoff

    def energies(state, graph):
        return nnx.merge(graphdef, state).node_energies(edge_vectors(graph, cutoff), graph)

    def both(state, graph):
        found = energy_forces_stress(nnx.merge(graphdef, state), graph)
        return found.energy, found.forces

    return compile_program(both if forces else energies, [state, graph])


def add_times(
    rows: list[Row], programs: Sequence[Program], graph: Any, options: argparse.Namespace
) -> None:
    """All in turns; frames of the batch over the median."""
    repeats = (1, 1) if options.smoke else (5, 40)
    timings = time_in_turns([p.run for p in programs], seconds=options.seconds, repeats=repeats)
    structures = int(np.sum(graph.graph_mask))
    for row, compiled, timing in zip(rows, programs, timings, strict=True):
        row |= {
            "structures": structures,
            "atoms": int(np.sum(graph.node_mask)),
            "edges": int(np.sum(graph.edge_mask)),
            "median_ms": round(timing.median_ms, 3),
            "min_ms": round(timing.min_ms, 3),
            "repeats": timing.repeats,
            "compile_s": round(compiled.compile_s, 2),
            "memory_MB": round(compiled.memory / 1e6, 1),
            "gflops": None if compiled.flops is None else round(compiled.flops / 1e9, 3),
            "structures_per_s": round(1e3 * structures / timing.median_ms, 2),
        }
        print(row, flush=True)


def parameters(config: ArchitectureConfig) -> int:
    state = nnx.state(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state))


class figure:
    """Axes that are written to a file at the end of a ``with``."""

    def __init__(self, path: Path, x_label: str, y_label: str, width: float = 5.5):
        self.path, self.x_label, self.y_label, self.width = path, x_label, y_label, width

    def __enter__(self):
        import matplotlib
        from matplotlib.figure import Figure

        self._style = matplotlib.rc_context(_STYLE)
        self._style.__enter__()
        self._figure = Figure(figsize=(self.width, 4), layout="constrained")
        axes = self._figure.subplots()
        axes.set_xlabel(self.x_label)
        axes.set_ylabel(self.y_label)
        return axes

    def __exit__(self, *error: object) -> None:
        self._figure.savefig(self.path)
        self._style.__exit__(None, None, None)


QUESTIONS: dict[str, tuple[Callable, Callable, str]] = {
    "deviation": (deviation, plot_deviation, "float64"),
    "dynamics": (dynamics, plot_dynamics, "float32"),
    "ranks": (ranks, plot_ranks, "float32"),
    "throughput": (throughput, plot_throughput, "float32"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder")
    parser.add_argument("--l-max", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--schedules", type=Schedule, nargs="+",
        default=[Schedule.SEVEN_L, Schedule.SEVEN_L2, Schedule.EXACT],
        help="of deviation, dynamics and ranks",
    )  # fmt: skip
    parser.add_argument("--rotations", type=int, default=50)
    parser.add_argument(
        "--model", nargs="*", default=[], help="folders or names: weights for deviation, dynamics"
    )
    parser.add_argument("--picoseconds", type=float, default=5.0, help="of dynamics")
    parser.add_argument("--epochs", type=int, default=8, help="of each model of ranks")
    parser.add_argument("--dial", type=int, nargs="*", default=[2, 4], help="weights per channel")
    parser.add_argument("--runs", type=Path, default=Path("tdn-runs"), help="of ranks")
    parser.add_argument("--batch", type=int, default=4, help="structures, of throughput")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing for each program")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.rotations, options.epochs, options.seconds = 2, 1, 0.0
    answer, plot, dtype = QUESTIONS[options.question]

    def save(rows: Sequence[Row]) -> None:
        table = [{k: v for k, v in row.items() if k != "trajectory"} for row in rows]
        write_table(options.out / f"tdn_{options.question}.csv", table, dtype=dtype)

    options.save = save
    # compilation is timed too
    cache = uncached() if options.question == "throughput" else contextlib.nullcontext()
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"), cache:
        rows = answer(options)
        save(rows)
    plot(rows, options.out / f"tdn_{options.question}.png")


if __name__ == "__main__":
    main()
