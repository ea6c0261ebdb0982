"""A run folder read back: what to evaluate and to write text with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx

from nested_jax.data import load_tokenizer
from nested_jax.errors import UserError
from nested_jax.models.module import LanguageModel
from nested_jax.train.checkpoint import CHECKPOINTS, Checkpoints
from nested_jax.train.config import TrainConfig
from nested_jax.train.folder import read_config
from nested_jax.train.sample import Tokenizer
from nested_jax.train.state import init_params
from nested_jax.train.text import TOKENIZER
from nested_jax.typing import PyTree


class Trained(NamedTuple):
    """A model as a run's last checkpoint has it: `config` of the run, `params` as nested dicts, `tokenizer`, `step`."""

    config: TrainConfig
    params: PyTree
    tokenizer: Tokenizer
    step: int

    @property
    def model(self) -> LanguageModel:
        """The model with the trained parameters."""
        shell = nnx.eval_shape(lambda: LanguageModel(self.config.model, rngs=nnx.Rngs(0)))
        return nnx.merge(nnx.split(shell, nnx.Param)[0], nnx.State(self.params))


def load_run(run_dir: str | os.PathLike) -> Trained:
    """Reads a run folder, see `nested_jax.load`.

    Raises:
        UserError: the folder holds no run, or no checkpoint that can be read.
    """
    if not isinstance(run_dir, str | os.PathLike):
        raise UserError(f"run_dir {run_dir!r}: give the path of a run folder")
    folder = Path(run_dir)
    config = read_config(folder)
    if config is None:
        raise UserError(f"--run-dir {folder} holds no run: make one with nested-jax train --run-dir {folder}")
    checkpoints = Checkpoints(folder) if (folder / CHECKPOINTS).is_dir() else None
    if checkpoints is None or (step := checkpoints.latest()) is None:
        raise UserError(f"--run-dir {folder} holds no checkpoint yet: let nested-jax train go on")
    params = checkpoints.restore_parameters(jax.eval_shape(lambda: init_params(config.model, config.seed)))
    checkpoints.close()
    return Trained(config, params, load_tokenizer(folder / TOKENIZER), step)
