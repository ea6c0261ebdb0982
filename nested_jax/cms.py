"""Continuum Memory System: MLP blocks that learn from the task loss while reading, each at a period of its own.

    theta_l <- theta_l - eta_l sum over its last C_l tokens of grad L(theta; x_t)        when C_l divides the token count

Levels are numbered from slow to fast (NL Eq. 70-74). In context it is one nest of levels: a segment of the shortest period
emits its logits and the gradients of all CMS levels; each CMS level, from fast to slow, sums its own, steps when its period
ends, and hands the rest on. A segment's outputs use the weights before its own update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_jax.checks import Count, NonNegative, check_fields
from nested_jax.description import Description
from nested_jax.errors import UserError
from nested_jax.level import Level, Nested, nest
from nested_jax.meta import mixflow_grad
from nested_jax.numerics import rms_norm, upcast
from nested_jax.optim import clip_by_norm
from nested_jax.typing import Array, Bool, Float, Int, PyTree


@dataclass(frozen=True)
class CMSConfig:
    """The Continuum Memory System of every block. Levels run from slow to fast, so do `hidden` and `periods`."""

    hidden: tuple[Count, ...] = (256,)
    """Hidden width F of each level's MLP, from the slowest level to the fastest."""
    periods: tuple[Count, ...] = ()
    """Tokens between two updates of each level, slowest first, each a multiple of the next. Fewer periods than levels:
    the slowest levels are frozen. Empty: all are, as in a Transformer."""
    variant: Literal["sequential", "nested", "independent"] = "sequential"
    """sequential: a chain (Eq. 73). nested: a chain in which a level restarts from the next slower one each time that
    one steps (Eq. 72). independent: a weighted sum (Eq. 74)."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Non-linearity of the MLPs; swiglu adds a gate matrix."""
    meta_gradient: Literal["full", "first-order"] = "full"
    """Whether outer training differentiates through the inner gradients or takes them as constants."""
    scope: Literal["sequence", "batch"] = "sequence"
    """One set of fast weights for every sequence, or one for the whole batch (restarted when all its rows are)."""
    blocks: Count | None = None
    """How many of the last blocks learn in context; None: all of them."""
    rule: Literal["sgd", "momentum", "adam"] = "sgd"
    """Inner rule of every level. `LanguageModel(..., rule=)` takes any optax transformation instead."""
    rate: NonNegative = 0.1
    """Start of the inner learning rates, which are learned: one for each level of each block."""
    clip: NonNegative = 1.0
    """Largest norm of a level's summed gradient, per set of fast weights; 0 for none."""

    @property
    def frozen(self) -> int:
        """How many levels, the slowest ones, do not learn in context."""
        return len(self.hidden) - len(self.periods)

    def __post_init__(self):
        check_fields(self, "model.cms.")
        if not self.hidden:
            raise UserError("model.cms.hidden () has no level: give one hidden width a level")
        if self.frozen < 0:
            raise UserError(f"model.cms.periods {self.periods} are more than the {len(self.hidden)} levels of cms.hidden")
        for slow, fast in zip(self.periods, self.periods[1:], strict=False):
            if slow % fast:
                raise UserError(
                    f"model.cms.periods: {slow} is not a multiple of {fast}: give periods that divide one another"
                )
        if self.variant == "nested" and len(set(self.hidden)) > 1:
            raise UserError(f"model.cms.hidden {self.hidden}: a nested CMS needs equal widths")
        if self.variant == "nested" and self.periods and self.frozen:
            raise UserError(
                f"model.cms.periods {self.periods}: a nested CMS needs a period for each of its {len(self.hidden)} levels"
            )


MATRICES = ("up", "gate", "down")  # what is fast in a level's weights


class FastWeights(NamedTuple):
    """State of one CMS level: matrices of all blocks that learn, their gradient since the last step, the rule's memory.

    Leaves of `matrices` and `gradient` are (L, B, ...) with one set a sequence, (L, ...) with one set a batch.
    """

    matrices: PyTree
    gradient: PyTree
    rule: PyTree  # optax's state, leaves (B, ...) with one set a sequence
    elapsed: Array  # () int32, tokens since the last step


class Segment(NamedTuple):
    """Context of the segment level: P data points."""

    inputs: Float[Array, "P B D"]
    targets: Int[Array, "P B"]
    closed: Bool[Array, " P"]  # whether the targets are known: all or none of a segment's
    reset: Bool[Array, "P B"] | None  # starts of documents


class SegmentState(NamedTuple):
    """What is between the CMS of the blocks that learn: the state of their sequence layers."""

    mixers: PyTree
    begun: PyTree  # the same, before the last segment
    position: Array  # () int32, tokens read


class Emitted(NamedTuple):
    """What a level tells the next slower one about its ticks."""

    outputs: Float[Array, "ticks B V"]
    gradients: tuple[PyTree, ...]  # of the levels that are slower, nearest first
    tokens: Array  # () int32, how many have been learned from


