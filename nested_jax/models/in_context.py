"""Reading with a CMS that learns in context, in calls of any length.

A segment closes when the first token of the next one arrives, before that token is processed: only then are all its targets
known. Inside a call whole segments are read and closed by one run of the nest of levels; what is left stays open, and is
read again from its start when it closes. So any split of the input gives the same result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_jax import cms
from nested_jax.cms import CMSConfig, Segment, SegmentState
from nested_jax.level import Level, Nested, run
from nested_jax.memory.stream import advance
from nested_jax.models.block import embed, head, mix, sequence_layer
from nested_jax.models.config import ModelConfig
from nested_jax.remat import Checkpoint, scan, within
from nested_jax.typing import Array, Bool, Float, Int, PyTree


class OpenSegment(NamedTuple):
    """The last segment's tokens, until it closes. How many there are follows from the position."""

    inputs: Float[Array, "B P D"]  # to the blocks that learn
    tokens: Int[Array, "B P"]
    reset: Bool[Array, " B"]  # whether a document starts with it


class InContext(NamedTuple):
    """Fast state of the blocks that learn: the nest of CMS levels around their sequence layers, and the open segment."""

    levels: Nested
    open: OpenSegment


@dataclass(frozen=True)
class Reader:
    """Reads a stream with the nest of `cms.in_context`.

    Args:
        forward: as of `cms.in_context`, with a keyword `aligned`.
        reading: longest chunk of the sequence layers.
        fresh: () -> the nest's state at a document's start.
        checkpoint: what the backward pass keeps of segments, those of the slowest level.
    """

    config: CMSConfig
    level: Level
    forward: Callable
    reading: int
    fresh: Callable[[], Nested]
    checkpoint: Checkpoint

    @property
    def period(self) -> int:
        """Tokens P of a segment."""
        return self.config.periods[-1]

    def read(self, state: InContext, position, x, tokens, reset, multiple: int) -> tuple[Float[Array, "B T V"], InContext]:
        """(logits, state) of T more tokens; `position`, read before, is known while tracing or a multiple of `multiple`."""
        T, P, group = x.shape[1], self.period, self.config.periods[0]
        known = not isinstance(position, jax.Array)
        if known:
            offset = int(position) % group
        elif multiple % P:
            return (self._read_token if T == 1 else self._scan)(state, position, x, tokens, reset)
        else:
            offset = 0
        whole_groups = known or multiple % group == 0
        if offset % P == 0:
            state = self._close_if(position > 0, state, tokens[:, 0])

        outputs, start = [], 0
        while start < T:
            here, rest = offset + start, T - start
            if here % P == 0 and rest >= P:
                grouped = whole_groups and here % group == 0
                length = rest // P * P
                if whole_groups and not grouped:
                    length = min(length, group - here % group)
                end = start + length
                following = tokens[:, end] if end < T else None
                cut = [None if part is None else part[:, start:end] for part in (x, tokens, reset)]
                logits, state = self._read_segments(state, *cut, following, grouped)
            else:
                end = start + min(P - here % P, rest)
                cut = [None if part is None else part[:, start:end] for part in (x, tokens, reset)]
                if reset is not None and here % P == 0:
                    state = self._restart(state, reset[:, start])
                logits, state = self._read_piece(state, here % P, advance(position, start), *cut)
                if end < T and (offset + end) % P == 0:
                    state = self._close(state, tokens[:, end])
            outputs.append(logits)
            start = end
        return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1), state

    def _read_segments(self, state: InContext, x, tokens, reset, following, grouped: bool):
        """Whole segments; the last one closes too if the token that follows it is known."""
        P, length = self.period, x.shape[1]
        last = jnp.zeros_like(tokens[:, 0]) if following is None else following
        context = Segment(
            inputs=x.swapaxes(0, 1),
            targets=jnp.concatenate([tokens[:, 1:], last[:, None]], axis=1).swapaxes(0, 1),
            closed=(np.arange(length) < length - P) | (following is not None),
            reset=None if reset is None else reset.swapaxes(0, 1),
        )
        level = self.level if reset is None else self._restarting()
        if grouped:
            keep = within(self.checkpoint, length // self.config.periods[0])
            levels, emitted = run(level, state.levels, context, checkpoint=keep)
            pieces = emitted if type(emitted) is tuple else (emitted,)
        else:
            segments = jax.tree.map(lambda part: part.reshape(-1, P, *part.shape[1:]), context)
            keep = within(self.checkpoint, length // P)
            step = lambda s, segment: level.step(s, segment, ())
            levels, emitted = scan(step, state.levels, segments, checkpoint=keep)
            pieces = (emitted,)
        logits = jnp.concatenate([piece.outputs.reshape(-1, *piece.outputs.shape[-2:]) for piece in pieces])
        starts = jnp.zeros(len(x), bool) if reset is None else reset[:, -P]
        return logits.swapaxes(0, 1), InContext(levels, OpenSegment(x[:, -P:], tokens[:, -P:], starts))

    def _read_piece(self, state: InContext, offset, position, x, tokens, reset):
        """A piece inside one segment, with the weights as they are."""
        inner = cms.segment_state(state.levels)
        fast = [level.matrices for level in cms.fast_weights(state.levels)]
        static = not isinstance(offset, jax.Array)
        aligned = static and self.period % self.reading == 0 and offset % self.reading == 0
        logits, mixers = self.forward(fast, inner.mixers, position, x, reset, aligned=aligned)
        starts = jnp.zeros(len(x), bool) if reset is None else reset[:, 0]
        choose = lambda new, old: jax.tree.map(lambda a, b: jnp.where(offset == 0, a, b), new, old)
        open_ = OpenSegment(
            inputs=jax.lax.dynamic_update_slice_in_dim(state.open.inputs, x, offset, axis=1),
            tokens=jax.lax.dynamic_update_slice_in_dim(state.open.tokens, tokens, offset, axis=1),
            reset=choose(starts, state.open.reset),
        )
        inner = SegmentState(mixers, choose(inner.mixers, inner.begun), inner.position + x.shape[1])
        return logits, InContext(cms.with_segment(state.levels, inner), open_)

    def _read_token(self, state: InContext, position, x, tokens, reset):
        """One token, at a position that is not known while tracing."""
        state = self._close_if((position > 0) & (position % self.period == 0), state, tokens[:, 0])
        if reset is not None:
            state = self._restart(state, reset[:, 0])
        return self._read_piece(state, position % self.period, position, x, tokens, reset)

    def _scan(self, state: InContext, position, x, tokens, reset):
        """Token by token."""

        def step(carry, now):
            state, position = carry
            logits, state = self._read_token(state, position, *jax.tree.map(lambda part: part[:, None], now))
            return (state, position + 1), logits[:, 0]

        each = jax.tree.map(lambda part: part.swapaxes(0, 1), (x, tokens, reset))
        (state, _), logits = jax.lax.scan(step, (state, position), each)
        return logits.swapaxes(0, 1), state

    def _close_if(self, full, state: InContext, following) -> InContext:
        if isinstance(full, jax.Array):
            return jax.lax.cond(full, lambda: self._close(state, following), lambda: state)
        return self._close(state, following) if full else state

    def _close(self, state: InContext, following: Int[Array, " B"]) -> InContext:
        """Learn from the open segment, all of whose targets are now known, from where its sequence layers began."""
        inner, segment = cms.segment_state(state.levels), state.open
        before = SegmentState(inner.begun, inner.begun, inner.position - self.period)
        first = np.arange(self.period) == 0
        context = Segment(
            inputs=segment.inputs.swapaxes(0, 1),
            targets=jnp.concatenate([segment.tokens[:, 1:], following[:, None]], axis=1).swapaxes(0, 1),
            closed=np.ones(self.period, bool),
            reset=first[:, None] & segment.reset[None],
        )
        levels, _ = self.level.step(cms.with_segment(state.levels, before), context, ())
        return state._replace(levels=cms.with_segment(levels, inner))

    def _restart(self, state: InContext, rows) -> InContext:
        return state._replace(levels=cms.restart(self.config, rows, self.fresh(), state.levels))

    def _restarting(self) -> Level:
        """The nest, its CMS levels started anew where a context begins with the start of a document."""

        def step(levels, context, slower):
            return self.level.step(cms.restart(self.config, context.reset[0], self.fresh(), levels), context, slower)

        return dataclasses.replace(self.level, step=step)


def definition(
    config: ModelConfig, weights: PyTree, rules: Sequence[optax.GradientTransformation], tokens: Int[Array, "B T"]
) -> Float[Array, "B T V"]:
    """Logits of documents that share one set of fast weights, a plain loop over segments with `jax.grad`: the slow twin.

    With one set of fast weights a sequence, it is for one row.
    """
    settings, layer, first = config.cms, sequence_layer(config), config.layers - config.adapting
    P, names = settings.periods[-1], [f"level{i + 1}" for i in range(settings.frozen, len(settings.hidden))]
    blocks = [jax.tree.map(lambda w, i=i: w[i], weights["blocks"]) for i in range(config.layers)]
    learned = lambda name: [{k: w for k, w in b["cms"][name].items() if k in cms.MATRICES} for b in blocks[first:]]
    mixers = [layer.init_state(block["mixer"], len(tokens), tokens.shape[1]) for block in blocks]
    fast = {name: learned("level1" if settings.variant == "nested" else name) for name in names}
    gradient = jax.tree.map(jnp.zeros_like, fast)
    memory = {name: rule.init(fast[name]) for name, rule in zip(names, rules, strict=True)}

    def forward(fast, mixers, tokens):
        x, after = embed(config, weights, tokens), []
        for i, (block, mixer) in enumerate(zip(blocks, mixers, strict=True)):
            state, x = mix(layer, block, mixer, x, mixer.position, None, False)
            after.append(state._replace(position=advance(mixer.position, tokens.shape[1])))
            x = cms.apply(settings, block["cms"], [fast[name][i - first] for name in names] if i >= first else [], x)
        return head(config, weights, x), after

    forward = jax.jit(forward)

    @jax.jit
    def learn(fast, mixers, tokens, targets):
        loss = lambda fast: optax.softmax_cross_entropy_with_integer_labels(forward(fast, mixers, tokens)[0], targets).mean()
        gradient = jax.grad(loss)(fast)
        return jax.lax.stop_gradient(gradient) if settings.meta_gradient == "first-order" else gradient

    outputs = []
    for start in range(0, tokens.shape[1], P):
        now, targets = tokens[:, start : start + P], tokens[:, start + 1 : start + P + 1]
        logits, after = forward(fast, mixers, now)
        outputs.append(logits)
        if targets.shape[1] == P:
            gradient = jax.tree.map(jnp.add, gradient, learn(fast, mixers, now, targets))
            for i, (name, period) in enumerate(zip(names, settings.periods, strict=True)):
                if (start + P) % period == 0:
                    updates, memory[name] = rules[i].update(gradient[name], memory[name], fast[name])
                    rates = [block["cms"][name]["rate"] for block in blocks[first:]]
                    step = lambda w, u, rate: jax.tree.map(lambda w, u: w + rate * u, w, u)
                    fast[name] = [step(*each) for each in zip(fast[name], updates, rates, strict=True)]
                    gradient[name] = jax.tree.map(jnp.zeros_like, gradient[name])
            for i, (slower, name) in enumerate(zip(names, names[1:], strict=False)):
                if settings.variant == "nested" and (start + P) % settings.periods[i] == 0:
                    fast[name], memory[name] = fast[slower], rules[i + 1].init(fast[slower])
        mixers = after
    return jnp.concatenate(outputs, axis=1)
