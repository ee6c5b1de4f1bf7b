"""Machine code for sums over neighbours: the product's own, to rounding, with all derivatives."""

import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import equizoo.tensor_products._machine_code as machine_code
import equizoo.tensor_products.native as native
from equizoo.graph import Budget, batch_frames, make_frame
from equizoo.structure import Structure
from equizoo.tensor_products._base import BoundProduct
from equizoo.tensor_products.clebsch_gordan import ClebschGordan
from equizoo.tensor_products.gaunt_grid import GauntGrid
from equizoo.tensor_products.native import Native
from equizoo.tensor_products.selected_paths import SelectedPaths
from equizoo.tensor_products.so2 import SO2

ROUNDING = {"float64": 1e-13, "float32": 1e-5}  # relative to the largest, of sums of tens of terms
THIRD = 1e-11  # relative, in float64, of third derivatives
SMALL = ("0e+1o", "0e+1o+2e", "0e+1o+2e")
CONTENTS = [("0e", "0e+1o+2e+3o", "0e+1o+2e+3o"), ("0e+1o+2e", "0e+1o+2e+3o", "0e+1o"),
            ("0e+0o+1e+1o", "0e+1o+2e", "0e+1e+1o+2o+2e")]  # fmt: skip


def graph_of(rows=True, dtype="float64"):
    """Nine atoms of which one has no neighbour, in a batch with padded nodes and edges."""
    rng = np.random.default_rng(5)
    positions = np.concatenate([rng.normal(size=(8, 3)), [[9.0, 9.0, 9.0]]])
    structure = Structure(np.ones(9, int), positions, np.zeros((3, 3)), (False,) * 3)
    frame = make_frame(structure, 2.0, (1,))
    slots = 8 if rows else None
    budget = Budget(
        nodes=12, graphs=2, edges=96, slots=slots, out_slots=slots, blocks=1, block_size=16
    )
    graph = jax.tree.map(jnp.asarray, batch_frames([frame], budget, np.dtype(dtype)))
    assert 20 < graph.edge_mask.sum() < 70
    return graph


def arrays_of(product, graph, channels, dtype, seed=1):
    rng = np.random.default_rng(seed)
    shapes = (
        (graph.num_nodes, product.irreps_1.dim, channels),
        (graph.num_edges, product.irreps_2.dim),
        (graph.num_edges, product.num_weights, channels),
    )
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def gradients(function, order):
    """Of a scalar of the function, then of a scalar of these, and so on."""

    def scalar(*args):
        return jnp.sum(jnp.sin(function(*args)))

    for _ in range(order - 1):

        def scalar(*args, inner=scalar):
            found = jax.grad(inner, (0, 1, 2))(*args)
            return sum(jnp.sum(jnp.cos(k + x)) for k, x in enumerate(found))

    return jax.jit(jax.grad(scalar, (0, 1, 2)))


