"""Which tensor products can see handedness?

A small network tells shapes apart by even scalars (0e) and the two hands of a shape by an odd one
(0o), which changes sign under reflection. Its features start as sums over neighbours of true
tensors (0e, 1o, 2e). Only an odd coupling (1o x 1o -> 1e) makes pseudo-tensors (0o, 1e, 2o) of
true ones, and only an even coupling (1e x 1o -> 0o) reaches a scalar. Each registered product is
put *at edges* (neighbour's features times harmonics), *at nodes* (features times features) or at
both; the other place is taken by ``GauntGrid``, which makes no pseudo-tensors. So what an output
shows of a hand, the product under test has seen.

Tasks: the eight shapes of tetris, two of them mirror images, and both hands of two molecules. Test
structures are turned otherwise, and atoms of molecules displaced otherwise, than those of training.
An odd output below ``UNDECIDED`` counts as half right.

Writes ``results/chirality.csv``, a row for each product, place, task and seed, and
``results/chirality.png``. Run: ``python benchmarks/chirality.py``.
"""

import argparse
import csv
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from ase import Atoms
from ase.build import molecule
from ase.data import covalent_radii
from flax import nnx
from jaxtyping import Array, Float, Int
from scipy.spatial.transform import Rotation

from equizoo.eval.benchmark_timing import environment, installed_version, numerics
from equizoo.eval.plots import BLACK, BLUE, GREY, VERMILION
from equizoo.graph import (
    Budget,
    Graph,
    batch_frames,
    edge_vectors,
    gather_senders,
    make_frame,
    sum_graphs,
    sum_receivers,
)
from equizoo.layers.harmonics import safe_norm, spherical_harmonics
from equizoo.layers.linear import EquivariantLinear, normal_param
from equizoo.layers.mlp import ScalarMLP
from equizoo.registry import TENSOR_PRODUCTS
from equizoo.structure import Structure
from equizoo.tensor_products._base import BoundProduct, TensorProduct, natural_irreps
from equizoo.tensor_products.gaunt_grid import GauntGrid

RESULTS = Path(__file__).parent / "results"
DTYPE = "float64"
SEEDS = (0, 1, 2)
STEPS = 150
LEARNING_RATE = 1e-2
UNDECIDED = 1e-3  # of an odd output; the targets are 1 and -1

# ---- structures ----------------------------------------------------------------------------------

ELEMENTS = ("H", "C", "O", "F", "Cl", "Br")
CUTOFF = 4.0  # [Å]
BLOCK = 3.0  # [Å] side of a tetris block: those with a common face are neighbours, no others
NOISE = 0.05  # [Å] standard deviation of the displacements of a molecule's atoms
TEST_BATCHES = 8  # of eight structures

# The shapes of the tutorials of e3nn; the first two are mirror images, the others their own.
TETRIS = {
    "chiral 1": [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 1, 0)],
    "chiral 2": [(1, 1, 1), (1, 1, 2), (2, 1, 1), (2, 0, 1)],
    "square": [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)],
    "line": [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3)],
    "corner": [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)],
    "L": [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0)],
    "T": [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 1)],
    "zigzag": [(0, 0, 0), (1, 0, 0), (1, 1, 0), (2, 1, 0)],
}
NUM_SHAPES = len(TETRIS) - 1  # without regard to the hand


class Example(NamedTuple):
    """A structure and what there is to say of it."""

    atoms: Atoms
    shape: int
    hand: int  # 1, -1, or 0 where the mirror image is the same


class Batch(NamedTuple):
    """Examples as one padded graph, numpy arrays or JAX's."""

    graph: Graph
    shape: Int[Array | np.ndarray, " graphs"]
    hand: Float[Array | np.ndarray, " graphs"]


def tetris_examples(rng: np.random.Generator) -> list[Example]:
    """All eight shapes, each turned at random."""
    examples = []
    for index, blocks in enumerate(TETRIS.values()):
        atoms = Atoms(f"H{len(blocks)}", BLOCK * np.array(blocks, float))
        hand = (1, -1)[index] if index < 2 else 0
        examples.append(Example(turned(atoms, rng), max(index - 1, 0), hand))
    return examples


