"""Clebsch-Gordan products: coefficients in closed form, and the symmetric power they generate."""

import json
from pathlib import Path

import e3nn_jax as e3nn
import jax.numpy as jnp
import numpy as np
import pytest

from equizoo.tensor_products._base import coupling, wigner_3j
from equizoo.tensor_products._symmetric import monomials, symmetric_basis
from equizoo.tensor_products.clebsch_gordan import ClebschGordan
from equizoo.tensor_products.clebsch_gordan_dense import ClebschGordanDense

GOLDEN = Path(__file__).parents[1] / "golden" / "symmetric_basis.json"
NATURAL = {degree: e3nn.Irrep(degree, (-1) ** degree) for degree in range(5)}


def natural(l_max):
    return e3nn.Irreps([(1, NATURAL[degree]) for degree in range(l_max + 1)])


# ---- pairwise ----------------------------------------------------------------------------------


@pytest.mark.parametrize("product", [ClebschGordan(), ClebschGordanDense()], ids=str)
@pytest.mark.parametrize(
    "irreps",
    [("0e+1o+2e", "0e+1o+2e+3o", "0e+1o+2e+3o"), ("0e+0o+1e+1o", "0e+1o+2e", "1e+0o+2o+1o")],
    ids=" x ".join,
)
def test_every_allowed_path_once_with_its_coefficient(product, irreps):
    """``sqrt(2 l_3 + 1)`` over the root of the number of paths into the slot; nothing besides."""
    contents = [e3nn.Irreps(i) for i in irreps]
    blocks = {
        (i, j, k): (place_1, place_2, place_3)
        for k, place_3 in enumerate(contents[2].slices())
        for i, place_1 in enumerate(contents[0].slices())
        for j, place_2 in enumerate(contents[1].slices())
    }
    irs = [[ir for _, ir in content] for content in contents]
    allowed = [
        (i, j, k)
        for i, j, k in blocks
        if abs(irs[0][i].l - irs[1][j].l) <= irs[2][k].l <= irs[0][i].l + irs[1][j].l
        and irs[0][i].p * irs[1][j].p == irs[2][k].p
    ]
    bound = product.bind(*irreps)
    assert [path[:3] for path in bound.paths] == allowed and bound.num_weights == len(allowed)
    dense = bound.dense().copy()
    for weight, (i, j, k) in enumerate(allowed):
        into = sum(1 for path in allowed if path[2] == k)
        degrees = irs[0][i].l, irs[1][j].l, irs[2][k].l
        block = dense[weight][blocks[i, j, k]]
        w = wigner_3j(*degrees)
        expected = np.sqrt(2 * degrees[2] + 1) / np.sqrt(into)
        np.testing.assert_allclose(np.sum(block * w), expected, atol=1e-12)
        block -= expected * w
    assert np.abs(dense).max() < 1e-12


def test_wigner_3j_conventions():
    """Norm one; dot and cross product positive; exchange sign ``(-1)^(l1+l2+l3)``."""
    np.testing.assert_allclose(np.sqrt(3) * wigner_3j(1, 1, 0)[..., 0], np.eye(3), atol=1e-14)
    cross = np.sqrt(6) * wigner_3j(1, 1, 1)
    np.testing.assert_allclose(
        np.einsum("ijk,i,j->k", cross, [1.0, 2, 3], [-1.0, 0, 4]),
        np.cross([1, 2, 3], [-1, 0, 4]),
        atol=1e-14,
    )
    for degrees in [(1, 2, 3), (2, 2, 3), (1, 2, 2), (3, 3, 2)]:
        w = wigner_3j(*degrees)
        np.testing.assert_allclose(np.sum(w**2), 1, atol=1e-14)
        swapped = wigner_3j(degrees[1], degrees[0], degrees[2])
        np.testing.assert_allclose(np.swapaxes(w, 0, 1), (-1) ** sum(degrees) * swapped, atol=1e-14)


def test_coupling_keeps_unit_variance():
    for path in ClebschGordanDense().bind("0e+1o+2e", "0e+1o+2e", "0e+1o+2e").paths:
        np.testing.assert_allclose(np.sum(coupling(path) ** 2, axis=(0, 1)), 1, atol=1e-13)


# ---- symmetric power -----------------------------------------------------------------------------

# Ranks for orders 1, 2, 3 as enumerated from the published U tensors of MACE.
RANKS = {
    (1, 0): (1, 2, 2), (1, 1): (1, 1, 2),
    (2, 0): (1, 3, 5), (2, 1): (1, 2, 5), (2, 2): (1, 3, 6), (2, 3): (0, 1, 4),
    (3, 0): (1, 4, 8), (3, 1): (1, 3, 12), (3, 2): (1, 5, 14), (3, 3): (1, 3, 15),
}  # fmt: skip


def multiplicity(irreps_in, ir_out, order):
    """How often ``ir_out`` is in the symmetric power, from characters of O(3)."""
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)  # exact for these degrees
    measure = (1 - np.cos(angles)) / len(angles)  # Haar, averages to one

    def character(angle, ir):
        return 1 + 2 * sum(np.cos(m * angle) for m in range(1, ir.l + 1)) + 0 * angle

    total = 0.0
    for inversion in (False, True):

        def power_sum(k, inversion=inversion):
            sign = [ir.p if inversion and k % 2 else 1 for _, ir in irreps_in]
            characters = [character(k * angles, ir) for _, ir in irreps_in]
            return sum(s * c for s, c in zip(sign, characters, strict=True))

        p_1, p_2, p_3 = (power_sum(k) for k in (1, 2, 3))
        symmetric = {1: p_1, 2: (p_1**2 + p_2) / 2, 3: (p_1**3 + 3 * p_1 * p_2 + 2 * p_3) / 6}
        sign = ir_out.p if inversion else 1
        total += np.sum(measure * sign * character(angles, ir_out) * symmetric[order]) / 2
    return round(total)


