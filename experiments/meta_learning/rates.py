"""Learned rates of a CMS's levels: `python experiments/meta_learning/rates.py` writes results/rates.*.

With --variant nested and --clip 1 the results are results/rates_nested_clipped.*.
"""

from __future__ import annotations

import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.figure import Figure

from nested_jax import Level, cms, run
from nested_jax.checks import Count, Interval, NonNegative, Positive
from nested_jax.cms import CMSConfig, Segment
from nested_jax.errors import UserError
from nested_jax.meta import hypergradient
from nested_jax.typing import Array, Float, Int, PyTree

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from flags import Seeds
from record import band, deviations, in_one_go, markdown, spread

RESULTS = Path(__file__).parent / "results"
NEVER = 2**30  # tokens
CONDITIONS = {  # tokens between two draws of each redrawn component; (): the fixed one alone
    "16 and 256": (16, 256),
    "16 and 16": (16, 16),
    "64 and 64": (64, 64),
    "256 and 256": (256, 256),
    "once a stream": (NEVER, NEVER),
    "fixed part alone": (),
}
SHARES = {"all levels, one rate": (1, 1, 1), "slow alone": (1, 0, 0), "middle alone": (0, 1, 0), "fast alone": (0, 0, 1)}
LEVELS = ("slow", "middle", "fast")
OVERFLOW = 2.0  # bits a token from which the weights count as overflowing; chance is 1


@dataclass(frozen=True)
class Rates:
    """Meta-learn the rates of a three-level CMS on streams whose classes are given by a changing map."""

    fresh: bool = False
    """Replace results of other flags."""
    conditions: tuple[str, ...] = tuple(CONDITIONS)
    """How often the components of the map change, by name."""
    variant: Literal["independent", "sequential", "nested"] = "independent"
    """Variant of the CMS. independent: a sum of levels that differ in period only."""
    width: Count = 4
    """Entries of x."""
    classes: Annotated[int, Interval(least=2)] = 2
    """Classes of y."""
    hidden: Count = 16
    """Hidden units of a level."""
    periods: tuple[Count, Count, Count] = (64, 16, 4)
    """Tokens between two updates of the levels, slow to fast."""
    clip: NonNegative = 0.0
    """Largest norm of a level's summed gradient; 0 for none."""
    tokens: Count = 512
    """Tokens of a stream."""
    amounts: tuple[NonNegative, NonNegative, NonNegative] = (1.0, 1.0, 1.0)
    """Standard deviation of the fixed component of the map and of the two that are redrawn."""
    fits: Count = 500
    """Updates in which the slow weights are fitted to single pairs, which teach them the fixed component."""
    starts: tuple[tuple[Positive, Positive, Positive], ...] = ((0.02, 0.02, 0.02), (0.3, 0.05, 0.01), (0.01, 0.05, 0.3))
    """Initial rates, slow to fast."""
    steps: Count = 150
    """Meta-updates."""
    batch_size: Count = 4
    """Streams of a meta-update, new at each."""
    meta_rate: Positive = 0.1
    """Adam's rate for the logarithms of the rates, falling to zero along a cosine."""
    meta_clip: Positive = 0.1
    """Largest norm of a meta-gradient, which is unbounded near rates at which the CMS overflows. If it is not finite, all
    rates are lowered."""
    grid: tuple[Positive, ...] = (
        *(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7),
        *(1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 10.0, 14.0),
    )
    """Rates tried where levels share one rate or one level learns alone; rising."""
    held_out: Count = 48
    """Tuning streams of every seed, on which that rate is chosen, and number of held-out ones."""
    seeds: Seeds = (0, 1, 2, 3, 4)
    """Seeds of the fixed component, the slow weights and the streams."""

    @property
    def cms(self) -> CMSConfig:
        return CMSConfig(hidden=(self.hidden,) * 3, periods=self.periods, variant=self.variant, clip=self.clip)

    def __post_init__(self):
        flags.check(self, "conditions", "starts", "grid", "seeds")
        flags.check_known(self, "conditions", CONDITIONS)
        flags.check_rising(self, "grid")
        if self.tokens % self.periods[0]:
            raise UserError(f"--tokens {self.tokens}: give a multiple of the slowest period, {self.periods[0]}")
        _ = self.cms  # periods are checked there


