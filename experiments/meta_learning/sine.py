"""Sines from few points: `python experiments/meta_learning/sine.py` writes results/sine.*."""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path
from typing import NamedTuple

import config as settings
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.figure import Figure

from nested_jax.meta import maml

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from record import band, in_one_go, markdown, spread

RESULTS = Path(__file__).parent / "results"
PRETRAINED, RANDOM = "pretrained on all tasks", "random"
MAML = ("MAML", "MAML, first order", "MAML, learned rate", "MAML, learned rates")
PUBLISHED = "MAML, published code's first start"


class Points(NamedTuple):
    """Points of a sine."""

    x: jax.Array  # (K,)
    y: jax.Array  # (K,)


def draw(config: settings.Sine, shots: int, queries: int, key: jax.Array) -> tuple[Points, Points]:
    """Shots and queries of one task, y = amplitude sin(x - phase)."""
    keys = jax.random.split(key, 3)
    uniform = lambda key, shape, ends: jax.random.uniform(key, shape, minval=ends[0], maxval=ends[1])
    amplitude, phase = uniform(keys[0], (), config.amplitude), uniform(keys[1], (), config.phase)
    x = uniform(keys[2], (shots + queries,), config.inputs)
    points = Points(x, amplitude * jnp.sin(x - phase))
    return jax.tree.map(lambda p: p[:shots], points), jax.tree.map(lambda p: p[shots:], points)


def init(config: settings.Sine, key: jax.Array, published: bool = False) -> list[tuple[jax.Array, jax.Array]]:
    """Kernels and biases, uniform in ± 1 / sqrt(inputs of the layer).

    `published`: as in the paper's code, kernels normal, truncated at two standard deviations of 0.01, and biases zero.
    """
    widths, layers = (1, *config.hidden, 1), []
    for i, shape in enumerate(zip(widths, widths[1:], strict=False)):
        of_kernel, of_bias = jax.random.split(jax.random.fold_in(key, i))
        if published:
            layers.append((0.01 * jax.random.truncated_normal(of_kernel, -2, 2, shape), jnp.zeros(shape[1])))
        else:
            uniform = functools.partial(jax.random.uniform, minval=-(shape[0] ** -0.5), maxval=shape[0] ** -0.5)
            layers.append((uniform(of_kernel, shape), uniform(of_bias, shape[1:])))
    return layers


def error(params: list[tuple[jax.Array, jax.Array]], points: Points) -> jax.Array:
    """Mean squared error."""
    *hidden, (kernel, bias) = params
    h = points.x[:, None]
    for inner in hidden:
        h = jax.nn.relu(h @ inner[0] + inner[1][None])
    return jnp.mean(((h @ kernel + bias[None])[:, 0] - points.y) ** 2)


def rule(log_rates) -> optax.GradientTransformation:
    """Gradient descent at exp(log_rates), one rate for all parameters or one for each."""
    step = lambda r, g: -jnp.exp(r) * g
    return optax.stateless(lambda g, _: jax.tree.map(step, jax.tree.broadcast(log_rates, g), g))


def means(losses: jax.Array) -> jax.Array:
    """Means of the loss over CHUNKS equal parts of the training; the remainder at its end is dropped."""
    return losses[: len(losses) // settings.CHUNKS * settings.CHUNKS].reshape(settings.CHUNKS, -1).mean(1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def train(config: settings.Sine, method: str, shots: int, seeds: jax.Array):
    """The start, the logarithms of its rates and `means` of the loss, for each seed.

    Pretraining is MAML without an inner step.
    """
    adapt = maml(error, rule, 0 if method == PRETRAINED else 1, first_order="first order" in method)

    def outer(meta, tasks):
        start, log_rates = meta
        log_rates = log_rates if "learned" in method else jax.lax.stop_gradient(log_rates)
        return jnp.mean(jax.vmap(lambda task: error(adapt(start, task[0], log_rates), task[1]))(tasks))

    def one(seed):
        key = jax.random.key(seed)
        start, log_rates = init(config, jax.random.fold_in(key, 0), method == PUBLISHED), jnp.log(config.rate)
        if method == "MAML, learned rates":
            log_rates = jax.tree.map(lambda p: jnp.full_like(p, log_rates), start)
        adam = optax.adam(config.meta_rate)

        def step(carry, i):
            meta, state = carry
            keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 1), i), config.batch_size)
            tasks = jax.vmap(functools.partial(draw, config, shots, shots))(keys)
            loss, gradient = jax.value_and_grad(outer)(meta, tasks)
            updates, state = adam.update(gradient, state)
            return (optax.apply_updates(meta, updates), state), loss

        meta = (start, log_rates)
        (meta, _), losses = jax.lax.scan(step, (meta, adam.init(meta)), jnp.arange(config.iterations))
        return *meta, means(losses)

    return jax.vmap(one)(seeds)


