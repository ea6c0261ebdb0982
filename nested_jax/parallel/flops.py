"""Floating-point operations of the matrix products in a function, on all devices together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core


def flops(function: Callable, *arguments: Any, padded: bool = False) -> int:
    """Operations of all matrix products and convolutions, two for each multiplication and its sum.

    A scan's body counts as often as it runs, of a cond the branch that has most, a while loop's body once. What a backward
    pass computes again is counted; no other operations are.

    Args:
        function: is traced, not run, as on one CPU, which shares nothing out and has no kernels whose products are unseen.
        *arguments: arrays, or their shapes.
        padded: count what a TPU's matrix unit of 128 by 128 does: products' sums and columns in 128s, their rows in eights,
            as many passes of bfloat16 as their precision takes; of its own form where there are several. It does none of
            products without a sum, which scale numbers, or of two vectors.

    >>> import jax.numpy as jnp
    >>> flops(lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)[0], jnp.ones((4, 4)))
    384
    """
    return count(trace(function, *arguments), padded)


def trace(function: Callable, *arguments: Any) -> core.Jaxpr:
    """What `flops` counts."""
    alone = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
    with alone, jax.default_device("cpu"):
        return jax.make_jaxpr(function)(*arguments).jaxpr


def count(jaxpr: core.Jaxpr, padded: bool) -> int:
    """The operations of what was traced; padded: as of `flops`."""
    return sum(_of_equation(equation, padded) for equation in jaxpr.eqns)


def _of_equation(equation: core.JaxprEqn, padded: bool) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), (batch, _) = params["dimension_numbers"]
        left = _shape(equation.invars[0])
        sums, maps = (math.prod(left[axis] for axis in axes) for axes in (contracted, batch))
        if not padded:
            return 2 * _size(equation.outvars[0]) * sums
        one = _size(equation.invars[0]) // max(sums * maps, 1)
        columns, rows = sorted((one, _size(equation.outvars[0]) // max(one * maps, 1)))
        if not contracted or rows == 1:
            return 0
        up = lambda n, tile: -(-n // tile) * tile
        passes = _passes(equation.invars[0], params["precision"])
        return 2 * passes * maps * up(rows, 8) * up(columns, 128) * up(sums, 128)
    if name == "conv_general_dilated":
        kernel = equation.invars[1]
        outputs = _shape(kernel)[params["dimension_numbers"].rhs_spec[0]]
        return 2 * _size(equation.outvars[0]) * _size(kernel) // outputs
    if padded and (platforms := params.get("branches_platforms")):
        here = next(i for i, names in enumerate(platforms) if names is None or "tpu" in names)
        return count(params["branches"][here].jaxpr, padded)
    if name == "custom_linear_solve":  # its parameters hold the solves of its derivatives too
        return count(params["jaxprs"].solve.jaxpr, padded)
    inner = [count(jaxpr, padded) for value in params.values() for jaxpr in inner_jaxprs(value)]
    if name == "cond":
        return max(inner, default=0)
    if name == "pallas_call":
        return sum(inner) * math.prod(params["grid_mapping"].grid)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _passes(variable: Any, precision: Any) -> int:
    """Products of bfloat16 numbers that the matrix unit makes of one."""
    given = precision if isinstance(precision, tuple) else (precision,)
    passes = {jax.lax.Precision.HIGH: 3, jax.lax.Precision.HIGHEST: 6}
    return max(passes.get(one, 1) for one in given) if variable.aval.dtype == jnp.float32 else 1


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _size(variable: Any) -> int:
    return math.prod(_shape(variable))


def inner_jaxprs(value: Any) -> Iterator[core.Jaxpr]:
    """Those in a parameter of an equation."""
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from inner_jaxprs(one)
