"""Formal languages: `python experiments/formal_languages/run.py` writes results/formal_languages*."""

from __future__ import annotations

import sys
from functools import partial
from operator import itemgetter
from pathlib import Path

import config as settings
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
import grid
from networks import network
from record import finish, resume
from sequences import Lane, Training
from sequences import run as train

from nested_jax.data.tasks import TASKS

RESULTS = Path(__file__).parent / "results"
TICKS = ("trained", "to 2 times", "to 3 times")


def run(config: settings.Config, cells: list[dict]) -> list[dict]:
    """One network, trained on each cell's task and tested in three bins of lengths."""
    made = network(cells[0]["name"], settings.VOCABULARY, config.width, config.layers)
    lanes = [Lane(TASKS[cell["task"]], cell["seed"], cell["rate"]) for cell in cells]
    training = Training(config.steps, config.batch_size, config.shortest, config.longest)
    return train(made, lanes, training, config.bins, config.sequences)


def table(results: dict, bins: tuple[tuple[int, int], ...]) -> str:
    """Markdown: wholly right words in three bins; then every seed on the first task."""
    lengths = " / ".join(f"{shortest}-{longest}" for shortest, longest in bins)
    first = results["config"]["tasks"][0]
    lines = [f"Wholly right words of lengths {lengths}, mean over seeds (least):", "", *grid.table(results, "right"), ""]
    return "\n".join([*lines, f"Each seed on {first}:", "", *grid.each_seed(results, first, bins, "right")]) + "\n"


def bars(results: dict, bins: tuple[tuple[int, int], ...]) -> Figure:
    """Wholly right words of the first task by network: means as bars, a point for each seed."""
    config = results["config"]
    names = [name for name in config["networks"] if grid.on_test_seeds(results, name, config["tasks"][0])]
    fig, ax = plt.subplots(figsize=(8, 0.45 * len(names) + 1.1), layout="constrained")
    for i, (shortest, longest) in enumerate(bins):
        right = [[row["right"][i] for row in grid.on_test_seeds(results, name, config["tasks"][0])] for name in names]
        at, color = np.arange(len(names)) + 0.27 * (i - 1), plt.cm.Blues(0.9 - 0.25 * i)
        label = f"words of {shortest} to {longest}" + " (as in training)" * (i == 0)
        ax.barh(at, [np.mean(seeds) for seeds in right], 0.25, color=color, label=label)
        for y, seeds in zip(at, right, strict=True):
            ax.plot(seeds, np.full(len(seeds), y), ".", color="black", markersize=3)
    ax.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1.02))
    ax.set_xlabel(f"{config['tasks'][0]}: fraction of words with every label right")
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    return fig


def main() -> None:
    config = flags.parse(settings.Config)
    path = config.path(RESULTS / "formal_languages")
    results = grid.measure(path, config, resume(path, config), partial(run, config), itemgetter("name"))
    bars(results, config.bins).savefig(f"{path}_bars.png", dpi=130)
    finish(path, results, table(results, config.bins), grid.figure(results, "right", TICKS, "wholly right words"))


if __name__ == "__main__":
    flags.run(main)
