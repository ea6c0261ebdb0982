"""LanguageModel: one class, whose config picks the sequence layer and the CMS, for Hope and all its baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from nested_jax import cms
from nested_jax.errors import UserError
from nested_jax.level import Level
from nested_jax.memory.attention import AttentionState, reserve
from nested_jax.memory.stream import advance
from nested_jax.models.block import compute_dtype, embed, head, init_block, init_mixers, mix, sequence_layer
from nested_jax.models.config import ModelConfig
from nested_jax.models.in_context import InContext, OpenSegment, Reader
from nested_jax.typing import Array, Bool, Float, Int, PyTree


class ModelState(NamedTuple):
    """Fast state of a model: everything it has learned while reading.

    position: tokens read, one number for the whole batch; mixers: of the sequence layers that read a call as a whole,
    leaves (L, ...); learning: of the blocks that learn in context, None if none do.
    """

    position: Array | np.int32
    mixers: PyTree
    learning: InContext | None


class LanguageModel(nnx.Module):
    """A language model over tokens.

    A call is (tokens (B, T), state) -> (logits (B, T, V), state), with state from `init_state`. The module only holds the
    slow weights, those of all blocks stacked along a leading axis; it is never changed by a call, and every JAX transform
    can be applied to `nnx.split` of it.

    Args:
        config: see `ModelConfig`.
        rngs: source of the initial weights.
        rule: inner rule of the CMS, any optax transformation at learning rate 1, or one for each level, slow to fast;
            the default is the config's.

    >>> import jax.numpy as jnp
    >>> from nested_jax import LanguageModel, preset
    >>> model = LanguageModel(preset("tiny-transformer"), rngs=nnx.Rngs(0))
    >>> logits, state = model(jnp.zeros((2, 8), int), model.init_state(2))
    >>> logits.shape, int(state.position)
    ((2, 8, 256), 8)
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        rule: optax.GradientTransformation | Sequence[optax.GradientTransformation] | None = None,
    ):
        self.config = config
        self.rules = nnx.static(_rules(config, rule))
        V, D = config.vocabulary, config.width
        embedding, blocks, out = jax.random.split(rngs.params(), 3)
        self.embedding = nnx.Param(jax.random.normal(embedding, (V, D)) * D**-0.5)
        stacked = jax.vmap(lambda key: init_block(key, config))(jax.random.split(blocks, config.layers))
        self.blocks = nnx.data(jax.tree.map(nnx.Param, stacked))
        # A token's logit at itself starts at 1 if the embeddings are tied: the loss starts near ln V.
        self.norm = nnx.Param(jnp.full(D, D**-0.5 if config.tie_embeddings else 1.0, jnp.float32))
        if not config.tie_embeddings:
            self.head = nnx.Param(jax.random.normal(out, (D, V)) / D)

    def init_state(self, batch: int, *, max_length: int | None = None) -> ModelState:
        """The state before the first token: a differentiable function of the present weights.

        Args:
            batch: rows B.
            max_length: most tokens that an attention cache holds, a window that slides beyond them; None: it grows.
        """
        return _init_state(self.config, self._rules, self._weights, batch, max_length)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        state: ModelState,
        *,
        reset: Bool[Array, "B T"] | None = None,
        multiple: int = 1,
    ) -> tuple[Float[Array, "B T V"], ModelState]:
        """Logits of the next token at every token, and the state after the last.

        Args:
            reset: true where a document starts: that row's fast state starts anew before the token. Documents start on
                multiples of `config.alignment` tokens; elsewhere a reset is an error (NaN logits under `jit`).
            multiple: a promise that the tokens read so far are a multiple of this number, which lets a call under `jit`
                take the path of whole chunks and segments. A state whose position is known needs none.

        Raises UserError for tokens out of range (NaN logits under `jit`), and for shapes that do not fit.
        """
        return _read(self.config, self._rules, self._weights, tokens, state, reset, multiple)

    @property
    def parameters(self) -> int:
        """Number of learned parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self, nnx.Param)))

    def levels(self) -> list[tuple[Level, int]]:
        """What learns in context, from fast to slow, and in how many blocks."""
        config, weights = self.config, self._weights
        split = _split(config, weights["blocks"])
        first = jax.tree.map(lambda w: w[0], weights["blocks"]["mixer"])
        found = [(level, config.layers) for level in sequence_layer(config).levels(first, 1)]
        if config.adapting:
            found.append((_reader(config, self._rules, weights, split, 1, None).level, config.adapting))
        return found

    def serves(self, path: Sequence[str]) -> str:
        """What the parameter at a path is for."""
        config = self.config
        match path:
            case ("blocks", "mixer", *_):
                return "weights of sequence layers"
            case ("blocks", "cms", level, *_) if level != "mix":
                frozen = config.layers
                if int(level.removeprefix("level")) > config.cms.frozen:
                    frozen -= config.adapting
                if frozen == config.layers:
                    return f"CMS {level}, frozen in context"
                return f"starts of CMS {level}" + f", in {frozen} of {config.layers} blocks frozen in context" * (frozen > 0)
            case _:
                return "embedding, norms, head"

    @property
    def _weights(self) -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))

    @property
    def _rules(self) -> tuple[optax.GradientTransformation, ...]:
        return self.rules or (cms.inner_rule(self.config.cms),) * len(self.config.cms.periods)


def _rules(config: ModelConfig, rule) -> tuple[optax.GradientTransformation, ...] | None:
    levels = len(config.cms.periods)
    if rule is None or isinstance(rule, optax.GradientTransformation):
        return None if rule is None else (rule,) * levels
    if len(rule) != levels:
        raise UserError(f"{len(rule)} inner rules for the {levels} levels with a period: give one rule, or one a level")
    return tuple(rule)


def _init_state(config: ModelConfig, rules, weights: PyTree, batch: int, max_length: int | None) -> ModelState:
    layer, split = sequence_layer(config), _split(config, weights["blocks"])
    mixers = init_mixers(layer, split.reading, batch, max_length)
    if not config.adapting:
        return ModelState(np.int32(0), mixers, None)
    levels = _reader(config, rules, weights, split, batch, max_length).fresh()
    P = config.cms.periods[-1]
    inputs = jnp.zeros((batch, P, config.width), compute_dtype(config, weights))
    segment = OpenSegment(inputs, jnp.zeros((batch, P), jnp.int32), jnp.zeros(batch, bool))
    return ModelState(np.int32(0), mixers, InContext(levels, segment))


class _Split(NamedTuple):
    """Stacked weights of the blocks, by what reads them."""

    whole: PyTree  # blocks that do not learn in context
    reading: PyTree  # these, and the first that does: its sequence layer comes before all CMS that learn
    learning: PyTree  # blocks whose CMS learns
    between: PyTree  # of these, all but the first: their sequence layers run inside the segments


def _split(config: ModelConfig, blocks: PyTree) -> _Split:
    first = config.layers - config.adapting
    cut = lambda piece: jax.tree.map(lambda w: w[piece], blocks)
    if not config.adapting:
        return _Split(blocks, blocks, None, None)
    return _Split(cut(slice(first)), cut(slice(first + 1)), cut(slice(first, None)), cut(slice(first + 1, None)))


def _read(config: ModelConfig, rules, weights, tokens, state: ModelState, reset, multiple: int):
    layer, split, position = sequence_layer(config), _split(config, weights["blocks"]), state.position
    if not isinstance(position, jax.core.Tracer):
        position = np.int32(position)
    known = not isinstance(position, jax.Array)
    aligned = (int(position) if known else multiple) % config.reading == 0
    tokens = _in_range(_of_shape(tokens, reset, state), config.vocabulary).astype(jnp.int32)
    reset = _on_alignment(reset, position, config.alignment)
    x = embed(config, weights, tokens)
    if reset is not None:
        misplaced = reset & ((position + jnp.arange(x.shape[1])) % config.alignment != 0)[None]
        x = jnp.where(misplaced.any(axis=1)[:, None, None], jnp.nan, x)

    def block(x, weights_and_state):
        weights, mixer = weights_and_state
        mixer, x = mix(layer, weights, mixer, x, position, reset, aligned)
        return cms.apply(config.cms, weights["cms"], (), x), mixer

    whole = config.layers - config.adapting
    learning = state.learning
    if not config.adapting:
        x, mixers = jax.lax.scan(block, x, (split.whole, state.mixers))
        logits = head(config, weights, x)
    else:
        parts = []
        if whole:
            x, part = jax.lax.scan(block, x, (split.whole, jax.tree.map(lambda s: s[:whole], state.mixers)))
            parts.append(part)
        at = lambda tree: jax.tree.map(lambda s: s[whole], tree)
        part, x = mix(layer, at(split.reading), at(state.mixers), x, position, reset, aligned)
        parts.append(jax.tree.map(lambda s: jnp.asarray(s)[None], part))
        mixers = jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts)
        reader = _reader(config, rules, weights, split, len(x), None)
        inner = cms.segment_state(learning.levels)
        grows = isinstance(inner.mixers, AttentionState) and inner.mixers.limit is None
        if grows:
            room = jax.vmap(lambda cache: reserve(cache, x.shape[1]))
            learning = _with_mixers(learning, room(inner.mixers), room(inner.begun))
        logits, learning = reader.read(learning, position, x, tokens, reset, multiple)
        if grows:
            inner = cms.segment_state(learning.levels)
            learning = _with_mixers(learning, inner.mixers._replace(limit=None), inner.begun._replace(limit=None))
    return logits, ModelState(advance(position, tokens.shape[1]), mixers, learning)


def _with_mixers(learning: InContext, mixers: PyTree, begun: PyTree) -> InContext:
    inner = cms.segment_state(learning.levels)._replace(mixers=mixers, begun=begun)
    return learning._replace(levels=cms.with_segment(learning.levels, inner))


def _reader(config: ModelConfig, rules, weights: PyTree, split: _Split, batch: int, max_length: int | None) -> Reader:
    layer = sequence_layer(config)
    whole_chunks = config.cms.periods[-1] % config.reading == 0

    def forward(fast, mixers, position, x, reset, aligned=whole_chunks):
        """Logits of the blocks that learn, from the first one's CMS on."""
        first = lambda tree: jax.tree.map(lambda w: w[0], tree)
        others = lambda tree: jax.tree.map(lambda w: w[1:], tree)
        x = cms.apply(config.cms, first(split.learning)["cms"], [first(level) for level in fast], x)

        def block(x, weights_and_state):
            weights, fast, mixer = weights_and_state
            mixer, x = mix(layer, weights, mixer, x, position, reset, aligned)
            return cms.apply(config.cms, weights["cms"], fast, x), mixer

        if config.adapting > 1:
            x, mixers = jax.lax.scan(block, x, (split.between, [others(level) for level in fast], mixers))
        return head(config, weights, x), mixers

    mixers = lambda: init_mixers(layer, split.between, batch, max_length) if config.adapting > 1 else ()
    keep = config.memory_policy
    level = cms.in_context(config.cms, split.learning["cms"], forward, mixers, batch, rules, keep_all=keep == "none")
    segments = "none" if keep == "full" else keep  # the level computes each of its segments again by itself
    return Reader(config.cms, level, forward, config.reading, fresh=lambda: level.init(()), checkpoint=segments)


