"""What does the tensor product cost MACE, and what does it cost in accuracy?

The model of ``mace_products.json`` (64 channels of 0e+1o) with each product over edges and, where
the product has a many-body form, as the product basis: the time of a training step (programs in
turns, the first step apart) and the errors on ``3bpa/test_300K`` after an equal, small number of
epochs by one seed. The claim to compare with (Xie et al. 2025, https://arxiv.org/abs/2506.13523):
MACE trains 30 % faster with the grid than with the Fourier form of the Gaunt product.

Writes ``results/mace_products.csv``. Run with the real data at hand (``EQUIZOO_DATA``) and an idle
machine: ``python benchmarks/mace_products.py --epochs 8``; ``--steps-only`` leaves training out.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from equizoo.config import to_dict
from equizoo.data.pipeline import training_stream
from equizoo.eval.benchmark_timing import time_in_turns, write_table
from equizoo.graph import make_frame
from equizoo.registry import TENSOR_PRODUCTS
from equizoo.tensor_products._base import TensorProduct
from equizoo.train.config import TrainConfig
from equizoo.train.optimizer import make_optimizer
from equizoo.train.recipe import (
    Recipe,
    complete_config,
    load_recipe,
    make_packing,
    prepare_data,
    train,
)
from equizoo.train.step import init_state, make_train_step

HERE = Path(__file__).parent
PRODUCTS = ("clebsch_gordan", "gaunt_grid", "gaunt_fourier", "matrix_product", "gaunt_bracket")
EPOCHS = 8


def model_fields(product: str) -> dict[str, Any]:
    """The fields of MACE that choose a product, as a recipe has them."""
    cls = TENSOR_PRODUCTS[product]
    fields: dict[str, Any] = {"tensor_product": to_dict(cls())}
    if cls._bind_power is not TensorProduct._bind_power:
        fields["product_basis"] = to_dict(cls())
    return fields


def short(recipe: Recipe, product: str, epochs: int) -> Recipe:
    """The recipe with a product, annealed over few epochs."""
    training = dataclasses.replace(recipe.training, epochs=epochs)
    model = {**recipe.model, **model_fields(product)}
    return dataclasses.replace(recipe, name=f"mace-{product}", model=model, training=training)


def step_program(recipe: Recipe) -> tuple[Callable[[], Any], float, int]:
    """One training step on the first batch, seconds of its compilation, number of parameters."""
    data = prepare_data(dataclasses.replace(recipe.data, test=()))
    config = complete_config(recipe.model, data)
    e0 = recipe.data.reference_energies.resolve(data.train)
    frames = [
        make_frame(s, config.cutoff, config.atomic_numbers) for s in data.train.structures[:50]
    ]
    energies = np.array([e0[z] for z in config.atomic_numbers])
    packing = make_packing(frames, recipe.training.batch_size, energies)
    graph, labels = jax.tree.map(jnp.asarray, next(training_stream(frames, packing, 0)))
    model = config.build(rngs=nnx.Rngs(0))
    training: TrainConfig = recipe.training
    params = nnx.state(model, nnx.Param)
    optimizer = make_optimizer(training.optimizer, params, 1000)
    step = make_train_step(model, optimizer, training.loss, training.optimizer.ema_decay)
    scale = jnp.ones((), jnp.float32)
    held = [init_state(model, optimizer)]

    def run():
        held[0], report = step(held[0], graph, labels, scale)
        jax.block_until_ready((held[0], report))

    start = time.perf_counter()
    run()
    return run, time.perf_counter() - start, sum(p.size for p in jax.tree.leaves(params))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--products", nargs="+", default=list(PRODUCTS))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--steps-only", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("mace-products-runs"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "mace_products.csv")
    options = parser.parse_args(arguments)
    recipe = load_recipe(HERE / "mace_products.json")
    rows = []
    programs = [step_program(short(recipe, name, options.epochs)) for name in options.products]
    timings = time_in_turns([run for run, _, _ in programs], seconds=3, repeats=(10, 40))
    for name, (_, first, parameters), timing in zip(
        options.products, programs, timings, strict=True
    ):
        rows.append(
            {
                "product": name,
                "product_basis": model_fields(name).get("product_basis", {}).get(
                    "name", "clebsch_gordan"
                ),
                "parameters": parameters,
                "step_median_ms": round(timing.median_ms, 2),
                "step_min_ms": round(timing.min_ms, 2),
                "repeats": timing.repeats,
                "first_step_s": round(first, 2),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    del programs
    if not options.steps_only:
        for row in rows:
            name = row["product"]
            result = train(short(recipe, name, options.epochs), options.runs / name)
            assert result is not None  # nobody stops a benchmark
            metrics = result.metrics["3bpa/test_300K"]
            row["epochs"] = options.epochs
            row["test_300K_forces_rmse_meV_per_A"] = round(metrics["forces_rmse_meV_per_A"], 2)
            row["test_300K_energy_rmse_meV"] = round(metrics["energy_rmse_meV"], 2)
            print(row, flush=True)
    write_table(options.out, rows, dtype="float32")


if __name__ == "__main__":
    main()
