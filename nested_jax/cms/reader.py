"""Reading with a CMS that learns in context, in calls of any length.

A segment closes when the first token of the next one arrives, before that token is processed: only then are all its targets
known. Inside a call whole segments are read and closed by one run of the nest of levels; what is left stays open, and is
read again from its start when it closes. So any split of the input gives the same result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.cms.chain import CMSConfig
from nested_jax.cms.in_context import Segment, SegmentState, fast_weights, restart, segment_state, varying, with_segment
from nested_jax.level import Level, Nested, run
from nested_jax.numerics import vary
from nested_jax.remat import Checkpoint, fit_checkpoint, scan
from nested_jax.typing import Array, Bool, Float, Int, Position, PyTree


class OpenSegment(NamedTuple):
    """The last segment's tokens, until it closes. How many there are follows from the position."""

    inputs: Float[Array, "B P D"]  # to the blocks that learn
    tokens: Int[Array, "B P"]  # or NOT_LEARNED
    reset: Bool[Array, " B"]  # whether a document starts with it


class InContext(NamedTuple):
    """Fast state of the CMS that learns: the nest of its levels around the sequence layers, and the open segment."""

    levels: Nested | SegmentState
    open: OpenSegment


class _Piece(NamedTuple):
    """Tokens start to end of a call: whole segments (of whole periods of the slowest level, or not), or part of one."""

    start: int
    end: int
    offset: int | Array  # in its segment
    whole: bool
    grouped: bool = False


