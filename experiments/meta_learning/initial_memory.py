"""Starts of a memory: `python experiments/meta_learning/initial_memory.py` writes results/initial_memory.*."""

from __future__ import annotations

import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.figure import Figure

from nested_jax import Level, run
from nested_jax.checks import Count, Interval, Positive
from nested_jax.errors import UserError
from nested_jax.memory.deep import (
    Deep,
    Rule,
    Strengths,
    broadcast_start,
    deep_start,
    forward,
    init_level_state,
    learn,
    memory_level,
)
from nested_jax.memory.recurrence import Gates, MemoryState, read, write
from nested_jax.meta import hypergradient
from nested_jax.typing import Array, Float, PyTree

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from flags import Seeds
from record import band, in_one_go, markdown, spread

RESULTS = Path(__file__).parent / "results"
FAMILIES = ("common mean", "mean zero", "common features")
BASELINES = {"linear": "zero", "deep": "zero output"}
STARTS = {  # of each kind of memory: (name, whether the start is learned)
    "linear": (("zero", False), ("random", False), ("learned", True)),
    "deep": (("zero", False), ("half zero", False), ("zero output", False), ("random", False), ("learned", True)),
}


@dataclass(frozen=True)
class InitialMemory:
    """Zero, random and meta-learned starts of a memory that reads pairs (x, y) of a task and predicts the next y."""

    fresh: bool = False
    """Replace results of other flags."""
    memories: tuple[str, ...] = tuple(STARTS)
    """linear: a matrix with the delta rule. deep: the residual two-layer MLP of Titans."""
    families: tuple[str, ...] = FAMILIES
    """common mean: y = W x, W around a shared mean. mean zero: W around 0. common features: y = A silu(B x), A around 0,
    B shared."""
    width: Count = 8
    """Entries of x and of y."""
    hidden: Count = 16
    """Hidden units of the deep memory, and features of the last family."""
    pairs: Count = 40
    """Pairs of a task; y is predicted after 0, 1, ... pairs - 1 of them. A multiple of `chunk`."""
    chunk: Count = 8
    """Pairs that the linear memory reads in one parallel product, with the values of pair-by-pair reading."""
    shared: Annotated[float, Interval(least=0, most=1)] = 0.8
    """Share of a task's squared norm that is the family's mean, in the first family."""
    noise: Positive = 0.2
    """Norm of the noise on y; that of y is about 1."""
    steps: Count = 1200
    """Meta-updates: of the write rate and the retention of every memory, and of the learned start."""
    batch_size: Count = 8
    """Tasks of a meta-update, new at each."""
    meta_rate: Positive = 0.03
    """Adam's rate in the meta-updates, falling to zero along a cosine."""
    tuning: Count = 128
    """Tasks on which the target of retention, the start or zero, is chosen."""
    held_out: Count = 256
    """Held-out tasks."""
    seeds: Seeds = (0, 1, 2, 3, 4, 5)
    """Seeds of the family, its tasks and the random starts."""

    def __post_init__(self):
        flags.check(self, "memories", "families", "seeds")
        flags.check_known(self, "memories", STARTS)
        flags.check_known(self, "families", FAMILIES)
        if "linear" in self.memories and self.pairs % self.chunk:
            raise UserError(f"--pairs {self.pairs}: give a multiple of --chunk {self.chunk}")
        if "deep" in self.memories and self.hidden < 2 * self.width:
            raise UserError(f"--hidden {self.hidden}: give at least twice --width {self.width}, for the zero-output start")


class Family(NamedTuple):
    """What tasks y = W f(x) share: the mean of W, and features f(x) = silu(B x) / scale, or x without B."""

    mean: Float[Array, "V F"]
    own: Array  # share of W's squared norm that is not the mean's
    features: Float[Array, "F K"] | None  # B
    scale: Array


class Pairs(NamedTuple):
    """T pairs of each of B tasks; targets are values without noise."""

    keys: Float[Array, "T B K"]
    values: Float[Array, "T B V"]
    targets: Float[Array, "T B V"]


def features(family: Family, x: Float[Array, "... K"]) -> Float[Array, "... F"]:
    return x if family.features is None else jax.nn.silu(x @ family.features.T) / family.scale


