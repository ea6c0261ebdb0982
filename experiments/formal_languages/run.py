"""Formal languages: `python experiments/formal_languages/run.py` writes results/formal_languages.*."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import config as settings
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from networks import network
from record import each_once, finish, markdown, resume
from sequences import Training
from sequences import run as train

from nested_jax.data.tasks import TASKS

RESULTS = Path(__file__).parent / "results"


def run(config: settings.Config, network_name: str, task: str, rate: float, seed: int) -> dict:
    """One network, trained on a task and tested in three bins of lengths."""
    one = TASKS[task]
    made = network(network_name, max(one.tokens, one.labels), config.width, config.layers)
    training = Training(config.steps, config.batch_size, config.shortest, config.longest, rate)
    return train(made, one, training, config.bins, config.sequences, seed)


def measure(config: settings.Config, results: dict) -> dict:
    """All runs: each network at the rate that is best on the first task."""
    make = lambda choices: each_once(RESULTS / "formal_languages", results, partial(run, config), choices, config.jobs)
    first, *_ = config.tasks
    tries = [
        {"network_name": name, "task": first, "rate": rate, "seed": config.tuning_seed}
        for name in config.networks
        for rate in config.rates
    ]
    make(tries)
    best = {name: chosen(results, name) for name in config.networks}
    make(
        {"network_name": name, "task": task, "rate": best[name], "seed": seed}
        for task in config.tasks
        for name in config.networks
        for seed in config.seeds
    )
    return results


def chosen(results: dict, name: str) -> float:
    """The rate with the most right words, then labels, on the tuning seed."""
    config = results["config"]
    tries = [row for row in results["runs"] if row["network_name"] == name and row["seed"] == config["tuning_seed"]]
    return max(tries, key=lambda row: (sum(row["right"]), sum(row["labels"]), -row["rate"]))["rate"]


def rows_of(results: dict, name: str, task: str) -> list[dict]:
    """The runs of a network on a task, on the test seeds."""
    config = results["config"]
    one = {"network_name": name, "task": task, "rate": chosen(results, name)}
    return [row for row in results["runs"] if one.items() <= row.items() and row["seed"] in config["seeds"]]


def table(results: dict) -> str:
    """Markdown: wholly right words in three bins, each seed's in the JSON; then every seed on the first task."""
    config = results["config"]
    bins = settings.Config(shortest=config["shortest"], longest=config["longest"]).bins
    lengths = " / ".join(f"{a}-{b}" for a, b in bins)
    tasks = [task for task in config["tasks"] if any(rows_of(results, name, task) for name in config["networks"])]
    cells = []
    for name in config["networks"]:
        found = [rows_of(results, name, task) for task in tasks]
        cells.append([name, f"{chosen(results, name):g}", *(in_bins([row["right"] for row in rows]) for rows in found)])
    lines = [f"Wholly right words of lengths {lengths}, mean over seeds (least):", ""]
    lines += [*markdown(("network", "rate", *tasks), cells), ""]
    lines += [f"Each seed on {config['tasks'][0]}:", ""]
    rows = [
        [name, str(row["seed"]), *(f"{x:.3f}" for x in row["right"]), f"{row['loss'][-1] or np.nan:.2g}"]
        + [
            f"{row['norm'][0] or np.nan:.2g}, {row['norm'][1] or np.nan:.3g}",
            f"{row['parameters']:,}",
            f"{row['seconds']:.0f}",
        ]
        for name in config["networks"]
        for row in rows_of(results, name, config["tasks"][0])
    ]
    heads = ("network", "seed", *(f"{a}-{b}" for a, b in bins), "loss", "gradient norm: median, largest", "parameters", "s")
    return "\n".join([*lines, *markdown(heads, rows)]) + "\n"


def in_bins(right: list[list[float]]) -> str:
    """Mean and least of each bin; empty without runs."""
    if not right:
        return ""
    mean, least = np.mean(right, 0), np.min(right, 0)
    return " / ".join(f"{m:.2f}" + (f" ({low:.2f})" if m - low >= 0.005 else "") for m, low in zip(mean, least, strict=True))


def figure(results: dict) -> Figure:
    """Wholly right words by bin of lengths, a panel for each task."""
    config = results["config"]
    tasks = [task for task in config["tasks"] if any(rows_of(results, name, task) for name in config["networks"])]
    columns = min(4, len(tasks))
    fig, axes = plt.subplots(
        -(-len(tasks) // columns), columns, figsize=(3.1 * columns + 2, 2.6 * -(-len(tasks) // columns)),
        sharex=True, sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for task, ax in zip(tasks, axes.flat, strict=False):
        for i, name in enumerate(config["networks"]):
            if rows := rows_of(results, name, task):
                right = np.array([row["right"] for row in rows])
                line = "o-" if name.startswith("hope exact") else ".--"
                ax.plot(range(right.shape[1]), right.mean(0), line, color=plt.cm.tab20(i), label=name)
        ax.set(title=task, xticks=range(3), xticklabels=["trained", "to 2 times", "to 3 times"], ylim=(-0.05, 1.05))
    for ax in axes.flat[len(tasks) :]:
        ax.set_axis_off()
    fig.supylabel("wholly right words")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside right upper", frameon=False)
    return fig


def main() -> None:
    config = flags.parse(settings.Config)
    path = RESULTS / "formal_languages"
    results = resume(path, config)
    results["config"] = results["config"] | {"networks": list(config.networks), "tasks": list(config.tasks)}
    finish(path, measure(config, results), table(results), figure(results))


if __name__ == "__main__":
    flags.run(main)
