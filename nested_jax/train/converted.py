"""A run folder of a pretrained model, as if it had been trained here."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from nested_jax.data import pretrained
from nested_jax.errors import UserError
from nested_jax.models.convert import convert, read_llama
from nested_jax.train import folder as folders
from nested_jax.train.checkpoint import Checkpoints
from nested_jax.train.config import TrainConfig
from nested_jax.train.state import TrainState
from nested_jax.train.text import TOKENIZER

if TYPE_CHECKING:
    from nested_jax.cli.flags import Conversion


def write_run(flags: Conversion) -> tuple[TrainConfig, int]:
    """Writes the folder that the flags name.

    Args:
        flags: of `nested-jax convert`.

    Returns:
        (its config, number of parameters).

    Raises:
        UserError: the source cannot be converted, or there is something in the folder.
    """
    folder = Path(flags.run_dir)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--run-dir {folder} is not empty: give another one")
    source = read_llama(flags.source)
    gguf = Path(flags.source).is_file()
    tokenizer = pretrained.of_gguf(source.about) if gguf else pretrained.of_folder(Path(flags.source))
    choices = {name: getattr(flags, name) for name in ("periods", "hidden", "blocks", "rates", "seed")}
    model, weights = convert(source, flags.way, **choices)
    family = "hope-attention" if model.adapting else "transformer"  # whose other choices a further training starts from
    config = TrainConfig.from_preset(f"140m-{family}", model=model, run_dir=str(folder))
    with _whole(folder) as part, folders.lock(part), contextlib.closing(Checkpoints(part)) as checkpoints:
        tokenizer.save(part / TOKENIZER)
        folders.write_config(part, dataclasses.replace(config, fresh=False), f"converted from {Path(flags.source).name}")
        checkpoints.save(TrainState(jnp.zeros((), jnp.int32), weights, None, None), {})
    return config, sum(leaf.size for leaf in jax.tree.leaves(weights))


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to this one at the end, or removed after an error."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    try:
        yield part
        part.rename(folder)  # an empty one is replaced
    finally:
        shutil.rmtree(part, ignore_errors=True)
