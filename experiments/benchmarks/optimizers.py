"""Cost of an optimizer's update: `python experiments/benchmarks/optimizers.py` writes results/optimizers.*."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import config as settings
import jax
import matplotlib.pyplot as plt
import optax
from matplotlib.figure import Figure

from nested_jax import optim

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from record import finish, start
from timing import alternate

RESULTS = Path(__file__).parent / "results"
BASE = "optax.contrib.muon"


def rules(config: settings.OptimizersConfig) -> dict[str, optax.GradientTransformation]:
    m3 = {"slow_period": config.slow_period, "steps": config.steps}
    return {
        BASE: optax.contrib.muon(0.1, ns_steps=config.steps),
        "nonlinear_momentum": optim.nonlinear_momentum(0.1, lambda m: optim.newton_schulz(m, config.steps)),
        "m3": optim.m3(0.1, **m3),
        "m3, no second moment": optim.m3(0.1, **m3, second_moment=False),
        "optax.adamw": optax.adamw(0.1),
        "momentum": optim.momentum(0.1),
        "delta_momentum": optim.delta_momentum(0.1),
        "deep_momentum": optim.deep_momentum(0.1),
        "continuum (AdamW)": optim.continuum(0.1, config.slow_period),
    }


def cycle(rule: optax.GradientTransformation, config: settings.OptimizersConfig):
    """A call that makes the updates of one slow period, and the state's bytes a parameter."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (config.width, config.width))}
    gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), params)
    update = jax.jit(rule.update)
    initial = rule.init(params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(initial)) / params["kernel"].size

    def call():
        state = initial
        for _ in range(config.slow_period):
            updates, state = update(gradients, state, params)
        return updates, state

    return call, size


def measure(config: settings.OptimizersConfig) -> dict:
    calls = {name: cycle(rule, config) for name, rule in rules(config).items()}
    turns = alternate({name: call for name, (call, _) in calls.items()}, config.rounds)
    times = {name: [s / config.slow_period for s in own] for name, own in turns.items()}
    base = statistics.median(times[BASE])
    return {
        "optax": optax.__version__,
        "rows": [
            {
                "optimizer": name,
                "seconds": times[name],
                "median_seconds": statistics.median(times[name]),
                "ratio_to_muon": statistics.median(times[name]) / base,
                "state_bytes_per_parameter": calls[name][1],
            }
            for name in calls
        ],
    }


def table(results: dict) -> str:
    lines = ["| optimizer | ms an update | times Muon | state, bytes a parameter |", "|---|---:|---:|---:|"]
    for row in results["rows"]:
        milliseconds, ratio = 1e3 * row["median_seconds"], row["ratio_to_muon"]
        lines.append(f"| `{row['optimizer']}` | {milliseconds:.1f} | {ratio:.3f} | {row['state_bytes_per_parameter']:.2f} |")
    return "\n".join(lines) + "\n"


def figure(results: dict) -> Figure:
    rows = results["rows"][::-1]
    base = next(row["median_seconds"] for row in rows if row["optimizer"] == BASE)
    fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    ax.boxplot([[s / base for s in row["seconds"]] for row in rows], orientation="horizontal", widths=0.6)
    ax.set_yticks(range(1, len(rows) + 1), [row["optimizer"] for row in rows])
    ax.axvline(1.25, color="tab:red", linestyle=":", label="aim for m3: 1.25")
    ax.set(xlabel="time of an update, Muon's median = 1", xlim=(0, None))
    ax.legend()
    return fig


def main() -> None:
    config = flags.parse(settings.OptimizersConfig)
    results = start(RESULTS / "optimizers", config) | measure(config)
    finish(RESULTS / "optimizers", results, table(results), figure(results))


if __name__ == "__main__":
    flags.run(main)
