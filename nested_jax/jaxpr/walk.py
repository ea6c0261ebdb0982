"""The linear layers of a traced loss: its products with parameters, found in the jaxpr and evaluated with probes.

A parameter is followed through casts, transposes, reshapes and slices, into `jit`, `lax.scan`, `jax.checkpoint` and
`custom_jvp`, to the products of which it is one side. What else happens to it on the way to the loss is noted too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.typing import ArrayLike

from nested_jax.jaxpr.interpret import bind
from nested_jax.jaxpr.product import Product, product_of
from nested_jax.jaxpr.transparent import is_transparent
from nested_jax.jaxpr.views import Loop, View, aval_of, follow, inexact
from nested_jax.typing import Array

_CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2")


@dataclass
class Found:
    """What a jaxpr does with parameters."""

    jaxpr: ClosedJaxpr
    inside: dict[int, Product | Found] = field(default_factory=dict)  # by the equation's place
    others: list[View] = field(default_factory=list)  # parts that are used in other ways
    outputs: list[View | None] = field(default_factory=list)

    @property
    def products(self) -> list[Product]:
        """In the order of evaluation."""
        return [p for use in self.inside.values() for p in (use.products if isinstance(use, Found) else [use])]


def find(closed: ClosedJaxpr, views: Sequence[View | None], wanted: Sequence[bool]) -> Found:
    """The products with parameters in a jaxpr, and other uses of them, on the way to some of its outputs.

    Args:
        views: which of its inputs are parameters.
        wanted: which of its outputs count.
    """
    jaxpr, found = closed.jaxpr, Found(closed)
    known, alive = dict(zip(jaxpr.invars, views, strict=True)), _alive(jaxpr, wanted)
    view_of = lambda v: None if isinstance(v, Literal) else known.get(v)
    for i, eqn in enumerate(jaxpr.eqns):
        given, flags = [view_of(v) for v in eqn.invars], [v in alive for v in eqn.outvars]
        if not any(given) or not any(flags) or eqn.primitive.name == "stop_gradient":
            continue
        if product := product_of(eqn, given):
            found.inside[i] = product
        elif inner := _inner(eqn, given, flags):
            found.inside[i] = inner
            found.others += inner.others
            known.update(zip(eqn.outvars, inner.outputs, strict=True))
        elif len(given) == 1 and given[0] and (outputs := follow(eqn, given[0])):
            known.update(zip(eqn.outvars, outputs, strict=True))
        else:
            found.others += filter(None, given)
    found.outputs = [view_of(v) for v in jaxpr.outvars]
    return found


def evaluate(
    found: Found, values: Sequence[ArrayLike], probes: Sequence[Array | None], insert: Callable[..., Array]
) -> tuple[list[ArrayLike], list[ArrayLike | None]]:
    """The jaxpr's outputs, and x of every product that has a probe.

    Args:
        probes: one a product, of its shape, or None.
        insert: (product, probe) -> what takes the product's place.
    """
    jaxpr, probes, inputs = found.jaxpr.jaxpr, list(probes), []
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*found.jaxpr.consts, *values], strict=True))
    value_of = lambda v: v.val if isinstance(v, Literal) else known[v]
    for i, eqn in enumerate(jaxpr.eqns):
        given, use = [value_of(v) for v in eqn.invars], found.inside.get(i)
        number = 0 if use is None else len(use.products) if isinstance(use, Found) else 1
        own, probes = probes[:number], probes[number:]
        if use is None or all(probe is None for probe in own):
            outputs, xs = bind(eqn, given), [None] * number
        elif isinstance(use, Found):
            outputs, xs = _evaluate_inner(eqn, use, given, own, insert)
        else:
            (product,) = bind(eqn, given)
            outputs, xs = [insert(product, own[0])], [given[use.operand]]
        known.update(zip(eqn.outvars, outputs, strict=True))
        inputs += xs
    return [value_of(v) for v in jaxpr.outvars], inputs


def _alive(jaxpr: Jaxpr, wanted: Sequence[bool]) -> set:
    """Variables on which the wanted outputs depend differentiably."""
    alive = set()
    add = lambda variables, flags: alive.update(
        v for v, on in zip(variables, flags, strict=True) if on and not isinstance(v, Literal) and inexact(v)
    )
    add(jaxpr.outvars, wanted)
    for eqn in reversed(jaxpr.eqns):
        if any(flags := [v in alive for v in eqn.outvars]):
            add(eqn.invars, _needed(eqn, flags))
    return alive


def _needed(eqn: JaxprEqn, flags: list[bool]) -> list[bool]:
    """Which inputs of an equation matter to some of its outputs."""
    name = eqn.primitive.name
    if name not in (*_CALLS, "scan"):
        return [name != "stop_gradient"] * len(eqn.invars)
    jaxpr = _closed(eqn).jaxpr
    alive = _alive(jaxpr, _over_iterations(eqn, flags) if name == "scan" else flags)
    return [v in alive for v in jaxpr.invars]


def _over_iterations(eqn: JaxprEqn, flags: list[bool]) -> list[bool]:
    """Which outputs of a scan's body matter, if some of the scan's do: carries that feed them too."""
    jaxpr, (constants, carries) = _closed(eqn).jaxpr, scan_counts(eqn)
    while True:
        alive = _alive(jaxpr, flags)
        fed = [v in alive for v in jaxpr.invars[constants : constants + carries]]
        more = [a or b for a, b in zip(flags, fed, strict=False)] + flags[carries:]
        if more == flags:
            return flags
        flags = more


def scan_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """The numbers of constants and carries of a scan: its body takes them with as many axes. No parameter's name is read."""
    same = lambda outer, inner: [a.aval.ndim == b.aval.ndim for a, b in zip(outer, inner, strict=True)]
    jaxpr = _closed(eqn).jaxpr
    carries = sum(same(eqn.outvars, jaxpr.outvars))
    return sum(same(eqn.invars, jaxpr.invars)) - carries, carries


