"""Jaxprs evaluated equation by equation: with other values than arrays, with a record of branches, in double precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from nested_jax.jaxpr.views import aval_of

Where = tuple[int, ...]  # the places of an equation and of those that it is inside of

_OF_THEIR_TYPE = {"bitcast_convert_type", "ffi_call", "io_callback", "pallas_call", "pure_callback"}


def measured(closed: core.ClosedJaxpr, arguments: Sequence[Any]) -> tuple[list[Any], dict[Where, Any]]:
    """The outputs, and of every cond its branch, of every while loop how often it ran, by where they are.

    Those inside a branch or a loop are left out.
    """
    found = {}

    def apply(equation, inputs, where):
        if equation.primitive.name == "while":
            found[where], outs = _counted(equation.params, inputs)
            return outs
        if equation.primitive.name == "cond":
            found[where] = jnp.asarray(inputs[0], jnp.int32)
        return bind(equation, inputs)

    return interpret(closed, arguments, apply), found


def wide(x: Any) -> Any:
    """A number, an array or a dtype, where it is of real or complex numbers in double precision."""
    kind = x if isinstance(x, np.dtype) else x.dtype
    double = next((d for of, d in _DOUBLE.items() if jnp.issubdtype(kind, of)), kind)
    return double if isinstance(x, np.dtype) else x if kind == double else x.astype(double)


_DOUBLE = {jnp.floating: np.dtype("float64"), jnp.complexfloating: np.dtype("complex128")}


def widened(jaxpr: Any) -> Callable[..., list[Any]]:
    """What a jaxpr computes, of arguments and with steps in double precision, whatever types it was traced with."""

    def inside(value):
        if isinstance(value, np.dtype):
            return wide(value)
        if not isinstance(value, (core.ClosedJaxpr, core.Jaxpr)):
            return value
        shapes = [jax.ShapeDtypeStruct(aval_of(v).shape, wide(aval_of(v).dtype)) for v in opened(value)[0].invars]
        closed = jax.make_jaxpr(widened(value))(*shapes)
        return closed if isinstance(value, core.ClosedJaxpr) else closed.jaxpr

    def apply(equation, inputs, where):
        params = equation.params
        if equation.primitive.name in _OF_THEIR_TYPE:
            inputs = [jnp.asarray(x, aval_of(v).dtype) for x, v in zip(inputs, equation.invars, strict=True)]
        else:
            params = jax.tree.map(inside, params, is_leaf=lambda x: isinstance(x, (core.ClosedJaxpr, core.Jaxpr)))
        return map(wide, bind(equation, inputs, params))

    return lambda *arguments: interpret(jaxpr, arguments, apply, wide)


def interpret(
    jaxpr: Any, arguments: Sequence[Any], apply: Callable, constant: Callable = lambda x: x, where: Where = ()
) -> list[Any]:
    """The outputs, calls laid open, by what `apply` makes of (equation, inputs, where)."""
    jaxpr, constants = opened(jaxpr)
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*map(constant, constants), *arguments), strict=True))
    read = lambda v: constant(np.asarray(v.val, aval_of(v).dtype)) if isinstance(v, core.Literal) else values[v]
    for i, equation in enumerate(jaxpr.eqns):
        inputs, here = [read(v) for v in equation.invars], (*where, i)
        called = _called(equation)
        outs = apply(equation, inputs, here) if called is None else interpret(called, inputs, apply, constant, here)
        values |= dict(zip(equation.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def bind(equation: core.JaxprEqn, inputs: Sequence[Any], params: dict[str, Any] | None = None) -> list[Any]:
    """The outputs of an equation, or of its primitive with other parameters."""
    params = equation.params if params is None else params
    outs = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(params))
    return list(outs) if equation.primitive.multiple_results else [outs]


def _counted(params, inputs):
    test, first = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    run = lambda closed, *arguments: core.jaxpr_as_fun(closed)(*arguments)
    go_on = lambda carry: run(params["cond_jaxpr"], *inputs[:test], *carry[1])[0]
    step = lambda carry: (carry[0] + 1, run(params["body_jaxpr"], *inputs[test:first], *carry[1]))
    return jax.lax.while_loop(go_on, step, (jnp.int32(0), list(inputs[first:])))


def _called(equation) -> Any | None:
    """The jaxpr of a call: jit, remat, a function with derivatives of its own."""
    if equation.primitive.name in ("cond", "scan", "while", "custom_linear_solve"):
        return None
    inside = [equation.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in equation.params]
    return inside[0] if inside and len(opened(inside[0])[0].invars) == len(equation.invars) else None


def opened(jaxpr: Any) -> tuple[core.Jaxpr, Sequence[Any]]:
    """A jaxpr without its constants, and these."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, ())
