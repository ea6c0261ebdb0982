"""Softmax attention, full and sliding-window: the non-parametric memories (NL Eq. 62-63).

    y_t = sum_i softmax_i(q_t . k_i / sqrt(K)) v_i        over i <= t of the same document (and i > t - window)

They solve their objective anew for every query, so their update frequency is infinite and their state is the tokens
themselves: keys, values and how long each row's document is so far. Positions are rotary and count from its first token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.checks import Count, Positive, check_fields, check_key
from nested_jax.description import Description
from nested_jax.errors import UserError
from nested_jax.level import Level
from nested_jax.memory.passing import read_spread
from nested_jax.memory.projections import init_qkv, qkv
from nested_jax.memory.splash import fits, splash
from nested_jax.memory.stream import bounded, check_call, check_sizes, check_tokens
from nested_jax.numerics import BATCH, HEADS, TOKENS, devices_along, lay, mesh_divides, normal, upcast, vary
from nested_jax.typing import Array, Bool, Float, Int, Position, PyTree

BLOCK = 128  # queries whose scores are in memory at once: few enough for a processor's cache
KEYS = 4096  # keys of a block of queries whose scores are, too
TURN = 2**30  # tokens after which every rotary angle is the same again


class AttentionState(NamedTuple):
    """The last S tokens, a ring: the next one is put into the slot after the newest one's.

    limit: S, where the cache is bounded and the oldest token is overwritten; None where each call makes room for its
    tokens, so that none is ever lost.
    """

    keys: Float[Array, "B S H K"]
    values: Float[Array, "B S H K"]
    document: Int[Array, " B"]  # tokens of each row's document so far, from 1.5 * 2^30 on less by 2^30
    newest: Int[Array, ""] | np.int32  # slot of the last token; -1 before the first one
    limit: Int[Array, ""] | np.int32 | None


@dataclass(frozen=True)
class Attention:
    """Causal softmax attention with rotary positions. The call is that of `SequenceLayer`.

    Args:
        width, heads: D and H, K = D / H.
        window: tokens that a query sees, itself included; None for all that the state's bound leaves.
        implementation: of `jax.nn.dot_product_attention`; None: its choice, on TPUs splash attention for what starts a
            stream. A fused kernel (splash, "cudnn") has no second derivative and no forward mode: a model that
            differentiates through inner gradients needs "xla".
        rotary_base: of the positions' frequencies, see `rotate`.
        biased: whether queries, keys and values have biases.

    Source: NL Eq. 62-63.

    >>> layer = Attention(8, 2, window=4)
    >>> weights = layer.init_weights(jax.random.key(0))
    >>> state, y = layer(weights, layer.init_state(weights, 1), jnp.ones((1, 5, 8)), 0)
    >>> state.keys.shape, y.shape
    ((1, 4, 2, 4), (1, 5, 8))
    """

    width: Count
    heads: Count
    window: Count | None = None
    implementation: Literal["xla", "cudnn"] | None = None
    rotary_base: Positive = 10_000.0
    biased: bool = False

    def __post_init__(self):
        check_fields(self, "Attention: ")
        if self.width % self.heads:
            raise UserError(f"Attention: width {self.width} is not a multiple of heads {self.heads}: change one")

    def init_weights(self, key: Array) -> dict[str, Array]:
        """Learned parameters, float32."""
        check_key("Attention", key)
        project, out = jax.random.split(key)
        D = self.width
        return {
            **init_qkv(project, D),
            "out": normal(out, (D, D)) * D**-0.5,
        } | ({"bias": jnp.zeros((3, D))} if self.biased else {})

    def init_state(self, weights: PyTree, batch_size: int, max_length: int | None = None) -> AttentionState:
        """An empty cache for at most `max_length` tokens, or the window if that is less; None and None: it grows."""
        check_sizes("Attention", batch_size, max_length)
        bounds = [bound for bound in (self.window, max_length) if bound is not None]
        size = min(bounds, default=0)
        empty = jnp.zeros((batch_size, size, self.heads, self.width // self.heads), weights["out"].dtype)
        limit = np.int32(size) if bounds else None
        return AttentionState(empty, empty, jnp.zeros(batch_size, jnp.int32), np.int32(-1), limit)

    def levels(self, weights: PyTree, batch_size: int, max_length: int | None = None) -> tuple[Level, ...]:
        """What learns in it: a level that solves its objective anew for every query; its state counts the tokens."""

        def step(state, tokens, slower):
            cache, position = state
            cache, y = self(weights, cache, tokens[0][:, None], position)
            return (cache, position + 1), y[:, 0]

        description = Description(
            objective="sum_i exp(q.k_i / sqrt(K)) |v_i - M|^2",
            rule="closed form, non-parametric",
            context="keys and values of tokens" + (f", the last {self.window}" if self.window else ""),
            knowledge="direct non-parametric conditioning on the tokens; slow weights make queries, keys and values",
            updates=math.inf,
        )
        init = lambda slower: (self.init_state(weights, batch_size, max_length), jnp.zeros((), jnp.int32))
        name = "sliding-window attention" if self.window else "softmax attention"
        return (Level(init, step, 1, name, description=description),)

    def __call__(
        self,
        weights: PyTree,
        state: AttentionState,
        x: Float[Array, "B T D"],
        position: Position,
        *,
        reset: Bool[Array, "B T"] | None = None,
        aligned: bool = False,
    ) -> tuple[AttentionState, Float[Array, "B T D"]]:
        """Reads T more tokens, see `SequenceLayer`; any position is on its grid."""
        del aligned
        check_call("Attention", (AttentionState, object), weights, state, position)
        check_tokens("Attention", (state.keys.shape[0], self.width), x, reset)
        B, T, D = x.shape
        fresh = not isinstance(position, jax.Array) and position == 0
        state = state if state.limit is not None else reserve(state, T)._replace(limit=None)
        state = vary(state, x, weights, reset, rank=1)
        size = state.keys.shape[1]

        shape = (B, T, self.heads, D // self.heads)
        kernel = fresh and self.implementation is None and fits(shape)
        groups = _groups(shape) if fresh and not kernel else 0
        tokens = TOKENS if kernel or groups else None

        q, k, v = qkv(weights, x, self.heads, tokens)
        step = jnp.arange(T, dtype=jnp.int32)
        at = jnp.asarray(bounded(state.document, TURN))[:, None] + step[None]  # tokens of the document before each token
        if reset is not None:
            start = jax.lax.cummax(jnp.where(reset, step[None], -1), axis=1)
            at = jnp.where(start < 0, at, step[None] - start)
        at = lay(at, BATCH, tokens)
        q, k = (rotate(each, at, self.rotary_base) for each in (q, k))

        last = min(T, size)  # what the ring keeps of the new tokens
        slots = (state.newest + 1 + jnp.arange(T - last, T, dtype=jnp.int32)) % size
        put = lambda cache, new: cache.at[:, slots].set(new[:, T - last :].astype(cache.dtype), unique_indices=True)
        after = AttentionState(put(state.keys, k), put(state.values, v), at[:, -1] + 1, slots[-1], state.limit)
        age = jnp.arange(size, dtype=jnp.int32)
        if T == 1:
            keys, values, where = after.keys, after.values, -((slots[-1] - age) % size)
        elif fresh:
            keys, values, where = k, v, np.arange(T, dtype=np.int32)  # no array of JAX: `read_spread` has it in another mesh
        else:  # the ring in the order of time, then the new tokens
            in_order = lambda cache, new: jnp.concatenate([jnp.roll(cache, -1 - state.newest, 1).astype(x.dtype), new], 1)
            keys, values, where = in_order(state.keys, k), in_order(state.values, v), jnp.concatenate([age - size, step])
        causal = fresh and reset is None and min(size, 2 * BLOCK) >= T
        keys, values = keys.astype(x.dtype), values.astype(x.dtype)
        if kernel:
            y = splash(q, keys, values, step[None] - at, size if size < T else None)
        else:
            y = self._attend(q, keys, values, at, where, size, causal, groups)
        return after, y.reshape(B, T, D) @ weights["out"].astype(x.dtype)

    def _attend(self, q, keys, values, at, where, size, causal, groups):
        """Reads of queries (B, T, H, K), tokens 0 to T - 1 of the call and `at` (B, T) of their documents.

        The keys are of tokens `where` of the call, negative before it, the last T of them the queries' own.
        groups: see `_groups`.
        """
        T = q.shape[1]
        step = jnp.arange(T, dtype=jnp.int32)

        def read(seen, keys, values, q, step, at):
            keys, values = keys[:, seen], values[:, seen]

            def sees(where):
                age = step[:, None] - where[None]
                return (((age >= 0) & (age < size))[None] & (age[None] <= at[..., None]))[:, None]

            if q.shape[1] * keys.shape[1] > BLOCK * KEYS:
                return _in_pieces(q, keys, values, where[seen], sees)
            mask = None if causal else sees(where[seen])
            return jax.nn.dot_product_attention(
                q, keys, values, mask=mask, is_causal=causal, implementation=self.implementation
            )

        if T <= 2 * BLOCK:
            return read(slice(None), keys, values, q, step, at)
        # An eighth of the queries shares a range of keys.
        group, before = T // groups if groups else max(1, T // (8 * BLOCK)) * BLOCK, keys.shape[1] - T
        starts = range(0, T, group)
        seen = [slice(max(0, before + i + 1 - size), before + min(i + group, T)) for i in starts]
        if groups:
            return read_spread(partial(_in_groups, [partial(read, some) for some in seen]), groups, q, keys, values, at)
        cut = [slice(i, min(i + group, T)) for i in starts]
        outputs = [
            _in_blocks(partial(read, some), keys, values, q[:, own], step[own], at[:, own])
            for some, own in zip(seen, cut, strict=True)
        ]
        return jnp.concatenate(outputs, axis=1)


def _groups(shape: tuple[int, ...]) -> int:
    """Groups of queries (B, T, H, K), of which every device along the mesh's sequence reads its part; 0: none are split."""
    T, n = shape[1], devices_along(TOKENS, shape[1])
    groups = n * max(1, 8 // n)
    return groups if n > 1 and T > 2 * BLOCK and T % (groups * n) == 0 and mesh_divides(shape, BATCH, TOKENS, HEADS) else 0


def _in_groups(reads, _, q, at, keys, values, __):
    """What each of `reads` makes of a group of queries, of which this device has its part, see `read_spread`."""
    part = q.shape[2]
    step = jax.lax.axis_index(TOKENS) * part + jnp.arange(part, dtype=jnp.int32)
    each = jax.lax.axis_size(TOKENS) * part
    outputs = [_in_blocks(read, keys, values, q[:, i], i * each + step, at[:, i]) for i, read in enumerate(reads)]
    return jnp.stack(outputs, axis=1)


def _in_blocks(read, keys, values, q, step, at):
    """`read(keys, values, q, step, at)`, a block of queries at a time: only its scores are in memory."""
    some, (B, T) = jax.checkpoint(lambda block: read(keys, values, *block)), q.shape[:2]
    whole, outputs = T // BLOCK * BLOCK, []
    if whole:
        blocks = lambda x: x[:, :whole].reshape(B, -1, BLOCK, *x.shape[2:]).swapaxes(0, 1)
        y = jax.lax.map(some, (blocks(q), step[:whole].reshape(-1, BLOCK), blocks(at)))
        outputs.append(jnp.moveaxis(y, 0, 1).reshape(B, -1, *q.shape[2:]))
    if whole < T:
        outputs.append(some((q[:, whole:], step[whole:], at[:, whole:])))
    return jnp.concatenate(outputs, axis=1)


def _in_pieces(q, keys, values, where, sees):
    """Attention of queries (B, T, H, K), a piece of the keys at a time: the largest score, the sum and the values so far.

    where: place of each key (S,); sees: places (s,) -> whether queries see them (B, 1, T, s).
    """
    B, S, H, K = keys.shape
    more = -S % KEYS
    pieces = lambda x: jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))).reshape(B, -1, KEYS, H, K).swapaxes(0, 1)
    there = jnp.pad(where, (0, more), constant_values=2**31 - 1).reshape(-1, KEYS)  # in the future: nobody sees them
    dtype = upcast(q).dtype
    product, lowest = partial(jnp.einsum, preferred_element_type=dtype), jnp.finfo(dtype).min

    @jax.checkpoint
    def add(carry, piece):
        (largest, total, y), (keys, values, there) = carry, piece
        seen = sees(there)
        scores = jnp.where(seen, K**-0.5 * product("bthk,bshk->bhts", q, keys), lowest)
        now = jax.lax.stop_gradient(jnp.maximum(largest, scores.max(-1)))  # no result depends on it
        chances, fade = jnp.where(seen, jnp.exp(scores - now[..., None]), 0), jnp.exp(largest - now)
        added = product("bhts,bshk->bhtk", chances.astype(values.dtype), values)
        return (now, fade * total + chances.sum(-1), fade[..., None] * y + added), None

    none = jnp.zeros((B, H, q.shape[1]), dtype)
    start = vary((none + lowest, none, jnp.zeros((*none.shape, K), dtype)), q, keys, values, where)
    (_, total, y), _ = jax.lax.scan(add, start, (pieces(keys), pieces(values), there))
    return jnp.moveaxis(y / total[..., None], 1, 2).astype(q.dtype)


