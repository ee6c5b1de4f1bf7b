"""Matrix product: 6j symbols, lost couplings, the two conversions, e3x, powers of matrices."""

import json
import os
import warnings

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import assert_coefficients, dimensions
from sympy.physics import wigner

from equizoo.config import from_dict, to_dict
from equizoo.tensor_products._base import (
    TensorProduct,
    allowed_paths,
    natural_irreps,
    wigner_3j,
)
from equizoo.tensor_products._symmetric import monomials, symmetric_basis
from equizoo.tensor_products.analysis import coefficients, expressivity, interactability
from equizoo.tensor_products.matrix_product import Conversion, MatrixProduct


def both_parities(l_max):
    """All even irreps, then all odd ones: e3x's order."""
    return e3nn.Irreps([(1, (degree, p)) for p in (1, -1) for degree in range(l_max + 1)])


def irreps_of(parity, l_max):
    return e3nn.Irreps([(1, (degree, parity)) for degree in range(l_max + 1)])


CONTENTS = [
    (natural_irreps(3), natural_irreps(3), natural_irreps(6)),
    ("0e+1o+2e", "0e+1o+2e+3o", "1e+2o+3e+4o"),
    ("0e+1e+2o", "0e+1o+2e", both_parities(3)),
    (both_parities(2), "0o+1e+2o+3e", both_parities(3)),
    ("1o+3o", "2e+1e", "3o+1o+2o"),
    ("0e+1e+1o", "1e", "1e"),  # what does not couple must not leak in
]
contents = pytest.mark.parametrize("irreps", CONTENTS, ids=str)


def six_j(*degrees, degree):
    """Of the coupling of matrices of side ``2 degree + 1``, with its sign."""
    symbol = float(wigner.wigner_6j(*degrees, degree, degree, degree))
    return (-1) ** degrees[2] * np.sqrt(dimensions(*degrees)) * symbol


# ---- couplings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [None, 3, 4])
@contents
def test_coefficients_are_6j_symbols(irreps, degree):
    product = MatrixProduct(degree=degree).bind(*irreps)
    used = sorted({path.index_2 for path in product.paths})
    assert_coefficients(
        product,
        lambda *degrees: abs(six_j(*degrees, degree=product.degree)),
        lambda path: used.index(path.index_2),
    )
    found = coefficients(product)
    for p, path in enumerate(found.paths):
        expected = six_j(path.ir_1.l, path.ir_2.l, path.ir_out.l, degree=product.degree)
        assert found.values[used.index(path.index_2), p] * expected > 0


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_matrix_bases_couple_by_6j_symbols(degree):
    """The trace of three basis matrices, of all degrees up to six; zeros among them."""
    l_max = min(2 * degree, 6)
    basis = [np.sqrt(2 * ell + 1) * wigner_3j(degree, degree, ell) for ell in range(l_max + 1)]
    zeros = []
    for a, left in enumerate(basis):
        for b, right in enumerate(basis[: a + 1]):
            products = np.einsum("pqi,qrj->ijpr", left, right, optimize=True)
            for c in range(abs(a - b), min(a + b, l_max) + 1):
                coupled = np.tensordot(products, basis[c], 2)
                expected = six_j(a, b, c, degree=degree) * wigner_3j(a, b, c)
                np.testing.assert_allclose(coupled, expected, atol=1e-12)
                if np.abs(expected).max() == 0:
                    zeros.append((a, b, c))
    assert zeros == ([(5, 3, 5), (5, 5, 3)] if degree == 3 else [])


@pytest.mark.parametrize(
    ("l_max", "degree"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 4), (6, 4)], ids=str
)
def test_the_default_degree_loses_nothing(l_max, degree):
    irreps = both_parities(l_max)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        product = MatrixProduct().bind(irreps, irreps, irreps)
    assert product.degree == degree
    assert product.paths == allowed_paths(irreps, irreps, irreps)


