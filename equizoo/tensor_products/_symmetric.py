"""Bases of equivariant polynomials: the symmetric powers of a representation."""

import functools
import itertools
import math

import e3nn_jax as e3nn
import numpy as np
from jaxtyping import Float, Int

from equizoo.tensor_products._base import wigner_3j


@functools.cache
def monomials(dim: int, order: int) -> Int[np.ndarray, "monomials order"]:
    """Multi-indices ``a <= b <= ...`` of all monomials of an order in ``dim`` variables."""
    return np.array(list(itertools.combinations_with_replacement(range(dim), order)), dtype=int)


@functools.cache
def symmetric_basis(
    irreps_in: e3nn.Irreps, ir_out: e3nn.Irrep, order: int
) -> Float[np.ndarray, "functions dim_out monomials"]:
    r"""All homogeneous equivariant polynomials of one order and type, without redundancy.

    Entry ``[k, m]`` holds the coefficients of component ``m`` of polynomial ``k`` on
    :func:`monomials`. The polynomials are orthonormal for a standard normal argument,

    .. math:: \frac{1}{2l+1} \sum_m E[B_{k m}(x) B_{k' m}(x)] = \delta_{k k'},

    and come from Gram-Schmidt on couplings in a fixed order, so that the basis (and with it the
    meaning of stored weights) is the same on every machine.

    Reference: Dusson et al. 2022, https://arxiv.org/abs/1911.03550 (symmetrised couplings).
    """
    gram = _gaussian_gram(irreps_in.dim, order) / ir_out.dim
    shape = (0, ir_out.dim, len(gram))
    basis, dual = np.zeros(shape), np.zeros(shape)  # dual = basis @ gram
    for candidate in _couplings(irreps_in, ir_out, order):
        scale = np.sqrt(np.sum(candidate @ gram * candidate))
        if scale < 1e-9:
            continue
        vector = candidate / scale
        for _ in range(2):  # twice is enough for orthogonality to rounding
            vector = vector - np.tensordot(np.tensordot(dual, vector, 2), basis, 1)
        norm = np.sqrt(np.sum(vector @ gram * vector))
        if norm > 1e-6:
            basis = np.concatenate([basis, vector[None] / norm])
            dual = np.concatenate([dual, (vector @ gram)[None] / norm])
    return basis


def _couplings(irreps_in: e3nn.Irreps, ir_out: e3nn.Irrep, order: int):
    """Polynomials of type ``ir_out`` that span the space, as coefficients on monomials."""
    dim = irreps_in.dim
    if order == 1:
        for (_, ir), place in zip(irreps_in, irreps_in.slices(), strict=True):
            if ir == ir_out:
                yield np.eye(dim)[place]
        return
    raise_order = _raise_order(dim, order)
    l_max = (order - 1) * max(ir.l for _, ir in irreps_in)
    for l_lower, p_lower in itertools.product(range(l_max + 1), (1, -1)):
        lower = e3nn.Irrep(l_lower, p_lower)
        partners = [
            (ir, place)
            for (_, ir), place in zip(irreps_in, irreps_in.slices(), strict=True)
            if ir_out in lower * ir
        ]
        if not partners:
            continue
        for polynomial in symmetric_basis(irreps_in, lower, order - 1):
            for ir, place in partners:
                pairs = np.einsum(
                    "ijm,ia->maj", wigner_3j(lower.l, ir.l, ir_out.l), polynomial
                )  # [m, lower monomial, component of the new factor]
                coefficients = np.zeros((ir_out.dim, len(monomials(dim, order))))
                # numpy's stub knows no tuple of indices
                np.add.at(coefficients, (slice(None), raise_order[:, place]), pairs)  # type: ignore[arg-type]
                yield coefficients


@functools.cache
def _raise_order(dim: int, order: int) -> Int[np.ndarray, "lower dim"]:
    """Index of the monomial that a lower monomial times one more variable gives."""
    index = {tuple(m): i for i, m in enumerate(monomials(dim, order))}
    lower = monomials(dim, order - 1)
    return np.array([[index[tuple(sorted((*m, a)))] for a in range(dim)] for m in lower])


@functools.cache
def _gaussian_gram(dim: int, order: int) -> Float[np.ndarray, "monomials monomials"]:
    """Expectation of the product of two monomials of standard normal variables."""
    powers = np.zeros((len(monomials(dim, order)), dim), dtype=int)
    for column in monomials(dim, order).T:
        powers[np.arange(len(powers)), column] += 1
    moments = np.array([0.0 if n % 2 else math.prod(range(1, n, 2)) for n in range(2 * order + 1)])
    gram = np.ones((len(powers), len(powers)))
    for variable in powers.T:
        gram *= moments[variable[:, None] + variable[None, :]]
    return gram