def _closed(eqn: JaxprEqn) -> ClosedJaxpr:
    inner = eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"]
    return inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())


def _inner(eqn: JaxprEqn, given: list[View | None], flags: list[bool]) -> Found | None:
    """What an equation that holds a jaxpr does with parameters inside; None for one that is not entered."""
    name = eqn.primitive.name
    if name in _CALLS or is_transparent(eqn):
        return find(_closed(eqn), given, flags)
    if name == "scan":
        return _inner_scan(eqn, given, flags)
    if name == "custom_jvp_call" and all(map(inexact, (*eqn.invars, *eqn.outvars))):
        rule = _rule(eqn)  # its products with a parameter's tangent are what the gradient comes from
        found = find(rule, [None] * len(given) + given, [False] * len(flags) + flags)
        found.outputs = found.outputs[len(flags) :]
        return found
    return None


def _rule(eqn: JaxprEqn) -> ClosedJaxpr:
    """(values, tangents) -> (outputs, their tangents) of an equation."""
    inputs = [jax.ShapeDtypeStruct(aval_of(v).shape, aval_of(v).dtype) for v in eqn.invars]
    return jax.make_jaxpr(lambda x, dx: jax.jvp(lambda *x: bind(eqn, x), x, dx))(inputs, inputs)


def _inner_scan(eqn: JaxprEqn, given: list[View | None], flags: list[bool]) -> Found:
    closed, (constants, carries) = _closed(eqn), scan_counts(eqn)
    carried = filter(None, given[constants : constants + carries])  # and changed: JAX takes out carries that are not
    into = []
    for i, view in enumerate(given):
        if view and i >= constants + carries:
            into.append(view._replace(dims=view.dims[1:], loops=(*view.loops, Loop(eqn.params["length"], view.dims[0]))))
        elif view and i < constants:
            into.append(view._replace(loops=(*view.loops, Loop(eqn.params["length"], ()))))
        else:
            into.append(None)
    found = find(closed, into, _over_iterations(eqn, flags))
    found.others += [*carried, *filter(None, found.outputs)]
    found.outputs = [None] * len(flags)
    return found


def _evaluate_inner(eqn: JaxprEqn, found: Found, values: Sequence[ArrayLike], probes: Sequence, insert: Callable):
    name = eqn.primitive.name
    if name == "scan":
        return _evaluate_scan(eqn, found, values, probes, insert)
    if name == "custom_jvp_call":
        return _evaluate_rule(eqn, found, values, probes, insert)
    run = lambda values, probes: evaluate(found, values, probes, insert)
    if "prevent_cse" in eqn.params:
        run = jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    elif is_transparent(eqn):
        run = jax.checkpoint(run)
    return run(values, probes)


def _evaluate_scan(eqn: JaxprEqn, found: Found, values: Sequence[ArrayLike], probes: Sequence, insert: Callable):
    constants, carries = scan_counts(eqn)

    def body(carry, slices):
        outputs, inputs = evaluate(found, [*values[:constants], *carry, *slices[0]], slices[1], insert)
        return outputs[:carries], (outputs[carries:], inputs)

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry = values[constants : constants + carries]
    carry, (outputs, inputs) = jax.lax.scan(body, carry, (values[constants + carries :], probes), **options)
    return [*carry, *outputs], inputs


def _evaluate_rule(eqn: JaxprEqn, found: Found, values: Sequence[ArrayLike], probes: Sequence, insert: Callable):
    """A function with a rule of its own: a probe's tangent is added to the product with the parameter's tangent."""
    number, zeros = len(eqn.outvars), lambda tree: jax.tree.map(jnp.zeros_like, tree)
    xs = lambda values, probes: evaluate(found, [*values, *zeros(values)], zeros(probes), jnp.add)[1]

    @jax.custom_jvp
    def apply(values, probes):
        return bind(eqn, values), xs(values, probes)

    @apply.defjvp
    def jvp(primals, tangents):
        (values, probes), (changes, probing) = primals, tangents
        both, _ = evaluate(found, [*values, *changes], probing, jnp.add)
        inputs = xs(values, probes)  # no output of this pass depends on them; further derivatives see how they are made
        return (both[:number], inputs), (both[number:], zeros(inputs))

    outputs, inputs = apply(values, probes)
    return outputs, inputs
