"""Deep memories: two-layer residual MLPs whose both layers learn while reading.

    M(z) = z + W_1 silu(W_2 z)                                            (NL Eq. 89)

Each layer is one linear map of `recurrence`, with its own input: z for W_2 and h = silu(W_2 z) for W_1. Inputs and errors
are taken at the last chunk boundary (the snapshot), W_1's error at its exact weights if so chosen; reads see the exact
weights inside the chunk, W_2's by choice those of the boundary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp

from nested_jax.checks import Interval, check_fields
from nested_jax.description import Description
from nested_jax.errors import UserError
from nested_jax.level import Level, Nested
from nested_jax.memory.recurrence import Decays, Gates, MemoryState, decays, read, write
from nested_jax.memory.stream import Chunk, Snapshots
from nested_jax.numerics import clip_rows, normal, square, upcast
from nested_jax.typing import Array, Bool, Float, Int, PyTree


class Deep(NamedTuple):
    """A two-layer memory: first = W_2 (..., F, K) and second = W_1 (..., K, F), arrays or `MemoryState`s."""

    first: PyTree
    second: PyTree


class Strengths(NamedTuple):
    """Gates of a chunk's tokens before they are split by layer: rate eta, retain alpha, momentum theta or None, (..., C).

    The rate is one of all layers, or Deep: one of all first layers (B, H, C), and one of each second layer (B, H, M, C).
    """

    rate: Float[Array, "*batch C"] | Deep
    retain: Float[Array, "*batch C"]
    momentum: Float[Array, "*batch C"] | None


class LevelState(NamedTuple):
    """State of a deep memory's level.

    running: the memories now, `MemoryState`s; snapshot: their weights at the last boundary (None: now is a boundary);
    elapsed: tokens since then.
    """

    running: Deep
    snapshot: Deep | None
    elapsed: Int[Array, ""]


@dataclass(frozen=True)
class Rule:
    """How a deep memory learns; the defaults are those of self-modifying Titans.

    Args:
        erase: "layer": DGD, each layer erases what it holds at its own input; "memory": only first layers do, whose input is
            the memory's own (Eq. 88 to the letter); "none": plain gradient descent.
        step: "proximal": eta' = eta / (1 + eta |x|^2), a contraction for any input; "normalised": eta' = eta /
            (|x|^2 + 0.001) in the second layer of the memory that is read, proximal elsewhere; "raw": eta' = eta.
        errors: "boundary": both layers' errors are as old as the chunk; "exact": in the second layer of the memory that is
            read it is that of the weights before the token, k + W_1 h - v, and not clipped. There, and where the step is
            normalised, eta' also has the factor (1 + alpha) / 2 (but for raw steps): with an erase, exact errors and a
            normalised step that layer multiplies what it holds along h by alpha - (1 + alpha) eta, between -1 and 1. It can
            flip what it holds, and never expands it, even where alpha is small.
        retention: where decay leads, to zero or to the learned start; "none": alpha = 1, its gate has no effect.
        read: "after" or "before" the token's own write; "boundary": from the weights at the last chunk boundary.
        features: by which weights of the first layer the second one is read: "token", those that `read` says; "boundary",
            those of the last chunk boundary, by which it is written. Inside a chunk the second layer is then a linear memory
            of features that stand still.
        surprise: largest norm of the surprise delta that a token writes into a layer, larger ones are scaled down to it;
            for the second layer that is Huber's objective in place of the square (MIRAS). The default is the largest
            distance of two unit vectors; infinity clips nothing. Errors are as old as the chunk: on a run of equal keys both
            layers correct the same error in full, and where W_1 is large the memory overshoots by more each time, up to
            overflow.
        damped: writes with momentum have strength eta (1 - theta): S is a running mean of surprises. False: eta, the paper's
            sum, whose steps are 1 / (1 - theta) times as long. Errors of the boundary are bounded by `surprise`, and so is
            their mean. Exact errors have no bound of their own: their sum overflows at usual gates and is refused, and
            nothing bounds their mean where theta swings from near 0 to near 1 between tokens: what one token wrote is then
            added again at each of the next.

    Raises UserError for an option that is none of these; so does `assert_bounded` for choices with which a layer grows.

    Source: NL Eq. 89-93; Titans, arXiv 2501.00663; MIRAS, arXiv 2504.13173.

    >>> Rule(erase="none", step="raw").retention
    'initial'
    """

    erase: Literal["layer", "memory", "none"] = "layer"
    step: Literal["proximal", "normalised", "raw"] = "proximal"
    errors: Literal["boundary", "exact"] = "boundary"
    retention: Literal["zero", "initial", "none"] = "initial"
    read: Literal["after", "before", "boundary"] = "after"
    surprise: Annotated[float, Interval(above=0, finite=False)] = 2.0
    damped: bool = True
    features: Literal["token", "boundary"] = "token"

    def __post_init__(self):
        check_fields(self, "Rule: ")

    def assert_bounded(self, label: str, max_rate: float, momentum: bool) -> None:
        """Raises UserError, with the options' label, where normalised steps at the largest rate would expand what a layer
        holds along its input, or raw ones, by alpha - eta of any alpha, what first layers hold along an input of unit norm,
        and where exact errors add up as momentum. Nothing bounds raw steps of the second layer at longer inputs."""
        if momentum and not self.damped and self.errors == "exact":
            raise UserError(
                f"{label}damped False makes what exact errors hold grow with momentum: give True, or momentum False"
            )
        raw, terms = self.step == "raw", (self.erase == "layer") + (self.errors == "exact")
        most = 1 if raw else 2 / max(terms, 1)
        grows = terms or (raw and self.erase == "memory")  # first layers take raw steps too
        if self.step != "proximal" and grows and max_rate > most:
            choices = f"with step {self.step}, errors {self.errors} and erase {self.erase}"
            raise UserError(
                f"{label}max_rate {max_rate:.12g} makes what a layer holds grow, {choices}: give at most {most:g}"
            )


class Activations(NamedTuple):
    """What M memories compute of the same inputs."""

    inputs: Float[Array, "B H C K"]
    before: Float[Array, "B H C MF"]  # W_2 z, the memories' outputs concatenated
    hidden: Float[Array, "B H M C F"]  # silu(W_2 z)
    second: Float[Array, "B H M C K"]  # W_1 silu(W_2 z)

    @property
    def output(self) -> Float[Array, "B H M C K"]:
        """M(z)."""
        return _repeat(self.inputs, self.hidden.shape[2]) + self.second


def forward(weights: Deep, z: Float[Array, "B H C K"]) -> Activations:
    """The memories (B, H, M, ., .) at inputs z."""
    B, H, C, _ = z.shape
    before = z @ _merge(weights.first).mT
    hidden = jax.nn.silu(before).reshape(B, H, C, weights.first.shape[2], -1).swapaxes(2, 3)
    return Activations(z, before, hidden, hidden @ weights.second.mT)


def _merge(w: Float[Array, "B H M F K"]) -> Float[Array, "B H MF K"]:
    """Memories that read the same inputs are one map of many outputs."""
    return w.reshape(*w.shape[:2], -1, w.shape[-1])


def _repeat(x: Float[Array, "B H ..."], memories: int) -> Float[Array, "B H M ..."]:
    """The same for each memory; by copies, since XLA's CPU adds M arrays faster than it reduces over M (the transpose)."""
    return jnp.concatenate([x[:, :, None]] * memories, axis=2)


