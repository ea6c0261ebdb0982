"""The report of a finished run: loss.png and report.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nested_jax.data import NgramBits
from nested_jax.train.config import TrainConfig, command

FIGURE, REPORT = "loss.png", "report.md"
TEMPERATURE = 0.8  # of the sample


def draw(folder: Path, rows: list[dict[str, Any]], ngrams: NgramBits) -> None:
    """Writes loss.png: bits per byte over steps, of the training windows and of the held-out text.

    Args:
        folder: the run folder.
        rows: of metrics.jsonl.
        ngrams: of the held-out text.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="bits per byte")
    for key, style, label in (("bits_per_byte", "-", "training"), ("heldout_bits_per_byte", "o-", "held-out")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        if key == "bits_per_byte":
            axes.plot(steps, values, style, color="tab:blue", alpha=0.25, linewidth=0.8)
            axes.plot(steps, smoothed(values), style, color="tab:blue", label=f"{label}, smoothed")
        else:
            axes.plot(steps, values, style, color="tab:orange", label=label)
    for name, value, dashes in (("tokens", ngrams.unigram, ":"), ("pairs", ngrams.bigram, "--")):
        axes.axhline(value, color="gray", linestyle=dashes, label=f"counting {name} {value:.2f}")
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


def write(
    folder: Path,
    config: TrainConfig,
    *,
    bits_per_byte: float,
    loss: float,
    ngrams: NgramBits,
    text_bytes: int,
    parameters: int,
    tokens: int,
    epochs: float,
    seconds: float,
    compiling: float,
    evaluating: float,
    sample: str,
    reading: str = "",
    layers: str = "",
) -> None:
    """Writes report.md, which shows loss.png.

    Args:
        folder: the run folder.
        config: of the run.
        bits_per_byte: of the held-out text.
        loss: of the held-out text, nats per token.
        ngrams: of the held-out text.
        text_bytes: bytes of the held-out text.
        parameters: number of parameters.
        tokens: targets seen in training.
        epochs: times that the text was read.
        seconds: wall time.
        compiling: seconds of these.
        evaluating: seconds of these.
        sample: text drawn from the model.
        reading: a Markdown section on what is learned while reading; empty for none.
        layers: the same on linear layers.
    """
    verdict = "below" if bits_per_byte < ngrams.bigram else "not below"
    sections = "".join(f"{section}\n\n" for section in (reading, layers) if section)
    training = max(seconds - compiling - evaluating, 1e-9)
    fence = "`" * (3 + max((len(run) for run in _backticks(sample)), default=0))
    lines = f"""\
# {config.preset} on {config.data}

Held-out text: **{bits_per_byte:.3f} bits per byte**, {verdict} what counting pairs of tokens gives.

| held-out text, {text_bytes:,} bytes | bits per byte |
|---|---|
| counts of tokens | {ngrams.unigram:.3f} |
| counts of pairs of tokens | {ngrams.bigram:.3f} |
| this model | {bits_per_byte:.3f} |

Its loss is {loss:.3f} nats per token, a perplexity of {math.exp(min(loss, 700)):,.2f}.

![bits per byte over steps]({FIGURE})

| | |
|---|---|
{_steps_line(config.steps)}
| parameters | {parameters:,} |
| tokens seen | {tokens:,}, {epochs:.2f} epochs |
| wall time | {seconds / 60:.1f} minutes |
| of it compiling, evaluating, training | {compiling:.1f} s, {evaluating:.1f} s, {training:.1f} s |
| tokens per second of training | {tokens / training:,.0f} |

{sections}Made by

```
{command(config)}
```

A sample, seed {config.seed}, temperature {TEMPERATURE}, from the start of a document:

{fence}text
{sample}
{fence}
"""
    part = folder / f"{REPORT}.part"
    part.write_text(lines)
    part.rename(folder / REPORT)


def written(folder: Path, steps: int) -> bool:
    """Whether the folder has a report of a run of this many steps."""
    path = folder / REPORT
    return path.is_file() and _steps_line(steps) in path.read_text(errors="replace")


def _steps_line(steps: int) -> str:
    return f"| steps | {steps:,} |"


def _backticks(text: str) -> list[str]:
    """The runs of backticks in a text."""
    return ["`" * n for n in range(1, 100) if "`" * n in text]
