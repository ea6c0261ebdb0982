"""Tasks in sequence: `python experiments/optimizers/orthogonal.py` writes results/orthogonal.*."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import config as settings
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from cost import costs
from matplotlib.figure import Figure

from nested_jax import optim

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from record import begin, finish, markdown, spread

RESULTS = Path(__file__).parent / "results"
RULES: dict[str, Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]] = {
    "gd": optax.sgd,
    "momentum": optim.momentum,
    "momentum, decay 0.99": lambda rate: optim.momentum(rate, 0.99),
    "delta_momentum": lambda rate: optim.delta_momentum(rate, erase=0.5),
    "delta_momentum, decay 0.99": lambda rate: optim.delta_momentum(rate, 0.99, 0.5),
    "deep_momentum": optim.deep_momentum,
    "deep_momentum, decay 0.99": lambda rate: optim.deep_momentum(rate, 0.99, 0.1),  # rate / (1 - decay) as above
    "muon": optim.nonlinear_momentum,
    "m3": lambda rate: optim.m3(rate, second_moment=False),
    "m3, slow period 64": lambda rate: optim.m3(rate, second_moment=False, slow_period=64),
    "m3, second moment": optim.m3,
    "adamw": optax.adamw,
    "gd, old subspaces known": lambda rate: optax.chain(remove_old(), optax.sgd(rate)),
}


class Tasks(NamedTuple):
    """Inputs of task i are bases[i] @ N(0, variances), targets target^T x: one matrix (in, out) solves all tasks."""

    bases: jax.Array  # (tasks, in, dimension), orthonormal columns
    variances: jax.Array  # (dimension,)
    target: jax.Array  # (in, out)
    old: jax.Array  # (tasks, in, in): projection onto the subspaces of earlier tasks


def draw(config: settings.Orthogonal, overlap, key: jax.Array) -> Tasks:
    """Tasks whose subspaces are rotated at random, with the overlap as the cosine of all principal angles."""
    n, d = config.tasks, config.dimension
    turn, solution = jax.random.split(key)
    axes = jnp.linalg.qr(jax.random.normal(turn, (d * (n + 1),) * 2))[0].reshape(-1, n + 1, d)
    own, shared = jnp.moveaxis(axes[:, :n], 1, 0), axes[:, n]
    bases = jnp.sqrt(1 - overlap) * own + jnp.sqrt(overlap) * shared[None]
    variances = jnp.geomspace(1.0, 1 / config.condition, d)
    target = jax.random.normal(solution, (d * (n + 1), config.outputs)) * d**-0.5
    sums = jnp.cumsum(bases @ jnp.swapaxes(bases, -2, -1), axis=0)
    values, vectors = jnp.linalg.eigh(jnp.concatenate([jnp.zeros_like(sums[:1]), sums[:-1]]))
    old = (vectors * (values > 1e-4)[:, None, :]) @ jnp.swapaxes(vectors, -2, -1)
    return Tasks(bases, variances * d / variances.sum(), target, old)


def relative_error(tasks: Tasks, weights: jax.Array) -> jax.Array:
    """Each task's expected squared error without noise, relative to that of zero weights, (tasks,)."""

    def errors(weights):
        along = jnp.swapaxes(tasks.bases, -2, -1) @ (weights - tasks.target)
        return jnp.sum(tasks.variances[None, :, None] * along**2, (-2, -1))

    return errors(weights) / errors(jnp.zeros_like(weights))


def remove_old() -> optax.GradientTransformationExtraArgs:
    """Projects gradients off the subspaces of earlier tasks; `update` takes the projection `old` onto them."""
    update = lambda updates, state, params=None, *, old: (updates - old @ updates, state)
    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def train_tasks(config: settings.Orthogonal, name: str, falling: bool, overlap, rate, seed):
    """Errors of all tasks after each task (tasks, tasks); share of updates outside the task's subspace (tasks, steps)."""
    of_tasks, stream = jax.random.split(jax.random.key(seed))
    tasks = draw(config, overlap, of_tasks)
    schedule = lambda count: rate * (1 - count % config.steps / config.steps) if falling else rate
    rule = optax.with_extra_args_support(RULES[name](schedule))

    def loss(weights, basis, key):
        one, two = jax.random.split(key)
        x = jax.random.normal(one, (config.batch_size, config.dimension)) * jnp.sqrt(tasks.variances)[None] @ basis.T
        noise = config.noise * jax.random.normal(two, (config.batch_size, config.outputs))
        return jnp.sum((x @ (weights - tasks.target) - noise) ** 2) / (2 * config.batch_size)

    def stage(carry, task):
        basis, old, key = task

        def step(carry, key):
            weights, state = carry
            gradient = jax.grad(loss)(weights, basis, key)
            updates, state = rule.update(gradient, state, weights, old=old)
            leaving = updates - basis @ (basis.T @ updates)
            return (weights + updates, state), jnp.sum(leaving**2) / jnp.maximum(jnp.sum(updates**2), 1e-30)

        carry, shares = jax.lax.scan(step, carry, jax.random.split(key, config.steps))
        return carry, (relative_error(tasks, carry[0]), shares)

    weights = jnp.zeros_like(tasks.target)
    keys = jax.random.split(stream, config.tasks)
    return jax.lax.scan(stage, (weights, rule.init(weights)), (tasks.bases, tasks.old, keys))[1]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def train_all(config: settings.Orthogonal, name: str, falling: bool, overlap, rates, seeds):
    """`train_tasks` for all rates and seeds, leaves (rates, seeds, ...)."""
    one = functools.partial(train_tasks, config, name, falling, overlap)
    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(rates, seeds)


