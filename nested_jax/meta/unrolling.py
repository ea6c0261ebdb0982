"""Inner loops of any length that can be differentiated: a scan that keeps few of its states."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nested_jax.remat import Checkpoint, assert_same, scan, segments_of, stream_length
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
    if debug:
        segments_of(checkpoint, stream_length(xs), offload)
        return _loop(step, state, xs)
    return scan(step, state, xs, checkpoint=checkpoint, offload=offload, who="unroll")


def _loop(step, state, xs):
    outputs = []
    for t in range(stream_length(xs)):
        before, (state, y) = state, step(state, jax.tree.map(lambda x: x[t], xs))  # noqa: B023
        assert_same("unroll", before, state)
        outputs.append(y)
    return state, jax.tree.map(lambda *each: jnp.stack(each), *outputs)
