"""Held-out sequences of a task: how many labels, and sequences, a model has right, at the trained lengths and beyond."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_jax.data import Batch
from nested_jax.data.tasks import score, task
from nested_jax.models.config import ModelConfig
from nested_jax.models.language_model import apply, init_state
from nested_jax.parallel import processes
from nested_jax.train.config import TrainConfig
from nested_jax.train.layers import layer_surprise
from nested_jax.train.state import assert_fits
from nested_jax.typing import Array, Float, Int, PyTree

_ROWS = 16  # sequences in a call, where batches are smaller
SLOT_BYTES = 100  # most that drawing a sequence takes for each of its slots


def held_out_rng(number: int) -> np.random.Generator:
    """Of a range of lengths. Batches of training are of (seed, i) without a spawn key, so none has the same numbers."""
    return np.random.default_rng(np.random.SeedSequence(number, spawn_key=(1,)))


class TaskScores:
    """Scores at three ranges of lengths: those of training, and beyond them up to twice and three times the longest.

    Args:
        config: of the run. The sequences depend on its task, lengths and `eval_sequences` alone.

    Raises:
        UserError: the task has no sequences of some range, or a batch does not fit in memory.
    """

    lengths: list[tuple[int, int]]
    """The shortest and the longest length of each range."""

    def __init__(self, config: TrainConfig):
        window, model, own = config.window, config.model, task(config.task or "")
        self.lengths = [(config.shortest, window), (window + 2, 2 * window), (2 * window + 2, 3 * window)]
        self._number, self._rows = config.eval_sequences, min(max(config.batch_size, _ROWS), config.eval_sequences)
        activations = 4 * self._rows * 3 * window * (model.vocabulary + model.layers * model.width)
        assert_fits(f"{self._rows} sequences of {3 * window}", activations)
        assert_fits(f"--eval-sequences {self._number} of {3 * window}", SLOT_BYTES * self._number * 3 * window)
        self._sets = [
            own.sample(held_out_rng(i), self._number, shortest, longest)
            for i, (shortest, longest) in enumerate(self.lengths)
        ]
        self._read, self._surprise = jax.jit(_reading(model)), jax.jit(layer_surprise(model))

    def compile(self, params: PyTree) -> None:
        """Compiles what `measure` runs, by the first batch of each range."""
        for whole in self._sets:
            self._read(params, next(self._pieces(whole)))

    def measure(self, params: PyTree, stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Fractions of right labels and of right sequences, and the loss.

        Args:
            params: of the model.
            stop: is asked before each batch.

        Returns:
            "heldout_right_labels_N" and "heldout_right_sequences_N" of the ranges N = 1, 2, 3, and "heldout_loss" of the
            first one, in nats per label; None if `stop()` became true on the way.
        """
        row: dict[str, float] = {}
        for n, whole in enumerate(self._sets, 1):
            nats, predicted = 0.0, []
            for piece in self._pieces(whole):
                if stop():
                    return None
                loss, labels = self._read(params, piece)
                nats, predicted = nats + float(loss), [*predicted, processes.whole(labels)]
            if n == 1:
                row["heldout_loss"] = nats / float(whole.weights.sum())
            right = score(np.concatenate(predicted)[: self._number], whole)
            row[f"heldout_right_labels_{n}"], row[f"heldout_right_sequences_{n}"] = right
        return row

    def layer_surprise(self, params: PyTree) -> dict[str, float]:
        """`train.layers.layer_surprise` on the first batch."""
        numbers = self._surprise(params, None, next(self._pieces(self._sets[0])))
        return {name: float(number) for name, number in numbers.items()}

    def table(self, row: dict[str, Any]) -> list[tuple[tuple[int, int], float, float]]:
        """(lengths, right labels, right sequences) of each range in a row of `measure`."""
        of = lambda n: (row[f"heldout_right_labels_{n}"], row[f"heldout_right_sequences_{n}"])
        return [(lengths, *of(n)) for n, lengths in enumerate(self.lengths, 1)]

    def _pieces(self, whole: Batch) -> Iterator[Batch]:
        """Batches of equal numbers of rows, the last one filled up with rows that have no labels."""
        rows = -(-self._number // self._rows) * self._rows
        filled = Batch(*(np.pad(array, [(0, rows - self._number), (0, 0)]) for array in whole))
        filled.reset[:, 0] = True
        for start in range(0, rows, self._rows):
            yield Batch(*(array[start : start + self._rows] for array in filled))


def _reading(model: ModelConfig) -> Callable[[PyTree, Batch], tuple[Float[Array, ""], Int[Array, "B T"]]]:
    """(parameters, batch) -> summed loss in nats, likeliest labels."""

    def read(params, batch):
        rows, length = batch.tokens.shape
        fast = init_state(model, params, rows, max_length=length)
        logits, _ = apply(model, params, batch.tokens, fast, reset=batch.reset, multiple=length)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch.targets)
        return (losses * batch.weights).sum(), logits.argmax(axis=-1)

    return read
