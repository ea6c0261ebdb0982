"""Continuum: groups of parameters, each with its own update frequency."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_jax.errors import UserError, assert_choice
from nested_jax.numerics import bounded, zeros
from nested_jax.optim._accumulation import accumulating
from nested_jax.optim._hyperparameters import check, check_count, next_count
from nested_jax.optim._precision import at_rate, finite_adam, in_float32
from nested_jax.paths import path_name
from nested_jax.typing import Array, PyTree


class ContinuumState(NamedTuple):
    """Of one group: steps taken, int32; sum of gradients since its last update, float32 or finer; the inner state."""

    count: Array
    pending: PyTree
    inner: PyTree


def scale_by_continuum(inner: optax.GradientTransformation, period: int = 8) -> optax.GradientTransformationExtraArgs:
    """An inner optimizer that updates every `period` steps, from the sum of the gradients in between.

        w <- w + inner(sum of the last `period` gradients)        where period divides the step, else unchanged

    As `optax.MultiSteps(inner, period, use_grad_mean=False)`, with sums in float32. Between its updates the inner optimizer
    costs nothing. Extra arguments of `update` reach the inner optimizer at the steps on which it updates; a rule that needs
    those of every step, such as `delta_gradient_descent`, is refused.

    Args:
        inner: any optax transformation. A schedule inside it counts its own updates.
        period: steps between two updates, at least 1; 1 makes it the inner optimizer.

    Returns:
        A transformation of gradients of any shapes, with state `ContinuumState`; it emits zeros between updates.

    Raises:
        UserError: the period is no whole number of at least 1.

    Source: NL Eq. 71.

    >>> rule = scale_by_continuum(optax.identity(), period=2)
    >>> state = rule.init(jnp.zeros(()))
    >>> for gradient in (1.0, 2.0, 3.0, 4.0):
    ...     updates, state = rule.update(jnp.asarray(gradient), state)
    ...     print(updates)
    0.0
    3.0
    0.0
    7.0
    """
    check_count("continuum", period=period)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return ContinuumState(jnp.zeros((), jnp.int32), zeros(params), inner.init(params))

    def update(updates, state, params=None, **extra):
        pending = jax.tree.map(lambda s, g: bounded(s + g, s, g), state.pending, updates)

        def step(pending, memory):
            emitted, memory = inner.update(pending, memory, params, **extra)
            return emitted, memory, optax.tree.zeros_like(pending)

        def skip(pending, memory):
            return optax.tree.zeros_like(pending), memory, pending

        count = next_count(state.count)
        with accumulating(f"continuum with period {period}", period):
            emitted, memory, pending = jax.lax.cond(count % period == 0, step, skip, pending, state.inner)
        return emitted, ContinuumState(count, pending, memory)

    return in_float32(optax.GradientTransformationExtraArgs(init, update))


def continuum(
    learning_rate: optax.ScalarOrSchedule,
    periods: int | Mapping[str, int] = 8,
    groups: PyTree | Callable[[PyTree], PyTree] | None = None,
    *,
    inner: optax.GradientTransformation | Mapping[str, optax.GradientTransformation] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Several update frequencies: every group of parameters has a period and an inner optimizer, `scale_by_continuum`.

        w <- w + learning_rate inner(sum of the group's last `period` gradients)        every `period` steps of its group

    The learning rate comes last, so a schedule counts steps, not a group's updates.

    Args:
        learning_rate: a number or a schedule.
        periods: steps between two updates: {group: steps}, or one number for all parameters.
        groups: a tree of group names with the structure of the parameters or a prefix of it, or a function from parameters
            to such a tree, as of `optax.partition`. None with one period.
        inner: the optimizer without its learning rate: one for all groups, or {group: optimizer}. None: Adam.

    Returns:
        An optimizer of parameters of any shapes.

    Raises:
        UserError: a hyperparameter is not finite, a period no whole number of at least 1, or a group unknown or without a
            period.

    Source: NL Eq. 71.

    >>> params = {"slow": jnp.zeros(()), "fast": jnp.zeros(())}
    >>> rule = continuum(1.0, {"a": 2, "b": 1}, {"slow": "a", "fast": "b"}, inner=optax.identity())
    >>> state = rule.init(params)
    >>> for _ in range(2):
    ...     updates, state = rule.update({"slow": jnp.ones(()), "fast": jnp.ones(())}, state)
    ...     print({name: float(update) for name, update in updates.items()})
    {'fast': -1.0, 'slow': -0.0}
    {'fast': -1.0, 'slow': -2.0}
    """
    check("continuum", learning_rate=learning_rate)
    if isinstance(periods, Mapping):
        if groups is None:
            raise UserError(f"continuum: groups are missing: give the group of every parameter, one of {', '.join(periods)}")
        optimizers = inner if isinstance(inner, Mapping) else dict.fromkeys(periods, inner)
        if set(optimizers) != set(periods):
            raise UserError(f"continuum: inner has {sorted(optimizers)} and periods {sorted(periods)}: give the same groups")
        rules = {group: scale_by_continuum(_rule(optimizers[group]), period) for group, period in periods.items()}
        rule = _partition(rules, groups)
    else:
        if isinstance(inner, Mapping) or groups is not None:
            name = "inner" if groups is None else "groups"
            raise UserError(f"continuum: {name} by group with the one period {periods}: give periods {{group: steps}}")
        rule = scale_by_continuum(_rule(inner), periods)
    return at_rate(rule, learning_rate)


def _partition(rules: Mapping[Any, optax.GradientTransformation], groups: PyTree) -> optax.GradientTransformationExtraArgs:
    """`optax.partition` with an error that has the path of an unknown group."""
    parts = optax.partition(rules, groups)

    def init(params):
        for path, group in jax.tree_util.tree_leaves_with_path(groups(params) if callable(groups) else groups):
            assert_choice(f"continuum: the group of {path_name(path) or 'all parameters'},", group, tuple(rules))
        return parts.init(params)

    return optax.GradientTransformationExtraArgs(init, parts.update)


def _rule(inner: optax.GradientTransformation | None) -> optax.GradientTransformation:
    return finite_adam(optax.scale_by_adam(eps_root=1e-30)) if inner is None else inner