def unit(key: Array, *shape: int) -> Array:
    """Vectors uniform on the unit sphere."""
    x = jax.random.normal(key, shape)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def draw_family(config: InitialMemory, name: str, key: Array) -> Family:
    mean, matrix, sample = jax.random.split(key, 3)
    K, F, one = config.width, config.hidden, jnp.ones(())
    if name == "common features":
        wide = Family(jnp.zeros((K, F)), one, 3.0 * unit(matrix, F, K), one)
        return wide._replace(scale=jnp.sqrt(jnp.mean(jnp.sum(features(wide, unit(sample, 4096, K)) ** 2, -1))))
    share = config.shared if name == "common mean" else 0.0
    return Family(jnp.sqrt(share / K) * jax.random.normal(mean, (K, K)), one - share, None, one)


def draw_tasks(config: InitialMemory, family: Family, tasks: int, key: Array) -> Pairs:
    """Tasks y = W f(x) + noise with |x| = 1; the mean of |W f(x)|^2 over tasks and x is 1."""
    maps, keys, noise = jax.random.split(key, 3)
    own = jax.random.normal(maps, (tasks, *family.mean.shape)) * jnp.sqrt(family.own / config.width)
    x = unit(keys, config.pairs, tasks, config.width)
    targets = jnp.einsum("bvf,tbf->tbv", family.mean[None] + own, features(family, x))
    return Pairs(x, targets + config.noise * config.width**-0.5 * jax.random.normal(noise, targets.shape), targets)


def bayes(config: InitialMemory, family: Family, tasks: Pairs) -> Float[Array, "T B V"]:
    """The optimal prediction of every y from earlier pairs, given the family: a Kalman filter's."""
    F = family.mean.shape[1]

    def one(f, y):
        def step(carry, pair):
            mean, spread = carry
            f, y = pair
            gain = spread @ f / (f @ spread @ f + config.noise**2)
            guess = mean @ f
            return (mean + jnp.outer(y - guess, gain), spread - jnp.outer(gain, spread @ f)), guess

        return jax.lax.scan(step, (family.mean, family.own * jnp.eye(F)), (f, y))[1]

    return jax.vmap(one, in_axes=1, out_axes=1)(features(family, tasks.keys), tasks.values)


def memory(config: InitialMemory, kind: str, anchored: Array) -> Level:
    """A memory that reads `Pairs` and emits its prediction at each key before it reads the value.

    The slower level's state is {start, rate, retain}: the start, the logarithm of the write rate eta, the logit of the
    retention alpha. Both kinds take the proximal step eta / (1 + eta |x|^2) and decay to `anchored` times the start.
    """
    gates = lambda meta: (jnp.exp(meta["rate"]), jax.nn.sigmoid(meta["retain"]))

    def linear(state, pairs, slower):
        rate, retain = gates(slower[0])
        anchor = anchored * slower[0]["start"][None]
        keys, values = pairs.keys.swapaxes(0, 1), pairs.values.swapaxes(0, 1)
        full = lambda gate: jnp.full((1, keys.shape[1]), gate)
        rate = rate / (1 + rate)
        # The delta rule after retention: its error is alpha W x + (1 - alpha) anchor x - v.
        errors = (1 - retain) * jnp.matmul(keys, anchor.swapaxes(1, 2)) - values
        written = write(state, keys, errors, Gates(full(rate), full(retain * rate), full(retain)), anchor=anchor)
        return written.state, read(written, keys, before=True).swapaxes(0, 1)

    def deep(running, snapshot, pairs, slower):
        rate, retain = gates(slower[0])
        anchor = jax.tree.map(lambda w: anchored * w, broadcast_start(heads(slower[0]["start"]), pairs.keys.shape[1]))
        keys, values = pairs.keys.swapaxes(0, 1)[:, None], pairs.values.swapaxes(0, 1)[:, None, None]
        strengths = Strengths(*(jnp.full((1, 1, keys.shape[2]), gate) for gate in (rate, retain)), None)
        rule = Rule(erase="none", read="before")
        running, outputs = learn(running, snapshot, anchor, forward(snapshot, keys), values, strengths, rule, None, keys)
        return running, outputs[:, 0].swapaxes(0, 1), pairs.keys.shape[0]

    heads = lambda start: Deep(start["first"][None, None], start["second"][None, None])
    tasks = lambda slower: slower[0]["tasks"].shape[0]
    if kind == "linear":
        init = lambda slower: MemoryState(jnp.repeat(slower[0]["start"][None], tasks(slower), axis=0))
        return Level(init, linear, config.chunk, "linear memory")
    init = lambda slower: init_level_state(heads(slower[0]["start"]), tasks(slower), False)
    return memory_level(init, deep, 1, 1, "deep memory", Level.description)


