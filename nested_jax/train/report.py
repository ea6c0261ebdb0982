"""The report of a finished run: loss.png and report.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nested_jax.train.config import TrainConfig, command

FIGURE, REPORT = "loss.png", "report.md"
TEMPERATURE = 0.8  # of the sample
Points = list[tuple[float, float]]


class Outcome(NamedTuple):
    """What a source of data says of a finished run, in Markdown."""

    title: str
    """What the model was trained on."""
    results: str
    """The last evaluation, and what the figure shows."""
    seen: str
    """What was read in training."""
    unit: str
    """What the speed is counted in, such as tokens."""
    sections: Sequence[str] = ()
    """More sections."""
    sample: str | None = None
    """Text drawn from the model; None where it writes none."""


class Costs(NamedTuple):
    """What a run took."""

    parameters: int
    """Number of parameters."""
    tokens: int
    """Targets seen in training."""
    seconds: float
    """Wall time."""
    compiling: float
    """Seconds of these."""
    evaluating: float
    """Seconds of these."""


def draw(
    folder: Path,
    label: str,
    *,
    curves: dict[str, Points],
    noisy: dict[str, Points] | None = None,
    dashed: dict[str, Points] | None = None,
    levels: dict[str, float] | None = None,
) -> None:
    """Writes loss.png: numbers over steps.

    Args:
        folder: the run folder.
        label: what the numbers are.
        curves: (step, number) by name.
        noisy: the same, drawn faintly and smoothed.
        dashed: the same, in the colors of the curves.
        levels: numbers to compare with, by name.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes, noisy, dashed = figure.add_subplot(xlabel="step", ylabel=label), noisy or {}, dashed or {}
    for i, (name, points) in enumerate(noisy.items()):
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=f"C{i}", alpha=0.25, linewidth=0.8)
            axes.plot(steps, smoothed(values), color=f"C{i}", label=f"{name}, smoothed")
    for lines, style in ((curves, "o-"), (dashed, "o--")):
        for i, (name, points) in enumerate(lines.items(), len(noisy)):
            if points:
                axes.plot(*zip(*points, strict=True), style, color=f"C{i}", label=name)
    for (name, value), dashes in zip((levels or {}).items(), (":", "--", "-.", "-"), strict=False):
        axes.axhline(value, color="gray", linestyle=dashes, label=f"{name} {value:.2f}")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(folder / FIGURE, dpi=120)


def smoothed(values: Sequence[float], width: int = 15) -> list[float]:
    """Means of the values around each, fewer at both ends, so that a line stays a line.

    >>> smoothed([0.0, 3.0, 0.0, 3.0, 3.0], width=3)
    [0.0, 1.0, 2.0, 2.0, 3.0]
    """
    reach = [min(width // 2, i, len(values) - 1 - i) for i in range(len(values))]
    return [sum(values[i - r : i + r + 1]) / (2 * r + 1) for i, r in enumerate(reach)]


def write(folder: Path, config: TrainConfig, outcome: Outcome, costs: Costs) -> None:
    """Writes report.md, which shows loss.png.

    Args:
        folder: the run folder.
        config: of the run.
        outcome: what was learned.
        costs: what it took.
    """
    training = max(costs.seconds - costs.compiling - costs.evaluating, 1e-9)
    sections = "".join(f"{section}\n\n" for section in outcome.sections if section)
    lines = f"""\
# {config.preset} on {outcome.title}

{outcome.results}

| | |
|---|---|
{_steps_line(config.steps)}
| parameters | {costs.parameters:,} |
| {outcome.unit} seen | {outcome.seen} |
| wall time | {costs.seconds / 60:.1f} minutes |
| of it compiling, evaluating, training | {costs.compiling:.1f} s, {costs.evaluating:.1f} s, {training:.1f} s |
| {outcome.unit} per second of training | {costs.tokens / training:,.0f} |

{sections}Made by

```
{command(config)}
```
{_quote(config, outcome.sample)}"""
    part = folder / f"{REPORT}.part"
    part.write_text(lines)
    part.rename(folder / REPORT)


def _quote(config: TrainConfig, sample: str | None) -> str:
    if sample is None:
        return ""
    fence = "`" * (3 + max((len(run) for run in _backticks(sample)), default=0))
    return f"""
A sample, seed {config.seed}, temperature {TEMPERATURE}, from the start of a document:

{fence}text
{sample}
{fence}
"""


def written(folder: Path, steps: int) -> bool:
    """Whether the folder has a report of a run of this many steps."""
    path = folder / REPORT
    return path.is_file() and _steps_line(steps) in path.read_text(errors="replace")


def _steps_line(steps: int) -> str:
    return f"| steps | {steps:,} |"


def _backticks(text: str) -> list[str]:
    """The runs of backticks in a text."""
    return ["`" * n for n in range(1, 100) if "`" * n in text]
