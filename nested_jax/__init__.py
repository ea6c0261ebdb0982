"""Nested Learning in JAX: levels, associative memories, the Continuum Memory System and Hope."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import TYPE_CHECKING

from nested_jax.cms import CMSConfig
from nested_jax.description import Description
from nested_jax.errors import UserError
from nested_jax.level import Level, nest, run
from nested_jax.models.config import PRESETS, ModelConfig, preset
from nested_jax.models.language_model import ModelState
from nested_jax.models.module import LanguageModel
from nested_jax.picture import describe
from nested_jax.surprise import local_surprise, surprise_and_grad

if TYPE_CHECKING:
    from nested_jax.train.trained import Trained

__version__ = version("nested-jax")


def load(run_dir: str | os.PathLike) -> Trained:
    """A trained model as the last checkpoint of a run folder has it: its config, weights, tokenizer and step.

    Args:
        run_dir: what `nested-jax train --run-dir` wrote.

    Returns:
        `Trained`: `.model`, a `LanguageModel`; `.tokenizer`; `.config`, a `TrainConfig`; `.step`.

    Raises:
        UserError: the folder holds no run, or no checkpoint that can be read.

    >>> load("no/such/run")
    Traceback (most recent call last):
    nested_jax.errors.UserError: --run-dir no/such/run holds no run: make one with nested-jax train --run-dir no/such/run
    """
    from nested_jax.train.trained import load_run

    return load_run(run_dir)


__all__ = [
    "PRESETS",
    "CMSConfig",
    "Description",
    "LanguageModel",
    "Level",
    "ModelConfig",
    "ModelState",
    "UserError",
    "describe",
    "load",
    "local_surprise",
    "nest",
    "preset",
    "run",
    "surprise_and_grad",
]
