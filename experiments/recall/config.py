"""The config of recall/run.py; its fields are the flags."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from nested_jax.checks import Count
from nested_jax.data.tasks import MQAR, TASKS, Task

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from flags import Counts
from grid import Grid
from networks import NETWORKS

PAIRS: dict[str, Task] = {f"mqar, {pairs} pairs": MQAR(pairs, vocabulary=8 * pairs) for pairs in (4, 8, 16, 32, 64)}
MAD: dict[str, Task] = {name: task for name, task in TASKS.items() if name.startswith("mad-")}
RECALL: dict[str, Task] = {**PAIRS, **MAD, "passkey": TASKS["passkey"]}


@dataclass(frozen=True)
class Config(Grid):
    """Train networks on recall: MQAR, the six MAD tasks, a passkey at up to 64 times the trained length.

    MQAR's sequences have 8 tokens a pair, of a vocabulary of 8 a pair.
    """

    networks: tuple[str, ...] = (
        "hope exact, chunk 16",
        "hope exact, chunk 64",
        "hope, chunk 16",
        "hope, chunk 64",
        "titans, chunk 16",
        "gated-delta, rates to 2",
        "gated-delta",
        "transformer",
        "lstm",
    )
    """Names of `networks.NETWORKS`."""
    tasks: tuple[str, ...] = tuple(RECALL)
    """Names of `RECALL`."""
    steps: Count = 2000
    """Updates."""
    batch_size: Count = 32
    """Sequences of an update."""
    longest: Count = 128
    """Tokens of the MAD tasks, and of the passkey in training."""
    multiples: Counts = (1, 4, 16, 64)
    """Lengths that a passkey is read at, in multiples of the trained one."""
    sequences: Count = 128
    """Test sequences in each bin."""

    def __post_init__(self):
        super().__post_init__()
        flags.check(self, "networks", "tasks", "seeds", "rates", "multiples")
        flags.check_known(self, "networks", NETWORKS)
        flags.check_known(self, "tasks", RECALL)
        flags.check_rising(self, "multiples")

    def lengths(self, task: str) -> tuple[int, int]:
        """Shortest and longest sequence in training."""
        one = RECALL[task]
        longest = 8 * one.pairs if isinstance(one, MQAR) else self.longest
        return longest, longest

    def vocabulary(self, task: str) -> int:
        """Tokens and labels of the networks of a task, those of all with its lengths: one program trains several."""
        alike = [one for name, one in RECALL.items() if self.bins(name) == self.bins(task)]
        return max(max(one.tokens, one.labels) for one in alike)

    def bins(self, task: str) -> tuple[tuple[int, int], ...]:
        """Lengths of the test sequences."""
        shortest, longest = self.lengths(task)
        return tuple((n * longest, n * longest) for n in self.multiples) if task == "passkey" else ((shortest, longest),)
