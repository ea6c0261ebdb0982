"""The optimizers of `nested-jax train`: the rule of the slowest level, its schedule, and the parameters that decay."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_jax import optim
from nested_jax.paths import path_name, resolve_dimension_numbers
from nested_jax.train.config import TrainConfig
from nested_jax.typing import PyTree

MATRICES = optim.matrices("up|gate|down|query|key|value|out")
"""The dimension numbers of matrices (L, in, out), None for other leaves; embeddings and heads are no matrices."""


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up from learning_rate / warmup to learning_rate, then a cosine to a tenth at the last step.

    Args:
        config: its `learning_rate`, `warmup` and `steps`.

    Returns:
        A function from a step to the learning rate.

    >>> rate = learning_rate(TrainConfig(steps=100, warmup=10, learning_rate=1.0))
    >>> [round(float(rate(step)), 2) for step in (0, 10, 55, 100)]
    [0.1, 1.0, 0.55, 0.1]
    """
    peak, warmup = config.learning_rate, config.warmup
    return optax.warmup_cosine_decay_schedule(
        peak / max(warmup, 1), peak, warmup, max(config.steps, warmup + 1), end_value=peak / 10
    )


class WithInputs(NamedTuple):
    """A gradient transformation whose `update` takes `inputs={path: x}` of the linear layers among its `matrices`."""

    init: Callable
    """params -> state, as in optax."""
    update: Callable
    """(gradients, state, params, inputs=...) -> (updates, state)."""
    matrices: Callable[[PyTree], PyTree]
    """params -> dimension numbers of matrices, None for other leaves."""

    def examples(self, params: PyTree) -> dict[str, dict[str, jax.Array]]:
        """Example keyword arguments of `update`: inputs of ones, (..., 5, in).

        >>> rule = optimizer(TrainConfig(optimizer="delta-gradient-descent"))
        >>> jax.tree.map(jnp.shape, rule.examples({"up": jnp.ones((3, 4, 8)), "norm": jnp.ones((3, 4))}))
        {'inputs': {'up': (3, 5, 4)}}
        """
        numbers = resolve_dimension_numbers(self.matrices, params)
        leaves = zip(jax.tree_util.tree_leaves_with_path(params), numbers, strict=True)
        ones = lambda w: jnp.ones((*w.shape[:-2], 5, w.shape[-2]))
        return {"inputs": {path_name(path): ones(w) for (path, w), number in leaves if number}}


def optimizer(config: TrainConfig) -> optax.GradientTransformation | WithInputs:
    """The optimizer of a config: clipping by the global norm, the rule, decay of matrices, and the scheduled rate last.

    Args:
        config: its `optimizer`, `clip`, `weight_decay`, `slow_period` and those of `learning_rate`.

    Returns:
        An optax transformation; for delta-gradient-descent, one that also takes inputs.
    """
    rule = _rule(config)
    rule = optax.chain(optim.clip_by_norm(config.clip), rule) if config.clip else rule
    return WithInputs(*rule, MATRICES) if config.optimizer == "delta-gradient-descent" else rule


def _rule(config: TrainConfig) -> optax.GradientTransformation:
    rate = learning_rate(config)
    decay = optax.add_decayed_weights(config.weight_decay, decayed)
    adam = optax.scale_by_adam(b1=0.9, b2=0.95)
    descend = lambda *rules: optax.chain(*rules, decay, optax.scale_by_learning_rate(rate))
    orthogonal = {"consistent_rms": 0.2, "weight_decay": config.weight_decay, "vectors": descend(adam)}
    match config.optimizer:
        case "adamw":
            return descend(adam)
        case "momentum":
            return descend(optim.scale_by_momentum())
        case "delta-momentum":
            return descend(optim.scale_by_delta_momentum(dimension_numbers=MATRICES))
        case "deep-momentum":
            return descend(optim.scale_by_deep_momentum(dimension_numbers=MATRICES))
        case "delta-gradient-descent":
            delta = optim.scale_by_delta_gradient_descent(rate, dimension_numbers=MATRICES)
            label = lambda _, numbers: "others" if numbers is None else "matrices"
            labels = lambda params: jax.tree.map(label, params, MATRICES(params))
            return optax.partition({"matrices": descend(delta), "others": descend(adam)}, labels)
        case "muon":
            return optim.nonlinear_momentum(rate, **orthogonal, dimension_numbers=MATRICES)
        case "m3":  # without a second moment its updates have the size of Adam's for any scale of the loss
            options = {"slow_period": config.slow_period, "second_moment": False}
            return optim.m3(rate, **options, **orthogonal, dimension_numbers=MATRICES)
        case "continuum":
            periods = {"slow": config.slow_period, "fast": 1}
            return optim.continuum(rate, periods, frequencies, inner=optax.chain(adam, decay))


def frequencies(params: PyTree) -> PyTree:
    """The groups of continuum: "slow" for all CMS levels but the fastest, or for the only one; "fast" for other leaves.

    Args:
        params: nested dicts.

    Returns:
        A tree of "slow" and "fast".

    >>> frequencies({"cms": {"level1": {"up": 0}, "level2": {"up": 0}}, "norm": 0})
    {'cms': {'level1': {'up': 'slow'}, 'level2': {'up': 'fast'}}, 'norm': 'fast'}
    """
    names = lambda path: [key.key for key in path]
    paths = [names(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    levels = {name for path in paths if "cms" in path for name in path if name.startswith("level")}
    levels = sorted(levels, key=lambda name: int(name.removeprefix("level")))
    slow = set(levels[:-1] or levels)
    return jax.tree_util.tree_map_with_path(lambda path, _: "slow" if slow & set(names(path)) else "fast", params)


def decayed(params: PyTree) -> PyTree:
    """Which leaves decay: matrices, but neither starts of memories nor norms nor biases.

    Args:
        params: nested dicts. Leaves under "blocks" have a leading axis L.

    Returns:
        A tree of bools.

    >>> decayed({"embedding": jnp.ones((4, 2)), "blocks": {"out": jnp.ones((3, 2, 2)), "rate": jnp.ones((3, 2))}})
    {'blocks': {'out': True, 'rate': False}, 'embedding': True}
    """

    def matrix(path, leaf):
        names = set(map(attrgetter("key"), path))
        stacked, bias = "blocks" in names, path[-1].key.endswith("bias")
        return leaf.ndim - stacked >= 2 and not bias and not names & {"start", "norm"}

    return jax.tree_util.tree_map_with_path(matrix, params)
