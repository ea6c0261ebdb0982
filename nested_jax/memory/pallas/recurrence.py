"""`nested_jax.memory.recurrence` on tiles: one chunk of linear maps that share gates of retention and momentum."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax

from nested_jax.memory.pallas.tiles import column, column_of, decay, dot, inverses, later, rounded, row, row_of, solve
from nested_jax.typing import Array, Float

Column = Float[Array, "C 1"]


class Coasting(NamedTuple):
    """What momentum leaves, as of `nested_jax.memory.recurrence.Decays`."""

    inertia: Column
    inertia_before: Column
    inertia_last: Float[Array, "1 1"]
    last: Column
    coasting: Float[Array, "1 1"]


class Decays(NamedTuple):
    """As of `nested_jax.memory.recurrence.Decays`, of one chunk."""

    retained: Float[Array, "C C"]
    retained_before: Float[Array, "C C"]
    retained_last: Column
    retention: Column
    retention_before: Column
    retention_last: Float[Array, "1 1"]
    carried: Float[Array, "C C"]
    carried_before: Float[Array, "C C"]
    carried_last: Column
    momentum: Coasting | None


def decays(retain: Column, momentum: Column | None, fast: bool) -> Decays:
    """What `write` and `read` make of the gates."""
    C = retain.shape[0]
    retained = decay(retain)
    retention = column_of(retained, 0) * row_of(retain, 0)
    before, last = later(retained, 0.0), column(row_of(retained, C - 1))
    of_retention = (retained, before, last, retention, later(retention, 1.0), row_of(retention, C - 1))
    if momentum is None:
        return Decays(*of_retention, retained, before, last, None)
    coast = decay(momentum)
    from_start = column_of(coast, 0) * row_of(momentum, 0)
    carried, inertia = dot(retained, coast, 1, 0, fast), dot(retained, from_start, 1, 0, False)
    coasting = Coasting(
        inertia, later(inertia, 0.0), row_of(inertia, C - 1), column(row_of(coast, C - 1)), row_of(from_start, C - 1)
    )  # fmt: skip
    return Decays(*of_retention, carried, later(carried, 0.0), column(row_of(carried, C - 1)), coasting)


class Map(NamedTuple):
    """One linear map before a chunk. Weights, momentum and anchor are W (V, K), or W^T where `flipped`."""

    inputs: Float[Array, "C K"]
    errors: Float[Array, "C V"]
    held: Float[Array, "C V"]  # W_0 x
    push: Column  # write strength eta
    erase: Column | None  # erase strength beta; None for none
    weights: Array
    momentum: Array | None = None
    anchor: Array | None = None
    exact: bool = False
    turns: bool = False  # whether strengths go beyond 1
    flipped: bool = False

    def at(self, weights: Array, inputs: Float[Array, "C K"], fast: bool) -> Float[Array, "C V"]:
        """W x of every row."""
        return dot(inputs, weights, 1, 0 if self.flipped else 1, fast)

    @property
    def solves(self) -> bool:
        """Whether what is held before each token takes a triangular system."""
        return self.erase is not None or self.exact

    def pushed(self, fast: bool) -> Float[Array, "C V"]:
        """eta delta; as fast products see it, where there is a system."""
        return rounded(self.push * self.errors, fast and self.solves)

    def outer(self, change: Float[Array, "C V"], fast: bool) -> Array:
        """sum_t change_t x_t^T, as the weights lie."""
        return dot(self.inputs, change, 0, 0, fast) if self.flipped else dot(change, self.inputs, 0, 0, fast)


class Written(NamedTuple):
    """One map after a chunk, and what `read` needs for the states inside it."""

    weights: Array
    momentum: Array | None
    written: Float[Array, "C V"]  # without momentum that and what is erased
    erased: Float[Array, "C V"] | None


def write(
    maps: list[Map], decays: Decays, fast: bool, found: list[Float[Array, "C C"]] | None = None
) -> tuple[list[Written], list[Float[Array, "C C"]]]:
    """The maps after a chunk, in step, and the inverses worth keeping: see `nested_jax.memory.recurrence.write`.

    Writes are the rounded numbers that the right side's product has: else what is held before a token is off by the same
    part at every token of a run of equal keys, which adds up.

    Args:
        found: those inverses, where they are known. An inverse is kept if it is no larger than its map, or if strengths turn
            signs, as it has more than twice the products then.
    """
    lowers, rights, alone = [], [], decays.momentum is None
    solving = [each for each in maps if each.solves]
    for each in solving:
        gram = dot(each.inputs, each.inputs, 1, 1, fast)
        overlap, lower = decays.carried_before * gram, 0.0
        if each.erase is not None:
            lower += decays.retained_before * gram * row(each.erase + each.push if each.exact and alone else each.erase)
        if each.exact and (each.erase is None or not alone):
            lower += overlap * row(each.push)
        right = decays.retention_before * each.held - dot(overlap, each.pushed(fast), 1, 0, fast)
        if each.anchor is not None:
            right += (1 - decays.retention_before) * each.at(each.anchor, each.inputs, fast)
        if each.momentum is not None and decays.momentum is not None:
            right += decays.momentum.inertia_before * each.at(each.momentum, each.inputs, fast)
        lowers.append(lower)
        rights.append(right)
    keep = [each.turns or lower.size <= each.weights.size for each, lower in zip(solving, lowers, strict=True)]
    new = [i for i, kept in enumerate(keep) if found is None or not kept]
    made = inverses([jax.lax.stop_gradient(lowers[i]) for i in new], [solving[i].turns for i in new], fast) if new else []
    known, fresh = iter(found or []), iter(made)
    every = [next(fresh if found is None or not kept else known) for kept in keep]
    solved = iter(solve(lowers, rights, every, fast) if lowers else [])
    return [_finish(each, solved, decays, fast) for each in maps], [x for x, kept in zip(every, keep, strict=True) if kept]


def _finish(each: Map, solved: Iterator[Array], decays: Decays, fast: bool) -> Written:
    written, erased = each.pushed(fast), None
    if each.solves:
        held = next(solved)
        written = written + each.push * held if each.exact else written
        erased = None if each.erase is None else each.erase * held
    if decays.momentum is None and erased is not None:
        written, erased = written + erased, None
    change = decays.carried_last * written
    if erased is not None:
        change += decays.retained_last * erased
    weights = decays.retention_last * each.weights - each.outer(change, fast)
    if each.anchor is not None:
        weights += (1 - decays.retention_last) * each.anchor
    if each.momentum is None or decays.momentum is None:
        return Written(weights, None, written, erased)
    weights += decays.momentum.inertia_last * each.momentum
    momentum = decays.momentum.coasting * each.momentum - each.outer(decays.momentum.last * written, fast)
    return Written(weights, momentum, written, erased)


def read(
    each: Map, chunk: Written, decays: Decays, queries: Float[Array, "C K"], fast: bool, *, before: bool = False
) -> Float[Array, "C V"]:
    """Reads at every token: see `nested_jax.memory.recurrence.read`."""
    retained, carried, retention = decays.retained, decays.carried, decays.retention
    if before:
        retained, carried, retention = decays.retained_before, decays.carried_before, decays.retention_before
    overlap = dot(queries, each.inputs, 1, 1, fast)
    outputs = retention * each.at(each.weights, queries, fast) - dot(carried * overlap, chunk.written, 1, 0, fast)
    if each.anchor is not None:
        outputs += (1 - retention) * each.at(each.anchor, queries, fast)
    if each.momentum is not None and decays.momentum is not None:
        inertia = decays.momentum.inertia_before if before else decays.momentum.inertia
        outputs += inertia * each.at(each.momentum, queries, fast)
    if chunk.erased is not None:
        outputs -= dot(retained * overlap, chunk.erased, 1, 0, fast)
    return outputs
