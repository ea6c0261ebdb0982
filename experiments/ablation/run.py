"""The paper's ablation: `python experiments/ablation/run.py` writes results/ablation.*."""

from __future__ import annotations

import dataclasses
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
from grid import in_bins
from networks import network
from record import each_once, finish, largest, markdown, resume, rows_of, spread, with_diverged
from sequences import PARITY, Lane, Training
from sequences import run as train_network
from text_run import BITS, held_out

from nested_jax import preset
from nested_jax.data.tasks import TASKS

RESULTS = Path(__file__).parent / "results"


def run(config: settings.Config, cells: list[dict]) -> list[dict]:
    """One row's model, trained on text or parity from several seeds."""
    changes = settings.ROWS[cells[0]["row"]]
    if cells[0]["task"] == "text":
        model = dataclasses.replace(preset("tiny-hope"), **changes)
        return held_out(model, [cell["seed"] for cell in cells], config.text_steps)
    made = network("hope, chunk 16", 2, 32, 2, changes | {"chunk": config.chunk})
    lanes = [Lane(TASKS["parity"], cell["seed"], config.rate) for cell in cells]
    return train_network(made, lanes, Training(config.steps, 16, 2, 50), PARITY, 256)


def table(results: dict) -> str:
    """Markdown: held-out bits per byte and their difference from Hope's, seed by seed; parity; the paper's perplexities."""
    base, cells = {one["seed"]: one[BITS] for one in rows_of(results, row="hope", task="text")}, []
    for row in results["config"]["rows"]:
        runs = rows_of(results, row=row, task="text")
        bits = [one[BITS] for one in runs if one[BITS]]
        more = [one[BITS] - base[one["seed"]] for one in runs if one[BITS] and base.get(one["seed"])]
        words, norms = rows_of(results, row=row, task="parity"), lambda found: [one["norm"][1] for one in found]
        right = with_diverged(norms(words), in_bins([one["right"] for one in words if one["norm"][1] is not None]))
        norm, paper = largest(norms(rows_of(results, row=row))), settings.PERPLEXITIES.get(row)
        cells.append(
            [
                row,
                with_diverged([one[BITS] for one in runs], spread(bits) if bits else ""),
                spread(more, sign="+") if more and row != "hope" else "",
                right,
                norm,
                f"{paper:.2f}" if paper else "",
            ]
        )
    heads = ("", "bits per byte", "more than hope, same seed", "parity 2-50 / 52-100 / 102-150", "largest gradient norm")
    text, parity = (len({one["seed"] for one in rows_of(results, task=task)}) for task in ("text", "parity"))
    note = f"Text: mean ± standard deviation of {text} seeds. " if text else ""
    note += f"Parity: wholly right sequences, mean (least) of {parity} seeds."
    return "\n".join([*markdown((*heads, "paper's perplexity"), cells), "", note]) + "\n"


def figure(results: dict) -> Figure:
    """Words of twice the trained length that are right, or bits per byte of text: a point for each seed."""
    rows, tasks = results["config"]["rows"], results["config"]["tasks"]
    size = (3.2 * len(tasks) + 2.5, 0.25 * len(rows) + 0.9)
    fig, panels = plt.subplots(1, len(tasks), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for task, axes in zip(tasks, panels[0], strict=True):
        for y, row in enumerate(rows):
            runs = rows_of(results, row=row, task=task)
            values = [one[BITS] if task == "text" else one["right"][1] for one in runs]
            axes.plot(values, np.full(len(values), y), "o", color="C0", alpha=0.6)
        axes.set_xlabel("held-out bits per byte" if task == "text" else "parity: right words of 52-100")
    panels[0, 0].set(yticks=range(len(rows)), yticklabels=rows)
    panels[0, 0].invert_yaxis()
    return fig


def main() -> None:
    config = flags.parse(settings.Config)
    path = config.path(RESULTS / "ablation")
    results = resume(path, config)
    pairs = [(row, task) for task in config.tasks for row in config.rows if (row, task) not in settings.NOT_MADE]
    choices = ({"row": row, "task": task, "seed": seed} for row, task in pairs for seed in config.seeds)
    each_once(path, results, partial(run, config), choices, itemgetter("row", "task"), config)
    finish(path, results, table(results), figure(results))


if __name__ == "__main__":
    flags.run(main)
