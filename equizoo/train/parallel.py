"""A step over the parts of a batch: on many devices at once, or on one after the other."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

T = TypeVar("T")

_PARTS = "parts"
_EVERYWHERE, _SHARED = PartitionSpec(), PartitionSpec(_PARTS)


def make_mesh(parts: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """As many of the devices (by default all) as can share the parts equally."""
    devices = jax.devices() if devices is None else devices
    number = largest_share(parts, len(devices))
    return jax.make_mesh(
        (number,), (_PARTS,), axis_types=(AxisType.Auto,), devices=devices[:number]
    )


def largest_share(parts: int, devices: int) -> int:
    """The largest number of devices, at most ``devices``, that divides the number of parts."""
    return next(n for n in range(min(parts, devices), 0, -1) if parts % n == 0)


def replicated(mesh: Mesh, tree: T) -> T:
    """The arrays, whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, _EVERYWHERE))


def shared(mesh: Mesh, parts: Sequence[T]) -> T:
    """Batches of one shape as one tree, with a leading axis that is spread over the devices."""
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
    return jax.device_put(stacked, NamedSharding(mesh, _SHARED))


def summed_over_parts(mesh: Mesh, evaluate: Callable[..., T]) -> Callable[[Any, Any], T]:
    """``(everywhere, parts) -> sum over parts of evaluate(everywhere, part, index)``.

    ``parts`` have a leading axis, ``index`` counts along it. A device takes its share one after the
    other, so that one part is in memory at a time. The sum does not depend on the number of
    devices, but for the order of its terms.
    """

    def on_device(everywhere: Any, parts: Any, index: Int[Array, " share"]) -> T:
        def add(total, part):
            return jax.tree.map(jnp.add, total, evaluate(everywhere, *part)), None

        first = jax.tree.map(lambda leaf: leaf[0], (parts, index))
        nothing = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(evaluate, everywhere, *first),
        )
        total, _ = jax.lax.scan(add, nothing, (parts, index))
        return jax.lax.psum(total, _PARTS)

    def summed(everywhere: Any, parts: Any) -> T:
        number = jax.tree.leaves(parts)[0].shape[0]
        # derivatives are taken inside: nothing is transposed through the sum over devices
        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(_EVERYWHERE, _SHARED, _SHARED),
            out_specs=_EVERYWHERE,
            check_vma=False,
        )(everywhere, parts, jnp.arange(number, dtype=jnp.int32))

    return summed
