"""Checkpoints by Orbax: parameters, optimizer state, carried fast state and the position in the data, together.

Orbax writes a folder, to which a list of its files with their digests is added; then it gets its name, the step. So every
checkpoint has such a list, and one that was changed or cut short later is not read: the one before it is.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from nested_jax.errors import UserError
from nested_jax.files import open_file, read_file, write_file
from nested_jax.parallel.processes import first, in_each, of_first
from nested_jax.train.state import TrainState, size_of
from nested_jax.typing import PyTree

CHECKPOINTS, _FILES = "checkpoints", "files.json"
_PART, _ORBAX_PART = ".part", ".orbax-checkpoint-tmp"
_KEPT = 2
_TREES = ("parameters", "optimizer", "fast")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Checkpoints:
    """The last two checkpoints of a run folder and one before them, in its subfolder `checkpoints`, named by step.

    Args:
        folder: the run folder.
        say: is called with one line where a checkpoint is damaged and the one before it is read.

    >>> import contextlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder, contextlib.closing(Checkpoints(Path(folder))) as checkpoints:
    ...     checkpoints.save(TrainState(jnp.int32(7), {"w": jnp.ones(2)}, {"count": jnp.zeros(())}, None), {})
    ...     step, parameters = checkpoints.restore_parameters({"w": jnp.zeros(2)})
    ...     checkpoints.latest(), step, parameters["w"].tolist()
    (7, 7, [1.0, 1.0])
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = warnings.warn):
        self.folder = folder.absolute() / CHECKPOINTS
        self._run, self._say = folder.absolute(), say
        self._damaged: list[Path] = []
        handlers = {name: ocp.StandardCheckpointHandler() for name in _TREES} | {"progress": ocp.JsonCheckpointHandler()}
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))  # pyright: ignore[reportArgumentType]
        self._thread, self._writing = ThreadPoolExecutor(1), None

    def latest(self) -> int | None:
        """The step of the newest checkpoint; None where there is none."""
        self.wait()
        steps = of_first(self._steps)
        return steps[-1][0] if steps else None

    def last_before(self, step: int) -> int | None:
        """The newest checkpoint before a step; None where there is none."""
        self.wait()
        return max((own for own, _ in of_first(self._steps) if own < step), default=None)

    def return_to(self, step: int) -> None:
        """Deletes the checkpoints after a step."""
        self.wait()
        later = [self.folder / name for own, name in of_first(self._steps) if own > step]
        of_first(lambda: [shutil.rmtree(path) for path in later])

    def save(self, state: TrainState, progress: dict[str, Any], *, before: int = 0, wait: bool = True) -> None:
        """Writes a checkpoint and deletes all but the last two and the last one before a step. One of the same step stays.

        Args:
            state: its step is the checkpoint's name. Its leaves may have any shape, and may be NumPy's.
            progress: a JSON value that is saved with it.
            before: that step.
            wait: until the files are there; else they are written while the caller goes on, which may donate the state.

        Raises:
            UserError: it, or the one before, cannot be written.
        """
        self.wait()
        step = int(state.step)
        path, part = self.folder / str(step), self.folder / f"{step}{_PART}"
        trees = {name: tree for name, tree in map_trees(_stored, state).items() if jax.tree.leaves(tree)}
        items = {"progress": ocp.args.JsonSave(progress)}
        items |= {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}

        def prepare() -> bool:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._tidy()
            if [step, path.name] in self._steps():
                return False
            if shutil.disk_usage(self._run).free < size_of(trees):  # what Orbax's threads would each print a traceback of
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if path.exists():
                _set_aside(path)
            return True

        def finish() -> None:
            _list_files(part, step)
            part.rename(path)
            steps = self._steps()
            kept = max((own for own, _ in steps if own < before), default=None)
            for own, old in steps[:-_KEPT]:
                if own != kept:
                    shutil.rmtree(self.folder / old, ignore_errors=True)

        @contextlib.contextmanager
        def as_user_error() -> Iterator[None]:
            try:
                yield
            except Exception as error:  # whatever the storage layers raise
                remedy = "older checkpoints are kept"
                if isinstance(error, OSError) and error.errno in _NO_ROOM:
                    remedy = f"make room and give the same command again; {remedy}"
                if first():
                    shutil.rmtree(part, ignore_errors=True)
                raise UserError(f"checkpoint {path} cannot be written: {_reason(error)}; {remedy}") from error

        def write() -> None:
            with as_user_error():
                self._orbax.wait_until_finished()
                if first():
                    finish()

        with as_user_error():
            if not of_first(prepare):
                return
            self._orbax.save(part, args=ocp.args.Composite(**items))  # copies the state
        self._writing = self._thread.submit(write)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Waits for the files of the last `save`. Raises UserError as that."""
        if self._writing is not None:
            written, self._writing = self._writing, None
            in_each(written.result)

    def restore(self, shapes: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint that is whole.

        Args:
            shapes: a state, which may be abstract: its shapes, types and shardings are those of the result.

        Returns:
            The state and the progress that were saved.

        Raises:
            UserError: no checkpoint is whole, or the newest whole one is unreadable, or of other shapes or types.
        """
        step, items = self._read(map_trees(lambda tree: tree, shapes), progress=ocp.args.JsonRestore())
        state = TrainState(jnp.int32(step), items["parameters"], items["optimizer"], items.get("fast"))
        return state, items["progress"]

    def restore_parameters(self, shapes: PyTree) -> tuple[int, PyTree]:
        """The step and the parameters alone of the newest checkpoint that is whole. Raises UserError as `restore`."""
        step, items = self._read({"parameters": shapes})
        return step, items["parameters"]

    def close(self) -> None:
        """Waits for the files of the last `save`, and ends all threads. Raises UserError as `save`."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def _steps(self) -> list[list[Any]]:
        """[step, name] of the checkpoints that are not known to be damaged, oldest first."""
        try:
            names = [name for name in os.listdir(self.folder) if re.fullmatch("[0-9]{1,10}", name)]
        except FileNotFoundError:
            return []
        paths = [path for name in names if (path := self.folder / name) not in self._damaged]
        return sorted([_step_of(path, self._run), path.name] for path in paths)

    def _read(self, trees: dict[str, PyTree], **others: Any) -> tuple[int, dict[str, Any]]:
        """The step and items of the newest complete checkpoint. Another process that trains may delete any."""
        self.wait()
        faults = {}
        while steps := of_first(self._steps):
            step, path = steps[-1][0], self.folder / steps[-1][1]
            try:
                fault = of_first(partial(self._fault, path, trees, others))
                items = {} if fault else in_each(partial(self._items, path, trees, others))
            except (UserError, OSError):
                if of_first(self._steps) == steps:
                    raise
                continue
            if fault and of_first(self._steps) == steps:
                faults[path] = fault
                self._damaged.append(path)
            elif not fault:
                for damaged, why in faults.items():
                    self._say(f"checkpoint {damaged} is damaged ({why}): step {step} is read in its place")
                return step, items
        if faults:
            (path, fault), *_ = faults.items()
            raise UserError(f"checkpoint {path} is damaged ({fault}) and no older one is whole: put its files back")
        raise UserError(f"{self.folder} holds no checkpoint: let nested-jax train go on")

    def _fault(self, path: Path, trees: dict[str, PyTree], others: dict[str, Any]) -> str | None:
        """The first difference from the checkpoint's list of files, among those that will be read; None for none."""
        items, most = {"", *trees, *others}, 2 * size_of(trees) + 2**24
        try:
            for folder, folders, files in os.walk(path, onerror=_raise):
                for name in [*folders, *files]:
                    if (file := Path(folder, name)).is_symlink():
                        return f"{file.relative_to(path)} is a link"
            for name, digest in _listed(path, self._run)["files"].items():
                if name.rpartition("/")[0].split("/")[0] not in items:
                    continue
                with open_file(path / name, within=path) as file:
                    most -= os.fstat(file.fileno()).st_size
                    if most < 0:
                        return "it is far larger than this model"
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        return f"{name} has changed"
        except (FileNotFoundError, NotADirectoryError) as error:
            return f"{Path(error.filename).name} is gone"
        except UserError as error:  # of a pipe, a device or a large file, with a remedy of its own
            return str(error).rsplit(": ", 1)[0]
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            return f"{_FILES} has changed"
        return None

    def _items(self, path: Path, trees: dict[str, PyTree], others: dict[str, Any]) -> dict[str, Any]:
        """What was saved. Raises UserError where it is of other shapes, or cannot be read."""
        remedy = "give another --run-dir, or start over with --fresh"
        stored = {name: _stored(tree) for name, tree in trees.items()}
        stored = {name: tree for name, tree in stored.items() if jax.tree.leaves(tree)}
        try:
            saved: Any = self._orbax.metadata(path).item_metadata
            for name, tree in stored.items():
                there = saved[name].tree if name in saved and saved[name] is not None else {}
                if fault := _other_shape(there, tree):
                    raise UserError(f"checkpoint {path} is of another shape: {name} {fault}; {remedy}")
            items = {name: ocp.args.StandardRestore(tree) for name, tree in stored.items()}
            read = self._orbax.restore(path, args=ocp.args.Composite(**items, **others))
        except UserError:
            raise
        except Exception as error:  # whatever the storage layers raise
            raise UserError(f"checkpoint {path} cannot be read: {_reason(error)}; {remedy}") from error
        whole = {name: _restored(tree, read[name] if name in stored else None) for name, tree in trees.items()}
        return {name: read[name] for name in others} | whole

    def _tidy(self) -> None:
        """Renames damaged checkpoints, so that they are no more in the way, and removes what stopped saves have left."""
        for path in self._damaged:
            _set_aside(path)
        self._damaged.clear()
        for left in self.folder.glob("[0-9]*.*"):
            if left.name.endswith((_PART, _ORBAX_PART)):
                shutil.rmtree(left, ignore_errors=True)


