"""M3, multi-scale momentum Muon: a fast and a slow memory of gradients, both read through Newton-Schulz."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_jax.numerics import safe_divide, safe_sqrt, upcast, zeros
from nested_jax.optim._adam_memory import grow
from nested_jax.optim._hyperparameters import check, check_count, check_period
from nested_jax.optim._newton_schulz import newton_schulz
from nested_jax.optim._nonlinear_momentum import NonlinearMomentumState, as_muon, remember
from nested_jax.paths import DimensionNumbers, assert_matrices, map_matrices
from nested_jax.typing import Array, PyTree


class M3State(NamedTuple):
    """All but the count are of the parameters' shapes, in float32 or finer."""

    count: Array  # steps taken
    fast: PyTree  # memory of every gradient
    second: PyTree  # of its square; None without the second moment
    pending: PyTree  # sum of gradients since the slow memory's last step
    slow: PyTree  # memory of those sums
    orthogonal: PyTree  # the slow memory after Newton-Schulz, as of its last step


def scale_by_m3(
    fast: float = 0.95,
    second: float = 0.999,
    slow: float = 0.9,
    *,
    slow_weight: float = 0.5,
    slow_period: int = 8,
    steps: int = 5,
    average: bool = True,
    nesterov: bool = True,
    second_moment: bool = True,
    eps: float = 1e-8,
    dimension_numbers: DimensionNumbers = None,
) -> optax.GradientTransformation:
    """Two memories of gradients of different frequency, each made orthogonal by Newton-Schulz (NL §7.2, Alg. 1).

        every step:               m1 <- m1 + fast g          h <- h + second g^2
        every slow_period steps:  m2 <- m2 + slow sum g      o2 <- NS(m2)
        emits (NS(m1) + slow_weight o2) / (sqrt(h) + eps)

    That is the paper's form, `average=False`. With averages, m1 and h are those of Adam with their bias corrections (m1 read
    ahead with nesterov, as Muon does), and m2 is the average of its sums; NS does not see their scale. NS(m2) is computed at
    its own frequency alone. The second moment makes updates of the size of 1 / |g|: the learning rate then depends on the
    scale of the loss.

    Args:
        fast, second, slow: of averages, decays from 0 to below 1; of sums, weights.
        slow_weight: weight of the slow memory, at least 0.
        slow_period: steps between two steps of the slow memory.
        steps: of Newton-Schulz.
        average: averages, or the paper's sums.
        nesterov: look one step ahead, of averages; sums are read as they are.
        second_moment: False leaves the division out.
        eps: keeps the division finite.
        dimension_numbers: which leaves are matrices, and along which axes; as optax's Muon takes them (see `matrices`).
            None: leaves of two axes.

    Raises:
        UserError: a hyperparameter is out of range, or a parameter is no matrix.
    """
    check("m3", low=0.0, below=1.0 if average else math.inf, fast=fast, second=second, slow=slow)
    check("m3", low=0.0, slow_weight=slow_weight, eps=eps)
    check_period("m3", slow_period=slow_period)
    check_count("m3", steps=steps)
    orthogonal = lambda tree: map_matrices(lambda m: newton_schulz(m, steps), dimension_numbers, tree, rule="m3")

    def init(params):
        assert_matrices("m3", dimension_numbers, params)
        second = zeros(params) if second_moment else None
        return M3State(jnp.zeros((), jnp.int32), zeros(params), second, zeros(params), zeros(params), zeros(params))

    def remember_slowly(pending, memory, _):
        memory = grow(memory, pending, slow, average)
        return jax.tree.map(jnp.zeros_like, pending), memory, orthogonal(memory)

    def update(updates, state, params=None):
        del params
        gradients = upcast(updates)
        count = optax.safe_increment(state.count)
        if average:
            ahead, (_, first) = remember(gradients, NonlinearMomentumState(state.count, state.fast), fast, True, nesterov)
        else:
            first = ahead = grow(state.fast, gradients, fast, average=False)
        pending = jax.tree.map(jnp.add, state.pending, gradients)
        due = count % slow_period == 0
        wait = lambda *held: held
        pending, memory, held = jax.lax.cond(due, remember_slowly, wait, pending, state.slow, state.orthogonal)
        emitted = jax.tree.map(lambda a, b: a + slow_weight * b, orthogonal(ahead), held)
        squares = state.second
        if second_moment:
            squares = grow(squares, jax.tree.map(jnp.square, gradients), second, average)
            mean = optax.tree.bias_correction(squares, second, count) if average else squares
            over = lambda a, h: safe_divide(a, jnp.where(h > 0, safe_sqrt(h) + eps, 0))  # nothing came: nothing moves
            emitted = jax.tree.map(over, emitted, mean)
        return optax.tree.cast_like(emitted, updates), M3State(count, first, squares, pending, memory, held)

    return optax.GradientTransformation(init, update)


def m3(
    learning_rate: optax.ScalarOrSchedule,
    fast: float = 0.95,
    second: float = 0.999,
    slow: float = 0.9,
    *,
    slow_weight: float = 0.5,
    slow_period: int = 8,
    steps: int = 5,
    average: bool = True,
    nesterov: bool = True,
    second_moment: bool = True,
    eps: float = 1e-8,
    consistent_rms: float | None = None,
    weight_decay: float = 0.0,
    weight_decay_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    vectors: optax.GradientTransformation | None = None,
    dimension_numbers: DimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """M3: `scale_by_m3` with Muon's scaling by shape, weight decay and rule for vectors.

    Averages, `slow_weight=0` and `second_moment=False` make it Muon.

    Args:
        learning_rate: a number or a schedule.
        fast, second, slow, slow_weight, slow_period, steps, average, nesterov, second_moment, eps, dimension_numbers: as
            of `scale_by_m3`.
        consistent_rms: matrices' updates are scaled by sqrt(max(in, out)) times this; None: by sqrt(max(1, out / in)).
        weight_decay: of matrices, times the learning rate.
        weight_decay_mask: as of `optax.add_decayed_weights`.
        vectors: rule of leaves that are no matrices, with its learning rate; None: `optax.adamw` as in Muon, nesterov too.

    Raises:
        UserError: a hyperparameter is not finite or out of range, or dimension numbers do not fit a parameter.

    >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
    >>> rule = m3(0.1, second_moment=False)
    >>> updates, state = rule.update(params, rule.init(params), params)
    >>> updates["kernel"].shape
    (2, 3)

    References:
        NL, §7.2 and Algorithm 1; Jordan et al., Muon, 2024.
    """
    check("m3", learning_rate=learning_rate, weight_decay=weight_decay)
    check("m3", low=0.0, consistent_rms=0.0 if consistent_rms is None else consistent_rms)
    rule = scale_by_m3(
        fast, second, slow, slow_weight=slow_weight, slow_period=slow_period, steps=steps, average=average,
        nesterov=nesterov, second_moment=second_moment, eps=eps, dimension_numbers=dimension_numbers,
    )  # fmt: skip
    shrinkage = optax.add_decayed_weights(weight_decay, weight_decay_mask)
    return as_muon(rule, shrinkage, learning_rate, nesterov, consistent_rms, vectors, dimension_numbers)
