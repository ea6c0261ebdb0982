"""The config of ablation/run.py; its fields are the flags."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_jax import CMSConfig, preset
from nested_jax.checks import Count, Positive

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from flags import Seeds
from networks import EXACT

ALL = ("keys", "values", "rates", "retention")
without = lambda name: {"generated": tuple(one for one in ALL if one != name)}
ROWS: dict[str, dict[str, Any]] = {
    "hope": {},
    "plain gradient descent": {"erase": "none"},
    "no momentum": {"momentum": False},
    "no decay": {"retention": "none"},
    "no CMS": {"cms": CMSConfig(hidden=(sum(preset("tiny-hope").cms.hidden),), activation="gelu")},
    "fixed keys": without("keys"),
    "fixed values": without("values"),
    "memory of queries": {"generated": (*ALL, "queries")},
    "exact errors, normalised": EXACT,
    "exact errors, normalised, with momentum": EXACT | {"momentum": True},
    "exact errors, normalised, features of the token": EXACT | {"features": "token"},
    "exact errors, normalised, one rate": EXACT | {"rates": "shared"},
}
"""Changes of `ModelConfig`. Fixed queries are the default; without a CMS stands one MLP as large, which does not learn in
context. Parity's models have no other."""
PAPER: dict[str, float] = {
    "hope": 12.24,
    "plain gradient descent": 13.41,
    "no momentum": 13.58,
    "no decay": 13.71,
    "no CMS": 13.04,
    "fixed keys": 13.77,
    "fixed values": 13.90,
}
"""Perplexities of the paper's table, of a larger model on other text, from one seed."""


@dataclass(frozen=True)
class Config:
    """The paper's ablation on text and on parity."""

    rows: tuple[str, ...] = tuple(ROWS)
    """What is changed."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of the parameters and of the training data."""
    text_steps: Count = 280
    """Updates on text."""
    steps: Count = 400
    """Updates on parity."""
    rate: Positive = 0.01
    """Learning rate on parity."""
    chunk: Count = 16
    """Chunk on parity."""
    jobs: Count = 2
    """Runs at a time, each in a process of its own."""
    fresh: bool = False
    """Replace results of other flags."""

    def __post_init__(self):
        flags.check(self, "rows", "seeds")
        flags.check_known(self, "rows", ROWS)
