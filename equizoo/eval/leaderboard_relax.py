"""Relaxed energies and structures for leaderboards, by relaxation with a model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from equizoo.data.catalyst_frames import CatalystFrame
from equizoo.eval.leaderboard_parts import Outcome, Predictor
from equizoo.eval.relax import Relaxer


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

    def prepare(self, frames: Sequence[CatalystFrame]) -> None:
        self._plan = self.relaxer.plan_budgets([frame.structure for frame in frames])

    def __call__(self, frames: Sequence[CatalystFrame]) -> Iterator[Outcome]:
        for relaxed in self.relaxer(frames, budgets=self._plan):
            yield Outcome(relaxed.energy, relaxed.positions if self.positions else None)
