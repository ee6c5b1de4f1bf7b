"""Features whose irreps have different numbers of channels, and maps that act on each irrep.

Such features are a dict from the name of an irrep to an array ``[n, 2l + 1, channels]``.
"""

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from equizoo.layers.activation import ActivationConstant, normalized_silu
from equizoo.layers.gating import normalized_sigmoid
from equizoo.layers.linear import normal_param

Features = dict[str, Float[Array, "n _ _"]]
SCALAR = "0e"
_UNREADABLE = (
    "'{irreps}' must name each irrep once with at least one channel, and 0e among them, as in "
    "'128x0e+64x1e+32x2e'."
)


def channels_of(irreps: str) -> dict[str, int]:
    """Channels of every irrep of, say, ``128x0e+64x1e``, in that order.

    Raises ``ValueError`` when it cannot be read, an irrep is there twice, or there is no ``0e``.
    """
    channels = _channels(irreps)
    if SCALAR not in channels:
        raise ValueError(_UNREADABLE.format(irreps=irreps))
    return channels


def _channels(irreps: str) -> dict[str, int]:
    try:
        entries = [(str(ir), mul) for mul, ir in e3nn.Irreps(irreps)]
    except (ValueError, AssertionError) as error:
        raise ValueError(f"'{irreps}' is not like '128x0e+64x1e+32x2e': {error}") from error
    channels = dict(entries)
    if len(channels) != len(entries) or not all(channels.values()):
        raise ValueError(_UNREADABLE.format(irreps=irreps))
    return channels


def irreps_of(channels: dict[str, int]) -> str:
    """The text that :func:`channels_of` reads."""
    return "+".join(f"{mul}x{ir}" for ir, mul in channels.items())


class FeaturesLinear(nnx.Module):
    r"""``y_{l m d} = \sum_c W^l_{c d} x_{l m c} + b_d``, the bias for ``0e`` alone.

    Weights are drawn with variance ``1 / channels``, and are used as they are. Irreps of the
    result that the input lacks raise ``ValueError``. Without a bias the result needs no ``0e``.
    """

    def __init__(self, irreps_in: str, irreps_out: str, *, use_bias: bool = True, rngs: nnx.Rngs):
        channels_in = channels_of(irreps_in)
        channels_out = channels_of(irreps_out) if use_bias else _channels(irreps_out)
        if missing := [ir for ir in channels_out if ir not in channels_in]:
            raise ValueError(
                f"No linear map makes {', '.join(missing)} of '{irreps_out}' from '{irreps_in}'."
            )
        self.kernels = nnx.Dict(
            {
                ir: normal_param(rngs, (channels_in[ir], mul), channels_in[ir] ** -0.5)
                for ir, mul in channels_out.items()
            }
        )
        self.bias = nnx.Param(jnp.zeros(channels_out[SCALAR], jnp.float32)) if use_bias else None

    def __call__(self, x: Features, count: Float[Array, "n 1"] | None = None) -> Features:
        """``count``: how often the bias is added, for an ``x`` that is a sum of features; once."""
        result = {
            ir: x[ir] @ kernel[...].astype(x[ir].dtype) for ir, kernel in self.kernels.items()
        }
        return self.biased(result, count)

    def biased(self, result: Features, count: Float[Array, "n 1"] | None = None) -> Features:
        """What the kernels made, and the bias."""
        result = dict(result)
        if self.bias is not None:
            scalars = result[SCALAR]
            bias = self.bias[...].astype(scalars.dtype)[None, None]
            result[SCALAR] = scalars + (bias if count is None else count[:, :, None] * bias)
        return result


def with_gates(irreps: str) -> str:
    """The input of :func:`gate` whose output is ``irreps``: one more scalar for each non-scalar."""
    channels = channels_of(irreps)
    gates = sum(mul for ir, mul in channels.items() if ir != SCALAR)
    return irreps_of(channels | {SCALAR: channels[SCALAR] + gates})


def gate(
    x: Features, irreps: str, constant: ActivationConstant = ActivationConstant.EXACT
) -> Features:
    """SiLU of the first scalars; every other channel times the sigmoid of a scalar of its own.

    Both with unit second moment. ``0o`` is gated as a vector is, since SiLU would break its parity.
    """
    silu = normalized_silu(constant)
    channels = channels_of(irreps)
    others = [ir for ir in channels if ir != SCALAR]
    sizes = [channels[ir] for ir in (SCALAR, *others)]
    # split, not indexing: its transpose is one concatenation
    scalars, *gates = jax.lax.split(x[SCALAR], sizes, axis=2)
    gated = {
        ir: x[ir] * normalized_sigmoid(part, constant)
        for ir, part in zip(others, gates, strict=True)
    }
    return {ir: silu(scalars) if ir == SCALAR else gated[ir] for ir in channels}


def add(x: Features, y: Features) -> Features:
    """The sum, irrep by irrep."""
    return {ir: x[ir] + y[ir] for ir in x}
