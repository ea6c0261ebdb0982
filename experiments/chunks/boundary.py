"""What the quantities that are as old as the chunk cost: `python experiments/chunks/boundary.py` writes results/boundary.*.

With exact errors and chunk C, five things of self-modifying Titans are still those of the last chunk boundary: the first
layer of the main memory (its error and its input's features), and what the memories of keys, values, rates and retention
make and learn. In the token loop each is refreshed at every token, alone, with the others left at the boundary.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from flags import Seeds
from grid import in_bins
from networks import Network, config_of
from record import Runs, each_once, finish, largest, markdown, resume, rows_of
from sequences import PARITY, Lane, Training
from sequences import run as train

from nested_jax import cms
from nested_jax.checks import Count, Positive
from nested_jax.data.tasks import TASKS
from nested_jax.memory.reference import self_modifying_titans
from nested_jax.memory.self_modifying import SelfModifyingTitans
from nested_jax.models.block import sequence_layer
from nested_jax.models.language_model import embed, head, init_weights
from nested_jax.numerics import rms_norm

RESULTS = Path(__file__).parent / "results"
EXACT = {
    "nothing more": (),
    "main memory's first layer": ("memory",),
    "keys": ("keys",),
    "values": ("values",),
    "rates": ("rates",),
    "retention": ("retention",),
    "all": ("memory", "keys", "values", "rates", "retention"),
}
"""Memories that are refreshed at every token."""


@dataclass(frozen=True)
class Config(Runs):
    """Parity with each quantity of the chunk boundary made exact alone."""

    exact: tuple[str, ...] = tuple(EXACT)
    """What is made exact."""
    chunks: tuple[Count, ...] = (16, 64)
    """Chunk lengths of all else."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of the parameters and of the training sequences."""
    steps: Count = 400
    """Updates."""
    rate: Positive = 0.003
    """Learning rate."""

    def __post_init__(self):
        flags.check(self, "exact", "chunks", "seeds")
        flags.check_known(self, "exact", EXACT)


def token_loop(exact: str, chunk: int) -> Network:
    """Hope with exact errors, its memories as a loop over tokens."""
    config = config_of("hope exact, chunk 16", 2, 32, 2, {"chunk": chunk})
    layer = sequence_layer(config)
    assert isinstance(layer, SelfModifyingTitans)
    mixer = partial(self_modifying_titans, layer, periods=dict.fromkeys(EXACT[exact], 1))

    def logits(params, tokens):
        x = embed(config, params, tokens)
        for i in range(config.layers):
            block = jax.tree.map(lambda w, i=i: w[i], params["blocks"])
            x = x + jax.vmap(mixer, (None, 0))(block["mixer"], rms_norm(block["norm"], x))
            x = cms.apply(config.cms, block["cms"], (), x)
        return head(config, params, x)

    return Network(partial(init_weights, config), logits)


def run(config: Config, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Networks of one kind, trained on lengths 2-50 and tested in three bins."""
    first = cells[0]
    lanes = [Lane(TASKS["parity"], cell["seed"], config.rate) for cell in cells]
    return train(token_loop(first["exact"], first["chunk"]), lanes, Training(config.steps, 16, 2, 50), PARITY, 128)


def table(results: dict) -> str:
    """Markdown: wholly right sequences in three bins, a row for what is exact."""
    config, cells = results["config"], []
    for exact in config["exact"]:
        line = [exact]
        for chunk in config["chunks"]:
            rows = rows_of(results, exact=exact, chunk=chunk)
            line.append(in_bins([row["right"] for row in rows]))
            line.append(largest(row["norm"][1] for row in rows))
        cells.append(line)
    heads = [
        head for chunk in config["chunks"] for head in (f"chunk {chunk}: 2-50 / 52-100 / 102-150", "largest gradient norm")
    ]
    note = f"Wholly right sequences, mean (least) of seeds {', '.join(map(str, config['seeds']))}."
    return "\n".join([*markdown(("exact at every token", *heads), cells), "", note]) + "\n"


def figure(results: dict) -> Figure:
    """Right sequences of 52-100 tokens, a point for each seed."""
    config = results["config"]
    fig, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for i, chunk in enumerate(config["chunks"]):
        for y, exact in enumerate(config["exact"]):
            right = [row["right"][1] for row in rows_of(results, exact=exact, chunk=chunk)]
            label = f"chunk {chunk}" if y == 0 else None
            axes.plot(right, np.full(len(right), y + 0.15 * i), "o", color=f"C{i}", alpha=0.6, label=label)
    axes.set(
        yticks=range(len(config["exact"])), yticklabels=config["exact"], xlabel="wholly right sequences of 52-100 tokens"
    )
    axes.invert_yaxis()
    axes.legend(frameon=False)
    return fig


def main() -> None:
    config = flags.parse(Config)
    path = config.path(RESULTS / "boundary")
    results = resume(path, config)
    choices = ({"exact": e, "chunk": c, "seed": s} for s in config.seeds for c in config.chunks for e in config.exact)
    each_once(path, results, partial(run, config), choices, itemgetter("exact", "chunk"), config)
    finish(path, results, table(results), figure(results))


if __name__ == "__main__":
    flags.run(main)
