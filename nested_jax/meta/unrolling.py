"""Differentiable inner loops of any length: a scan that keeps few of its states."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nested_jax.remat import Checkpoint, assert_same, scan, segments_of, stream_length
from nested_jax.typing import PyTree


def unroll(
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    state: PyTree,
    xs: PyTree = None,
    length: int | None = None,
    *,
    checkpoint: Checkpoint = "sqrt",
    debug: bool = False,
    offload: bool = False,
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan` whose backward pass recomputes the states that it did not keep.

        state_t, y_t = step(state_{t-1}, x_t)

    For T steps, the backward pass keeps about

    | `checkpoint` | states | residuals of steps | forward passes |
    |---|---|---|---|
    | "none" | - | of all T | 1 |
    | "full" | T | of one | 2 |
    | n | n | of T / n | 2 |
    | "sqrt" | sqrt T | of sqrt T | 2 |
    | (n, m, ...) | n + m + ... | of T / (n m ...) | 1 + length of the tuple |
    | "log" | 4 log_4 T | of at most 3 | 1 + log_4 T |

    and no copy of xs, which steps read by index.

    Args:
        step: (state, x) -> (state, y), pure. For an optax optimizer, the state is (parameters, optimizer state), and the
            step computes the gradient.
        state: the initial state, a pytree of arrays.
        xs: pytree of arrays (T, ...), one slice a step; None for steps without inputs.
        length: T, needed where xs has no arrays.
        checkpoint: see above; `nested_jax.run(level, ..., checkpoint=...)` takes the same.
        debug: run a Python loop instead, with concrete values for `print` and debuggers; not under `jit`.
        offload: keep the states before segments in the host's memory ("pinned_host"), where the backend has one; not with
            "none" and "full", which have no segments.

    Returns:
        (state, ys), each y stacked along a leading axis of T.

    Raises:
        UserError: xs is empty or has leaves of different lengths or of another one than `length`, there are more segments
            than steps, or the step changes the state's structure or a leaf's shape or dtype.

    Source: Kemaev et al., MixFlow-MG, arXiv 2505.00793 (nested rematerialisation); NL Section 3.3 (initialisation).

    The derivative of 100 steps of gradient descent on (w - target)^2 / 2 with respect to their learning rate:

    >>> def solution(rate, target=1.0):
    ...     step = lambda w, _: (w - rate * (w - target), w)
    ...     return unroll(step, jnp.zeros(()), length=100)[0]
    >>> print(jax.grad(solution)(0.01).round(4), round(100 * 0.99**99, 4))
    36.973 36.973
    """
    if debug:
        length = stream_length(xs, length)
        segments_of(checkpoint, length, offload)
        return _loop(step, state, xs, length)
    return scan(step, state, xs, length, checkpoint=checkpoint, offload=offload, name="unroll")


def _loop(step, state, xs, length):
    outputs = []
    for t in range(length):
        before, (state, y) = state, step(state, jax.tree.map(lambda x: x[t], xs))  # noqa: B023
        assert_same("unroll", before, state)
        outputs.append(y)
    return state, jax.tree.map(lambda *ys: jnp.stack(ys), *outputs)
