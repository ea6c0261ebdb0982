"""Functions with a reverse rule of their own that are still read through: `local_surprise` enters their bodies.

A `jax.custom_vjp` hides which products its derivative comes from. Where the rule computes the same derivative as
differentiating the body would, at another cost, its author declares that by marking the outputs of the body:

>>> import jax
>>> square = jax.custom_vjp(lambda x: transparent(x * x))
>>> square.defvjp(lambda x: (x * x, x), lambda x, g: (2 * g * x,))
>>> [is_transparent(equation) for equation in jax.make_jaxpr(square)(3.0).eqns]
[True]
"""

from __future__ import annotations

from functools import partial

from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import JaxprEqn

_MARK = "transparent"
transparent = partial(checkpoint_name, name=_MARK)  # a pytree of arrays -> the same, marked


def is_transparent(equation: JaxprEqn) -> bool:
    """Whether an equation calls a `jax.custom_vjp` whose body's outputs are `transparent`."""
    body = equation.params.get("call_jaxpr") if equation.primitive.name == "custom_vjp_call" else None
    marks = lambda inner: inner.primitive.name == "name" and inner.params["name"] == _MARK
    return body is not None and any(map(marks, body.jaxpr.eqns))
