"""Networks of invariant features."""

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from equizoo.layers.activation import ActivationConstant, normalized_silu
from equizoo.layers.linear import normal_param


class ScalarMLP(nnx.Module):
    """Scalars to scalars: SiLU layers without biases, the last one linear.

    From the radial basis of an edge to the weights of its product, from the scalars of an atom to
    its energy. Zero input gives zero output, so edges whose basis vanishes are inert.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        *,
        activation: ActivationConstant = ActivationConstant.EXACT,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.kernels = nnx.List(
            [normal_param(rngs, shape) for shape in zip(widths[:-1], widths[1:], strict=True)]
        )

    def __call__(self, x: Float[Array, "batch features"]) -> Float[Array, "batch outputs"]:
        silu = normalized_silu(self.activation)
        for index, param in enumerate(self.kernels):
            kernel = param[...].astype(x.dtype)
            x = x @ (kernel / float(np.sqrt(kernel.shape[0])))
            if index < len(self.kernels) - 1:
                x = silu(x)
        return x
