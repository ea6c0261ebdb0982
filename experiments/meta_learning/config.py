"""What is run: a dataclass for each experiment, whose fields are its flags."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from nested_jax.errors import UserError

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags

CHUNKS = 50  # means of a meta-training loss that are kept


@dataclass(frozen=True)
class Sine:
    """Sines from few points, by gradient descent from a start that is meta-learned, pretrained or random."""

    fresh: bool = False
    """Replace results of other flags."""
    shots: tuple[int, ...] = (1, 5, 10)
    """K: points of a task that are learned from. As many others are the meta-learner's."""
    amplitude: tuple[float, float] = (0.1, 5.0)
    """Amplitudes are uniform in it."""
    phase: tuple[float, float] = (0.0, 3.141592653589793)
    """Phases are uniform in it."""
    inputs: tuple[float, float] = (-5.0, 5.0)
    """Inputs are uniform in it."""
    hidden: tuple[int, ...] = (40, 40)
    """Widths of the hidden layers, of rectified units."""
    rate: float = 0.01
    """Inner learning rate; where it is learned, what it is at first."""
    iterations: int = 20_000
    """Updates of the start."""
    batch: int = 25
    """Tasks of an update."""
    meta_rate: float = 0.001
    """Adam's learning rate."""
    steps: int = 10
    """Steps of gradient descent on a held-out task."""
    test_tasks: int = 1000
    """Held-out tasks, of each seed."""
    tuning_tasks: int = 300
    """Others, on which the rates of starts that have none of their own are chosen."""
    queries: int = 50
    """Other points of a held-out task, whose squared error counts."""
    rates: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1)
    """Learning rates tried on the tuning tasks."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds, of the random starts and all tasks."""

    def check(self) -> None:
        """Raises UserError for the first flag that cannot be."""
        flags.assert_distinct(self, "shots", "rates")
        flags.assert_positive(self, "shots", "hidden", "rate", "batch", "meta_rate", "steps")
        flags.assert_positive(self, "test_tasks", "tuning_tasks", "queries", "rates")
        flags.assert_at_least(self, CHUNKS, "iterations")
        flags.assert_each(self, lambda ends: ends[0] < ends[1], "two numbers that rise", "amplitude", "phase", "inputs")
        flags.assert_seeds(self)


@dataclass(frozen=True)
class DeepMomentum:
    """Small regressions whose inputs are badly scaled, by optimizers that are tuned or meta-learned on other ones."""

    fresh: bool = False
    """Replace results of other flags."""
    geometries: tuple[int, ...] = (1, 4, 0)
    """How many covariances the inputs of tasks can have: that all share, one of so many, or 0, each task its own."""
    inputs: int = 16
    """N: inputs of a task, rows of the matrix that is learned."""
    outputs: int = 8
    """M: outputs."""
    condition: float = 100.0
    """Largest over smallest variance of the inputs, in directions that are rotated at random."""
    noise: float = 0.1
    """Standard deviation of noise on targets."""
    examples: int = 32
    """Examples of a step, fresh ones."""
    steps: int = 30
    """T: steps of a task in meta-training and in tuning."""
    long: int = 300
    """Steps of a held-out task."""
    hidden: int = 64
    """F: hidden units of the deep momentum's memory."""
    iterations: int = 400
    """Updates of what is meta-learned."""
    batch: int = 8
    """Tasks of an update."""
    meta_rate: float = 0.01
    """Adam's largest learning rate; it falls to zero along a cosine."""
    tuning_tasks: int = 16
    """Tasks on which rates and decays are chosen; meta-learning begins with what was chosen."""
    test_tasks: int = 64
    """Held-out tasks, of each seed."""
    rates: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.3, 1.6, 2.0, 2.5, 3.2)
    """Learning rates of momentum that are tried."""
    decays: tuple[float, ...] = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)
    """Decays of momentum that are tried."""
    deep_rates: tuple[float, ...] = (0.1, 0.3, 0.7, 1.3, 2.0, 3.2)
    """Learning rates of deep momentum that are tried."""
    deep_decays: tuple[float, ...] = (0.0, 0.5, 0.9)
    """Decays of its memory that are tried."""
    memory_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Learning rates of its memory that are tried."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds, of covariances, memories and all tasks."""

    def check(self) -> None:
        """Raises UserError for the first flag that cannot be."""
        flags.assert_distinct(self, "geometries", "rates", "decays", "deep_rates", "deep_decays", "memory_rates")
        flags.assert_each(self, lambda n: (n >= 0) & (n < 2**31), "at least 0 and below 2**31", "geometries")
        flags.assert_positive(self, "inputs", "outputs", "examples", "steps", "long", "hidden", "iterations", "batch")
        flags.assert_positive(self, "meta_rate", "tuning_tasks", "test_tasks", "rates", "deep_rates", "memory_rates")
        flags.assert_at_least(self, 1, "condition")
        flags.assert_at_least(self, 0, "noise")
        flags.assert_each(self, lambda decay: (decay >= 0) & (decay < 1), "at least 0 and below 1", "decays", "deep_decays")
        flags.assert_seeds(self)
        if self.long < self.steps:
            raise UserError(f"--long {self.long} must be at least --steps {self.steps}")
