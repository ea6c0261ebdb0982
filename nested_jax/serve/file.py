"""The file of a learner: its fast state as safetensors, with the fingerprint of the model that it belongs to."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.flax import save

from nested_jax.errors import UserError
from nested_jax.files import open_file, write_file
from nested_jax.memory.attention import AttentionState
from nested_jax.models.config import ModelConfig
from nested_jax.typing import Array, PyTree

FORMAT = "nested_jax learner 1"


class Saved(NamedTuple):
    """A file as it was read: arrays by path; the model's fingerprint; tokens read; the length of attention's cache."""

    arrays: dict[str, Array]
    model: str
    read: int
    max_length: int


def write_learner(path: Path, state: PyTree, model: str, read: int, max_length: int) -> None:
    """Writes a state, of a model of this fingerprint after so many tokens, by renaming a complete file."""
    leaves = jax.tree_util.tree_leaves_with_path(_filled(state, read))
    arrays = {_name(place): leaf for place, leaf in leaves if leaf.size}
    about = {"format": FORMAT, "model": model, "read": str(read), "max_length": str(max_length)}
    write_file(path, save(arrays, about))


def read_learner(path: Path) -> Saved:
    """What a file has.

    Raises:
        UserError: it is no learner's file, or damaged.
        OSError: it cannot be read.
    """
    open_file(path).close()  # no pipe or device, which may never answer
    try:
        with safe_open(path, "flax") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise UserError(f"{path} is no learner's file: give one that Learner.save wrote")
            arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, AttributeError) as error:  # the second of types that its reader has not
        why = " ".join(str(error).split())[:80]
        raise UserError(f"{path} is damaged, or no learner's file ({why}): give one that Learner.save wrote") from None
    read, max_length = (
        int(n) if re.fullmatch("[0-9]{1,18}", n := about.get(key, "")) else 0 for key in ("read", "max_length")
    )
    if not 0 < max_length < 2**31:
        raise _damaged(path)
    return Saved(arrays, about.get("model", ""), read, max_length)


def state_of(path: Path, saved: Saved, shapes: PyTree, config: ModelConfig) -> PyTree:
    """The state of a file: that of the model and max_length, whose arrays have these shapes.

    Raises:
        UserError: its arrays are others.
    """
    filled = jax.eval_shape(lambda whole: _filled(whole, saved.read), shapes)
    wanted = {_name(place): leaf for place, leaf in jax.tree_util.tree_leaves_with_path(filled)}
    empty = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in wanted.items() if not leaf.size}
    found = empty | saved.arrays
    kind = lambda leaf: (leaf.shape, leaf.dtype)
    if {name: kind(leaf) for name, leaf in found.items()} != {name: kind(leaf) for name, leaf in wanted.items()}:
        raise _damaged(path)
    shapes, structure = jax.tree.flatten(shapes)
    shorter = lambda leaf, whole: jnp.zeros(whole.shape, whole.dtype).at[..., : leaf.shape[-3], :, :].set(leaf)
    fill = lambda leaf, whole: leaf if leaf.shape == whole.shape else shorter(leaf, whole)
    state = jax.tree.unflatten(structure, [fill(found[name], whole) for name, whole in zip(wanted, shapes, strict=True)])
    at = int(state[0].position)
    if at < 0 or (at > 0) != (saved.read > 0) or (at - saved.read) % config.alignment:
        raise _damaged(path)
    return state


def _filled(state: PyTree, read: int) -> PyTree:
    """A state without the slots of attention's caches that nothing has been put into, all after the first ones."""
    of_attention = lambda node: isinstance(node, AttentionState)
    cut = lambda cache: cache[..., :read, :, :]
    trim = lambda node: node._replace(keys=cut(node.keys), values=cut(node.values)) if of_attention(node) else node
    return jax.tree.map(trim, state, is_leaf=of_attention)


def assert_of(path: Path, saved: Saved, model: str) -> None:
    """Raises UserError for a file of a model with another fingerprint than this one."""
    if saved.model != model:
        raise UserError(f"{path} is of another model, or of other weights: give the model that it was saved with")


def fingerprint(config: ModelConfig, weights: PyTree) -> str:
    """A hash of a model's config and weights."""
    found = hashlib.sha256(repr(config).encode())
    for place, leaf in jax.tree_util.tree_leaves_with_path(weights):
        found.update(f"{_name(place)} {leaf.dtype} {leaf.shape}".encode())
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged: give a copy that is whole")


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
