"""What a run learns from, as the training loop sees it: text or a synthetic task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from nested_jax.data import Batch
from nested_jax.train.config import TrainConfig
from nested_jax.train.report import Outcome
from nested_jax.typing import PyTree


class Batches(Protocol):
    """Batches without end, of the rows that this process reads and `window` slots, whose position can be saved."""

    def __next__(self) -> Batch:
        """The next batch."""
        ...

    def get_state(self) -> Any:
        """The position: a small JSON dict, which those of other processes can be added to."""
        ...

    def set_state(self, state: Any) -> None:
        """Goes to a position."""
        ...


class Source(Protocol):
    """Batches to learn from, an evaluation, and words about both."""

    @property
    def batches(self) -> Batches:
        """What updates read."""
        ...

    @property
    def name(self) -> str:
        """What it is, for errors."""
        ...

    @property
    def fingerprint(self) -> str:
        """A digest of the data: a run is resumed with the same."""
        ...

    @property
    def unit(self) -> str:
        """What a target is, in the plural."""
        ...

    def save(self, folder: Path) -> None:
        """Writes what a run folder keeps of it."""
        ...

    def lines(self) -> list[str]:
        """Words for the start of a run; the first one goes on from the number of tokens of an update."""
        ...

    def text_bytes(self, batch: Batch) -> float:
        """Bytes of text that a batch's targets stand for; 0 where they are none."""
        ...

    def numbers(self, bits: float, text_bytes: float, targets: int) -> dict[str, float]:
        """Numbers of an update, besides its loss.

        Args:
            bits: its summed loss.
            text_bytes: that its targets stand for.
            targets: seen in training so far.
        """
        ...

    def compile(self, params: PyTree) -> None:
        """Compiles what `evaluate` runs."""
        ...

    def evaluate(self, params: PyTree, stop: Callable[[], bool]) -> dict[str, float] | None:
        """A row of numbers, "heldout_loss" among them; None where `stop()` became true on the way."""
        ...

    def layer_surprise(self, params: PyTree) -> dict[str, float]:
        """`train.layers.layer_surprise` on the first batch of the evaluation."""
        ...

    def summary(self, row: dict[str, Any]) -> str:
        """The numbers of an evaluation in words."""
        ...

    def report(self, folder: Path, params: PyTree, rows: list[dict[str, Any]], targets: int) -> Outcome:
        """Draws the figures of a finished run in its folder, and says what came of it.

        Args:
            folder: the run folder.
            params: the last ones.
            rows: of metrics.jsonl; the last one with "heldout_loss" is that of the last step.
            targets: seen in training.
        """
        ...

    def farewell(self, folder: Path) -> str:
        """What to do with the finished run in a folder."""
        ...


def open_source(config: TrainConfig, folder: Path | None, rows: Sequence[int] | None = None) -> Source:
    """Opens what a config learns from.

    Args:
        config: of the run.
        folder: the folder of a run to resume or to start from, which may have a tokenizer; None for a new run.
        rows: of a batch, which this process reads; None: all.

    Returns:
        The task of the config, else its text.

    Raises:
        UserError: data, sizes and model do not fit together.
    """
    if config.task is not None:
        from nested_jax.train.task import TaskSource

        return TaskSource(config, rows)
    from nested_jax.train.text import open_text

    return open_text(config, folder, rows)
