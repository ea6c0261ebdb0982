"""What an optimizer costs: time of updates in turns, bytes of its state."""

from __future__ import annotations

import functools
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


def costs(updates: dict[str, tuple[Callable, PyTree, PyTree]], together: int, rounds: int) -> list[dict]:
    """A row for each optimizer: seconds of an update, so many timed together, and bytes of state for every parameter.

    Of each there are a compiled (params, state) -> (params, state), and those it begins with.
    """

    def call(update, *carry):
        for _ in range(together):
            carry = update(*carry)
        return carry

    times = in_turns({name: functools.partial(call, *one) for name, one in updates.items()}, rounds)
    size = {name: state_bytes(state, params) for name, (_, params, state) in updates.items()}
    return [
        {"optimizer": name, "seconds": times[name] / together, "state_bytes_per_parameter": size[name]} for name in updates
    ]


def state_bytes(state: PyTree, params: PyTree) -> float:
    """Bytes of an optimizer's state for every parameter."""
    count = lambda tree, size: sum(size(leaf) for leaf in jax.tree.leaves(tree))
    return count(state, lambda leaf: leaf.nbytes) / count(params, lambda leaf: leaf.size)
