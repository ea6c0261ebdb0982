"""Nested Learning in JAX: levels, associative memories, the Continuum Memory System and Hope.

A name is imported when it is first asked for, so that the command line answers Ctrl-C before JAX is there.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from nested_jax._xla_flags import avoid_crash as _avoid_crash

if TYPE_CHECKING:
    from nested_jax.cms import CMSConfig
    from nested_jax.description import Description
    from nested_jax.errors import UserError
    from nested_jax.level import Level, nest, run
    from nested_jax.models.config import PRESETS, ModelConfig, preset
    from nested_jax.models.language_model import ModelState
    from nested_jax.models.module import LanguageModel
    from nested_jax.picture import describe
    from nested_jax.surprise import local_surprise, surprise_and_grad
    from nested_jax.train.trained import Trained

_HOMES = {
    "cms": ("CMSConfig",),
    "description": ("Description",),
    "errors": ("UserError",),
    "level": ("Level", "nest", "run"),
    "models.config": ("PRESETS", "ModelConfig", "preset"),
    "models.language_model": ("ModelState",),
    "models.module": ("LanguageModel",),
    "picture": ("describe",),
    "surprise": ("local_surprise", "surprise_and_grad"),
}

__version__ = version("nested-jax")
_avoid_crash()


def load(run_dir: str | os.PathLike) -> Trained:
    """A trained model as the last checkpoint of a run folder has it: its config, weights, tokenizer and step.

    Args:
        run_dir: what `nested-jax train --run-dir` wrote.

    Returns:
        `Trained`: `.model`, a `LanguageModel`; `.tokenizer`, None for a task's; `.config`, a `TrainConfig`; `.step`.

    Raises:
        UserError: the folder holds no run, or no checkpoint that can be read.

    >>> load("no/such/run")
    Traceback (most recent call last):
    nested_jax.errors.UserError: --run-dir no/such/run holds no run: make one with nested-jax train --run-dir no/such/run
    """
    from nested_jax.train.trained import load_run

    return load_run(run_dir)


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


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
