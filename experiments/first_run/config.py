"""The config of first_run/run.py; its fields are the flags."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from nested_jax import PRESETS

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from flags import Seeds


@dataclass(frozen=True)
class Config:
    """Train models by the README's command, from several seeds."""

    presets: tuple[str, ...] = ("tiny-hope", "tiny-transformer")
    """The default model, and one to compare it with."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of the parameters and of the order of the text."""

    def __post_init__(self):
        flags.check(self, "presets", "seeds")
        flags.check_known(self, "presets", PRESETS)
