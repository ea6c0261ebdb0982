"""What a model learns while it reads: its bits per byte of held-out documents against the position in them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_jax.data import Tokenizer
from nested_jax.models.config import ModelConfig
from nested_jax.models.language_model import apply, init_state
from nested_jax.train.config import TrainConfig
from nested_jax.typing import Array, Float, Int, PyTree

FIGURE = "reading.png"
SHORTEST, LONGEST = 128, 2048  # tokens read of each document
COLUMNS = {"learning": "learning", "frozen": "CMS frozen"}


class Reading(NamedTuple):
    """Bits per byte of N documents between positions, which are powers of two.

    positions: P + 1 numbers of tokens, the first one 0. learning: as the model reads. frozen: the same weights with a CMS
    that does not learn in context; None where none does.
    """

    positions: list[int]
    learning: Float[np.ndarray, "N P"]
    frozen: Float[np.ndarray, "N P"] | None

    def curves(self) -> dict[str, Float[np.ndarray, "N P"]]:
        """Those that there are, by name."""
        return {name: curve for name in COLUMNS if (curve := getattr(self, name)) is not None}


def read(config: TrainConfig, params: PyTree, tokenizer: Tokenizer, documents: Sequence[bytes]) -> Reading | None:
    """Reads the starts of held-out documents, from position 0, the fast state carried from token to token.

    Args:
        config: of the run; attention sees `window` tokens, as in training.
        params: of its model.
        tokenizer: of the run.
        documents: of which the first `reading_documents` are read that have 2048 tokens; if there are fewer than three,
            1024, and so on.

    Returns:
        What was read; None if no three documents have 128 tokens.
    """
    if not config.reading_documents:
        return None
    encoded, length = [tokenizer.encode(text) for text in documents], LONGEST
    while length >= SHORTEST:
        rows = [ids[:length] for ids in encoded if len(ids) >= length][: config.reading_documents]
        if len(rows) >= min(3, config.reading_documents):
            break
        length //= 2
    else:
        return None
    targets = np.stack(rows).astype(np.int32)
    tokens = np.concatenate([np.full((len(rows), 1), tokenizer.boundary, np.int32), targets[:, :-1]], axis=1)
    positions = [0, *(2**n for n in range(6, length.bit_length()))]
    text_bytes = np.add.reduceat(tokenizer.byte_lengths[targets], positions[:-1], axis=1)

    def bits(model: ModelConfig, params: PyTree) -> Float[np.ndarray, "N P"]:
        nats = jax.jit(partial(_nats, model, config.window))(params, tokens, targets)
        return np.add.reduceat(np.asarray(nats), positions[:-1], axis=1) / math.log(2) / text_bytes

    return Reading(
        positions, bits(config.model, params), bits(*_freeze(config.model, params)) if config.model.adapting else None
    )


def _freeze(model: ModelConfig, params: PyTree) -> tuple[ModelConfig, PyTree]:
    """The same weights in a model whose CMS has no periods, and so no inner learning rates."""
    still = dataclasses.replace(model, cms=dataclasses.replace(model.cms, periods=(), blocks=None))
    chain = {
        name: {key: leaf for key, leaf in level.items() if key != "rate"} if isinstance(level, dict) else level
        for name, level in params["blocks"]["cms"].items()
    }
    return still, params | {"blocks": params["blocks"] | {"cms": chain}}


def _nats(
    model: ModelConfig, window: int, params: PyTree, tokens: Int[Array, "N T"], targets: Int[Array, "N T"]
) -> Float[Array, "N T"]:
    logits, _ = apply(model, params, tokens, init_state(model, params, len(tokens), max_length=window))
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)


def mean_and_error(curve: Float[np.ndarray, "N P"]) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, " P"]]:
    """Mean over documents, and its standard error."""
    return curve.mean(axis=0), curve.std(axis=0, ddof=1) / math.sqrt(len(curve)) if len(curve) > 1 else curve[0] * 0


def plot(curves: dict[str, Float[np.ndarray, "N P"]], positions: Sequence[int], path: Path) -> None:
    """Draws curves of the same documents, and what the first one saves of each other one, with one standard error."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    (first, learning), *others = curves.items()
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(1, 2, n + 1, xlabel="tokens of the document read before") for n in range(2)]
    middle = [math.sqrt(max(a, 16) * b) for a, b in zip(positions, positions[1:], strict=False)]
    saved = [(name, f"C{i + 1}", curve - learning) for i, (name, curve) in enumerate(others)]
    absolute = [(name, f"C{i}", curve) for i, (name, curve) in enumerate(curves.items())]
    for axes, lines in zip(panels, (absolute, saved), strict=True):
        for name, color, curve in lines:
            mean, error = mean_and_error(curve)
            axes.plot(middle, mean, "o-", color=color, label=name)
            axes.fill_between(middle, mean - error, mean + error, color=color, alpha=0.15)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("bits per byte")
    panels[0].legend()
    panels[1].set_ylabel(f"bits per byte saved by {first}")
    panels[1].axhline(0, color="gray", linewidth=0.8)
    figure.savefig(path, dpi=120)


def report_on(config: TrainConfig, params: PyTree, tokenizer: Tokenizer, documents: Sequence[bytes], folder: Path) -> str:
    """Draws reading.png in a folder and returns its section of the report; "" where no document is long enough."""
    found = read(config, params, tokenizer, documents)
    if found is None:
        return ""
    plot({COLUMNS[name]: curve for name, curve in found.curves().items()}, found.positions, folder / FIGURE)
    return section(found)


def section(reading: Reading) -> str:
    """Markdown: the table, and whether learning in the CMS saves bits of the same documents."""
    names, cells = [COLUMNS[name] for name in reading.curves()], list(reading.curves().values())
    if reading.frozen is not None:
        names, cells = [*names, "saved"], [*cells, reading.frozen - reading.learning]
    cells = [mean_and_error(curve) for curve in cells]
    lines = [
        f"Bits per byte of {len(reading.learning)} held-out documents, by how much of the document was read before:",
        "",
        "| tokens | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for i, (start, end) in enumerate(zip(reading.positions, reading.positions[1:], strict=False)):
        numbers = " | ".join(f"{mean[i]:.3f} ± {error[i]:.3f}" for mean, error in cells)
        lines.append(f"| {start:,} to {end:,} | {numbers} |")
    lines += ["", f"![bits per byte over the position in the document]({FIGURE})", ""]
    lines.append("± is the standard error over documents.")
    if reading.frozen is not None:
        saved, error = (float(number[-1]) for number in cells[-1])
        does = "saves" if saved > 2 * error else "does not show: it saves"
        lines[-1] += f" Learning in the CMS {does} {saved:.3f} ± {error:.3f} bits per byte in the last row."
    return "\n".join(lines)
