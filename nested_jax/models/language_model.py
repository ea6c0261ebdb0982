"""The language model of Hope and all its baselines, as pure functions of weights and state, plain pytrees.

    x = embedding of tokens        per block: x <- x + layer(norm x), x <- CMS(x)        logits = norm(x) head

`module.LanguageModel` is the `flax.nnx` module that holds the weights as attributes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from nested_jax import cms
from nested_jax.checks import check_key
from nested_jax.cms.in_context import NOT_LEARNED, fast_weights, segment_state, with_segment
from nested_jax.cms.reader import InContext, Reader
from nested_jax.errors import UserError, shown
from nested_jax.memory.attention import AttentionState, reserve
from nested_jax.memory.stream import bounded, check_documents, check_rows, check_size
from nested_jax.models.block import init_block, inner_layer, sequence_layer
from nested_jax.models.config import PRESETS, ModelConfig
from nested_jax.numerics import BATCH, HEADS, KEPT, TOKENS, lay, nats, normal, rms_norm, upcast, vary
from nested_jax.remat import LOOP
from nested_jax.typing import Array, Bool, Float, Int, Position, PyTree

Rules = Sequence[optax.GradientTransformation]


class ModelState(NamedTuple):
    """Fast state of a model: everything it has learned while reading.

    position: tokens read, one number for the whole batch; from 1.5 * 2^30 tokens on less by a multiple of the config's
    alignment, so that it never ends; mixers: of the sequence layers that read a call as a whole,
    leaves (L, ...): all but those between two CMS that learn; learning: of the CMS that learn in context, None if none do.
    """

    position: Position
    mixers: PyTree
    learning: InContext | None


def init_weights(config: ModelConfig, key: Array) -> dict[str, Any]:
    """Slow weights, float32: embedding (V, D), blocks, leaves (L, ...), norm (D,) and, untied, head (D, V).

    >>> from nested_jax import preset
    >>> sorted(jax.eval_shape(lambda: init_weights(preset("tiny-hope"), jax.random.key(0))))
    ['blocks', 'embedding', 'head', 'norm']
    """
    check_config(config)
    check_key("init_weights", key)
    V, D = config.vocabulary, config.width
    embedding, blocks, out = jax.random.split(key, 3)
    weights = {
        "embedding": normal(embedding, (V, D)) * D**-0.5,
        "blocks": jax.vmap(lambda key: init_block(key, config))(jax.random.split(blocks, config.layers)),
        # A token's logit at itself starts at 1 if the embeddings are tied: the loss starts near ln V.
        "norm": jnp.full(D, D**-0.5 if config.tie_embeddings else 1.0, jnp.float32),
    }
    return weights if config.tie_embeddings else weights | {"head": normal(out, (D, V)) / D}


def init_state(
    config: ModelConfig, weights: PyTree, batch_size: int, *, max_length: int | None = None, rules: Rules | None = None
) -> ModelState:
    """The state before the first token: a differentiable function of the weights.

    Args:
        config: of the model.
        weights: as of `init_weights`; memories and CMS levels start from them.
        batch_size: rows B.
        max_length: most tokens that an attention cache holds, a window that slides beyond them; None: it grows.
        rules: inner rules of the CMS, slow to fast; None: the config's.

    Returns:
        `ModelState`, leaves (L, B, ...), at position 0.

    Raises:
        UserError: batch_size or max_length is no whole number from 1; weights of another number of layers.

    >>> from nested_jax import preset
    >>> config = preset("tiny-titans")
    >>> state = init_state(config, init_weights(config, jax.random.key(0)), batch_size=2)
    >>> int(state.position)
    0
    """
    check_config(config)
    rules = as_rules(config, rules)
    check_size("batch_size", batch_size)
    if max_length is not None:
        check_size("max_length", max_length)
    _check_weights(config, weights)
    whole = min(config.layers - config.adapting + 1, config.layers)
    mixers = init_mixers(config, _cut(weights["blocks"], slice(whole)), batch_size, max_length)
    learning = None
    if config.adapting:
        reader = cms_reader(config, weights, batch_size, rules, max_length)
        learning = reader.init_state(batch_size, config.width, compute_dtype(config, weights))
    return ModelState(np.int32(0), mixers, learning)


def apply(
    config: ModelConfig,
    weights: PyTree,
    tokens: ArrayLike,
    state: ModelState,
    *,
    reset: ArrayLike | None = None,
    multiple: int = 1,
    closes: bool | None = None,
    learn: Bool[Array, "B T"] | None = None,
    rules: Rules | None = None,
) -> tuple[Float[Array, "B T V"], ModelState]:
    """Logits of the next token at every token, and the state after the last.

    Args:
        config, weights, rules: as of `init_state`.
        tokens: integers (B, T) from 0 to V - 1.
        state: of `init_state`, or of the call before.
        reset: (B, T), true where a document starts: that row's fast state starts anew before the token. Documents start on
            multiples of `config.alignment` tokens; elsewhere a reset is an error (NaN logits under `jit`).
        multiple: a promise that the tokens read so far are a multiple of this number, which lets a call under `jit`
            take the path of whole chunks and segments. A state whose position is known needs none.
        closes: of a call under `jit` a promise that its first token closes a segment of the CMS (True) or does not (False)
            and, unless `multiple` is one of `config.cms.periods[-1]`, that the tokens lie in one segment. None: any tokens.
        learn: the tokens whose prediction the CMS learns from; None: all. Sequence layers remember every token.

    Returns:
        (logits, float32 or float64, state).

    Raises:
        UserError: tokens out of range (NaN logits under `jit`); tokens, reset, weights and state that do not fit one another
            or the config; a multiple below 1.

    Source: NL Eq. 94-97.

    >>> from nested_jax import preset
    >>> config = preset("tiny-transformer")
    >>> weights = init_weights(config, jax.random.key(0))
    >>> logits, state = apply(config, weights, jnp.zeros((2, 8), int), init_state(config, weights, 2))
    >>> logits.shape, int(state.position)
    ((2, 8, 1024), 8)
    """
    x, state = _read(config, weights, tokens, state, reset, multiple, rules, closes, learn)
    return x if config.adapting else head(config, weights, x), state


def target_nats(
    config: ModelConfig,
    weights: PyTree,
    tokens: ArrayLike,
    targets: Int[Array, "B T"],
    state: ModelState,
    *,
    reset: ArrayLike | None = None,
    multiple: int = 1,
    rules: Rules | None = None,
) -> tuple[Float[Array, "B T"], ModelState]:
    """Nats -log p of a target at every token, and the state after the last: the softmax cross-entropy of `apply`'s logits.

    Where no block learns in context only some of the logits, a part of the tokens', are in memory at once.

    Args:
        config, weights, tokens, state, reset, multiple, rules: as of `apply`.
        targets: from 0 to V - 1.

    Returns:
        (nats, float32 or float64, state).

    Raises:
        UserError: as `apply`.

    >>> from nested_jax import preset
    >>> config = preset("tiny-transformer")
    >>> weights, tokens = init_weights(config, jax.random.key(0)), jnp.zeros((2, 8), int)
    >>> target_nats(config, weights, tokens, tokens, init_state(config, weights, 2))[0].shape
    (2, 8)
    """
    x, state = _read(config, weights, tokens, state, reset, multiple, rules)
    if config.adapting:
        return nats(x, targets), state
    B, T = targets.shape
    most = _LOGITS * max(jax.sharding.get_abstract_mesh().size, 1)
    parts = next(n for n in range(1, T + 1) if T % n == 0 and (B * T * config.vocabulary <= n * most or n == T))
    if parts == 1:
        return nats(head(config, weights, x), targets), state
    # Every part has tokens from all over the sequence, which a mesh may split.
    cut = lambda whole: jnp.moveaxis(whole.reshape(B, T // parts, parts, *whole.shape[2:]), 2, 0)
    part = jax.checkpoint(lambda given: nats(head(config, weights, given[0]), given[1]))
    return jnp.moveaxis(jax.lax.map(part, (cut(x), cut(targets))), 0, 2).reshape(B, T), state


_LOGITS = 2**27
"""Logits of a device that `target_nats` has in memory at once: 512 MB."""


def _read(
    config: ModelConfig,
    weights: PyTree,
    tokens: ArrayLike,
    state: ModelState,
    reset: ArrayLike | None,
    multiple: int,
    rules: Rules | None,
    closes: bool | None = None,
    learn: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T _"], ModelState]:
    """What the blocks make of tokens (B, T, D), or the logits where blocks learn in context; and the state after them."""
    check_config(config)
    rules = as_rules(config, rules)
    check_size("multiple", multiple)
    _check_weights(config, weights)
    _check_state(config, state, rules)
    ids = _check_tokens(config, tokens)
    position = state.position if isinstance(state.position, Tracer) else np.int32(state.position)
    position = bounded(position, config.alignment)
    starts = _check_starts(config, ids.shape, reset, state, position)
    if learn is not None and (np.shape(learn) != ids.shape or jnp.asarray(learn).dtype != bool):
        raise UserError(f"learn {shown(learn)}: give bools {list(ids.shape)}, one for each token")
    known = not isinstance(position, jax.Array)
    aligned = (int(position) if known else multiple) % config.reading == 0
    x = vary(embed(config, weights, ids), weights, state.mixers, starts)
    if starts is not None:
        misplaced = starts & ((position + jnp.arange(x.shape[1])) % config.alignment != 0)[None]
        x = jnp.where(misplaced.any(axis=1)[:, None, None], jnp.nan, x)

    def block(x, weights_and_mixer):
        weights, mixer = weights_and_mixer
        mixer, x = mix(config, weights, mixer, x, position, starts, aligned)
        return cms.apply(config.cms, weights["cms"], (), x), mixer

    frozen, mixers, learning = config.layers - config.adapting, state.mixers, state.learning
    if frozen:
        x, after = _scan_blocks(config, block, x, (_cut(weights["blocks"], slice(frozen)), _cut(mixers, slice(frozen))))
    if learning is None:
        mixers = after
    else:  # the first block that learns: its sequence layer comes before all CMS that learn
        last, x = mix(config, _cut(weights["blocks"], frozen), _cut(mixers, frozen), x, position, starts, aligned)
        last = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], last)
        mixers = jax.tree.map(lambda *parts: jnp.concatenate(parts), after, last) if frozen else last
        reader = cms_reader(config, weights, x.shape[0], rules)
        learning, grown = _reserve(learning, x.shape[1])
        targets = ids if learn is None else jnp.where(learn, ids, NOT_LEARNED)
        x, learning = reader.read(learning, position, x, targets, starts, multiple, closes)
        learning = _unbounded(learning) if grown else learning
    return x, ModelState(position + np.int32(ids.shape[1]), mixers, learning)


def _scan_blocks(config: ModelConfig, block: Callable, x: Array, blocks: PyTree) -> tuple[Array, PyTree]:
    """`lax.scan` of a block over stacked weights (L, ...), rematerialised where `memory_policy` is "loops" or "blocks"."""
    if config.memory_policy in ("loops", "blocks"):
        kept = (KEPT, LOOP) if config.memory_policy == "loops" else ()
        block = jax.checkpoint(block, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(*kept))
    return jax.lax.scan(block, x, blocks)


def mix(
    config: ModelConfig,
    weights: PyTree,
    state: PyTree,
    x: Float[Array, "B T D"],
    position: Position,
    reset: Bool[Array, "B T"] | None = None,
    aligned: bool = False,
    inner: bool = False,
) -> tuple[PyTree, Float[Array, "B T D"]]:
    """The sequence layer's half of a block: (state, x). inner: as of `inner_layer`."""
    x_normed, layer = rms_norm(weights["norm"], x), (inner_layer if inner else sequence_layer)(config)
    state, y = layer(weights["mixer"], state, x_normed, position, reset=reset, aligned=aligned)
    return state, lay(x + y, BATCH, TOKENS)


