"""A synthetic task as what a run learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nested_jax.data import Batch
from nested_jax.data.tasks import task
from nested_jax.errors import UserError
from nested_jax.train import report
from nested_jax.train.config import TrainConfig
from nested_jax.train.state import assert_fits
from nested_jax.train.task_scores import SLOT_BYTES, TaskScores
from nested_jax.typing import PyTree


class TaskBatches:
    """Batch i is drawn from `np.random.default_rng((seed, i))`, so that i is the whole position; of it some rows are taken.

    >>> config = TrainConfig(task="parity", window=8)
    >>> first, again = TaskBatches(config), TaskBatches(config)
    >>> again.set_state(first.get_state())
    >>> bool((next(first).tokens == next(again).tokens).all())
    True
    """

    def __init__(self, config: TrainConfig, rows: Sequence[int] | None = None):
        self._config, self._task, self._next = config, task(config.task or ""), 0
        self._rows = slice(None) if rows is None or len(rows) == config.batch_size else list(rows)

    def __next__(self) -> Batch:
        config = self._config
        rng = np.random.default_rng((config.seed, self._next))
        self._next += 1
        whole = self._task.sample(rng, config.batch_size, config.shortest, config.window)
        return Batch(*(array[self._rows] for array in whole))

    def get_state(self) -> dict[str, int]:
        """The number of the next batch."""
        return {"batch": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a batch."""
        self._next = state["batch"]


class TaskSource:
    """Sequences of `config.shortest` to `config.window` tokens, and others of up to three times as many to evaluate.

    Raises UserError where the task has no sequences of these lengths.
    """

    unit = "labels"

    def __init__(self, config: TrainConfig, rows: Sequence[int] | None = None):
        self._config, self.name = config, f"the data of --task {config.task}"
        assert_fits(f"--batch-size {config.batch_size} of {config.window}", SLOT_BYTES * config.batch_size * config.window)
        try:
            self._scores = TaskScores(config)
            self.batches = TaskBatches(config, rows)
            first = next(TaskBatches(config))
        except UserError as error:
            raise UserError(f"--shortest {config.shortest} and --window {config.window}: {error}") from None
        self.fingerprint = hashlib.blake2b(b"".join(array.tobytes() for array in first), digest_size=8).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes nothing: the config says all."""

    def lines(self) -> list[str]:
        """The lengths."""
        config, lengths = self._config, "; ".join(f"{a} to {b}" for a, b in self._scores.lengths)
        return [
            f"in sequences of {config.shortest} to {config.window}",
            f"{config.task}: {config.eval_sequences:,} sequences held out of each of the lengths {lengths}",
        ]

    def text_bytes(self, batch: Batch) -> float:
        """None."""
        return 0.0

    def numbers(self, bits: float, text_bytes: float, targets: int) -> dict[str, float]:
        """None."""
        return {}

    def compile(self, params: PyTree) -> None:
        """Compiles what `evaluate` runs."""
        self._scores.compile(params)

    def evaluate(self, params: PyTree, stop: Callable[[], bool]) -> dict[str, float] | None:
        """The row of `TaskScores.measure`."""
        return self._scores.measure(params, stop)

    def layer_surprise(self, params: PyTree) -> dict[str, float]:
        """As `Source.layer_surprise`."""
        return self._scores.layer_surprise(params)

    def summary(self, row: dict[str, Any]) -> str:
        """Right labels and right sequences, by length."""
        parts = [f"{a} to {b}: {labels:.1%}, {whole:.1%}" for (a, b), labels, whole in self._scores.table(row)]
        return f"right labels, right sequences of lengths {'; '.join(parts)}"

    def report(self, folder: Path, params: PyTree, rows: list[dict[str, Any]], targets: int) -> report.Outcome:
        """As `Source.report`."""
        measured = [row for row in rows if "heldout_loss" in row]
        labels_right, sequences_right = {}, {}
        for row in measured:
            for (a, b), labels, whole in self._scores.table(row):
                labels_right.setdefault(f"labels, {a} to {b}", []).append((row["step"], labels))
                sequences_right.setdefault(f"sequences, {a} to {b}", []).append((row["step"], whole))
        report.draw(folder, "share that is right", curves=labels_right, dashed=sequences_right)
        table = self._scores.table(measured[-1])
        lines = [f"| {a:,} to {b:,} | {labels:.1%} | {whole:.1%} |" for (a, b), labels, whole in table]
        results = f"""\
Held-out sequences of the trained lengths: **{table[0][1]:.1%} of labels right**, {table[0][2]:.1%} of sequences.

| tokens of a sequence | right labels | right sequences |
|---|---:|---:|
{chr(10).join(lines)}

{self._config.eval_sequences:,} sequences a row; one is right where all its labels are.
The loss at the trained lengths is {measured[-1]["heldout_loss"]:.3f} nats per label.

![right labels and sequences over steps]({report.FIGURE})"""
        return report.Outcome(f"{self._config.task}", results, f"{targets:,}", self.unit)

    def farewell(self, folder: Path) -> str:
        """How to evaluate again."""
        return f"nested-jax eval --run-dir {folder} measures it again"
