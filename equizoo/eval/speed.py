"""What energies and forces of a potential cost on this machine."""

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from equizoo.device import device_name
from equizoo.eval.packing import pack
from equizoo.eval.potential import BATCH_NODES, Potential
from equizoo.structure import Structure


class Speed(NamedTuple):
    """Time of one compiled batch; fastest and median of several calls."""

    device: str
    dtype: str
    ms_per_atom: float  # fastest
    median_ms_per_atom: float
    atoms: int  # in the batch
    neighbors_per_atom: float
    repeats: int

    def front_matter(self) -> dict[str, Any]:
        """The row of a card: words, and numbers whose names end in their unit."""
        return {
            key: float(f"{value:.4g}") if isinstance(value, float) else value
            for key, value in self._asdict().items()
        }


def measure_speed(
    potential: Potential,
    structures: Sequence[Structure],
    *,
    dtype: str = "float32",
    batch_nodes: int = BATCH_NODES,
    repeats: int = 10,
) -> Speed:
    """Times of the fullest batch that the first of ``structures`` make, compilation and neighbour
    lists left out. Leave the machine alone meanwhile.

    Raises ``ValueError`` without structures or repeats, and as :meth:`Potential.predict` does.
    """
    if not structures or repeats < 1:
        raise ValueError(
            f"{len(structures)} structures and {repeats} repeats; expected at least one of each."
        )
    frames = [potential.frame(structure) for structure in structures[:batch_nodes]]
    members = max(
        pack(frames, batch_nodes), key=lambda batch: sum(frames[i].num_nodes for i in batch)
    )
    held = [frames[index] for index in members]
    budget = potential.budget(held, dtype, batch_nodes)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        jax.block_until_ready(potential.evaluate_batch(held, budget, dtype))
        seconds.append(time.perf_counter() - started)
    atoms = sum(frame.num_nodes for frame in held)
    timed = [1e3 * second / atoms for second in seconds[1:]]  # the first one compiles
    return Speed(
        device=device_name(),
        dtype=dtype,
        ms_per_atom=min(timed),
        median_ms_per_atom=statistics.median(timed),
        atoms=atoms,
        neighbors_per_atom=sum(frame.num_edges for frame in held) / atoms,
        repeats=repeats,
    )