def init_mixers(config: ModelConfig, weights: PyTree, batch_size: int, max_length: int | None) -> PyTree:
    """State of the sequence layers of stacked blocks, leaves (L, ...)."""
    layer = sequence_layer(config)
    return jax.vmap(lambda weights: layer.init_state(weights, batch_size, max_length))(weights["mixer"])


def compute_dtype(config: ModelConfig, weights: PyTree) -> jnp.dtype:
    """Type of activations: the config's, or float64 if the weights are."""
    own = weights["embedding"].dtype
    return own if own == jnp.float64 else jnp.dtype(config.dtype)


def embed(config: ModelConfig, weights: PyTree, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Embeddings of unit mean square; NaN for a token out of range."""
    tokens = jnp.where(tokens < 0, config.vocabulary, tokens)  # a negative index would count from the end
    table = lay(weights["embedding"], HEADS)  # its shards are looked up where they are
    x = table.at[tokens].get(mode="fill", fill_value=jnp.nan) * config.width**0.5
    return lay(x.astype(compute_dtype(config, weights)), BATCH, TOKENS)


def head(config: ModelConfig, weights: PyTree, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Logits, float32."""
    out = weights["embedding"].T if config.tie_embeddings else weights["head"]
    return lay(upcast(rms_norm(weights["norm"], x) @ out.astype(x.dtype)), BATCH, TOKENS, HEADS)


def _cut(tree: PyTree, piece: int | slice) -> PyTree:
    """Some of the blocks, of leaves (L, ...)."""
    return jax.tree.map(itemgetter(piece), tree)


def cms_reader(
    config: ModelConfig, weights: PyTree, batch_size: int, rules: Rules | None, max_length: int | None = None
) -> Reader:
    """Reads with the blocks from the first one's CMS that learns on."""
    first = config.layers - config.adapting
    learning, between = _cut(weights["blocks"], slice(first, None)), _cut(weights["blocks"], slice(first + 1, None))
    whole_chunks = config.cms.periods[-1] % config.reading == 0
    rules = (cms.inner_rule(config.cms),) * len(config.cms.periods) if rules is None else rules

    def forward(fast, mixers, position, x, reset, aligned=whole_chunks):
        """Logits, from the inputs of the first CMS that learns, with each level's matrices."""
        x = cms.apply(config.cms, _cut(learning["cms"], 0), _cut(fast, 0), x)

        def block(x, weights_and_mixer):
            weights, fast, mixer = weights_and_mixer
            mixer, x = mix(config, weights, mixer, x, position, reset, aligned, inner=True)
            return cms.apply(config.cms, weights["cms"], fast, x), mixer

        if config.adapting > 1:
            x, mixers = _scan_blocks(config, block, x, (between, _cut(fast, slice(1, None)), mixers))
        return head(config, weights, x), mixers

    init = lambda: init_mixers(config, between, batch_size, max_length) if config.adapting > 1 else ()
    keep = config.checkpoint
    level = cms.nest_levels(config.cms, learning["cms"], forward, init, batch_size, rules, keep_all=keep == "none")
    segments = "none" if keep == "full" else keep  # the level computes each of its segments again by itself
    return Reader(config.cms, level, forward, config.reading, segments)


def _reserve(learning: InContext, tokens: int) -> tuple[InContext, bool]:
    """Room for more tokens in growing caches inside segments, whose shapes are those of a scan's carry."""
    inner = segment_state(learning.levels)
    if not isinstance(inner.mixers, AttentionState) or inner.mixers.limit is not None:
        return learning, False
    room = jax.vmap(lambda cache: reserve(cache, tokens))
    inner = type(inner)(*map(room, inner))
    return learning._replace(levels=with_segment(learning.levels, inner)), True


def _unbounded(learning: InContext) -> InContext:
    """The inverse: caches that grow again at the next call."""
    inner = segment_state(learning.levels)
    inner = type(inner)(*(cache._replace(limit=None) for cache in inner))
    return learning._replace(levels=with_segment(learning.levels, inner))


def check_config(config: ModelConfig) -> None:
    """Raises UserError for what is no ModelConfig."""
    if not isinstance(config, ModelConfig):
        made = f"preset({config!r})" if config in PRESETS else "preset('tiny-hope')"
        raise UserError(f"config {shown(config)}: give a ModelConfig, such as {made}")


def as_rules(config: ModelConfig, rules: optax.GradientTransformation | Rules | None) -> Rules | None:
    """One inner rule a level, from one for all or one for each; None for the config's own."""
    if rules is None:
        return None
    levels = len(config.cms.periods)
    each = (rules,) * levels if isinstance(rules, optax.GradientTransformation) else rules
    if not isinstance(each, Sequence) or not all(isinstance(rule, optax.GradientTransformation) for rule in each):
        raise UserError(f"rule {shown(rules)}: give an optax transformation, optax.sgd(1.0), or a tuple of one a level")
    if len(each) != levels:
        raise UserError(f"{len(each)} inner rules for the {levels} levels with a period: give one rule, or one a level")
    return tuple(each)


def _check_weights(config: ModelConfig, weights: PyTree) -> None:
    wanted, remedy = expected_weights(config), "give those of its init_weights"
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        found[jax.tree_util.keystr(path, simple=True, separator="/")] = np.shape(leaf)
    if found == wanted:
        return
    layers = found.get("blocks/norm", (config.layers,))[0]
    if layers != config.layers:
        raise UserError(f"weights have {layers} layers, the config {config.layers}: {remedy}")
    wrong = min(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    given, asked = (f"shape {list(each[wrong])}" if wrong in each else "none" for each in (found, wanted))
    raise UserError(f"weights: {wrong or type(weights).__name__} has {given}, the config asks for {asked}: {remedy}")


@functools.cache
def expected_weights(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that `init_weights` makes, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: init_weights(config, jax.random.key(0))))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


def _check_state(config: ModelConfig, state: ModelState, rules: Rules | None) -> None:
    wanted = expected_shapes(config) if rules is None else expected_shapes(config, tuple(rules))
    found, fits = jax.tree_util.tree_leaves_with_path(state), isinstance(state, ModelState)
    grows = config.attends and len(found) < len(wanted)  # a cache that grows has no limit
    wanted = [(path, shape) for path, shape in wanted if not (grows and path.endswith("limit"))]
    fits = fits and len(found) == len(wanted)
    for (path, leaf), (name, shape) in zip(found, wanted, strict=False):
        own = np.shape(leaf)
        fits = fits and jax.tree_util.keystr(path) == name and len(own) == len(shape) and not isinstance(leaf, str | float)
        for n, size in zip(own, shape, strict=False):
            fits = fits and size in (n, None)
    if fits and state.learning is not None:
        for level, period in zip(fast_weights(state.learning.levels), config.cms.periods, strict=True):
            elapsed = level.elapsed
            fits = fits and (isinstance(elapsed, Tracer) or int(elapsed) < period // config.cms.periods[-1])
    if fits and not isinstance(state.position, Tracer) and int(state.position) < 0:
        raise UserError(f"state.position {state.position}: give the tokens that the state has read, from 0")
    if not fits:
        raise UserError("the state is of another config: give init_state(config, ...), or the state of the call before")


@functools.cache
def expected_shapes(config: ModelConfig, rules: Rules | None = None) -> list[tuple[str, tuple[int | None, ...]]]:
    """Paths and shapes of the state that `init_state` makes, with None for axes of the batch and of an attention cache."""
    shapes, weights = [], lambda: init_weights(config, jax.random.key(0))
    for size in (1, 2):  # what differs is one of these axes
        made = lambda size=size: init_state(config, weights(), size, max_length=size, rules=rules)
        shapes.append(jax.tree_util.tree_leaves_with_path(jax.eval_shape(made)))
    axes = lambda *pair: tuple(n if n == m else None for n, m in zip(*pair, strict=True))
    return [(jax.tree_util.keystr(path), axes(a.shape, b.shape)) for (path, a), (_, b) in zip(*shapes, strict=True)]


def _check_tokens(config: ModelConfig, tokens) -> Int[Array, "B T"]:
    if not hasattr(tokens, "shape"):
        try:
            tokens = np.asarray(tokens)
        except ValueError:  # rows of unequal lengths
            raise UserError(f"tokens {shown(tokens)}: give integers of shape (B, T), rows of one length") from None
    if tokens.ndim != 2 or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(f"tokens {tokens.dtype}{list(tokens.shape)}: give integers of shape (B, T), at least one")
    if not isinstance(tokens, Tracer):
        values = np.asarray(tokens)
        least, most = values.min(), values.max()
        if least < 0 or most >= config.vocabulary:
            wrong = least if least < 0 else most
            raise UserError(f"token {wrong} is out of range: the model's vocabulary has tokens 0 to {config.vocabulary - 1}")
    return jnp.asarray(tokens, jnp.int32)


def _check_starts(
    config: ModelConfig, shape: tuple[int, ...], reset, state: ModelState, position: Position
) -> Bool[Array, "B T"] | None:
    """The starts of documents; None where it is known that there are none."""
    starts = np.asarray(reset) if isinstance(reset, list | tuple | bool | int) else reset
    check_rows("model", jax.tree.leaves(state.mixers)[0].shape[1], shape, starts)
    check_documents("model", config.alignment, position, starts)
    if starts is None or isinstance(starts, Tracer):
        return starts
    return jnp.asarray(starts) if np.asarray(starts).any() else None
