"""One small matrix for each item of a batch, times what the item has, with quick derivatives.

XLA's batched products on CPU are several times slower where the first factor is transposed, as it
is in derivatives by the second. So these products say how they are differentiated: transposed
matrices are written to memory first. They are bilinear, and can be differentiated in both modes to
any order.
"""

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float


def apply_matrices(
    matrices: Float[Array, "... rows columns"], x: Float[Array, "... columns channels"]
) -> Float[Array, "... rows channels"]:
    """The products ``matrices x``, in the full precision of the arguments."""
    matrices, x = _alike(matrices, x)
    return _apply(matrices, x, False)


def apply_transposed(
    matrices: Float[Array, "... rows columns"], x: Float[Array, "... rows channels"]
) -> Float[Array, "... columns channels"]:
    """The products ``matrices^T x``, in the full precision of the arguments."""
    matrices, x = _alike(matrices, x)
    return _apply(matrices, x, True)


def _alike(*arrays):
    batch = jnp.broadcast_shapes(*(x.shape[:-2] for x in arrays))
    return [jnp.broadcast_to(x, (*batch, *x.shape[-2:])) for x in arrays]


def _apply(matrices, x, transposed):
    return _apply_p.bind(matrices, x, transposed=transposed)


def _outer(a, b):
    """``a b^T``, summed over the last axis of both."""
    return _outer_p.bind(a, b)


def _swapped(x):
    return jnp.swapaxes(x, -1, -2)


def _apply_anywhere(matrices, x, *, transposed):
    return jnp.matmul(_swapped(matrices) if transposed else matrices, x, precision="highest")


def _apply_on_cpu(matrices, x, *, transposed):
    if transposed:
        matrices = jax.lax.optimization_barrier(_swapped(matrices))
    return jnp.matmul(matrices, x, precision="highest")


def _outer_anywhere(a, b):
    return jnp.matmul(a, _swapped(b), precision="highest")


def _batched(bind):
    def batched(arguments, axes, **options):
        sizes = {x.shape[a] for x, a in zip(arguments, axes, strict=True) if a is not None}
        (size,) = sizes
        first = [batching.bdim_at_front(*pair, size) for pair in zip(arguments, axes, strict=True)]
        return bind(*first, **options), 0

    return batched


def _primitive(name, function, on_cpu, options, transposes):
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(on_cpu, static_argnames=options))

    def shape(*arguments, **options):
        found = jax.eval_shape(lambda *args: function(*args, **options), *arguments)
        return jax.core.ShapedArray(found.shape, found.dtype)

    primitive.def_abstract_eval(shape)
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(on_cpu, multiple_results=False), "cpu")
    ad.defbilinear(primitive, *transposes)
    batching.primitive_batchers[primitive] = _batched(primitive.bind)
    return primitive


_apply_p = _primitive(
    "apply_matrices",
    _apply_anywhere,
    _apply_on_cpu,
    ("transposed",),
    (
        lambda ct, matrices, x, *, transposed: _outer(x, ct) if transposed else _outer(ct, x),
        lambda ct, matrices, x, *, transposed: _apply(matrices, ct, not transposed),
    ),
)
_outer_p = _primitive(
    "outer_matrices",
    _outer_anywhere,
    _outer_anywhere,
    (),
    (
        lambda ct, a, b: _apply(ct, b, False),
        lambda ct, a, b: _apply(ct, a, True),
    ),
)
