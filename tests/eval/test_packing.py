import dataclasses

import numpy as np
import pytest
from models import cluster, crystal, pair_potential

from equizoo.eval.packing import BudgetSet, budget_with_headroom, cost, pack
from equizoo.graph import Budget, make_frame
from equizoo.structure import Structure
from equizoo.tensor_products.native import Native
from equizoo.zoo.mace import MACEConfig


def frames_of(structures, cutoff=3.0):
    potential = pair_potential(cutoff)
    return [potential.frame(atoms) for atoms in structures]


def mixed(seed, count):
    """Sizes 1 to 120, densities over a factor of eight, with and without a cell."""
    rng = np.random.default_rng(seed)
    structures = []
    for _ in range(count):
        spacing = rng.uniform(1.1, 2.4)
        if rng.random() < 0.3:
            structures.append(crystal(rng, int(rng.integers(1, 4)), spacing))
        else:
            structures.append(cluster(rng, int(rng.integers(1, 121)), spacing))
    return structures


@pytest.mark.parametrize("batch_nodes", [2, 33, 512])
def test_every_frame_is_in_one_batch_that_fits(batch_nodes):
    frames = frames_of(mixed(0, 60))
    batches = pack(frames, batch_nodes)
    assert sorted(i for batch in batches for i in batch) == list(range(60))
    budgets = BudgetSet(num_species=3)
    for batch in batches:
        held = [frames[i] for i in batch]
        nodes = sum(frame.num_nodes for frame in held)
        assert nodes < batch_nodes or len(held) == 1
        assert budgets.choose(held, batch_nodes, remainder=False).fits(held)


def test_many_single_atoms_fit():
    frames = frames_of([cluster(np.random.default_rng(0), 1)] * 600)
    budgets = BudgetSet(num_species=3)
    for batch in pack(frames, 512):
        held = [frames[i] for i in batch]
        assert budgets.choose(held, 512, remainder=False).fits(held)
    assert len(budgets.budgets) <= 2


def test_waste_is_bounded_by_the_rule():
    rng = np.random.default_rng(1)
    budgets = BudgetSet(num_species=3)
    for frame in frames_of([cluster(rng, int(n)) for n in rng.integers(1, 200, 100)]):
        before = len(budgets.budgets)
        budget = budgets.choose([frame], 512, remainder=False)
        fresh = BudgetSet(num_species=3).choose([frame], 512, remainder=False)
        assert cost(budget) <= 2 ** (1 + before / 4) * cost(fresh)
    assert len(budgets.budgets) <= 8


def test_a_remainder_takes_what_there_is():
    rng = np.random.default_rng(2)
    large, small = frames_of([cluster(rng, 200), cluster(rng, 3)])
    budgets = BudgetSet(num_species=3)
    first = budgets.choose([large], 512, remainder=False)
    assert budgets.choose([small], 512, remainder=True) == first
    assert budgets.choose([small], 512, remainder=False) != first


def test_headroom():
    atoms = crystal(np.random.default_rng(3))
    (frame,) = frames_of([atoms])
    budget = budget_with_headroom(frame, 1.25)
    assert budget.slots >= 1.25 * frame.max_in
    assert budget.nodes <= frame.num_nodes + 4
    atoms.set_cell(atoms.cell.array * 0.99, scale_atoms=True)
    assert budget.fits(frames_of([atoms]))


def test_uneven_neighbour_counts_take_the_flat_layout():
    dense = cluster(np.random.default_rng(4), 27, 1.0)
    far = cluster(np.random.default_rng(5), 64, 20.0)
    far.positions += 1000.0
    (frame,) = frames_of([dense + far])
    budget = budget_with_headroom(frame, 1.25)
    assert isinstance(budget, Budget) and budget.slots is None and budget.fits([frame])


def test_edges_are_flat_where_that_costs_a_model_less():
    config = MACEConfig(atomic_numbers=(1,), cutoff=3.0, avg_num_neighbors=5.0)
    native = dataclasses.replace(config, tensor_product=Native())
    assert config.cost_of_flat == Budget.COST_OF_FLAT and native.cost_of_flat == 1.0
    positions = np.concatenate([np.random.default_rng(0).normal(size=(12, 3)), 40 * np.eye(3)])
    atoms = Structure(np.ones(15, int), positions, np.zeros((3, 3)), (False,) * 3)
    frame = make_frame(atoms, 3.0, (1,))
    plain, its = (BudgetSet.of(c).choose([frame], 16, remainder=False) for c in (config, native))
    assert plain.slots is not None and its.slots is None
    assert frame.num_edges <= its.edges < plain.edges <= 2 * its.edges
    assert budget_with_headroom(frame, 1.25).slots is not None
    assert budget_with_headroom(frame, 1.25, native.cost_of_flat).slots is None
