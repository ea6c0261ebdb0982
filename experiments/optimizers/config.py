"""Configs of the experiments; their fields are the flags."""

from __future__ import annotations

import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from vision_transformer import VisionConfig

from nested_jax import PRESETS
from nested_jax.checks import Count, Interval, NonNegative, Positive
from nested_jax.train.config import TrainConfig

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from flags import Rates, Seed, Seeds

Fraction = Annotated[float, Interval(least=0, most=1)]
RULES = ("adamw", "muon", "m3", "m3, second moment")  # of vision.py
TRAIN_RULES = typing.get_args(typing.get_type_hints(TrainConfig)["optimizer"])


def geometric(low: float, high: float, a_decade: int) -> tuple[float, ...]:
    """Numbers from low to at most high, equally many in every decade, to three digits.

    >>> geometric(0.01, 0.1, 2)
    (0.01, 0.0316, 0.1)
    """
    ratio, values = 10 ** (1 / a_decade), [low]
    while values[-1] * ratio < high * 1.01:
        values.append(values[-1] * ratio)
    return tuple(float(f"{value:.3g}") for value in values)


@dataclass(frozen=True)
class Surface:
    """Steps down the curved valley psi(r, phi) = r^2 + k (r - phi + a sin(omega r))^2 from random starts."""

    fresh: bool = False
    """Replace results of other flags."""
    frequencies: tuple[float, ...] = (0.0, 2.0, 4.0)
    """omega: how often the valley turns. 0: a straight valley, a quadratic."""
    shown: float = 2.0
    """omega of the surface in the figure, one of them."""
    stiffness: NonNegative = 10.0
    """k: how steep the valley's sides are."""
    amplitude: float = 1.0
    """a: how far the valley turns."""
    box: Positive = 3.0
    """Starts are uniform, r and phi from -box to box."""
    starts: Annotated[int, Interval(least=2)] = 100
    """Test starts."""
    tuning_starts: Count = 100
    """Other starts, on which each optimizer's learning rate and decay are chosen."""
    tolerance: Positive = 1e-4
    """A descent has arrived from the step on from which psi stays within this value."""
    steps: Count = 2000
    """Steps of a descent."""
    rates: Rates = geometric(1e-4, 1.0, 6)
    """Learning rates tried."""
    decays: tuple[Fraction, ...] = (
        0.0,
        0.3,
        0.5,
        0.6,
        0.7,
        0.8,
        0.85,
        0.9,
        0.93,
        0.95,
        0.96,
        0.97,
        0.98,
        0.985,
        0.99,
        0.995,
        1.0,
    )
    """Decays tried, of all but plain gradient descent."""
    erases: tuple[NonNegative, ...] = (0.02, 0.1, 0.5, 1.0)
    """Erasures of delta momentum, each an optimizer of its own; 0 is momentum."""
    raw_erases: tuple[NonNegative, ...] = (1e-6, 1e-4)
    """Erasures of its form without normalised gradients, the paper's."""
    seed: Seed = 0
    """Seed of the starts."""

    def __post_init__(self):
        flags.check(self, "frequencies", "rates", "decays")