def init_weights(key: Array, config: CMSConfig, width: int) -> dict[str, dict[str, Array]]:
    """Slow weights of one block's CMS: level1 (slowest), level2, ... and, if independent, mix (N,)."""
    weights = {}
    for i, (hidden, own) in enumerate(zip(config.hidden, jax.random.split(key, len(config.hidden)), strict=True)):
        shapes = {"up": (width, hidden), "gate": (width, hidden), "down": (hidden, width)}
        if config.activation != "swiglu":
            del shapes["gate"]
        if config.variant == "nested" and i and config.periods:
            shapes = {}  # starts as the slower level is
        keys = dict(zip(shapes, jax.random.split(own, 3), strict=False))
        level = {name: jax.random.normal(keys[name], shape) * shape[0] ** -0.5 for name, shape in shapes.items()}
        level["norm"] = jnp.ones(width)
        if i >= config.frozen:
            level["rate"] = jnp.full((), config.rate, jnp.float32)
        weights[f"level{i + 1}"] = level
    if config.variant == "independent":
        weights["mix"] = jnp.ones(len(config.hidden))
    return weights


def apply(config: CMSConfig, weights: PyTree, fast: Sequence[PyTree], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """One block's CMS, residual connections included.

    Args:
        fast: matrices of the levels that learn, slow to fast, (B, ...) or shared by the batch. Other levels, and all of
            them if it is empty, use the slow weights.
    """
    slow = len(config.hidden) - len(fast)
    outputs = []
    for i in range(len(config.hidden)):
        level = weights[f"level{i + 1}"]
        matrices = fast[i - slow] if i >= slow else (level if "up" in level else weights["level1"])
        outputs.append(_mlp(matrices, rms_norm(level["norm"], x)))
        if config.variant != "independent":
            x = x + outputs.pop()
    for mix, y in zip(weights.get("mix", ()), outputs, strict=True):
        x = x + mix.astype(x.dtype) * y
    return x


def _mlp(matrices: PyTree, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    product = lambda x, w: jnp.matmul(x, w.astype(x.dtype))  # w is (D, F) or one for each row, (B, D, F)

    @jax.checkpoint  # the backward pass keeps the hidden layer before its activation, and nothing more
    def down(hidden, gate, w):
        return product(_gelu(hidden) if gate is None else _silu(gate) * hidden, w)

    gate = product(x, matrices["gate"]) if "gate" in matrices else None
    return down(product(x, matrices["up"]), gate, matrices["down"])


def _with_slope(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The function, its derivative computed beside its value: the backward pass, which XLA's CPU would compute along a
    transposed operand, is then one product."""

    def jvp(primals, tangents):
        value, slope = jax.jvp(function, primals, (jnp.ones_like(primals[0]),))
        return value, slope * tangents[0]

    with_slope = jax.custom_jvp(lambda x: function(x))
    with_slope.defjvp(jvp)
    return with_slope


_gelu, _silu = _with_slope(jax.nn.gelu), _with_slope(jax.nn.silu)


def inner_rule(config: CMSConfig) -> optax.GradientTransformation:
    """The config's inner rule at learning rate 1: its updates are scaled by the learned rates and added."""
    rules = {
        "sgd": optax.identity(),
        "momentum": optax.trace(0.9),
        "adam": optax.scale_by_adam(eps_root=1e-8),  # without it, the derivative at a zero gradient is not finite
    }
    clip = clip_by_norm(config.clip) if config.clip else optax.identity()
    return optax.chain(clip, rules[config.rule], optax.scale(-1.0))


def in_context(
    config: CMSConfig,
    weights: PyTree,
    forward: Callable,
    mixers: Callable[[], PyTree],
    batch: int,
    rules: Sequence[optax.GradientTransformation],
    keep_all: bool = False,
) -> Level:
    """The CMS of the blocks that learn, as one nest: (state, `Segment`) -> (state, `Emitted`), period the slowest level's.

    Args:
        weights: slow weights of these blocks' CMS, leaves (L, ...).
        forward: (matrices of each level that learns, mixers, position, inputs (B, P, D), reset (B, P) or None) ->
            (logits (B, P, V), mixers).
        mixers: () -> state of the sequence layers in between.
        rules: optax transformations of the levels, slow to fast.
        keep_all: the outer backward pass keeps what the inner ones stored, instead of computing it again.

    Raises ValueError where periods do not divide one another.
    """
    level = _segment_level(config, forward, mixers, keep_all)
    for i in reversed(range(len(config.periods))):
        level = nest(level, _cms_level(config, i, weights, batch, rules[i]), reset=config.variant == "nested")
    return level


def _segment_level(config: CMSConfig, forward: Callable, mixers: Callable, keep_all: bool) -> Level:
    def gradient(loss):
        if keep_all:
            return jax.grad(loss, has_aux=True)
        # The outer gradient computes each segment again: its memory is that of one segment's inner pass and not of all.
        if config.meta_gradient == "full":
            return mixflow_grad(loss, has_aux=True)
        return jax.checkpoint(jax.grad(loss, has_aux=True))

    def init(slower):
        state = mixers()
        return SegmentState(state, state, jnp.zeros((), jnp.int32))

    def step(state, context, slower):
        x, targets = context.inputs.swapaxes(0, 1), context.targets.swapaxes(0, 1)
        reset = None if context.reset is None else context.reset.swapaxes(0, 1)

        def loss(matrices):
            logits, mixers = forward(matrices, state.mixers, state.position, x, reset)
            each = optax.softmax_cross_entropy_with_integer_labels(upcast(logits), targets).mean(axis=1)
            return each.sum() if config.scope == "sequence" else each.mean(), (logits, mixers)

        matrices = tuple(level.matrices for level in reversed(slower))
        gradients, (logits, mixers) = gradient(loss)(matrices)
        if config.meta_gradient == "first-order":
            gradients = jax.lax.stop_gradient(gradients)
        closed, length = context.closed[0], len(context.closed)
        gradients = jax.tree.map(lambda g: jnp.where(closed, g, 0.0), gradients[::-1])
        after = SegmentState(mixers, state.mixers, state.position + length)
        return after, Emitted(logits.swapaxes(0, 1), gradients, closed.astype(jnp.int32) * length)

    same, says = lambda state, slower: state, Description(objective=None)
    return Level(init, step, config.periods[-1], "segment", restart=same, description=says)


def _cms_level(config: CMSConfig, index: int, weights: PyTree, batch: int, rule: optax.GradientTransformation) -> Level:
    name = f"level{config.frozen + index + 1}"
    period, slow = config.periods[index], weights[name]
    each = config.scope == "sequence"
    init_rule = jax.vmap(rule.init, in_axes=1) if each else rule.init
    update_rule = jax.vmap(rule.update, in_axes=(1, 0, 1), out_axes=(1, 0)) if each else rule.update

    def init(slower):
        if config.variant == "nested" and slower:
            matrices = slower[0].matrices
        else:
            matrices = upcast({k: w for k, w in slow.items() if k in MATRICES})
            if each:
                spread = lambda w: jnp.broadcast_to(w[:, None], (len(w), batch, *w.shape[1:]))
                matrices = jax.tree.map(spread, matrices)
        return FastWeights(matrices, jax.tree.map(jnp.zeros_like, matrices), init_rule(matrices), jnp.zeros((), jnp.int32))

    def step(state, emitted, slower):
        own, *rest = jax.tree.map(lambda g: g.sum(axis=0), emitted.gradients)  # over the ticks of the faster level
        tokens = emitted.tokens.sum(dtype=jnp.int32)
        gradient = jax.tree.map(jnp.add, state.gradient, own)
        elapsed = state.elapsed + tokens
        due = elapsed == period
        updates, memory = update_rule(gradient, state.rule, state.matrices)
        rate = lambda w: slow["rate"].reshape((-1,) + (1,) * (w.ndim - 1)).astype(w.dtype)
        moved = jax.tree.map(lambda w, u: w + rate(w) * u, state.matrices, updates)
        kept = lambda new, old: jax.tree.map(lambda a, b: jnp.where(due, a, b), new, old)
        state = FastWeights(
            matrices=kept(moved, state.matrices),
            gradient=jax.tree.map(lambda g: jnp.where(due, 0.0, g), gradient),
            rule=kept(memory, state.rule),
            elapsed=jnp.where(due, 0, elapsed),
        )
        outputs = emitted.outputs.reshape(-1, *emitted.outputs.shape[2:])
        return state, Emitted(outputs, tuple(rest), tokens)

    passing = "through" if config.meta_gradient == "full" else "past"
    description = Description(
        objective=f"next-token loss of its last {period} tokens",
        context="gradients, summed over segments",
        knowledge=f"back-propagation {passing} its updates, across levels",
        inner=(rule,),
    )
    return Level(init, step, period, f"CMS {name}", due=lambda state: state.elapsed == 0, description=description)


def fast_weights(state: Nested) -> tuple[FastWeights, ...]:
    """The CMS levels of a nest's state, slow to fast."""
    return (state.slow, *fast_weights(state.fast)) if isinstance(state, Nested) else ()


def segment_state(state: Nested) -> SegmentState:
    """The innermost state of a nest."""
    return segment_state(state.fast) if isinstance(state, Nested) else state


def with_segment(state: Nested, segment: SegmentState) -> Nested:
    """The nest's state with another innermost state."""
    return Nested(state.slow, with_segment(state.fast, segment)) if isinstance(state, Nested) else segment


def restart(config: CMSConfig, rows: Bool[Array, " B"], fresh: Nested, state: Nested) -> Nested:
    """The CMS levels started anew in some rows of the batch; the sequence layers restart themselves."""
    if not isinstance(state, Nested):
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
