"""Recall: `python experiments/recall/run.py` writes results/recall.*."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import config as settings

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
import grid
from networks import network
from record import finish, resume
from sequences import Training
from sequences import run as train

RESULTS = Path(__file__).parent / "results"


def run(config: settings.Config, name: str, task: str, rate: float, seed: int) -> dict:
    """One network, trained and tested on a task."""
    one = settings.RECALL[task]
    made = network(name, max(one.tokens, one.labels), config.width, config.layers)
    training = Training(config.steps, config.batch_size, *config.lengths(task), rate)
    return train(made, one, training, config.bins(task), config.sequences, seed)


def table(results: dict, config: settings.Config) -> str:
    """Markdown: right labels, and every seed on the first task."""
    first = config.tasks[0]
    lines = ["Right labels, mean over seeds (least); of a passkey at these multiples of the trained length:"]
    lines += [", ".join(map(str, config.multiples)) + ".", "", *grid.table(results, "labels"), ""]
    return (
        "\n".join([*lines, f"Each seed on {first}:", "", *grid.each_seed(results, first, config.bins(first), "labels")])
        + "\n"
    )


def main() -> None:
    config = flags.parse(settings.Config)
    path = RESULTS / "recall"
    results = grid.measure(path, config, resume(path, config), partial(run, config))
    ticks = [str(n) for n in config.multiples]
    finish(path, results, table(results, config), grid.figure(results, "labels", ticks, "right labels"))


if __name__ == "__main__":
    flags.run(main)