@dataclass(frozen=True)
class Orthogonal:
    """A linear layer learns tasks in sequence, their inputs in subspaces that are orthogonal or overlap."""

    fresh: bool = False
    """Replace results of other flags."""
    tasks: Annotated[int, Interval(least=2)] = 8
    """Tasks, each trained once. One matrix solves them all."""
    dimension: Count = 4
    """Dimensions of a task's subspace; the layer has dimension * (tasks + 1) inputs."""
    outputs: Count = 16
    """Outputs of the layer."""
    overlaps: tuple[Fraction, ...] = (0.0, 0.3, 0.7)
    """Cosine of all principal angles between the subspaces of two tasks; 0: orthogonal."""
    schedules: tuple[str, ...] = ("constant", "falling")
    """Learning rate schedules: constant, or falling to zero within every task."""
    steps: Count = 200
    """Updates for each task."""
    batch_size: Count = 16
    """Examples of an update, new at each."""
    condition: Annotated[float, Interval(least=1)] = 10.0
    """Largest over smallest variance of the inputs in a task's subspace."""
    noise: NonNegative = 0.1
    """Standard deviation of noise on targets; that of targets is about 1."""
    rates: Rates = geometric(1e-5, 10.0, 3)
    """Learning rates tried, by every optimizer in every setting."""
    tuning_seeds: Seeds = (100, 101, 102)
    """Seeds on which the learning rate is chosen: the one with the least loss on all tasks at the end."""
    seeds: Seeds = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    """Test seeds."""
    cost_width: Count = 256
    """Rows and columns of the matrix whose updates are timed."""
    cost_updates: Count = 64
    """Updates timed together."""
    cost_rounds: Count = 9
    """Timed rounds."""

    def __post_init__(self):
        flags.check(self, "overlaps", "schedules", "rates", "tuning_seeds", "seeds")
        flags.check_known(self, "schedules", ("constant", "falling"))


@dataclass(frozen=True)
class Vision:
    """Train a small vision Transformer on scikit-learn's digits, by every optimizer. The same command resumes."""

    fresh: bool = False
    """Replace the results, also those of the same flags."""
    optimizers: tuple[str, ...] = RULES
    """Rules of the matrices in the blocks; the rest is trained by AdamW."""
    steps: Count = 300
    """Updates of a run."""
    batch_size: Count = 100
    """Images of an update."""
    warmup: Count = 20
    """Updates over which the learning rate grows; it then falls along a cosine to a tenth."""
    weight_decay: NonNegative = 0.1
    """Decoupled decay of the matrices."""
    rates: Rates = geometric(1e-5, 0.04, 2)
    """Learning rates tried by every optimizer."""
    tuning_seed: Seed = 100
    """Seed on which the learning rate is chosen: the one with the least validation loss."""
    seeds: Seeds = (0, 1, 2, 3, 4)
    """Test seeds, of weights and batches."""
    validation: Count = 297
    """Images on which the learning rate is chosen."""
    test: Count = 500
    """Images of the result; all other images are trained on."""
    cost_steps: Count = 8
    """Steps timed together; the slow memory of m3 steps once in 8."""
    cost_rounds: Count = 9
    """Timed rounds."""
    model: VisionConfig = VisionConfig()
    """The model."""

    def __post_init__(self):
        flags.check(self, "optimizers", "rates", "seeds")
        flags.check_known(self, "optimizers", RULES)


@dataclass(frozen=True)
class Text:
    """Train language models on the default text, by every optimizer. The same command resumes."""

    fresh: bool = False
    """Replace the results, also those of the same flags."""
    presets: tuple[str, ...] = ("tiny-hope", "tiny-transformer")
    """Models."""
    optimizers: tuple[str, ...] = ("adamw", "muon", "m3", "continuum")
    """Rules, as of `nested-jax train --optimizer`."""
    steps: Count = 100
    """Updates of a run."""
    batch_size: Count = 2
    """Windows B of an update."""
    window: Count = 512
    """Tokens T of a window."""
    eval_bytes: Count = 2**15
    """Bytes of held-out text on which a run is evaluated at its end."""
    rates: Rates = (1e-3, 3e-3, 1e-2, 3e-2)
    """Learning rates tried by every optimizer with every model."""
    further: Rates = (0.1, 0.3)
    """Larger rates, tried in turn while the largest tried is the best."""
    tuning_seed: Seed = 100
    """Seed on which the learning rate is chosen."""
    seeds: Seeds = (0, 1, 2, 3, 4)
    """Test seeds, of weights and of the order of the text."""

    def __post_init__(self):
        flags.check(self, "presets", "optimizers", "rates", "seeds")
        flags.check_known(self, "presets", PRESETS)
        flags.check_known(self, "optimizers", TRAIN_RULES)