def map_trees(function: Callable[[PyTree], PyTree], state: TrainState) -> dict[str, PyTree]:
    """A function of each tree of a state, by the name that it is saved under; none of the fast state where it is None."""
    trees = dict(zip(_TREES, (state.params, state.optimizer, state.fast), strict=True))
    return {name: function(tree) for name, tree in trees.items() if tree is not None}


def _stored(tree: PyTree) -> PyTree:
    """A tree as Orbax takes it: of JAX arrays, and None for those of no size."""

    def convert(leaf):
        array = leaf if isinstance(leaf, jax.ShapeDtypeStruct | jax.Array) else jnp.asarray(leaf)
        return array if array.size else None

    return jax.tree.map(convert, tree)


def _restored(wanted: PyTree, stored: PyTree | None) -> PyTree:
    """The inverse of `_stored`: `wanted` has the shapes and types."""
    leaves, structure = jax.tree.flatten(wanted)
    read = structure.flatten_up_to(stored) if stored is not None else [None] * len(leaves)
    whole = [jnp.zeros(a.shape, a.dtype) if b is None else b for a, b in zip(leaves, read, strict=True)]
    return structure.unflatten(whole)


def _reason(error: Exception) -> str:
    """What happened, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}" if str(error) else type(error).__name__


def _raise(error: OSError) -> None:
    raise error


def _set_aside(path: Path) -> None:
    """Renames a checkpoint to NAME.damaged, NAME.damaged.1, ..., the first of them that is free."""
    names = (f"{path.name}.damaged{suffix}" for suffix in ("", *(f".{n}" for n in range(1, 1000))))
    path.rename(next(free for name in names if not (free := path.with_name(name)).exists()))


def _list_files(path: Path, step: int) -> None:
    """Adds files.json: the step, and the digest of every file."""
    files = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb") as stream:
                files[str(file.relative_to(path))] = hashlib.file_digest(stream, "sha256").hexdigest()
    write_file(path / _FILES, json.dumps({"step": step, "files": files}).encode())


def _listed(path: Path, run: Path) -> dict[str, Any]:
    """The contents of files.json, which may be anything."""
    return json.loads(read_file(path / _FILES, 2**24, within=run))


def _step_of(path: Path, run: Path) -> int:
    """The step that a checkpoint was saved at; by its name where its list of files cannot be read."""
    try:
        step = _listed(path, run)["step"]
        if isinstance(step, int) and 0 <= step < 2**31:
            return step
    except (OSError, KeyError, TypeError, ValueError, RecursionError):  # a UserError is a ValueError
        pass
    return int(path.name)


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
    key_data = lambda x: jax.eval_shape(jax.random.key_data, x)  # as keys are saved
    plain = lambda x: key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return {keystr(path): f"{plain(x).dtype.name}{list(plain(x).shape)}" for path, x in leaves}