@pytest.mark.parametrize(("l_max", "degree"), RANKS)
def test_ranks_of_the_published_table(l_max, degree):
    found = tuple(
        len(symmetric_basis(natural(l_max), NATURAL[degree], order)) for order in (1, 2, 3)
    )
    assert found == RANKS[l_max, degree]


@pytest.mark.parametrize("irreps", ["0e+1o+2e+3o", "0e+0o+1e+1o", "1o+3o", "1e+2o"])
def test_the_basis_is_complete(irreps):
    """As many independent polynomials as the characters say that there are."""
    irreps = e3nn.Irreps(irreps)
    for order in (1, 2, 3):
        for degree in range(4):
            for parity in (1, -1):
                ir = e3nn.Irrep(degree, parity)
                found = len(symmetric_basis(irreps, ir, order))
                assert found == multiplicity(irreps, ir, order), (ir, order)


def polynomials(basis, order, x):
    """Values of all basis polynomials at points ``x``, monomial by monomial."""
    values = np.ones((*x.shape[:-1], basis.shape[2]))
    for column in monomials(x.shape[-1], order).T:
        values *= x[..., column]
    return np.einsum("kma,...a->...km", basis, values, optimize=True)


@pytest.mark.parametrize("degree", [0, 1, 2])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_basis_is_orthonormal_under_a_gaussian(degree, order):
    """By Gauss-Hermite quadrature with four nodes per variable, exact to degree seven."""
    basis = symmetric_basis(natural(2), NATURAL[degree], order)
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    inner = np.stack(np.meshgrid(*[nodes] * 5, indexing="ij"), -1).reshape(-1, 5)
    inner_weights = np.prod(np.stack(np.meshgrid(*[weights] * 5, indexing="ij")), 0).reshape(-1)
    gram = 0.0
    for index in np.ndindex(4, 4, 4, 4):  # in pieces, to stay small
        outer = np.broadcast_to(nodes[list(index)], (len(inner), 4))
        values = polynomials(basis, order, np.concatenate([outer, inner], axis=1))
        scaled = values * (inner_weights * np.prod(weights[list(index)]))[:, None, None]
        gram += np.tensordot(scaled, values, ([0, 2], [0, 2]))
    gram /= np.sum(weights) ** 9 * (2 * degree + 1)
    np.testing.assert_allclose(gram, np.eye(len(basis)), atol=1e-10)


@pytest.mark.parametrize(
    "irreps",
    [
        ("0e+1o+2e+3o", "0e+1o+2e"),
        ("0e+1o", "1o"),
        ("2e+0e+1o", "1o+2e"),
        ("0e+0o+1e+1o", "0o+1e"),
        ("1o", "1o+1e+2e+3o"),
    ],
    ids=" -> ".join,
)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_power_is_the_weighted_sum_of_the_polynomials(irreps, order):
    if order == 4:  # degree 3 would make thousands of monomials
        irreps = tuple(text.replace("+3o", "").replace("+3e", "") for text in irreps)
    power = ClebschGordan().bind_power(*irreps, order)
    rng = np.random.default_rng(order)
    x = rng.normal(size=(2, 3, power.irreps_in.dim, 2))
    weights = rng.normal(size=(2, power.num_weights, 2))
    expected = np.zeros((2, 3, power.irreps_out.dim, 2))
    start = 0
    for (_, ir), place in zip(power.irreps_out, power.irreps_out.slices(), strict=True):
        for nu in range(1, order + 1):
            basis = symmetric_basis(power.irreps_in, ir, nu)
            values = polynomials(basis, nu, np.swapaxes(x, 2, 3))  # [block, node, channel, k, m]
            mine = weights[:, start : start + len(basis)]
            expected[:, :, place] += np.einsum("bnckm,bkc->bnmc", values, mine)
            start += len(basis)
    assert start == power.num_weights
    found = power(jnp.asarray(x), jnp.asarray(weights))
    np.testing.assert_allclose(found, expected, atol=1e-12 * max(1.0, np.abs(expected).max()))


def test_the_basis_is_the_one_that_stored_weights_rest_on():
    golden = json.loads(GOLDEN.read_text("utf-8"))
    expected = np.zeros(golden["shape"])
    for *place, value in golden["entries"]:
        expected[tuple(place)] = value
    basis = symmetric_basis(natural(2), NATURAL[1], 3)
    np.testing.assert_allclose(basis, expected, atol=1e-10)
    for key, projection in golden["projections"].items():
        l_max, ir, order = key.split(":")
        basis = symmetric_basis(natural(int(l_max)), e3nn.Irrep(ir), int(order))
        numbers = np.cos(np.arange(basis.shape[2]) ** 1.5)
        np.testing.assert_allclose(basis @ numbers, projection, atol=1e-10, err_msg=key)


def test_powers_that_cannot_be_bound():
    with pytest.raises(ValueError, match="order is 5; the symmetric power is built for orders 1"):
        ClebschGordan().bind_power("0e", "0e", 5)
    with pytest.raises(ValueError, match="No polynomial of '1x1o' up to order 2 is '1x0o'"):
        ClebschGordan().bind_power("1o", "0o", 2)
