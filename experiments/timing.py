"""Wall-clock times of calls that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax


def seconds(call: Callable[[], object]) -> float:
    """Seconds until the result of one call is ready."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def alternate(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round.

    In a round every call is made once; each round starts with the next call. One round more, the first, is not counted.
    """
    names, times = list(calls), {name: [] for name in calls}
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken = seconds(calls[name])
            if turn:
                times[name].append(taken)
    return times