def bromochlorofluoromethane() -> Atoms:
    """CHBrClF: four bonds from a carbon to the corners of a tetrahedron, sums of covalent radii."""
    corners = np.array([(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)]) / np.sqrt(3)
    atoms = Atoms("CHFClBr", np.zeros((5, 3)))
    radii = covalent_radii[atoms.numbers]
    atoms.positions[1:] = corners * (radii[0] + radii[1:])[:, None]
    return atoms


# Hydrogen peroxide is twisted (121 degrees): handed without any centre that is.
MOLECULES = {"H2O2": molecule("H2O2"), "CHBrClF": bromochlorofluoromethane()}


def hands_of(atoms: Atoms, rng: np.random.Generator) -> list[Example]:
    """Four displaced and turned copies of a molecule and four of its mirror image."""
    examples = []
    for hand in (1, -1) * 4:
        copy = atoms.copy()
        copy.positions *= (1, 1, hand)
        copy.positions += rng.normal(scale=NOISE, size=copy.positions.shape)
        examples.append(Example(turned(copy, rng), 0, hand))
    return examples


def turned(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    result = atoms.copy()
    result.positions = Rotation.random(random_state=rng).apply(atoms.positions)
    return result


TASKS: Mapping[str, Callable[[np.random.Generator], list[Example]]] = {
    "tetris": tetris_examples,
    **{name: functools.partial(hands_of, atoms) for name, atoms in MOLECULES.items()},
}


@functools.cache
def batches(task: str, seed: int, num: int) -> Batch:
    """``num`` batches of fresh examples, stacked; all tasks have one shape of arrays."""
    rng = np.random.default_rng(seed)
    return stack([batch_of(TASKS[task](rng)) for _ in range(num)])


def batch_of(examples: Sequence[Example]) -> Batch:
    """Examples as one batch, float64; the last graph is padding."""
    numbers = Atoms("".join(ELEMENTS)).numbers.tolist()
    frames = [
        make_frame(Structure(a.numbers, a.positions, np.zeros((3, 3))), CUTOFF, numbers)
        for a, _, _ in examples
    ]
    budget = Budget(
        nodes=44, graphs=9, edges=44 * 4, slots=4, out_slots=4, blocks=44 // 8 + 5, block_size=8
    )  # holds eight molecules of five atoms
    graph = batch_frames(frames, budget, np.float64)
    return Batch(
        graph,
        np.array([e.shape for e in examples] + [0], np.int32),
        np.array([e.hand for e in examples] + [0], np.float64),
    )


def stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


# ---- network -------------------------------------------------------------------------------------

TRUE = natural_irreps(2)
HIDDEN = e3nn.Irreps("0e+0o+1e+1o+2e+2o")
CHANNELS = 8
PASSES = 2  # of the layer
NUM_RADIAL = 6
RADIAL_WIDTH = 16
NEIGHBOURS = 3.0  # as many as the sums are scaled for


class Answer(NamedTuple):
    """What the network says of each graph."""

    shape: Float[Array, "graphs shapes"]  # scores, the same for the mirror image
    hand: Float[Array, " graphs"]  # of opposite sign for the mirror image


class Network(nnx.Module):
    """Sums over neighbours, a layer that runs several times, a readout of 0e and of 0o."""

    def __init__(
        self,
        edge_product: TensorProduct,
        node_product: TensorProduct,
        *,
        channels: int = CHANNELS,
        passes: int = PASSES,
        rngs: nnx.Rngs,
    ):
        self.passes = passes
        self.embedding = normal_param(rngs, (len(ELEMENTS), channels))
        widths = NUM_RADIAL, RADIAL_WIDTH, len(TRUE) * channels
        self.radial = ScalarMLP(widths, rngs=rngs)
        self.layer = Layer(edge_product, node_product, channels, rngs=rngs)
        self.shape = ScalarMLP((channels, 16, NUM_SHAPES), rngs=rngs)
        self.hand = ScalarMLP((channels, 1), rngs=rngs)

    def __call__(self, graph: Graph) -> Answer:
        vectors = edge_vectors(graph, CUTOFF)
        # no envelope: nothing here comes near the cutoff
        waves = np.pi / CUTOFF * np.arange(1, NUM_RADIAL + 1)[None]
        radial = jnp.sin(waves * safe_norm(vectors)[:, None])
        harmonics = spherical_harmonics(TRUE, vectors)
        x = self.features(harmonics, radial, graph)

        def again(x, _):
            return self.layer(x, harmonics, radial, graph), None

        x, _ = jax.lax.scan(again, x, length=self.passes)  # compiled once
        even, odd = (x[:, _columns(e3nn.Irreps(ir))[0]] for ir in ("0e", "0o"))
        return Answer(sum_graphs(self.shape(even), graph), sum_graphs(self.hand(odd), graph)[:, 0])

    def features(
        self,
        harmonics: Float[Array, "edges dim_harmonics"],
        radial: Float[Array, "edges num_radial"],
        graph: Graph,
    ) -> Float[Array, "nodes dim channels"]:
        """Harmonics summed over neighbours, weighted by distance and element: true tensors."""
        embedding = self.embedding[...].astype(harmonics.dtype)[graph.species]
        weights = self.radial(radial).reshape(len(radial), len(TRUE), -1)
        weights = weights[:, np.repeat(np.arange(len(TRUE)), [ir.dim for _, ir in TRUE])]
        terms = harmonics[:, :, None] * weights * gather_senders(embedding, graph)[:, None]
        sums = sum_receivers(terms, graph) / float(np.sqrt(NEIGHBOURS))
        x = jnp.zeros((graph.num_nodes, HIDDEN.dim, embedding.shape[1]), harmonics.dtype)
        return x.at[:, _columns(TRUE)].set(sums).at[:, 0].add(embedding)


class Layer(nnx.Module):
    """An edge and a node product, each added to the features where it reaches them.

    At nodes the second factor is one mixture of all channels. There, as at edges, it holds true
    tensors alone, which halves the couplings; the first factor and the result hold both kinds.
    """

    def __init__(
        self,
        edge_product: TensorProduct,
        node_product: TensorProduct,
        channels: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.edge_product, self.node_product = edge_product, node_product
        edge, node = self._products()
        widths = NUM_RADIAL, RADIAL_WIDTH, edge.num_weights * channels
        self.radial = ScalarMLP(widths, rngs=rngs)
        self.edge_linear = _linear(edge, channels, rngs)
        self.mixture = EquivariantLinear(HIDDEN, TRUE, channels, 1, rngs=rngs)
        self.weights = normal_param(rngs, (1, node.num_weights, channels))
        self.node_linear = _linear(node, channels, rngs)

    def _products(self) -> tuple[BoundProduct, BoundProduct]:
        return (
            self.edge_product.bind(HIDDEN, TRUE, HIDDEN),
            self.node_product.bind(HIDDEN, TRUE, HIDDEN),
        )

    def __call__(
        self,
        x: Float[Array, "nodes dim channels"],
        harmonics: Float[Array, "edges dim_harmonics"],
        radial: Float[Array, "edges num_radial"],
        graph: Graph,
    ) -> Float[Array, "nodes dim channels"]:
        edge, node = self._products()
        weights = self.radial(radial).reshape(len(radial), edge.num_weights, -1)
        sums = edge.convolve(x, harmonics, weights, graph) / float(np.sqrt(NEIGHBOURS))
        x = _add(x, self.edge_linear(sums), edge)
        own = node.per_path(x, self.mixture(x), self.weights[...].astype(x.dtype))
        return _add(x, self.node_linear(own), node)


def _linear(product: BoundProduct, channels: int, rngs: nnx.Rngs) -> EquivariantLinear:
    return EquivariantLinear(product.irreps_paths, _reached(product), channels, channels, rngs=rngs)


def _add(
    x: Float[Array, "nodes dim channels"],
    update: Float[Array, "nodes dim_reached channels"],
    product: BoundProduct,
) -> Float[Array, "nodes dim channels"]:
    return x.at[:, _columns(_reached(product))].add(update)


def _reached(product: BoundProduct) -> e3nn.Irreps:
    """The hidden irreps that a product has couplings into."""
    return e3nn.Irreps([product.irreps_out[index] for index in sorted(set(product.into))])


def _columns(irreps: e3nn.Irreps) -> Int[np.ndarray, " dim"]:
    """Where the components of some of the hidden irreps are."""
    places = {ir: place for (_, ir), place in zip(HIDDEN, HIDDEN.slices(), strict=True)}
    return np.concatenate([np.arange(HIDDEN.dim)[places[ir]] for _, ir in irreps])


# ---- training and test ---------------------------------------------------------------------------


class Score(NamedTuple):
    """What a trained network is worth on the test structures."""

    accuracy: Float[Array, "*runs"]  # right shape and right hand
    hand_accuracy: Float[Array, "*runs"]  # of structures that have a hand
    largest_odd: Float[Array, "*runs"]  # largest 0o output of a structure that has a hand
    # relative to the largest output:
    mirror_difference: Float[Array, "*runs"]  # largest change of an output under reflection
    parity_defect: Float[Array, "*runs"]  # the same with 0o reversed in sign: rounding alone


def fit(static: Any, params: Any, batch: Batch, steps: int) -> Any:
    """The parameters after ``steps`` steps of Adam on one batch."""
    optimizer = optax.adam(LEARNING_RATE)

    def loss(params):
        answer = nnx.merge(static, params)(batch.graph)
        wrong_shape = optax.softmax_cross_entropy_with_integer_labels(answer.shape, batch.shape)
        wrong_hand = (answer.hand - batch.hand) ** 2
        return jnp.mean(wrong_shape + wrong_hand, where=batch.graph.graph_mask)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]


def evaluate(static: Any, params: Any, batch: Batch) -> Score:
    """The score over stacked batches."""
    network = nnx.merge(static, params)
    both = jax.tree.map(lambda a: jnp.concatenate([a, a]), batch.graph)
    reflect = jnp.repeat(jnp.array([1.0, -1.0]), len(batch.hand))[:, None, None]
    answers = jax.lax.map(network, both._replace(positions=both.positions * reflect))
    halves = [jnp.split(array, 2) for array in answers]
    own, mirrored = (Answer(*half) for half in zip(*halves, strict=True))
    handed = batch.hand != 0
    agreement = own.hand * batch.hand
    right_hand = jnp.where(agreement > UNDECIDED, 1.0, jnp.where(agreement < -UNDECIDED, 0.0, 0.5))
    right_hand = jnp.where(handed, right_hand, 1.0)
    right_shape = jnp.argmax(own.shape, axis=-1) == batch.shape
    change = jnp.max(jnp.abs(own.shape - mirrored.shape))
    largest = jnp.max(jnp.abs(own.shape)) + jnp.max(jnp.abs(own.hand))

    def relative(change_of_hand):
        return jnp.maximum(change, jnp.max(jnp.abs(change_of_hand))) / largest

    return Score(
        accuracy=jnp.mean(jnp.where(right_shape, right_hand, 0.0), where=batch.graph.graph_mask),
        hand_accuracy=jnp.mean(right_hand, where=handed),
        largest_odd=jnp.max(jnp.abs(own.hand), where=handed, initial=0),
        mirror_difference=relative(own.hand - mirrored.hand),
        parity_defect=relative(own.hand + mirrored.hand),
    )


@functools.cache
def scores(
    edge_product: TensorProduct,
    node_product: TensorProduct,
    tasks: tuple[str, ...] = tuple(TASKS),
    seeds: tuple[int, ...] = SEEDS,
    steps: int = STEPS,
) -> Score:
    """Scores ``[tasks, seeds]``: all networks are trained, then tested, side by side."""
    networks = [Network(edge_product, node_product, rngs=nnx.Rngs(seed)) for seed in seeds]
    static = nnx.graphdef(networks[0])
    params = stack([nnx.state(network) for network in networks])
    train = stack([jax.tree.map(lambda a: a[0], batches(task, 0, 1)) for task in tasks])
    test = stack([batches(task, 1, TEST_BATCHES) for task in tasks])

    @jax.jit
    def run(params, train, test):
        params = fit(static, params, train, steps)
        return evaluate(static, params, test)

    over_seeds = jax.vmap(run, in_axes=(0, None, None))
    over_tasks = jax.vmap(over_seeds, in_axes=(None, 0, 0))
    return jax.tree.map(np.asarray, over_tasks(params, train, test))


# ---- sweep ---------------------------------------------------------------------------------------

PLACES = ("edge", "node", "both")


def placed(product: TensorProduct, place: str) -> tuple[TensorProduct, TensorProduct]:
    """The products of edges and of nodes when ``product`` is at ``place``."""
    partner = GauntGrid()
    return (partner if place == "node" else product), (partner if place == "edge" else product)


def obstacle(edge_product: TensorProduct, node_product: TensorProduct) -> str:
    """Why the network cannot be built of two products; empty if it can."""
    try:
        edge_product.bind(HIDDEN, TRUE, HIDDEN)
        node = node_product.bind(HIDDEN, TRUE, HIDDEN)
    except ValueError as error:
        return str(error)
    return "its second factor must be harmonics" if node.on_harmonics else ""


def rows_of(name: str, steps: int) -> Iterator[dict[str, Any]]:
    """Results of one registered product, or a row that says why there are none."""
    try:
        product = TENSOR_PRODUCTS[name]()
    except ImportError as error:
        yield {"product": name, "skipped": f"cannot be imported: {error}"}
        return
    for place in PLACES:
        products = placed(product, place)
        if reason := obstacle(*products):
            yield {"product": name, "place": place, "skipped": reason}
            continue
        score = scores(*products, steps=steps)
        for (i, task), (j, seed) in itertools.product(enumerate(TASKS), enumerate(SEEDS)):
            values = {field: f"{array[i, j]:.4g}" for field, array in score._asdict().items()}
            yield {"product": name, "place": place, "task": task, "seed": seed, **values}


def conditions(steps: int) -> dict[str, Any]:
    """What all rows have in common."""
    return {
        "partner": TENSOR_PRODUCTS.name_of(GauntGrid),
        "passes": PASSES,
        "channels": CHANNELS,
        "steps": steps,
        "dtype": DTYPE,
        **environment()._asdict(),
        "flax": installed_version("flax"),
    }


COLUMNS = ("product", "place", "task", "seed", *Score._fields, "skipped")


def write(rows: Sequence[Mapping[str, Any]], common: Mapping[str, Any], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, (*COLUMNS, *common), lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **common} for row in rows)


