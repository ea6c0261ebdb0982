"""A run folder read back: what to evaluate and to write text with."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax

from nested_jax.data import load_tokenizer
from nested_jax.errors import UserError
from nested_jax.train.checkpoint import CHECKPOINTS, Checkpoints
from nested_jax.train.config import TrainConfig
from nested_jax.train.folder import read_config
from nested_jax.train.sample import Tokenizer
from nested_jax.train.state import init_params
from nested_jax.train.text import TOKENIZER
from nested_jax.typing import PyTree


class Trained(NamedTuple):
    """A model as a run's last checkpoint has it."""

    config: TrainConfig
    parameters: PyTree
    tokenizer: Tokenizer
    step: int


def load(folder: Path) -> Trained:
    """Reads a run folder. Raises UserError where it holds no run, or no checkpoint that can be read."""
    config = read_config(folder)
    if config is None:
        raise UserError(f"--run-dir {folder} holds no run: make one with nested-jax train --run-dir {folder}")
    if not (folder / CHECKPOINTS).is_dir() or (step := (checkpoints := Checkpoints(folder)).latest()) is None:
        raise UserError(f"--run-dir {folder} holds no checkpoint yet: let nested-jax train go on")
    parameters = checkpoints.restore_parameters(jax.eval_shape(lambda: init_params(config.model, config.seed)))
    checkpoints.close()
    return Trained(config, parameters, load_tokenizer(folder / TOKENIZER), step)
