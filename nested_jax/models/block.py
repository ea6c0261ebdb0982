"""One block: a sequence layer, then a CMS, each behind an RMS norm and beside a residual connection."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from nested_jax import cms
from nested_jax.memory.attention import Attention
from nested_jax.memory.deep import Rule
from nested_jax.memory.linear import LinearMemory
from nested_jax.memory.omega import OmegaMemory
from nested_jax.memory.self_modifying import SelfModifyingTitans
from nested_jax.memory.titans import Titans
from nested_jax.models.config import ModelConfig
from nested_jax.numerics import rms_norm, upcast
from nested_jax.typing import Array, Float, Int, PyTree

SequenceLayer = Attention | LinearMemory | OmegaMemory | Titans | SelfModifyingTitans


def sequence_layer(config: ModelConfig) -> SequenceLayer:
    """The config's sequence layer: (weights, state, x) -> (state, y)."""
    D, H, F, keep = config.width, config.heads, config.memory_hidden, config.memory_policy
    match config.mixer:
        case "self-modifying":
            return SelfModifyingTitans(
                D, H, F, config.chunk, config.projection_chunk, config.momentum,
                rule=Rule(retention=config.retention), checkpoint=keep,
            )  # fmt: skip
        case "titans":
            rule = Rule(erase="none", retention=config.retention)
            return Titans(D, H, F, config.chunk, config.momentum, rule=rule, checkpoint=keep)
        case "attention" | "sliding-window":
            window = config.window if config.mixer == "sliding-window" else None
            differentiated_twice = config.cms.periods and config.cms.meta_gradient == "full"
            return Attention(D, H, window, "xla" if differentiated_twice else None)
        case "lp":
            return OmegaMemory(D, H, "lp", 1, chunk=config.chunk, power=config.lp_power, checkpoint=keep)
        case "huber":
            return OmegaMemory(D, H, "huber", 1, chunk=config.chunk, threshold=config.huber_threshold, checkpoint=keep)
        case "omega":
            return OmegaMemory(D, H, "l2", config.omega_window, config.omega_features, config.chunk, checkpoint=keep)
        case rule:
            return LinearMemory(D, H, rule, config.chunk, keep)


def init_block(key: Array, config: ModelConfig) -> dict[str, Any]:
    """Slow weights of one block."""
    mixer, levels = jax.random.split(key)
    return {
        "norm": jnp.ones(config.width),
        "mixer": sequence_layer(config).init_weights(mixer),
        "cms": cms.init_weights(levels, config.cms, config.width),
    }


def mix(layer: SequenceLayer, weights: PyTree, state: PyTree, x: Float[Array, "B T D"], position, reset, aligned: bool):
    """The sequence layer's half of a block: (state without its position, x)."""
    state = state._replace(position=position)
    state, y = layer(weights["mixer"], state, rms_norm(weights["norm"], x), reset=reset, aligned=aligned)
    return state._replace(position=None), x + y


def init_mixers(layer: SequenceLayer, weights: PyTree, batch: int, max_length: int | None) -> PyTree:
    """State of the sequence layers of stacked blocks, leaves (L, ...), positions left out."""
    init = lambda weights: layer.init_state(weights, batch, max_length)._replace(position=None)
    return jax.vmap(init)(weights["mixer"])


def compute_dtype(config: ModelConfig, weights: PyTree) -> jnp.dtype:
    """Type of activations: the config's, or float64 if the weights are."""
    own = weights["embedding"].dtype
    return own if own == jnp.float64 else jnp.dtype(config.dtype)


def embed(config: ModelConfig, weights: PyTree, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Embeddings of unit mean square; NaN for a token out of range."""
    tokens = jnp.where(tokens < 0, config.vocabulary, tokens)  # a negative index would count from the end
    x = weights["embedding"].at[tokens].get(mode="fill", fill_value=jnp.nan) * config.width**0.5
    return x.astype(compute_dtype(config, weights))


def head(config: ModelConfig, weights: PyTree, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Logits, float32."""
    out = weights["embedding"].T if config.tie_embeddings else weights["head"]
    return upcast(rms_norm(weights["norm"], x) @ out.astype(x.dtype))
