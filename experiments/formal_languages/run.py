"""Formal languages: `python experiments/formal_languages/run.py` writes results/formal_languages.*."""

from __future__ import annotations

import sys
from functools import partial
from operator import itemgetter
from pathlib import Path

import config as settings

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


def main() -> None:
    config = flags.parse(settings.Config)
    path = RESULTS / "formal_languages"
    results = grid.measure(path, config, resume(path, config), partial(run, config), itemgetter("name"))
    finish(path, results, table(results, config.bins), grid.figure(results, "right", TICKS, "wholly right words"))


if __name__ == "__main__":
    flags.run(main)
