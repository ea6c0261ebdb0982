"""python experiments/first_run/run.py: trains from each seed, and writes results/{first_run.json, table.md, figure.png}."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import config as settings
import jax
import matplotlib
import tyro

from nested_jax.train.record import read_rows

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

RESULTS = Path(__file__).parent / "results"


def train(preset: str, seed: int, folder: Path) -> dict:
    """One run by the command line, as a user makes it."""
    flags = ["--preset", preset, "--seed", str(seed)]
    subprocess.run([sys.executable, "-m", "nested_jax.cli", "train", *flags, "--run-dir", str(folder)], check=True)
    return {
        "command": " ".join(["nested-jax train --fresh", *flags]),
        "preset": preset,
        "seed": seed,
        "rows": read_rows(folder),
    }


def heldout(run: dict) -> list[dict]:
    return [row for row in run["rows"] if "heldout_bits_per_byte" in row]


def table(runs: list[dict]) -> str:
    """Markdown: what each seed came to, and the spread."""
    lines = ["| preset | seed | held-out bits per byte | unigram, bigram entropy |", "|---|---:|---:|---:|"]
    for run in runs:
        last = heldout(run)[-1]
        lines.append(
            f"| {run['preset']} | {run['seed']} | {last['heldout_bits_per_byte']:.3f} "
            f"| {last['unigram']:.3f}, {last['bigram']:.3f} |"
        )
    lines.append("")
    for preset in dict.fromkeys(run["preset"] for run in runs):
        ends = [heldout(run)[-1]["heldout_bits_per_byte"] for run in runs if run["preset"] == preset]
        spread = f" ± {statistics.stdev(ends):.3f} (standard deviation)" if len(ends) > 1 else ""
        between = f"{min(ends):.3f} to {max(ends):.3f}"
        lines.append(f"`{preset}`: {statistics.mean(ends):.3f}{spread}, {len(ends)} seeds, {between}.")
    return "\n".join(lines) + "\n"


def figure(runs: list[dict], path: Path) -> None:
    """Held-out bits per byte over steps, a line for each run."""
    fig, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    colors = dict(zip(dict.fromkeys(run["preset"] for run in runs), plt.cm.tab10.colors, strict=False))
    for run in runs:
        points = [(row["step"], row["heldout_bits_per_byte"]) for row in heldout(run)]
        first = run is next(other for other in runs if other["preset"] == run["preset"])
        axes.plot(*zip(*points, strict=True), "o-", color=colors[run["preset"]], label=run["preset"] if first else None)
    for name, dashes in (("unigram", ":"), ("bigram", "--")):
        axes.axhline(heldout(runs[0])[-1][name], color="gray", linestyle=dashes, label=f"{name} entropy")
    axes.set(xlabel="step", ylabel="held-out bits per byte")
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.93))
    fig.savefig(path, dpi=150)


def main() -> None:
    config = tyro.cli(settings.Config)
    with tempfile.TemporaryDirectory() as folder:
        runs = [train(p, s, Path(folder, f"{p}-{s}")) for p in config.presets for s in config.seeds]
    RESULTS.mkdir(exist_ok=True)
    record = {"command": "python experiments/first_run/run.py", "jax": jax.__version__, "runs": runs}
    (RESULTS / "first_run.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "table.md").write_text(table(runs))
    figure(runs, RESULTS / "figure.png")
    print(table(runs))


if __name__ == "__main__":
    main()
