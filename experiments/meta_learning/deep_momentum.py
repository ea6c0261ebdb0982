"""Meta-learned deep momentum: `python experiments/meta_learning/deep_momentum.py` writes results/deep_momentum.*."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import config as settings
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.figure import Figure

from nested_jax import optim
from nested_jax.meta import descent, hypergradient
from nested_jax.optim import deep_momentum_start

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from record import band, in_one_go, markdown, spread

RESULTS = Path(__file__).parent / "results"
TRAINING, TUNING, TEST = 1, 2, 3  # of a seed's tasks
MOMENTUM, DEEP = "momentum", "deep momentum"
# Meta-learned optimizers, each with the tuned optimizer from whose rates it starts.
LEARNED = {
    "momentum, meta-learned rate and decay": MOMENTUM,
    "momentum of matrix @ gradient, all meta-learned": MOMENTUM,
    "deep momentum, meta-learned rates and decay": DEEP,
    "deep momentum, all and its start meta-learned": DEEP,
    "learned start, never written to, all meta-learned": DEEP,
    "momentum of deep momentum, all and its start meta-learned": DEEP,
}
STYLES = [("tab:gray", "-"), ("tab:orange", "-"), ("tab:gray", "--"), ("tab:orange", "--"), ("black", "-")]
STYLES += [("tab:blue", "-"), ("tab:red", "-"), ("tab:green", "-"), ("tab:purple", "--"), ("tab:cyan", "-")]
MATRIX, START, FROZEN, BOTH = (list(LEARNED)[i] for i in (1, 3, 4, 5))


class Task(NamedTuple):
    """A regression y = x target + noise, x = root z, z standard normal; targets weigh all directions of x equally."""

    root: jax.Array  # (N, N)
    target: jax.Array  # (N, M)


def family(geometries: int) -> str:
    return {0: "each task its own covariance", 1: "one covariance"}.get(geometries, f"one of {geometries} covariances")


def draw(config: settings.DeepMomentum, geometries: jax.Array, of_roots: jax.Array, key: jax.Array) -> Task:
    """A task whose input covariance is one of `geometries`."""
    of_root, of_target = jax.random.split(key)
    index = jax.random.randint(of_root, (), 0, geometries)
    shape = (config.inputs, config.inputs)
    rotation, _ = jnp.linalg.qr(jax.random.normal(jax.random.fold_in(of_roots, index), shape))
    deviations = config.condition ** (-jnp.linspace(0, 0.5, config.inputs))
    target = jax.random.normal(of_target, (config.inputs, config.outputs)) / deviations[:, None]
    return Task(rotation * deviations[None], rotation @ target)


def examples(config: settings.DeepMomentum, task: Task, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A batch of inputs (B, N) and targets (B, M)."""
    of_x, of_noise = jax.random.split(key)
    x = jax.random.normal(of_x, (config.examples, config.inputs)) @ task.root.T
    noise = jax.random.normal(of_noise, (config.examples, config.outputs))
    return x, x @ task.target + config.noise * noise


def excess(weights: jax.Array, task: Task) -> jax.Array:
    """Expected squared error without noise, relative to that of zero weights."""
    squares = lambda w: jnp.sum((task.root.T @ w) ** 2)
    return squares(weights - task.target) / squares(task.target)


def rule(name: str) -> Callable[[dict], optax.GradientTransformation]:
    """A function of the meta-parameters that returns the optimizer."""

    def make(meta):
        rate, decay = jnp.exp(meta["log_rate"]), jax.nn.sigmoid(meta["decay"])
        if "matrix" in meta:
            turn = optax.stateless(lambda g, _: meta["matrix"] @ g)
            return optim.preconditioned_momentum(rate, turn, decay)
        if LEARNED.get(name, name) == MOMENTUM:
            return optim.momentum(rate, decay)
        memory_rate = 0.0 if name == FROZEN else jnp.exp(meta["log_memory_rate"])
        if name == BOTH:
            deep = optim.scale_by_deep_momentum(decay, memory_rate, start=meta["start"])
            return optim.preconditioned_momentum(rate, deep, jax.nn.sigmoid(meta["outer_decay"]))
        return optim.deep_momentum(rate, decay, memory_rate, start=meta["start"])

    return make


