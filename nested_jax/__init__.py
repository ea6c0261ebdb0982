"""Nested Learning in JAX: levels, associative memories, the Continuum Memory System and Hope."""

from nested_jax.cms import CMSConfig
from nested_jax.description import Description
from nested_jax.level import Level, nest, run
from nested_jax.models.config import PRESETS, ModelConfig, preset
from nested_jax.models.language_model import ModelState
from nested_jax.models.module import LanguageModel
from nested_jax.picture import describe
from nested_jax.surprise import local_surprise, surprise_and_grad

__all__ = [
    "PRESETS",
    "CMSConfig",
    "Description",
    "LanguageModel",
    "Level",
    "ModelConfig",
    "ModelState",
    "describe",
    "local_surprise",
    "nest",
    "preset",
    "run",
    "surprise_and_grad",
]