def setting(config: settings.Orthogonal, name: str, schedule: str, overlap: float) -> dict:
    """One optimizer's learning rate, chosen on the tuning seeds, and its results on the test seeds."""
    falling = schedule == "falling"
    run = lambda rates, seeds: train_all(config, name, falling, overlap, jnp.array(rates), jnp.array(seeds))
    ends = run(config.rates, config.tuning_seeds)[0][:, :, -1].mean((1, 2))
    rate = config.rates[int(jnp.argmin(jnp.where(jnp.isfinite(ends), ends, jnp.inf)))]
    errors, shares = (np.asarray(x[0]) for x in run((rate,), config.seeds))
    later = shares[:, 1:]
    return {
        "schedule": schedule,
        "overlap": overlap,
        "optimizer": name,
        "rate": rate,
        "rate_at_edge": rate in (config.rates[0], config.rates[-1]),
        "first_after_first": errors[:, 0, 0].tolist(),
        "first_at_end": errors[:, -1, 0].tolist(),
        "each_when_taught": np.diagonal(errors, axis1=1, axis2=2).mean(1).tolist(),
        "all_at_end": errors[:, -1].mean(1).tolist(),
        "first_after_each": errors[:, :, 0].mean(0).tolist(),
        "leaving": later.mean((1, 2)).tolist(),
        "leaving_by_step": [float(f"{share:.3g}") for share in later.mean((0, 1))],
    }


def cost(config: settings.Orthogonal) -> list[dict]:
    """Seconds of an update of one square matrix, and bytes of state."""
    params = jax.random.normal(jax.random.key(0), (config.cost_width,) * 2)
    updates = {}
    for name, make in RULES.items():
        rule = optax.with_extra_args_support(make(0.1))
        update = jax.jit(rule.update)
        step = lambda _, state, update=update: update(params, state, params, old=params)
        updates[name] = step, params, rule.init(params)
    return costs(updates, config.cost_updates, config.cost_rounds)


def measure(config: settings.Orthogonal) -> dict:
    rows = []
    for schedule in config.schedules:
        for overlap in config.overlaps:
            for name in RULES:
                rows.append(setting(config, name, schedule, overlap))
                print(schedule, overlap, name, rows[-1]["rate"], np.mean(rows[-1]["all_at_end"]), flush=True)
    return {"rows": rows, "cost": cost(config)}


def table(results: dict) -> str:
    """Markdown: a table of every setting, and one of costs."""
    heads = ("optimizer", "each when trained", "task 1 at the end", "all at the end", "more than gd", "leaving", "rate")
    lines = []
    for schedule in results["config"]["schedules"]:
        for overlap in results["config"]["overlaps"]:
            rows, cells = [row for row in results["rows"] if (row["schedule"], row["overlap"]) == (schedule, overlap)], []
            for row in rows:
                ends = [spread(row[key]) for key in ("each_when_taught", "first_at_end", "all_at_end")]
                more = spread(np.subtract(row["all_at_end"], rows[0]["all_at_end"]), sign="+")
                edge = " (edge)" if row["rate_at_edge"] else ""
                cells.append([row["optimizer"], *ends, more, f"{np.mean(row['leaving']):.1%}", f"{row['rate']:g}{edge}"])
            lines += [f"Rate {schedule}, overlap {overlap:g}:", "", *markdown(heads, cells), ""]
    base, cells = results["cost"][0]["seconds"], []
    for row in results["cost"]:
        microseconds, size = 1e6 * row["seconds"], row["state_bytes_per_parameter"]
        cells.append([row["optimizer"], f"{microseconds:,.0f}", f"{row['seconds'] / base:.1f}", f"{size:.1f}"])
    lines += markdown(("optimizer", "µs an update", "times gd", "state, bytes a parameter"), cells)
    return "\n".join(lines) + "\n"


def figure(results: dict) -> Figure:
    """Error of task 1 while others are trained, and the share of updates outside the trained task's subspace."""
    overlaps = results["config"]["overlaps"]
    fig, axes = plt.subplots(2, len(overlaps), figsize=(5 * len(overlaps), 7.5), layout="constrained", squeeze=False)
    colors = dict(zip(RULES, plt.cm.tab20.colors, strict=False))
    for column, overlap in zip(axes.T, overlaps, strict=True):
        for row in results["rows"]:
            if (row["schedule"], row["overlap"]) != (results["config"]["schedules"][0], overlap):
                continue
            style = {"color": colors[row["optimizer"]], "label": row["optimizer"]}
            stages = range(1, len(row["first_after_each"]) + 1)
            column[0].plot(stages, row["first_after_each"], ".-", **style)
            column[1].plot(np.maximum(row["leaving_by_step"], 1e-6), **style)
        column[0].set(xlabel="tasks trained", ylabel="relative error of task 1", yscale="log", title=f"overlap {overlap:g}")
        column[1].set(xlabel="step of a later task", ylabel="share of the update outside the task's subspace", yscale="log")
    axes[0, -1].legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    return fig


def main() -> None:
    config = flags.parse(settings.Orthogonal)
    results = begin(RESULTS / "orthogonal", config) | measure(config)
    finish(RESULTS / "orthogonal", results, table(results), figure(results))


if __name__ == "__main__":
    flags.run(main)