def level(config: settings.DeepMomentum, name: str):
    """Descent on the batches of a task from zero weights, by an optimizer of the meta-parameters."""
    loss = lambda weights, batch, meta: jnp.sum((batch[0] @ weights - batch[1]) ** 2) / (2 * config.examples)
    return descent(loss, rule(name), start=lambda meta: jnp.zeros((config.inputs, config.outputs)))


def descend(config: settings.DeepMomentum, name: str, steps: int, meta: dict, task: Task, key: jax.Array) -> jax.Array:
    """Excess error (steps + 1,) after 0, 1, ... steps."""
    learner, slower = level(config, name), (meta,)

    def step(state, i):
        batch = examples(config, task, jax.random.fold_in(key, i))
        state, _ = learner.step(state, jax.tree.map(lambda x: x[None], batch), slower)
        return state, excess(state.params, task)

    errors = jax.lax.scan(step, learner.init(slower), jnp.arange(steps))[1]
    return jnp.concatenate([jnp.ones(1), errors])


def tasks_of(config: settings.DeepMomentum, geometries: jax.Array, seed: jax.Array, which: int, count: int, i: int = 0):
    """Tasks of a seed and the keys of their batches, for TRAINING (meta-update i), TUNING or TEST."""
    key = jax.random.key(seed)
    keys = jax.vmap(jax.random.split)(jax.random.split(jax.random.fold_in(jax.random.fold_in(key, which), i), count))
    draw_one = functools.partial(draw, config, geometries, jax.random.fold_in(key, 0))
    return jax.vmap(draw_one)(keys[:, 0]), keys[:, 1]


def log_mean(errors: jax.Array) -> jax.Array:
    """Mean logarithm over tasks; errors that are above 1e6 or not finite count as 1e6."""
    return jnp.log(jnp.clip(jnp.nan_to_num(errors, nan=1e6, posinf=1e6), 1e-12, 1e6)).mean(0)


def logit(decay: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(decay, 1e-3)) - jnp.log1p(-decay)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def tune(config: settings.DeepMomentum, name: str, steps: int, geometries: jax.Array, seeds: jax.Array) -> dict:
    """The rates and decays of the grid with the least mean logarithm of the error after the steps, for each seed."""
    rates, decays = (config.rates, config.decays) if name == MOMENTUM else (config.deep_rates, config.deep_decays)
    memory_rates = (1.0,) if name == MOMENTUM else config.memory_rates
    grid = jnp.stack(jnp.meshgrid(*map(jnp.array, (rates, decays, memory_rates)), indexing="ij"), -1).reshape(-1, 3)

    def one(seed):
        tasks, keys = tasks_of(config, geometries, seed, TUNING, config.tuning_tasks)
        start = first_start(config, seed)

        def meta_of(choice):
            meta = {"log_rate": jnp.log(choice[0]), "decay": logit(choice[1])}
            return meta | ({} if name == MOMENTUM else {"log_memory_rate": jnp.log(choice[2]), "start": start})

        def ends(task, key):
            return jax.vmap(lambda choice: descend(config, name, steps, meta_of(choice), task, key)[-1])(grid)

        return meta_of(grid[jnp.argmin(log_mean(jax.vmap(ends)(tasks, keys)))])

    return jax.vmap(one)(seeds)


def first_start(config: settings.DeepMomentum, seed: jax.Array):
    """The default start of a deep momentum, with an input layer drawn from the seed."""
    start = deep_momentum_start(jnp.zeros((config.inputs, config.outputs)), config.hidden)
    return start._replace(up=jax.random.normal(jax.random.fold_in(jax.random.key(seed), 4), start.up.shape))


