"""Result of the first command: `python experiments/first_run/run.py` writes results/first_run.* and results/reading.png."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import config as settings
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from nested_jax.data import open_documents
from nested_jax.train.reading import COLUMNS, mean_and_error, plot, read
from nested_jax.train.record import read_rows
from nested_jax.train.trained import load_run

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from record import finish, markdown, spread, start

RESULTS = Path(__file__).parent / "results"


def train(preset: str, seed: int, folder: Path) -> dict:
    """One run of the command line."""
    choices = ["--preset", preset, "--seed", str(seed)]
    subprocess.run([sys.executable, "-m", "nested_jax", "train", *choices, "--run-dir", str(folder)], check=True)
    config, params, tokenizer, _ = load_run(folder)
    found = read(config, params, tokenizer, open_documents(config.data, "heldout"))
    return {
        "reading": {name: curve.tolist() for name, curve in found.curves().items()},
        "positions": found.positions,
        "command": " ".join(["nested-jax train --fresh", *choices]),
        "preset": preset,
        "seed": seed,
        "rows": read_rows(folder),
    }


def heldout(run: dict) -> list[dict]:
    return [row for row in run["rows"] if "heldout_bits_per_byte" in row]


def table(results: dict) -> str:
    """Markdown: the result of each seed, and their mean."""
    runs, cells = results["runs"], []
    for run in runs:
        last = heldout(run)[-1]
        ngrams = f"{last['unigram']:.3f}, {last['bigram']:.3f}"
        cells.append([run["preset"], str(run["seed"]), f"{last['heldout_bits_per_byte']:.3f}", ngrams])
    lines = [*markdown(("preset", "seed", "held-out bits per byte", "counts of tokens, of pairs"), cells), ""]
    for preset in dict.fromkeys(run["preset"] for run in runs):
        ends = [heldout(run)[-1]["heldout_bits_per_byte"] for run in runs if run["preset"] == preset]
        lines.append(
            f"`{preset}`: {spread(ends)} (standard deviation), {len(ends)} seeds, {min(ends):.3f} to {max(ends):.3f}."
        )
    curves, positions = readings(runs), runs[0]["positions"]
    first, *others = curves
    saved = {f"{first}, against {name}": curves[name] - curves[first] for name in others}
    rows = [
        [f"{start:,} to {end:,}"]
        + ["{:.3f} ± {:.3f}".format(*(x[i] for x in mean_and_error(c))) for c in [*curves.values(), *saved.values()]]
        for i, (start, end) in enumerate(zip(positions, positions[1:], strict=False))
    ]
    lines += ["", "Bits per byte by position in the document, mean over seeds ± standard error over documents:", ""]
    lines += markdown(("tokens read before", *curves, *(f"saved by {name}" for name in saved)), rows)
    return "\n".join(lines) + "\n"


def readings(runs: list[dict]) -> dict[str, np.ndarray]:
    """Curves (N, P) of the same documents: of each preset, learning or frozen, the mean over seeds."""
    found: dict[str, list] = {}
    for run in runs:
        for name, curve in run["reading"].items():
            found.setdefault(f"{run['preset']}, {COLUMNS[name]}" if len(run["reading"]) > 1 else run["preset"], []).append(
                curve
            )
    return {name: np.mean(curves, axis=0) for name, curves in found.items()}


def figure(results: dict) -> Figure:
    """Held-out bits per byte over steps, a line for each run."""
    runs = results["runs"]
    fig, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    colors = dict(zip(dict.fromkeys(run["preset"] for run in runs), plt.cm.tab10.colors, strict=False))
    for run in runs:
        points = [(row["step"], row["heldout_bits_per_byte"]) for row in heldout(run)]
        first = run is next(other for other in runs if other["preset"] == run["preset"])
        axes.plot(*zip(*points, strict=True), "o-", color=colors[run["preset"]], label=run["preset"] if first else None)
    for name, dashes in (("unigram", ":"), ("bigram", "--")):
        axes.axhline(heldout(runs[0])[-1][name], color="gray", linestyle=dashes, label=f"counts, {name}")
    axes.set(xlabel="step", ylabel="held-out bits per byte")
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.93))
    return fig


def main() -> None:
    config = flags.parse(settings.Config)
    results = start(RESULTS / "first_run", config)
    with tempfile.TemporaryDirectory() as folder:
        runs = [train(p, s, Path(folder, f"{p}-{s}")) for p in config.presets for s in config.seeds]
    results["runs"] = runs
    plot(readings(runs), runs[0]["positions"], RESULTS / "reading.png")
    finish(RESULTS / "first_run", results, table(results), figure(results))


if __name__ == "__main__":
    flags.run(main)
