"""Methods on tasks one after the other: `python experiments/continual/run.py --data FOLDER` writes results/continual.*."""

from __future__ import annotations

import sys
from functools import partial
from operator import itemgetter
from pathlib import Path

import config as settings
import jax
import matplotlib.pyplot as plt
import numpy as np
from families import load
from learn import scores
from matplotlib.figure import Figure
from methods import METHODS

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from record import each_once, finish, markdown, resume, rows_of, spread
from summary import summary

from nested_jax.typing import Float

RESULTS = Path(__file__).parent / "results"


def run(config: settings.Config, cells: list[dict]) -> list[dict]:
    """scores (tasks + 1, tasks) of each cell, all of one method and family."""
    first = cells[0]
    family = load(first["family"], Path(config.data), config.examples)
    tuning = first["seed"] == config.tuning_seed
    found = scores(family, config.width, config.hidden, METHODS[first["method"]], cells, tuning)
    return [{"scores": one.astype(float).round(5).tolist(), "device": jax.devices()[0].device_kind} for one in found]


def measure(path: Path, config: settings.Config, results: dict) -> dict:
    """The tries of every method on the tuning seed, then all seeds with the best rate and strength."""
    make = lambda cells: each_once(path, results, partial(run, config), cells, itemgetter("family", "method"), config)
    able = lambda family, method: family not in settings.TEXTS or METHODS[method].optimizer
    pairs = [{"family": f, "method": method} for f in config.families for method in config.methods if able(f, method)]
    for pair in pairs:
        one = METHODS[pair["method"]]
        tries = [{"rate": rate, "strength": strength} for rate in one.rates for strength in one.strengths]
        make(pair | each | {"seed": config.tuning_seed} for each in tries)
    make(pair | best(results, **pair) | {"seed": seed} for pair in pairs for seed in config.seeds if tried(results, **pair))
    return results


def tried(results: dict, **choices: str) -> list[dict]:
    return rows_of(results, **choices, seed=results["config"]["tuning_seed"])


def best(results: dict, **choices: str) -> dict[str, float]:
    """The rate and the strength of the try with the best final score."""
    row = max(tried(results, **choices), key=lambda row: summary(np.array(row["scores"]))["final"])
    return {"rate": row["rate"], "strength": row["strength"]}


def on_seeds(results: dict, **choices: str) -> list[Float[np.ndarray, "N tasks"]]:
    """Scores of each seed."""
    if not tried(results, **choices):
        return []
    rows = rows_of(results, **choices, **best(results, **choices))
    return [np.array(row["scores"]) for row in rows if row["seed"] in results["config"]["seeds"]]


def families_of(results: dict) -> list[str]:
    """Those with runs."""
    return [family for family in results["config"]["families"] if rows_of(results, family=family)]


def table(results: dict) -> str:
    """Markdown: a table for each family."""
    lines = []
    for family in families_of(results):
        cells = []
        for method in results["config"]["methods"]:
            if found := on_seeds(results, family=family, method=method):
                sums = [summary(accuracy) for accuracy in found]
                chosen = best(results, family=family, method=method)
                unit = {"final": -1, "learned": -1} if family in settings.TEXTS else dict.fromkeys(sums[0], 100)
                digits = 3 if family in settings.TEXTS else 1
                numbers = [spread([unit.get(name, 1) * each[name] for each in sums], digits) for name in sums[0]]
                cells.append(
                    [method, *numbers, f"{chosen['rate']:g}" + (f", {chosen['strength']:g}" if chosen["strength"] else "")]
                )
        of = "bits per byte" if family in settings.TEXTS else "accuracy, %"
        heads = ("method", f"final {of}", "just learned", "forgetting", "backward", "forward", "rate, strength")
        lines += [f"{family}:", "", *markdown(heads, cells), ""]
    seeds = ", ".join(map(str, results["config"]["seeds"]))
    return "\n".join([*lines, f"Seeds {seeds}: mean ± standard deviation."]) + "\n"


def figure(results: dict) -> Figure:
    """Mean score on the tasks so far, after each task."""
    families, methods = families_of(results), results["config"]["methods"]
    fig, panels = plt.subplots(1, len(families), figsize=(3.4 * len(families) + 2, 3.6), squeeze=False, layout="constrained")
    for family, axes in zip(families, panels[0], strict=True):
        for i, method in enumerate(methods):
            if found := on_seeds(results, family=family, method=method):
                after = np.mean(found, axis=0)[1:]
                so_far = [after[task, : task + 1].mean() for task in range(len(after))]
                axes.plot(range(1, len(after) + 1), so_far, "o-", markersize=3, color=plt.cm.tab20(i), label=method)
        axes.set(
            title=family,
            xlabel="tasks learned",
            ylabel=f"{'-bits per byte' if family in settings.TEXTS else 'accuracy'} on them",
        )
    handles = {label: line for axes in panels[0] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=8)
    return fig


def main() -> None:
    config = flags.parse(settings.Config)
    path = config.path(RESULTS / "continual")
    results = resume(path, config)
    if not config.report:
        measure(path, config, results)
    finish(path, results, table(results), figure(results))


if __name__ == "__main__":
    flags.run(main)
