"""Choices that differ from the paper's: `python experiments/fidelity/run.py` writes results/fidelity.*."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import config as settings
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from grid import in_bins
from networks import network
from record import each_once, finish, largest, markdown, resume, rows_of, spread, with_diverged
from sequences import PARITY, Lane, Training, adamw
from sequences import run as train_network
from text_run import BITS, held_out

from nested_jax import preset
from nested_jax.data.tasks import TASKS
from nested_jax.train.config import TrainConfig

RESULTS = Path(__file__).parent / "results"


def run(config: settings.Config, cells: list[dict]) -> list[dict]:
    """One row's model and rule on a task, at several rates or from several seeds."""
    row, seeds, rates = settings.ROWS[cells[0]["row"]], *([cell[key] for cell in cells] for key in ("seed", "rate"))
    if cells[0]["task"] == "text":
        model = dataclasses.replace(preset(row.preset), **row.changes)
        return held_out(model, seeds, config.text_steps, rates, row.rule)
    layer = {"max_rate": 2.0} if row.rule else {"mixer": preset(row.preset).mixer, "chunk": config.chunk} | row.changes
    lanes = [Lane(TASKS["parity"], seed, rate) for seed, rate in zip(seeds, rates, strict=True)]
    made, training = network("gated-delta", 2, 32, 2, layer), Training(config.steps, 16, 2, 50)
    return train_network(made, lanes, training, PARITY, 256, row.rule or adamw)


def rate_of(results: dict, name: str, task: str) -> float:
    """The usual rate of rows about a layer; the best one on the tuning seed of rows about an optimizer."""
    config = results["config"]
    if settings.ROWS[name].rule is None:
        return config["rate"] if task == "parity" else TrainConfig.learning_rate
    tries = rows_of(results, row=name, task=task, seed=config["tuning_seed"])
    finite = lambda value: np.inf if value is None else value
    if task == "text":
        return min(tries, key=lambda one: finite(one[BITS]))["rate"]
    return max(tries, key=lambda one: (sum(one["right"]), sum(one["labels"]), -finite(one["loss"][-1])))["rate"]


def measure(path: Path, config: settings.Config, results: dict) -> dict:
    """The tries of every optimizer's rates, then all runs."""
    if config.report:
        return results
    make = lambda choices: each_once(path, results, partial(run, config), choices, itemgetter("row", "task"), config)
    pairs = [(row, task) for row in config.rows for task in config.tasks if (row, task) not in settings.NOT_MADE]
    tried = [{"row": row, "task": task} for row, task in pairs if settings.ROWS[row].rule]
    make(one | {"rate": rate, "seed": config.tuning_seed} for one in tried for rate in config.rates)
    make(
        {"row": row, "task": task, "rate": rate_of(results, row, task), "seed": seed}
        for row, task in pairs
        for seed in config.seeds
    )
    return results


def on_test_seeds(results: dict, name: str, task: str) -> Iterator[dict[str, Any]]:
    """The runs of a row on a task."""
    for one in rows_of(results, row=name, task=task):
        if one["seed"] in results["config"]["seeds"] and one["rate"] == rate_of(results, name, task):
            yield one


def table(results: dict) -> str:
    """Markdown: held-out bits per byte, and how many more than of the row that it changes, seed by seed; parity."""
    cells = []
    for name in results["config"]["rows"]:
        text, parity = (list(on_test_seeds(results, name, task)) for task in ("text", "parity"))
        base = {one["seed"]: one[BITS] for one in on_test_seeds(results, settings.ROWS[name].of, "text")}
        bits = [one[BITS] for one in text if one[BITS]]
        more = [one[BITS] - base[one["seed"]] for one in text if one[BITS] and base.get(one["seed"])]
        rates = " and ".join(f"{runs[0]['rate']:g}" for runs in (text, parity) if runs)
        cells.append(
            [name, rates, with_diverged([one[BITS] for one in text], spread(bits) if bits else "")]
            + [spread(more, sign="+") if more and name != settings.ROWS[name].of else ""]
            + [in_bins([one["right"] for one in parity]), largest(one["norm"][1] for one in (*text, *parity))]
        )
    heads = ("", "rate of text and parity", "bits per byte", "more than the row without it, same seed")
    heads = (*heads, "parity 2-50 / 52-100 / 102-150", "largest gradient norm")
    seeds = ", ".join(map(str, results["config"]["seeds"]))
    note = f"Seeds {seeds}: mean ± standard deviation, of parity's wholly right sequences mean (least)."
    return "\n".join([*markdown(heads, cells), "", note]) + "\n"


def figure(results: dict) -> Figure:
    """Held-out bits per byte, and parity's right words of the trained length and, hollow, of twice that: a point a seed."""
    names = results["config"]["rows"]
    fig, panels = plt.subplots(1, 2, figsize=(9, 0.24 * len(names) + 1), sharey=True, layout="constrained")
    labels = {"text": "held-out bits per byte", "parity": "parity: right words of 2-50, hollow 52-100"}
    for (task, label), axes in zip(labels.items(), panels, strict=True):
        for y, name in enumerate(names):
            values = [one[BITS] if task == "text" else one["right"][0] for one in on_test_seeds(results, name, task)]
            color = f"C{sorted({row.of for row in settings.ROWS.values()}).index(settings.ROWS[name].of)}"
            axes.plot(values, np.full(len(values), y), "o", color=color, alpha=0.6)
            if task == "parity":
                twice = [one["right"][1] for one in on_test_seeds(results, name, task)]
                axes.plot(twice, np.full(len(twice), y), "o", color=color, markerfacecolor="none", alpha=0.6)
        axes.set_xlabel(label)
    panels[0].set(yticks=range(len(names)), yticklabels=names)
    panels[0].invert_yaxis()
    panels[1].set_xlim(-0.05, 1.05)
    return fig


def main() -> None:
    config = flags.parse(settings.Config)
    path = config.path(RESULTS / "fidelity")
    results = measure(path, config, resume(path, config))
    finish(path, results, table(results), figure(results))


if __name__ == "__main__":
    flags.run(main)
