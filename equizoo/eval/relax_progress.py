"""Where a relaxation under way is, on disk: enough to go on as if it had never stopped."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from equizoo.eval.run_folder import write_arrays
from equizoo.graph import Budget
from equizoo.structure import Structure

_HEADER = "progress"


class LaneProgress(NamedTuple):
    """One batch, before the host has seen what was computed last."""

    indices: list[int]  # of its structures, in order
    nodes: list[int]  # of each
    budget: Budget
    displacement: Float[np.ndarray, "nodes 3"]  # [Å] of all their atoms, as the host knows it
    state: list[np.ndarray]  # the leaves of the device's
    trajectories: list[list[Structure]]  # as far as recorded


class Progress(NamedTuple):
    """All that is not finished."""

    waiting: list[int]
    budgets: list[Budget]  # chosen so far
    lanes: list[LaneProgress | None]  # None: an empty one

    def write(self, path: Path) -> None:
        """There as a whole or not at all."""
        header = {
            "waiting": self.waiting,
            "budgets": [dataclasses.asdict(budget) for budget in self.budgets],
            "lanes": [
                lane
                and {
                    "indices": lane.indices,
                    "nodes": lane.nodes,
                    "budget": dataclasses.asdict(lane.budget),
                    "leaves": len(lane.state),
                }
                for lane in self.lanes
            ],
        }
        arrays = {_HEADER: np.array(json.dumps(header))}
        for number, lane in enumerate(self.lanes):
            if lane is None:
                continue
            arrays[f"displacement_{number}"] = lane.displacement
            arrays |= {f"state_{number}_{i}": leaf for i, leaf in enumerate(lane.state)}
            for index, nodes, steps in zip(
                lane.indices, lane.nodes, lane.trajectories, strict=True
            ):
                recorded = trajectory_arrays(steps, nodes)
                arrays |= {f"{name}_{index}": array for name, array in recorded.items()}
        write_arrays(path, arrays)

    @classmethod
    def read(cls, path: Path, initial: Sequence[Structure]) -> "Progress":
        """``initial`` are all structures of the run, by index."""
        with np.load(path, allow_pickle=False) as arrays:
            header = json.loads(str(arrays[_HEADER]))
            lanes = [
                lane
                and LaneProgress(
                    indices=lane["indices"],
                    nodes=lane["nodes"],
                    budget=Budget(**lane["budget"]),
                    displacement=arrays[f"displacement_{number}"],
                    state=[arrays[f"state_{number}_{i}"] for i in range(lane["leaves"])],
                    trajectories=[
                        trajectory_of(arrays, initial[index], f"_{index}")
                        for index in lane["indices"]
                    ],
                )
                for number, lane in enumerate(header["lanes"])
            ]
        return cls(header["waiting"], [Budget(**fields) for fields in header["budgets"]], lanes)


def trajectory_arrays(steps: Sequence[Structure], nodes: int) -> dict[str, np.ndarray]:
    """Positions [Å], energies [eV] and forces [eV/Å] of every step."""
    return {
        "trajectory_positions": np.array([s.positions for s in steps]).reshape(-1, nodes, 3),
        "trajectory_energy": np.array([s.energy for s in steps], np.float64),
        "trajectory_forces": np.array([s.forces for s in steps]).reshape(-1, nodes, 3),
    }


def trajectory_of(
    arrays: np.lib.npyio.NpzFile, initial: Structure, suffix: str = ""
) -> list[Structure]:
    """The steps of those arrays, whose names end in ``suffix``."""
    columns = (arrays[f"trajectory_{what}{suffix}"] for what in ("positions", "energy", "forces"))
    return [
        dataclasses.replace(
            initial, positions=positions, energy=float(energy), forces=forces, stress=None
        )
        for positions, energy, forces in zip(*columns, strict=True)
    ]
