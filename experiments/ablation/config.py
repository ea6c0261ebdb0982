"""The config of ablation/run.py; its fields are the flags."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_jax import CMSConfig, preset
from nested_jax.checks import Count, Positive

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from flags import Seeds
from networks import BOUNDARY, EXACT, PAPER
from record import Runs

without = lambda name: EXACT | {"generated": tuple(one for one in EXACT["generated"] if one != name)}
ROWS: dict[str, dict[str, Any]] = {
    "hope": EXACT,
    "with momentum": EXACT | {"momentum": True},
    "plain gradient descent": EXACT | {"erase": "none"},
    "no decay": EXACT | {"retention": "none"},
    "no CMS": EXACT | {"cms": CMSConfig(hidden=(sum(preset("tiny-hope").cms.hidden),), activation="gelu")},
    "fixed keys": without("keys"),
    "fixed values": without("values"),
    "fixed rates": without("rates"),
    "fixed retention": without("retention"),
    "memory of queries": EXACT | {"generated": (*EXACT["generated"], "queries")},
    "features of the token": EXACT | {"features": "token"},
    "one rate": EXACT | {"rates": "shared"},
    "errors of the boundary, proximal": BOUNDARY,
    "targets of any norm": EXACT | {"targets": "raw"},
    "raw steps": EXACT | {"step": "raw"},
    "erase by keys alone": EXACT | {"erase": "memory"},
    "errors of any norm": EXACT | {"surprise": math.inf},
    "decay to zero": EXACT | {"retention": "zero"},
    "reads before the write": EXACT | {"read": "before"},
    "reads of the boundary": EXACT | {"read": "boundary"},
    "hope-paper": PAPER,
    "hope-paper, targets of unit norm": PAPER | {"targets": "l2"},
}
"""Fields of `ModelConfig`: the paper's ablation, then our choices, then the paper's for ours, and all of these at once.
Fixed queries are the default; without a CMS stands one MLP as large, which does not learn in context."""
TASKS = ("parity", "text")
NOT_MADE = {("no CMS", "parity")}
"""Parity's models have no CMS that learns in context."""
PERPLEXITIES: dict[str, float] = {
    "hope": 13.58,
    "with momentum": 12.24,
    "plain gradient descent": 13.41,
    "no decay": 13.71,
    "no CMS": 13.04,
    "fixed keys": 13.77,
    "fixed values": 13.90,
}
"""Perplexities of the paper's table, of a larger model on other text, from one seed. Its Hope has momentum: each row but the
first is a change of the second."""


@dataclass(frozen=True)
class Config(Runs):
    """The paper's ablation on text and on parity."""

    rows: tuple[str, ...] = tuple(ROWS)
    """What is changed."""
    tasks: tuple[str, ...] = TASKS
    """text: held-out bits per byte of the first command; parity: trained on lengths 2-50, tested to 150."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of the parameters and of the training data."""
    text_steps: Count = 140
    """Updates on text, half of the first command's."""
    steps: Count = 800
    """Updates on parity."""
    rate: Positive = 0.003
    """Learning rate on parity."""
    chunk: Count = 16
    """Chunk on parity."""

    def __post_init__(self):
        flags.check(self, "rows", "tasks", "seeds")
        flags.check_known(self, "tasks", TASKS)
        flags.check_known(self, "rows", ROWS)
