"""M3, multi-scale momentum Muon: a fast and a slow momentum, both orthogonalised by Newton-Schulz."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from nested_jax.numerics import bounded, safe_divide, safe_sqrt, zeros
from nested_jax.optim._adam_memory import accumulate
from nested_jax.optim._hyperparameters import BELOW_ONE, NON_NEGATIVE, check, check_count, next_count
from nested_jax.optim._newton_schulz import newton_schulz
from nested_jax.optim._nonlinear_momentum import NonlinearMomentumState, as_muon, update_momentum
from nested_jax.optim._precision import in_float32
from nested_jax.paths import DimensionNumbers, assert_matrices, map_matrices
from nested_jax.typing import Array, PyTree


class M3State(NamedTuple):
    """All but the count have the parameters' shapes, float32 or finer."""

    count: Array  # steps taken, int32
    fast: PyTree  # m1, momentum of every gradient
    second: PyTree  # v, second moment; None without it
    pending: PyTree  # sum of gradients since the last update of m2
    slow: PyTree  # m2, momentum of those sums
    orthogonal: PyTree  # NS(m2)


def scale_by_m3(
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.999,
    b3: ArrayLike = 0.9,
    *,
    slow_weight: ArrayLike = 0.5,
    slow_period: int = 8,
    steps: int = 5,
    average: bool = True,
    nesterov: bool = True,
    second_moment: bool = True,
    eps: ArrayLike = 1e-8,
    dimension_numbers: DimensionNumbers = None,
) -> optax.GradientTransformation:
    """Two momenta of different update frequency, each orthogonalised by Newton-Schulz (NS).

        average:  m1 <- b1 m1 + (1 - b1) g    v <- b2 v + (1 - b2) g^2    m2 <- b3 m2 + (1 - b3) s    (the default)
        sum:      m1 <- m1 + b1 g             v <- v + b2 g^2             m2 <- m2 + b3 s             (the paper's)
        emits (NS(m1) + slow_weight NS(m2)) / (sqrt(v) + eps)

    m2 and NS(m2) are updated at the end of every slow_period-th step, with s the sum of the gradients since their last
    update; NS(m2) joins from the next step on. In an average, m1 and v have Adam's bias corrections, and m1 has Nesterov's
    step; m2 needs none: NS is invariant to scale. Division by the second moment makes updates scale as 1 / |g|, so the best
    learning rate depends on the scale of the loss.

    Args:
        b1: decay of the fast average, in [0, 1); of a sum, the weight of each gradient, at least 0.
        b2: the same for the second moment.
        b3: the same for the slow momentum.
        slow_weight: alpha, weight of the slow momentum, at least 0.
        slow_period: steps between two updates of the slow momentum, at least 1.
        steps: Newton-Schulz iterations, at least 1.
        average: averages, or the paper's sums.
        nesterov: orthogonalise m1 after one more step with the same gradient; averages only.
        second_moment: False leaves the division out.
        eps: at least 0; it keeps the division finite.
        dimension_numbers: which leaves are matrices, and their (in, out) axes, as in `optax.contrib.muon`; see `matrices`.
            None: leaves of two axes, (in, out).

    Returns:
        A transformation of matrices (..., in, out), with state `M3State`.

    Raises:
        UserError: a hyperparameter is out of range, or a parameter is no matrix.

    Source: NL Section 7.2, Algorithm 1; Jordan et al., Muon, 2024.

    >>> rule = scale_by_m3(slow_period=1, slow_weight=0.5, second_moment=False)
    >>> _, state = rule.update(jnp.eye(2), rule.init(jnp.zeros((2, 2))))
    >>> updates, _ = rule.update(jnp.eye(2), state)
    >>> print((updates / newton_schulz(jnp.eye(2))[0, 0]).round(2))  # both momenta are orthogonalised: 1 + 0.5
    [[1.5 0. ]
     [0.  1.5]]
    """
    check("m3", BELOW_ONE if average else NON_NEGATIVE, b1=b1, b2=b2, b3=b3)
    check("m3", NON_NEGATIVE, slow_weight=slow_weight, eps=eps)
    check_count("m3", slow_period=slow_period, steps=steps)
    orthogonalise = lambda tree: map_matrices(lambda m: newton_schulz(m, steps), dimension_numbers, tree, rule="m3")

    def init(params):
        assert_matrices("m3", dimension_numbers, params)
        second = zeros(params) if second_moment else None
        return M3State(jnp.zeros((), jnp.int32), zeros(params), second, zeros(params), zeros(params), zeros(params))

    def update_slow(pending, slow, _):
        slow = accumulate(slow, pending, b3, average)
        return optax.tree.zeros_like(pending), slow, orthogonalise(slow)

    def update(updates, state, params=None):
        del params
        count = next_count(state.count)
        if average:
            momentum = NonlinearMomentumState(state.count, state.fast)
            corrected, (_, fast) = update_momentum(updates, momentum, b1, True, nesterov)
        else:
            corrected = fast = accumulate(state.fast, updates, b1, average=False)
        pending = jax.tree.map(lambda s, g: bounded(s + g, s, g), state.pending, updates)
        skip = lambda *unchanged: unchanged
        pending, slow, orthogonal = jax.lax.cond(
            count % slow_period == 0, update_slow, skip, pending, state.slow, state.orthogonal
        )
        emitted = jax.tree.map(lambda a, b: a + slow_weight * b, orthogonalise(corrected), state.orthogonal)
        second = state.second
        if second_moment:
            second = accumulate(second, jax.tree.map(jnp.square, updates), b2, average)
            mean = optax.tree.bias_correction(second, b2, count) if average else second
            # zero second moment gives zero update
            over = lambda a, v: safe_divide(a, jnp.where(v == 0, 0, safe_sqrt(v) + eps))
            emitted = jax.tree.map(over, emitted, mean)
        return emitted, M3State(count, fast, second, pending, slow, orthogonal)

    return in_float32(optax.GradientTransformation(init, update))