@functools.partial(jax.jit, static_argnums=(0, 1))
def learn(config: settings.DeepMomentum, name: str, geometries: jax.Array, seeds: jax.Array, tuned: dict):
    """Meta-parameters after meta-learning, which starts from the tuned ones, and the outer losses, for each seed."""

    def outer(meta, state, emitted, task):
        return jnp.log(excess(state.params, task) + 1e-6)

    slope = hypergradient(outer, level(config, name), checkpoint="none")

    def one(seed, meta):
        meta = meta | {"decay": jnp.maximum(meta["decay"], -2.0)}  # at decay 0 the sigmoid has no gradient
        if name == MATRIX:
            meta |= {"matrix": jnp.eye(config.inputs)}
        if name == BOTH:  # the outer decay starts at 0.5, which doubles steps
            meta |= {"outer_decay": jnp.zeros(()), "log_rate": meta["log_rate"] - jnp.log(2.0)}
        schedule = optax.cosine_decay_schedule(config.meta_rate, config.iterations)
        adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

        def step(carry, i):
            meta, state = carry
            tasks, keys = tasks_of(config, geometries, seed, TRAINING, config.batch_size, i)
            each = jax.vmap(
                lambda task, key: jax.vmap(lambda k: examples(config, task, k))(jax.random.split(key, config.steps))
            )
            result = jax.vmap(slope, (None, 0, 0))(meta, each(tasks, keys), tasks)
            gradient = jax.tree.map(lambda g: jnp.nan_to_num(g).mean(0), result.gradient)
            if name not in (START, FROZEN, BOTH) and "start" in gradient:
                gradient["start"] = jax.tree.map(jnp.zeros_like, gradient["start"])
            updates, state = adam.update(gradient, state)
            return (optax.apply_updates(meta, updates), state), result.value.mean()

        (meta, _), losses = jax.lax.scan(step, (meta, adam.init(meta)), jnp.arange(config.iterations))
        return meta, losses

    return jax.vmap(one)(seeds, tuned)


@functools.partial(jax.jit, static_argnums=(0, 1))
def test(config: settings.DeepMomentum, name: str, geometries: jax.Array, seeds: jax.Array, metas: dict):
    """Geometric mean over test tasks of the error after 0, 1, ... steps, and the share that ends above 1, for each seed."""

    def one(seed, meta):
        tasks, keys = tasks_of(config, geometries, seed, TEST, config.test_tasks)
        errors = jax.vmap(functools.partial(descend, config, name, config.long, meta))(tasks, keys)
        return jnp.exp(log_mean(errors)), jnp.mean(~(errors[:, -1] <= 1))

    return jax.vmap(one)(seeds, metas)


def measure(config: settings.DeepMomentum) -> dict:
    rows, seeds = [], jnp.array(config.seeds)
    number = lambda geometries: jnp.array(geometries or jnp.iinfo(jnp.int32).max)  # 0: each task has its own

    def add(geometries, title, name, metas, losses=None):
        errors, lost = test(config, name, number(geometries), seeds, metas)
        row = {"geometries": geometries, "optimizer": title, "errors": errors.tolist(), "lost": lost.tolist()}
        row["rate"] = jnp.exp(metas["log_rate"]).tolist()
        decay = jax.nn.sigmoid(metas["decay"]).tolist()
        if "log_memory_rate" not in metas:
            row["decay"] = decay
        elif name != FROZEN:
            row |= {"memory_rate": jnp.exp(metas["log_memory_rate"]).tolist(), "memory_decay": decay}
        if name == BOTH:
            row["decay"] = jax.nn.sigmoid(metas["outer_decay"]).tolist()
        row["training"] = None if losses is None else losses.tolist()
        rows.append(row)
        ends = [f"{n}: {np.mean(errors[:, n]):.4f}" for n in (config.steps, config.long)]
        print(time.strftime("%H:%M:%S"), geometries, title, *ends, flush=True)

    for geometries in config.geometries:
        tuned = {}
        for steps in (config.steps, config.long):
            for name in (MOMENTUM, DEEP):
                metas = tune(config, name, steps, number(geometries), seeds)
                tuned.setdefault(name, metas)
                add(geometries, f"{name}, tuned for {steps} steps", name, metas)
        for name, base in LEARNED.items():
            add(geometries, name, name, *learn(config, name, number(geometries), seeds, tuned[base]))
    return {"rows": rows}