def test_the_default_degree_looks_at_the_couplings_there_are():
    """(3, 5, 5) needs a pseudo-tensor; an irrep that nothing reaches needs no room."""
    natural = natural_irreps(5)
    assert MatrixProduct().bind(natural, natural, natural).degree == 3
    assert MatrixProduct().bind("0e+1o", "0e+1o", "0e+1e+8e").degree == 1


def test_lost_couplings_are_named_and_left_out():
    irreps = ("2e+3o", "5o", "3o+5e")
    message = r"degree 3 loses 1 of 2 couplings.*: 3o x 5o -> 5e\. degree=4 has them all"
    with pytest.warns(UserWarning, match=message):
        product = MatrixProduct(degree=3).bind(*irreps)
    listed = [(str(p.ir_1), str(p.ir_2), str(p.ir_out)) for p in product.paths]
    assert ("3o", "5o", "5e") not in listed and len(listed) == 1
    present = {path for path, there in interactability(product).items() if there}
    assert present == set(product.paths)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(MatrixProduct(degree=4).bind(*irreps).paths) == 2


def test_degrees_that_cannot_be_bound():
    with pytest.raises(ValueError, match=r"degree is 1, expected at least 2: .* 3o is coupled"):
        MatrixProduct(degree=1).bind("0e+1o", "2e", "3o")
    with (
        pytest.warns(UserWarning, match="degree 3 loses 1 of 1 couplings"),
        pytest.raises(ValueError, match="No path couples .* at degree 3, where their 6j"),
    ):
        MatrixProduct(degree=3).bind("3o", "5o", "5e")
    with pytest.raises(ValueError, match="degree is 0, expected at least 1"):
        MatrixProduct(degree=0).bind_power("0e+1o", "0e", 2)


@pytest.mark.parametrize("l_max", [1, 2])
def test_expressivity_grows_linearly(l_max):
    """One number for each irrep, of both factors and of the result, less two."""
    irreps = irreps_of(1, l_max), irreps_of(1, l_max), irreps_of(1, 2 * l_max)
    assert expressivity(MatrixProduct().bind(*irreps)) == 4 * l_max + 1


def test_options_round_trip():
    product = MatrixProduct(degree=4, conversion=Conversion.SPARSE)
    written = to_dict(product)
    assert written == {"name": "matrix_product", "degree": 4, "conversion": "sparse"}
    assert from_dict(TensorProduct, json.loads(json.dumps(written))) == product
    assert from_dict(TensorProduct, "matrix_product") == MatrixProduct()


# ---- conversions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_2", [1, 2])
@pytest.mark.parametrize("irreps", [CONTENTS[2], CONTENTS[4], CONTENTS[5]], ids=str)
def test_dense_and_sparse_conversion_agree(irreps, channels_2):
    products = [
        MatrixProduct(conversion=conversion).bind(*irreps)
        for conversion in (Conversion.DENSE, Conversion.SPARSE)
    ]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, products[0].irreps_1.dim, 2)))
    y = jnp.asarray(rng.normal(size=(3, products[0].irreps_2.dim, channels_2)))
    weights = jnp.asarray(rng.normal(size=(3, products[0].num_weights, 2)))
    dense, sparse = (jax.jit(product.__call__)(x, y, weights) for product in products)
    assert np.abs(dense).max() > 0.1
    np.testing.assert_allclose(dense, sparse, atol=1e-13)


def test_sparse_conversion_takes_fewer_operations():
    irreps = natural_irreps(6), natural_irreps(6), natural_irreps(6)
    sparse, dense, auto = (
        MatrixProduct(conversion=conversion).bind(*irreps).flops(1, 1)
        for conversion in (Conversion.SPARSE, Conversion.DENSE, Conversion.AUTO)
    )
    assert sparse < dense == auto
    small = natural_irreps(2), natural_irreps(2), natural_irreps(2)
    sparse, auto = (
        MatrixProduct(conversion=conversion).bind(*small).flops(1, 1)
        for conversion in (Conversion.SPARSE, Conversion.AUTO)
    )
    assert sparse == auto


