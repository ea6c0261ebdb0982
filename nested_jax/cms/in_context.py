"""The CMS of the blocks that learn in context, as one nest of levels.

    theta_l <- theta_l - eta_l sum over its last C_l tokens of grad L(theta; x_t)        when C_l divides the token count

A data point is a segment, of the shortest period P. The segment level emits its logits and the gradients of all CMS levels;
each CMS level, from fast to slow, sums its own gradients, steps when its period ends, and emits the others. A segment's
outputs use the weights before its own update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_jax.cms.chain import MATRICES, CMSConfig
from nested_jax.description import Description
from nested_jax.errors import UserError, shown
from nested_jax.level import Level, Nested, nest
from nested_jax.meta import mixflow_grad
from nested_jax.numerics import BATCH, HEADS, lay, nats, upcast, vary
from nested_jax.optim import clip_by_norm
from nested_jax.typing import Array, Bool, Float, Int, PyTree

NOT_LEARNED = -1
"""In place of a target that the CMS does not learn from."""


class FastWeights(NamedTuple):
    """State of one CMS level: matrices of all blocks that learn, their gradient since the last step, the rule's memory.

    matrices, gradient: leaves (L, B, ...) with one set a sequence, (L, ...) with one set a batch; rule: optax's state,
    leaves (B, ...) with one set a sequence; elapsed: segments since the last step.
    """

    matrices: PyTree
    gradient: PyTree
    rule: PyTree
    elapsed: Int[Array, ""]


class Segment(NamedTuple):
    """A data point of the segment level: P tokens of every row. As a context it has a leading axis of segments.

    inputs: of the first CMS that learns; targets: the next tokens, or NOT_LEARNED; closed: whether they are known; position:
    tokens before the segment; reset: whether a document starts with it.
    """

    inputs: Float[Array, "*segments B P D"]
    targets: Int[Array, "*segments B P"]
    closed: Bool[Array, "*segments"]
    position: Int[Array, "*segments"]
    reset: Bool[Array, "*segments B"] | None


class SegmentState(NamedTuple):
    """State of the segment level: that of the sequence layers between the CMS of the blocks that learn."""

    mixers: PyTree
    mixers_at_segment_start: PyTree


class Emitted(NamedTuple):
    """What a level emits about its ticks, for the next slower one.

    outputs: logits; gradients: of the levels that are slower, nearest first; segments: how many have been learned from.
    """

    outputs: Float[Array, "*segments B P V"]
    gradients: tuple[PyTree, ...]
    segments: Int[Array, "*ticks"]


Forward = Callable[
    [Sequence[PyTree], PyTree, Int[Array, ""], Float[Array, "B P D"], Bool[Array, "B P"] | None], tuple[Array, PyTree]
]


@cache
def inner_rule(config: CMSConfig) -> optax.GradientTransformation:
    """The config's inner rule at learning rate 1: its updates are scaled by the learned rates and added.

    Args:
        config: its `rule` and `clip`.

    Returns:
        An optax transformation of the gradients of a level.

    Source: NL Eq. 71.

    >>> rule = inner_rule(CMSConfig(clip=0.0))
    >>> print(rule.update(jnp.ones(2), rule.init(jnp.ones(2)))[0])
    [-1. -1.]
    """
    if not isinstance(config, CMSConfig):
        raise UserError(f"inner_rule: config {shown(config)}: give a CMSConfig")
    rules = {
        "sgd": optax.identity(),
        "momentum": optax.trace(0.9),
        "adam": optax.scale_by_adam(eps_root=1e-8),  # without it, the derivative at a zero gradient is not finite
    }
    clip = clip_by_norm(config.clip) if config.clip else optax.identity()
    return optax.chain(clip, rules[config.rule], optax.scale(-1.0))


def nest_levels(
    config: CMSConfig,
    weights: PyTree,
    forward: Forward,
    init_mixers: Callable[[], PyTree],
    batch_size: int,
    rules: Sequence[optax.GradientTransformation],
    keep_all: bool = False,
) -> Level:
    """The CMS of the blocks that learn, as one nest: (state, `Segment`) -> (state, `Emitted`), period the slowest level's.

    Args:
        config: with periods.
        weights: slow weights of these blocks' CMS, leaves (L, ...).
        forward: (matrices of each level that learns, mixers, position, inputs (B, P, D), reset (B, P) or None) ->
            (logits (B, P, V), mixers).
        init_mixers: () -> state of the sequence layers in between, before the first token.
        batch_size: rows B.
        rules: optax transformations of the levels, slow to fast.
        keep_all: the outer backward pass keeps what the inner ones stored, instead of computing it again.

    Returns:
        The nest; its data points are segments of `config.periods[-1]` tokens.

    Raises:
        UserError: periods do not divide one another.

    Source: NL Eq. 70-74.

    One block of width 2, whose one level learns from segments of four tokens:

    >>> from nested_jax.cms import apply, init_weights
    >>> config = CMSConfig(hidden=(3,), periods=(4,))
    >>> weights = jax.tree.map(lambda w: w[None], init_weights(jax.random.key(0), config, 2))  # (L, ...)
    >>> block = lambda tree: jax.tree.map(lambda w: w[0], tree)
    >>> forward = lambda fast, mixers, at, x, reset: (apply(config, block(weights), block(fast), x), mixers)
    >>> level = nest_levels(config, weights, forward, tuple, 1, [inner_rule(config)])
    >>> segment = Segment(jnp.ones((1, 4, 2)), jnp.ones((1, 4), int), jnp.array(True), jnp.array(0), None)
    >>> state, emitted = level.step(level.init(()), jax.tree.map(lambda x: x[None], segment), ())
    >>> emitted.outputs.shape, int(fast_weights(state)[0].elapsed)
    ((1, 1, 4, 2), 0)
    """
    level = _segment_level(config, forward, init_mixers, keep_all)
    for i in reversed(range(len(config.periods))):
        level = nest(level, _cms_level(config, i, weights, batch_size, rules[i]), reset=config.variant == "nested")
    return level


def _segment_level(config: CMSConfig, forward: Forward, init_mixers: Callable[[], PyTree], keep_all: bool) -> Level:
    P = config.periods[-1]

    def gradient(loss):
        if keep_all:
            return jax.grad(loss, has_aux=True)
        # The outer gradient computes each segment again: its memory is that of one segment's inner pass and not of all.
        if config.meta_gradient == "full":
            return mixflow_grad(loss, has_aux=True)
        return jax.checkpoint(jax.grad(loss, has_aux=True))

    def init(slower):
        mixers = init_mixers()
        return SegmentState(mixers, mixers)

    def step(state, context, slower):
        x, targets, closed, position, reset = jax.tree.map(itemgetter(0), context)
        reset = None if reset is None else jnp.pad(reset[:, None], ((0, 0), (0, P - 1)))

        def loss(matrices):
            logits, mixers = forward(matrices, state.mixers, position, x, reset)
            each = jnp.where(targets == NOT_LEARNED, 0, nats(logits, targets)).mean(axis=1)
            return each.sum() if config.scope == "sequence" else each.mean(), (logits, mixers)

        matrices = tuple(level.matrices for level in reversed(slower))
        gradients, (logits, mixers) = gradient(loss)(matrices)
        if config.meta_gradient == "first-order":
            gradients = jax.lax.stop_gradient(gradients)
        gradients = jax.tree.map(partial(jnp.where, closed), gradients[::-1], optax.tree.zeros_like(gradients[::-1]))
        return SegmentState(mixers, state.mixers), Emitted(logits, gradients, closed.astype(jnp.int32))

    unchanged, description = lambda state, slower: state, Description(objective=None)
    return Level(init, step, 1, "segment", restart=unchanged, description=description, tokens=P)


def _cms_level(config: CMSConfig, index: int, weights: PyTree, batch_size: int, rule: optax.GradientTransformation) -> Level:
    name, P = f"level{config.frozen + index + 1}", config.periods[-1]
    period, slow = config.periods[index] // P, weights[name]
    each = config.scope == "sequence"
    init_rule = jax.vmap(rule.init, in_axes=1) if each else rule.init
    update_rule = jax.vmap(rule.update, in_axes=(1, 0, 1), out_axes=(1, 0)) if each else rule.update

    def init(slower):
        if config.variant == "nested" and slower:
            matrices = slower[0].matrices
        else:
            matrices = upcast({k: w for k, w in slow.items() if k in MATRICES})
            hidden = lambda name: (HEADS,) if name == "down" else (None, HEADS)
            matrices = {name: lay(w, None, *hidden(name)) for name, w in matrices.items()}
            if each:
                spread = lambda w: jnp.broadcast_to(w[:, None], (len(w), batch_size, *w.shape[1:]))
                matrices = {name: lay(spread(w), None, BATCH, *hidden(name)) for name, w in matrices.items()}
        gradient = optax.tree.zeros_like(matrices)
        return FastWeights(matrices, gradient, init_rule(matrices), jnp.zeros((), jnp.int32))

    def step(state, emitted, slower):
        own, *others = jax.tree.map(partial(jnp.sum, axis=0), emitted.gradients)  # over the ticks of the faster level
        segments = emitted.segments.sum(dtype=jnp.int32)
        gradient = jax.tree.map(jnp.add, state.gradient, own)
        due = state.elapsed + segments == period
        updates, memory = update_rule(gradient, state.rule, state.matrices)
        rate = lambda w: slow["rate"].reshape((-1,) + (1,) * (w.ndim - 1)).astype(w.dtype)
        moved = jax.tree.map(lambda w, u: w + rate(w) * u, state.matrices, updates)
        stepped = FastWeights(moved, optax.tree.zeros_like(gradient), memory, jnp.zeros_like(state.elapsed))
        waiting = state._replace(gradient=gradient, elapsed=state.elapsed + segments)
        state = jax.tree.map(partial(jnp.where, due), stepped, waiting)
        return state, Emitted(emitted.outputs, tuple(others), segments)

    passing = "through" if config.meta_gradient == "full" else "past"
    description = Description(
        objective=f"next-token loss of its last {config.periods[index]} tokens",
        context="gradients, summed over segments",
        knowledge=f"back-propagation {passing} its updates, across levels",
        inner=(rule,),
    )
    due = lambda state: state.elapsed == 0
    return Level(init, step, period, f"CMS {name}", due=due, description=description, tokens=P)


def fast_weights(state: Nested | SegmentState) -> tuple[FastWeights, ...]:
    """The CMS levels of a nest's state, slow to fast.

    Args:
        state: of `nest_levels`.

    Returns:
        A `FastWeights` a level.

    Source: NL Eq. 70-74.

    >>> from nested_jax import preset
    >>> from nested_jax.models.language_model import init_state, init_weights
    >>> config = preset("tiny-hope")
    >>> state = jax.eval_shape(lambda: init_state(config, init_weights(config, jax.random.key(0)), batch_size=1))
    >>> slow, fast = fast_weights(state.learning.levels)
    >>> slow.matrices["up"].shape  # one block that learns, one row
    (1, 1, 128, 280)
    """
    return (state.slow, *fast_weights(state.fast)) if isinstance(state, Nested) else ()


def segment_state(state: Nested | SegmentState) -> SegmentState:
    """The innermost state of a nest."""
    return segment_state(state.fast) if isinstance(state, Nested) else state


def with_segment(state: Nested | SegmentState, segment: SegmentState) -> Nested | SegmentState:
    """The nest's state with another innermost state."""
    return Nested(state.slow, with_segment(state.fast, segment)) if isinstance(state, Nested) else segment


