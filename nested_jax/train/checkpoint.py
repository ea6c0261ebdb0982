"""Checkpoints by Orbax: parameters, optimizer state, carried fast state and the position in the data, together.

Orbax commits a checkpoint by renaming it. A list of its files with their digests is then added, so that a checkpoint that
was changed or cut short later is refused before it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from nested_jax.errors import UserError
from nested_jax.train.state import TrainState
from nested_jax.typing import PyTree

CHECKPOINTS, _FILES = "checkpoints", "files.json"


class Checkpoints:
    """The last two checkpoints of a run folder and one before them, in its subfolder `checkpoints`, named by step.

    Args:
        folder: the run folder.

    >>> import contextlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder, contextlib.closing(Checkpoints(Path(folder))) as checkpoints:
    ...     checkpoints.save(TrainState(jnp.int32(7), {"w": jnp.ones(2)}, {"count": jnp.zeros(())}, None), {})
    ...     checkpoints.latest(), checkpoints.restore_parameters({"w": jnp.zeros(2)})["w"].tolist()
    (7, [1.0, 1.0])
    """

    def __init__(self, folder: Path):
        self.folder = folder.absolute() / CHECKPOINTS
        self._before = 0
        options = ocp.CheckpointManagerOptions(preservation_policy=self, enable_async_checkpointing=False)
        tree = ("parameters", "optimizer", "fast")
        handlers = {name: ocp.StandardCheckpointHandler() for name in tree} | {"progress": ocp.JsonCheckpointHandler()}
        self._orbax = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        """The step of the newest checkpoint; None where there is none."""
        return self._orbax.latest_step()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's question which checkpoints to keep: the last two, and the last one before a step."""
        steps = [info.step for info in checkpoints]
        kept = {*steps[-2:], self.last_before(self._before)}
        return [step in kept for step in steps]

    def last_before(self, step: int) -> int | None:
        """The newest checkpoint before a step; None where there is none."""
        return max((own for own in self._orbax.all_steps() if own < step), default=None)

    def save(self, state: TrainState, progress: dict[str, Any], *, before: int = 0) -> None:
        """Writes a checkpoint and deletes all but the last two and the last one before a step.

        Args:
            state: its step is the checkpoint's name.
            progress: a JSON value that is saved with it.
            before: that step.

        Raises:
            UserError: it cannot be written.
        """
        step, self._before = int(state.step), before
        items = {"progress": ocp.args.JsonSave(progress)}
        items |= {name: ocp.args.StandardSave(tree) for name, tree in _trees(state).items()}
        try:
            if self._orbax.save(step, args=ocp.args.Composite(**items)):
                _list_files(self.folder / str(step))
        except Exception as error:  # whatever the storage layers raise
            path, remedy = self.folder / str(step), "make room and give the same command again; older ones are kept"
            raise UserError(f"checkpoint {path} cannot be written: {_reason(error)}; {remedy}") from error

    def restore(self, shapes: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint.

        Args:
            shapes: a state, which may be abstract: its shapes, types and shardings are those of the result.

        Returns:
            The state and the progress that were saved.

        Raises:
            UserError: the checkpoint was changed or cut short, is unreadable, or of other shapes or types.
        """
        items = self._read(_trees(shapes), progress=ocp.args.JsonRestore())
        state = TrainState(jnp.int32(self.latest()), items["parameters"], items["optimizer"], items.get("fast"))
        return state, items["progress"]

    def restore_parameters(self, shapes: PyTree) -> PyTree:
        """The parameters alone of the newest checkpoint. Raises UserError as `restore`."""
        return self._read({"parameters": shapes})["parameters"]

    def return_to(self, step: int) -> None:
        """Deletes the checkpoints after a step."""
        for later in [later for later in self._orbax.all_steps() if later > step]:
            self._orbax.delete(later)

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._orbax.close()

    def _read(self, trees: dict[str, PyTree], **others: Any):
        if (step := self.latest()) is None:
            raise UserError(f"{self.folder} holds no checkpoint: let nested-jax train go on")
        path = self.folder / str(step)
        older = [earlier for earlier in self._orbax.all_steps() if earlier != step]
        remedy = f"delete that folder to go on from step {older[-1]}" if older else "start over with --fresh"
        if fault := _missing(path):
            raise UserError(f"checkpoint {path} is cut short: {fault}; {remedy}")
        try:
            saved = self._orbax.item_metadata(step)
            for name, tree in trees.items():
                if fault := _other_shape(saved[name].tree if name in saved else {}, tree):
                    raise UserError(f"checkpoint {path} is of another shape: {name} {fault}; {remedy}")
            items = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
            return self._orbax.restore(step, args=ocp.args.Composite(**items, **others))
        except UserError:
            raise
        except Exception as error:  # whatever the storage layers raise
            raise UserError(f"checkpoint {path} cannot be read: {_reason(error)}; {remedy}") from error


def _trees(state: TrainState) -> dict[str, PyTree]:
    trees = {"parameters": state.params, "optimizer": state.optimizer, "fast": state.fast}
    return {name: tree for name, tree in trees.items() if tree is not None}


def _reason(error: Exception) -> str:
    return str(error).split("\n")[0][:120] or type(error).__name__


def _list_files(path: Path) -> None:
    files = {str(f.relative_to(path)): _digest(f) for f in sorted(path.rglob("*")) if f.is_file()}
    part = path / f"{_FILES}.part"
    part.write_text(json.dumps(files))
    part.rename(path / _FILES)


def _missing(path: Path) -> str | None:
    """The first difference from the list of files; None for none, and for no list: a kill after the commit leaves none."""
    if not (path / _FILES).exists():
        return None if (path / "parameters").is_dir() else "parameters is gone"
    try:
        files = json.loads((path / _FILES).read_text())
    except (OSError, ValueError):
        files = None
    if not isinstance(files, dict):
        return f"{_FILES} has changed"
    for name, digest in files.items():
        if not (path / name).is_file():
            return f"{name} is gone"
        if _digest(path / name) != digest:
            return f"{name} has changed"
    return None


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _other_shape(saved: PyTree, wanted: PyTree) -> str | None:
    """The first leaf whose shape or type differs."""
    theirs, ours = _shapes(saved), _shapes(wanted)
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            return f"{name} is {theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} in this run"
    return None


def _shapes(tree: PyTree) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    keystr = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {keystr(path): f"{jnp.dtype(x.dtype).name}{list(x.shape)}" for path, x in leaves}
