"""Running values of a run's loss and updates, which show that it diverges while its numbers are finite."""

from __future__ import annotations

import math
from typing import NamedTuple

_UPDATES = 10  # that a running value averages over


class Running(NamedTuple):
    """Running values after some updates; a JSON value once it is a dict.

    >>> values = Running()
    >>> for loss in (2.0, 2.0, 2.0, 9.0):
    ...     values = values.after(loss, update_norm=0.1)
    >>> values.loss, values.least, values.rise(vocabulary=256)
    (3.75, 2.0, 1.75)
    """

    steps: int = 0
    loss: float = 0.0
    """Nats per target: the mean of the first updates, then a decaying one."""
    least: float = math.inf
    """The least value that `loss` has had."""
    best: int = 0
    """The update of that value. The parameters before it are good ones."""
    update_norm: float = 0.0
    """The same mean of the norms of the updates."""

    def after(self, loss: float, update_norm: float) -> Running:
        """The values after one more update."""
        steps = self.steps + 1
        share = 1 / min(steps, _UPDATES)
        mean = self.loss + share * (loss - self.loss)
        norm = self.update_norm + share * (update_norm - self.update_norm)
        least, best = (mean, steps) if mean <= self.least else (self.least, self.best)
        return Running(steps, mean, least, best, norm)

    def rise(self, vocabulary: int) -> float:
        """By how many nats the loss is above its least value or, after the first updates, above that of a uniform guess."""
        least = self.least if self.steps < _UPDATES else min(self.least, math.log(vocabulary))
        return self.loss - least
