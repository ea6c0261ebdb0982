"""Optimizers of language models on the default text: `python experiments/optimizers/text.py` writes results/text.*."""

from __future__ import annotations

import dataclasses
import functools
import sys
import tempfile
from pathlib import Path

import config as settings
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from tuning import chosen, counted, tried, tuned

from nested_jax.train.config import TrainConfig, command
from nested_jax.train.loop import train
from nested_jax.train.record import read_rows
from nested_jax.train.stopping import Diverged

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from record import band, finish, markdown, once, resume, spread

RESULTS = Path(__file__).parent / "results"
BITS = "heldout_bits_per_byte"


def run(config: settings.Text, preset: str, optimizer: str, rate: float, seed: int) -> dict:
    """One run, as of `nested-jax train --tokenizer bytes`; its held-out bits per byte are None if it diverged."""
    choices = {"optimizer": optimizer, "learning_rate": rate, "seed": seed, "steps": config.steps}
    choices |= {"batch_size": config.batch_size, "window": config.window, "eval_every": 0, "eval_bytes": config.eval_bytes}
    choices |= {
        "tokenizer": "bytes",
        "sample_tokens": 0,
        "reading_documents": 0,
        "checkpoint_every": config.steps,
        "log_every": 5,
    }
    with tempfile.TemporaryDirectory() as folder:
        made = TrainConfig.from_preset(preset, **choices)
        row = {"train": command(made)}
        try:
            train(dataclasses.replace(made, run_dir=folder), Console(quiet=True))
        except Diverged as error:
            return row | {BITS: None, "error": str(error)}
        rows = read_rows(Path(folder))
    last = next(one for one in rows if BITS in one)
    losses = [(one["step"], one["bits_per_byte"]) for one in rows if "bits_per_byte" in one]
    row |= {BITS: last[BITS], "unigram": last["unigram"], "bigram": last["bigram"]}
    return row | {"seconds": max(one.get("seconds", 0.0) for one in rows), "training": losses}


def measure(config: settings.Text, results: dict) -> dict:
    make = functools.partial(once, RESULTS / "text", results, functools.partial(run, config))
    each = [{"preset": preset, "optimizer": name} for preset in config.presets for name in config.optimizers]
    for one in each:
        tuned(make, config, BITS, config.further, **one)
    return results


def entropies(results: dict) -> dict:
    """A row with the entropies of the held-out text: that of any run that ended."""
    return next(row for row in results["runs"] if row[BITS])


def table(results: dict) -> str:
    """Markdown."""
    config, rows, rates = results["config"], [], {}
    bits = lambda **choices: np.array([row[BITS] or np.nan for row in counted(results, **choices)])
    for preset in config["presets"]:
        base = bits(preset=preset, optimizer=config["optimizers"][0])
        for name in config["optimizers"]:
            one = {"preset": preset, "optimizer": name}
            if not counted(results, **one):
                continue
            seconds = np.median([row.get("seconds", np.nan) for row in counted(results, **one)])
            less = spread(base - bits(**one), sign="+") if len(base) == len(bits(**one)) else ""
            cells = [chosen(results, **one), spread(bits(**one)), less, f"{seconds:.0f}"]
            rows.append([preset, name, *cells])
            rates[preset, name] = {f"{row['rate']:g}": f"{row[BITS] or np.nan:.3f}" for row in tried(results, **one)}
    heads = ("preset", "optimizer", "rate", "held-out bits per byte", "less than AdamW, same seed", "s a run")
    lines, end = markdown(heads, rows, words=2), entropies(results)
    lines += ["", f"{len(config['seeds'])} seeds. Entropies: unigram {end['unigram']:.3f}, bigram {end['bigram']:.3f}.", ""]
    columns = max(rates.values(), key=len)
    cells = [[*one, *(bits.get(rate, "") for rate in columns)] for one, bits in rates.items()]
    lines += markdown(["preset", "optimizer", *columns], cells, words=2)
    return "\n".join(lines) + f"\n\nRates tried, seed {config['tuning_seed']}: held-out bits per byte.\n"


def figure(results: dict) -> Figure:
    """Bits per byte of training batches, mean ± standard deviation over seeds, and held-out bits per byte of every run."""
    presets, optimizers = results["config"]["presets"], results["config"]["optimizers"]
    fig, axes = plt.subplots(2, len(presets), figsize=(5 * len(presets), 7), layout="constrained", squeeze=False)
    for (above, below), preset in zip(axes.T, presets, strict=True):
        for i, name in enumerate(optimizers):
            rows = [row for row in counted(results, preset=preset, optimizer=name) if row[BITS]]
            if not rows:
                continue
            curves = np.array([row["training"] for row in rows])  # (seeds, points, (step, bits))
            band(above, curves[0, :, 0], curves[..., 1], label=name)
            below.plot([i] * len(rows), [row[BITS] for row in rows], "o", alpha=0.6)
        below.axhline(entropies(results)["bigram"], color="gray", linestyle="--", label="bigram entropy")
        below.set_xticks(range(len(optimizers)), optimizers)
        above.set(xlabel="step", ylabel="bits per byte of a batch", title=preset)
        below.set(ylabel="held-out bits per byte")
        below.legend()
    axes[0, 0].legend()
    return fig


def main() -> None:
    config = flags.parse(settings.Text)
    results = measure(config, resume(RESULTS / "text", config))
    finish(RESULTS / "text", results, table(results), figure(results))


if __name__ == "__main__":
    flags.run(main)
