"""A model trained on the text of the README's first command: cells of an experiment's table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_jax import ModelConfig
from nested_jax.train.config import TrainConfig
from nested_jax.train.optimizer import learning_rate, optimizer
from nested_jax.train.source import Source, open_source
from nested_jax.train.state import TrainState, init_params
from nested_jax.train.step import assert_healthy, train_step
from nested_jax.train.stopping import Diverged

BITS = "heldout_bits_per_byte"


def held_out(
    model: ModelConfig,
    seeds: Sequence[int],
    steps: int,
    rates: Sequence[float] | None = None,
    rule: Callable[[optax.Schedule], optax.GradientTransformation] | None = None,
) -> list[dict[str, Any]]:
    """Trains a model from several seeds, one after the other by one program, with the updates of `nested-jax train`.

    Args:
        model: of 1,024 tokens.
        seeds: of parameters and order of the text.
        steps: updates.
        rates: the largest learning rate of each run; None: `TrainConfig`'s.
        rule: schedule -> optimizer, of gradients clipped to norm 1; None: `TrainConfig`'s at its own rate.

    Returns:
        For each seed heldout_bits_per_byte, None where a number was not finite; norm: median and largest norm of the
        gradients.
    """
    configs = [TrainConfig(model=model, seed=seed, steps=steps) for seed in seeds]
    schedule = learning_rate(dataclasses.replace(configs[0], learning_rate=1.0))
    clip = optax.clip_by_global_norm(1.0)
    make = (lambda rate: optax.chain(clip, rule(lambda n: rate * schedule(n)))) if rule else lambda _: optimizer(configs[0])
    init = jax.jit(lambda params: TrainState(jnp.int32(0), params, make(1.0).init(params), None))
    update = jax.jit(lambda rate, *given: train_step(model, make(rate))(*given), donate_argnums=1)
    sources = [open_source(config, None) for config in configs]  # they differ in the order of training alone
    states = [init(init_params(model, seed)) for seed in seeds]
    runs = zip(rates or [1.0] * len(seeds), states, sources, strict=True)
    return [_run(partial(update, rate), state, one, sources[0], configs[0]) for rate, state, one in runs]


def _run(update: Callable, state: TrainState, source: Source, judge: Source, config: TrainConfig) -> dict[str, Any]:
    norms = []
    try:
        for step in range(1, config.steps + 1):
            state, metrics = update(state, next(source.batches))
            assert_healthy(step, metrics, config.model)
            norms.append(float(metrics.gradient_norm))
        row = judge.evaluate(state.params, lambda: False)
    except Diverged as error:
        return {BITS: None, "norm": [None, None], "error": str(error)}
    assert row is not None  # nothing stops it
    return {BITS: row[BITS], "norm": [float(np.median(norms)), max(norms)]}