class World(NamedTuple):
    """The fixed component of a map, the standard deviations of all three, and the periods in tokens of the two redrawn."""

    fixed: Float[Array, "V D"]
    amounts: Float[Array, " 3"]
    scales: Int[Array, " 2"]


def draw_world(config: Rates, condition: str, key: Array) -> World:
    scales = CONDITIONS[condition] or (NEVER, NEVER)
    amounts = jnp.array(config.amounts) * jnp.array([1.0] + 2 * [float(bool(CONDITIONS[condition]))])
    return World(jax.random.normal(key, (config.classes, config.width)), amounts, jnp.array(scales))


def maps(config: Rates, world: World, key: Array) -> Float[Array, "3 T V D"]:
    """The three components of a stream's map at every token; the stream starts at a random place of each period."""
    begins, draws = jax.random.split(key)
    phase = jax.random.randint(begins, (2,), 0, world.scales)
    count = (jnp.arange(config.tokens)[None] + phase[:, None]) // world.scales[:, None]
    drawn = jax.random.normal(draws, (2, config.tokens, *world.fixed.shape))
    redrawn = jax.vmap(lambda part, count: part[count])(drawn, count - count[:, :1])
    fixed = jnp.broadcast_to(world.fixed, (1, config.tokens, *world.fixed.shape))
    return world.amounts[:, None, None, None] * jnp.concatenate([fixed, redrawn])


def stream(config: Rates, world: World, key: Array) -> tuple[Float[Array, "T D"], Int[Array, " T"]]:
    """Normal x, and its class: the largest entry of the map of x."""
    inputs, changes = jax.random.split(key)
    x = jax.random.normal(inputs, (config.tokens, config.width))
    return x, jnp.einsum("tvd,td->tv", maps(config, world, changes).sum(0), x).argmax(-1)


def segments(config: Rates, world: World, streams: int, key: Array) -> Segment:
    """A batch of streams, as the context of the CMS: S segments of P tokens."""
    count, P = config.tokens // config.periods[-1], config.periods[-1]
    drawn = jax.vmap(lambda key: stream(config, world, key))(jax.random.split(key, streams))
    x, y = (jnp.moveaxis(a.reshape(streams, count, P, *a.shape[2:]), 1, 0) for a in drawn)
    return Segment(x, y, jnp.ones(count, bool), P * jnp.arange(count), None)


