"""Configs of sine.py and deep_momentum.py; their fields are the flags."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from nested_jax.checks import Count, Interval, NonNegative, Positive
from nested_jax.errors import UserError

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from flags import Counts, Rates, Seeds

Decays = tuple[Annotated[float, Interval(least=0, below=1)], ...]
CHUNKS = 50  # means of the meta-training loss in the results


@dataclass(frozen=True)
class Sine:
    """Sines from few points, by gradient descent from a start that is meta-learned, pretrained or random."""

    fresh: bool = False
    """Replace results of other flags."""
    shots: Counts = (1, 5, 10)
    """K: points of a task in the inner loop; the outer loss is on as many others."""
    amplitude: tuple[float, float] = (0.1, 5.0)
    """Range of amplitudes, uniform."""
    phase: tuple[float, float] = (0.0, 3.141592653589793)
    """Range of phases, uniform."""
    inputs: tuple[float, float] = (-5.0, 5.0)
    """Range of inputs, uniform."""
    hidden: Counts = (40, 40)
    """Widths of the hidden layers (ReLU)."""
    rate: Positive = 0.01
    """Inner learning rate, or its initial value if it is learned."""
    iterations: Annotated[int, Interval(least=CHUNKS)] = 20_000
    """Meta-updates."""
    batch_size: Count = 25
    """Tasks of a meta-update."""
    meta_rate: Positive = 0.001
    """Adam's learning rate."""
    steps: Count = 10
    """Steps of gradient descent on a held-out task."""
    test_tasks: Count = 1000
    """Held-out tasks, of each seed."""
    tuning_tasks: Count = 300
    """Other tasks, on which the rates of starts without a learned rate are chosen."""
    queries: Count = 50
    """Points of a held-out task on which the squared error is measured."""
    rates: Rates = (0.0003, 0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1)
    """Learning rates tried on the tuning tasks."""
    seeds: Seeds = (0, 1, 2, 3, 4)
    """Seeds of the random starts and of all tasks."""

    def __post_init__(self):
        flags.check(self, "shots", "rates", "seeds")
        flags.check_rising(self, "amplitude", "phase", "inputs")


@dataclass(frozen=True)
class DeepMomentum:
    """Ill-conditioned regressions, by optimizers that are tuned or meta-learned on other ones."""

    fresh: bool = False
    """Replace results of other flags."""
    geometries: Seeds = (1, 4, 0)
    """Families of tasks, by their number of input covariances; 0: each task has its own."""
    inputs: Count = 16
    """N: inputs of a task, rows of the matrix that is learned."""
    outputs: Count = 8
    """M: outputs."""
    condition: Annotated[float, Interval(least=1)] = 100.0
    """Largest over smallest variance of the inputs, in directions that are rotated at random."""
    noise: NonNegative = 0.1
    """Standard deviation of noise on targets."""
    examples: Count = 32
    """Examples of a step, new at each."""
    steps: Count = 30
    """T: steps of a task in meta-training and in tuning."""
    long: Count = 300
    """Steps of a held-out task."""
    hidden: Count = 64
    """F: hidden units of the deep momentum's memory."""
    iterations: Count = 400
    """Meta-updates."""
    batch_size: Count = 8
    """Tasks of a meta-update."""
    meta_rate: Positive = 0.01
    """Adam's largest learning rate; it falls to zero along a cosine."""
    tuning_tasks: Count = 16
    """Tasks on which rates and decays are chosen, from which meta-learning starts."""
    test_tasks: Count = 64
    """Held-out tasks, of each seed."""
    rates: Rates = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.3, 1.6, 2.0, 2.5, 3.2)
    """Learning rates of momentum tried."""
    decays: Decays = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
    """Decays of momentum tried."""
    deep_rates: Rates = (0.1, 0.3, 0.7, 1.3, 2.0, 3.2)
    """Learning rates of deep momentum tried."""
    deep_decays: Decays = (0.0, 0.5, 0.9)
    """Decays of its memory tried."""
    memory_rates: Rates = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Learning rates of its memory tried."""
    seeds: Seeds = (0, 1, 2, 3, 4)
    """Seeds of covariances, memories and all tasks."""

    def __post_init__(self):
        flags.check(self, "geometries", "rates", "decays", "deep_rates", "deep_decays", "memory_rates", "seeds")
        if self.long < self.steps:
            raise UserError(f"--long {self.long}: give at least --steps {self.steps}")
