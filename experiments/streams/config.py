"""The config of streams/run.py; its fields are the flags."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_jax.checks import Count

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from flags import Seed
from networks import EXACT, PAPER
from record import Runs

_MEMORIES = {"mixer": "self-modifying"}
_HOPE = _MEMORIES | EXACT
_TITANS = {"mixer": "titans", "max_rate": 1.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "hope": _HOPE,
    "hope, projections every 256": _HOPE | {"projection_chunk": 256},
    "hope, chunk 16": _HOPE | {"chunk": 16},
    "hope, with momentum": _HOPE | {"momentum": True},
    "hope, momentum not damped, rates to 0.5": _HOPE | {"momentum": True, "damped": False, "max_rate": 0.5},
    "hope, features of the token": _HOPE | {"features": "token"},
    "hope, one rate": _HOPE | {"rates": "shared"},
    "hope, read before": _HOPE | {"read": "before"},
    "hope, read at the boundary": _HOPE | {"read": "boundary"},
    "hope, errors not bounded": _HOPE | {"surprise": float("inf")},
    "hope, no retention": _HOPE | {"retention": "none"},
    "hope, decay to zero": _HOPE | {"retention": "zero"},
    "hope, all generated": _HOPE | {"generated": ("keys", "values", "queries", "rates", "retention")},
    "hope, nothing generated": _HOPE | {"generated": ()},
    "hope, targets rms": _HOPE | {"targets": "rms"},
    "hope, proximal": _HOPE | {"step": "proximal"},
    "hope, erase by the memory": _HOPE | {"erase": "memory"},
    "errors of the boundary, proximal": _MEMORIES,
    "errors of the boundary, normalised": _MEMORIES | {"step": "normalised"},
    "titans, rates to 1": _TITANS,
    "titans, exact errors": _TITANS | {"errors": "exact", "step": "normalised", "features": "boundary", "momentum": False},
    "linear": {"mixer": "linear"},
    "delta, rates to 2": {"mixer": "delta", "max_rate": 2.0},
    "gated-delta, rates to 2": {"mixer": "gated-delta", "max_rate": 2.0},
    "oja": {"mixer": "oja"},
    "lp": {"mixer": "lp"},
    "huber": {"mixer": "huber"},
    "omega": {"mixer": "omega"},
    "hope-paper": _MEMORIES | PAPER,
    "hope-paper, targets l2": _MEMORIES | PAPER | {"targets": "l2"},
}
"""Fields of `ModelConfig`."""


@dataclass(frozen=True)
class Config(Runs):
    """State norms over long streams that are hard on a memory, at its largest rates, with no decay and with the fastest."""

    options: tuple[str, ...] = tuple(OPTIONS)
    """Names of `config.OPTIONS`."""
    tokens: Count = 2**20
    """Length of every stream, up to the next multiple of 16,384."""
    width: Count = 32
    """Width of the models."""
    layers: Count = 1
    """Blocks."""
    seed: Seed = 0
    """Of the parameters and of the random stream."""

    def __post_init__(self):
        flags.check(self, "options")
        flags.check_known(self, "options", OPTIONS)