def learn(
    running: Deep,
    snapshot: Deep,
    start: Deep,
    keys: Activations,
    targets: Float[Array, "B H M C K"],
    strengths: Strengths,
    rule: Rule,
    mask: Bool[Array, " C"] | None = None,
    queries: Float[Array, "B H C K"] | None = None,
) -> tuple[Deep, Float[Array, "B H C K"] | None]:
    """One chunk of learning on the objective 1/2 |M(k) - v|^2, and reads of the last memory along the way.

    Args:
        running: `MemoryState`s now, (B, H, M, ., .).
        snapshot, start: weights at the last boundary, and learned starts, of the same shape.
        keys: `forward(snapshot, keys)`.
        targets: v of each memory.
        strengths: gates; rates of second layers (B, H, M, C), all others (B, H, C).
        rule: see `Rule`.
        mask: False for empty slots.
        queries: what the last memory is read at.

    Returns:
        (running after the chunk, outputs or None).
    """
    B, H, M, C, F = keys.hidden.shape
    at_boundary = snapshot.first is running.first.weights  # then the running weights' outputs at the keys are known
    retain, theta = strengths.retain, strengths.momentum
    retain = jnp.ones_like(retain) if rule.retention == "none" else retain
    decay = decays(retain, theta, None if mask is None else mask[None, None])
    anchor = start if rule.retention == "initial" else Deep(None, None)

    gate = jax.nn.sigmoid(keys.before)
    error = clip_rows(keys.output - targets, rule.surprise)
    inner_error = (error @ snapshot.second).swapaxes(2, 3).reshape(B, H, C, M * F)
    inner_error *= gate * (1 + keys.before * (1 - gate))
    inner_error = clip_rows(inner_error.reshape(B, H, C, M, F), rule.surprise).reshape(B, H, C, M * F)

    rate = strengths.rate if isinstance(strengths.rate, Deep) else Deep(strengths.rate, _repeat(strengths.rate, M))
    usual = "proximal" if rule.step == "normalised" else rule.step  # of all layers but the second of the memory that is read

    first = write(
        jax.tree.map(_merge, running.first), keys.inputs, inner_error,
        _gates(keys.inputs, rate.first, retain, theta, rule.erase != "none", usual, rule.damped),
        anchor=None if anchor.first is None else _merge(anchor.first), mask=None if mask is None else mask[None, None],
        decay=decay, product=keys.before if at_boundary else None,
    )  # fmt: skip
    each: tuple[Array, Array | None, Decays] = jax.tree.map(partial(_repeat, memories=M), (retain, theta, decay))

    exact: Array | bool = False
    gates_of = partial(_gates, keys.hidden, rate.second, each[0], each[1], rule.erase == "layer")
    gates = gates_of(usual, rule.damped)
    if queries is not None and (rule.errors == "exact" or rule.step != usual):
        main = (jnp.arange(M) == M - 1)[None, None, :, None]  # the memory that is read has a step and errors of its own
        if rule.errors == "exact":
            exact, error = main.astype(error.dtype), jnp.where(main[..., None], keys.inputs[:, :, None] - targets, error)
        gates = jax.tree.map(partial(jnp.where, main), gates_of(rule.step, rule.damped, exact is not False), gates)
    second = write(
        running.second, keys.hidden, error, gates,
        anchor=anchor.second, mask=None if mask is None else mask[None, None, None], decay=each[2],
        product=keys.second if at_boundary else None, exact=exact,
    )  # fmt: skip
    unmerge = lambda w: w.reshape(B, H, M, F, -1)
    after = Deep(jax.tree.map(unmerge, first.state), second.state)
    if queries is None:
        return after, None
    if rule.read == "boundary":
        return after, forward(jax.tree.map(lambda w: w[:, :, -1:], snapshot), queries).output[:, :, 0]
    early = rule.read == "before"
    if rule.features == "boundary":
        before = queries @ snapshot.first[:, :, -1].mT
    else:
        last = lambda w: w[:, :, -F:]  # the memory that is read
        first = first._replace(
            before=jax.tree.map(last, first.before), anchor=None if first.anchor is None else last(first.anchor),
            written=first.written[..., -F:], erased=first.erased[..., -F:],
        )  # fmt: skip
        before = read(first, queries, before=early)
    second = jax.tree.map(itemgetter((slice(None), slice(None), -1)), second)
    return after, queries + read(second, jax.nn.silu(before), before=early)


