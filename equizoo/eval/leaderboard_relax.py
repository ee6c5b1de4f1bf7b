"""Relaxed energies and structures for leaderboards, by relaxation with a model."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from equizoo.data.catalyst_frames import CatalystFrame
from equizoo.eval.leaderboard_parts import Outcome, Predictor
from equizoo.eval.relax import Relaxer

_TYPICAL_NODES = 80  # of a structure of OC20
_BATCHES = 10  # in a part: batches that run empty at its end are a small share of the work


class ByRelaxation(Predictor):
    """The energy where a relaxation from the initial structure ends, and the positions there.

    A relaxation that reaches the limit of steps counts as it stands, as in the published scores.
    """

    def __init__(self, relaxer: Relaxer, *, positions: bool):
        self.relaxer, self.positions = relaxer, positions
        self.potential = relaxer.potential

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"by": "relaxation", **self.relaxer.facts}

    @property
    def part_size(self) -> int:
        """Hundreds of times the work of single points goes into each system, so fewer of them."""
        return max(1, _BATCHES * self.relaxer.batch_nodes // _TYPICAL_NODES)

    def prepare(self, frames: Sequence[CatalystFrame]) -> None:
        self._plan = self.relaxer.plan_budgets([frame.structure for frame in frames])

    def __call__(self, frames: Sequence[CatalystFrame], folder: Path) -> Iterator[Outcome]:
        for relaxed in self.relaxer(frames, folder=folder, budgets=self._plan):
            yield Outcome(relaxed.energy, relaxed.positions if self.positions else None)
