"""Continuum: groups of parameters that learn at frequencies of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_jax.errors import UserError, assert_choice
from nested_jax.numerics import upcast, zeros
from nested_jax.optim._hyperparameters import check, check_period
from nested_jax.paths import path_name
from nested_jax.typing import Array, PyTree


class ContinuumState(NamedTuple):
    """One group's: steps taken, the sum of its gradients since its last update, in float32 or finer, the inner state."""

    count: Array
    pending: PyTree
    inner: PyTree


def scale_by_continuum(inner: optax.GradientTransformation, period: int = 8) -> optax.GradientTransformationExtraArgs:
    """Any optimizer, stepping every `period` steps on the sum of the gradients in between.

        w <- w + inner(sum of the last `period` gradients)        where period divides the step, else unchanged (NL Eq. 71)

    As `optax.MultiSteps(inner, period, use_grad_mean=False)`, with sums in float32. Between its updates the inner optimizer
    costs nothing. Extra arguments reach it as they are at the step on which it moves.

    Args:
        inner: any optax transformation. A schedule inside it counts its own steps.
        period: steps between two updates; 1 makes it the inner optimizer.

    Raises:
        UserError: the period is no whole number of at least 1.
    """
    check_period("continuum", period=period)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return ContinuumState(jnp.zeros((), jnp.int32), zeros(params), inner.init(params))

    def update(updates, state, params=None, **extra):
        pending = jax.tree.map(jnp.add, state.pending, upcast(updates))
        still = jax.tree.map(jnp.zeros_like, updates)

        def move(pending, memory):
            emitted, memory = inner.update(optax.tree.cast_like(pending, updates), memory, params, **extra)
            return optax.tree.cast_like(emitted, updates), memory, jax.tree.map(jnp.zeros_like, pending)

        count = optax.safe_increment(state.count)
        wait = lambda pending, memory: (still, memory, pending)
        emitted, memory, pending = jax.lax.cond(count % period == 0, move, wait, pending, state.inner)
        return emitted, ContinuumState(count, pending, memory)

    return optax.GradientTransformationExtraArgs(init, update)


def continuum(
    learning_rate: optax.ScalarOrSchedule,
    periods: int | Mapping[str, int] = 8,
    groups: PyTree | Callable[[PyTree], PyTree] | None = None,
    *,
    inner: optax.GradientTransformation | Mapping[str, optax.GradientTransformation] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A spectrum of frequencies: every group of parameters has a period and an inner optimizer, `scale_by_continuum`.

    The learning rate comes last, so that a schedule counts steps and not a group's updates.

    Args:
        learning_rate: a number or a schedule.
        periods: steps between two updates of each group, or of all parameters if it is one number.
        groups: a tree like the parameters, or a prefix of it, with every leaf's group, or a function of the parameters that
            makes one; as of `optax.partition`. None with one period.
        inner: the optimizer without its learning rate, of all groups or, by its name, of each; None: Adam.

    Raises:
        UserError: a hyperparameter is not finite, a period no whole number of at least 1, or a group unknown or without a
            period of its own.

    >>> params = {"slow": jnp.zeros(()), "fast": jnp.zeros(())}
    >>> rule = continuum(1.0, {"a": 2, "b": 1}, {"slow": "a", "fast": "b"}, inner=optax.identity())
    >>> state = rule.init(params)
    >>> for _ in range(2):
    ...     updates, state = rule.update({"slow": jnp.ones(()), "fast": jnp.ones(())}, state)
    ...     print({name: float(update) for name, update in updates.items()})
    {'fast': -1.0, 'slow': -0.0}
    {'fast': -1.0, 'slow': -2.0}

    References:
        NL, Eq. 71.
    """
    check("continuum", learning_rate=learning_rate)
    if isinstance(periods, Mapping):
        if groups is None:
            raise UserError(f"continuum: groups are missing: say which parameters belong to each of {', '.join(periods)}")
        every = isinstance(inner, Mapping)
        if every and set(inner) != set(periods):
            raise UserError(f"continuum: inner has {sorted(inner)} and periods {sorted(periods)}: give the same groups")
        rules = {group: scale_by_continuum(_rule(inner[group] if every else inner), n) for group, n in periods.items()}
        rule = _partition(rules, groups)
    else:
        for thing, by_group in (("groups", groups is not None), ("inner", isinstance(inner, Mapping))):
            if by_group:
                raise UserError(f"continuum: {thing} by group with the one period {periods}: give periods {{group: steps}}")
        rule = scale_by_continuum(_rule(inner), periods)
    return optax.chain(rule, optax.scale_by_learning_rate(learning_rate))


def _partition(rules: Mapping[str, optax.GradientTransformation], groups) -> optax.GradientTransformationExtraArgs:
    """`optax.partition` that names a group it does not know."""
    parts = optax.partition(rules, groups)

    def init(params):
        for path, group in jax.tree_util.tree_leaves_with_path(groups(params) if callable(groups) else groups):
            assert_choice(f"continuum: the group of {path_name(path) or 'all parameters'},", group, tuple(rules))
        return parts.init(params)

    return optax.GradientTransformationExtraArgs(init, parts.update)


def _rule(inner: optax.GradientTransformation | None) -> optax.GradientTransformation:
    return optax.scale_by_adam(eps_root=1e-30) if inner is None else inner
