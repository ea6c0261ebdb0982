"""What every value of a computation is made from: its jaxpr, with calls, branches and loops laid open."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from nested_jax.jaxpr.interpret import Where, interpret, opened
from nested_jax.jaxpr.walk import scan_counts

Branch = tuple[Where, int]  # where a cond is in the jaxpr, and which of its branches

_SAME = {"convert_element_type", "copy", "copy_p", "reshape", "transpose", "squeeze", "expand_dims", "optimization_barrier"}


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
        return self.branch, self.length, tuple(e.primitive.name for e in opened(_body(self.equation))[0].eqns)


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
        return interpret(jaxpr, arguments, apply, self._literal, where)

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


def _body(equation) -> Any:
    return equation.params["jaxpr" if equation.primitive.name == "scan" else "body_jaxpr"]
