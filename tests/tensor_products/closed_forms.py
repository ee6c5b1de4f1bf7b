"""Coefficients of couplings from the literature's formulas, and their comparison with a product."""

import numpy as np
from sympy.physics import wigner

from equizoo.tensor_products.analysis import coefficients


def dimensions(*degrees):
    return float(np.prod([2 * degree + 1 for degree in degrees]))


def gaunt(l_1, l_2, l_3):
    return np.sqrt(dimensions(l_1, l_2, l_3)) * abs(float(wigner.wigner_3j(l_1, l_2, l_3, 0, 0, 0)))


def bracket(l_1, l_2, l_3):
    if (l_1 + l_2 + l_3) % 2 == 0:
        return 0.0
    slopes = l_1 * (l_1 + 1) * l_2 * (l_2 + 1)
    symbol = float(wigner.wigner_3j(l_1, l_2, l_3, 1, -1, 0)) if min(l_1, l_2) else 0.0
    return np.sqrt(dimensions(l_1, l_2, l_3) * slopes) * abs(symbol)


def vector_signal(offsets):
    def coefficient(*degrees):
        lower = [degree + offset for degree, offset in zip(degrees, offsets, strict=True)]
        possible = zip(lower, degrees, strict=True)
        if min(lower) < 0 or not all(abs(low - 1) <= j <= low + 1 for low, j in possible):
            return 0.0
        symbols = wigner.wigner_3j(*lower, 0, 0, 0) * wigner.wigner_9j(*lower, 1, 1, 1, *degrees)
        return np.sqrt(3 * dimensions(*lower) * dimensions(*degrees)) * abs(float(symbols))

    return coefficient


def assert_coefficients(product, formula, weight_of, atol=1e-12):
    """Magnitudes equal the formula's, up to one factor for each irrep of the result.

    That factor makes the variance one. ``weight_of(path)`` is the weight that scales a coupling, or
    ``None`` where the product should not have it.
    """
    found = coefficients(product)
    for index in range(len(product.irreps_out)):
        paths = [(p, path) for p, path in enumerate(found.paths) if path.index_out == index]
        raw = np.zeros((product.num_weights, len(paths)))
        for column, (_, path) in enumerate(paths):
            if (weight := weight_of(path)) is not None:
                raw[weight, column] = formula(path.ir_1.l, path.ir_2.l, path.ir_out.l)
        total = np.sum(raw**2)
        if total > 0:
            raw *= np.sqrt((2 * product.irreps_out[index].ir.l + 1) / total)
        np.testing.assert_allclose(np.abs(found.values[:, [p for p, _ in paths]]), raw, atol=atol)