def _gates(
    inputs: Float[Array, "*batch C K"],
    rate: Float[Array, "*batch C"],
    retain: Float[Array, "*batch C"],
    momentum: Float[Array, "*batch C"] | None,
    erase: bool,
    step: str,
    damped: bool,
    exact: bool = False,
) -> Gates:
    """The gates of one layer, from its own inputs."""
    if step == "proximal":
        rate = rate / (1 + rate * square(inputs))
    elif step == "normalised":
        rate = rate / (square(inputs) + 1e-3)
    if step == "normalised" or (exact and step == "proximal"):
        rate *= (1 + retain) / 2
    push = rate * (1 - momentum) if momentum is not None and damped else rate
    return Gates(push, rate if erase else jnp.zeros_like(rate), retain, momentum)


def weights_of(memory: Deep) -> Deep:
    """The weights of running memories."""
    return Deep(memory.first.weights, memory.second.weights)


def boundary_weights(state: LevelState) -> Deep:
    """A level's weights at its last boundary: what slower and faster levels read of it."""
    return weights_of(state.running) if state.snapshot is None else state.snapshot


def broadcast_start(start: Deep, batch_size: int) -> Deep:
    """The learned starts (H, M, ., .) of every sequence, (B, H, M, ., .)."""
    return Deep(*(upcast(jnp.broadcast_to(w, (batch_size, *w.shape))) for w in start))


