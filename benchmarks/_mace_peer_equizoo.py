"""Ours, as a worker of ``mace_peers.py``."""

import sys
import time
from pathlib import Path
from typing import Any

from _mace_peer import WEIGHTS, Prepared, serve, training


def imports() -> None:
    import equizoo.eval.potential
    import equizoo.train.step  # noqa: F401
    from equizoo.host_memory import keep_freed_memory

    if sys.argv[2] != "system-malloc":
        keep_freed_memory()  # as equizoo.load does


def prepare(case: dict[str, Any], variant: str) -> Prepared:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from equizoo.eval.potential import numerics
    from equizoo.graph import Budget, batch_frames, make_frame
    from equizoo.structure import Structure

    potential = _potential(case)
    if variant == "native":
        potential = potential.with_kernels("native")
    if variant == "compiled":
        potential = potential.compile()
    config = potential.config
    structures = [
        Structure(
            atomic_numbers=np.array(s["numbers"]),
            positions=np.array(s["positions"]),
            cell=np.array(s["cell"]),
            pbc=tuple(s["pbc"]),
            energy=s["energy"],
            forces=None if s["forces"] is None else np.array(s["forces"]),
        )
        for s in case["structures"]
    ]
    frames = [make_frame(s, config.cutoff, config.atomic_numbers) for s in structures]
    budget = Budget.of(frames, nodes=sum(f.num_nodes for f in frames), graphs=len(frames))
    graph = jax.tree.map(jnp.asarray, batch_frames(frames, budget))
    arguments = potential._params_as("float32"), graph
    start = time.perf_counter()
    with numerics("float32"):
        compiled = potential._program.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    results = potential.results(frames, compiled(*arguments))
    found: dict[str, Any] = {
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(potential.model, nnx.Param))),
        "energies": [result.energy for result in results],
        "forces": np.concatenate([result.forces for result in results]).tolist(),
    }
    if case["train"]:
        return _training(case, potential, frames, budget, found)
    memory = compiled.memory_analysis()
    return Prepared(
        run=lambda: jax.block_until_ready(compiled(*arguments)),
        compile_s=seconds,
        bytes=None if memory is None else memory.temp_size_in_bytes,
        **found,
    )


def _potential(case: dict[str, Any]) -> Any:
    """The weights of mace-torch's model where there is one, else our own."""
    from flax import nnx

    from equizoo.eval.convert_mace_torch import convert_mace_torch
    from equizoo.eval.potential import Potential
    from equizoo.structure import EnergyReference
    from equizoo.zoo.mace import MACEConfig

    weights = Path(case["scratch"]) / WEIGHTS
    if weights.exists():
        return convert_mace_torch(weights)
    config = MACEConfig(
        atomic_numbers=tuple(case["atomic_numbers"]),
        cutoff=case["cutoff"],
        avg_num_neighbors=case["avg_num_neighbors"],
        channels=case["channels"],
        hidden_l_max=case["hidden_l_max"],
        l_max=case["l_max"],
        correlation=case["correlation"],
        zero_isolated=False,
    )
    return Potential(
        config.build(rngs=nnx.Rngs(0)),
        reference_energies=dict.fromkeys(config.atomic_numbers, 0.0),
        energy_reference=EnergyReference.TOTAL,
        level_of_theory="none: random weights",
    )


def _training(case, potential, frames, budget, found) -> Prepared:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from equizoo.graph import batch_frames, batch_labels
    from equizoo.train.config import LossWeights, Optimizer
    from equizoo.train.optimizer import make_optimizer
    from equizoo.train.step import init_state, make_train_step

    settings, model = training(case), potential.model
    nnx.update(model, potential._params_as("float32"))
    optimizer = make_optimizer(
        Optimizer(
            kind="amsgrad",
            learning_rate=settings["rate"],
            schedule="constant",
            weight_decay=settings["decay"],
            clip_norm=settings["clip"],
        ),
        nnx.state(model, nnx.Param),
        1000,
    )
    weights = LossWeights(energy=settings["energy"], forces=settings["forces"])
    step = make_train_step(model, optimizer, weights, settings["ema"])
    references = np.zeros(len(potential.config.atomic_numbers))
    graph = jax.tree.map(jnp.asarray, batch_frames(frames, budget))
    labels = jax.tree.map(jnp.asarray, batch_labels(frames, budget, references))
    scale = jnp.ones((), jnp.float32)
    held = [init_state(model, optimizer)]
    start = time.perf_counter()
    memory = step.lower(held[0], graph, labels, scale).compile().memory_analysis()
    seconds = time.perf_counter() - start

    def run() -> float:
        held[0], report = step(held[0], graph, labels, scale)
        jax.block_until_ready(held[0])
        return float(report.loss)

    return Prepared(
        run=run,
        compile_s=seconds,
        loss=run(),
        bytes=None if memory is None else memory.temp_size_in_bytes,
        **found,
    )


if __name__ == "__main__":
    serve(prepare, imports, ("equizoo", "jax"))
