"""Products with weights left out: equal to zeroed weights, cheaper where they can be; the gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_tensor_product_laws import (
    CHANNELS,
    LAYOUTS,
    arguments,
    convolve_on,
    derivatives,
    per_path_and_loop,
)

from equizoo.config import from_dict, to_dict
from equizoo.tensor_products._base import TensorProduct, coupling
from equizoo.tensor_products.analysis import coefficients, interactability
from equizoo.tensor_products.clebsch_gordan import BoundClebschGordan, ClebschGordan
from equizoo.tensor_products.clebsch_gordan_dense import ClebschGordanDense
from equizoo.tensor_products.gaunt_bracket import GauntBracket
from equizoo.tensor_products.gaunt_grid import GauntGrid
from equizoo.tensor_products.selected_paths import (
    SelectedPaths,
    indices,
    keep_by_gate,
    random_keep,
    variance_shares,
)
from equizoo.tensor_products.sum_of_products import SumOfProducts

NATURAL = ("0e+1o+2e", "0e+1o+2e+3o", "0e+1o+2e")
DOUBLED = ("0e+0o+1e+1o", "0e+1o+2e", "0e+0o+1e+1o+2o+2e")
CASES = [
    (ClebschGordan(), NATURAL, (0, 2, 3, 7, 10)),
    (ClebschGordan(), DOUBLED, (1, 5, 6)),  # some irreps of the result are no longer reached
    (ClebschGordanDense(), NATURAL, (0, 2, 3, 7, 10)),
    (ClebschGordanDense(), DOUBLED, (1, 5, 6)),
    (GauntGrid(), NATURAL, (1, 3)),
    (GauntBracket(), DOUBLED, (0, 4)),
    (SumOfProducts(GauntGrid(), 2), NATURAL, (0, 1, 6)),
    (SelectedPaths(GauntGrid(), (1, 2, 3)), NATURAL, (0, 2)),
]
cases = pytest.mark.parametrize(("product", "irreps", "keep"), CASES, ids=str)


def select(product, irreps, keep):
    return SelectedPaths(product, keep).bind(*irreps), product.bind(*irreps)


@cases
def test_it_is_the_whole_product_with_zeroed_weights(product, irreps, keep):
    """Up to the factor that gives each irrep of the result unit variance again."""
    pruned, whole = select(product, irreps, keep)
    assert pruned.num_weights == len(keep)
    variance = np.sum(whole.dense()[list(keep)] ** 2, axis=(0, 1, 2))
    factor = np.where(variance > 1e-10, np.maximum(variance, 1e-10) ** -0.5, 0)[:, None]
    for channels_2 in (1, 3):
        x, y, weights = arguments(pruned, 0, channels_2=channels_2)
        zeroed = jnp.zeros((5, whole.num_weights, 3)).at[:, np.array(keep)].set(weights)
        expected = factor * np.asarray(whole(x, y, zeroed))
        np.testing.assert_allclose(pruned(x, y, weights), expected, atol=1e-12)


@cases
def test_what_it_says_of_itself(product, irreps, keep):
    pruned, whole = select(product, irreps, keep)
    dense = pruned.dense()
    there = {path for path, present in interactability(pruned).items() if present}
    assert set(pruned.paths) == there and there < set(whole.paths)
    assert [p.index_out for p in pruned.paths] == sorted(p.index_out for p in pruned.paths)
    assert set(pruned.into) == {path.index_out for path in pruned.paths}
    assert [pruned.irreps_out[i].ir for i in pruned.into] == [ir for _, ir in pruned.irreps_paths]
    variance = np.sum(dense**2, axis=(0, 1, 2))
    for index, place in enumerate(pruned.irreps_out.slices()):
        np.testing.assert_allclose(variance[place], float(index in pruned.into), atol=1e-10)
    assert coefficients(pruned).residual < 1e-10
    x, y, weights = arguments(pruned, 1)
    expected = np.einsum("wijk,bwc,bic,bjc->bkc", dense, weights, x, y, optimize=True)
    np.testing.assert_allclose(pruned(x, y, weights), expected, atol=1e-12)
    assert pruned.flops(10, 4) == 10 * pruned.flops(1, 4)
    single = [jnp.asarray(a, np.float32) for a in (x, y, weights)]
    assert pruned(*single).dtype == np.float32


@pytest.mark.parametrize(("product", "irreps", "keep"), [CASES[0], CASES[4]], ids=str)
def test_convolve_of_a_selection(product, irreps, keep):
    pruned, rng = select(product, irreps, keep)[0], np.random.default_rng(0)
    edges, nodes = int(LAYOUTS[0].edge_mask.sum()), LAYOUTS[0].num_nodes
    shapes = (
        (nodes, pruned.irreps_1.dim, CHANNELS),
        (edges, pruned.irreps_2.dim),
        (edges, pruned.num_weights, CHANNELS),
    )
    args, directions = ([jnp.asarray(rng.normal(size=s)) for s in shapes] for _ in range(2))
    cotangent = jnp.asarray(rng.normal(size=(nodes, pruned.irreps_paths.dim, CHANNELS)))
    expected = derivatives(per_path_and_loop(pruned, LAYOUTS[0]), args, cotangent, directions)
    for graph in LAYOUTS:
        found = derivatives(convolve_on(pruned, graph), args, cotangent, directions)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-11)


def multiplications(product, channels_2):
    """By the traced program: elements that come out of ``mul`` and work of ``dot_general``."""
    args = arguments(product, 0, batch=1, channels=3, channels_2=channels_2)
    total = 0
    for equation in jax.make_jaxpr(lambda *a: product(*a))(*args).jaxpr.eqns:
        total += count(equation)
    return total


def count(equation):
    if equation.primitive.name == "mul":
        return equation.outvars[0].aval.size
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return equation.outvars[0].aval.size * int(np.prod([shape[axis] for axis in contracted]))
    inner = [v for v in equation.params.values() if hasattr(v, "jaxpr")]
    return sum(count(e) for closed in inner for e in closed.jaxpr.eqns)


@pytest.mark.parametrize("channels_2", [1, 3])
def test_couplings_left_out_cost_nothing(channels_2):
    """Two of 23: the trace and the stated cost are those of a product of these two alone."""
    irreps = ("0e+1o+2e+3o",) * 3
    whole = ClebschGordan().bind(*irreps)
    keep = (3, 8)
    pruned = whole.select(keep)
    assert isinstance(pruned, BoundClebschGordan)
    assert pruned.paths == tuple(whole.paths[w] for w in keep)
    shares = [3 * np.count_nonzero(coupling(p)) + p.ir_out.dim for p in pruned.paths]
    assert pruned.flops(1, 1) == sum(shares) < whole.flops(1, 1) / 8
    assert multiplications(pruned, channels_2) < multiplications(whole, channels_2) / 5


def test_all_weights_is_the_product_itself():
    whole = ClebschGordan().bind(*NATURAL)
    assert SelectedPaths().bind(*NATURAL) is whole
    assert SelectedPaths(keep=tuple(range(whole.num_weights))).bind(*NATURAL) is whole


def test_it_can_be_bound_while_a_caller_is_traced():
    x = jnp.ones((2, 4, 1))

    def call(x):
        bound = SelectedPaths(GauntBracket(), (0, 2)).bind("0e+1o", "0e+1o", "0e+1o+1e")
        return bound(x, x, jnp.ones((1, 2, 1)))

    np.testing.assert_allclose(jax.jit(call)(x), call(x), atol=1e-13)


# ---- choosing ------------------------------------------------------------------------------------


def test_random_subsets_are_uniform_and_of_one_size():
    keys = jax.random.split(jax.random.key(0), 4000)
    masks = jax.jit(jax.vmap(lambda key: random_keep(15, 0.7, key)))(keys)
    assert masks.shape == (4000, 15) and (masks.sum(axis=1) == 4).all()  # of 4.5
    spread = np.sqrt(4 / 15 * 11 / 15 / 4000)
    np.testing.assert_allclose(masks.mean(axis=0), 4 / 15, atol=4 * spread)
    assert random_keep(3, 0.9, keys[0]).sum() == 1 and random_keep(3, 0.0, keys[0]).all()
    assert random_keep(10, 0.7, keys[0]).sum() == 3  # 10 * (1 - 0.7) is just below three


def test_gates_of_greatest_magnitude_are_kept():
    gates = jnp.array([0.1, -2.0, 0.5, 1.0, 0.5, 0.5])
    assert indices(keep_by_gate(gates, 0.5)) == (1, 2, 3)  # the first of equals
    assert indices(jax.jit(keep_by_gate, static_argnums=1)(gates, 0.5)) == (1, 2, 3)
    assert indices(keep_by_gate(jnp.ones(6), 0.7)) == (0,)


def test_masked_gates_become_a_smaller_product():
    """The masked phase and the pruned product with the gates that are left, irrep by irrep."""
    whole = ClebschGordan().bind(*NATURAL)
    gates = jnp.asarray(np.random.default_rng(0).normal(size=whole.num_weights))
    mask = keep_by_gate(gates, 0.6)
    keep = indices(mask)
    x, y, weights = arguments(whole, 0, channels_2=1)
    masked = whole(x, y, jnp.where(mask, gates, 0)[None, :, None] * weights)
    kept = np.array(keep)
    pruned = SelectedPaths(keep=keep).bind(*NATURAL)
    smaller = pruned(x, y, gates[None, kept, None] * weights[:, kept])
    for index, place in enumerate(whole.irreps_out.slices()):
        factor = np.sqrt(pruned.into.count(index) / whole.into.count(index))
        np.testing.assert_allclose(masked[:, place], factor * smaller[:, place], atol=1e-12)


@pytest.mark.parametrize("product", [ClebschGordan(), GauntBracket()], ids=str)
def test_shares_of_the_variance(product):
    bound = product.bind(*DOUBLED)
    shares = variance_shares(bound)
    dims = np.repeat(*[[ir.dim for _, ir in bound.irreps_out]] * 2)
    np.testing.assert_allclose(shares, np.sum(bound.dense() ** 2 / dims, axis=(1, 2, 3)))
    np.testing.assert_allclose(shares.sum(), len(set(bound.into)))
    if product == ClebschGordan():
        np.testing.assert_allclose(shares, [1 / bound.into.count(index) for index in bound.into])


# ---- config and errors ---------------------------------------------------------------------------


def test_its_config_names_the_product():
    for config in (SelectedPaths(), SelectedPaths(GauntGrid(), (0, 2))):
        assert from_dict(TensorProduct, to_dict(config)) == config
    assert to_dict(SelectedPaths(keep=(1, 4))) == {
        "name": "selected_paths",
        "product": {"name": "clebsch_gordan"},
        "keep": [1, 4],
    }


@pytest.mark.parametrize("keep", [(), (0, 0), (2, 1), (0, 13), (-1, 2)], ids=str)
def test_what_cannot_be_kept(keep):
    message = r"expected indices of weights, ascending, each once, at least one, below 13: .* '1x0e"
    with pytest.raises(ValueError, match=message):
        SelectedPaths(keep=keep).bind(*NATURAL)


@pytest.mark.parametrize("sparsity", [1.0, -0.1])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match="expected the share to leave out, 0 <= s < 1"):
        keep_by_gate(jnp.ones(3), sparsity)
    with pytest.raises(ValueError, match="expected the share to leave out, 0 <= s < 1"):
        random_keep(3, sparsity, jax.random.key(0))
