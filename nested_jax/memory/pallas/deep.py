"""`nested_jax.memory.deep` on tiles: one chunk of a head's two-layer memories.

Tiles of M memories: first layers as one, W_2 (MF, K); second ones apart, W_1^T (F, K) each, so that no lane is empty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from nested_jax.memory import deep as xla
from nested_jax.memory.deep import Rule
from nested_jax.memory.pallas import tiles
from nested_jax.memory.pallas.recurrence import Column, Map, decays, read, write
from nested_jax.memory.pallas.tiles import dot
from nested_jax.memory.recurrence import MemoryState
from nested_jax.numerics import EPSILON
from nested_jax.typing import Array, Float, PyTree

if TYPE_CHECKING:
    from nested_jax.memory.self_modifying import SelfModifyingTitans
    from nested_jax.memory.titans import Titans


class Layers(NamedTuple):
    """Both layers of M memories: a tile (MF, K), and M tiles (F, K). Of a layer's arrays (..., MF, K) and (..., M, F, K)."""

    first: PyTree
    second: PyTree


class Fast(NamedTuple):
    """A head's fast state."""

    weights: Layers
    momentum: Layers | None


class Strengths(NamedTuple):
    """Gates of a chunk's tokens."""

    first: Column
    second: list[Column]
    retain: Column
    momentum: Column | None


def part(x: Float[Array, "C MF"], memory: int, memories: int) -> Float[Array, "C F"]:
    """One memory's hidden units."""
    size = x.shape[1] // memories
    return x[:, memory * size : (memory + 1) * size]


def unit(x: Float[Array, "C K"]) -> Float[Array, "C K"]:
    """x / |x| of every row."""
    return x * jax.lax.rsqrt(tiles.square(x) + EPSILON)


def clip(x: Float[Array, "C K"], largest: float) -> Float[Array, "C K"]:
    """As of `numerics.clip_rows`."""
    if largest >= 1e18:
        return x
    return x * jax.lax.rsqrt(jnp.maximum(tiles.square(x) * max(largest, 1e-18) ** -2, 1.0))


def normalise(x: Float[Array, "C K"], targets: str) -> Float[Array, "C K"]:
    """Targets by the layer's option."""
    return x if targets == "raw" else unit(x) * (x.shape[1] ** 0.5 if targets == "rms" else 1.0)


def forward(weights: Layers, z: Float[Array, "C K"], fast: bool) -> tuple[Array, list[Array], list[Array]]:
    """W_2 z of all memories, silu(W_2 z) and W_1 silu(W_2 z) of each."""
    before, M = dot(z, weights.first, 1, 1, fast), len(weights.second)
    hidden = tiles.rounded(before * jax.nn.sigmoid(before), fast)
    each = [part(hidden, m, M) for m in range(M)]
    return before, each, [dot(h, w, 1, 0, fast) for h, w in zip(each, weights.second, strict=True)]