def reserve(state: AttentionState, tokens: int) -> AttentionState:
    """A growing cache with room for so many more tokens, bounded from now on."""
    room = lambda cache: jnp.pad(cache, ((0, 0), (0, tokens), (0, 0), (0, 0)))
    keys, values = room(state.keys), room(state.values)
    return state._replace(keys=keys, values=values, limit=np.int32(keys.shape[1]))


def rotate(x: Float[Array, "B T H K"], at: Int[Array, "#B T"], base: float = 10_000.0) -> Float[Array, "B T H K"]:
    """Rotary position embedding: pairs (x_i, x_{i + K/2}) turned by an angle of position x base^(-2i/K).

    The frequencies are rounded to whole numbers of 2^-30 turns a token. So an integer product that overflows is the angle
    modulo a turn, exact at any position before it becomes a float, and positions 2^30 apart have equal angles.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-np.arange(half) / half)
    frequency = (np.rint(frequency / (2 * np.pi) * TURN) * (2**32 // TURN)).astype(np.int32)  # in 2^-32 turns
    first, second, rest = jnp.split(upcast(x), [half, 2 * half], axis=-1)
    turn = at.astype(jnp.int32)[:, :, None, None] * frequency[None, None, None]
    angle = turn.astype(first.dtype) * (2 * np.pi / 2**32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos, rest], axis=-1)
    return turned.astype(x.dtype)