# ---- against e3x ---------------------------------------------------------------------------------


def change_of_basis(e3x, l_max):
    """Components of e3nn to those of e3x, from both libraries' harmonics of random directions."""
    points = np.random.default_rng(0).normal(size=(200, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    harmonics = jax.jit(lambda r: e3x.so3.spherical_harmonics(r, l_max))
    theirs = np.asarray(harmonics(jnp.asarray(points)))
    ours = e3nn.spherical_harmonics(
        natural_irreps(l_max), jnp.asarray(points), normalize=False, normalization="norm"
    ).array
    matrix, *_ = np.linalg.lstsq(np.asarray(ours), theirs, rcond=None)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(len(matrix)), atol=1e-12)
    return matrix.T


@pytest.mark.parametrize("l_max", [2, 3])
def test_equals_the_fused_tensor_of_e3x(l_max):
    if not os.environ.get("EQUIZOO_PARITY"):
        pytest.importorskip("e3x", reason="e3x, the oracle, is not installed; 'make parity' does")
    import e3x

    irreps, channels = both_parities(l_max), 2
    product = MatrixProduct(degree=-(-l_max // 2)).bind(irreps, irreps, irreps)
    rng = np.random.default_rng(l_max)
    x, y = (rng.normal(size=(3, irreps.dim, channels)) for _ in range(2))
    weights = rng.normal(size=(1, product.num_weights, channels))
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        change = change_of_basis(e3x, l_max)
        ones = ("e1", "o1", "eee", "ooe", "eoo", "oeo")
        kernel = {f"kernel_{name}": np.ones((l_max + 1, channels)) for name in ones}
        kernel["kernel_e2"], kernel["kernel_o2"] = np.split(weights[0], 2)
        fused = e3x.nn.FusedTensor(max_degree=l_max, dtype=jnp.float64)
        theirs = jax.jit(fused.apply)({"params": kernel}, *(fold(a, change) for a in (x, y)))
    found = jax.jit(product.__call__)(jnp.asarray(x), jnp.asarray(y), jnp.asarray(weights))
    # e3x leaves the variance as it comes out
    variance = [
        sum(
            six_j(p.ir_1.l, p.ir_2.l, p.ir_out.l, degree=product.degree) ** 2 / p.ir_out.dim
            for p in product.paths
            if p.index_out == index
        )
        for index in range(len(irreps))
    ]
    scale = np.repeat(np.sqrt(variance), [ir.dim for _, ir in irreps])[:, None]
    np.testing.assert_allclose(fold(np.asarray(found) * scale, change), theirs, atol=1e-12)


def fold(x, change):
    """Parity on an axis of its own, components as in e3x."""
    return np.einsum("ij,bpjc->bpic", change, x.reshape(len(x), 2, len(change), -1))


# ---- power ---------------------------------------------------------------------------------------

POWERS = [
    (natural_irreps(2), natural_irreps(2), 3),
    (natural_irreps(1), "0e+1o+2e", 4),
    ("1o+3o", "0e+1o+2e", 3),
    ("0e+2e", "0e+2e+4e", 3),
    ("0e+0o+1e+1o", "0o+1o+1e", 3),
]


@pytest.mark.parametrize(("irreps_in", "irreps_out", "order"), POWERS, ids=str)
def test_polynomials_are_projected_powers_of_unit_variance(irreps_in, irreps_out, order):
    """Against matrices multiplied parity by parity; unit length on an orthonormal basis."""
    power = MatrixProduct().bind_power(irreps_in, irreps_out, order)
    irreps_in, irreps_out = power.irreps_in, power.irreps_out
    rng = np.random.default_rng(order)
    x = rng.normal(size=(300, irreps_in.dim))
    basis = [np.sqrt(2 * ell + 1) * wigner_3j(power.degree, power.degree, ell)
             for ell in range(2 * power.degree + 1)]  # fmt: skip
    parts = {1: 0.0, -1: 0.0}
    for (_, ir), place in zip(irreps_in, irreps_in.slices(), strict=True):
        parts[ir.p] += np.einsum("pqm,nm->npq", basis[ir.l], x[:, place])
    side = (len(x), 2 * power.degree + 1, 2 * power.degree + 1)
    first = {p: np.broadcast_to(part, side) for p, part in parts.items()}
    product = first
    evaluate, reached = jax.jit(power.__call__), 0
    for nu in range(1, order + 1):
        if nu > 1:
            product = {
                1: product[1] @ first[1] + product[-1] @ first[-1],
                -1: product[1] @ first[-1] + product[-1] @ first[1],
            }
        features = np.prod(x[:, monomials(irreps_in.dim, nu)], axis=2)
        for index, ((_, ir), place) in enumerate(zip(irreps_out, irreps_out.slices(), strict=True)):
            expected = np.einsum("pqm,npq->nm", basis[ir.l], product[ir.p])
            mine = power.weight_slices[index, nu]
            if mine.start == mine.stop:
                assert np.abs(expected).max() < 1e-12
                continue
            reached += 1
            weights = jnp.zeros((1, power.num_weights, 1)).at[:, mine].set(1.0)
            values = evaluate(jnp.asarray(x)[None, ..., None], weights)[0, :, place, 0]
            ratio = np.sum(values * expected) / np.sum(expected**2)
            assert ratio > 0
            np.testing.assert_allclose(values, ratio * expected, atol=1e-11)
            polynomials = symmetric_basis(irreps_in, ir, nu)
            columns = np.einsum("wkm,nm->nkw", polynomials, features).reshape(-1, len(polynomials))
            solution, *_ = np.linalg.lstsq(columns, np.asarray(values).ravel(), rcond=None)
            np.testing.assert_allclose(columns @ solution, np.ravel(values), atol=1e-10)
            np.testing.assert_allclose(np.linalg.norm(solution), 1, atol=1e-10)
    assert reached == power.num_weights > order


@pytest.mark.parametrize("irreps_in", ["0e+1o+2e", "1o+3o"])
def test_conversions_of_the_power_agree(irreps_in):
    powers = [
        MatrixProduct(conversion=conversion).bind_power(irreps_in, "0e+1o+2e", 3)
        for conversion in (Conversion.DENSE, Conversion.SPARSE)
    ]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, powers[0].irreps_in.dim, 2)))
    weights = jnp.asarray(rng.normal(size=(2, powers[0].num_weights, 2)))
    dense, sparse = (jax.jit(power.__call__)(x, weights) for power in powers)
    np.testing.assert_allclose(dense, sparse, atol=1e-12 * np.abs(dense).max())


def test_lost_couplings_of_the_power_are_named():
    message = "degree 6 loses 2 of 6 couplings.*: 3o x 5o -> 6e, 5o x 3o -> 6e.*degree=3 has them"
    with pytest.warns(UserWarning, match=message):
        power = MatrixProduct(degree=6).bind_power("3o+5o", "0e+6e", 2)
    assert power.num_weights == 2  # 6e comes from 3o x 3o and from 5o x 5o still
    assert MatrixProduct().bind_power("3o+5o", "0e+6e", 2).degree == 3


def test_powers_that_cannot_be_bound():
    with pytest.raises(ValueError, match=r"No polynomial of .* up to order 3 is '1x1e'"):
        MatrixProduct().bind_power("0e+1o+2e", "1e", 3)
    with pytest.raises(ValueError, match=r"a sum over 16\^7 terms, expected at most 16777216"):
        MatrixProduct().bind_power(natural_irreps(3), "0e", 7)
