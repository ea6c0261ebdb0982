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
from sequences import Lane, Training
from sequences import run as train

RESULTS = Path(__file__).parent / "results"


def run(config: settings.Config, cells: list[dict]) -> list[dict]:
    """One network, trained and tested on each cell's task, all of one length."""
    first = cells[0]
    made = network(first["name"], config.vocabulary(first["task"]), config.width, config.layers)
    lanes = [Lane(settings.RECALL[cell["task"]], cell["seed"], cell["rate"]) for cell in cells]
    training = Training(config.steps, config.batch_size, *config.lengths(first["task"]))
    return train(made, lanes, training, config.bins(first["task"]), config.sequences)


def table(results: dict, config: settings.Config) -> str:
    """Markdown: right labels, and every seed on the first task."""
    first = results["config"]["tasks"][0]
    lines = ["Right labels, mean over seeds (least); of a passkey at these multiples of the trained length:"]
    lines += [", ".join(map(str, config.multiples)) + ".", "", *grid.table(results, "labels"), ""]
    return (
        "\n".join([*lines, f"Each seed on {first}:", "", *grid.each_seed(results, first, config.bins(first), "labels")])
        + "\n"
    )


def main() -> None:
    config = flags.parse(settings.Config)
    path = config.path(RESULTS / "recall")
    kind = lambda cell: (cell["name"], config.bins(cell["task"]))
    results = grid.measure(path, config, resume(path, config), partial(run, config), kind)
    ticks = [str(n) for n in config.multiples]
    finish(path, results, table(results, config), grid.figure(results, "labels", ticks, "right labels"))


if __name__ == "__main__":
    flags.run(main)
