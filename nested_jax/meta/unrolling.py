"""Inner loops of any length that can be differentiated: a scan that keeps few of its states."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nested_jax.errors import UserError
from nested_jax.level import Checkpoint, scan, stream_length
from nested_jax.typing import PyTree


def unroll(
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    state: PyTree,
    xs: PyTree,
    *,
    checkpoint: Checkpoint = "sqrt",
    debug: bool = False,
    offload: bool = False,
) -> tuple[PyTree, PyTree]:
    """Runs an inner loop, as `jax.lax.scan` does, and computes again in the backward pass what it did not keep.

        state_t, y_t = step(state_{t-1}, x_t)

    Of T steps, the backward pass holds about

    | `checkpoint` | states | what happens inside steps | forward passes |
    |---|---|---|---|
    | "none" | - | of all T | 1 |
    | "full" | T | of one | 2 |
    | n | n | of T / n | 2 |
    | "sqrt" | sqrt T | of sqrt T | 2 |
    | (n, m, ...) | n + m + ... | of T / (n m ...) | 1 + how many numbers |
    | "log" | 4 log_4 T | of at most 3 | 1 + log_4 T |

    and the part of xs that a segment reads, of each layer of segments: a quarter of it with "log".

    Args:
        step: (state, x) -> (state, y), pure. An optax optimizer is one: its state and the parameters are the state, its
            gradient is taken inside.
        state: where the loop starts, a pytree of arrays.
        xs: pytree of arrays with a leading axis of T, what each step is given.
        checkpoint: see above. A `Level` takes the same: `nested_jax.run(level, ..., checkpoint=...)`.
        debug: a plain Python loop instead, step by step, in which `print` and a debugger see numbers; not under `jit`.
        offload: keep the states before segments in the host's memory, where the backend has one ("pinned_host"); not of
            "none" and "full", which have no segments.

    Returns:
        (state, ys), each y stacked along a leading axis of T.

    Raises:
        UserError: an empty context, leaves of several lengths, more segments than steps, a step that changes the state's
            structure, or a leaf's shape or type.

    Source: NL section 3.3 (transfer by initialisation); nested rematerialisation as in MixFlow-MG.

    The derivative of 100 steps of gradient descent on (w - target)^2 / 2 with respect to their learning rate:

    >>> def solution(rate, target=1.0):
    ...     step = lambda w, _: (w - rate * (w - target), w)
    ...     return unroll(step, jnp.zeros(()), jnp.arange(100))[0]
    >>> print(jax.grad(solution)(0.01).round(4), round(100 * 0.99**99, 4))
    36.973 36.973
    """
    length = stream_length(xs)
    _assert_steady(step, state, xs)
    if debug:
        return _loop(step, state, xs, length)
    return scan(step, state, xs, checkpoint=checkpoint, offload=offload)


def _loop(step, state, xs, length):
    outputs = []
    for t in range(length):
        state, y = step(state, jax.tree.map(lambda x: x[t], xs))  # noqa: B023
        outputs.append(y)
    return state, jax.tree.map(lambda *each: jnp.stack(each), *outputs)


def _assert_steady(step, state, xs) -> None:
    """Raises UserError for the first leaf of the state that a step makes another."""
    after, _ = jax.eval_shape(step, state, jax.tree.map(lambda x: x[0], xs))
    was, now = (jax.tree_util.tree_leaves_with_path(tree) for tree in (jax.eval_shape(lambda s: s, state), after))
    if jax.tree.structure(state) != jax.tree.structure(after):
        odd = sorted({jax.tree_util.keystr(path) for path, _ in was} ^ {jax.tree_util.keystr(path) for path, _ in now})
        raise UserError(
            f"unroll: the step changes the state's structure at state{odd[0] if odd else ''}: return it as it came"
        )
    for (path, a), (_, b) in zip(was, now, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            what = lambda x: f"{x.dtype.name}{list(x.shape)}"
            leaf = f"state{jax.tree_util.keystr(path)}"
            raise UserError(f"unroll: the step changes {leaf} from {what(a)} to {what(b)}: return it as it came")
