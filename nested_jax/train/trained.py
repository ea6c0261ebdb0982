"""A run folder read back: what to evaluate and to write text with."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from nested_jax.data import Tokenizer, load_tokenizer
from nested_jax.errors import UserError
from nested_jax.models.language_model import init_state
from nested_jax.models.module import LanguageModel
from nested_jax.parallel import rules
from nested_jax.parallel.mesh import Divided
from nested_jax.train.checkpoint import Checkpoints
from nested_jax.train.config import TrainConfig
from nested_jax.train.folder import read_config
from nested_jax.train.state import init_params, open_mesh, shapes_of
from nested_jax.train.text import TOKENIZER
from nested_jax.typing import PyTree


class Trained(NamedTuple):
    """A model as a run's last checkpoint has it: `config` of the run, `params` as nested dicts, `tokenizer`, `step`."""

    config: TrainConfig
    params: PyTree
    tokenizer: Tokenizer | None  # of a run on text
    step: int

    @property
    def model(self) -> LanguageModel:
        """The model with the trained parameters."""
        shell = nnx.eval_shape(lambda: LanguageModel(self.config.model, rngs=nnx.Rngs(0)))
        return nnx.merge(nnx.split(shell, nnx.Param)[0], nnx.State(self.params))


def load_run(
    run_dir: str | os.PathLike,
    say: Callable[[str], None] = warnings.warn,
    lay: Callable[[TrainConfig], Mesh | None] = lambda config: None,
) -> Trained:
    """Reads a run folder, see `nested_jax.load`. It may be anyone's: nothing outside it is read, no size taken on trust.

    Args:
        run_dir: the folder.
        say: is called with one line where a checkpoint is damaged and the one before it is read.
        lay: of a run's config, the mesh that its weights lie on; None: one device.

    Raises:
        UserError: the folder holds no run, or no checkpoint that can be read, or a larger model than fits in memory.
    """
    if not isinstance(run_dir, str | os.PathLike):
        raise UserError(f"run_dir {run_dir!r}: give the path of a run folder")
    folder = Path(run_dir)
    config = read_config(folder)
    if config is None:
        raise UserError(f"--run-dir {folder} holds no run: make one with nested-jax train --run-dir {folder}")
    with contextlib.closing(Checkpoints(folder, say)) as checkpoints:
        if checkpoints.latest() is None:
            raise UserError(f"--run-dir {folder} holds no checkpoint yet: let nested-jax train go on")
        shapes, _ = shapes_of(f"the model of --run-dir {folder}", lambda: _weights_and_state(config))
        mesh = lay(config)
        here = SingleDeviceSharding(jax.local_devices()[0])  # wherever it was trained
        places = rules.weight_shardings(mesh, shapes) if mesh else jax.tree.map(lambda _: here, shapes)
        shapes = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
        step, params = checkpoints.restore_parameters(shapes)
    if config.task is not None:
        return Trained(config, params, None, step)
    tokenizer = load_tokenizer(folder / TOKENIZER, within=folder)
    if tokenizer.vocabulary > config.model.vocabulary:
        sizes = f"{tokenizer.vocabulary} tokens and its model {config.model.vocabulary}"
        raise UserError(f"--run-dir {folder}: {TOKENIZER} has {sizes}; put the file back as it was")
    return Trained(config, params, tokenizer, step)


@contextlib.contextmanager
def opened(
    run_dir: str, mesh: str | None, divided: Callable[[TrainConfig], Divided], say: Callable[[str], None]
) -> Iterator[Trained]:
    """A context with a run read back, on devices that read rows together: their mesh is JAX's current one.

    Args:
        run_dir: the folder.
        mesh: of a flag, see `train.state.open_mesh`.
        divided: of a run's config, what is read at a time.
        say: as of `load_run`.

    Raises:
        UserError: as `load_run` and `open_mesh`.
    """
    with contextlib.ExitStack() as stack:

        def lay(config: TrainConfig) -> Mesh | None:
            if chosen := open_mesh(mesh, divided(config)):
                stack.enter_context(jax.set_mesh(chosen))
            return chosen

        yield load_run(run_dir, say, lay)


def _weights_and_state(config: TrainConfig) -> tuple[PyTree, PyTree]:
    weights = init_params(config.model, config.seed)
    return weights, init_state(config.model, weights, 1, max_length=1)