def draw_start(config: InitialMemory, kind: str, name: str, key: Array) -> PyTree:
    """The initial weights of a start; a learned start begins as the random one.

    Of the deep memory M(z) = z + W_1 silu(W_2 z), zero (both layers) and half zero (W_1 = 0) give M(z) = z. Zero output
    gives M(z) = 0 with non-zero layers, W_2 = (I, -I) and W_1 = (-I, I), since silu(z) - silu(-z) = z.
    """
    K = config.width
    if kind == "linear":
        start = K**-0.5 * jax.random.normal(key, (K, K))
        return jnp.zeros_like(start) if name == "zero" else start
    start = jax.tree.map(lambda w: w[0, 0], deep_start(key, 1, 1, K, config.hidden))
    if name == "zero output":
        both = jnp.concatenate([jnp.eye(K), -jnp.eye(K)])
        second = jnp.zeros_like(start["second"]).at[:, : 2 * K].set(-both.T)
        return {"first": start["first"].at[: 2 * K].set(both), "second": second}
    zero = {"zero": ("first", "second"), "half zero": ("second",)}.get(name, ())
    return {part: jnp.zeros_like(w) if part in zero else w for part, w in start.items()}


def predictions(config: InitialMemory, kind: str, anchored: Array, meta: PyTree, pairs: Pairs) -> Float[Array, "T B V"]:
    slower = (meta | {"tasks": jnp.zeros(pairs.keys.shape[1])},)
    _, emitted = run(memory(config, kind, anchored), None, pairs, slower=slower)
    return emitted.reshape(pairs.values.shape)


def outer_loss(meta, state, emitted, values):
    """The outer loss: the mean of |prediction - y|^2 over tasks and pairs."""
    return jnp.mean(jnp.sum((emitted.reshape(values.shape) - values) ** 2, -1))


def meta_learn(
    config: InitialMemory, kind: str, family: Family, learned: Array, anchored: Array, start: PyTree, key: Array
) -> PyTree:
    """{start, rate, retain} after the meta-updates; the start is constant if `learned` is 0."""
    meta = {"start": start, "rate": jnp.log(0.5), "retain": jnp.full((), 4.0)}
    adam = optax.adam(optax.cosine_decay_schedule(config.meta_rate, config.steps))
    slope = hypergradient(outer_loss, memory(config, kind, anchored), checkpoint="none")

    def step(carry, key):
        meta, state = carry
        pairs = draw_tasks(config, family, config.batch_size, key)
        found = slope(meta | {"tasks": jnp.zeros(config.batch_size)}, pairs, pairs.values)
        gradient = {part: found.gradient[part] for part in meta}
        updates, state = adam.update(gradient, state)
        updates["start"] = jax.tree.map(lambda u: learned * u, updates["start"])
        return (optax.apply_updates(meta, updates), state), found.value

    (meta, _), _ = jax.lax.scan(step, (meta, adam.init(meta)), jax.random.split(key, config.steps))
    return meta


def keys_of(seed: Array) -> Array:
    """Keys of a seed: of the family, the training, tuning and held-out tasks, and the starts."""
    return jax.random.split(jax.random.fold_in(jax.random.key(1), seed), 5)


@functools.partial(jax.jit, static_argnums=(0, 1))
def measure_seeds(config: InitialMemory, kind: str, families: Family, seeds: Array) -> tuple[dict, Array]:
    """Rates, retention and errors by start, anchor and seed; and the errors of `bayes` by seed."""
    starts = STARTS[kind]

    def one_seed(family, seed):
        _, train, tune, count, begins = keys_of(seed)
        tuning = draw_tasks(config, family, config.tuning, tune)
        held_out = draw_tasks(config, family, config.held_out, count)
        error = lambda guess, pairs: jnp.mean(jnp.sum((guess - pairs.targets) ** 2, -1), 1)

        def one(start, learned, anchored):
            meta = meta_learn(config, kind, family, learned, anchored, start, train)
            predict = functools.partial(predictions, config, kind, anchored, meta)
            found = {"rate": jnp.exp(meta["rate"]), "retain": jax.nn.sigmoid(meta["retain"])}
            return found | {"tuning": error(predict(tuning), tuning).mean(), "error": error(predict(held_out), held_out)}

        drawn = jax.tree.map(lambda *each: jnp.stack(each), *(draw_start(config, kind, s, begins) for s, _ in starts))
        learned = jnp.array([float(learned) for _, learned in starts])
        each = jax.vmap(jax.vmap(one, (None, None, 0)), (0, 0, None))(drawn, learned, jnp.array([0.0, 1.0]))
        return each, error(bayes(config, family, held_out), held_out)

    return jax.vmap(one_seed, out_axes=(2, 0))(families, seeds)


