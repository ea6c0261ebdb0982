"""Optimizers of a vision Transformer on digits: `python experiments/optimizers/vision.py` writes results/vision.*.

Needs `pip install -e ".[experiments]"`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import config as settings
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from cost import costs
from flax import nnx
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tuning import chosen, counted, tried, tuned
from vision_transformer import VisionTransformer

from nested_jax import optim
from nested_jax.typing import PyTree

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from record import band, finish, markdown, once, resume, spread

RESULTS = Path(__file__).parent / "results"
MATRICES = optim.matrices("project|out|up|down")


class Images(NamedTuple):
    images: jax.Array  # (N, 8, 8, 1), of mean 0 and variance 1
    labels: jax.Array  # (N,)


def digits(config: settings.Vision) -> tuple[Images, Images, Images]:
    """Training, validation and test images, the same for all runs."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    images, labels = data.images[order, ..., None], data.target[order]
    images = jnp.asarray((images - images.mean()) / images.std(), jnp.float32)
    ends = [config.test, config.test + config.validation]
    test, validation, train = (Images(*both) for both in zip(jnp.split(images, ends), np.split(labels, ends), strict=True))
    return train, validation, test


def optimizer(config: settings.Vision, name: str, rate) -> optax.GradientTransformation:
    """A rule at its scheduled rate, matrix updates scaled to AdamW's size, except by m3 with its second moment."""
    shape = optax.warmup_cosine_decay_schedule(1 / config.warmup, 1.0, config.warmup, config.steps, end_value=0.1)
    schedule = lambda count: rate * shape(count)
    adamw = functools.partial(optax.adamw, schedule, b2=0.95)
    around = {"consistent_rms": 0.2, "weight_decay": config.weight_decay, "dimension_numbers": MATRICES}
    if name == "adamw":
        return adamw(weight_decay=config.weight_decay, mask=matrix)
    around["vectors"] = adamw(weight_decay=0.0)
    if name == "muon":
        return optim.nonlinear_momentum(schedule, **around)
    return optim.m3(schedule, **around, second_moment=name != "m3")


def matrix(params: PyTree) -> PyTree:
    """Which leaves are matrices of the blocks: a tree of bools."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: path[0].key == "blocks" and leaf.ndim == 3, params)


class Model(NamedTuple):
    """Pure functions of weights, as nested dicts."""

    init: Callable  # (rate, seed) -> (weights, state)
    step: Callable  # (rate, weights, state, images) -> (weights, state, loss)
    loss: Callable  # (weights, images) -> (loss, accuracy)


def model(config: settings.Vision, name: str) -> Model:
    """A vision Transformer and the optimizer of this name."""
    draw = lambda seed: nnx.split(VisionTransformer(config.model, rngs=nnx.Rngs(jax.random.key(seed))), nnx.Param)
    net, _ = draw(0)

    def loss(weights, images):
        logits = nnx.merge(net, nnx.State(weights))(images.images)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, images.labels)
        return nats.mean(), jnp.mean(logits.argmax(-1) == images.labels)

    def init(rate, seed):
        weights = nnx.to_pure_dict(draw(seed)[1])
        return weights, optimizer(config, name, rate).init(weights)

    def step(rate, weights, state, images):
        (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(weights, images)
        updates, state = optimizer(config, name, rate).update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, value

    return Model(init, step, loss)


@functools.cache
def trainer(config: settings.Vision, name: str) -> Callable:
    """A compiled (rate, seed, train, validation, test) -> losses (steps,), then loss and accuracy of the other two."""
    init, step, loss = model(config, name)

    def run(rate, seed, train, validation, test):
        weights, state = init(rate, seed)

        def one(carry, key):
            chosen = jax.random.choice(key, len(train.labels), (config.batch_size,), replace=False)
            *carry, value = step(rate, *carry, jax.tree.map(lambda x: x[chosen], train))
            return tuple(carry), value

        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), config.steps)
        (weights, _), losses = jax.lax.scan(one, (weights, state), keys)
        return losses, loss(weights, validation), loss(weights, test)

    return jax.jit(run)


def cost(config: settings.Vision, names: Sequence[str], train: Images) -> list[dict]:
    """Seconds of a training step and bytes of the optimizer's state for every parameter."""
    updates, batch = {}, jax.tree.map(lambda x: x[: config.batch_size], train)
    for name in names:
        init, step, _ = model(config, name)
        step = jax.jit(step)
        update = lambda weights, state, step=step: step(1e-3, weights, state, batch)[:2]
        updates[name] = update, *jax.jit(init)(1e-3, 0)
    return costs(updates, config.cost_steps, config.cost_rounds)


def measure(config: settings.Vision, results: dict) -> dict:
    data = digits(config)

    def run(optimizer: str, rate: float, seed: int) -> dict:
        losses, validation, test = trainer(config, optimizer)(rate, seed, *data)
        row = {"validation_loss": float(validation[0])}
        row |= {"test_loss": float(test[0]), "test_accuracy": float(test[1])}
        return row | {"losses": [float(f"{value:.4g}") for value in losses]}

    make = functools.partial(once, RESULTS / "vision", results, run)
    for name in config.optimizers:
        tuned(make, config, "validation_loss", optimizer=name)
    names = results["config"]["optimizers"]
    if [price["optimizer"] for price in results.get("cost", ())] != names:  # all in one run
        results["cost"] = cost(config, names, data[0])
    return results


def table(results: dict) -> str:
    """Markdown."""
    heads = ("optimizer", "rate", "training loss", "test loss", "test accuracy, %", "ms a step", "state, bytes a parameter")
    cells = []
    for price in results["cost"]:
        name, rows = price["optimizer"], counted(results, optimizer=price["optimizer"])
        end, loss = spread([np.mean(row["losses"][-20:]) for row in rows], 4), spread([row["test_loss"] for row in rows])
        accuracy = spread([100 * row["test_accuracy"] for row in rows], 1)
        step, size = f"{1e3 * price['seconds']:.1f}", f"{price['state_bytes_per_parameter']:.1f}"
        cells.append([name, chosen(results, optimizer=name), end, loss, accuracy, step, size])
    lines = [*markdown(heads, cells), "", f"{len(rows)} seeds; training loss is the mean of the last 20 steps."]
    return "\n".join(lines) + "\n"


def figure(results: dict) -> Figure:
    """Training loss ± its standard deviation over seeds, by step and by time; validation loss by rate."""
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for price in results["cost"]:
        name, width = price["optimizer"], min(10, results["config"]["steps"])
        mean = lambda losses, width=width: np.convolve(np.array(losses, float), np.ones(width) / width, "valid")
        losses = np.stack([mean(row["losses"]) for row in counted(results, optimizer=name)])
        steps = np.arange(width, width + losses.shape[1])
        for ax, x in ((left, steps), (middle, steps * price["seconds"])):
            band(ax, x, losses, label=name)
        rows = tried(results, optimizer=name)
        right.plot([row["rate"] for row in rows], [row["validation_loss"] for row in rows], "o-")
    left.set(xlabel="step", ylabel="training loss, mean of 10 steps", yscale="log")
    middle.set(xlabel="seconds of training", yscale="log")
    right.set(xlabel="learning rate", ylabel="validation loss, tuning seed", xscale="log", yscale="log")
    left.legend()
    return fig


def main() -> None:
    config = flags.parse(settings.Vision)
    results = measure(config, resume(RESULTS / "vision", config))
    finish(RESULTS / "vision", results, table(results), figure(results))


if __name__ == "__main__":
    flags.run(main)
