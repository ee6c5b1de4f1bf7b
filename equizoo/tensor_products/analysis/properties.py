"""Every product side by side: what it can express, what it costs, how equivariant it is."""

import dataclasses
import functools
from collections.abc import Sequence

import e3nn_jax as e3nn

from equizoo.registry import TENSOR_PRODUCTS
from equizoo.tensor_products._base import TensorProduct, allowed_paths, bind_reached, natural_irreps
from equizoo.tensor_products.analysis import equivariance_defect, expressivity, interactability

_SINGLE = 4  # [bytes] of a number in float32


@dataclasses.dataclass(frozen=True)
class Properties:
    """Of features times harmonics up to ``l_max``, into every irrep up to ``l_max``.

    Both factors are true tensors (0e, 1o, 2e, ...), results of either parity count.
    """

    product: str
    l_max: int
    allowed: int  # couplings that angular momentum and parity allow
    contained: int  # of those, in the product
    num_weights: int  # for each channel
    expressivity: int  # dimension of the family of maps, scales of irreps included
    defect: float  # relative, of equivariance under rotations and reflections
    flops: int  # for each item and channel, forward, the second factor with one channel for each
    bytes: int  # for each item and channel in float32: both factors, weights, result


def properties(product: TensorProduct, l_max: int) -> Properties:
    """What the product is at this degree, measured on its dense tensor in float64.

    Raises ``ValueError`` where the product does not exist at this degree.
    """
    inputs = natural_irreps(l_max)
    degrees = range(l_max + 1)
    results = e3nn.Irreps([(1, (degree, parity)) for degree in degrees for parity in (1, -1)])
    bound = bind_reached(functools.partial(product.bind, inputs, inputs), results)
    numbers = bound.irreps_1.dim + bound.irreps_2.dim + bound.num_weights + bound.irreps_out.dim
    return Properties(
        product=next(name for name, cls in TENSOR_PRODUCTS.items() if isinstance(product, cls)),
        l_max=l_max,
        allowed=len(allowed_paths(inputs, inputs, results)),
        contained=sum(interactability(bound).values()),
        num_weights=bound.num_weights,
        expressivity=expressivity(bound),
        defect=equivariance_defect(bound),
        flops=bound.flops(1, 1),
        bytes=_SINGLE * numbers,
    )


def table(l_max: int, names: Sequence[str] = ()) -> tuple[list[Properties], dict[str, str]]:
    """A row for each registered product (or those named), and why the others have none.

    Raises ``UnknownName``, a ``ValueError``, for a name that is not registered.
    """
    rows, problems = [], {}
    classes = {name: TENSOR_PRODUCTS[name] for name in names or list(TENSOR_PRODUCTS)}
    for name, cls in classes.items():
        try:
            rows.append(properties(cls(), l_max))
        except ValueError as error:
            problems[name] = str(error)
    return rows, problems
