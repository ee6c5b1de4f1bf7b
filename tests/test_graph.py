"""Both layouts of a batch are the same maps; padding adds nothing; batches keep their frames."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equizoo import graph as g
from equizoo.graph import Budget, batch_frames, batch_labels, make_frame, round_up, unbatch_nodes
from equizoo.structure import Structure

CUTOFF = 4.0  # [Å]
ELEMENTS = (8, 1, 6)
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}  # float64, sums of tens of terms


def structure(seed, nodes, pbc=(False, False, False), **labels):
    rng = np.random.default_rng(seed)
    cell = 4.0 * np.eye(3) + 0.5 * rng.normal(size=(3, 3))
    return Structure(rng.choice(ELEMENTS, nodes), rng.normal(size=(nodes, 3)), cell, pbc, **labels)


FRAMES = [
    make_frame(structure(0, 5), CUTOFF, ELEMENTS),
    make_frame(structure(1, 3, (True, True, False)), CUTOFF, ELEMENTS),
    make_frame(structure(2, 1), CUTOFF, ELEMENTS),
    make_frame(structure(3, 2, (True, True, True)), CUTOFF, ELEMENTS),
]
ROWS = Budget(
    nodes=14, graphs=6, edges=14 * 20, slots=20, out_slots=20, blocks=5, block_size=8
)  # fmt: skip
FLAT = dataclasses.replace(ROWS, slots=None, out_slots=None, edges=150)
BATCHES = {
    name: jax.tree.map(jnp.asarray, batch_frames(FRAMES, budget, np.float64))
    for name, budget in {"rows": ROWS, "flat": FLAT}.items()
}
LAYOUTS = pytest.mark.parametrize("layout", ["rows", "flat"])


def real_edges(batch):
    mask = np.asarray(batch.edge_mask)
    return np.asarray(batch.senders)[mask], np.asarray(batch.receivers)[mask]


def scatter(values, index, length):
    out = np.zeros((length, *values.shape[1:]))
    np.add.at(out, index, values)
    return out


def noise(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape)


# ---- every map against a loop -------------------------------------------------------------------


def test_the_layouts_hold_the_same_edges():
    for rows, flat in zip(real_edges(BATCHES["rows"]), real_edges(BATCHES["flat"]), strict=True):
        np.testing.assert_array_equal(rows, flat)
    assert BATCHES["rows"].slots == 20 and BATCHES["flat"].slots is None
    assert int(BATCHES["rows"].edge_mask.sum()) == sum(f.num_edges for f in FRAMES) > 40


@LAYOUTS
def test_edge_vectors(layout):
    batch = BATCHES[layout]
    vectors = np.asarray(g.edge_vectors(batch, CUTOFF))
    mask = np.asarray(batch.edge_mask)
    expected = np.concatenate([
        f.structure.positions[f.neighbors.receivers] - f.structure.positions[f.neighbors.senders]
        + f.neighbors.shifts @ f.structure.cell
        for f in FRAMES
    ])  # fmt: skip
    np.testing.assert_allclose(vectors[mask], expected, **ROUNDING)
    assert np.all(np.linalg.norm(vectors[mask], axis=1) < CUTOFF)
    np.testing.assert_array_equal(vectors[~mask], [[CUTOFF, 0, 0]] * int((~mask).sum()))


@LAYOUTS
def test_gathers(layout):
    batch, x = BATCHES[layout], noise(ROWS.nodes, 2, 3)
    mask = np.asarray(batch.edge_mask)
    senders, receivers = real_edges(batch)
    gathered = np.asarray(g.gather_senders(jnp.asarray(x), batch))
    np.testing.assert_array_equal(gathered[mask], x[senders])
    np.testing.assert_array_equal(gathered[~mask], 0)
    gathered = np.asarray(g.gather_receivers(jnp.asarray(x), batch))
    np.testing.assert_array_equal(gathered[mask], x[receivers])


@LAYOUTS
def test_sums_over_edges_leave_padding_out(layout):
    batch = BATCHES[layout]
    x = noise(batch.num_edges, 2)
    mask = np.asarray(batch.edge_mask)
    x[~mask] = np.nan
    senders, receivers = real_edges(batch)
    for found, index in (
        (g.sum_receivers(jnp.asarray(x), batch), receivers),
        (g.sum_senders(jnp.asarray(x), batch), senders),
    ):
        np.testing.assert_allclose(found, scatter(x[mask], index, batch.num_nodes), **ROUNDING)


@LAYOUTS
def test_sum_graphs_leaves_padding_out(layout):
    batch, x = BATCHES[layout], noise(ROWS.nodes, 2)
    x[~np.asarray(batch.node_mask)] = np.nan
    found = np.asarray(g.sum_graphs(jnp.asarray(x), batch))
    pieces = unbatch_nodes(x, FRAMES)
    np.testing.assert_allclose(found[: len(FRAMES)], [p.sum(axis=0) for p in pieces], **ROUNDING)
    np.testing.assert_array_equal(found[len(FRAMES) :], 0)


@LAYOUTS
def test_species_blocks_hold_one_species_each_and_go_back(layout):
    batch, x = BATCHES[layout], noise(ROWS.nodes, 3)
    blocks = np.asarray(g.to_species_blocks(jnp.asarray(x), batch))
    back = np.asarray(g.from_species_blocks(jnp.asarray(blocks), batch))
    mask = np.asarray(batch.node_mask)
    np.testing.assert_array_equal(back[mask], x[mask])
    np.testing.assert_array_equal(back[~mask], 0)
    members, species = np.asarray(batch.species_blocks), np.asarray(batch.block_species)
    for row, kind in zip(members, species, strict=True):
        assert np.all(np.asarray(batch.species)[row[row < batch.num_nodes]] == kind)
    assert sorted(members[members < batch.num_nodes]) == list(np.flatnonzero(mask))


# ---- derivatives ---------------------------------------------------------------------------------

MAPS = {
    "gather_senders": (g.gather_senders, "num_nodes"),
    "gather_receivers": (g.gather_receivers, "num_nodes"),
    "sum_receivers": (g.sum_receivers, "num_edges"),
    "sum_senders": (g.sum_senders, "num_edges"),
    "sum_graphs": (g.sum_graphs, "num_nodes"),
    "to_species_blocks": (g.to_species_blocks, "num_nodes"),
    "block_round_trip": (
        lambda x, batch: g.from_species_blocks(g.to_species_blocks(x, batch), batch), "num_nodes",
    ),
}  # fmt: skip


@LAYOUTS
@pytest.mark.parametrize("name", MAPS)
def test_reverse_mode_is_the_transpose_and_so_is_its_reverse(layout, name):
    batch, (function, size) = BATCHES[layout], MAPS[name]
    x = jnp.asarray(noise(getattr(batch, size), 2))
    y, transpose = jax.vjp(lambda x: function(x, batch), x)
    v = jnp.asarray(np.random.default_rng(7).normal(size=y.shape))
    (back,) = transpose(v)
    np.testing.assert_allclose(jnp.sum(y * v), jnp.sum(x * back), **ROUNDING)
    again, second = jax.vjp(lambda v: transpose(v)[0], v)
    np.testing.assert_allclose(again, back, **ROUNDING)
    np.testing.assert_allclose(second(x)[0], y, **ROUNDING)


@pytest.mark.parametrize(("layout", "scatters"), [("rows", False), ("flat", True)])
def test_rows_need_no_scatter_in_any_derivative(layout, scatters):
    batch = BATCHES[layout]

    def squared(x):
        edges = g.gather_senders(x, batch) * g.gather_receivers(x, batch)
        blocks = g.to_species_blocks(g.sum_receivers(edges, batch), batch)
        return jnp.sum(g.from_species_blocks(blocks, batch) ** 2)

    def second(x):
        return jax.grad(lambda x: jnp.sum(jax.grad(squared)(x) ** 2))(x)

    program = str(jax.make_jaxpr(second)(jnp.ones((batch.num_nodes, 2))))
    assert bool(re.search(r"\bscatter(-\w+)?\[", program)) is scatters


@LAYOUTS
def test_maps_go_through_vmap(layout):
    batch, x = BATCHES[layout], jnp.asarray(noise(4, ROWS.nodes, 2))
    together = jax.vmap(lambda x: g.sum_receivers(g.gather_senders(x, batch), batch))(x)
    apart = [g.sum_receivers(g.gather_senders(one, batch), batch) for one in x]
    np.testing.assert_allclose(together, jnp.stack(apart), **ROUNDING)


# ---- batches and budgets -------------------------------------------------------------------------


@LAYOUTS
def test_frames_stand_in_a_batch_in_their_order(layout):
    batch = BATCHES[layout]
    positions = unbatch_nodes(np.asarray(batch.positions), FRAMES)
    species = unbatch_nodes(np.asarray(batch.species, float), FRAMES)
    for index, frame in enumerate(FRAMES):
        centred = frame.structure.positions - frame.structure.positions.mean(axis=0)
        np.testing.assert_allclose(positions[index], centred, **ROUNDING)
        np.testing.assert_array_equal(
            np.array(ELEMENTS)[species[index].astype(int)], frame.structure.atomic_numbers
        )
        periodic = np.where(np.array(frame.structure.pbc)[:, None], frame.structure.cell, 0)
        np.testing.assert_array_equal(batch.cell[index], periodic)
    sizes = [f.num_nodes for f in FRAMES]
    np.testing.assert_array_equal(batch.node_graph[: sum(sizes)], np.repeat(range(4), sizes))
    assert np.all(np.asarray(batch.node_graph[sum(sizes) :]) == ROWS.graphs - 1)
    np.testing.assert_array_equal(batch.graph_mask, [True] * 4 + [False] * 2)
    assert np.all(np.diff(np.asarray(batch.receivers)) >= 0)


def test_an_empty_batch_is_padding():
    batch = batch_frames([], ROWS)
    assert not batch.node_mask.any() and not batch.edge_mask.any() and not batch.graph_mask.any()
    assert batch.positions.dtype == batch.shifts.dtype == batch.cell.dtype == np.float32


def test_positions_far_from_the_origin_keep_their_digits_in_float32():
    near = structure(0, 5)
    far = dataclasses.replace(near, positions=near.positions + 1e4)
    vectors = [
        g.edge_vectors(batch_frames([make_frame(s, CUTOFF, ELEMENTS)], ROWS), CUTOFF)
        for s in (near, far)
    ]
    np.testing.assert_allclose(*vectors, atol=1e-6)


@pytest.mark.parametrize("pbc", [(True, True, True), (False, True, True)])
def test_atoms_that_have_wandered_off_keep_their_digits_in_float32(pbc):
    near = structure(0, 5, pbc)
    away = np.zeros((5, 3))
    away[1] = [0, 300, -200]
    away[3] = [0, 0, 700]
    far = dataclasses.replace(near, positions=near.positions + away @ near.cell)
    batches = [batch_frames([make_frame(s, CUTOFF, ELEMENTS)], FLAT) for s in (near, far)]
    exact = batch_frames([make_frame(near, CUTOFF, ELEMENTS)], FLAT, np.float64)
    assert np.abs(np.asarray(batches[1].positions)).max() < 30

    def sorted_vectors(batch):
        vectors = np.asarray(g.edge_vectors(batch, CUTOFF))[np.asarray(batch.edge_mask)]
        return vectors[np.lexsort(np.round(vectors, 3).T)]

    for batch in batches:
        np.testing.assert_allclose(sorted_vectors(batch), sorted_vectors(exact), atol=5e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"nodes": 11, "edges": 11 * 20},
        {"graphs": 4},
        {"slots": 2, "edges": 14 * 2},
        {"out_slots": 2},
        {"blocks": 2},
        {"slots": None, "out_slots": None, "edges": sum(f.num_edges for f in FRAMES) - 1},
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change):
    budget = dataclasses.replace(ROWS, **change)
    assert not budget.fits(FRAMES)
    with pytest.raises(ValueError, match="do not fit Budget"):
        batch_frames(FRAMES, budget)


@pytest.mark.parametrize(
    "budget",
    [
        dataclasses.replace(ROWS, nodes=12, graphs=5, edges=12 * 20),
        dataclasses.replace(FLAT, edges=sum(f.num_edges for f in FRAMES)),
    ],
    ids=["rows", "flat"],
)
def test_what_just_fits_is_accepted(budget):
    assert budget.fits(FRAMES)
    batch = batch_frames(FRAMES, budget)
    assert batch.node_mask.sum() == 11 and batch.graph_mask.sum() == 4


@pytest.mark.parametrize("step", [1.0, 1.3, 2.0])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_budget_holds_each_frame_it_was_chosen_from(step, count):
    frames = FRAMES[:count]
    budget = Budget.of(frames, step=step)
    assert all(budget.fits([frame]) for frame in frames)
    for frame in frames:
        batch_frames([frame], budget)
    nodes = sum(f.num_nodes for f in frames)
    together = Budget.of(frames, nodes=nodes, graphs=count, step=step)
    assert together.nodes > nodes and together.graphs > count
    if together.slots is not None:
        assert together.edges == together.nodes * together.slots
        assert together.fits(frames)


def test_uneven_neighbour_counts_choose_the_flat_layout():
    star = np.concatenate([np.zeros((1, 3)), 2.9 * np.eye(3), -2.9 * np.eye(3)])
    lone = 100 * np.arange(1, 30)[:, None] * np.eye(3)[:1]
    uneven = Structure(np.full(36, 1), np.concatenate([star, lone]), np.zeros((3, 3)))
    assert Budget.of([make_frame(uneven, CUTOFF, ELEMENTS)]).slots is None
    assert Budget.of([FRAMES[0]]).slots is not None


def test_a_budget_of_nothing():
    with pytest.raises(ValueError, match="at least one frame"):
        Budget.of([])


@pytest.mark.parametrize("step", [1.0, 1.25, 1.5, 2.0])
def test_rungs(step):
    sizes = [round_up(n, step) for n in range(1, 500)]
    assert all(size >= n for n, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes) and all(round_up(size, step) == size for size in sizes)
    rungs = sorted(set(sizes))
    assert rungs[:4] == [1, 2, 3, 4] and all(rung % 4 == 0 for rung in rungs[4:])
    assert all(b >= step * a for a, b in itertools.pairwise(rungs[4:]))
    assert round_up(0, step) == 1


def test_unknown_elements_are_named():
    gold = dataclasses.replace(structure(0, 2), atomic_numbers=np.array([79, 1]), name="x.xyz[3]")
    with pytest.raises(ValueError, match=r"x\.xyz\[3\] has element\(s\) Au .* knows O, H, C"):
        make_frame(gold, CUTOFF, ELEMENTS)


def test_labels_that_are_absent_are_masked():
    labelled = structure(0, 3, energy=-2.0, forces=np.ones((3, 3)))
    bare = structure(1, 2, (True, True, True), stress=np.eye(3))
    frames = [make_frame(s, CUTOFF, ELEMENTS) for s in (bare, labelled)]
    reference = np.array([1.0, 10.0, 100.0])
    labels = batch_labels(frames, ROWS, reference, np.float64)
    np.testing.assert_array_equal(labels.energy_mask, [False, True, False, False, False, False])
    np.testing.assert_array_equal(labels.stress_mask, [True, False, False, False, False, False])
    np.testing.assert_array_equal(labels.forces_mask, [False] * 2 + [True] * 3 + [False] * 9)
    np.testing.assert_allclose(labels.energy[1], -2.0 - reference[frames[1].species].sum())
    np.testing.assert_array_equal(labels.forces[2:5], 1)
    assert not labels.forces[:2].any() and not labels.energy[[0, 2, 3, 4, 5]].any()


def test_stress_is_a_label_of_cells_that_repeat_along_all_axes():
    slab = structure(1, 3, (True, True, False), stress=np.eye(3))
    crystal = structure(1, 3, (True, True, True), stress=np.eye(3))
    frames = [make_frame(s, CUTOFF, ELEMENTS) for s in (slab, crystal)]
    labels = batch_labels(frames, ROWS, np.zeros(3), np.float64)
    np.testing.assert_array_equal(labels.stress_mask[:2], [False, True])
    assert not labels.stress[0].any()


def test_forces_of_atoms_held_fixed_are_no_targets_where_asked():
    held = structure(1, 3, forces=np.ones((3, 3)), info={"fixed": np.array([1, 0, 0])})
    other = structure(1, 3, forces=np.ones((3, 3)), info={"fixed": "volume"})
    frames = [make_frame(s, CUTOFF, ELEMENTS) for s in (held, other)]
    free = batch_labels(frames, ROWS, np.zeros(3), forces_on=g.ForcesOn.FREE)
    np.testing.assert_array_equal(free.forces_mask[:6], [False, *[True] * 5])
    assert batch_labels(frames, ROWS, np.zeros(3)).forces_mask[:6].all()


def test_reference_energies_are_subtracted_before_rounding():
    total = -17_660.123456
    frame = make_frame(structure(0, 2, energy=total), CUTOFF, ELEMENTS)
    reference = np.full(3, total / 2 - 0.001)
    labels = batch_labels([frame], ROWS, reference, np.float32)
    np.testing.assert_allclose(labels.energy[0], 0.002, rtol=1e-5)


# ---- attention ---------------------------------------------------------------------------------


def loop_softmax(logits, envelope, receivers):
    """Edge by edge, in extended range: the largest logit of each node taken out."""
    found = np.zeros_like(logits)
    for node in set(receivers.tolist()):
        mine = receivers == node
        top = logits[mine].max(axis=0)
        powers = np.exp(logits[mine] - top)
        if envelope is None:
            found[mine] = powers / powers.sum(axis=0)
        else:
            powers = powers * envelope[mine, None]
            found[mine] = powers / (np.exp(-top) + powers.sum(axis=0))
    return found


@LAYOUTS
@pytest.mark.parametrize("with_envelope", [False, True])
@pytest.mark.parametrize("shift", [0.0, 500.0, -500.0])
def test_softmax_receivers(layout, with_envelope, shift):
    batch = BATCHES[layout]
    mask = np.asarray(batch.edge_mask)
    logits = noise(batch.num_edges, 2) + shift
    envelope = noise(batch.num_edges) ** 2 if with_envelope else None
    given = None if envelope is None else jnp.asarray(envelope)
    found = np.asarray(g.softmax_receivers(jnp.asarray(logits), batch, given))
    here = None if envelope is None else envelope[mask]
    expected = loop_softmax(logits[mask], here, np.asarray(batch.receivers)[mask])
    np.testing.assert_allclose(found[mask], expected, **ROUNDING)
    assert (found[~mask] == 0).all()
    gradient = jax.grad(lambda a: jnp.sum(g.softmax_receivers(a, batch, given) ** 2))
    assert np.isfinite(gradient(jnp.asarray(logits))).all()


@LAYOUTS
def test_softmax_forgets_an_edge_whose_envelope_vanishes(layout):
    """Weights of the others as if it were not there; an only edge goes to zero, not one."""
    batch = BATCHES[layout]
    logits, envelope = noise(batch.num_edges, 1), np.ones(batch.num_edges)
    edge = int(np.flatnonzero(np.asarray(batch.edge_mask))[0])
    envelope[edge] = 0
    without = batch._replace(edge_mask=batch.edge_mask.at[edge].set(False))
    found, expected = (
        g.softmax_receivers(jnp.asarray(logits), b, jnp.asarray(envelope)) for b in (batch, without)
    )
    np.testing.assert_allclose(found, expected, **ROUNDING)
    one = batch._replace(edge_mask=jnp.zeros_like(batch.edge_mask).at[edge].set(True))
    for factor in (1e-3, 1e-9):
        tiny = jnp.asarray(envelope + factor)
        assert float(g.softmax_receivers(jnp.asarray(logits), one, tiny)[edge, 0]) < 10 * factor
