"""Where rates and retention should start: `python experiments/chunks/starts.py` writes results/starts.*."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from flags import Rates, Seeds
from grid import in_bins
from networks import EXACT, Network, network
from record import Runs, each_once, finish, largest, markdown, resume, rows_of
from sequences import Lane, Training
from sequences import run as train

from nested_jax.checks import Count
from nested_jax.data.tasks import TASKS

RESULTS = Path(__file__).parent / "results"
FORMS: dict[str, dict[str, Any]] = {
    "features of the boundary": EXACT,
    "features of the token": EXACT | {"features": "token"},
    "features of the token, momentum": EXACT | {"features": "token", "momentum": True},
}
"""Fields of Hope's `ModelConfig`."""


class Start(NamedTuple):
    """Where the gates of a memory start."""

    main: float = 3 / 16
    """Rate of the main memory's second layer."""
    first: float = 1 / 1024
    """Rate of first layers."""
    retention: float = 0.0
    """Added to the logits of retention."""
    seeds: int = 0
    """Added to the seeds: each start has its own."""


STARTS = {
    "main rate 3/16": Start(seeds=1000),
    "main rate 1/16": Start(1 / 16),
    "1/16, retention nearer to 1": Start(1 / 16, retention=3.0, seeds=2000),
    "1/16, first layers' rates a sixteenth": Start(1 / 16, first=1 / 2**14, seeds=3000),
}
LONGEST = {"parity": 50, "parity to 150": 150}
"""Longest words in training; they are tested to three times that."""


@dataclass(frozen=True)
class Config(Runs):
    """Parity by where the gates of self-modifying memories start."""

    forms: tuple[str, ...] = tuple(FORMS)
    """What the second layer is read by."""
    starts: tuple[str, ...] = tuple(STARTS)
    """Where the gates start."""
    tasks: tuple[str, ...] = ("parity", "parity to 150")
    """Words of training; those to 150 at chunk 64 alone."""
    chunks: tuple[Count, ...] = (16, 64)
    """Chunk lengths."""
    rates: Rates = (0.003, 0.01)
    """Learning rates."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of the parameters and of the training words, to which each start adds its own number."""
    steps: Count = 800
    """Updates."""

    def __post_init__(self):
        flags.check(self, "forms", "starts", "tasks", "chunks", "rates", "seeds")
        flags.check_known(self, "forms", FORMS)
        flags.check_known(self, "starts", STARTS)
        flags.check_known(self, "tasks", LONGEST)


def started(made: Network, start: Start) -> Network:
    """A Hope whose gates start there."""
    logit = lambda rate: math.log(rate / (1 - rate))

    def init(key):
        params = made.init(key)
        mixer = dict(params["blocks"]["mixer"])
        rates = mixer["rate_bias"].at[..., 0].set(logit(start.first)).at[..., -1].set(logit(start.main))
        mixer |= {"rate_bias": rates, "retention_bias": mixer["retention_bias"] + start.retention}
        return params | {"blocks": params["blocks"] | {"mixer": mixer}}

    return Network(init, made.logits)


def run(config: Config, cells: list[dict]) -> list[dict]:
    """One form with one start, trained and tested in three bins of lengths."""
    form, chunk, task, start = (cells[0][name] for name in ("form", "chunk", "task", "start"))
    longest = LONGEST[task]
    made = started(network("hope, chunk 16", 2, 32, 2, FORMS[form] | {"chunk": chunk}), STARTS[start])
    lanes = [Lane(TASKS["parity"], (STARTS[start].seeds + cell["seed"]) % 2**31, cell["rate"]) for cell in cells]
    bins = [(longest * i + 2, longest * (i + 1)) for i in range(3)]
    return train(made, lanes, Training(config.steps, 16, 2, longest), bins, 256)


def kinds(config: Config) -> Iterator[dict[str, Any]]:
    """Form, chunk and task of all runs."""
    for task in config.tasks:
        for chunk in config.chunks:
            if task == "parity" or chunk == 64:
                yield from ({"form": form, "chunk": chunk, "task": task} for form in config.forms)


def table(results: dict, config: Config) -> str:
    """Markdown: a row for each form, chunk, task and start."""
    cells = []
    for one in kinds(config):
        for start in config.starts:
            found = [rows_of(results, **one, start=start, rate=rate) for rate in config.rates]
            if any(found):
                right = [in_bins([row["right"] for row in rows]) for rows in found]
                norm = largest(row["norm"][1] for rows in found for row in rows)
                cells.append([one["task"], one["form"], str(one["chunk"]), start, *right, norm])
    heads = (
        "trained on",
        "read by",
        "chunk",
        "start",
        *(f"rate {rate:g}" for rate in config.rates),
        "largest gradient norm",
    )
    device = ", ".join(sorted({row["device"] for row in results["runs"]}))
    note = f"Wholly right words to once, twice and three times the trained length, mean (least) of {len(config.seeds)} seeds"
    note += ". inf: a run diverged"
    return "\n".join([*markdown(heads, cells, 4), "", f"{note}. {device}."]) + "\n"


def figure(results: dict, config: Config) -> Figure:
    """Right words to three times the trained length, a point for each seed."""
    panels = list(kinds(config))
    rows = -(-len(panels) // 3)
    fig, axes = plt.subplots(
        rows, 3, figsize=(11, 2.3 * rows), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for one, ax in zip(panels, axes.flat, strict=False):
        for y, start in enumerate(config.starts):
            for i, rate in enumerate(config.rates):
                right = [row["right"][2] for row in rows_of(results, **one, start=start, rate=rate)]
                label = f"learning rate {rate:g}" if y == 0 else None
                ax.plot(right, np.full(len(right), y + 0.2 * i), "o", color=f"C{i}", alpha=0.6, label=label)
        if not rows_of(results, **one):
            ax.text(0.5, 1.5, "not run", ha="center")
        ax.set_title(f"{one['task']}, chunk {one['chunk']}\n{one['form']}", fontsize=9)
        ax.set(yticks=range(len(config.starts)), yticklabels=config.starts, xlim=(-0.05, 1.05))
    axes[0, 0].invert_yaxis()
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False)
    fig.supxlabel("wholly right words, to three times the trained length", fontsize=9)
    return fig


def main() -> None:
    config = flags.parse(Config)
    path = config.path(RESULTS / "starts")
    results = resume(path, config)
    choices = [
        one | {"start": start, "rate": rate, "seed": seed}
        for one in kinds(config)
        for start in config.starts
        for rate in config.rates
        for seed in config.seeds
    ]
    each_once(path, results, partial(run, config), choices, itemgetter("form", "chunk", "task", "start"), config)
    all_of = {name: tuple(value) if isinstance(value, list) else value for name, value in results["config"].items()}
    shown = dataclasses.replace(config, **all_of)
    finish(path, results, table(results, shown), figure(results, shown))


if __name__ == "__main__":
    flags.run(main)
