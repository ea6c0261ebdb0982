"""Adam as the best element-wise linear memory of gradients."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from nested_jax.numerics import bounded, safe_divide, safe_sqrt, zeros
from nested_jax.optim._hyperparameters import BELOW_ONE, NON_NEGATIVE, check, next_count
from nested_jax.optim._precision import at_rate, in_float32
from nested_jax.typing import Array, PyTree


class AdamMemoryState(NamedTuple):
    """Steps taken, int32; first and second moments, sums or averages of the parameters' shapes, float32 or finer."""

    count: Array
    first: PyTree
    second: PyTree


def scale_by_adam_memory(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    *,
    penalty: ArrayLike = 0.0,
    eps: ArrayLike = 1e-8,
    average: bool = True,
) -> optax.GradientTransformation:
    """The element-wise memory that maps gradients to their root mean square with the least squared error.

        m* = argmin_m  sum_s (m g_s - P)^2 + penalty m^2  =  P sum_s g_s / (sum_s g_s^2 + penalty),   P = sqrt(sum_s g_s^2)
        emits m*, its denominator increased by eps P

        average:  both sums are averages with decays b1 and b2 and bias correction; with penalty 0 it is Adam
        sum:      b1 sum_s g_s and b2 sum_s g_s^2, as in the paper

    Where all gradients were exactly zero it emits zero, with zero derivatives; where squares overflow, zero as Adam.

    Args:
        b1: decay of the average of gradients, in [0, 1); of a sum, the weight of each gradient, at least 0.
        b2: the same for squared gradients.
        penalty: lambda, at least 0.
        eps: at least 0; it damps the updates of tiny gradients.
        average: averages, or sums.

    Returns:
        A transformation of gradients of any shapes, with state `AdamMemoryState`.

    Raises:
        UserError: a hyperparameter is out of range.

    Source: NL Eq. 101-105; Kingma and Ba, Adam, arXiv 1412.6980.

    >>> rule = scale_by_adam_memory(1.0, 1.0, average=False)
    >>> _, state = rule.update(jnp.array([3.0]), rule.init(jnp.zeros(1)))
    >>> print(rule.update(jnp.array([4.0]), state)[0])  # 7 / sqrt(9 + 16)
    [1.4]
    """
    check("adam_memory", BELOW_ONE if average else NON_NEGATIVE, b1=b1, b2=b2)
    check("adam_memory", NON_NEGATIVE, penalty=penalty, eps=eps)

    def init(params):
        return AdamMemoryState(jnp.zeros((), jnp.int32), zeros(params), zeros(params))

    def update(updates, state, params=None):
        del params
        count = next_count(state.count)
        first = accumulate(state.first, updates, b1, average)
        second = accumulate(state.second, jax.tree.map(jnp.square, updates), b2, average)
        correct = lambda m, decay: optax.tree.bias_correction(m, decay, count) if average else m

        def best(m, v):
            large = v > 1e30  # products would overflow; of small numbers, derivatives of quotients in quotients vanish
            P, near = safe_sqrt(v), jnp.where(large, 1, v)
            root = safe_sqrt(near)
            small = safe_divide(jnp.where(large, 0, m) * root, near + penalty + eps * root)
            return jnp.where(large, safe_divide(m, jnp.where(v == 0, 0, P + safe_divide(penalty, P) + eps)), small)

        mean = jax.tree.map(bounded, correct(first, b1), first)
        return jax.tree.map(best, mean, correct(second, b2)), AdamMemoryState(count, first, second)

    return in_float32(optax.GradientTransformation(init, update))


def accumulate(memory: PyTree, terms: PyTree, weight: ArrayLike, average: bool) -> PyTree:
    """weight m + (1 - weight) x for an average, m + weight x for a sum."""
    add = (lambda m, x: weight * m + (1 - weight) * x) if average else (lambda m, x: m + weight * x)
    sums = jax.tree.map(lambda m, x: bounded(add(m, x), m, x), memory, terms)
    return optax.tree.cast_like(sums, memory)


def adam_memory(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    *,
    penalty: ArrayLike = 0.0,
    eps: ArrayLike = 1e-8,
    average: bool = True,
) -> optax.GradientTransformation:
    """Adam as a memory: `scale_by_adam_memory`, then the learning rate. By default it is `optax.adam`.

        w <- w - learning_rate m*

    Args:
        learning_rate: a number or a schedule.
        b1, b2, penalty, eps, average: as of `scale_by_adam_memory`.

    Returns:
        An optimizer of parameters of any shapes.

    Raises:
        UserError: a hyperparameter is not finite or out of range.

    Source: NL Eq. 101-105; Kingma and Ba, Adam, arXiv 1412.6980.

    >>> rule = adam_memory(0.1)
    >>> print(rule.update(jnp.array([3.0, -2.0]), rule.init(jnp.zeros(2)))[0].round(3))
    [-0.1  0.1]
    """
    check("adam_memory", learning_rate=learning_rate)
    return at_rate(scale_by_adam_memory(b1, b2, penalty=penalty, eps=eps, average=average), learning_rate)
