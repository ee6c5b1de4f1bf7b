"""InstaDeep's mlip, as a worker of ``mace_peers.py``.

Its MACE with our hyper-parameters: ``node_symmetry`` is the degree of the hidden irreps, and the
first layer has a residual connection too. Its normalisations differ and its weights are its own:
the same work, other numbers.
"""

import time
from typing import Any

from _mace_peer import Prepared, serve, training


def imports() -> None:
    import mlip.models
    import mlip.training  # noqa: F401


def prepare(case: dict[str, Any], variant: str) -> Prepared:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from mlip.models import ForceField

    force_field = ForceField.from_mlip_network(_network(case, variant))
    graph, num_atoms = _graph(case)
    graph = jax.tree.map(jnp.asarray, graph)
    program = jax.jit(force_field.__call__)
    start = time.perf_counter()
    compiled = program.lower(graph).compile()
    seconds = time.perf_counter() - start
    result = jax.block_until_ready(compiled(graph))
    found: dict[str, Any] = {
        "parameters": sum(x.size for x in jax.tree.leaves(force_field.params)),
        "energies": np.asarray(result.energy)[: len(case["structures"])].tolist(),
        "forces": np.asarray(result.forces)[:num_atoms].tolist(),
    }
    if case["train"]:
        return _training(case, force_field, graph, found)
    memory = compiled.memory_analysis()
    return Prepared(
        run=lambda: jax.block_until_ready(compiled(graph)),
        compile_s=seconds,
        bytes=None if memory is None else memory.temp_size_in_bytes,
        **found,
    )


def _network(case: dict[str, Any], variant: str) -> Any:
    from mlip.data import DatasetInfo
    from mlip.models.mace.config import MaceConfig
    from mlip.models.mace.network import Mace

    options = {} if variant == "default" else {"symmetric_contraction_backend": variant}
    config = MaceConfig(
        num_layers=2,
        num_channels=case["channels"],
        l_max=case["l_max"],
        node_symmetry=case["hidden_l_max"],
        correlation=case["correlation"],
        readout_irreps=("16x0e", "0e"),
        num_rbf=8,
        radial_mlp_hidden=[64, 64, 64],
        residual_connection_first_layer=True,
        **options,
    )
    info = DatasetInfo(
        atomic_energies_map=dict.fromkeys(case["atomic_numbers"], 0.0),
        graph_cutoff_angstrom=case["cutoff"],
        avg_num_neighbors=case["avg_num_neighbors"],
        avg_r_min_angstrom=1.0,
    )
    return Mace(config, info)


def _graph(case: dict[str, Any]) -> tuple[Any, int]:
    """All structures as one graph with the least padding that mlip allows, in float32."""
    import jax
    import numpy as np
    from mlip.data.chemical_system import ChemicalSystem
    from mlip.graph import Graph
    from mlip.graph.batching_helpers import batch_graphs, pad_with_graphs

    graphs = []
    for s in case["structures"]:
        periodic = any(s["pbc"])
        system = ChemicalSystem(
            atomic_numbers=np.array(s["numbers"]),
            positions=np.array(s["positions"]),
            energy=0.0 if s["energy"] is None else s["energy"],
            forces=np.zeros_like(s["positions"]) if s["forces"] is None else np.array(s["forces"]),
            cell=np.array(s["cell"]) if periodic else None,
            pbc=tuple(s["pbc"]) if periodic else None,
        )
        graphs.append(Graph.from_chemical_system(system, case["cutoff"]))
    batch = batch_graphs(graphs)
    nodes, edges = int(np.sum(batch.n_node)), int(np.sum(batch.n_edge))
    padded = pad_with_graphs(batch, nodes + 1, edges, len(graphs) + 1)

    def single(x: Any) -> Any:
        x = np.asarray(x)
        return x.astype(np.float32) if x.dtype == np.float64 else x

    return jax.tree.map(single, padded), nodes


def _training(case: dict[str, Any], force_field: Any, graph: Any, found: Any) -> Prepared:
    import jax
    import jax.numpy as jnp
    from mlip.models.loss import MSELoss
    from mlip.training.ema import exponentially_moving_average
    from mlip.training.optimizer import get_default_mlip_optimizer
    from mlip.training.optimizer_config import OptimizerConfig
    from mlip.training.training_state import init_training_state
    from mlip.training.training_step import make_train_step

    settings = training(case)
    optimizer = get_default_mlip_optimizer(
        OptimizerConfig(weight_decay=settings["decay"], grad_norm=settings["clip"], warmup_steps=0)
    )
    ema = exponentially_moving_average(settings["ema"])
    loss = MSELoss(lambda _: settings["energy"], lambda _: settings["forces"])
    step = make_train_step(force_field.predictor, loss, optimizer, ema, len(case["structures"]))
    held = [init_training_state(force_field.params, optimizer, ema)]
    epoch = jnp.zeros((), jnp.int32)
    start = time.perf_counter()
    compiled = step.lower(held[0], graph, epoch).compile()
    seconds = time.perf_counter() - start

    def run() -> float:
        held[0], metrics = compiled(held[0], graph, epoch)
        jax.block_until_ready(held[0])
        return float(metrics["loss"])

    memory = compiled.memory_analysis()
    return Prepared(
        run=run,
        compile_s=seconds,
        loss=run(),
        bytes=None if memory is None else memory.temp_size_in_bytes,
        **found,
    )


if __name__ == "__main__":
    serve(prepare, imports, ("mlip", "jax", "e3j"))
