"""The config of fidelity/run.py; its fields are the flags."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import optax

from nested_jax import optim, preset
from nested_jax.checks import Count, Positive
from nested_jax.errors import UserError
from nested_jax.train.optimizer import MATRICES

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from flags import Rates, Seed, Seeds
from record import Runs
from sequences import adamw

Rule = Callable[[optax.Schedule], optax.GradientTransformation]


class Row(NamedTuple):
    """A model of tiny size and its optimizer; on parity a network of the same mixer."""

    of: str
    """The row that this one is compared with, itself for none."""
    preset: str
    changes: dict[str, Any]
    """Fields of its `ModelConfig`."""
    rule: Rule | None = None
    """An optimizer, whose rate is chosen on the tuning seed; None: AdamW at the usual rates."""


def _layers() -> dict[str, Row]:
    raw, unclipped = {"values": "raw"}, dataclasses.replace(preset("tiny-hope-attention").cms, clip=0.0)
    changes: dict[str, dict[str, dict[str, Any]]] = {
        "titans": {
            "values of any norm": raw,
            "raw steps": {"step": "raw"},
            "errors of any norm": {"surprise": math.inf},
            "decay to zero": {"retention": "zero"},
            "a sum as momentum": {"damped": False},
        },
        "omega": {
            "values of any norm": raw,
            "errors of any norm": {"surprise": math.inf},
            "errors of the token": {"chunk": 1},
        },
        "linear": {"rates and retention of 1": {"gated": False}},
        "hope-attention": {"CMS not clipped": {"cms": unclipped}},
    }
    rows = {}
    for family, each in changes.items():
        rows[family] = Row(family, f"tiny-{family}", {})
        rows |= {f"{family}, {name}": Row(family, f"tiny-{family}", fields) for name, fields in each.items()}
    return rows


def _optimizers() -> dict[str, Row]:
    matrices, sums = {"dimension_numbers": MATRICES}, {"average": False, "nesterov": False}

    def scaled(scale: Callable[..., optax.GradientTransformation], **options: Any) -> Rule:
        return lambda rate: optax.chain(scale(**matrices, **options), optax.scale_by_learning_rate(rate))

    def orthogonal(make: Callable[..., optax.GradientTransformation], scale: float = 1.0, **options: Any) -> Rule:
        of_matrices = lambda rate: lambda step: scale * rate(step)
        return lambda rate: make(of_matrices(rate), consistent_rms=0.2, vectors=adamw(rate), **matrices, **options)

    gradient = partial(optim.newton_schulz, form="gradient")
    rules = {
        "Muon": orthogonal(optim.nonlinear_momentum),
        "Muon, a sum": orthogonal(optim.nonlinear_momentum, **sums),
        "Muon, Newton-Schulz as gradient descent": orthogonal(optim.nonlinear_momentum, nonlinearity=gradient),
        "M3": orthogonal(optim.m3, scale=0.001),  # it divides by the gradients' size, here about that
        "M3, sums": orthogonal(optim.m3, scale=0.001, **sums),
        "delta momentum": scaled(optim.scale_by_delta_momentum),
        "delta momentum, raw gradients": scaled(optim.scale_by_delta_momentum, normalize=False),
        "deep momentum": scaled(optim.scale_by_deep_momentum),
        "deep momentum, decay to zero": scaled(optim.scale_by_deep_momentum, retention="zero"),
        "Adam": optim.adam_memory,
        "Adam, sums": partial(optim.adam_memory, average=False),
    }
    return {name: Row(name.partition(", ")[0], "tiny-transformer", {}, rule) for name, rule in rules.items()}


ROWS = _layers() | _optimizers()
"""Choices that no row of experiments/ablation has: of other layers than Hope's, of the CMS, and of optimizers."""
TASKS = ("parity", "text")
NOT_MADE = {(name, "parity") for name, row in ROWS.items() if row.of == "hope-attention"}
"""Parity's networks have no CMS that learns in context."""


@dataclass(frozen=True)
class Config(Runs):
    """What each other choice than the paper's does, on text and on parity."""

    rows: tuple[str, ...] = tuple(ROWS)
    """What is changed; optimizers train tiny-transformer on text, and gated delta with rates to 2 on parity."""
    tasks: tuple[str, ...] = TASKS
    """text: held-out bits per byte of the first command's text; parity: trained on lengths 2-50, tested to 150."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of the parameters and of the training data."""
    rates: Rates = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Learning rates that every optimizer tries on each task, with the tuning seed."""
    tuning_seed: Seed = 100
    """Seed of the tries' parameters and training data."""
    text_steps: Count = 140
    """Updates on text, half of the first command's."""
    steps: Count = 800
    """Updates on parity."""
    rate: Positive = 0.003
    """Learning rate on parity of rows about a layer."""
    chunk: Count = 16
    """Chunk on parity."""

    def __post_init__(self):
        flags.check(self, "rows", "tasks", "seeds", "rates")
        flags.check_known(self, "tasks", TASKS)
        flags.check_known(self, "rows", ROWS)
        for name in self.rows:
            if (base := ROWS[name].of) not in self.rows:
                raise UserError(f"--rows {name!r}: give {base!r} too, which it is compared with")
        flags.check_tuning(self)
