"""Which frames share a batch, and which static shapes are compiled for them: few, and reused."""

import dataclasses
import math
from collections.abc import Sequence

from equizoo.graph import Budget, Frame, round_up
from equizoo.zoo._base import ArchitectureConfig

STEP = 1.25  # between rungs of sizes that vary with density
MAX_GRAPHS = 256  # structures in a batch
_COST_OF_NODE = 16  # in edges: the work per atom that does not depend on its neighbours


@dataclasses.dataclass
class BudgetSet:
    """The budgets that a predictor has compiled programs for; grows, never shrinks.

    A batch takes the cheapest budget that holds it, unless that wastes too much: then it gets a new
    one. The more there are, the more waste is accepted, ``2^(1 + n/4)`` times the padded size, so
    their number grows like the square root of the logarithm of the range of sizes.
    """

    num_species: int  # elements of the model
    cost_of_flat: float = Budget.COST_OF_FLAT  # see ArchitectureConfig.cost_of_flat
    budgets: list[Budget] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, config: ArchitectureConfig) -> "BudgetSet":
        """None yet, for a model of this config."""
        return cls(len(config.atomic_numbers), config.cost_of_flat)

    def choose(self, frames: Sequence[Frame], batch_nodes: int, *, remainder: bool) -> Budget:
        """A budget that fits ``frames``; a ``remainder`` of a stream takes any there is."""
        wanted = self._new(frames, batch_nodes)
        fitting = [budget for budget in self.budgets if budget.fits(frames)]
        accepted = math.inf if remainder else 2.0 ** (1 + len(self.budgets) / 4)
        if fitting:
            best = min(fitting, key=self._cost)
            if self._cost(best) <= accepted * self._cost(wanted):
                return best
        self.budgets.append(wanted)
        return wanted

    def _new(self, frames: Sequence[Frame], batch_nodes: int) -> Budget:
        needed = sum(frame.num_nodes for frame in frames) + 1
        if needed <= batch_nodes:
            nodes = min(max(8, _power_of_two(needed)), max(8, batch_nodes))
        else:
            nodes = round_up(needed, STEP)
        species = len(set().union(*(frame.species.tolist() for frame in frames)))
        return Budget.sized(
            frames,
            nodes=nodes,
            graphs=1 + min(nodes - 1, MAX_GRAPHS),
            edges=sum(frame.num_edges for frame in frames),
            num_species=min(self.num_species, max(4, _power_of_two(species))),
            step=STEP,
            cost_of_flat=self.cost_of_flat,
        )

    def _cost(self, budget: Budget) -> float:
        return cost(budget, self.cost_of_flat)


def budget_with_headroom(
    frame: Frame, headroom: float, cost_of_flat: float = Budget.COST_OF_FLAT
) -> Budget:
    """A budget for one structure whose number of neighbours may grow by the factor ``headroom``."""
    return Budget.sized(
        [frame],
        nodes=round_up(frame.num_nodes + 1),
        graphs=2,
        edges=frame.num_edges,
        num_species=len(set(frame.species.tolist())),
        step=STEP,
        headroom=headroom,
        cost_of_flat=cost_of_flat,
    )


def pack(frames: Sequence[Frame], batch_nodes: int) -> list[list[int]]:
    """Indices of the frames that share a batch: fewer than ``batch_nodes`` atoms, or one frame.

    Frames of like density come together, the densest first, so that a budget made for one batch
    serves many after it.
    """

    def density(index: int) -> tuple[int, int, int]:
        frame = frames[index]
        return -round_up(frame.max_in, STEP), -frame.num_nodes, index

    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(frames)), key=density):
        nodes = frames[index].num_nodes
        if nodes > room or len(batches[-1]) == MAX_GRAPHS:
            batches.append([])
            room = batch_nodes - 1
        batches[-1].append(index)
        room -= nodes
    return batches


def cost(budget: Budget, cost_of_flat: float = Budget.COST_OF_FLAT) -> float:
    """The work of one batch in arbitrary units, padding included."""
    edges = budget.edges * (cost_of_flat if budget.slots is None else 1.0)
    return edges + _COST_OF_NODE * budget.blocks * budget.block_size


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
