"""Arithmetic that stays exact and finite: sums in float32; systems; norms, roots and quotients with derivatives at zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh

from nested_jax.typing import Array, Float, Int, PyTree

varying = attrgetter("manual_axis_type.varying")  # of an array's type: mesh axes over which `jax.shard_map` has it varying

# A product of float32 in full: a TPU's default is bfloat16.
_exact = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
_three_passes = partial(jnp.matmul, precision=jax.lax.Precision.HIGH)

# (each (...), rows (..., V)) -> diag(each) rows. An einsum's derivative is a product too, faster than a sum on XLA's CPU.
scale = partial(jnp.einsum, "...,...v->...v")


def upcast(*trees: PyTree) -> PyTree:
    """Fast state and accumulation are float32 whatever the inputs are (float64 stays)."""
    types = jax.tree.map(partial(jnp.promote_types, jnp.float32), jax.tree.map(jnp.result_type, trees))
    trees = jax.tree.map(jax.lax.convert_element_type, trees, types)
    return trees[0] if len(trees) == 1 else trees


def vary(state: PyTree, *inputs: PyTree, rank: int = 0) -> PyTree:
    """A state that varies over the mesh axes over which some inputs vary inside `jax.shard_map`; outside it nothing does.

    A scan's state has to vary as what it reads does, and a gradient by what does not vary is summed over the devices.

    Args:
        rank: fewest axes of the arrays that vary; those of fewer are counts, which are the same on all devices.
    """
    axes = frozenset().union(*map(varying, map(jax.typeof, jax.tree.leaves(inputs))))
    if not axes:
        return state

    def cast(x):
        more = axes - varying(jax.typeof(x))
        return jax.lax.pcast(x, tuple(more), to="varying") if more and jnp.ndim(x) >= rank else x

    return jax.tree.map(cast, state)


BATCH, TOKENS, HEADS = ("fsdp", "data"), "sequence", "tensor"
"""Axes of a mesh along which rows, tokens, and heads, hidden units and the vocabulary are split, see `parallel.rules`."""


EPSILON = 1e-6
"""Beside the squares under the roots of norms."""


def mesh_of_four() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh`; None where it has not all four axes, or inside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if {*BATCH, TOKENS, HEADS} <= {*mesh.auto_axes} else None


def tpu_kind() -> str | None:
    """The kind of TPU on which what is traced will run: those of JAX's mesh, else those that it puts arrays on."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
        platform = default.platform if isinstance(default, jax.Device) else default or jax.default_backend()
        if platform != "tpu":
            return None
        device = default if isinstance(default, jax.Device) else jax.devices("tpu")[0]
    return device.device_kind if device.device_kind.startswith("TPU") else None


def devices_along(axis: str, pieces: int) -> int:
    """Devices along an axis of the mesh of `jax.set_mesh` that share so many pieces; 1 where they do not divide them."""
    if (mesh := mesh_of_four()) is None:
        return 1
    return mesh.shape[axis] if pieces % mesh.shape[axis] == 0 else 1


def mesh_divides(shape: tuple[int, ...], *axes: str | tuple[str, ...] | None) -> bool:
    """Whether there is a mesh of `jax.set_mesh`, of all four axes, of which those given divide the axes of a shape."""
    mesh = mesh_of_four()
    return mesh is not None and all(n % _devices(mesh, names) == 0 for n, names in zip(shape, axes, strict=False))


def lay(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """x, laid on the mesh of `jax.set_mesh`; as it is where there is none of all four axes, or inside `jax.shard_map`.

    Args:
        x: an array.
        axes: of the mesh, for each of its axes from the first on. An axis that they do not divide is not split.
    """
    if (mesh := mesh_of_four()) is None:
        return x
    spec = [names if n % _devices(mesh, names) == 0 else None for n, names in zip(x.shape, axes, strict=False)]
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(*spec))


