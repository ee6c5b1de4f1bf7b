"""The benchmark of tensor products in the small: what is written, counted and drawn; no speeds."""

import csv
import dataclasses
import importlib
import json
import os
import sys

import e3nn_jax as e3nn
import matplotlib.image
import numpy as np
import pytest

from equizoo import cli
from equizoo.eval import benchmark, benchmark_plots
from equizoo.eval.benchmark import BACKWARD, DIRECTIONS, FORWARD, Limits, SideBySide, Sweep, run
from equizoo.eval.benchmark_auto import auto_plan, fastest, write_choices
from equizoo.eval.benchmark_peers import Comparison
from equizoo.eval.benchmark_plots import published_points, side_by_side_figures, sweep_figures
from equizoo.eval.benchmark_rows import COLUMNS, Row, read_rows, write_rows
from equizoo.eval.benchmark_timing import (
    Environment,
    compile_program,
    environment,
    time_in_turns,
)
from equizoo.registry import TENSOR_PRODUCTS
from equizoo.tensor_products import auto
from equizoo.tensor_products.analysis import expressivity

ONCE = Limits(repeats=(1, 1))
TINY = Sweep(
    variants=("clebsch_gordan", "gaunt_grid"),
    modes=("SISO", "MIMO"),
    l_max=(1, 2),
    channels=(2,),
    batch=(8,),
    limits=ONCE,
)
PEERS = {
    Comparison.EDGE: {"e3nn_jax", "cuequivariance_jax", "e3j"},
    Comparison.EDGE_WEIGHTED: {"e3nn_jax", "cuequivariance_jax", "e3j"},
    Comparison.CHANNELWISE: {"e3nn_jax", "cuequivariance_jax", "e3j"},
    Comparison.CHANNELWISE_SUMMED: {"e3x"},
    Comparison.CONVOLVE: {"e3nn_jax", "cuequivariance_jax", "e3j"},
}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The CSV file of a tiny sweep and its rows."""
    file = tmp_path_factory.mktemp("sweep") / TINY.file_name
    write_rows(TINY.run(), file)
    return file, read_rows(file)


def of(rows, **values):
    return [row for row in rows if all(getattr(row, key) == v for key, v in values.items())]


def picture(path):
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 300
    return pixels[..., :3].std()


# ---- the sweep ---------------------------------------------------------------------------------


def test_every_point_has_a_row(swept):
    _, rows = swept
    points = {(row.variant, row.mode, row.l_max, row.direction) for row in rows}
    assert len(rows) == len(points) == 2 * 2 * 2 * 2
    with swept[0].open(newline="") as file:
        assert tuple(next(csv.reader(file))) == COLUMNS


def test_measured_rows_say_everything(swept):
    measured = [row for row in swept[1] if not row.skipped]
    may_be_empty = {"options", "skipped", "nodes", "commit"}
    only_forward = {"flops", "gflop_per_s", "max_error"}
    for row in measured:
        for name in set(COLUMNS) - may_be_empty:
            empty = getattr(row, name) in ("", None)
            assert empty == (row.direction == BACKWARD and name in only_forward), (name, row)
        assert row.repeats == 1 and 0 < row.min_ms <= row.median_ms
    assert all(row.max_error < 1e-5 for row in of(measured, direction=FORWARD))


def test_what_is_not_measured_is_counted(swept):
    """The product of functions has no odd coupling, so none of 1 and 1 to 1."""
    skipped = [row for row in swept[1] if row.skipped]
    assert {(r.variant, r.mode, r.l_max) for r in skipped} == {("gaunt_grid", "SISO", 1)}
    assert [row.direction for row in skipped] == list(DIRECTIONS)
    assert all(row.skipped.startswith("No path couples") for row in skipped)
    assert all(row.median_ms is None for row in skipped)


def test_the_papers_contents_and_expressivity(swept):
    """The number of couplings for Clebsch-Gordan, 4 L + 1 for the Gaunt product."""
    _, rows = swept
    for l_max, count in ((1, 6), (2, 19)):
        here = of(rows, mode="MIMO", l_max=l_max, direction=FORWARD)
        (usual,), (gaunt,) = (of(here, variant=name) for name in TINY.variants)
        assert usual.expressivity == usual.couplings == count
        assert gaunt.expressivity == 4 * l_max + 1
        assert e3nn.Irreps(gaunt.irreps_out).lmax == 2 * l_max
        assert gaunt.us_per_expressivity == pytest.approx(
            1e3 * gaunt.median_ms / gaunt.expressivity, rel=1e-4
        )
    assert {row.expressivity for row in of(rows, mode="SISO", skipped="")} == {1}


def test_one_weight_for_each_path_is_as_expressive_as_there_are_paths():
    bound, _ = benchmark._bind(TENSOR_PRODUCTS["clebsch_gordan"](), "MIMO", 1)
    assert benchmark._expressivity(bound) == expressivity(bound) == 6


def test_larger_points_than_one_that_takes_too_long_are_left_out():
    hurried = dataclasses.replace(
        TINY, variants=TINY.variants[:1], modes=("MIMO",), limits=Limits(time=0.0, repeats=(1, 1))
    )
    rows = list(hurried.run())
    assert len(rows) == 4 and all(row.skipped and row.median_ms is None for row in rows)
    assert rows[0].skipped.endswith("limit 0")
    assert {row.skipped for row in rows[1:]} == {f"l_max=1 forward: {rows[0].skipped}"}


def test_points_that_need_too_much_memory_are_left_out():
    small = Limits(memory=1e-6, repeats=(1, 1))
    sweep = dataclasses.replace(TINY, variants=TINY.variants[:1], modes=("MIMO",), limits=small)
    assert all("GB, limit 1e-06" in row.skipped for row in sweep.run())


def test_a_file_is_continued(swept, tmp_path, monkeypatch):
    rows = swept[1]
    place = Environment(*(getattr(rows[0], name) for name in Environment._fields))
    monkeypatch.setattr(benchmark, "environment", lambda: place)
    write_rows(rows[:-1], tmp_path / TINY.file_name)
    reported = []
    _, completed = benchmark.run(TINY, tmp_path, reported.append)
    assert [row.point for row in completed] == [row.point for row in rows]
    assert len(reported) == 1


def test_a_file_with_other_columns_is_refused(tmp_path):
    file = tmp_path / "old.csv"
    file.write_text("variant,median_ms\ngaunt,1\n")
    with pytest.raises(ValueError, match="does not have the columns of this version's benchmark"):
        write_rows([Row()], file)


def test_rows_survive_the_file(tmp_path):
    rows = [Row(variant="a", l_max=2, median_ms=1.25, flops=10**12), Row(skipped='a, "b"')]
    write_rows(rows[:1], tmp_path / "rows.csv")
    write_rows(rows[1:], tmp_path / "rows.csv")
    assert read_rows(tmp_path / "rows.csv") == rows


def test_an_unknown_variant_is_named():
    with pytest.raises(ValueError, match="Did you mean 'gaunt_grid'"):
        Sweep(variants=("gaunt_gird",))
    with pytest.raises(ValueError, match="Did you mean 'gaunt_grid'"):
        SideBySide(variants=("gaunt_gird",))


# ---- side by side ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(Comparison))
def beside(request):
    """The rows of a tiny comparison."""
    few = ("clebsch_gordan_dense", "matrix_product")
    plan = SideBySide(
        comparisons=(request.param,),
        variants=few if request.param is Comparison.EDGE_WEIGHTED else ("clebsch_gordan",),
        l_max=(2 if request.param is Comparison.CHANNELWISE_SUMMED else 1,),  # e3x: other axes
        channels=(2,),
        batch=(8,),
        cells=1,
        limits=ONCE,
    )
    return list(plan.run())


def importable(library: str) -> bool:
    """Whether a peer and all that it needs is installed."""
    try:
        importlib.import_module(library)
    except ImportError:
        return False
    return True


def test_peers_compute_the_same_map(beside):
    """Those that are installed are compared before they are timed; the others are counted."""
    (comparison,) = {row.mode for row in beside}
    peers = [row for row in beside if row.library != "equizoo"]
    assert {row.library for row in peers} == PEERS[comparison]
    for row in peers:
        if not importable(row.library) and not os.environ.get("EQUIZOO_PARITY"):
            assert row.skipped.startswith(f"{row.library} cannot be imported")
        else:
            assert row.skipped == "" and row.median_ms > 0 and row.library_version
            assert row.direction == BACKWARD or row.max_error < benchmark.SAME_IN_SINGLE


def test_maps_are_told_apart(beside):
    """Products that equal Clebsch-Gordan say so."""
    others = {"matrix_product", "nn.FusedTensor"}
    for row in beside:
        if not row.skipped:
            same = "matrix_product" if row.variant in others else "clebsch_gordan"
            assert row.map == same, row


def test_a_peer_that_computes_another_map_is_not_timed(monkeypatch):
    adapter = benchmark.peers

    def wrong(problem):
        return [
            dataclasses.replace(peer, to_ours=lambda z, right=peer.to_ours: 1.001 * right(z))
            for peer in adapter(problem)
            if peer.library == "e3nn_jax"
        ]

    monkeypatch.setattr(benchmark, "peers", wrong)
    plan = SideBySide(
        (Comparison.EDGE,), ("clebsch_gordan",), l_max=(1,), channels=(2,), batch=(8,), limits=ONCE
    )
    rows = of(list(plan.run()), library="e3nn_jax")
    assert [row.direction for row in rows] == list(DIRECTIONS)
    assert all(row.skipped.startswith("computes another map") for row in rows)
    assert all(row.median_ms is None for row in rows)


def test_a_library_that_is_not_installed_is_counted(monkeypatch):
    monkeypatch.setitem(sys.modules, "e3x", None)
    plan = SideBySide(
        (Comparison.CHANNELWISE_SUMMED,),
        ("clebsch_gordan",),
        l_max=(1,),
        channels=(2,),
        batch=(8,),
        limits=ONCE,
    )
    rows = of(list(plan.run()), library="e3x")
    assert [row.direction for row in rows] == list(DIRECTIONS)
    assert all(row.skipped.endswith("install equizoo[peers]") for row in rows)


def test_a_product_that_cannot_bind_is_counted(monkeypatch):
    def refuse(self, *irreps):
        raise ValueError("not today\nat all")

    monkeypatch.setattr(TENSOR_PRODUCTS["poisson_bracket"], "_bind", refuse)
    plan = SideBySide(
        (Comparison.EDGE,), ("poisson_bracket",), l_max=(1,), channels=(3,), batch=(2,), limits=ONCE
    )
    monkeypatch.setattr(benchmark, "peers", lambda problem: [])
    rows = list(plan.run())
    assert [(row.variant, row.skipped) for row in rows] == 2 * [("poisson_bracket", "not today")]


def test_the_fastest_of_equal_forms(tmp_path):
    plan = dataclasses.replace(auto_plan(ONCE), l_max=(1,), channels=(2,), batch=(8,), cells=1)
    _, rows = run(plan, tmp_path)
    assert {row.library for row in rows} == {"equizoo"}
    chosen = fastest(rows)
    assert {choice.operation for choice in chosen} == set(auto.CANDIDATES)
    for choice in chosen:
        assert choice.product in auto.CANDIDATES[choice.operation]
    first = next(row for row in rows if row.mode == "convolve" and row.direction == BACKWARD)
    again = [row.replace(median_ms=1e-9) if row == first else row for row in rows]
    assert first.variant in {c.product for c in fastest(again) if c.operation == "convolve"}
    assert sorted(auto.read_table(write_choices(rows, tmp_path))) == sorted(chosen)


# ---- programs and times ------------------------------------------------------------------------


def test_the_derivatives_are_those_for_a_given_cotangent():
    x, y = np.arange(6.0).reshape(2, 3), np.array([[2.0], [3.0]])
    program = compile_program(lambda x, y, one: x * y * one, (x, y), (np.ones(()),), backward=True)
    result, (of_x, of_y) = program.run()
    np.testing.assert_allclose(result, x * y)
    cotangent = np.asarray(of_x) / y
    assert np.all(cotangent != 0)
    np.testing.assert_allclose(of_y, np.sum(x * cotangent, axis=1, keepdims=True))
    assert program.bytes == 8 * (6 + 6 + 2 + 1) + 8 * (6 + 6 + 2) <= program.memory


def test_programs_take_turns():
    calls = []
    runs = [lambda name=name: calls.append(name) for name in "ab"]
    timings = time_in_turns(runs, seconds=0.0, repeats=(3, 5))
    assert "".join(calls) == 4 * "ab"  # warm-up and three rounds
    assert [timing.repeats for timing in timings] == [3, 3]
    assert len(time_in_turns(runs, seconds=10.0, repeats=(3, 5))) == 2 and len(calls) == 8 + 12
    assert time_in_turns([]) == []


def test_the_environment_is_stated():
    place = environment()
    assert place.device and place.cores > 0 and place.jax and place.jaxlib and place.equizoo


# ---- figures and the command -------------------------------------------------------------------


def test_the_published_points_are_those_of_the_paper():
    points = published_points()
    assert {p.mode for p in points} == {"MIMO"} and {p.products for p in points} == {10_000}
    assert {p.variant for p in points} <= set(TENSOR_PRODUCTS)
    by_method = {(p.method, p.l_max): p for p in points}
    assert by_method["CGTP-dense", 6].walltime_ms == 1.083
    assert [by_method["CGTP-sparse", L].expressivity for L in range(1, 5)] == [6, 19, 44, 85]
    assert by_method["GTP-grid", 6].expressivity == by_method["MTP", 6].expressivity == 25


def test_figures_of_a_sweep(swept, tmp_path):
    rows = of(swept[1], direction=FORWARD)
    files = sweep_figures(rows, tmp_path)
    assert len(files) == 2  # modes
    alone = {picture(file) for file in files}
    assert min(alone) > 0.02
    # as many products as published: more to see
    larger = [row.replace(channels=16, batch=625) for row in of(rows, mode="MIMO")]
    (file,) = sweep_figures(larger, tmp_path)
    assert picture(file) > max(alone)


def test_of_a_point_measured_again_the_last_is_drawn():
    rows = [Row(l_max=1, commit="a", median_ms=1.0), Row(l_max=2, median_ms=2.0)]
    again = Row(l_max=1, commit="b", median_ms=3.0)
    assert benchmark_plots._latest([*rows, again, Row(l_max=3)]) == [again, rows[1]]


def test_figures_of_libraries_side_by_side(beside, tmp_path):
    (file,) = side_by_side_figures(beside, tmp_path)
    assert picture(file) > 0.02
    assert benchmark_plots.figures([], tmp_path) == []


def test_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = [
        *("benchmark", "tensor-products", "--out", str(tmp_path), "--variants", "gaunt_grid"),
        *("--l-max", "1", "--channels", "1", "--batch", "4", "--repeats", "1", "1"),
        *("--modes", "SISO", "SIMO"),
    ]
    cli.main([*arguments, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["points"] == 2 and list(result["skipped"].values()) == [2]
    rows = read_rows(result["file"])
    assert len(rows) == 4
    assert len(result["figures"]) == 2 and all(picture(f) > 0.02 for f in result["figures"])
    place = Environment(*(getattr(rows[0], name) for name in Environment._fields))
    monkeypatch.setattr(benchmark, "environment", lambda: place)
    cli.main(arguments)  # nothing is left to measure
    text = capsys.readouterr().out
    assert "2 points" in text and "2 not measured: No path couples" in text


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["benchmark", "tensor-products", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "The Price of Freedom" in text and "--time-limit" in text and "--json" in text