def m3(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.999,
    b3: ArrayLike = 0.9,
    *,
    slow_weight: ArrayLike = 0.5,
    slow_period: int = 8,
    steps: int = 5,
    average: bool = True,
    nesterov: bool = True,
    second_moment: bool = True,
    eps: ArrayLike = 1e-8,
    consistent_rms: ArrayLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    vectors: optax.GradientTransformation | None = None,
    dimension_numbers: DimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """M3: `scale_by_m3` with Muon's scaling by shape, weight decay and rule for vectors.

        W <- W - learning_rate (s u + weight_decay W)        u of `scale_by_m3`, s = sqrt(max(1, out / in)), W (in, out)

    With averages, `slow_weight=0` and `second_moment=False` it is Muon.

    Args:
        learning_rate: a number or a schedule.
        b1, b2, b3, slow_weight, slow_period, steps, average, nesterov, second_moment, eps, dimension_numbers: as of
            `scale_by_m3`.
        consistent_rms: s is sqrt(max(in, out)) times this. None: s is sqrt(max(1, out / in)).
        weight_decay: of matrices, times the learning rate.
        weight_decay_mask: as of `optax.add_decayed_weights`.
        vectors: optimizer of leaves that are no matrices, with its learning rate. None: `optax.adamw`, as in Muon.

    Returns:
        An optimizer of parameters of any shapes; kernels are (in, out).

    Raises:
        UserError: a hyperparameter is not finite or out of range, or dimension numbers do not fit a parameter.

    Source: NL Section 7.2, Algorithm 1; Jordan et al., Muon, 2024.

    >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
    >>> rule = m3(0.1, second_moment=False)
    >>> updates, state = rule.update(params, rule.init(params), params)
    >>> updates["kernel"].shape
    (2, 3)
    """
    check("m3", learning_rate=learning_rate, weight_decay=weight_decay)
    check("m3", NON_NEGATIVE, consistent_rms=0.0 if consistent_rms is None else consistent_rms)
    rule = scale_by_m3(
        b1, b2, b3, slow_weight=slow_weight, slow_period=slow_period, steps=steps, average=average, nesterov=nesterov,
        second_moment=second_moment, eps=eps, dimension_numbers=dimension_numbers,
    )  # fmt: skip
    decayed = optax.add_decayed_weights(weight_decay, weight_decay_mask)
    return as_muon(rule, decayed, learning_rate, nesterov, consistent_rms, vectors, dimension_numbers)
