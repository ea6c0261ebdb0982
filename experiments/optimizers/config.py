"""What is run: a dataclass for each experiment, whose fields are its flags."""

from __future__ import annotations

from dataclasses import dataclass

from nested_jax.models.vision import VisionConfig


def geometric(low: float, high: float, a_decade: int) -> tuple[float, ...]:
    """Numbers from low to at most high, so many for every factor of ten, to three digits: 0.01, 0.0316, 0.1."""
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
    """omega: how often the valley turns. 0: it is straight and the surface a quadratic."""
    shown: float = 2.0
    """omega of the surface in the figure, one of them."""
    stiffness: float = 10.0
    """k: how steep the valley's sides are."""
    amplitude: float = 1.0
    """a: how far it turns."""
    box: float = 3.0
    """Starts are uniform, r and phi from -box to box."""
    starts: int = 100
    """Starts that count."""
    tuning_starts: int = 100
    """Other starts, on which each optimizer's learning rate and decay are chosen."""
    tolerance: float = 1e-4
    """Value of psi within which a descent has to stay: from there on it has arrived."""
    steps: int = 2000
    """Steps after which it is given up."""
    rates: tuple[float, ...] = geometric(1e-4, 1.0, 6)
    """Learning rates tried."""
    decays: tuple[float, ...] = (
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
    erases: tuple[float, ...] = (0.02, 0.1, 0.5, 1.0)
    """Erasures of delta momentum, each an optimizer of its own. 0 would be momentum."""
    raw_erases: tuple[float, ...] = (1e-6, 1e-4)
    """Erasures of its form without normalised gradients, the paper's."""
    seed: int = 0
    """Seed of the starts."""


@dataclass(frozen=True)
class Orthogonal:
    """A linear layer learns one task after the other, their inputs in subspaces that are orthogonal or overlap."""

    fresh: bool = False
    """Replace results of other flags."""
    tasks: int = 8
    """Tasks, each taught once. One matrix solves them all."""
    dimension: int = 4
    """Dimensions of a task's subspace; the layer has dimension * (tasks + 1) inputs."""
    outputs: int = 16
    """Outputs of the layer."""
    overlaps: tuple[float, ...] = (0.0, 0.3, 0.7)
    """Cosine of all principal angles between the subspaces of two tasks. 0: they are orthogonal."""
    schedules: tuple[str, ...] = ("constant", "falling")
    """Learning rates: the same at all steps, or falling to zero within every task and begun anew with the next."""
    steps: int = 200
    """Updates for each task."""
    batch: int = 16
    """Examples of an update, fresh ones."""
    condition: float = 10.0
    """Largest over smallest variance of the inputs in a task's subspace."""
    noise: float = 0.1
    """Standard deviation of noise on targets, whose own is about 1."""
    rates: tuple[float, ...] = geometric(1e-5, 10.0, 3)
    """Learning rates tried, by every optimizer in every setting."""
    tuning_seeds: tuple[int, ...] = (100, 101, 102)
    """Seeds on which the learning rate is chosen: the one with the least loss on all tasks at the end."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    """Seeds that count."""
    cost_width: int = 256
    """Rows and columns of the matrix whose updates are timed."""
    cost_updates: int = 64
    """Updates timed together."""
    cost_rounds: int = 9
    """Turns of each optimizer in the timing."""


@dataclass(frozen=True)
class Vision:
    """A small vision Transformer on scikit-learn's digits, by every optimizer. The same command again resumes."""

    fresh: bool = False
    """Run everything anew: results that are there are replaced."""
    optimizers: tuple[str, ...] = ("adamw", "muon", "m3", "m3, second moment")
    """Rules of the matrices in the blocks; AdamW has the rest."""
    steps: int = 300
    """Updates of a run."""
    batch: int = 100
    """Images of an update."""
    warmup: int = 20
    """Updates over which the learning rate grows; it then falls along a cosine to a tenth."""
    weight_decay: float = 0.1
    """Decoupled decay of the matrices."""
    rates: tuple[float, ...] = geometric(1e-5, 0.04, 2)
    """Learning rates tried by every optimizer."""
    tuning_seed: int = 100
    """Seed on which the learning rate is chosen: the one with the least validation loss."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds that count, of weights and batches."""
    validation: int = 297
    """Images of the choice."""
    test: int = 500
    """Images of the result; the rest is trained on."""
    cost_steps: int = 8
    """Steps timed together: in them the slow memory of m3 steps once."""
    cost_rounds: int = 9
    """Turns of each optimizer in the timing."""
    model: VisionConfig = VisionConfig()
    """The model."""


@dataclass(frozen=True)
class Text:
    """Language models on the default text, by every optimizer. The same command again resumes."""

    fresh: bool = False
    """Run everything anew: results that are there are replaced."""
    presets: tuple[str, ...] = ("tiny-hope", "tiny-transformer")
    """Models."""
    optimizers: tuple[str, ...] = ("adamw", "muon", "m3", "continuum")
    """Rules, as of `nested-jax train --optimizer`."""
    steps: int = 100
    """Updates of a run."""
    batch: int = 2
    """Windows B of an update."""
    window: int = 512
    """Tokens T of a window."""
    eval_bytes: int = 2**15
    """Bytes of held-out text that are read at the end."""
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    """Learning rates tried by every optimizer with every model."""
    further: tuple[float, ...] = (0.1, 0.3)
    """Larger ones, tried one by one as long as the largest so far is the best."""
    tuning_seed: int = 100
    """Seed on which the learning rate is chosen."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds that count, of weights and of the order of the text."""
