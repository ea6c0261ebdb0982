"""Adam as the best element-wise linear memory of gradients."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_jax.numerics import safe_divide, safe_sqrt, upcast, zeros
from nested_jax.optim._hyperparameters import check
from nested_jax.typing import Array, PyTree


class AdamMemoryState(NamedTuple):
    """Steps taken; gradients and their squares, summed or averaged: one value for every parameter, float32 or finer."""

    count: Array
    first: PyTree
    second: PyTree


def scale_by_adam_memory(
    first: float = 0.9, second: float = 0.999, *, penalty: float = 0.0, eps: float = 1e-8, average: bool = True
) -> optax.GradientTransformation:
    """The element-wise memory that maps gradients to their root mean square with the least squared error.

        m* = argmin_m  sum_s (m g_s - P)^2 + penalty m^2  =  P sum g_s / (sum g_s^2 + penalty),    P = sqrt(sum g_s^2)
        emits m*, its denominator larger by eps P        (NL Eq. 101-105)

        average:  the sums are averages that decay by `first` and `second`, bias-corrected; with penalty 0, Adam
        sum:      the sums grow by first * g and second * g^2, as the paper has it

    Where all gradients were exactly zero it emits zero, with derivatives of zero.

    Args:
        first: decay of the average of gradients, at least 0 and below 1; of a sum, the weight of each.
        second: the same of their squares.
        penalty: lambda, at least 0.
        eps: at least 0; it keeps tiny gradients from full steps.
        average: averages, or sums.

    Raises:
        UserError: a hyperparameter is out of range.
    """
    check("adam_memory", low=0.0, below=1.0 if average else math.inf, first=first, second=second)
    check("adam_memory", low=0.0, penalty=penalty, eps=eps)

    def init(params):
        return AdamMemoryState(jnp.zeros((), jnp.int32), zeros(params), zeros(params))

    def update(updates, state, params=None):
        del params
        gradients = upcast(updates)
        count = optax.safe_increment(state.count)
        squares = jax.tree.map(jnp.square, gradients)
        sums = grow(state.first, gradients, first, average), grow(state.second, squares, second, average)
        correct = lambda m, decay: optax.tree.bias_correction(m, decay, count) if average else m
        best = lambda m, h: safe_divide(m * safe_sqrt(h), h + penalty + eps * safe_sqrt(h))
        emitted = jax.tree.map(best, correct(sums[0], first), correct(sums[1], second))
        return optax.tree.cast_like(emitted, updates), AdamMemoryState(count, *sums)

    return optax.GradientTransformation(init, update)


def grow(memory: PyTree, terms: PyTree, weight: Array | float, average: bool) -> PyTree:
    """An average that decays by the weight, or a sum in which each term has it."""
    add = (lambda m, x: weight * m + (1 - weight) * x) if average else (lambda m, x: m + weight * x)
    return optax.tree.cast_like(jax.tree.map(add, memory, terms), memory)


def adam_memory(
    learning_rate: optax.ScalarOrSchedule,
    first: float = 0.9,
    second: float = 0.999,
    *,
    penalty: float = 0.0,
    eps: float = 1e-8,
    average: bool = True,
) -> optax.GradientTransformation:
    """`scale_by_adam_memory`, then the learning rate. By default it is `optax.adam`.

    Args:
        learning_rate: a number or a schedule.
        first, second, penalty, eps, average: as of `scale_by_adam_memory`.

    Raises:
        UserError: a hyperparameter is not finite or out of range.

    >>> rule = adam_memory(0.1)
    >>> print(rule.update(jnp.array([3.0, -2.0]), rule.init(jnp.zeros(2)))[0].round(3))
    [-0.1  0.1]

    References:
        NL, Eq. 101-105; Kingma and Ba, Adam, arXiv 1412.6980.
    """
    check("adam_memory", learning_rate=learning_rate)
    rule = scale_by_adam_memory(first, second, penalty=penalty, eps=eps, average=average)
    return optax.chain(rule, optax.scale_by_learning_rate(learning_rate))