def with_level(state: Nested | SegmentState, index: int, level: FastWeights) -> Nested | SegmentState:
    """The nest's state with another CMS level, counted from slow to fast."""
    assert isinstance(state, Nested)
    return Nested(state.slow, with_level(state.fast, index - 1, level)) if index else Nested(level, state.fast)


def varying(levels: Nested | SegmentState, *inputs: PyTree) -> Nested | SegmentState:
    """A nest's state, varying as the inputs do, see `vary`, but for its counts."""
    if not isinstance(levels, Nested):
        return SegmentState(*(vary(mixers, *inputs, rank=2) for mixers in levels))
    *fast, elapsed = levels.slow
    matrices, gradient, rule = vary(fast, *inputs)
    return Nested(FastWeights(matrices, gradient, rule, elapsed), varying(levels.fast, *inputs))


def restart(
    config: CMSConfig, rows: Bool[Array, " B"], fresh: Nested | SegmentState, state: Nested | SegmentState
) -> Nested | SegmentState:
    """The CMS levels at their starts in some rows of the batch; the sequence layers restart themselves."""
    if not isinstance(state, Nested) or not isinstance(fresh, Nested):
        return state

    def choose(axis):
        def leaf(new, old):
            if config.scope == "batch" or old.ndim <= axis:
                return jnp.where(rows.all(), new, old)
            return jnp.where(jnp.expand_dims(rows, [i for i in range(old.ndim) if i != axis]), new, old)

        return leaf

    slow = FastWeights(
        matrices=jax.tree.map(choose(1), fresh.slow.matrices, state.slow.matrices),
        gradient=jax.tree.map(choose(1), fresh.slow.gradient, state.slow.gradient),
        rule=jax.tree.map(choose(0), fresh.slow.rule, state.slow.rule),
        elapsed=state.slow.elapsed,
    )
    return Nested(slow, restart(config, rows, fresh.fast, state.fast))