def learn(
    state: Fast,
    start: Layers,
    keys: Float[Array, "C K"],
    held: tuple[Array, list[Array], list[Array]],
    targets: list[Float[Array, "C K"]],
    strengths: Strengths,
    rule: Rule,
    queries: Float[Array, "C K"],
    fast: bool,
    found: list[Float[Array, "C C"]] | None,
) -> tuple[Fast, Float[Array, "C K"], list[Float[Array, "C C"]]]:
    """One chunk of learning, reads of the last memory, and inverses: see `nested_jax.memory.deep.learn`.

    Args:
        held: `forward(state.weights, keys)`.
        fast: see `tiles.dot`.
        found: see `recurrence.write`.
    """
    before, hidden, second = held
    M, theta = len(hidden), strengths.momentum
    retain = jnp.ones_like(strengths.retain) if rule.retention == "none" else strengths.retain
    decay = decays(retain, theta, fast)
    anchor = start if rule.retention == "initial" else Layers(None, [None] * M)
    momentum = Layers(None, [None] * M) if state.momentum is None else state.momentum

    errors = [keys + held - target for held, target in zip(second, targets, strict=True)]
    clipped = [clip(error, rule.surprise) for error in errors]
    gate = jax.nn.sigmoid(before)
    slope = gate * (1 + before * (1 - gate))
    inner = [
        clip(dot(error, w, 1, 1, fast) * part(slope, m, M), rule.surprise)
        for m, (error, w) in enumerate(zip(clipped, state.weights.second, strict=True))
    ]

    usual = "proximal" if rule.step == "normalised" else rule.step
    exact = rule.errors == "exact"
    push, erase = _gates(keys, strengths.first, retain, theta, rule.erase != "none", usual, rule.damped)
    maps = [
        Map(
            keys,
            jnp.concatenate(inner, axis=1),
            before,
            push,
            erase,
            state.weights.first,
            momentum.first,
            anchor.first,
        )  # fmt: skip
    ]
    for m in range(M):
        main = m == M - 1
        step, error = (rule.step, exact) if main else (usual, False)
        push, erase = _gates(
            hidden[m], strengths.second[m], retain, theta, rule.erase == "layer", step, rule.damped, error
        )  # fmt: skip
        maps.append(
            Map(
                hidden[m],
                keys - targets[m] if error else clipped[m],
                second[m],
                push,
                erase,
                state.weights.second[m],
                momentum.second[m],
                anchor.second[m],
                exact=error,
                turns=error or step != "proximal",
                flipped=True,
            )  # fmt: skip
        )
    written, found = write(maps, decay, fast, found)

    last = lambda x: None if x is None else x[-(x.shape[0] // M) :]
    main = maps[0]._replace(
        weights=last(state.weights.first), momentum=last(momentum.first), anchor=last(anchor.first)
    )  # fmt: skip
    if rule.features == "boundary" or rule.read == "boundary":
        z = main.at(main.weights, queries, fast)
    else:
        lanes = lambda x: None if x is None else part(x, M - 1, M)
        own = written[0]._replace(written=lanes(written[0].written), erased=lanes(written[0].erased))
        z = read(main, own, decay, queries, fast, before=rule.read == "before")
    z = z * jax.nn.sigmoid(z)
    if rule.read == "boundary":
        y = maps[-1].at(maps[-1].weights, z, fast)
    else:
        y = read(maps[-1], written[-1], decay, z, fast, before=rule.read == "before")
    after = Layers(written[0].weights, [w.weights for w in written[1:]])
    pushed = None if state.momentum is None else Layers(written[0].momentum, [w.momentum for w in written[1:]])
    return Fast(after, pushed), queries + y, found


def _gates(inputs, rate, retain, momentum, erase: bool, step: str, damped: bool, exact: bool = False):
    """Write and erase strengths of one layer, see `nested_jax.memory.deep`; None: it does not erase."""
    if step == "proximal":
        rate = rate / (1 + rate * tiles.square(inputs))
    elif step == "normalised":
        rate = rate / (tiles.square(inputs) + 1e-3)
    if step == "normalised" or (exact and step == "proximal"):
        rate = rate * (1 + retain) / 2
    push = rate * (1 - momentum) if momentum is not None and damped else rate
    return push, rate if erase else None


def layers_of(memories: xla.Deep) -> Layers:
    """Memories (..., M, ., .) of a layer, ready to be cut into tiles."""
    first, second = memories
    return Layers(first.reshape(*first.shape[:-3], -1, first.shape[-1]), second.mT)


def fast_of(memories: xla.Deep) -> Fast:
    """The same of its `MemoryState`s."""
    first, second = memories
    momentum = None if first.momentum is None else layers_of(xla.Deep(first.momentum, second.momentum))
    return Fast(layers_of(xla.Deep(first.weights, second.weights)), momentum)


def memories_of(state: Fast) -> xla.Deep:
    """What `fast_of` was given."""

    def untiled(layers: Layers) -> tuple[Array, Array]:
        second = layers.second
        M, F, K = second.shape[-3:]
        return layers.first.reshape(*layers.first.shape[:-2], M, F, K), second.mT

    momentum = (None, None) if state.momentum is None else untiled(state.momentum)
    return xla.Deep(*map(MemoryState, untiled(state.weights), momentum))


def bytes_of(layer: SelfModifyingTitans | Titans, memories: int) -> int:
    """Of a head's fast state."""
    return 8 * memories * layer.hidden * layer.width // layer.heads * (2 if layer.momentum else 1)


LEVEL = (lambda state: state.running), (lambda memories: xla.LevelState(memories, None, jnp.zeros((), jnp.int32)))
"""`Form.of` and `Form.level` of deep memories."""
