"""What an optimizer costs: time of updates in turns, bytes of its state."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax

from nested_jax.typing import PyTree


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, in turns, each turn begun by the next; after one turn that does not count."""
    names, times = list(calls), {name: [] for name in calls}
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            begun = time.perf_counter()
            jax.block_until_ready(calls[name]())
            if turn:
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(own) for name, own in times.items()}


def costs(calls: dict[str, Callable], updates: int, rounds: int, sizes: dict[str, float]) -> list[dict]:
    """A row for each optimizer: seconds of one of a call's updates, bytes of state for every parameter."""
    times = in_turns(calls, rounds)
    return [
        {"optimizer": name, "seconds": times[name] / updates, "state_bytes_per_parameter": sizes[name]} for name in calls
    ]


def state_bytes(state: PyTree, params: PyTree) -> float:
    """Bytes of an optimizer's state for every parameter."""
    count = lambda tree, size: sum(size(leaf) for leaf in jax.tree.leaves(tree))
    return count(state, lambda leaf: leaf.nbytes) / count(params, lambda leaf: leaf.size)
