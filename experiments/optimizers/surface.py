"""Descents on the paper's toy surface: `python experiments/optimizers/surface.py` writes results/surface.*."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import config as settings
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.figure import Figure

from nested_jax import optim

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from record import begin, finish

RESULTS = Path(__file__).parent / "results"
SHOWN = ("gd", "momentum", "delta, erase 0.1", "delta, erase 0.5", "delta by entries, erase 0.1")


def psi(config: settings.Surface, frequency: float, point: jax.Array) -> jax.Array:
    """r^2 + k (r - phi + a sin(omega r))^2 of a point (r, phi)."""
    r, phi = point.reshape(2)
    return r**2 + config.stiffness * (r - phi + config.amplitude * jnp.sin(frequency * r)) ** 2


def rules(config: settings.Surface) -> dict[str, tuple[Callable, tuple[int, ...]]]:
    """Of each name, (learning rate, decay) -> rule, and the shape of a point.

    Delta momentum erases along the gradient if a point is a matrix, (2, 1), and entry by entry if it is a vector, (2,).
    """
    delta = lambda **options: lambda rate, decay: optim.delta_momentum(rate, decay, **options)
    return {
        "gd": (lambda rate, decay: optim.momentum(rate, 0.0), (2,)),
        "momentum": (optim.momentum, (2,)),
        **{f"delta, erase {e:g}": (delta(erase=e), (2, 1)) for e in config.erases},
        **{f"delta by entries, erase {e:g}": (delta(erase=e), (2,)) for e in config.erases},
        **{f"delta, raw, erase {e:g}": (delta(erase=e, normalize=False), (2, 1)) for e in config.raw_erases},
    }


def descend(config: settings.Surface, name: str, frequency, rate, decay, start):
    """Points (steps, 2) and values of psi (steps,) of one descent, the start first."""
    make, shape = rules(config)[name]
    rule, slope = make(rate, decay), jax.value_and_grad(functools.partial(psi, config, frequency))

    def step(carry, _):
        point, state = carry
        value, gradient = slope(point)
        updates, state = rule.update(gradient, state, point)
        return (optax.apply_updates(point, updates), state), (point.reshape(2), value)

    start = start.reshape(shape)
    return jax.lax.scan(step, (start, rule.init(start)), None, length=config.steps)[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def arrival(config: settings.Surface, name: str, frequency, rate, decay, starts):
    """Steps of every start after which psi stays within the tolerance; `config.steps` if it never does."""

    def one(start):
        _, values = descend(config, name, frequency, rate, decay, start)
        outside = ~(values <= config.tolerance)  # also NaN
        return jnp.max(jnp.where(outside, jnp.arange(1, config.steps + 1), 0))

    return jax.vmap(one)(starts)


def measure(config: settings.Surface) -> dict:
    draw = lambda i, n: jax.random.uniform(
        jax.random.fold_in(jax.random.key(config.seed), i), (n, 2), minval=-config.box, maxval=config.box
    )
    tuning, starts = draw(0, config.tuning_starts), draw(1, config.starts)
    rows = []
    for frequency in config.frequencies:
        for name in rules(config):
            decays = (0.0,) if name == "gd" else config.decays
            tried = [(arrival(config, name, frequency, r, d, tuning).mean(), r, d) for r in config.rates for d in decays]
            _, rate, decay = min(tried)
            steps = np.asarray(arrival(config, name, frequency, rate, decay, starts))
            arrived = steps < config.steps
            row = {"frequency": frequency, "optimizer": name, "trials": len(tried), "rate": rate, "decay": decay}
            row |= {"rate_at_edge": rate in (config.rates[0], config.rates[-1]), "arrived": float(arrived.mean())}
            row |= {"mean_steps": float(steps.mean()), "std_steps": float(steps.std(ddof=1)), "steps": steps.tolist()}
            print({key: row[key] for key in row if key != "steps"}, flush=True)
            rows.append(row)
    return {"rows": rows}


def table(results: dict) -> str:
    frequencies = results["config"]["frequencies"]
    lines = ["| optimizer | " + " | ".join(f"steps, omega = {f:g} | rate, decay" for f in frequencies) + " |"]
    lines.append("|---|" + "---:|---|" * len(frequencies))
    for name in dict.fromkeys(row["optimizer"] for row in results["rows"]):
        cells = []
        for row in (row for row in results["rows"] if row["optimizer"] == name):
            short = "" if row["arrived"] == 1 else f" ({1 - row['arrived']:.0%} never)"
            cells.append(f"{row['mean_steps']:.0f} ± {row['std_steps']:.0f}{short} | {row['rate']:g}, {row['decay']:g}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(results: dict, config: settings.Surface) -> Figure:
    """Trajectories from one start, psi along them, and steps to arrival from all starts, on one surface."""
    frequency = config.shown
    rows = {row["optimizer"]: row for row in results["rows"] if row["frequency"] == frequency}
    start = jnp.array([-0.8, 0.8]) * config.box
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name in (name for name in SHOWN if name in rows):
        row = rows[name]
        points, values = descend(config, name, frequency, row["rate"], row["decay"], start)
        left.plot(*points.T, ".-", markersize=3, linewidth=0.8, label=name)
        middle.plot(range(1, config.steps + 1), values, label=name)
        right.ecdf(row["steps"], label=name)
    left.set(xlim=(-1.2 * config.box, 0.6 * config.box), ylim=(-1.5 * config.box, 1.2 * config.box))
    r, phi = np.meshgrid(np.linspace(*left.get_xlim(), 200), np.linspace(*left.get_ylim(), 200))
    height = jax.vmap(functools.partial(psi, config, frequency))(jnp.stack([r.ravel(), phi.ravel()], -1)).reshape(r.shape)
    left.contourf(r, phi, np.log10(np.asarray(height) + 1e-2), 20, cmap="Greys", alpha=0.6, zorder=0)
    left.set(xlabel="r", ylabel="phi", title=f"from one start, omega = {frequency:g}")
    middle.axhline(config.tolerance, color="gray", linestyle=":")
    middle.set(xlabel="step", ylabel="psi", xscale="log", yscale="log", ylim=(config.tolerance / 10, None))
    right.set(xlabel="steps", ylabel="share of starts that have arrived", xscale="log", xlim=(None, 0.99 * config.steps))
    right.set_title(f"omega = {frequency:g}")
    right.legend(fontsize="small")
    return fig


def main() -> None:
    config = flags.parse(settings.Surface)
    results = begin(RESULTS / "surface", config) | measure(config)
    finish(RESULTS / "surface", results, table(results), figure(results, config))


if __name__ == "__main__":
    flags.run(main)