# ---- figure --------------------------------------------------------------------------------------

# label, colour, marker, place within the line of a product
MARKS = {
    "edge": ("at edges, GauntGrid at nodes", BLUE, "o", -0.22),
    "node": ("at nodes, GauntGrid at edges", VERMILION, "s", 0.0),
    "both": ("at both", BLACK, "D", 0.22),
}
ZERO = 1e-18  # where exact zeros are drawn


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Each product in a line: its odd outputs, and how often it names the right hand."""
    rows = [row for row in rows if not row.get("skipped")]
    names = list(dict.fromkeys(row["product"] for row in rows))
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(
        1, 1 + len(TASKS), figsize=(11, 1.4 + 0.36 * len(names)), sharey=True,
        width_ratios=[1.8, *[1] * len(TASKS)], layout="constrained",
    )  # fmt: skip
    for place, (label, colour, marker, offset) in MARKS.items():
        for column, task in enumerate((None, *TASKS)):
            mine = [r for r in rows if r["place"] == place and task in (None, r["task"])]
            field = "hand_accuracy" if task else "largest_odd"
            x = np.array([float(row[field]) for row in mine])
            y = [names.index(row["product"]) + offset for row in mine]
            axes[column].scatter(
                100 * x if task else np.maximum(x, ZERO), y, s=26, c=colour, marker=marker,
                alpha=0.75, linewidths=0, label=label,
            )  # fmt: skip
    axes[0].set(xscale="log", xlim=(ZERO / 3, 10), title="largest odd output for a handed shape")
    powers = range(-15, 1, 3)
    labels = ["0", *(f"$10^{{{n}}}$" for n in powers)]
    axes[0].set_xticks([ZERO, *(10.0**n for n in powers)], labels)
    axes[0].minorticks_off()
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    for ax, task in zip(axes[1:], TASKS, strict=True):
        ax.set(xlim=(40, 104), xticks=[50, 75, 100], title=f"hands told: {task} [%]")
        ax.axvline(50, color=GREY, linewidth=0.8, zorder=0)
    for ax in axes:
        ax.grid(axis="y", color="#E5E5E5", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(axis="y", length=0)
    marks = axes[0].get_legend_handles_labels()
    figure.legend(*marks, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--products", nargs="+", default=list(TENSOR_PRODUCTS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with numerics(DTYPE):
        common = conditions(arguments.steps)
        for name in arguments.products:
            for row in rows_of(name, arguments.steps):
                rows.append(row)
                print(*(row.get(column, "") for column in COLUMNS), sep=", ", flush=True)
            write(rows, common, arguments.out / "chirality.csv")
    draw(rows, arguments.out / "chirality.png")


if __name__ == "__main__":
    main()