def held_out(config: settings.Sine, seed: jax.Array, tuning: bool) -> tuple[Points, Points]:
    """Tuning or test tasks of a seed: shots, of which K-shot learning uses the first K, and queries."""
    keys = jax.random.fold_in(jax.random.key(seed), 2 if tuning else 3)
    keys = jax.random.split(keys, config.tuning_tasks if tuning else config.test_tasks)
    return jax.vmap(functools.partial(draw, config, max(config.shots), config.queries))(keys)


def descend(config: settings.Sine, start, log_rates, shots: Points, queries: Points) -> jax.Array:
    """Error on the queries after 0, 1, ... steps of gradient descent on the shots."""
    adapt = maml(error, rule, 1)  # gradient descent has no state, so n steps are n times one
    step = lambda params, _: (adapt(params, shots, log_rates), error(params, queries))
    return jax.lax.scan(step, start, None, length=config.steps + 1)[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def test(config: settings.Sine, shots: int, seeds: jax.Array, starts, log_rates) -> dict[str, jax.Array]:
    """Mean and median error on each seed's test tasks after 0, 1, ... steps, and the share of errors above 100."""

    def one(seed, start, log_rates):
        each = errors_of(config, shots, False, seed, start, log_rates)
        lost = jnp.mean(~(each <= 100), 0)
        return {"errors": each.mean(0), "medians": jnp.median(jnp.nan_to_num(each, nan=jnp.inf), 0), "lost": lost}

    return jax.vmap(one)(seeds, starts, log_rates)


@functools.partial(jax.jit, static_argnums=(0, 1))
def test_tuned(config: settings.Sine, shots: int, seeds: jax.Array, starts):
    """Mean errors on test tasks at the rates best on tuning tasks, and these rates, by number of steps, for each seed."""

    def one(seed, start):
        rates = jnp.array(config.rates)
        mean = lambda tuning, rate: errors_of(config, shots, tuning, seed, start, jnp.log(rate)).mean(0)
        grid = lambda tuning: jax.lax.map(functools.partial(mean, tuning), rates)
        tried = grid(True)
        best = jnp.argmin(jnp.where(jnp.isfinite(tried), tried, jnp.inf), 0)
        return jnp.take_along_axis(grid(False), best[None], 0)[0], rates[best]

    return jax.vmap(one)(seeds, starts)


def errors_of(config: settings.Sine, shots: int, tuning: bool, seed, start, log_rates) -> jax.Array:
    """Errors (tasks, steps + 1) on held-out tasks of a seed after 0, 1, ... steps on their first `shots` points."""
    points, queries = held_out(config, seed, tuning)
    points = jax.tree.map(lambda p: p[:, :shots], points)
    return jax.vmap(lambda *task: descend(config, start, log_rates, *task))(points, queries)


def measure(config: settings.Sine) -> dict:
    rows, seeds = [], jnp.array(config.seeds)
    at_first = jax.vmap(lambda seed: init(config, jax.random.fold_in(jax.random.key(seed), 0)))(seeds)

    def add(start: str, trained_shots: int, starts, log_rates, losses):
        rate = jax.tree.map(lambda r: jnp.median(jnp.exp(r.reshape(len(seeds), -1)), 1), log_rates)
        rate = np.median(jnp.stack(jax.tree.leaves(rate)), 0)
        several = start in (RANDOM, PRETRAINED, MAML[0], PUBLISHED)
        for shots in config.shots if several else (trained_shots,):
            row = {"start": start, "trained_shots": trained_shots, "shots": shots, "rate": rate.tolist()}
            row |= {key: x.tolist() for key, x in test(config, shots, seeds, starts, log_rates).items()}
            if several:
                tuned, rates = test_tuned(config, shots, seeds, starts)
                row |= {"tuned_errors": tuned.tolist(), "tuned_rates": rates.tolist()}
            row["training"] = None if losses is None else losses.tolist()
            print(time.strftime("%H:%M:%S"), start, trained_shots, shots, np.mean(row["errors"], 0).round(3), flush=True)
            rows.append(row)

    fixed = jnp.full(len(seeds), jnp.log(config.rate))
    add(RANDOM, 0, at_first, fixed, None)
    most = max(config.shots)
    for method in (PRETRAINED, PUBLISHED):
        add(method, most, *train(config, method, most, seeds))
    for shots in config.shots:
        for method in MAML:
            add(method, shots, *train(config, method, shots, seeds))
    return {"rows": rows}


def chosen(results: dict, shots: int) -> list[tuple[str, dict, str]]:
    """What the table and figure compare at a number of shots: name, row, key of the errors."""
    rows = [row for row in results["rows"] if row["shots"] == shots]
    most = max(results["config"]["shots"])
    found = []
    for row in rows:
        if row["start"] in (RANDOM, PRETRAINED):
            found += [(f"{row['start']}, rate tuned", row, "tuned_errors")]
        elif row["trained_shots"] == shots and row["start"] != PUBLISHED:
            found += [(row["start"], row, "errors")]
            if row["start"] == MAML[0]:
                found += [(f"{row['start']}, rate tuned", row, "tuned_errors")]
    others = [row for row in rows if row["start"] in (MAML[0], PUBLISHED) and row["trained_shots"] == most]
    others = [row for row in others if row["start"] == PUBLISHED or shots != most]
    found += [(f"{row['start']}, meta-learned with {most} shots", row, "errors") for row in others]
    at_rate = [row for row in rows if row["start"] == PRETRAINED]
    return found + [(f"{PRETRAINED}, rate {results['config']['rate']:g}", row, "errors") for row in at_rate]


def table(results: dict) -> str:
    config = results["config"]
    counts, last = [n for n in (0, 1, 5, 10) if n <= config["steps"]], config["steps"]
    cell = lambda values: spread(values) if np.max(values) < 100 else "> 100"  # also NaN

    def tuned(rates):
        edge = np.isclose(rates[:, None], (min(config["rates"]), max(config["rates"]))).sum()
        return f"{np.median(rates):.3g}" + (f" ({edge} at the edge)" if edge else "")

    heads = ["start", *map(str, counts), f"{last}, median task", f"{last}, above 100", "inner rate"]
    lines = []
    for shots in config["shots"]:
        lines += [f"{shots}-shot, mean squared error by number of steps:", ""]
        cells = []
        for name, row, kind in chosen(results, shots):
            line = [name, *(cell(errors) for errors in np.array(row[kind], float)[:, counts].T)]
            if kind == "tuned_errors":
                line += ["", "", ", ".join(map(tuned, np.array(row["tuned_rates"])[:, counts[1:]].T))]
            else:
                lost = np.mean(np.array(row["lost"])[:, last])
                line += [cell(np.array(row["medians"], float)[:, last]), f"{lost:.1%}", f"{np.mean(row['rate']):.3g}"]
            cells.append(line)
        lines += [*markdown(heads, cells), ""]
    lines.append(
        "Inner rate: mean over seeds; of learned rates, the median over kernels and biases of the median in each; of tuned "
        "rates, the median over seeds for each number of steps. At the edge: number of seeds whose rate is the smallest or "
        "largest tried."
    )
    return "\n".join(lines) + "\n"


def figure(results: dict) -> Figure:
    """Errors by step for every number of shots, and the meta-training loss."""
    config = results["config"]
    fig, axes = plt.subplots(1, len(config["shots"]) + 1, figsize=(15, 4.2), layout="constrained")
    names = [f"{RANDOM}, rate tuned", f"{PRETRAINED}, rate tuned", *MAML]
    colors = dict(zip(names, ("tab:gray", "tab:brown", "tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True))
    for ax, shots in zip(axes, config["shots"], strict=False):
        for name, row, kind in chosen(results, shots):
            if name in colors:
                band(ax, range(config["steps"] + 1), row[kind], geometric=True, color=colors[name], label=name, marker=".")
        ax.set(title=f"{shots}-shot", xlabel="gradient steps on the shots", yscale="log", ylim=(0.02, 20))
        ax.set_ylabel("mean squared error on other points")
    most = max(config["shots"])
    for row in results["rows"]:
        if row["start"] in MAML and row["trained_shots"] == row["shots"] == most:
            x = (np.arange(settings.CHUNKS) + 0.5) * config["iterations"] / settings.CHUNKS / 1000
            band(axes[-1], x, row["training"], geometric=True, color=colors[row["start"]])
    axes[-1].set(title=f"meta-training, {most}-shot", xlabel="meta-iterations, thousands", yscale="log")
    axes[-1].set_ylabel("mean squared error after 1 step")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return fig


def main() -> None:
    config = flags.parse(settings.Sine)
    in_one_go(RESULTS / "sine", config, measure, table, figure)


if __name__ == "__main__":
    flags.run(main)
