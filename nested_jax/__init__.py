"""Nested Learning in JAX: levels, associative memories, the Continuum Memory System and Hope."""

from nested_jax.cms import CMSConfig
from nested_jax.level import Level, nest, run
from nested_jax.models.config import PRESETS, ModelConfig, preset
from nested_jax.models.language_model import LanguageModel, ModelState
from nested_jax.surprise import local_surprise

__all__ = [
    "PRESETS",
    "CMSConfig",
    "LanguageModel",
    "Level",
    "ModelConfig",
    "ModelState",
    "local_surprise",
    "nest",
    "preset",
    "run",
]
