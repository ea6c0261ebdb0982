"""What every value of a computation is made from: its jaxpr, with calls, branches and loops laid open."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from nested_jax.jaxpr.views import aval_of
from nested_jax.jaxpr.walk import scan_counts

Where = tuple[int, ...]  # the places of an equation and of those that it is inside of
Branch = tuple[Where, int]  # where a cond is in the jaxpr, and which of its branches

_SAME = {"convert_element_type", "copy", "copy_p", "reshape", "transpose", "squeeze", "expand_dims", "optimization_barrier"}
_OF_THEIR_TYPE = {"bitcast_convert_type", "ffi_call", "io_callback", "pallas_call", "pure_callback"}


class Loop(NamedTuple):
    """A scan or a while loop. What it carries are its inputs from `first` on, before, and `ends`, after."""

    inputs: tuple[int, ...]
    first: int
    ends: tuple[int, ...]
    where: Where
    branch: Branch | None  # the outermost branch that it is in
    equation: core.JaxprEqn

    @property
    def streams(self) -> tuple[int, ...]:
        """What a scan reads piece by piece."""
        return self.inputs[self.first + len(self.ends) :]

    @property
    def length(self) -> int | None:
        """How often it runs; None: until a condition holds."""
        return self.equation.params.get("length")

    @property
    def kind(self) -> tuple:
        """Equal for loops that do the same to arrays of other shapes."""
        return self.branch, self.length, tuple(e.primitive.name for e in _open(_body(self.equation))[0].eqns)


class Graph:
    """Values are numbers. `parents`: what each is computed from; `same`: what it may be, up to its type and its axes."""

    def __init__(self, function: Callable, *arguments: Any):
        closed = jax.make_jaxpr(function)(*arguments)
        self.parents: list[tuple[int, ...]] = []
        self.same: list[tuple[int, ...]] = []
        self.known: dict[int, Any] = {}
        self.loops: list[Loop] = []
        self.closed = closed
        self.inputs = [self._new() for _ in closed.jaxpr.invars]
        self.outputs = self._walk(closed, self.inputs, (), None)

    def behind(self, values: Iterable[int], stop: Callable[[int], bool] = lambda value: False) -> set[int]:
        """The values and all that they are made from; what is behind a value at which to stop is left out."""
        seen, rest = set(), list(values)
        while rest:
            value = rest.pop()
            if value not in seen:
                seen.add(value)
                rest += [] if stop(value) else self.parents[value]
        return seen

    def forms(self, value: int) -> set[int]:
        """The value before its casts and moves of axes, in all branches that it may come from."""
        seen, rest = set(), [value]
        while rest:
            value = rest.pop()
            if value not in seen:
                seen.add(value)
                rest += self.same[value]
        return seen

    def _new(self, parents: Sequence[int] = (), same: Sequence[int] = ()) -> int:
        self.parents.append((*parents, *same))
        self.same.append(tuple(same))
        return len(self.parents) - 1

    def _literal(self, value: Any) -> int:
        new = self._new()
        self.known[new] = value
        return new

    def _walk(self, jaxpr: Any, arguments: Sequence[int], where: Where, branch: Branch | None) -> list[int]:
        apply = lambda equation, inputs, here: self._equation(equation, inputs, here, branch)
        return _evaluate(jaxpr, arguments, apply, self._literal, where)

    def _equation(self, equation, inputs, where, branch) -> list[int]:
        name, params = equation.primitive.name, equation.params
        if name == "cond":
            inside = lambda i: branch or (where, i)
            branches = [self._walk(b, inputs[1:], (*where, i), inside(i)) for i, b in enumerate(params["branches"])]
            return [self._new([inputs[0]], outs) for outs in zip(*branches, strict=True)]
        if name == "scan":
            constants, carries = scan_counts(equation)
            return self._loop(equation, inputs, constants, constants + carries, where, branch)
        if name == "while":
            first = params["cond_nconsts"] + params["body_nconsts"]
            return self._loop(equation, inputs, first, len(inputs), where, branch)
        if name in _SAME:
            return [self._new((), [value]) for value in inputs]
        if name == "select_n":
            return [self._new(inputs[:1], inputs[1:])]
        if name == "mul" and any(v in self.known and not np.any(self.known[v]) for v in inputs):
            return [self._new()]  # times zero
        return [self._new(inputs) for _ in equation.outvars]

    def _loop(self, equation, inputs, first, last, where, branch) -> list[int]:
        params = equation.params
        skip = params.get("cond_nconsts", 0)
        carried = [self._new([start]) for start in inputs[first:last]]
        pieces = [self._new([stream]) for stream in inputs[last:]]
        outs = self._walk(_body(equation), (*inputs[skip:first], *carried, *pieces), (*where, 1), branch)
        tests = ()
        if "cond_jaxpr" in params:
            tests = self._walk(params["cond_jaxpr"], (*inputs[:skip], *carried), (*where, 0), branch)
        for value, out in zip(carried, outs, strict=False):
            self.parents[value] += (out, *tests)
        ends = [self._new([value]) for value in carried]
        self.loops.append(Loop(tuple(inputs), first, tuple(ends), where, branch, equation))
        return ends + [self._new([out]) for out in outs[len(ends) :]]


def measured(closed: core.ClosedJaxpr, arguments: Sequence[Any]) -> tuple[list[Any], dict[tuple[int, ...], Any]]:
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
        return _bind(equation, inputs, equation.params)

    return _evaluate(closed, arguments, apply), found


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
        shapes = [jax.ShapeDtypeStruct(aval_of(v).shape, wide(aval_of(v).dtype)) for v in _open(value)[0].invars]
        closed = jax.make_jaxpr(widened(value))(*shapes)
        return closed if isinstance(value, core.ClosedJaxpr) else closed.jaxpr

    def apply(equation, inputs, where):
        params = equation.params
        if equation.primitive.name in _OF_THEIR_TYPE:
            inputs = [jnp.asarray(x, aval_of(v).dtype) for x, v in zip(inputs, equation.invars, strict=True)]
        else:
            params = jax.tree.map(inside, params, is_leaf=lambda x: isinstance(x, (core.ClosedJaxpr, core.Jaxpr)))
        return map(wide, _bind(equation, inputs, params))

    return lambda *arguments: _evaluate(jaxpr, arguments, apply, wide)


def _evaluate(
    jaxpr: Any, arguments: Sequence[Any], apply: Callable, constant: Callable = lambda x: x, where=()
) -> list[Any]:
    """The outputs, calls laid open, by what `apply` makes of (equation, inputs, where)."""
    jaxpr, constants = _open(jaxpr)
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*map(constant, constants), *arguments), strict=True))
    read = lambda v: constant(np.asarray(v.val, aval_of(v).dtype)) if isinstance(v, core.Literal) else values[v]
    for i, equation in enumerate(jaxpr.eqns):
        inputs, here = [read(v) for v in equation.invars], (*where, i)
        called = _called(equation)
        outs = apply(equation, inputs, here) if called is None else _evaluate(called, inputs, apply, constant, here)
        values |= dict(zip(equation.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _bind(equation, inputs, params) -> Sequence[Any]:
    outs = equation.primitive.bind(*inputs, **params)
    return outs if equation.primitive.multiple_results else [outs]


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
    return inside[0] if inside and len(_open(inside[0])[0].invars) == len(equation.invars) else None


def _open(jaxpr: Any) -> tuple[core.Jaxpr, Sequence[Any]]:
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, ())


def _body(equation) -> Any:
    return equation.params["jaxpr" if equation.primitive.name == "scan" else "body_jaxpr"]
