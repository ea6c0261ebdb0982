"""Networks trained on synthetic tasks and tested on longer sequences: the cells of an experiment's table."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from networks import Network

from nested_jax.data.pipeline import Batch
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


@dataclass(frozen=True)
class Lane:
    """One of several networks of a kind that are trained side by side."""

    task: Task
    seed: int
    """Of parameters and training sequences."""
    rate: float
    """Learning rate."""


def adamw(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """The rule of most experiments."""
    return optax.adamw(rate, b2=0.95)


def run(
    network: Network,
    lanes: Sequence[Lane],
    training: Training,
    bins: Bins,
    sequences: int,
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation] = adamw,
) -> list[dict[str, Any]]:
    """Trains networks in one program, each on its own task, and tests them.

    Args:
        network: from `networks.network`, of the tokens and labels of all tasks.
        lanes: what is trained. Small networks leave a processor idle: several take hardly longer than one.
        training: updates, rate warmed up over a twentieth of them and falling along a cosine to a tenth, gradients clipped
            to norm 1.
        bins: (shortest, longest) of the test sequences.
        sequences: number of test sequences in each bin, the same ones for all networks.
        optimizer: schedule of peak 1 -> rule, whose changes are multiplied by the lane's rate.

    Returns:
        For each lane labels, right: fractions of right labels and of wholly right sequences, in each bin; loss: nats per
        label, means of 50 updates; norm: median and largest norm of the gradients; parameters; seconds, of all lanes; the
        device.
    """
    started = time.monotonic()
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, training.steps // 20, training.steps, 0.1)
    rule = optax.chain(optax.clip_by_global_norm(1.0), optimizer(schedule))

    def loss(params, batch):
        nats = optax.softmax_cross_entropy_with_integer_labels(network.logits(params, batch.tokens), batch.targets)
        return (nats * batch.weights).sum() / batch.weights.sum()

    def update(params, memory, rate, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        change, memory = rule.update(gradient, memory, params)
        change = jax.tree.map(lambda step: rate * step, change)
        return optax.apply_updates(params, change), memory, (value, optax.global_norm(gradient))

    start = lambda key: (params := network.init(key), rule.init(params))
    params, memory = jax.jit(jax.vmap(start))(jax.vmap(jax.random.key)(jnp.array([lane.seed for lane in lanes])))
    rates = jnp.array([lane.rate for lane in lanes])
    update = jax.jit(jax.vmap(update), donate_argnums=(0, 1))
    draws, found = [np.random.default_rng(lane.seed) for lane in lanes], []
    size = training.batch_size, training.shortest, training.longest
    for _ in range(training.steps):
        batches = [lane.task.sample(rng, *size) for lane, rng in zip(lanes, draws, strict=True)]
        stacked = Batch(*map(np.stack, zip(*batches, strict=True)))
        params, memory, measured = update(params, memory, rates, stacked)
        found.append(measured)
    losses, norms = np.array(jax.device_get(found)).transpose(1, 2, 0)  # (lanes, steps)

    predict = jax.jit(jax.vmap(lambda params, tokens: network.logits(params, tokens).argmax(-1)))
    labels, right = np.zeros((2, len(lanes), len(bins)))
    for i, (shortest, longest) in enumerate(bins):
        draw = lambda task, size=(sequences, shortest, longest): task.sample(np.random.default_rng(size[1:]), *size)
        tests = [draw(lane.task) for lane in lanes]
        tokens = np.stack([batch.tokens for batch in tests])
        parts = np.array_split(np.arange(sequences), -(-sequences * longest // 2**15))
        rows = max(map(len, parts))  # every part has as many rows: one program
        guess = [np.asarray(predict(params, tokens[:, np.resize(part, rows)]))[:, : len(part)] for part in parts]
        for lane, (predicted, batch) in enumerate(zip(np.concatenate(guess, axis=1), tests, strict=True)):
            labels[lane, i], right[lane, i] = score(predicted, batch)
    count = sum(leaf[0].size for leaf in jax.tree.leaves(params))
    seconds = round(time.monotonic() - started, 1)
    return [
        {
            "labels": labels[i].tolist(),
            "right": right[i].tolist(),
            "loss": [float(losses[i, at : at + 50].mean()) for at in range(0, training.steps, 50)],
            "norm": [float(np.median(norms[i])), float(norms[i].max())],
            "parameters": count,
            "seconds": seconds,
            "device": jax.devices()[0].device_kind,
        }
        for i in range(len(lanes))
    ]