def assert_same(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def both(irreps, graph, inner=None):
    """Sums over neighbours by machine code and by the product itself."""
    inner = inner or ClebschGordan()
    mine, plain = Native(inner).bind(*irreps), inner.bind(*irreps)
    return plain, [
        lambda *args, product=product: product.convolve(*args, graph) for product in (mine, plain)
    ]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("irreps", CONTENTS, ids=" x ".join)
@pytest.mark.parametrize(("channels", "rows"), [(3, True), (24, False)])
def test_values_and_gradients(irreps, channels, rows, dtype):
    graph = graph_of(rows, dtype)
    plain, functions = both(irreps, graph)
    args = arrays_of(plain, graph, channels, dtype)
    assert Native().bind(*irreps).applies(graph, *args)
    found, expected = ([jax.jit(f)(*args), *gradients(f, 1)(*args)] for f in functions)
    assert_same(found, expected, ROUNDING[dtype])
    text = jax.jit(functions[0]).lower(*args).as_text()
    assert "equizoo_" in text and "dot_general" not in text


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("order", [2, 3])
def test_higher_derivatives(order, rows):
    graph = graph_of(rows)
    plain, functions = both(SMALL, graph)
    args = arrays_of(plain, graph, 4, "float64")
    assert_same(*(gradients(f, order)(*args) for f in functions), THIRD)


@pytest.mark.parametrize("inner", [GauntGrid(), SelectedPaths(keep=(0, 2, 3))], ids=str)
def test_any_product_with_a_dense_map(inner):
    graph = graph_of()
    plain, functions = both(SMALL, graph, inner)
    args = arrays_of(plain, graph, 4, "float64")
    assert_same(*([f(*args), *gradients(f, 1)(*args)] for f in functions), ROUNDING["float64"])


class WithIdleWeight(BoundProduct):
    """Another product with a first weight that nothing depends on."""

    def __init__(self, product):
        vars(self).update(vars(product), num_weights=product.num_weights + 1)
        self.product = product

    def couple(self, x, prepared, weights):
        return self.product.couple(x, prepared, weights[:, 1:])

    def prepare(self, y):
        return self.product.prepare(y)

    def flops(self, batch, channels):
        return self.product.flops(batch, channels)


def test_a_weight_that_nothing_depends_on_has_gradient_zero():
    graph, inner = graph_of(), WithIdleWeight(ClebschGordan().bind(*SMALL))
    args = arrays_of(inner, graph, 4, "float64")
    functions = [
        lambda *args, product=product: product.convolve(*args, graph)
        for product in (native.BoundNative(inner), inner)
    ]
    for order in (1, 2):
        found = [gradients(f, order)(*args) for f in functions]
        assert not found[0][2][:, 0].any()
        assert_same(*found, ROUNDING["float64"] * 100)


def test_weights_from_a_table():
    graph = graph_of()
    plain, (_, convolve) = both(SMALL, graph)
    h, y, _ = arrays_of(plain, graph, 8, "float64")
    rng = np.random.default_rng(2)
    table = jnp.asarray(rng.normal(size=(5, 4, plain.num_weights * 8)))
    rows = jnp.asarray(rng.integers(0, 5, graph.num_edges), jnp.int32)
    powers = jnp.asarray(rng.normal(size=(graph.num_edges, 4)))

    def tabulated(h, y, powers):
        return Native().bind(*SMALL).convolve_tabulated(h, y, table, rows, powers, graph)

    def written_out(h, y, powers):
        weights = jnp.einsum("ekw,ek->ew", table[rows], powers)
        return convolve(h, y, weights.reshape(graph.num_edges, -1, 8))

    args = h, y, powers
    assert_same(
        *([f(*args), *gradients(f, 1)(*args)] for f in (tabulated, written_out)),
        ROUNDING["float64"],
    )


@pytest.mark.parametrize("parts", [1, 3, 16])
def test_any_number_of_parts(parts, monkeypatch):
    monkeypatch.setattr(native, "num_parts", lambda: parts)
    graph = graph_of()
    plain, functions = both(SMALL, graph)
    args = arrays_of(plain, graph, 4, "float64")
    assert_same(*([f(*args), *gradients(f, 2)(*args)] for f in functions), THIRD)


def test_again_and_again_at_once_gives_the_same():
    """Parts are done by whichever thread comes first, also by late ones."""
    graph = graph_of()
    plain, (convolve, _) = both(SMALL, graph)
    args = arrays_of(plain, graph, 4, "float64")

    @jax.jit
    def many(h, y, w):
        return [convolve(h + k, y, w) for k in range(20)]

    first = many(*args)
    for _ in range(50):
        for a, b in zip(first, many(*args), strict=True):
            np.testing.assert_array_equal(a, b)


def test_not_a_number_stays_that():
    graph = graph_of()
    plain, (convolve, _) = both(SMALL, graph)
    h, y, w = arrays_of(plain, graph, 4, "float64")
    edge = int(np.flatnonzero(graph.edge_mask)[3])
    found = convolve(h, y, w.at[edge].set(jnp.nan))
    receiver = int(graph.receivers[edge])
    assert jnp.isnan(found[receiver]).all()
    assert jnp.isfinite(found).all(axis=(1, 2)).sum() == graph.num_nodes - 1
    padded = int(np.flatnonzero(~np.asarray(graph.edge_mask))[0])
    assert jnp.isfinite(convolve(h, y, w.at[padded].set(jnp.nan))).all()


def test_where_it_does_not_apply_the_product_does_it(monkeypatch):
    graph = graph_of()
    plain, (convolve, _) = both(SMALL, graph)
    args = arrays_of(plain, graph, 4, "float64")
    mine = Native().bind(*SMALL)
    assert mine.applies(graph, *args)
    half = [x.astype(jnp.bfloat16) for x in args]
    assert not mine.applies(graph, *half)
    assert not mine.applies(graph, args[0].astype(jnp.float32), *args[1:])
    assert convolve(*half).dtype == jnp.bfloat16
    assert not Native(SO2()).bind(*SMALL).applies(graph, *args)
    expected = convolve(*args)
    monkeypatch.setattr(native, "available", lambda: False)
    assert not mine.applies(graph, *args)
    np.testing.assert_allclose(convolve(*args), expected, atol=1e-12)
    monkeypatch.undo()
    monkeypatch.setattr(native, "_MOST", 10)
    assert not native.BoundNative(ClebschGordan().bind(*SMALL)).applies(graph, *args)


def test_without_llvmlite_it_says_what_to_install(monkeypatch):
    machine_code.available.cache_clear()
    monkeypatch.setattr(machine_code.importlib.util, "find_spec", lambda name: None)
    try:
        assert not machine_code.available()
        with pytest.raises(ValueError, match=r'llvmlite.*pip install "equizoo\[native\]"'):
            Native.made_for(ClebschGordan())
    finally:
        monkeypatch.undo()
        machine_code.available.cache_clear()
    assert Native.made_for(ClebschGordan()) == Native(ClebschGordan())
    assert Native.made_for(Native(GauntGrid())) == Native(GauntGrid())


def test_a_program_from_the_compile_cache_finds_it(tmp_path):
    """In a process that never compiled it."""
    script = textwrap.dedent("""
        import jax, jax.numpy as jnp
        from equizoo.graph import Budget, batch_frames, make_frame
        from equizoo.structure import Structure
        from equizoo.tensor_products.native import Native
        import numpy as np

        positions = np.random.default_rng(0).normal(size=(4, 3))
        frame = make_frame(
            Structure(np.ones(4, int), positions, np.zeros((3, 3)), (False,) * 3), 5.0, (1,)
        )
        budget = Budget(nodes=5, graphs=2, edges=20, slots=4, out_slots=4, blocks=1, block_size=8)
        graph = jax.tree.map(jnp.asarray, batch_frames([frame], budget, np.float32))
        product = Native().bind("0e", "0e+1o", "0e+1o")
        assert product.applies(graph, jnp.ones(()), jnp.ones(()))
        x, y, w = jnp.ones((5, 1, 4)), jnp.ones((20, 4)), jnp.ones((20, 2, 4))
        print(float(jax.jit(lambda *a: product.convolve(*a, graph))(x, y, w).sum()))
        print(len(list(__import__("pathlib").Path(jax.config.jax_compilation_cache_dir).iterdir())))
    """)
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    run = functools.partial(
        subprocess.run, [sys.executable, "-c", script], env=environment, capture_output=True
    )
    first, second = (run(text=True, check=False) for _ in range(2))
    assert second.returncode == 0, second.stderr
    assert first.stdout == second.stdout  # nothing was added to the cache
    number, files = second.stdout.split()
    assert float(number) > 10 and int(files) > 0
