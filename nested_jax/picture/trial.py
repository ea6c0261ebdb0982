"""An optimizer's update measured: taken apart, and run on small stand-ins of the parameters with random gradients.

The update is traced with the types of the parameters and run in double precision, so that what is measured is its law and
not the rounding of a memory in bfloat16.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_jax.jaxpr.interpret import measured, wide, widened
from nested_jax.picture.graph import Graph
from nested_jax.typing import PyTree

LEAST, MOST = 64, 1024  # steps that are run: at least, and at most until everything that can learn has changed twice
RECENT = 16  # last steps whose arguments are kept

Extra = Callable[[PyTree], dict[str, Any]]  # parameters -> what `update` takes besides gradients and parameters


class Recurrence(NamedTuple):
    """m <- keep m + add g^power, as measured; None where the new memory is not of that form.

    apart: what is added does not depend on m. whole: nothing else is added, as far as m is kept by one factor. varies:
    whether `keep` and `add` differ at another step. pull: (1 - keep) / add, as exactly as the types tell.
    """

    keep: float | None
    add: float | None
    power: int | None
    apart: bool
    whole: bool = False
    varies: tuple[bool, bool] = (False, False)
    pull: float = 0.0


class Trial:
    """Measurements of an optimizer's update.

    Arguments are numbered leaves: `kept` = (parameters, state), then the gradients, then the arrays of `extra`. Two runs
    with other gradients tell what depends on the step alone: a period does; when a running maximum changes does not.

    changes: the steps at which each leaf changed; a parameter with an update of zero did not. emptied: leaves that turn zero
    at the same steps whatever the gradients. before: the arguments at the last change of each leaf; earlier: at the third,
    or at the first of two. branches: of every cond the branch of each step, of every while loop how often it ran.
    """

    def __init__(self, optimizer: optax.GradientTransformation, shapes: PyTree, extra: Extra | None):
        update = optax.with_extra_args_support(optimizer).update
        self._rng = np.random.default_rng(0)
        draw = lambda leaf: jnp.asarray(self._rng.normal(size=leaf.shape), leaf.dtype)
        self.params = jax.tree.map(draw, _stand_in(optimizer, shapes))
        self.state = jax.tree.map(jnp.asarray, optimizer.init(self.params))
        self.kept = len(jax.tree.leaves(self.params)), len(jax.tree.leaves(self.state))
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        self.scale = 0.1 * max(size, 1) ** -0.5  # a norm of all gradients below that of usual clipping
        more, form = jax.tree_util.tree_flatten_with_path({} if extra is None else extra(self.params))
        arrays = [i for i, (_, leaf) in enumerate(more) if isinstance(leaf, (jax.Array, np.ndarray, np.generic, float))]
        self.keywords = [str(more[i][0][0].key) for i in arrays]
        leaves, structure = jax.tree.flatten((self.params, self.state, self.params))
        first = len(leaves)
        leaves += [jnp.asarray(more[i][1]) for i in arrays]

        def step(*leaves):
            params, state, gradients = structure.unflatten(leaves[:first])
            given = dict(zip(arrays, leaves[first:], strict=True))
            extra = form.unflatten([given.get(i, leaf) for i, (_, leaf) in enumerate(more)])
            updates, state = update(gradients, state, params, **extra)
            if jax.tree.map(jnp.shape, updates) != jax.tree.map(jnp.shape, params):
                raise ValueError("its updates have other shapes than the parameters")
            return [*jax.tree.leaves(updates), *jax.tree.leaves(state)]

        self.shapes = [leaf.shape for leaf in leaves]
        self.types = [leaf.dtype for leaf in leaves]
        self.learns = [jnp.issubdtype(kind, jnp.inexact) for kind in self.types]
        traced = widened(jax.make_jaxpr(step)(*leaves))
        with jax.enable_x64(True):
            leaves = [*map(wide, leaves)]
            self.graph = Graph(traced, *leaves)
            self._compiled = jax.jit(lambda *leaves: measured(self.graph.closed, leaves))
            self._run(leaves)

    def inputs(self) -> dict[str, set[int]]:
        """The graph's inputs that carry data, by what they are: gradients, weights, and `extra` by its keywords."""
        n, s = self.kept
        named = {"gradients": set(self.graph.inputs[n + s : 2 * n + s]), "weights": set(self.graph.inputs[:n])}
        for keyword, value in zip(self.keywords, self.graph.inputs[2 * n + s :], strict=True):
            named.setdefault(keyword, set()).add(value)
        return named

    def _moved(self, before: Sequence[Any], outs: Sequence[Any]) -> list[list[bool]]:
        """Of every kept leaf, whether a step changed it, and whether it is zero now."""
        n, leaves = self.kept[0], [np.asarray(out) if f else None for out, f in zip(outs, self.learns, strict=False)]
        was = [0 if i < n or out is None else np.asarray(before[i]) for i, out in enumerate(leaves)]
        moved = [out is not None and bool(np.any(out != old)) for out, old in zip(leaves, was, strict=True)]
        return [moved, [out is not None and not out.any() for out in leaves]]

    def _run(self, leaves: list[Any]) -> None:
        n, kept = self.kept[0], sum(self.kept)
        self._constants = leaves[kept + n :]
        gradients = set(self.graph.inputs[kept : kept + n])
        live = [i for i in range(kept) if self.learns[i] and self.graph.behind([self.graph.outputs[i]]) & gradients]
        self.before = [leaves] * kept
        self.earlier = [leaves] * kept
        self.changes: list[list[int]] = [[] for _ in range(kept)]
        self.recent: deque[list[Any]] = deque(maxlen=RECENT)
        runs, flags, found, waiting = [leaves[:kept]] * 2, [], [], True
        while len(flags) < MOST and waiting:
            given = [[*now, *self.gradients(), *self._constants] for now in runs]
            results = [self._compiled(*arguments) for arguments in given]
            runs = [[w + u if f else w for w, u, f in zip(now[:n], outs[:n], self.learns, strict=False)] + outs[n:]
                    for now, (outs, _) in zip(runs, results, strict=True)]  # fmt: skip
            flag = [self._moved(arguments, outs) for arguments, (outs, _) in zip(given, results, strict=True)]
            self.recent.append(given[0])
            for i in np.flatnonzero(flag[0][0]):
                self.changes[i].append(len(flags))
                if len(self.changes[i]) in (2, 3):
                    self.earlier[i] = self.before[i]
                self.before[i] = given[0]
            flags.append(flag)
            found.append(results[0][1])
            if len(flags) == LEAST:
                live = [i for i in live if self.changes[i] or i < n or self.recurrence([i], [None]).keep]
            waiting = len(flags) < LEAST or any(len(self.changes[i]) < 2 for i in live)
        (moved, empty), (moved_too, empty_too) = np.moveaxis(np.array(flags), 0, 2)
        self.emptied = np.any(np.cumsum(~empty, 0).astype(bool) & empty, 0) & np.all(empty == empty_too, 0)
        self._periodic = np.all(moved == moved_too, 0)
        self._steps = [np.flatnonzero(moved[:, i] | moved_too[:, i]) for i in range(kept)]
        self.branches = {where: np.array([int(here[where]) for here in found]) for where in found[0]}

    def gradients(self) -> list[Any]:
        """Random ones."""
        draw = lambda w: self._rng.normal(size=w.shape) * self.scale
        return [np.asarray(draw(w), wide(np.dtype(w.dtype))) for w in jax.tree.leaves(self.params)]

    def frequency(self, leaf: int) -> float:
        """Updates per step: one over the time between two changes.

        Where the gradients decide whether a leaf changes, it is computed at every step that they could have chosen.
        """
        steps = [-1, *self._steps[leaf]] if len(self._steps[leaf]) == 1 else self._steps[leaf]
        if len(steps) == 0:
            return 0.0
        apart = np.diff(steps)
        return float(1 / (np.median(apart) if self._periodic[leaf] else math.gcd(*map(int, apart))))

    def recurrence(self, leaves: Sequence[int], streams: Sequence[int | None], along: Sequence[int] = ()) -> Recurrence:
        """The law of some leaves together, by differences, at the last step at which they changed and at an earlier one.

        Args:
            streams: for each, the gradient or the parameter of its shape that it could be a memory of; None for neither.
            along: leaves that are shifted with them, each like the first of its shape in `leaves`.
        """
        latest = max(leaves, key=lambda i: self.changes[i][-1] if self.changes[i] else -1)
        law, other = (self._law(at[latest], leaves, streams, along) for at in (self.before, self.earlier))
        keep = None if other.keep is None else law.keep
        same = (law.power, law.add is None) == (other.power, other.add is None)
        add, power = (law.add, law.power) if same else (None, None)
        differ = lambda a, b: a is not None and not _close(a, b)
        varies = differ(keep, other.keep), differ(add, other.add)
        eps = max(float(jnp.finfo(self.types[i]).eps) for i in leaves) if all(self.learns[i] for i in leaves) else 0.0
        keep, add = _plain(keep, eps), _plain(add, eps)
        rest = 0.0 if keep is None or abs(1 - keep) < 1e-9 else 1 - keep
        pull = _plain(rest / abs(add), eps / abs(rest)) if add and rest else 0.0  # 1 - keep is as inexact as keep
        return Recurrence(keep, add, power, law.apart and other.apart, law.whole and other.whole, varies, pull or 0.0)

    def _law(
        self, base: Sequence[Any], leaves: Sequence[int], streams: Sequence[int | None], along: Sequence[int]
    ) -> Recurrence:
        n, kept = self.kept[0], sum(self.kept)
        size = lambda i: max(float(np.linalg.norm(base[i])) / max(np.size(base[i]), 1) ** 0.5, self.scale)
        normal = lambda i: np.abs(self._rng.normal(size=self.shapes[i])) * size(i)
        d = {i: np.asarray(normal(i), np.asarray(base[i]).dtype) for i in leaves}
        d |= {i: next(d[j] for j in leaves if self.shapes[j] == self.shapes[i]) for i in along}
        kind = range(n) if any(stream is not None and stream < n for stream in streams) else range(kept, kept + n)
        h = dict(zip(kind, self.gradients(), strict=True))
        zero = np.zeros(())

        def at(memory: float, stream: float) -> np.ndarray:
            outs = self._compiled(*[x + memory * d.get(i, zero) + stream * h.get(i, zero) if i in d or i in h else x
                               for i, x in enumerate(base)])[0]  # fmt: skip
            return _flat([outs[i] for i in leaves])

        still = at(0, 0)
        by_memory, by_stream = at(1, 0) - still, at(0, 1) - still
        noise = 1e-12 * float(np.linalg.norm(still))
        moved = _flat([d[i] for i in leaves])
        keep = _ratio(by_memory, moved, noise)
        if keep is not None and not _close(keep, _ratio(at(2, 0) - still, 2 * moved, noise)):
            keep = None  # of a single number, any change is some factor of it
        now = _flat([base[i] for i in leaves])
        silent = max(np.linalg.norm(by_stream), np.linalg.norm(still - (keep or 0) * now)) <= 1e-9 * np.linalg.norm(still)
        if keep and abs(keep - 1) > 1e-9 and silent and min(leaves) >= n:
            keep = None  # nothing is added: it is multiplied by what other things decide
        apart = np.allclose(at(1, 1) - at(0, 1), by_memory, rtol=1e-6, atol=1e-9 * np.abs(by_memory).max(initial=0))
        read = [stream for stream in streams if stream is not None]
        if len(read) < len(streams):
            return Recurrence(keep, None, None, apart)
        own = _flat([h[i] for i in read])
        here = _flat([base[i] for i in read])

        far, back = at(0, 2) - still, at(0, -1) - still
        for power, near, further in ((1, by_stream, far / 2), (2, (by_stream + back) / 2, far / 2 - by_stream)):
            add = _ratio(near, own**power, noise)
            if add is not None and _close(add, _ratio(further, own**power, noise)):
                rest = still - add * here**power - (keep or 0) * now
                whole = keep is None or np.linalg.norm(rest) <= 1e-5 * np.linalg.norm(still)
                return Recurrence(keep, add, power, apart, bool(whole))
        return Recurrence(keep, None, None, apart)

    def own_rate(self, leaves: Sequence[int], far: bool) -> float | None:
        """-eta, if the update of each of these parameters is -eta g with an eta that depends on g; None for any other.

        far: compare with much larger gradients, which a clipping of usual gradients would change too.
        """
        kept, base = sum(self.kept), self.before[leaves[0]]
        rates = []
        for factor in (1.0, 1e3 if far else 2.0):
            gradients = [factor * g for g in base[kept : kept + self.kept[0]]]
            outs = self._compiled(*base[:kept], *gradients, *self._constants)[0]
            rates.append([_ratio(_flat([outs[i]]), _flat([gradients[i]]), 0.0) for i in leaves])
        small, large = rates
        if None in small or None in large or all(map(_close, small, large)):
            return None
        return small[0]

    def copies(self, parameter: int) -> list[int]:
        """Leaves of the state that start as copies of a parameter."""
        n, s = self.kept
        leaves = [*jax.tree.leaves(self.params), *jax.tree.leaves(self.state)]
        return [i for i in range(n, n + s) if np.array_equal(leaves[i], leaves[parameter])]

    def restarts(self, parameter: int) -> int | None:
        """After how many steps a parameter is replaced by a function of other things; None if never, or at every step."""
        forgets = []
        for base in self.recent:
            shifted = [x + 1.0 if i == parameter else x for i, x in enumerate(base)]
            before, after = (np.asarray(self._compiled(*given)[0][parameter]) for given in (base, shifted))
            forgets.append(np.allclose(after - before, -1.0, atol=1e-9))
        steps = np.flatnonzero(forgets)
        return int(np.median(np.diff(steps))) if 1 < len(steps) < len(forgets) else None


def _stand_in(optimizer: optax.GradientTransformation, shapes: PyTree) -> PyTree:
    """The parameters with axes as short as leaves the state's structure what it is."""
    kinds = lambda state: (jax.tree.structure(state), [leaf.ndim for leaf in jax.tree.leaves(state)])
    whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, _real(leaf.dtype)), shapes)
    for most in (4, 32, 160):
        cut = lambda leaf, most=most: jax.ShapeDtypeStruct(tuple(min(n, most) for n in leaf.shape), leaf.dtype)
        small = jax.tree.map(cut, whole)
        try:
            if kinds(jax.eval_shape(optimizer.init, small)) == kinds(jax.eval_shape(optimizer.init, shapes)):
                return small
        except (ValueError, TypeError):  # it holds arrays of the parameters' own shapes
            continue
    return whole


def _real(dtype: Any) -> Any:
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
    if number is None:
        return None
    rounded = (float(f"{number:.{digits}g}") for digits in range(1, 18))
    return next((short for short in rounded if abs(short - number) <= eps / 2 * abs(number)), number)