def fit_start(config: Rates, world: World, key: Array) -> dict[str, PyTree]:
    """Slow weights {cms, head}, fitted by Adam to single pairs, each of its own map."""
    first, last, draws = jax.random.split(key, 3)
    weights = {"cms": cms.init_weights(first, config.cms, config.width)}
    weights["head"] = config.width**-0.5 * jax.random.normal(last, (config.width, config.classes))
    rule = optax.adam(optax.cosine_decay_schedule(0.02, config.fits))

    def step(carry, key):
        weights, state = carry
        inputs, redrawn = jax.random.split(key)
        x = jax.random.normal(inputs, (256, config.width))
        parts = jax.random.normal(redrawn, (2, 256, *world.fixed.shape))
        whole = world.amounts[0] * world.fixed[None] + jnp.einsum("p,ptvd->tvd", world.amounts[1:], parts)
        y = jnp.einsum("tvd,td->tv", whole, x).argmax(-1)

        def loss(weights):
            logits = cms.apply(config.cms, weights["cms"], (), x[None])[0] @ weights["head"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = rule.update(jax.grad(loss)(weights), state)
        return (optax.apply_updates(weights, updates), state), None

    return jax.lax.scan(step, (weights, rule.init(weights)), jax.random.split(draws, config.fits))[0][0]


def learner(config: Rates, weights: PyTree, streams: int) -> Level:
    """The CMS of one block between x and a head, as a level whose slower level holds the rates, slow to fast."""

    def level(rates) -> Level:
        block = jax.tree.map(lambda w: w[None], weights["cms"])
        for i in range(3):
            block[f"level{i + 1}"] |= {"rate": rates[i][None]}

        def forward(matrices, mixers, position, x, reset):
            fast = [jax.tree.map(lambda w: w[0], level) for level in matrices]
            return cms.apply(config.cms, weights["cms"], fast, x) @ weights["head"], mixers

        return cms.nest_levels(config.cms, block, forward, lambda: (), streams, [cms.inner_rule(config.cms)] * 3)

    init = lambda slower: level(slower[0]).init(())
    step = lambda state, context, slower: level(slower[0]).step(state, context, ())
    return Level(init, step, config.periods[0] // config.periods[-1], "CMS")


def predictions(config: Rates, weights: PyTree, rates: Float[Array, " 3"], context: Segment) -> Float[Array, "S B P V"]:
    """Logits of every token's class, after learning from all earlier segments."""
    _, emitted = run(learner(config, weights, context.targets.shape[1]), None, context, slower=(rates,))
    return emitted.outputs.reshape(*context.targets.shape, config.classes)


def entropy(config: Rates, emitted: cms.Emitted, targets: Int[Array, "S B P"]) -> Array:
    """Mean cross-entropy of a stream's classes, in nats."""
    logits = emitted.outputs.reshape(*targets.shape, config.classes)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def slope(config: Rates, weights: PyTree, streams: int):
    """(logarithms of the rates, context) -> `Hypergradient` through all updates within the streams."""
    inner = learner(config, weights, streams)
    level = Level(
        lambda slower: inner.init((jnp.exp(slower[0]),)),
        lambda state, context, slower: inner.step(state, context, (jnp.exp(slower[0]),)),
        inner.period,
    )
    outer = lambda meta, state, emitted, targets: entropy(config, emitted, targets)
    gradient = hypergradient(outer, level)
    return lambda meta, context: gradient(meta, context, context.targets)


def keys_of(seed: Array) -> Array:
    """Keys of a seed: of the fixed component, the slow weights, and the training, tuning and held-out streams."""
    return jax.random.split(jax.random.fold_in(jax.random.key(2), seed), 5)


@functools.partial(jax.jit, static_argnums=0)
def prepare(config: Rates, worlds: World, seeds: Array) -> tuple[PyTree, Segment, Segment, Segment]:
    """Slow weights, and streams of each meta-update, for tuning and held-out, for every seed."""

    def one(world, seed):
        _, start, learn, tune, count = keys_of(seed)
        meta = jax.vmap(lambda key: segments(config, world, config.batch_size, key))(jax.random.split(learn, config.steps))
        tuning, held_out = (segments(config, world, config.held_out, key) for key in (tune, count))
        return fit_start(config, world, start), meta, tuning, held_out

    return jax.vmap(one)(worlds, seeds)


@functools.partial(jax.jit, static_argnums=0)
def meta_learn(config: Rates, weights: PyTree, streams: Segment) -> Float[Array, "seeds starts steps 3"]:
    """The rates after each meta-update, from every start."""

    def one(start, weights, streams):
        # b2 is below its default, so that large gradients near overflow are soon forgotten.
        adam = optax.adam(optax.cosine_decay_schedule(config.meta_rate, config.steps), b2=0.95)
        adam = optax.chain(optax.clip_by_global_norm(config.meta_clip), adam)
        hyper = slope(config, weights, config.batch_size)

        def step(carry, context):
            meta, state = carry
            gradient = hyper(meta, context).gradient
            gradient = jnp.where(jnp.isfinite(gradient).all(), gradient, 1.0)
            updates, state = adam.update(gradient, state)
            meta = optax.apply_updates(meta, updates)
            return (meta, state), jnp.exp(meta)

        return jax.lax.scan(step, (jnp.log(start), adam.init(start)), streams)[1]

    return jax.vmap(jax.vmap(one, (0, None, None)), (None, 0, 0))(jnp.array(config.starts), weights, streams)


@functools.partial(jax.jit, static_argnums=0)
def evaluate(config: Rates, weights: PyTree, rates: Float[Array, "seeds 3"], streams: Segment) -> dict[str, Array]:
    """Bits a token and error rate of every seed."""

    def one(weights, rates, streams):
        guess = predictions(config, weights, rates, streams)
        bits = optax.softmax_cross_entropy_with_integer_labels(guess, streams.targets).mean() / jnp.log(2)
        return {"bits": bits, "wrong": (guess.argmax(-1) != streams.targets).mean()}

    return jax.vmap(one)(weights, rates, streams)


def best(config: Rates, bits: np.ndarray) -> np.ndarray:
    """The rate of every seed with the least bits (grid, seeds); bits that are not finite count as infinite."""
    return np.array(config.grid)[np.where(np.isfinite(bits), bits, np.inf).argmin(0)]


def measure(config: Rates) -> dict:
    rows, seeds, prepared, learned = [], jnp.array(config.seeds), {}, {}
    for condition in config.conditions:
        worlds = jax.vmap(lambda seed, condition=condition: draw_world(config, condition, keys_of(seed)[0]))(seeds)
        weights, meta, tuning, held_out = prepare(config, worlds, seeds)
        path = np.asarray(meta_learn(config, weights, meta))
        prepared[condition], learned[condition] = (weights, held_out), path[:, :, -1]
        row = {"condition": condition, "rates": path[:, :, -1].tolist()}
        if not rows:
            row["path"] = path.tolist()  # for the figure

        shared = lambda share, rates: np.outer(rates, share).astype(np.float32)
        bits = lambda rates: np.asarray(evaluate(config, weights, rates, tuning)["bits"])  # noqa: B023
        grid = [np.full(len(seeds), rate) for rate in config.grid]
        tried = {which: np.stack([bits(shared(share, rates)) for rates in grid]) for which, share in SHARES.items()}
        chosen = {which: best(config, each) for which, each in tried.items()}
        row["tried"], row["chosen"] = ({which: x.tolist() for which, x in each.items()} for each in (tried, chosen))
        counted = {"frozen": shared((1, 1, 1), 0 * grid[0])}
        counted |= {which: shared(share, chosen[which]) for which, share in SHARES.items()}
        error = {which: evaluate(config, weights, rates, held_out) for which, rates in counted.items()}
        own = [evaluate(config, weights, path[:, i, -1], held_out) for i in range(len(config.starts))]
        for what in ("bits", "wrong"):
            row[what] = {which: values[what].tolist() for which, values in error.items()}
            row[what]["learned"] = np.stack([values[what] for values in own], 1).tolist()  # seeds, starts
        rows.append(row)
        print(time.strftime("%H:%M:%S"), condition, np.median(row["rates"], (0, 1)).round(4), flush=True)
    # Rates learned in one condition (geometric mean over starts), on streams of another.
    transfer = {}
    for to, (weights, held_out) in prepared.items():
        bits = lambda rates: evaluate(config, weights, np.exp(np.log(rates).mean(1)), held_out)["bits"]  # noqa: B023
        transfer[to] = {condition: bits(rates).tolist() for condition, rates in learned.items()}
    return {"rows": rows, "transfer": transfer}


def overflows(bits) -> np.ndarray:
    """Whether a seed's bits overflow, from any of its starts."""
    over = ~(np.array(bits, float) < OVERFLOW)
    return over.reshape(len(over), -1).any(1)


def table(results: dict) -> str:
    config = results["config"]

    def cell(values, over, sign=""):
        return f"{over.sum()} of {len(over)} overflow" if over.any() else spread(values, sign=sign)

    def geometric(rates):
        logs = np.log(rates)
        return f"{np.exp(logs.mean()):.3g}" + (f" ×/÷ {np.exp(deviations(logs)):.2f}" if len(logs) > 1 else "")

    def tuned(rates):
        edge = np.isin(rates, (config["grid"][0], config["grid"][-1])).sum()
        return geometric(rates) + (f" ({edge} at the edge)" if edge else "")

    heads = ["condition", *(f"{name} rate, period {p}" for name, p in zip(LEVELS, config["periods"], strict=True))]
    heads += ["sum", "apart by start of rates", "best one rate", *list(SHARES)[1:]]
    cells = []
    for row in results["rows"]:
        rates = np.array(row["rates"], float)  # seeds, starts, levels
        over = np.exp(np.log(rates).mean(1))
        apart = ", ".join(f"×{a:.2f}" for a in np.exp(np.ptp(np.log(rates), axis=1)).mean(0))
        own = [*(geometric(over[:, i]) for i in range(3)), geometric(over.sum(1)), apart]
        cells.append([row["condition"], *own, *(tuned(row["chosen"][name]) for name in SHARES)])
    lines = markdown(heads, cells)
    names = ("frozen", *SHARES)
    for what, unit in (("bits", "held-out bits a token"), ("wrong", "error rate, held-out")):
        heads, cells = [unit, "learned rates", *names, "less than one rate, same seed", "less than fast alone"], []
        for row in results["rows"]:
            own, over = np.array(row[what]["learned"], float).mean(1), overflows(row["bits"]["learned"])
            line = [row["condition"], cell(own, over)]
            line += [cell(row[what][name], overflows(row["bits"][name])) for name in names]
            for other in ("all levels, one rate", "fast alone"):
                either = over | overflows(row["bits"][other])
                line.append(cell(np.array(row[what][other], float) - own, either, "+"))
            cells.append(line)
        lines += ["", *markdown(heads, cells)]
    transfer, cells = results["transfer"], []
    for to, of in transfer.items():
        more = lambda name, to=to, of=of: np.subtract(*(np.array(of[one], float) for one in (name, to)))
        either = lambda name, to=to, of=of: overflows(of[name]) | overflows(of[to])
        cells.append([to, *("" if name == to else cell(more(name), either(name), "+") for name in transfer)])
    lines += ["", *markdown(["bits more than with its own rates, same seed", *(f"rates of {n}" for n in transfer)], cells)]
    note = (
        f"`{results['command']}`. {len(config['seeds'])} seeds, {len(config['starts'])} starts of the rates, "
        f"{config['held_out']} held-out streams of {config['tokens']} tokens each; ± (×/÷ of rates) is the standard "
        "deviation over seeds, of each seed's mean over starts. One rate, and that of a level alone, is each seed's best "
        "on as many tuning streams; at the edge: number of seeds whose rate is the smallest or largest tried. Apart: "
        "largest over smallest rate among the starts, by level, mean over seeds. Overflow: number of seeds with more than "
        f"{OVERFLOW:g} bits a token from any start."
    )
    return "\n".join(lines) + "\n\n" + note + "\n"


def figure(results: dict) -> Figure:
    """Rates by meta-update in the first condition; learned rates and their gain in all conditions."""
    config, rows = results["config"], results["rows"]
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.4))
    traced = np.array(rows[0]["path"], float)  # seeds, starts, steps, levels
    for i, (name, period) in enumerate(zip(LEVELS, config["periods"], strict=True)):
        for j, begins in enumerate(config["starts"]):
            curves = np.insert(traced[:, j, :, i], 0, begins[i], axis=1)
            label = f"{name} level, period {period} tokens" if j == 0 else None
            band(left, range(curves.shape[1]), curves, geometric=True, color=f"C{i}", linewidth=1.2, label=label)
        for x, row in zip(np.arange(len(rows)) + 0.22 * (i - 1), rows, strict=True):
            logs = np.log(np.array(row["rates"], float)[..., i]).mean(1)
            low, mean, high = np.exp(logs.mean() + deviations(logs) * np.array([-1, 0, 1]))
            middle.errorbar(x, mean, [[mean - low], [high - mean]], fmt="o", color=f"C{i}", capsize=3)
    left.set(yscale="log", xlabel="meta-updates", ylabel="rate (weight per gradient)", title=rows[0]["condition"])
    left.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16))
    middle.set(yscale="log", ylabel="learned rate (weight per gradient)", title="learned, by tokens between changes")
    shown = {"learned": "learned rates", "all levels, one rate": "one rate, tuned", "fast alone": "fast alone, tuned"}
    for k, (name, label) in enumerate(shown.items()):
        gains = []
        for row in rows:
            bits = np.array(row["bits"][name], float).reshape(len(config["seeds"]), -1).mean(1)
            gains.append(np.where(overflows(row["bits"][name]).any(), np.nan, np.array(row["bits"]["frozen"], float) - bits))
        gains = np.stack(gains, 1)  # seeds, conditions
        at = np.arange(len(rows)) + 0.27 * (k - 1)
        right.bar(at, gains.mean(0), 0.25, yerr=deviations(gains), capsize=3, label=label)
        for x in at[np.isnan(gains).any(0)]:
            right.text(x, 0.01, "overflows", rotation=90, ha="center", va="bottom", fontsize="x-small")
    right.axhline(0, color="black", linewidth=0.8)
    right.set(ylabel="held-out bits a token less than frozen", title="gain of learning in context")
    right.legend(fontsize="small")
    for ax in (middle, right):
        ax.set_xticks(range(len(rows)), [row["condition"] for row in rows], rotation=25, ha="right")
    fig.tight_layout()
    return fig


def main() -> None:
    config = flags.parse(Rates)
    name = "rates" + f"_{config.variant}" * (config.variant != Rates.variant) + "_clipped" * (config.clip > 0)
    in_one_go(RESULTS / name, config, measure, table, figure)


if __name__ == "__main__":
    flags.run(main)
