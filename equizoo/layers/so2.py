"""Uniform features in the frame of an edge, where rotations about it are all that is left.

Uniform features are ``[n, (l_max + 1)^2, channels]``, all degrees with as many channels. In the
frame the edge is the polar axis and only orders ``|m| <= m_max`` are kept, sorted by order:
``m = 0`` of all degrees, then for each ``m > 0`` those of ``+m`` and those of ``-m``.
"""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from equizoo.graph import Graph, gather_receivers, gather_senders, sum_receivers
from equizoo.layers.products import Products
from equizoo.layers.radial_network import Affine, uniform_param
from equizoo.tensor_products._matrices import apply_matrices, apply_transposed
from equizoo.tensor_products._so3 import rotations_to_pole, unit_vectors, wigner_matrices


@functools.cache
def frame_order(l_max: int, m_max: int) -> Int[np.ndarray, " components"]:
    """Which of the ``(l_max + 1)^2`` components stands where in the frame."""
    signed = [0] + [sign * m for m in range(1, m_max + 1) for sign in (1, -1)]
    return np.array(
        [degree * (degree + 1) + m for m in signed for degree in range(abs(m), l_max + 1)]
    )


@functools.cache
def frame_scales(l_max: int, m_max: int) -> Float[np.ndarray, " components"]:
    """``sqrt((2l + 1) / (2 m_max + 1))`` where orders are missing: what they leave is scaled up."""
    degrees = np.floor(np.sqrt(frame_order(l_max, m_max))).astype(int)
    return np.sqrt(np.maximum((2 * degrees + 1) / (2 * m_max + 1), 1))


def frame_rows(
    vectors: Float[Array, "edges 3"], l_max: int, m_max: int
) -> Float[Array, "edges components dim"]:
    """Matrices from uniform features to the frame of each vector.

    The frame's angle about the vector is a function of the vector, smooth but at the equator (see
    ``rotations_to_pole``). Whatever commutes with rotations about the edge does not depend on it.
    """
    rotations = rotations_to_pole(unit_vectors(vectors))
    dim, rows, sources = (l_max + 1) ** 2, [], []
    for degree, matrix in enumerate(wigner_matrices(rotations, l_max)):
        m = min(degree, m_max)
        kept = matrix[:, degree - m : degree + m + 1]
        rows.append(jnp.pad(kept, ((0, 0), (0, 0), (degree**2, dim - (degree + 1) ** 2))))
        sources += list(range(degree**2 + degree - m, degree**2 + degree + m + 1))
    place = {source: index for index, source in enumerate(sources)}
    order = np.array([place[int(source)] for source in frame_order(l_max, m_max)])
    return jnp.concatenate(rows, axis=1)[:, order]


def ends_in_frames(
    x: Float[Array, "nodes dim channels"],
    rows: Float[Array, "edges components dim"],
    graph: Graph,
) -> Float[Array, "edges components twice_channels"]:
    """Features of the sender, then of the receiver, in the frame of each edge.

    In rows of the graph, frames of all edges of a receiver make one matrix for its features, which
    are then never copied to the edges.
    """
    senders = apply_matrices(rows, gather_senders(x, graph))
    if graph.slots is None:
        receivers = apply_matrices(rows, gather_receivers(x, graph))
    else:
        stacked = rows.reshape(graph.num_nodes, -1, rows.shape[2])
        receivers = apply_matrices(stacked, x).reshape(senders.shape)
    return jnp.concatenate([senders, receivers], axis=2)


def sum_from_frames(
    y: Float[Array, "edges components channels"],
    rows: Float[Array, "edges components dim"],
    graph: Graph,
) -> Float[Array, "nodes dim channels"]:
    """Features in the frames of edges turned back, and summed over the edges of each receiver.

    In rows of the graph this is one matrix product for each node: nothing of the size of ``dim``
    is made for edges.
    """
    if graph.slots is None:
        return sum_receivers(apply_transposed(rows, y), graph)
    y = jnp.where(graph.edge_mask[:, None, None], y, 0)
    stacked = (a.reshape(graph.num_nodes, -1, a.shape[2]) for a in (rows, y))
    return apply_transposed(*stacked)


