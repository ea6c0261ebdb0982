"""What a block is made of: a sequence layer and a CMS."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from nested_jax import cms
from nested_jax.memory.attention import Attention
from nested_jax.memory.layer import SequenceLayer
from nested_jax.memory.linear import LinearMemory
from nested_jax.memory.omega import OmegaMemory
from nested_jax.memory.self_modifying import SelfModifyingTitans
from nested_jax.memory.stream import MemoryLayer
from nested_jax.memory.titans import Titans
from nested_jax.models.config import ModelConfig
from nested_jax.typing import Array


@cache
def sequence_layer(config: ModelConfig) -> SequenceLayer:
    """The config's sequence layer."""
    D, H, F = config.width, config.heads, config.memory_hidden
    chunks: dict[str, Any] = {name: getattr(config, name) for name in ("chunk", "checkpoint", "implementation")}
    values = config.values or "unit"
    omega: dict[str, Any] = {"max_rate": config.max_rate, "surprise": config.surprise, "values": values, **chunks}
    rate, rule = config.largest_rate, config.rule
    match config.mixer:
        case "self-modifying":
            own = {name: getattr(config, name) for name in ("projection_chunk", "rates", "targets", "generated")}
            return SelfModifyingTitans(D, H, F, momentum=config.momentum, max_rate=rate, rule=rule, **own, **chunks)
        case "titans":
            return Titans(D, H, F, config.momentum, config.max_rate, rule, values, **chunks)
        case "attention" | "sliding-window":
            window = config.window if config.mixer == "sliding-window" else None
            own = "xla" if config.implementation == "xla" else None
            return Attention(D, H, window, own, config.rotary_base, config.attention_bias)
        case "lp":
            return OmegaMemory(D, H, "lp", window=1, power=config.lp_power, **omega)
        case "huber":
            return OmegaMemory(D, H, "huber", window=1, threshold=config.huber_threshold, **omega)
        case "omega":
            return OmegaMemory(D, H, "l2", config.omega_window, config.omega_features, **omega)
        case linear:
            return LinearMemory(D, H, linear, rate, config.values, config.gated, **chunks)


@cache
def inner_layer(config: ModelConfig) -> SequenceLayer:
    """The same between MLPs that learn in context: full meta-gradients differentiate it twice, which XLA's form is for."""
    layer = sequence_layer(config)
    if isinstance(layer, Attention | MemoryLayer) and config.cms.meta_gradient == "full":
        return dataclasses.replace(layer, implementation="xla")
    return layer


def init_block(key: Array, config: ModelConfig) -> dict[str, Any]:
    """Slow weights of one block."""
    mixer, levels = jax.random.split(key)
    return {
        "norm": jnp.ones(config.width),
        "mixer": sequence_layer(config).init_weights(mixer),
        "cms": cms.init_weights(levels, config.cms, config.width),
    }