def at_edge(config: dict, row: dict) -> dict[str, int]:
    """Number of seeds whose tuned value is the grid's smallest or largest; decay 0 is not an edge."""
    if row["training"] is not None:
        return {}
    deep = "memory_rate" in row
    grids = {"rate": "deep_rates" if deep else "rates", "memory_rate": "memory_rates"}
    edges = {key: (min(config[grid]), max(config[grid])) for key, grid in grids.items()}
    edges |= {"memory_decay": (max(config["deep_decays"]),), "decay": (max(config["decays"]),)}
    return {key: np.isclose(np.array(row[key])[:, None], edges[key], rtol=1e-3).sum() for key in edges if key in row}


def behind_from(errors: np.ndarray, base: np.ndarray) -> str:
    """The step from which an error's geometric mean over seeds stays above the baseline's, if any."""
    ahead = np.flatnonzero(np.log(errors).mean(0) <= np.log(base).mean(0))
    return "" if ahead[-1] == errors.shape[1] - 1 else str(ahead[-1] + 1)


def table(results: dict) -> str:
    config = results["config"]
    counts = (config["steps"], config["long"])
    base = f"{MOMENTUM}, tuned for {config['long']} steps"
    heads = ["optimizer", *map(str, counts), "lost", f"behind {base}, from step"]
    heads += ["rate", "decay", "memory's rate", "and decay"]
    lines = []
    for geometries in config["geometries"]:
        lines += [f"{family(geometries)}: relative error in thousandths, by number of steps:", ""]
        rows, cells = [row for row in results["rows"] if row["geometries"] == geometries], []
        other = next(np.array(row["errors"]) for row in rows if row["optimizer"] == base)
        for row in rows:
            errors, edge = np.array(row["errors"]), at_edge(config, row)
            line = [row["optimizer"], *(spread(1000 * errors[:, n], kind="g") for n in counts)]
            line += [f"{np.mean(row['lost']):.0%}", behind_from(errors, other)]
            for key in ("rate", "decay", "memory_rate", "memory_decay"):
                mean = f"{np.mean(row[key]):.3g}" if key in row else ""
                line.append(mean + (f" ({edge[key]} at the edge)" if edge.get(key) else ""))
            cells.append(line)
        lines += [*markdown(heads, cells), ""]
    lines.append("At the edge: number of seeds whose value is the smallest or largest tried.")
    return "\n".join(lines) + "\n"


def figure(results: dict) -> Figure:
    """Errors by step in every family of tasks."""
    config = results["config"]
    shape = {"ncols": len(config["geometries"]), "figsize": (14, 4.8), "layout": "constrained"}
    fig, (axes,) = plt.subplots(1, **shape, sharey=True, squeeze=False)
    for ax, geometries in zip(axes, config["geometries"], strict=True):
        rows = [row for row in results["rows"] if row["geometries"] == geometries]
        for row, (color, line) in zip(rows, STYLES, strict=True):
            style = {"color": color, "linestyle": line, "linewidth": 1.3, "label": row["optimizer"]}
            band(ax, range(config["long"] + 1), row["errors"], geometric=True, **style)
        ax.axvline(config["steps"], color="black", linewidth=0.8, linestyle=":")
        ax.set(title=family(geometries), xlabel="step", xscale="log", yscale="log", xlim=(1, config["long"]), ylim=(None, 3))
    axes[0].set_ylabel("excess error relative to zero weights")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


def main() -> None:
    config = flags.parse(settings.DeepMomentum)
    in_one_go(RESULTS / "deep_momentum", config, measure, table, figure)


if __name__ == "__main__":
    flags.run(main)
