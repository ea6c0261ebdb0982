"""What a kernel reads, and how a memory is read by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from nested_jax.typing import Array, Float, PyTree


class Tiled(NamedTuple):
    """What a kernel reads: leaves of weights (H, ., .) and state (B, H, ., .) are tiles of a head; with an axis more before
    the last two, lists of tiles."""

    weights: PyTree
    state: PyTree
    wide: list[Float[Array, "B T D"]]  # vectors of the tokens, heads side by side
    gates: Float[Array, "B H N G C"] | None = None  # G numbers a token


class Form(NamedTuple):
    """How a memory is read by a kernel.

    step: one head's chunk on tiles, (weights, state, wide, gates, inverses or None) -> (state, y (C, K), inverses (C, C) of
    triangular systems, those that are worth keeping). start: weights -> the state of a new document, on tiles. lay:
    (weights, memories, tokens) of the layer -> `Tiled`. take: tiles after -> the layer's memories. chunk: C. maps, bytes:
    linear maps of a head, and its state's. hidden: units of a deep memory. of, level: a level's state between chunks -> its
    memories, and back.
    """

    step: Callable
    start: Callable
    lay: Callable[..., Tiled]
    take: Callable[[PyTree], PyTree]
    chunk: int
    heads: int
    maps: int
    bytes: int
    hidden: int | None = None
    of: Callable[[PyTree], PyTree] = lambda state: state
    level: Callable[[PyTree], PyTree] = lambda memories: memories


def rows_of(gates: list[Float[Array, "B T H"]], chunk: int) -> Float[Array, "B H N G C"]:
    """Numbers of tokens as `Tiled.gates`."""
    B, T, H = gates[0].shape
    return jnp.stack(gates).reshape(len(gates), B, T // chunk, chunk, H).transpose(1, 4, 2, 0, 3)
