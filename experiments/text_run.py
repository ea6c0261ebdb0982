"""A model trained on the text of the README's first command: one cell of an experiment's table."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from nested_jax import ModelConfig
from nested_jax.train.config import TrainConfig
from nested_jax.train.loop import train
from nested_jax.train.record import read_rows
from nested_jax.train.stopping import Diverged

BITS = "heldout_bits_per_byte"


def held_out(model: ModelConfig, seed: int, steps: int) -> dict[str, Any]:
    """Trains a model as `nested-jax train` does.

    Args:
        model: of 1,024 tokens.
        seed: of parameters and order of the text.
        steps: updates.

    Returns:
        heldout_bits_per_byte, None if the run diverged; norm: median and largest norm of the gradients; seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model=model, run_dir=folder, seed=seed, steps=steps, eval_every=0, checkpoint_every=steps, log_every=5,
            sample_tokens=0, reading_documents=0,
        )  # fmt: skip
        try:
            train(config, Console(quiet=True))
        except Diverged as error:
            return {BITS: None, "norm": [None, None], "error": str(error)}
        rows = read_rows(Path(folder))
    norms = [row["gradient_norm"] for row in rows if "gradient_norm" in row]
    last = next(row for row in rows if BITS in row)
    seconds = max(row.get("seconds", 0.0) for row in rows)
    return {BITS: last[BITS], "norm": [float(np.median(norms)), max(norms)], "seconds": seconds}


def kind(names: Sequence[str], cell: dict[str, Any]) -> tuple:
    """What the runs of one call have in common: these choices, and on text the seed, so that each is saved as it ends.

    >>> [kind(("row", "task"), {"row": "hope", "task": task, "seed": 1}) for task in ("text", "parity")]
    [('hope', 'text', 1), ('hope', 'parity', None)]
    """
    return (*(cell[name] for name in names), cell["seed"] if cell["task"] == "text" else None)
