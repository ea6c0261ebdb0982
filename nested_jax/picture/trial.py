"""An optimizer on trial: its update, taken apart and run on small stand-ins of the parameters with random gradients.

It is traced with the types of the parameters and run in double precision, so that what is measured is its law, and not the
rounding of a memory in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_jax.picture.graph import Graph, measured, wide, widened
from nested_jax.typing import PyTree

LEAST, MOST = 64, 1024  # steps that are run: at least, and at most until everything that can learn has moved twice


class Recurrence(NamedTuple):
    """m <- keep m + add g^power, as measured; None where the new memory is not of that form.

    `apart`: what is added does not depend on m. `whole`: nothing else is added, as far as m is kept by one factor. `varies`:
    whether `keep` and `add` are other numbers at another step.
    """

    keep: float | None
    add: float | None
    power: int | None
    apart: bool
    whole: bool = False
    varies: tuple[bool, bool] = (False, False)


class Trial:
    """What some steps have shown. Leaves are numbered: those of the parameters, then those of the state, then gradients.

    changes: steps at which each changed; an update that is exactly zero changes no parameter. emptied: leaves that held
    something and then, after a step, nothing. branches: of every cond, the share of steps in each branch; and of every while
    loop, how often it ran a step.
    """

    def __init__(self, optimizer: optax.GradientTransformation, shapes: PyTree, extra: Callable | None):
        update = optax.with_extra_args_support(optimizer).update
        rng = np.random.default_rng(0)
        draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        self.params = jax.tree.map(draw, _stand_in(optimizer, shapes))
        self.state = jax.tree.map(jnp.asarray, optimizer.init(self.params))
        self.kept = len(jax.tree.leaves(self.params)), len(jax.tree.leaves(self.state))
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        self.scale = 0.1 * max(size, 1) ** -0.5  # a norm of all gradients that no usual clipping changes
        self._rng = rng
        more = {} if extra is None else extra(self.params)
        leaves, structure = jax.tree.flatten((self.params, self.state, self.params))

        def step(*leaves):
            params, state, gradients = structure.unflatten(leaves)
            updates, state = update(gradients, state, params, **more)
            return [*jax.tree.leaves(updates), *jax.tree.leaves(state)]

        self.shapes = [leaf.shape for leaf in leaves]
        self.types = [leaf.dtype for leaf in leaves]
        self.learns = [jnp.issubdtype(kind, jnp.inexact) for kind in self.types]
        traced = widened(jax.make_jaxpr(step)(*leaves))
        with jax.enable_x64(True):
            leaves = [*map(wide, leaves)]
            self.graph = Graph(traced, *leaves)
            self.call = jax.jit(traced)
            self._moved = jax.jit(self._step)
            self._run(leaves)

    def _step(self, leaves):
        outs, found = measured(self.graph.closed, leaves)
        n, learns = self.kept[0], self.learns
        moved = [jnp.any(out != 0) for out in outs[:n]]
        moved += [jnp.any(a != b) if f else False for a, b, f in zip(outs[n:], leaves[n:], learns[n:], strict=False)]
        empty = [jnp.all(out == 0) if f else False for out, f in zip(outs, learns, strict=False)]
        after = [w + u if f else w for w, u, f in zip(leaves[:n], outs[:n], learns, strict=False)] + outs[n:]
        return after, jnp.array(moved), jnp.array(empty), found

    def _run(self, leaves):
        n = sum(self.kept)
        now = list(leaves[:n])
        self.before = [leaves] * n  # what each was computed from when it last changed
        self.earlier = [leaves] * n  # and when it changed for the second time, or for the first if there were but two
        self.changes, self.emptied = [[] for _ in range(n)], np.zeros(n, bool)
        held, found = np.zeros(n, bool), []
        gradients = set(self.graph.inputs[n:])
        live = [i for i in range(n) if self.learns[i] and self.graph.behind([self.graph.outputs[i]]) & gradients]
        step, waiting = 0, True
        while step < MOST and waiting:
            arguments = [*now, *self.gradients()]
            now, moved, empty, here = self._moved(arguments)
            moved, empty = np.asarray(moved), np.asarray(empty)
            for i in np.flatnonzero(moved):
                self.changes[i].append(step)
                if len(self.changes[i]) in (2, 3):
                    self.earlier[i] = self.before[i]
                self.before[i] = arguments
            self.emptied |= held & empty
            held |= ~empty
            found.append(here)
            step += 1
            if step == LEAST:
                live = [i for i in live if self.changes[i] or i < self.kept[0] or self.recurrence([i], [None]).keep]
            waiting = step < LEAST or any(len(self.changes[i]) < 2 for i in live)
        share = lambda where: np.array([int(here[where]) for here in found])
        self.branches = {where: share(where) for where in found[0]}

    def gradients(self) -> list[jax.Array]:
        """Random ones."""
        draw = lambda w: self._rng.normal(size=w.shape) * self.scale
        return [jnp.asarray(draw(w), wide(w.dtype)) for w in jax.tree.leaves(self.params)]

    def frequency(self, leaf: int) -> float:
        """Changes a step: one over the median time between two."""
        times = [-1, *self.changes[leaf]] if len(self.changes[leaf]) == 1 else self.changes[leaf]
        return float(1 / np.median(np.diff(times))) if times else 0.0

    def recurrence(self, leaves: Sequence[int], gradients: Sequence[int | None]) -> Recurrence:
        """The law of some leaves together, by differences, at the last step at which they changed and an earlier one.

        Args:
            gradients: the leaf of the gradients that belongs to each, of its shape; None if there is none.
        """
        latest = max(leaves, key=lambda i: self.changes[i][-1] if self.changes[i] else -1)
        law, other = (self._law(at[latest], leaves, gradients) for at in (self.before, self.earlier))
        keep = None if other.keep is None else law.keep
        add, power = (
            (None, None) if (law.power, law.add is None) != (other.power, other.add is None) else (law.add, law.power)
        )
        differ = lambda a, b: a is not None and not _close(a, b)
        varies = differ(keep, other.keep), differ(add, other.add)
        eps = max(float(jnp.finfo(self.types[i]).eps) for i in leaves) if all(self.learns[i] for i in leaves) else 0
        return Recurrence(
            _plain(keep, eps), _plain(add, eps), power, law.apart and other.apart, law.whole and other.whole, varies
        )

    def _law(self, base: Sequence[Any], leaves: Sequence[int], gradients: Sequence[int | None]) -> Recurrence:
        n, h = sum(self.kept), self.gradients()
        size = lambda i: max(float(jnp.sqrt(jnp.mean(jnp.square(base[i])))), self.scale)
        d = {i: jnp.abs(jnp.asarray(self._rng.normal(size=base[i].shape), base[i].dtype)) * size(i) for i in leaves}

        def at(memory, gradient):
            moved = [x + memory * d[i] if i in d else x for i, x in enumerate(base[:n])]
            outs = self.call(*moved, *(g + gradient * x for g, x in zip(base[n:], h, strict=True)))
            return _flat([outs[i] for i in leaves])

        still = at(0, 0)
        by_memory, by_gradient = at(1, 0) - still, at(0, 1) - still
        noise = 1e-12 * np.linalg.norm(still)
        moved = _flat([d[i] for i in leaves])
        keep = _ratio(by_memory, moved, noise)
        if keep is not None and not _close(keep, _ratio(at(2, 0) - still, 2 * moved, noise)):
            keep = None  # of a single number, any change is some factor of it
        apart = np.allclose(at(1, 1) - at(0, 1), by_memory, rtol=1e-6, atol=1e-9 * np.abs(by_memory).max(initial=0))
        if any(g is None for g in gradients):
            return Recurrence(keep, None, None, apart)
        own = _flat([h[g] for g in gradients])
        here, now = _flat([base[n + g] for g in gradients]), _flat([base[i] for i in leaves])

        def law(add, power):
            rest = still - add * here**power - (keep or 0) * now
            whole = keep is None or np.linalg.norm(rest) <= 1e-5 * np.linalg.norm(still)
            return Recurrence(keep, add, power, apart, bool(whole))

        add = _ratio(by_gradient, own, noise)
        if add is not None and _close(add, _ratio(at(0, 2) - still, 2 * own, noise)):
            return law(add, 1)
        add = _ratio(by_gradient + at(0, -1) - still, 2 * own**2, noise)
        if add is not None and _close(add, _ratio(at(0, 2) - 2 * at(0, 1) + still, 2 * own**2, noise)):
            return law(add, 2)
        return Recurrence(keep, None, None, apart)


def _stand_in(optimizer, shapes: PyTree) -> PyTree:
    """The parameters with axes as short as leaves the state's structure what it is."""
    kinds = lambda state: (jax.tree.structure(state), [leaf.ndim for leaf in jax.tree.leaves(state)])
    for most in (4, 32, 160, None):
        cut = lambda leaf, most=most: jax.ShapeDtypeStruct(tuple(min(n, most or n) for n in leaf.shape), _real(leaf.dtype))
        small = jax.tree.map(cut, shapes)
        if most is None:
            return small
        try:
            if kinds(jax.eval_shape(optimizer.init, small)) == kinds(jax.eval_shape(optimizer.init, shapes)):
                return small
        except (ValueError, TypeError):  # it holds arrays of the parameters' own shapes
            continue


def _real(dtype):
    return jnp.float32 if jnp.issubdtype(dtype, jnp.complexfloating) else dtype


def _flat(leaves: Sequence[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in leaves])


def _ratio(y: np.ndarray, x: np.ndarray, noise: float) -> float | None:
    """c of y = c x, None if there is none; y of at most the size of the noise is zero."""
    if np.linalg.norm(y) <= noise:
        return 0.0
    c = float(y @ x / (x @ x))
    return c if np.linalg.norm(y - c * x) <= 1e-5 * np.linalg.norm(y) else None


def _close(a: float, b: float | None) -> bool:
    return b is not None and abs(a - b) <= 1e-5 * abs(a)


def _plain(number: float | None, eps: float) -> float | None:
    """The shortest decimal number that a type of this precision cannot tell from it.

    >>> _plain(0.8984375, 2**-7), _plain(0.8999999761581421, 2**-23), _plain(1 / 3, 2**-7)
    (0.9, 0.9, 0.333)
    """
    rounded = (float(f"{number:.{digits}g}") for digits in range(1, 18)) if number is not None else ()
    return next((short for short in rounded if abs(short - number) <= eps / 2 * abs(number)), number)
