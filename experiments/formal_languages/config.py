"""The config of formal_languages/run.py; its fields are the flags."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from nested_jax.checks import Count
from nested_jax.data.tasks import TASKS
from nested_jax.errors import UserError

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from grid import Grid
from networks import NETWORKS

LANGUAGES = ("parity", "aa-star", "abab-star", "anbn", "anbncn", "shuffle-2", "s3", "a5")
VOCABULARY = max(max(TASKS[name].tokens, TASKS[name].labels) for name in LANGUAGES)
"""Tokens and labels of all networks, so that one program trains several of them, each on its own language."""


@dataclass(frozen=True)
class Config(Grid):
    """Train networks on formal languages and word problems of groups, test them on longer words."""

    networks: tuple[str, ...] = (
        "hope exact, chunk 16",
        "hope exact, chunk 64",
        "hope exact without erase, chunk 16",
        "hope exact with momentum, chunk 16",
        "hope, chunk 16",
        "hope, chunk 64",
        "hope, chunk 1",
        "hope-attention",
        "titans, chunk 16",
        "gated-delta, rates to 2",
        "gated-delta",
        "transformer",
        "lstm",
    )
    """Names of `networks.NETWORKS`."""
    tasks: tuple[str, ...] = LANGUAGES
    """Names of `nested_jax.data.tasks.TASKS`, some of these."""
    shortest: Count = 2
    """Length of the shortest words."""
    longest: Count = 50
    """Length of the longest words in training."""

    def __post_init__(self):
        super().__post_init__()
        flags.check(self, "networks", "tasks", "seeds", "rates")
        flags.check_known(self, "networks", NETWORKS)
        flags.check_known(self, "tasks", LANGUAGES)
        if self.shortest > self.longest:
            raise UserError(f"--shortest {self.shortest} is above --longest {self.longest}: change one")

    @property
    def bins(self) -> tuple[tuple[int, int], ...]:
        """Lengths of the test words: those of training, up to twice and up to three times as long."""
        return tuple((self.longest * i + 2 if i else self.shortest, self.longest * (i + 1)) for i in range(3))
