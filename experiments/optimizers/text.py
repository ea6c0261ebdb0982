"""python experiments/optimizers/text.py: language models on the default text; writes results/text.{json, md, png}."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import tempfile
from pathlib import Path

import config as settings
import matplotlib
import numpy as np
import tyro
from record import RESULTS, finish, once, resume
from rich.console import Console

from nested_jax.errors import UserError
from nested_jax.train.config import TrainConfig, command
from nested_jax.train.loop import train
from nested_jax.train.record import read_rows
from nested_jax.train.stopping import NonFinite

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

BITS = "heldout_bits_per_byte"


def run(config: settings.Text, preset: str, optimizer: str, rate: float, seed: int) -> dict:
    """One run, as `nested-jax train` makes it; held-out bits per byte are None if it came to what is no number."""
    flags = {"optimizer": optimizer, "learning_rate": rate, "seed": seed, "steps": config.steps, "batch": config.batch}
    flags |= {"window": config.window, "eval_every": 0, "eval_bytes": config.eval_bytes, "sample_tokens": 0}
    flags |= {"checkpoint_every": config.steps, "log_every": 5}
    with tempfile.TemporaryDirectory() as folder:
        made = TrainConfig.from_preset(preset, **flags)
        row = {"train": command(made)}
        try:
            train(dataclasses.replace(made, run_dir=folder), Console(quiet=True))
        except NonFinite as error:
            return row | {BITS: None, "error": str(error)}
        rows = read_rows(Path(folder))
    last = next(one for one in rows if BITS in one)
    losses = [(one["step"], one["bits_per_byte"]) for one in rows if "bits_per_byte" in one]
    row |= {BITS: last[BITS], "unigram": last["unigram"], "bigram": last["bigram"]}
    return row | {"seconds": max(one.get("seconds", 0.0) for one in rows), "training": losses}


def measure(config: settings.Text, results: dict) -> dict:
    once_more = functools.partial(once, "text", results, functools.partial(run, config))
    for preset in config.presets:
        for name in config.optimizers:
            tried = [once_more(preset=preset, optimizer=name, rate=rate, seed=config.tuning_seed) for rate in config.rates]
            best = min(tried, key=lambda row: row[BITS] or math.inf)
            for seed in config.seeds:
                once_more(preset=preset, optimizer=name, rate=best["rate"], seed=seed)
    return results


def counted(results: dict, preset: str, name: str) -> list[dict]:
    """The runs of an optimizer that are no trials."""
    seeds = results["config"]["seeds"]
    return [r for r in results["runs"] if (r["preset"], r["optimizer"]) == (preset, name) and r["seed"] in seeds]


def entropies(results: dict) -> dict:
    """A row that has those of the held-out text: any of a run that came to its end."""
    return next(row for row in results["runs"] if row[BITS])


def table(results: dict) -> str:
    """Markdown."""
    lines = ["| preset | optimizer | rate | held-out bits per byte | less than AdamW, same seed | s a run |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    config, bits = results["config"], lambda rows: np.array([row[BITS] or math.nan for row in rows])
    spread = lambda values, sign="": f"{values.mean():{sign}.3f} ± {values.std(ddof=1):.3f}"
    for preset in config["presets"]:
        for name in config["optimizers"]:
            rows = counted(results, preset, name)
            edge = " (edge)" if rows[0]["rate"] in (config["rates"][0], config["rates"][-1]) else ""
            cells = [preset, name, f"{rows[0]['rate']:g}{edge}", spread(bits(rows))]
            cells.append(spread(bits(counted(results, preset, config["optimizers"][0])) - bits(rows), "+"))
            cells.append(f"{np.median([row.get('seconds', math.nan) for row in rows]):.0f}")
            lines.append("| " + " | ".join(cells) + " |")
    last = entropies(results)
    lines += ["", f"{len(config['seeds'])} seeds. Entropies: unigram {last['unigram']:.3f}, bigram {last['bigram']:.3f}."]
    lines += ["", "| preset | optimizer | " + " | ".join(f"{rate:g}" for rate in config["rates"]) + " |"]
    lines.append("|---|---" + "|---:" * len(config["rates"]) + "|")
    for preset in config["presets"]:
        for name in config["optimizers"]:
            chosen = {"preset": preset, "optimizer": name, "seed": config["tuning_seed"]}
            tried = [row for row in results["runs"] if chosen.items() <= row.items()]
            lines.append(f"| {preset} | {name} | " + " | ".join(f"{row[BITS] or math.nan:.3f}" for row in tried) + " |")
    return "\n".join(lines) + f"\n\nRates tried, seed {config['tuning_seed']}: held-out bits per byte.\n"


def figure(results: dict, path: Path) -> None:
    """Bits per byte of training batches, mean over seeds, and held-out bits per byte of every run."""
    config = results["config"]
    fig, axes = plt.subplots(
        2, len(config["presets"]), figsize=(5 * len(config["presets"]), 7), layout="constrained", squeeze=False
    )
    for (above, below), preset in zip(axes.T, config["presets"], strict=True):
        for i, name in enumerate(config["optimizers"]):
            rows = [row for row in counted(results, preset, name) if row[BITS]]
            if not rows:
                continue
            steps = [step for step, _ in rows[0]["training"]]
            curves = np.array([[bits for _, bits in row["training"]] for row in rows])
            mean, deviation = curves.mean(0), curves.std(0, ddof=1)
            above.plot(steps, mean, label=name)
            above.fill_between(steps, mean - deviation, mean + deviation, alpha=0.2)
            below.plot([i] * len(rows), [row[BITS] for row in rows], "o", alpha=0.6)
        below.axhline(entropies(results)["bigram"], color="gray", linestyle="--", label="bigram entropy")
        below.set_xticks(range(len(config["optimizers"])), config["optimizers"])
        above.set(xlabel="step", ylabel="bits per byte of a batch", title=preset)
        below.set(ylabel="held-out bits per byte")
        below.legend()
    axes[0, 0].legend()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main() -> None:
    config = tyro.cli(settings.Text)
    results = measure(config, resume("text", config))
    finish("text", results, table(results))
    figure(results, RESULTS / "text.png")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
