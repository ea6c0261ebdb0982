"""A network trained on a synthetic task and tested on longer sequences: one cell of an experiment's table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from networks import Network

from nested_jax.data.tasks import Task, score

Bins = Sequence[tuple[int, int]]
PARITY: Bins = ((2, 50), (52, 100), (102, 150))
"""The trained lengths of parity, those up to twice and up to three times as long."""


@dataclass(frozen=True)
class Training:
    """How every network is trained."""

    steps: int
    batch_size: int
    shortest: int
    longest: int
    rate: float


def run(network: Network, task: Task, training: Training, bins: Bins, sequences: int, seed: int) -> dict[str, Any]:
    """Trains a network and tests it.

    Args:
        network: from `networks.network`.
        task: what it learns.
        training: updates of AdamW, rate warmed up over a twentieth of them and falling along a cosine to a tenth, gradients
            clipped to norm 1.
        bins: (shortest, longest) of the test sequences.
        sequences: number of test sequences in each bin, the same ones for all networks.
        seed: of parameters and training sequences.

    Returns:
        labels, right: fractions of right labels and of wholly right sequences, in each bin; loss: nats per label, means of
        50 updates; norm: median and largest norm of the gradients; parameters; seconds.
    """
    started = time.monotonic()
    params = jax.jit(network.init)(jax.random.key(seed))
    steps, rate = training.steps, training.rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps, rate / 10)
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95))

    def loss(params, batch):
        nats = optax.softmax_cross_entropy_with_integer_labels(network.logits(params, batch.tokens), batch.targets)
        return (nats * batch.weights).sum() / batch.weights.sum()

    @jax.jit
    def update(params, memory, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        change, memory = rule.update(gradient, memory, params)
        return optax.apply_updates(params, change), memory, value, optax.global_norm(gradient)

    rng, memory, losses, norms = np.random.default_rng(seed), rule.init(params), [], []
    for _ in range(steps):
        batch = task.sample(rng, training.batch_size, training.shortest, training.longest)
        params, memory, value, norm = update(params, memory, batch)
        losses.append(float(value))
        norms.append(float(norm))
    means = [float(np.mean(losses[i : i + 50])) for i in range(0, len(losses), 50)]
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    row = {"loss": means, "norm": [float(np.median(norms)), max(norms)], "parameters": size}
    predict = jax.jit(lambda params, tokens: network.logits(params, tokens).argmax(-1))
    scores = []
    for shortest, longest in bins:
        batch = task.sample(np.random.default_rng((shortest, longest)), sequences, shortest, longest)
        parts = np.array_split(np.arange(sequences), -(-sequences * longest // 2**15))
        rows = max(map(len, parts))  # every part has as many rows: one program
        guess = [predict(params, jnp.resize(batch.tokens[part], (rows, longest)))[: len(part)] for part in parts]
        scores.append(score(np.concatenate(guess), batch))
    labels, right = zip(*scores, strict=True)
    return {"labels": labels, "right": right, **row, "seconds": round(time.monotonic() - started, 1)}