def measure(config: InitialMemory) -> dict:
    rows = []
    for kind in config.memories:
        for name in config.families:
            seeds = jnp.array(config.seeds)
            families = jax.vmap(lambda seed, name=name: draw_family(config, name, keys_of(seed)[0]))(seeds)
            found, best = jax.device_get(measure_seeds(config, kind, families, seeds))
            for i, (start, _) in enumerate(STARTS[kind]):
                anchored = int(found["tuning"][i].mean(-1).argmin())
                row = {"memory": kind, "family": name, "start": start, "decays_to": ("zero", "start")[anchored]}
                row |= {part: found[part][i, anchored].tolist() for part in ("rate", "retain", "error")}
                row["tuning"] = {to: found["tuning"][i, j].tolist() for j, to in enumerate(("zero", "start"))}
                rows.append(row)
            if kind == config.memories[0]:
                rows.append({"memory": "", "family": name, "start": "Bayes", "error": best.tolist()})
            print(time.strftime("%H:%M:%S"), kind, name, flush=True)
    return {"rows": rows}


def pick(results: dict, memory: str, family: str, start: str) -> dict:
    return next(r for r in results["rows"] if (r["memory"], r["family"], r["start"]) == (memory, family, start))


def columns(config: dict) -> list[int]:
    """Numbers of read pairs that the table shows."""
    return [n for n in (0, 1, 2, 4, 8, 16, 32) if n < config["pairs"]]


def table(results: dict) -> str:
    config, cells = results["config"], []
    heads = ["family", "memory", "start", *(f"{n} read" for n in columns(config)), "mean"]
    heads += ["less than zero or zero output, same seed", "eta", "alpha, to"]
    for family in config["families"]:
        for row in (r for r in results["rows"] if r["family"] == family):
            error, more = np.array(row["error"], float), ["", "", ""]
            if row["memory"]:
                against = BASELINES[row["memory"]]
                other = np.array(pick(results, row["memory"], family, against)["error"], float)
                less = "" if row["start"] == against else spread((other - error).mean(1), sign="+")
                more = [less, spread(row["rate"]), f"{np.mean(row['retain']):.3f}, {row['decays_to']}"]
            means = [*(spread(error[:, n]) for n in columns(config)), spread(error.mean(1))]
            cells.append([family, row["memory"], row["start"], *means, *more])
    note = (
        f"Squared error of the noiseless y, whose mean square is 1; {len(config['seeds'])} seeds, {config['held_out']} "
        "held-out tasks each; ± is the standard deviation over seeds. Bayes: optimal prediction given the family."
    )
    return "\n".join([*markdown(heads, cells, words=3), "", note]) + "\n"


def figure(results: dict) -> Figure:
    """Error by number of read pairs."""
    config = results["config"]
    memories, families = config["memories"], config["families"]
    size = (4.0 * len(families) + 1.8, 3.4 * len(memories))
    fig, axes = plt.subplots(len(memories), len(families), figsize=size, sharex=True, sharey=True, squeeze=False)
    colours = {"zero": "C0", "half zero": "C4", "zero output": "C2", "random": "C1", "learned": "C3"}
    reads = np.arange(config["pairs"])
    for line, kind in zip(axes, memories, strict=True):
        for ax, family in zip(line, families, strict=True):
            for start, _ in STARTS[kind]:
                error = pick(results, kind, family, start)["error"]
                band(ax, reads, error, color=colours[start], label=f"{start} start")
            best = np.mean(pick(results, "", family, "Bayes")["error"], 0)
            ax.plot(reads, best, color="gray", linestyle="--", label="Bayes, family known")
            ax.set(yscale="log", title=f"{kind} memory, {family}")
    for ax in axes[-1]:
        ax.set_xlabel("pairs read")
    for ax in axes[:, 0]:
        ax.set_ylabel("squared error of y (mean |y|² = 1)")
    for ax in axes[:, -1]:
        ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    fig.tight_layout()
    return fig


def main() -> None:
    config = flags.parse(InitialMemory)
    in_one_go(RESULTS / "initial_memory", config, measure, table, figure)


if __name__ == "__main__":
    flags.run(main)
