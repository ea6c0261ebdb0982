"""Functions with a reverse rule of their own that are still read through: `local_surprise` enters their bodies.

A `jax.custom_vjp` hides which products its derivative comes from. Where the rule computes the same derivative as
differentiating the body would, at another cost, its author declares that by `transparent`. The outputs of the body then
pass through an identity primitive that only this module binds, by which `is_transparent` recognises the equation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Primitive
from jax.interpreters import ad, batching, mlir

_mark = Primitive("transparent")
_mark.def_impl(lambda x: x)
_mark.def_abstract_eval(lambda x: x)
mlir.register_lowering(_mark, lambda ctx, x: [x])
ad.deflinear2(_mark, lambda cotangent, x: [cotangent])
batching.defvectorized(_mark)


def transparent(body: Callable) -> Callable:
    """The body of a `jax.custom_vjp` whose rule equals the derivative of the body.

    Args:
        body: a function of pytrees of arrays, with a floating-point output.

    Returns:
        The same function, to be wrapped by `jax.custom_vjp`; its floating-point outputs carry the mark.

    >>> square = jax.custom_vjp(transparent(lambda x: x * x))
    >>> square.defvjp(lambda x: (x * x, x), lambda x, g: (2 * g * x,))
    >>> [is_transparent(equation) for equation in jax.make_jaxpr(square)(3.0).eqns]
    [True]
    """
    inexact = lambda x: jnp.issubdtype(jnp.result_type(x), jnp.inexact)

    @functools.wraps(body)
    def marked(*arguments):
        return jax.tree.map(lambda x: _mark.bind(x) if inexact(x) else x, body(*arguments))

    return marked


def is_transparent(equation: JaxprEqn) -> bool:
    """Whether an equation calls a `jax.custom_vjp` whose body is `transparent`."""
    body = equation.params.get("call_jaxpr") if equation.primitive.name == "custom_vjp_call" else None
    return body is not None and any(inner.primitive is _mark for inner in body.jaxpr.eqns)
