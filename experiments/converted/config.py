"""The config of converted/run.py; its fields are the flags."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_jax.checks import Count
from nested_jax.errors import UserError

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from flags import Rates
from record import Runs

FROZEN = "frozen"
FORMS: dict[str, dict[str, Any]] = {
    FROZEN: {"way": "frozen"},
    "deltas, 6 blocks": {"way": "deltas", "periods": (512, 64), "blocks": 6},
    "deltas, 2 blocks": {"way": "deltas", "periods": (512, 64), "blocks": 2},
    "deltas, 6 blocks, every 64": {"way": "deltas", "periods": (64,), "blocks": 6},
    "split, 6 blocks": {"way": "split", "periods": (512, 64), "blocks": 6},
}
"""Arguments of `convert`."""


@dataclass(frozen=True)
class Config(Runs):
    """Does a pretrained Transformer that learns while it reads predict the second half of a document better?"""

    source: str = ""
    """The model: a GGUF file, or a folder with safetensors and tokenizer.json."""
    text: str = "stdlib"
    """Documents, as of `nested-jax train --data`: those for training choose a form and its rate, held-out ones are read."""
    forms: tuple[str, ...] = tuple(FORMS)
    """Names of `config.FORMS`."""
    rates: Rates = (0.3, 3.0, 30.0)
    """Inner learning rates that every form tries."""
    tokens: Count = 2048
    """Tokens of a document that are read; shorter documents are left out."""
    tuning: Count = 3
    """Documents that forms and rates are chosen on."""
    documents: Count = 20
    """Held-out documents."""

    def __post_init__(self):
        flags.check(self, "forms", "rates")
        flags.check_known(self, "forms", FORMS)
        if FROZEN not in self.forms or len(self.forms) < 2:
            raise UserError(f"--forms {' '.join(map(repr, self.forms))}: give {FROZEN} and one or more that learn")
        if self.tokens % 512:
            raise UserError(f"--tokens {self.tokens}: give a multiple of 512, the longest period")
        if self.documents < 2:
            raise UserError(f"--documents {self.documents}: give two or more, for an interval")
