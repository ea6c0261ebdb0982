"""The config of streams/run.py; its fields are the flags."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from nested_jax.checks import Count, Interval
from nested_jax.errors import UserError

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from flags import Seed
from networks import EXACT, PAPER
from record import Runs

_MEMORIES = {"mixer": "self-modifying"}
_HOPE = _MEMORIES | EXACT
_TITANS = {"mixer": "titans", "max_rate": 1.0}
_TITANS_EXACT = {"errors": "exact", "step": "normalised", "features": "boundary"}
OPTIONS: dict[str, dict[str, Any]] = {
    "hope": _HOPE,
    "hope, projections every 256": _HOPE | {"projection_chunk": 256},
    "hope, chunk 16": _HOPE | {"chunk": 16},
    "hope, with momentum": _HOPE | {"momentum": True},
    "hope, momentum that swings": _HOPE | {"momentum": True},
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
    "hope, targets raw": _HOPE | {"targets": "raw"},
    "hope, proximal": _HOPE | {"step": "proximal"},
    "hope, raw steps": _HOPE | {"step": "raw"},
    "hope, no erase, rates to 2": _HOPE | {"erase": "none", "max_rate": 2.0},
    "hope, erase by the memory, rates to 2": _HOPE | {"erase": "memory", "max_rate": 2.0},
    "errors of the boundary, proximal": _MEMORIES,
    "errors of the boundary, normalised, rates to 2": _MEMORIES | {"step": "normalised", "max_rate": 2.0},
    "errors of the boundary, a sum as momentum": _MEMORIES | {"damped": False},
    "titans, rates to 1": _TITANS,
    "titans, exact errors, rates to 2": _TITANS | _TITANS_EXACT | {"momentum": False, "max_rate": 2.0},
    "titans, exact errors, with momentum": _TITANS | _TITANS_EXACT,
    "titans, a sum as momentum": _TITANS | {"damped": False},
    "titans, values of any norm": _TITANS | {"values": "raw"},
    "titans, errors of any norm": _TITANS | {"surprise": float("inf")},
    "titans, raw steps": _TITANS | {"step": "raw"},
    "titans, no retention": _TITANS | {"retention": "none"},
    "titans, decay to zero": _TITANS | {"retention": "zero"},
    "linear": {"mixer": "linear"},
    "linear attention": {"mixer": "linear", "gated": False},
    "delta, rates to 2": {"mixer": "delta", "max_rate": 2.0},
    "gated-delta, rates to 2": {"mixer": "gated-delta", "max_rate": 2.0},
    "oja": {"mixer": "oja"},
    **{mixer: {"mixer": mixer} for mixer in ("lp", "huber", "omega")},
    **{f"{mixer}, rates to 1": {"mixer": mixer, "max_rate": 1.0} for mixer in ("lp", "huber", "omega")},
    **{f"{mixer}, values of any norm": {"mixer": mixer, "values": "raw"} for mixer in ("lp", "huber", "omega")},
    **{f"{mixer}, errors of any norm": {"mixer": mixer, "surprise": float("inf")} for mixer in ("lp", "huber", "omega")},
    "hope-paper": _MEMORIES | PAPER,
    "hope-paper, targets l2": _MEMORIES | PAPER | {"targets": "l2"},
}
"""Fields of `ModelConfig`."""
SWINGING = ("hope, momentum that swings",)
"""Options whose momentum's gate swings between 0 and 1 from token to token; of all others it is 0.9."""


@dataclass(frozen=True)
class Config(Runs):
    """State norms over long streams that are hard on a memory, at its largest rates, with no decay and with the fastest."""

    options: tuple[str, ...] = tuple(OPTIONS)
    """Names of `config.OPTIONS`."""
    tokens: Annotated[int, Interval(least=1, most=2**26)] = 2**20
    """Length of every stream, up to the next multiple of 16,384."""
    width: Count = 32
    """Width of the models, of two heads."""
    layers: Count = 1
    """Blocks."""
    seed: Seed = 0
    """Of the parameters and of the random stream."""

    def __post_init__(self):
        flags.check(self, "options")
        flags.check_known(self, "options", OPTIONS)
        if self.width % 2:
            raise UserError(f"--width {self.width} is odd, and the models have two heads: give an even one")