def _of_shape(tokens, reset, state: ModelState):
    tokens = tokens if hasattr(tokens, "shape") else np.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(f"tokens {tokens.dtype}{list(tokens.shape)}: give integers of shape (B, T), at least one")
    if reset is not None and np.shape(reset) != tokens.shape:
        raise UserError(f"reset has shape {list(np.shape(reset))}: give one of the tokens' shape {list(tokens.shape)}")
    rows = jax.tree.leaves(state.mixers)[0].shape[1]
    if rows != len(tokens):
        raise UserError(f"tokens have {len(tokens)} rows, the state {rows}: give init_state(batch={len(tokens)})")
    return tokens


def _in_range(tokens: Int[Array, "B T"], vocabulary: int) -> Int[Array, "B T"]:
    if not isinstance(tokens, jax.core.Tracer):
        values = np.asarray(tokens)
        if values.size and not 0 <= values.min() <= values.max() < vocabulary:
            wrong = values.min() if values.min() < 0 else values.max()
            raise UserError(f"token {wrong} is out of range: the model's vocabulary has tokens 0 to {vocabulary - 1}")
    return jnp.asarray(tokens)


def _on_alignment(reset, position, alignment: int):
    if reset is None or isinstance(reset, jax.core.Tracer) or isinstance(position, jax.Array):
        return reset
    reset = np.asarray(reset)
    at = int(position) + np.arange(reset.shape[1])
    wrong = at[(reset & (at % alignment != 0)).any(axis=0)]
    if wrong.size:
        raise UserError(f"reset at token {wrong[0]}: documents start on multiples of {alignment} tokens, pad the one before")
    return jnp.asarray(reset) if reset.any() else None
