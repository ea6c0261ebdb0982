"""What a report says and shows of a run on text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from nested_jax.data import NgramBits
from nested_jax.train.report import FIGURE, Points, draw


def draw_bits(folder: Path, rows: list[dict[str, Any]], ngrams: NgramBits) -> None:
    """Writes loss.png: bits per byte over steps, of the training windows and of the held-out text.

    Args:
        folder: the run folder.
        rows: of metrics.jsonl.
        ngrams: of the held-out text.
    """

    def points(key: str) -> Points:
        return [(row["step"], row[key]) for row in rows if key in row]

    draw(
        folder,
        "bits per byte",
        noisy={"training": points("bits_per_byte")},
        curves={"held-out": points("heldout_bits_per_byte")},
        levels={"counting tokens": ngrams.unigram, "counting pairs": ngrams.bigram},
    )


def results(row: dict[str, Any], ngrams: NgramBits, text_bytes: int) -> str:
    """Markdown on an evaluation.

    Args:
        row: its numbers.
        ngrams: of the held-out text.
        text_bytes: bytes of the held-out text.

    Returns:
        A verdict, a table, the figure.
    """
    bits, loss = row["heldout_bits_per_byte"], row["heldout_loss"]
    verdict = "below" if bits < ngrams.bigram else "not below"
    return f"""\
Held-out text: **{bits:.3f} bits per byte**, {verdict} what counting pairs of tokens gives.

| held-out text, {text_bytes:,} bytes | bits per byte |
|---|---|
| counts of tokens | {ngrams.unigram:.3f} |
| counts of pairs of tokens | {ngrams.bigram:.3f} |
| this model | {bits:.3f} |

Its loss is {loss:.3f} nats per token, a perplexity of {math.exp(min(loss, 700)):,.2f}.

![bits per byte over steps]({FIGURE})"""


def counting(ngrams: NgramBits) -> str:
    """What counting gives, in words.

    >>> counting(NgramBits(3.19, 2.2))
    'counting tokens 3.190, pairs 2.200'
    """
    return f"counting tokens {ngrams.unigram:.3f}, pairs {ngrams.bigram:.3f}"
