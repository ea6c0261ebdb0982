"""The config of learners/run.py; its fields are the flags."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from nested_jax.checks import Count

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from flags import Counts, Seed

STREAMS = ("text", "one token", "period two", "noise")


@dataclass(frozen=True)
class Config:
    """Learners of a tiny Hope that read four streams without end; then as many learners as one device serves."""

    tokens: Count = 10_000_000
    """Length of every stream in bytes, up to the next multiple of --every."""
    every: Count = 2**17
    """Tokens between two rows of the results, and between two saves of the learners."""
    width: Count = 32
    """Width of the model."""
    layers: Count = 2
    """Blocks."""
    steps: Count = 400
    """Updates of the model, before anything is read."""
    served: Counts = (1, 4, 16, 64, 256)
    """Learners side by side, each of which reads and then writes."""
    seed: Seed = 0
    """Of the parameters and of the noise."""
    run_dir: str = "runs/learners"
    """Folder of the model and of the learners' files."""
    fresh: bool = False
    """Replace results of other flags."""

    def __post_init__(self):
        flags.check(self, "served")
        flags.check_rising(self, "served")
