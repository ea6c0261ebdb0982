"""What a block is made of: a sequence layer and a CMS."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from nested_jax import cms
from nested_jax.memory.attention import Attention
from nested_jax.memory.deep import Rule
from nested_jax.memory.layer import SequenceLayer
from nested_jax.memory.linear import LinearMemory
from nested_jax.memory.omega import OmegaMemory
from nested_jax.memory.self_modifying import SelfModifyingTitans
from nested_jax.memory.titans import Titans
from nested_jax.models.config import ModelConfig
from nested_jax.typing import Array


@cache
def sequence_layer(config: ModelConfig) -> SequenceLayer:
    """The config's sequence layer."""
    D, H, F = config.width, config.heads, config.memory_hidden
    chunks: dict[str, Any] = {"chunk": config.chunk, "checkpoint": config.memory_policy}
    match config.mixer:
        case "self-modifying":
            rule = Rule(retention=config.retention)
            return SelfModifyingTitans(D, H, F, config.projection_chunk, config.momentum, rule=rule, **chunks)
        case "titans":
            rule = Rule(erase="none", retention=config.retention)
            return Titans(D, H, F, config.momentum, rule=rule, **chunks)
        case "attention" | "sliding-window":
            window = config.window if config.mixer == "sliding-window" else None
            differentiated_twice = config.cms.periods and config.cms.meta_gradient == "full"
            return Attention(D, H, window, "xla" if differentiated_twice else None)
        case "lp":
            return OmegaMemory(D, H, "lp", window=1, power=config.lp_power, **chunks)
        case "huber":
            return OmegaMemory(D, H, "huber", window=1, threshold=config.huber_threshold, **chunks)
        case "omega":
            return OmegaMemory(D, H, "l2", config.omega_window, config.omega_features, **chunks)
        case rule:
            return LinearMemory(D, H, rule, **chunks)


def init_block(key: Array, config: ModelConfig) -> dict[str, Any]:
    """Slow weights of one block."""
    mixer, levels = jax.random.split(key)
    return {
        "norm": jnp.ones(config.width),
        "mixer": sequence_layer(config).init_weights(mixer),
        "cms": cms.init_weights(levels, config.cms, config.width),
    }
