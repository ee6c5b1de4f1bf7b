"""Clebsch-Gordan product, one dense contraction per path: slow, plain, the oracle of all others."""

import dataclasses

import e3nn_jax as e3nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from equizoo.tensor_products._base import BoundProduct, TensorProduct, allowed_paths, coupling


@dataclasses.dataclass(frozen=True)
class ClebschGordanDense(TensorProduct):
    r"""All couplings of angular momentum, evaluated as written.

    .. math:: z^{(p)}_{m_3} = w_p \sqrt{2 l_3 + 1} \sum_{m_1 m_2}
        \begin{pmatrix} l_1 & l_2 & l_3 \\ m_1 & m_2 & m_3 \end{pmatrix} x_{m_1} y_{m_2}

    Reference: Thomas et al. 2018, https://arxiv.org/abs/1802.08219, eq. 6.
    """

    def _bind(
        self, irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps
    ) -> "BoundClebschGordanDense":
        return BoundClebschGordanDense(irreps_1, irreps_2, irreps_out)


class BoundClebschGordanDense(BoundProduct):
    """One einsum per path over float64 couplings cast to the dtype of the arguments."""

    def __init__(self, irreps_1: e3nn.Irreps, irreps_2: e3nn.Irreps, irreps_out: e3nn.Irreps):
        self.irreps_1, self.irreps_2, self.irreps_out = irreps_1, irreps_2, irreps_out
        self.paths = allowed_paths(irreps_1, irreps_2, irreps_out)
        self.irreps_paths = e3nn.Irreps([(1, path.ir_out) for path in self.paths])
        self.into = tuple(path.index_out for path in self.paths)
        self.num_weights = len(self.paths)

    def couple(
        self,
        x: Float[Array, "batch dim_1 channels"],
        y: Float[Array, "batch dim_2 channels_2"],
        weights: Float[Array, "batch_w num_weights channels_w"],
    ) -> Float[Array, "batch dim_paths channels"]:
        slices_1, slices_2 = self.irreps_1.slices(), self.irreps_2.slices()
        y = jnp.broadcast_to(y, (*y.shape[:2], x.shape[2]))
        results = []
        for index, path in enumerate(self.paths):
            product = jnp.einsum(
                "bic,bjc,ijk->bkc",
                x[:, slices_1[path.index_1]],
                y[:, slices_2[path.index_2]],
                jnp.asarray(coupling(path), x.dtype),
                precision="highest",
            )
            results.append(weights[:, index, None] * product)
        return jnp.concatenate(results, axis=1)

    def flops(self, batch: int, channels: int) -> int:
        dims = [(p.ir_1.dim * p.ir_2.dim, p.ir_out.dim) for p in self.paths]
        return batch * channels * sum(pairs + 2 * pairs * out + out for pairs, out in dims)
