"""The config of chunks/run.py; its fields are the flags."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_jax import preset
from nested_jax.checks import Count, Positive

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from flags import Counts, Seeds
from networks import BOUNDARY, EXACT
from record import Runs

FORMS: dict[str, dict[str, Any]] = {
    "boundary, proximal": BOUNDARY,
    "boundary, normalised": BOUNDARY | {"step": "normalised"},
    "boundary, all else as exact": EXACT | {"errors": "boundary"},
    "exact, proximal": EXACT | {"step": "proximal"},
    "exact, normalised": EXACT,
    "exact, normalised, features of the token": EXACT | {"features": "token"},
    "exact, normalised, with momentum": EXACT | {"momentum": True},
    "exact, normalised, heads of 64": EXACT | {"heads": preset("tiny-hope").width // 64},
    "exact, normalised, heads of 128": EXACT | {"heads": preset("tiny-hope").width // 128},
}
"""Fields of Hope's `ModelConfig`; the first two have momentum, features of the token and one rate. Other heads are tried on
text alone."""
TASKS = ("parity", "parity to 150", "mqar", "text")


@dataclass(frozen=True)
class Config(Runs):
    """What a chunk costs: quality and speed of Hope against its chunk length."""

    forms: tuple[str, ...] = tuple(FORMS)
    """Errors and step."""
    chunks: Counts = (1, 4, 16, 64, 128)
    """Chunk lengths."""
    tasks: tuple[str, ...] = TASKS
    """parity: trained on lengths 2-50, tested to 150; parity to 150: trained on those, tested to 450, from chunk 64 on;
    mqar: 4 pairs in 32 tokens; text: the first command of the README, held-out bits per byte."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of the parameters and of the training data."""
    rate: Positive = 0.003
    """Learning rate of parity and mqar."""
    steps: Count = 800
    """Updates of parity."""
    mqar_steps: Count = 2000
    """Updates of mqar, of twice as many sequences."""
    text_steps: Count = 140
    """Updates on text, half of the first command's."""
    rounds: Count = 7
    """Rounds in which the speeds are measured, in turn."""

    def __post_init__(self):
        flags.check(self, "forms", "chunks", "tasks", "seeds")
        flags.check_known(self, "forms", FORMS)
        flags.check_known(self, "tasks", TASKS)
