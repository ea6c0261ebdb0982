"""Cost of an optimizer: time of an update and bytes of its state."""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from nested_jax.typing import PyTree

sys.path.insert(1, str(Path(__file__).parents[1]))
from timing import alternate


def costs(updates: dict[str, tuple[Callable, PyTree, PyTree]], together: int, rounds: int) -> list[dict]:
    """A row for each optimizer: median seconds of an update, and bytes of state for every parameter.

    Args:
        updates: of each optimizer a compiled (params, state) -> (params, state), params and state.
        together: updates that are timed as one.
        rounds: rounds in which every optimizer is timed once.
    """

    def call(update, *carry):
        for _ in range(together):
            carry = update(*carry)
        return carry

    times = alternate({name: functools.partial(call, *one) for name, one in updates.items()}, rounds)
    return [
        {
            "optimizer": name,
            "seconds": statistics.median(times[name]) / together,
            "state_bytes_per_parameter": state_bytes(state, params),
        }
        for name, (_, params, state) in updates.items()
    ]


def state_bytes(state: PyTree, params: PyTree) -> float:
    """Bytes of an optimizer's state for every parameter."""
    count = lambda tree, size: sum(size(leaf) for leaf in jax.tree.leaves(tree))
    return count(state, lambda leaf: leaf.nbytes) / count(params, lambda leaf: leaf.size)
