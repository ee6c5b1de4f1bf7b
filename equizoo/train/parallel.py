"""A step over the parts of a batch: on many devices at once, of many processes, or in turn."""

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


def make_mesh(parts: int) -> Mesh:
    """As many devices as can share the parts equally, and equally many of each process."""
    share = local_parts(parts)
    number = largest_share(share, jax.local_device_count())
    devices = [
        device
        for process in range(jax.process_count())
        for device in [d for d in jax.devices() if d.process_index == process][:number]
    ]
    return jax.make_mesh((len(devices),), (_PARTS,), axis_types=(AxisType.Auto,), devices=devices)


def local_parts(parts: int) -> int:
    """How many parts of a batch are this process's; ``ValueError`` if they cannot be shared."""
    if parts % jax.process_count():
        raise ValueError(
            f"{parts} microbatches cannot be shared equally by {jax.process_count()} processes; "
            "set microbatches to a multiple (and batch_size to a multiple of that)."
        )
    return parts // jax.process_count()


def largest_share(parts: int, devices: int) -> int:
    """The largest number of devices, at most ``devices``, that divides the number of parts."""
    return next(n for n in range(min(parts, devices), 0, -1) if parts % n == 0)


def replicated(mesh: Mesh | None, tree: T) -> T:
    """The arrays, whole on every device; every process gives the same. Without a mesh on one."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    return _placed(NamedSharding(mesh, _EVERYWHERE), tree)


def shared(mesh: Mesh, parts: Sequence[T]) -> T:
    """Batches of one shape, those of this process, as one tree with those of all others: with a
    leading axis that is spread over the devices."""
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
    return _placed(NamedSharding(mesh, _SHARED), stacked)


def _placed(sharding: NamedSharding, tree: T) -> T:
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree
    )


def of_one_device(tree: T) -> T:
    """Replicated arrays, as they are on one of this process's devices."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


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
