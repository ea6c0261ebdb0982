"""Held-out text: a model's bits per byte."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax

from nested_jax.data import Tokenizer, heldout_batches
from nested_jax.models.language_model import init_state
from nested_jax.train.config import TrainConfig
from nested_jax.train.layers import layer_surprise
from nested_jax.train.state import assert_fits
from nested_jax.train.step import cross_entropy
from nested_jax.typing import PyTree


class HeldOut:
    """Documents cut into batches; `text_bytes` is their length."""

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Tokenizer,
        documents: Sequence[bytes],
    ):
        slots, model = config.batch_size * config.window, config.model
        activations = 4 * slots * (model.vocabulary + model.layers * model.width)
        assert_fits(f"a batch of {config.batch_size} windows of {config.window}", activations)
        self._batches = heldout_batches(
            documents,
            tokenizer,
            window=config.window,
            batch_size=config.batch_size,
            alignment=config.model.alignment,
            carry=config.carry,
        )
        self.text_bytes = self._batches.text_bytes
        start = lambda params: init_state(model, params, config.batch_size, max_length=config.window)
        self._start = jax.jit(start) if config.carry else lambda params: None
        self._step = jax.jit(partial(cross_entropy, model))
        self._surprise = jax.jit(layer_surprise(model))
        self._carry = config.carry

    @property
    def targets(self) -> int:
        """Number of targets, over which the loss is a mean."""
        return self._batches.targets

    def compile(self, params: PyTree) -> None:
        """Compiles what `bits_per_byte` runs, by its first two batches: those after them compile nothing."""
        batches = itertools.count()
        self.bits_per_byte(params, stop=lambda: next(batches) == 2)

    def bits_per_byte(self, params: PyTree, stop: Callable[[], bool] = lambda: False) -> float | None:
        """Summed cross-entropy of the text in bits, over its bytes; None if `stop()` became true on the way."""
        nats, fast = 0.0, self._start(params)
        for batch in self._batches:
            if stop():
                return None
            loss, after = self._step(params, fast, batch)
            fast = after if self._carry else None
            nats += float(loss)
        return nats / math.log(2) / self.text_bytes

    def layer_surprise(self, params: PyTree) -> dict[str, float]:
        """`train.layers.layer_surprise` on the first batch."""
        numbers = self._surprise(params, self._start(params), next(iter(self._batches)))
        return {name: float(number) for name, number in numbers.items()}


def first_bytes(documents: Sequence[bytes], limit: int) -> Iterator[bytes]:
    """Documents up to `limit` bytes in all, the last one cut between two characters.

    >>> list(first_bytes([b"abc", "d\\u00e9f".encode(), b"ghi"], 5))
    [b'abc', b'd']
    """
    for text in documents:
        if len(text) >= limit:
            yield text[:limit].decode(errors="ignore").encode()
            return
        yield text
        limit -= len(text)