@dataclass(frozen=True)
class Reader:
    """Reads a stream with a nest of `cms.nest_levels`.

    Args:
        config: of the CMS.
        level: the nest.
        forward: as of `nest_levels`, with a keyword `aligned`: the inputs start on the sequence layers' grid.
        reading: longest chunk of the sequence layers.
        checkpoint: what the backward pass keeps of segments, those of the slowest level.
    """

    config: CMSConfig
    level: Level
    forward: Callable
    reading: int
    checkpoint: Checkpoint

    def init_state(self, batch_size: int, width: int, dtype: jnp.dtype) -> InContext:
        """The state at a document's start."""
        P = self.config.periods[-1]
        inputs, tokens = jnp.zeros((batch_size, P, width), dtype), jnp.zeros((batch_size, P), jnp.int32)
        return InContext(self.level.init(()), OpenSegment(inputs, tokens, jnp.zeros(batch_size, bool)))

    def read(
        self,
        state: InContext,
        position: Position,
        x: Float[Array, "B T D"],
        tokens: Int[Array, "B T"],
        reset: Bool[Array, "B T"] | None,
        multiple: int,
        closes: bool | None = None,
    ) -> tuple[Float[Array, "B T V"], InContext]:
        """Reads T more tokens.

        Args:
            state: of `init_state`, or of the call before.
            position: tokens read before; unknown while tracing, it is a multiple of `multiple`.
            x: inputs of the tokens to the blocks that learn.
            tokens: the same tokens, each the target of the one before it, or NOT_LEARNED.
            reset: true where a row's document starts, on a boundary of segments; None: nowhere.
            multiple: what an unknown position is a multiple of.
            closes: whether the first token closes a segment, where the position is unknown; the tokens lie in one segment,
                or start where one does. None: found while reading.

        Returns:
            (logits, state after the last token).
        """
        P, group, length = self.config.periods[-1], self.config.periods[0], x.shape[1]
        known = not isinstance(position, jax.Array)
        state = InContext(varying(state.levels, x, reset), vary(state.open, x, reset))
        if not known and multiple % P and closes is not None:
            state = self._close_if(closes, state, position, tokens[:, 0])
            return self._read_part(state, _Piece(0, length, position % P, False), position, x, tokens, reset)
        if not known and multiple % P:
            return (self._read_token if length == 1 else self._read_tokens)(state, position, x, tokens, reset)
        offset = int(position) % group if known else 0
        if offset % P == 0:
            state = self._close_if(position != 0 if known or closes is None else closes, state, position, tokens[:, 0])
        outputs = []
        for piece in self._pieces(offset, length, known or multiple % group == 0):
            cut = slice(piece.start, piece.end)
            starts = None if reset is None else reset[:, cut]
            following = tokens[:, piece.end] if piece.end < length else None
            read = self._read_segments if piece.whole else self._read_part
            logits, state = read(state, piece, position + piece.start, x[:, cut], tokens[:, cut], starts, following)
            outputs.append(logits)
        return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1), state

    def _pieces(self, offset: int, length: int, on_groups: bool) -> Iterator[_Piece]:
        """A call's tokens, the first of which is at an offset in a period of the slowest level (or of a segment)."""
        P, group, start = self.config.periods[-1], self.config.periods[0], 0
        while start < length:
            here, rest = offset + start, length - start
            whole = here % P == 0 and rest >= P
            grouped = on_groups and here % group == 0
            size = rest // P * P if whole else min(P - here % P, rest)
            if whole and on_groups and not grouped:
                size = min(size, group - here % group)
            yield _Piece(start, start + size, here % P, whole, grouped)
            start += size

    def _read_segments(self, state: InContext, piece: _Piece, position, x, tokens, reset, following):
        """Whole segments; the last one closes too if the token that follows it is known."""
        B, length, P = *tokens.shape, self.config.periods[-1]
        segments = length // P
        cut = lambda part: part.reshape(B, segments, P, *part.shape[2:]).swapaxes(0, 1)
        last = jnp.zeros_like(tokens[:, 0]) if following is None else following
        context = Segment(
            inputs=cut(x),
            targets=cut(jnp.concatenate([tokens[:, 1:], last[:, None]], axis=1)),
            closed=jnp.asarray((np.arange(segments) < segments - 1) | (following is not None)),
            position=position + P * jnp.arange(segments, dtype=jnp.int32),
            reset=None if reset is None else reset[:, ::P].T,
        )
        level = self.level if reset is None else self._restarting()
        if piece.grouped:
            keep = fit_checkpoint(self.checkpoint, length // self.config.periods[0])
            levels, emitted = run(level, state.levels, context, checkpoint=keep)
            emitted = emitted if type(emitted) is tuple else (emitted,)
        else:
            step = lambda levels, segment: level.step(levels, segment, ())
            one = jax.tree.map(lambda part: part[:, None], context)
            levels, emitted = scan(step, state.levels, one, checkpoint=fit_checkpoint(self.checkpoint, segments))
            emitted = (emitted,)
        logits = [part.outputs.reshape(-1, *part.outputs.shape[-3:]) for part in emitted]
        logits = jnp.concatenate(logits).swapaxes(0, 1)
        starts = jnp.zeros(B, bool) if reset is None else reset[:, -P]
        return logits.reshape(B, length, -1), InContext(levels, OpenSegment(x[:, -P:], tokens[:, -P:], starts))

    def _read_part(self, state: InContext, piece: _Piece, position, x, tokens, reset, following=None):
        """A part of one segment, with the weights as they are; the segment closes if it ends and more follows."""
        P, offset = self.config.periods[-1], piece.offset
        known = not isinstance(offset, jax.Array)
        if reset is not None and (not known or offset == 0):
            state = state._replace(levels=self._restart(reset[:, 0], state.levels))
        inner = segment_state(state.levels)
        fast = [level.matrices for level in fast_weights(state.levels)]
        aligned = known and P % self.reading == 0 and offset % self.reading == 0
        logits, mixers = self.forward(fast, inner.mixers, position, x, reset, aligned=aligned)
        starts = jnp.zeros(x.shape[0], bool) if reset is None else reset[:, 0]
        at_start = partial(jnp.where, offset == 0)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=offset, axis=1)
        segment = state.open
        segment = OpenSegment(put(segment.inputs, x), put(segment.tokens, tokens), at_start(starts, segment.reset))
        inner = SegmentState(mixers, jax.tree.map(at_start, inner.mixers, inner.mixers_at_segment_start))
        state = InContext(with_segment(state.levels, inner), segment)
        if known and following is not None and offset + x.shape[1] == P:
            state = self._close(state, position + x.shape[1], following)
        return logits, state

    def _read_token(self, state: InContext, position, x, tokens, reset):
        """One token, at a position that is not known while tracing."""
        P = self.config.periods[-1]
        state = self._close_if((position != 0) & (position % P == 0), state, position, tokens[:, 0])
        return self._read_part(state, _Piece(0, 1, position % P, False), position, x, tokens, reset)

    def _read_tokens(self, state: InContext, position, x, tokens, reset):
        """Token by token."""

        def step(carry, now):
            state, position = carry
            logits, state = self._read_token(state, position, *jax.tree.map(lambda part: part[:, None], now))
            return (state, position + 1), logits[:, 0]

        each = jax.tree.map(lambda part: part.swapaxes(0, 1), (x, tokens, reset))
        (state, _), logits = jax.lax.scan(step, (state, position), each)
        return logits.swapaxes(0, 1), state

    def _close_if(self, full: bool | np.bool_ | Array, state: InContext, position, following: Int[Array, " B"]) -> InContext:
        if isinstance(full, jax.Array):
            return jax.lax.cond(full, lambda: self._close(state, position, following), lambda: state)
        return self._close(state, position, following) if full else state

    def _close(self, state: InContext, position, following: Int[Array, " B"]) -> InContext:
        """Learns from the open segment, which ends at the position, from the sequence layers' state at its start."""
        inner, segment = segment_state(state.levels), state.open
        before = SegmentState(inner.mixers_at_segment_start, inner.mixers_at_segment_start)
        context = Segment(
            inputs=segment.inputs,
            targets=jnp.concatenate([segment.tokens[:, 1:], following[:, None]], axis=1),
            closed=jnp.asarray(True),
            position=jnp.asarray(position - self.config.periods[-1], jnp.int32),
            reset=segment.reset,
        )
        context = jax.tree.map(lambda part: part[None], context)
        levels, _ = self.level.step(with_segment(state.levels, before), context, ())
        return state._replace(levels=with_segment(levels, inner))

    def _restart(self, rows: Bool[Array, " B"], levels: PyTree) -> PyTree:
        return restart(self.config, rows, self.level.init(()), levels)

    def _restarting(self) -> Level:
        """The nest, its CMS levels restarted where a context begins with the start of a document."""
        step = lambda levels, context, slower: self.level.step(self._restart(context.reset[0], levels), context, slower)
        return dataclasses.replace(self.level, step=step)
