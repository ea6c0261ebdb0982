"""What a chunk costs: `python experiments/chunks/run.py` writes results/chunks.*."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

import config as settings
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.figure import Figure

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from grid import in_bins
from networks import network
from record import each_once, finish, largest, markdown, resume, rows_of, spread, with_diverged
from sequences import Lane, Training
from sequences import run as train_network
from text_run import BITS, held_out
from timing import alternate

from nested_jax import ModelConfig, preset
from nested_jax.data.tasks import MQAR, TASKS
from nested_jax.models.language_model import apply, init_state, init_weights

RESULTS = Path(__file__).parent / "results"


def fields(form: str, chunk: int) -> dict[str, Any]:
    """Fields of Hope's `ModelConfig`."""
    return settings.FORMS[form] | {"chunk": chunk}


def run(config: settings.Config, cells: list[dict]) -> list[dict]:
    """One form of Hope, trained on a task from several seeds."""
    form, chunk, task = (cells[0][name] for name in ("form", "chunk", "task"))
    if task == "text":
        model = dataclasses.replace(preset("tiny-hope"), **fields(form, chunk))
        return held_out(model, [cell["seed"] for cell in cells], config.text_steps)
    one = MQAR(4, vocabulary=32) if task == "mqar" else TASKS["parity"]
    hope = network("hope, chunk 16", max(one.tokens, one.labels), 32, 2, fields(form, chunk))
    lanes = [Lane(one, cell["seed"], config.rate) for cell in cells]
    if task == "mqar":
        return train_network(hope, lanes, Training(config.mqar_steps, 32, 32, 32), [(32, 32)], 256)
    longest = 150 if task == "parity to 150" else 50
    bins = [(longest * i + 2, longest * (i + 1)) for i in range(3)]
    return train_network(hope, lanes, Training(config.steps, 16, 2, longest), bins, 256)


def cells(config: settings.Config) -> Iterator[dict[str, Any]]:
    """The choices of all runs."""
    for task in config.tasks:
        for chunk in config.chunks:
            for form in config.forms:
                if task == "text" or ("heads" not in settings.FORMS[form] and (task != "parity to 150" or chunk >= 64)):
                    yield from ({"form": form, "chunk": chunk, "task": task, "seed": seed} for seed in config.seeds)


def speeds(forms: Sequence[str], chunks: Sequence[int], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of an update of `tiny-hope` (2 x 512 tokens, forward and backward pass), by form and chunk."""

    def call(model: ModelConfig):
        params = jax.jit(partial(init_weights, model))(jax.random.key(0))
        text = jax.random.randint(jax.random.key(1), (2, 513), 0, model.vocabulary)

        def loss(params, text):
            logits = apply(model, params, text[:, :-1], init_state(model, params, 2))[0]
            return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), text[:, 1:]).mean()

        step = jax.jit(jax.grad(loss)).lower(params, text).compile()
        return lambda: step(params, text)

    made = {
        (form, chunk): call(dataclasses.replace(preset("tiny-hope"), **fields(form, chunk)))
        for form in forms
        for chunk in chunks
    }
    times = alternate(made, rounds)
    return {form: {str(chunk): median(times[form, chunk]) for chunk in chunks} for form in forms}


def measure(path: Path, config: settings.Config, results: dict) -> dict:
    """All runs, then the speeds, on a machine that does nothing else."""
    each_once(path, results, partial(run, config), cells(config), itemgetter("form", "chunk", "task"), config)
    all_of = results["config"]
    if not config.report and {form: list(found) for form, found in results.get("speeds", {}).items()} != {
        form: [str(chunk) for chunk in all_of["chunks"]] for form in all_of["forms"]
    }:
        results |= {
            "speeds": speeds(all_of["forms"], all_of["chunks"], config.rounds),
            "device": jax.devices()[0].device_kind,
        }
    return results


def table(results: dict) -> str:
    """Markdown: a row for each form and chunk."""
    config, cells = results["config"], []
    for form in config["forms"]:
        for chunk in sorted(config["chunks"]):
            of = lambda task: rows_of(results, form=form, chunk=chunk, task=task)  # noqa: B023
            every, ms = [row[BITS] for row in of("text")], results.get("speeds", {}).get(form, {}).get(str(chunk))
            bits = [one for one in every if one]
            if not ms and not rows_of(results, form=form, chunk=chunk):
                continue
            cells.append(
                [form, str(chunk), *(in_bins([row["right"] for row in of(task)]) for task in ("parity", "parity to 150"))]
                + [in_bins([row["labels"] for row in of("mqar")]), with_diverged(every, spread(bits) if bits else "")]
                + [largest(row["norm"][1] for task in config["tasks"] for row in of(task))]
                + [f"{1e3 * ms:.0f}" if ms else ""]
            )
    heads = ("errors, step", "chunk", "parity 2-50 / 52-100 / 102-150", "trained to 150: 2-150 / 152-300 / 302-450")
    heads += ("MQAR, right labels", "text, bits per byte", "largest gradient norm", "ms an update")
    seeds = {task: len({row["seed"] for row in rows_of(results, task=task)}) for task in config["tasks"]}
    note = "Wholly right sequences, mean over seeds (least). Seeds: " + ", ".join(f"{k} {n}" for k, n in seeds.items())
    note += f". ms: 2 x 512 tokens of `tiny-hope`, medians, {results['device']}." if "speeds" in results else "."
    return "\n".join([*markdown(heads, cells), "", note]) + "\n"


def figure(results: dict) -> Figure:
    """Parity in the second bin, MQAR, text and speed against the chunk: means, with bars from the least to the largest."""
    config = results["config"]
    chunks = sorted(config["chunks"])
    panels = {
        "parity, twice the trained length": lambda form, chunk: [
            row["right"][1] for row in rows_of(results, form=form, chunk=chunk, task="parity")
        ],
        "MQAR, right labels": lambda form, chunk: [
            row["labels"][0] for row in rows_of(results, form=form, chunk=chunk, task="mqar")
        ],
        "text, bits per byte": lambda form, chunk: [
            row[BITS] for row in rows_of(results, form=form, chunk=chunk, task="text") if row[BITS]
        ],
        "ms an update": lambda form, chunk: [
            1e3 * seconds for length, seconds in results.get("speeds", {}).get(form, {}).items() if int(length) == chunk
        ],
    }
    fig, axes = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained")
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        for i, form in enumerate(config["forms"]):
            found = {chunk: one for chunk in chunks if (one := values(form, chunk))}
            x, mean = np.array(list(found)) * 2 ** (0.04 * i), np.array([np.mean(one) for one in found.values()])
            ends = np.array([(np.mean(one) - min(one), max(one) - np.mean(one)) for one in found.values()]).reshape(-1, 2)
            ax.errorbar(x, mean, ends.T, fmt="o-", markersize=4, elinewidth=1, color=f"C{i}", label=form)
        ax.set_xscale("log", base=2)
        ax.set(title=title, xlabel="chunk", xticks=chunks, xticklabels=chunks)
    for ax in axes[:2]:
        ax.set_ylim(-0.05, 1.05)
    axes[3].set_yscale("log")
    handles, labels = axes[3].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return fig


def main() -> None:
    config = flags.parse(settings.Config)
    path = config.path(RESULTS / "chunks")
    results = resume(path, config)
    finish(path, measure(path, config, results), table(results), figure(results))


if __name__ == "__main__":
    flags.run(main)
