"""Networks by tasks by seeds: the rate of each network is chosen on the first task, on a seed of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from flags import Rates, Seed, Seeds, check_tuning
from matplotlib.figure import Figure
from record import Runs, each_once, markdown, rows_of

from nested_jax.checks import Count
from nested_jax.errors import UserError


@dataclass(frozen=True)
class Grid(Runs):
    """Fields of every grid."""

    seeds: Seeds = (0, 1, 2)
    """Seeds of the parameters and of the training sequences."""
    rates: Rates = (0.003, 0.01)
    """Learning rates that every network tries on the first task, with the tuning seed."""
    tuning_seed: Seed = 100
    """Seed of the tries' parameters and training sequences; test sequences are those of all runs."""
    steps: Count = 800
    """Updates."""
    batch_size: Count = 16
    """Sequences of an update."""
    width: Count = 32
    """Width of the models."""
    layers: Count = 2
    """Blocks."""
    sequences: Count = 256
    """Test sequences in each bin."""

    def __post_init__(self):
        check_tuning(self)


def measure(path: Path, config: Any, results: dict, run: Callable[..., list[dict]], kind: Callable[[dict], Any]) -> dict:
    """All runs: the tries of every rate, if there are several, then each task with the best one.

    Args:
        path: of the results.
        config: a `Grid` with networks and tasks.
        results: so far.
        run, kind: as of `each_once`, of choices name, task, rate and seed.

    Returns:
        The results.
    """
    if config.report:
        if not networks_of(results):
            raise UserError("--report: there are no runs on test seeds yet, only tries of rates: make some")
        return results
    first, rates = results["config"]["tasks"][0], results["config"]["rates"]
    make = lambda choices: each_once(path, results, run, choices, kind, config)
    if len(rates) > 1:
        make(
            {"name": name, "task": first, "rate": rate, "seed": config.tuning_seed}
            for name in config.networks
            for rate in rates
        )
    best = {name: chosen(results, name) for name in config.networks}
    make(
        {"name": name, "task": task, "rate": best[name], "seed": seed}
        for name in config.networks
        for seed in config.seeds
        for task in config.tasks
    )
    return results


def tries(results: dict, name: str) -> list[dict]:
    """A network's runs on the first task, on the tuning seed."""
    config = results["config"]
    return rows_of(results, name=name, task=config["tasks"][0], seed=config["tuning_seed"])


def chosen(results: dict, name: str) -> float:
    """The rate with the most right sequences, then labels, then the least loss, on the tuning seed; the only one untried."""
    rates = results["config"]["rates"]
    if len(rates) == 1:
        return rates[0]
    loss = lambda row: np.inf if row["loss"][-1] is None else row["loss"][-1]  # None: it was no number
    return max(tries(results, name), key=lambda row: (sum(row["right"]), sum(row["labels"]), -loss(row)))["rate"]


def on_test_seeds(results: dict, name: str, task: str) -> list[dict]:
    """The runs of a network on a task, on the test seeds."""
    rows = [row for row in rows_of(results, name=name, task=task) if row["seed"] in results["config"]["seeds"]]
    tried = len(results["config"]["rates"]) == 1 or tries(results, name)
    return [row for row in rows if tried and row["rate"] == chosen(results, name)]


def tasks_of(results: dict) -> list[str]:
    """The tasks that have runs."""
    config = results["config"]
    return [task for task in config["tasks"] if any(on_test_seeds(results, name, task) for name in config["networks"])]


def networks_of(results: dict) -> list[str]:
    """The networks that have runs."""
    config = results["config"]
    return [name for name in config["networks"] if any(on_test_seeds(results, name, task) for task in config["tasks"])]


def table(results: dict, key: str) -> list[str]:
    """Markdown: a row for each network, a column for each task, in a cell the mean (least) of each bin.

    Args:
        results: of `measure`.
        key: "right", wholly right sequences, or "labels".

    Returns:
        Its lines.
    """
    networks, tasks = networks_of(results), tasks_of(results)
    cell = lambda name, task: in_bins([row[key] for row in on_test_seeds(results, name, task)])
    return markdown(
        ("network", "rate", *tasks),
        [[name, f"{chosen(results, name):g}", *(cell(name, task) for task in tasks)] for name in networks],
    )


def each_seed(results: dict, task: str, bins: Sequence[tuple[int, int]], key: str) -> list[str]:
    """Markdown: every run of a task, with its gradient norms, parameters and seconds of its lanes."""
    rows = [
        [name, str(row["seed"]), *(f"{x:.3f}" for x in row[key]), f"{np.array(row['loss'], float)[-1]:.2g}"]
        + ["{:.2g}, {:.3g}".format(*np.array(row["norm"], float))]
        + [f"{row['parameters']:,}", f"{row['seconds']:.0f}"]
        for name in results["config"]["networks"]
        for row in on_test_seeds(results, name, task)
    ]
    lengths = (f"{shortest}-{longest}" for shortest, longest in bins)
    return markdown(("network", "seed", *lengths, "loss", "gradient norm: median, largest", "parameters", "s"), rows)


def in_bins(found: Sequence[Sequence[float]]) -> str:
    """Mean of each bin, and the least where it is lower; empty without runs.

    >>> in_bins([[1.0, 0.5], [1.0, 0.25]])
    '1.00 / 0.38 (0.25)'
    """
    if not len(found):
        return ""
    bins = zip(np.mean(found, 0), np.min(found, 0), strict=True)
    return " / ".join(f"{mean:.2f}" + (f" ({least:.2f})" if mean - least >= 0.005 else "") for mean, least in bins)


def figure(results: dict, key: str, ticks: Sequence[str], label: str) -> Figure:
    """Mean over seeds by bin, a panel for each task; of tasks with one bin bars, with a point for each seed."""
    networks, tasks = networks_of(results), tasks_of(results)
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    size = (2.9 * columns + 2.4, 2.5 * rows)
    fig, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    lines = {}
    for task, ax in zip(tasks, axes.flat, strict=False):
        for i, name in enumerate(networks):
            found, color = [row[key] for row in on_test_seeds(results, name, task)], plt.cm.tab20(i)
            if found and len(found[0]) == 1:
                lines[name] = ax.bar(i, np.mean(found), color=color)
                ax.plot([i] * len(found), found, ".", color="black", markersize=3)
                ax.set_xticks([])
            elif found:
                style = "o-" if name.startswith("hope exact") else ".--"
                (lines[name],) = ax.plot(range(len(found[0])), np.mean(found, 0), style, color=color)
                ax.set_xticks(range(len(ticks)), ticks)
        ax.set(title=task, ylim=(-0.05, 1.05))
    for ax in axes.flat[len(tasks) :]:
        ax.set_axis_off()
    fig.supylabel(label)
    fig.legend(lines.values(), lines.keys(), loc="outside right upper", frameon=False)
    return fig