def init_level_state(start: Deep, batch_size: int, momentum: bool) -> LevelState:
    """Level state of sequences at the learned starts (H, M, ., .)."""
    start = broadcast_start(start, batch_size)
    running = Deep(*(MemoryState(w, jnp.zeros_like(w) if momentum else None) for w in start))
    return LevelState(running, weights_of(running), jnp.zeros((), jnp.int32))


def memory_level(init: Callable, act: Callable, period: int, tokens: int, name: str, description: Description) -> Level:
    """A level of deep memories that keeps its snapshot.

    Args:
        init: as of `Level`.
        act: (running, snapshot, context, slower) -> (running, emitted, number of tokens that were not empty).
        period, tokens, name, description: as of `Level`.
    """

    def step(state, context, slower):
        snapshot = boundary_weights(state)
        running, emitted, count = act(state.running, snapshot, context, slower)
        elapsed = (state.elapsed + count) % (period * tokens)
        if state.snapshot is None:
            return LevelState(running, None, elapsed), emitted
        snapshot = jax.tree.map(partial(jnp.where, elapsed == 0), weights_of(running), snapshot)
        return LevelState(running, snapshot, elapsed), emitted

    return Level(init, step, period, name, due=lambda state: state.elapsed == 0, description=description, tokens=tokens)


def describe_memory(rule: Rule, momentum: bool, objective: str, context: str, knowledge: str) -> Description:
    """The description of a level of deep memories; its momentum is a memory of its own, of surprises."""
    kinds = {"layer": "delta gradient descent", "memory": "delta gradient descent in first layers alone"}
    descent = kinds.get(rule.erase, "gradient descent")
    descent += f" with {'exact errors' if rule.errors == 'exact' else 'errors of the boundary'} and {rule.step} steps"
    descent += {"initial": ", decay to the start", "zero": ", decay to zero", "none": ", no decay"}[rule.retention]
    descent += {"after": "", "before": ", read before it writes", "boundary": ", read as at the last boundary"}[rule.read]
    descent += ", features of the last boundary" * (rule.features == "boundary" and rule.read != "boundary")
    inner = Description(
        objective="-<S, surprise>", context="local surprises", name="momentum",
        rule="gradient descent, decay" + ", undamped" * (not rule.damped),
        knowledge="generation: the memory it writes to makes the surprises",
    )  # fmt: skip
    return Description(objective, descent, context, knowledge, inner=(inner,) if momentum else ())


def _drop_snapshots(state: LevelState | Nested) -> LevelState | Nested:
    return Nested(*map(_drop_snapshots, state)) if isinstance(state, Nested) else state._replace(snapshot=None)


def _take_snapshots(state: LevelState | Nested) -> LevelState | Nested:
    return (
        Nested(*map(_take_snapshots, state))
        if isinstance(state, Nested)
        else state._replace(snapshot=weights_of(state.running))
    )


SNAPSHOTS = Snapshots(_drop_snapshots, _take_snapshots)


def deep_start(key: Array, memories: int, heads: int, width: int, hidden: int) -> dict[str, Array]:
    """Random starts (H, M, ., .); the second layer is small, so that a memory begins near the identity."""
    first, second = jax.random.split(key)
    return {
        "first": normal(first, (heads, memories, hidden, width)) * width**-0.5,
        "second": normal(second, (heads, memories, width, hidden)) * 0.5 * hidden**-0.5,
    }


def count_tokens(chunk: Chunk) -> int | Int[Array, ""]:
    """Tokens of a chunk (B, H, C, ...) that are not empty slots."""
    return jax.tree.leaves(chunk.tokens)[0].shape[2] if chunk.mask is None else chunk.mask.sum(dtype=jnp.int32)