def _devices(mesh: AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
    return math.prod(mesh.shape[name] for name in ((axes,) if isinstance(axes, str) else axes or ()))


def nats(logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Nats of the targets: optax's softmax cross-entropy, without a gather along the vocabulary, which a mesh may split."""
    logits = upcast(logits)
    chosen = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == jnp.expand_dims(targets, -1)
    return jax.nn.logsumexp(logits, axis=-1) - jnp.where(chosen, logits, 0).sum(-1)


def normal(key: Array, shape: tuple[int, ...], dtype: Any = float) -> Array:
    """`jax.random.normal`, drawn as a vector: XLA's CPU takes seconds to compile random numbers of several axes."""
    return jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)


def square(rows: Float[Array, "*batch V"]) -> Float[Array, "*batch"]:
    """|x|^2 of every row."""
    return jnp.einsum("...v,...v->...", rows, rows)


def clip_rows(rows: Float[Array, "*batch V"], largest: float) -> Float[Array, "*batch V"]:
    """Every row scaled down to a norm of at most `largest`, or of 1e-18 where that is less; 1e18 and more clip nothing.

    Beyond these a square is 0 or infinite in float32.

    >>> print(clip_rows(jnp.array([[3.0, 4.0], [0.3, 0.4]]), 1.0))
    [[0.6 0.8]
     [0.3 0.4]]
    """
    if largest >= 1e18:
        return rows
    return scale(jax.lax.rsqrt(jnp.maximum(square(rows) / max(largest, 1e-18) ** 2, 1.0)), rows)


def l2norm(x: Float[Array, "*batch K"]) -> Float[Array, "*batch K"]:
    """x / |x|, with finite values and gradients of every order at zero."""
    return scale(jax.lax.rsqrt(square(x) + EPSILON), x)


@jax.checkpoint
def rms_norm(weight: Float[Array, "*last D"], x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """x over its root mean square, times a weight for the last axes; in float32. The backward pass keeps x alone."""
    y = upcast(x)
    y = scale(jax.lax.rsqrt(square(y) / y.shape[-1] + EPSILON), y)
    return (y * jnp.expand_dims(weight, tuple(range(x.ndim - weight.ndim)))).astype(x.dtype)


def zeros(params: PyTree) -> PyTree:
    """An empty memory of every parameter, each call's its own: a state is donated, and no buffer can be twice."""
    return jax.tree.map(jnp.zeros_like, upcast(params))


def safe_sqrt(x: Array) -> Array:
    """Square root, its derivative zero at zero."""
    some = ~(x <= 0)  # NaN stays NaN
    return jnp.where(some, jnp.sqrt(jnp.where(some, x, 1)), 0)


@jax.custom_jvp
def safe_divide(x: Array, by: Array) -> Array:
    """x / by, and zero with derivatives of zero where `by` is zero."""
    some = by != 0
    return jnp.where(some, x / jnp.where(some, by, 1), 0)


@safe_divide.defjvp
def _safe_divide_jvp(primals, tangents):
    """Without by^-2, which overflows in float32 where |by| < 1e-19."""
    (x, by), (dx, dby) = primals, tangents
    ratio = safe_divide(x, by)
    return ratio, safe_divide(dx - ratio * dby, by)


def bounded(x: Array, *of: Array) -> Array:
    """x, computed from finite numbers `of`; where it overflowed, the largest number of its sign.

    >>> terms = jnp.array([3e38, 3e38, jnp.inf]), jnp.array([1e38, 1.0, 1.0])
    >>> print(bounded(sum(terms), *terms))
    [3.4028235e+38 3.0000000e+38           inf]
    """
    overflows = jnp.isinf(x)
    for term in of:
        overflows &= jnp.isfinite(term)
    return jnp.where(overflows, jnp.sign(x) * jnp.finfo(x.dtype).max, x)


def split_scale(x: Array, axis: int | tuple[int, ...] | None) -> tuple[Array, Array]:
    """(x / s, s), s a power of two over some axes, which are kept: sums of squares of x / s neither overflow nor vanish.

    s is 1 but for very large or small x, whose largest entry it makes about 1: with larger ones derivatives would vanish. It
    is a constant: what does not depend on it has right derivatives.
    """
    most = jnp.finfo(x.dtype).maxexp * 25 // 32  # 100 in float32: 1 / s is no denormal number
    large, largest = 2.0 ** (most // 2), jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis, keepdims=True, initial=0))
    extreme = (largest > large) | ((largest < 1 / large) & (largest > 0))
    exponent = jnp.clip(jnp.frexp(largest)[1], -most, most)
    s = jnp.where(extreme, jnp.ldexp(jnp.ones((), x.dtype), exponent), 1).astype(x.dtype)
    return x / s, s


def unit_norm(x: Array, axis: int | tuple[int, ...] | None) -> Array:
    """x over its Euclidean norm over some axes, for any size of x; zeros stay zeros.

    >>> print(*[unit_norm(size * jnp.array([3.0, 4.0]), None).round(3) for size in (1e30, 1e-30)])
    [0.6 0.8] [0.6 0.8]
    """
    x, _ = split_scale(x, axis)
    return safe_divide(x, safe_norm(x, axis))


def safe_norm(x: Array, axis: int | tuple[int, ...] | None) -> Array:
    """Euclidean norm over some axes, which are kept; its derivative zero at zero."""
    return safe_sqrt(jnp.sum(jnp.square(x), axis, keepdims=True))


def shifted(x: Array, axis: int, low: int, high: int, fill: float = 0.0) -> Array:
    """x with so many places put at the ends of an axis, or taken from them if the number is negative.

    By -high = low places no array of another length is made, in a derivative neither; where a mesh splits the axis, devices
    send each other their edges alone.

    >>> print(shifted(jnp.arange(4.0), 0, 1, -1, fill=9.0))
    [9. 0. 1. 2.]
    """
    ends = [(0, 0, 0)] * x.ndim
    ends[axis] = (low, high, 0)
    return jax.lax.pad(x, jnp.asarray(fill, x.dtype), ends)


KEPT = "kept"
"""Name of what costs more to compute again than to keep: `remat.scan` keeps it with the states before steps."""


def solve_unit_lower(
    lower: Float[Array, "*#batch C C"], right: Float[Array, "*batch C V"], *, keep: bool = False
) -> Float[Array, "*batch C V"]:
    """(I + lower)^-1 right for a strictly lower triangular matrix; its derivatives are products with the same inverse.

    Gradients are refined once by what they leave over: in float32 the inverse alone gives them ten times the error.
    With `keep` the inverse bears the name `KEPT`.

    >>> print(solve_unit_lower(jnp.array([[0.0, 0.0], [0.5, 0.0]]), jnp.ones((2, 1))))
    [[1. ]
     [0.5]]
    """
    lower_now = jax.lax.stop_gradient(lower)
    inverse = jax.lax.platform_dependent(lower_now, tpu=_masked_inverse, default=_unit_lower_inverse)
    inverse, above = checkpoint_name(inverse, KEPT) if keep else inverse, lower_now.mT

    def transposed(_, right):
        x = _exact(inverse.mT, right)
        return x + _exact(inverse.mT, right - x - _exact(above, x))

    return jax.lax.custom_linear_solve(
        lambda x: x + _exact(lower, x),
        right,
        solve=lambda _, right: _exact(inverse, right),
        transpose_solve=transposed,
    )


def _eight_rows_inverse(tiles: Float[Array, "*batch C C"], product: Callable) -> Float[Array, "*batch C C"]:
    """(I + L)^-1 = (I - L)(I + L^2)(I + L^4), as L^8 = 0 of blocks of eight rows; over more rows the series loses digits."""
    one = jnp.expand_dims(jnp.eye(tiles.shape[-1], dtype=tiles.dtype), tuple(range(tiles.ndim - 2)))
    squared = product(tiles, tiles)
    return product(product(one - tiles, one + squared), one + product(squared, squared))


def _masked_inverse(lower: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """The same as `_unit_lower_inverse` by products of whole matrices, all else zeros: a TPU's blocks are of 128 rows.

    Its products take three bfloat16 passes for the six of full precision. What they leave over is taken in full precision
    and given back, twice: fewer passes, and no fewer right digits where those of full precision lose some.
    """
    lower, row = jax.lax.optimization_barrier(lower), jnp.arange(lower.shape[-1])  # made once, not for each mask
    pairs = lambda where: jnp.expand_dims(where(row[:, None], row[None]), tuple(range(lower.ndim - 2)))
    inverse = _eight_rows_inverse(jnp.where(pairs(lambda i, j: i >> 3 == j >> 3), lower, 0), _three_passes)
    for bits in range(3, max(3, (lower.shape[-1] - 1).bit_length())):  # of blocks of 8, 16, 32, ... rows
        below = pairs(lambda i, j, b=bits: (i >> b != j >> b) & (i >> b + 1 == j >> b + 1))
        inverse -= _three_passes(_three_passes(inverse, jnp.where(below, lower, 0)), inverse)
    for _ in range(2):
        left = pairs(lambda i, j: i == j).astype(lower.dtype) - inverse - _exact(lower, inverse)
        inverse += _three_passes(inverse, left)
    return inverse


def _unit_lower_inverse(lower: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """(I + lower)^-1, by inverting blocks of 8, 16, 32, ... rows.

    Where blocks P and Q on the diagonal are inverted, the block B below them becomes -Q^-1 B P^-1.
    """
    size, block = lower.shape[-1], 8
    full = max(block, 1 << (size - 1).bit_length())
    lower = jnp.pad(lower, [(0, 0)] * (lower.ndim - 2) + [(0, full - size)] * 2)

    def blocks(row, column, every):
        """Blocks of the matrix at (row, column), (row + every, column + every), ..., stacked."""
        corners = range(0, full, every)
        cut = [lower[..., i + row : i + row + block, i + column : i + column + block] for i in corners]
        return jnp.stack(cut, axis=-3)

    inverse = _eight_rows_inverse(blocks(0, 0, block), _exact)
    while block < full:
        below = blocks(block, 0, 2 * block)
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -_exact(_exact(second, below), first)
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)
        block *= 2
    return inverse[..., 0, :size, :size]