class SO2Linear(nnx.Module):
    r"""The linear maps that commute with rotations about the edge.

    .. math:: y_0 = W_0 x_0 + b, \qquad y_m + i y_{-m} = (U_m + i V_m) (x_m + i x_{-m})

    mixing degrees and channels; real ``W``, ``U``, ``V``. ``scalars`` more outputs of ``m = 0``
    come first. Reflections turn ``V`` around, so it does not commute with them.

    Reference: Passaro and Zitnick 2023 (eSCN), https://arxiv.org/abs/2302.03655, section 4.2.
    """

    def __init__(
        self,
        l_max: int,
        m_max: int,
        channels_in: int,
        channels_out: int,
        *,
        scalars: int = 0,
        products: Products = Products.FULL,
        rngs: nnx.Rngs,
    ):
        self.l_max, self.channels_out, self.scalars = l_max, channels_out, scalars
        self.products = products
        self.widths = tuple((l_max - m + 1) * channels_in for m in range(m_max + 1))
        self.axial = Affine(
            self.widths[0], scalars + (l_max + 1) * channels_out, products=products, rngs=rngs
        )
        # both parts of all orders side by side: [(l, channel in), (part, l, channel out)]
        self.planar = nnx.List(
            [
                uniform_param(
                    rngs, (width, 2 * (l_max - m + 1) * channels_out), (2 * width) ** -0.5
                )
                for m, width in enumerate(self.widths[1:], start=1)
            ]
        )

    @property
    def num_weights(self) -> int:
        """Factors of the input that may differ between edges; +m and -m share theirs."""
        return sum(self.widths)

    def __call__(
        self,
        x: Float[Array, "edges components channels_in"],
        weights: Float[Array, "edges num_weights"] | None = None,
    ) -> tuple[Float[Array, "edges scalars"], Float[Array, "edges components channels_out"]]:
        """The scalars and the other outputs; ``weights`` multiply the input."""
        edges = x.shape[0]
        axial = x[:, : self.l_max + 1].reshape(edges, -1)
        start, first = self.l_max + 1, self.widths[0]
        if weights is not None:
            axial = axial * weights[:, :first]
        axial = self.axial(axial)
        results = [axial[:, self.scalars :].reshape(edges, -1, self.channels_out)]
        for m, (width, param) in enumerate(zip(self.widths[1:], self.planar, strict=True), start=1):
            count = self.l_max - m + 1
            plane = x[:, start : start + 2 * count].reshape(edges, 2, width)
            start += 2 * count
            if weights is not None:
                plane = plane * weights[:, None, first : first + width]
            first += width
            plane = _complex_product(plane, param[...].astype(x.dtype), self.products)
            results.append(plane.reshape(edges, 2 * count, self.channels_out))
        return axial[:, : self.scalars], jnp.concatenate(results, axis=1)


def _complex_product(
    x: Float[Array, "edges 2 width"], weights: Float[Array, "width twice_out"], products: Products
) -> Float[Array, "edges 2 out"]:
    """``(x_0 + i x_1) (U + i V)``; ``weights`` are ``U`` and ``V`` side by side.

    Three real products do for four, by way of sums; rounded arguments would lose in the sums.
    """
    if products is not Products.FULL:
        both = products.of(x, weights).reshape(len(x), 2, 2, -1)
        real, imaginary = both[:, 0, 0] - both[:, 1, 1], both[:, 1, 0] + both[:, 0, 1]
        return jnp.stack([real, imaginary], axis=1)
    real, imaginary = jnp.split(weights, 2, axis=1)
    shared = (x[:, 0] + x[:, 1]) @ real
    first = shared - x[:, 1] @ (real + imaginary)
    return jnp.stack([first, shared + x[:, 0] @ (imaginary - real)], axis=1)
