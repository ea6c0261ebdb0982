"""What a model's linear layers are surprised by: numbers for programs, a table for readers."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from rich.table import Table

from nested_jax.data import Batch
from nested_jax.models.config import ModelConfig
from nested_jax.surprise import layers, surprise_and_grad
from nested_jax.train.step import cross_entropy
from nested_jax.typing import Array, PyTree

COLUMNS = {"inputs": "inputs, RMS", "surprise": "surprise, RMS", "share": "gradient, share"}
MEANING = (
    "Surprise is the derivative of the summed loss, in nats, by a layer's output at a token; the share is the norm of the "
    "layer's gradient over that of the whole gradient. Measured on the first held-out batch. Embeddings, norms and weights "
    "that change while reading are no linear layers."
)
MOST = 12  # rows of a table


def layer_surprise(model: ModelConfig) -> Callable[[PyTree, PyTree | None, Batch], dict[str, Array]]:
    """(parameters, fast state, batch) -> numbers named "inputs/LAYER", "surprise/LAYER" and "share/LAYER"; jit it.

    A layer is a kernel's path, or "PATH[i]" in a stack. The loss is summed over the targets.
    """

    def measure(params, fast, batch):
        loss = lambda params, given: cross_entropy(model, params, *given)
        _, gradient, pairs = surprise_and_grad(loss, params, (fast, batch), has_aux=True)
        whole, numbers = jnp.maximum(optax.global_norm(gradient), 1e-30), {}
        for key, pair in pairs.items():
            path, run = layers(key)
            kernel = gradient
            for part in path.split("/"):
                kernel = kernel[part]
            stacked = kernel.ndim > 2
            kernel, pair = (kernel[run], pair) if stacked else jax.tree.map(lambda x: x[None], (kernel, pair))
            for i, (g, (x, surprise)) in enumerate(zip(kernel, zip(*pair, strict=True), strict=True)):
                layer = f"{path}[{(run.start or 0) + i}]" if stacked else path
                numbers[f"inputs/{layer}"], numbers[f"surprise/{layer}"] = _rms(x), _rms(surprise)
                numbers[f"share/{layer}"] = jnp.linalg.norm(g) / whole
        return numbers

    return measure


def table(numbers: dict[str, float]) -> Table:
    """The most surprised layers, for a terminal."""
    shown = Table(title=_title(numbers), title_justify="left")
    shown.add_column("linear layer", no_wrap=True)
    for column in COLUMNS.values():
        shown.add_column(column, justify="right")
    for row in _rows(numbers):
        shown.add_row(*row)
    return shown


def section(numbers: dict[str, float]) -> str:
    """The same, as a section of report.md; nothing where there are no such numbers.

    >>> print(section({"inputs/head": 1.0, "surprise/head": 0.25, "share/head": 0.5}).split("\\n\\n")[2])
    | linear layer | inputs, RMS | surprise, RMS | gradient, share |
    |---|---:|---:|---:|
    | head | 1 | 0.25 | 50.0% |
    """
    if not _layers(numbers):
        return ""
    lines = [("linear layer", *COLUMNS.values()), *_rows(numbers)]
    head, *rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"## {_title(numbers)}", "", MEANING, "", head, "|---|---:|---:|---:|", *rows])


def _rows(numbers: dict[str, float]) -> list[tuple[str, ...]]:
    most = sorted(_layers(numbers), key=lambda layer: -numbers[f"surprise/{layer}"])[:MOST]
    formats = {"inputs": "{:.3g}", "surprise": "{:.3g}", "share": "{:.1%}"}
    return [(layer, *(form.format(numbers[f"{kind}/{layer}"]) for kind, form in formats.items())) for layer in most]


def _title(numbers: dict[str, float]) -> str:
    every = len(_layers(numbers))
    return f"The {MOST} most surprised of {every} linear layers" if every > MOST else "Surprise of linear layers"


def _layers(numbers: dict[str, float]) -> list[str]:
    return [name.removeprefix("surprise/") for name in numbers if name.startswith("surprise/")]


def _rms(x: Array) -> Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))
