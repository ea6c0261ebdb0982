"""What checkpoints hold, and what is said of those that cannot be read."""

import contextlib
import errno
import itertools
import json
import os
import shutil
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from rare import cases
from tiny_run import small_config, small_model

from nested_jax.errors import UserError
from nested_jax.models.config import Mixer
from nested_jax.train import checkpoint
from nested_jax.train.checkpoint import Checkpoints
from nested_jax.train.state import TrainState, init_train_state


def state(step: int, width: int = 8, dtype=jnp.float32) -> TrainState:
    params = {"a": jnp.arange(width, dtype=dtype) * step, "b": {"c": jnp.full((width, 3), 1.5 * step)}}
    return TrainState(jnp.int32(step), params, (params, jnp.int32(step)), None)


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(state(step), {"tokens": 10 * step, "data": {"parents": [{"offset": step}]}})
    return tmp_path


def shapes(*args, **kwargs):
    return jax.eval_shape(lambda: state(*args, **kwargs))


def test_the_last_two_are_kept(saved):
    restored, progress = Checkpoints(saved).restore(shapes(0))
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["2", "3"]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), restored, state(3)))
    assert jax.tree.structure(restored) == jax.tree.structure(state(3))
    assert progress == {"tokens": 30, "data": {"parents": [{"offset": 3}]}}
    assert Checkpoints(saved).restore_parameters(shapes(0).params)[1]["a"].tolist() == state(3).params["a"].tolist()


@pytest.fixture
def said():
    """The lines that were said of damaged checkpoints."""
    return []


def damaged(said, path, fault, step):
    """Whether that was said of a checkpoint, alone."""
    line = f"checkpoint {path} is damaged ({fault}): step {step} is read in its place"
    found, said[:] = list(said), []
    return found == [line]


@pytest.mark.parametrize(
    "change", cases(["half", "none", "gone", "flipped", "pipe", "link"], default=["half", "gone", "pipe"])
)
def test_a_checkpoint_of_which_a_file_has_changed_is_not_read_but_the_one_before_it(saved, said, change):
    path, faults = saved / "checkpoints" / "3", {"gone": "is gone", "pipe": "is a pipe, not a file", "link": "is a link"}
    for file in [file for file in path.rglob("*") if file.is_file()]:
        data = file.read_bytes()
        changed = {"half": data[: len(data) // 2], "none": b"", "flipped": bytes([data[0] ^ 1]) + data[1:]}.get(change, b"")
        file.write_bytes(changed)
        if change in faults:
            file.unlink()
        if change == "pipe":
            os.mkfifo(file)
        elif change == "link":
            file.symlink_to(saved / "checkpoints" / "2" / file.relative_to(path))
        elif change == "none" and not data:
            continue
        restored, progress = Checkpoints(saved, said.append).restore(shapes(0))
        assert restored.step == 2 and progress["tokens"] == 20
        assert len(said) == 1 and f"checkpoint {path} is damaged (" in said[0] and file.name in said[0], said
        assert faults.get(change, "has changed") in said.pop()
        file.unlink(missing_ok=True)
        file.write_bytes(data)
    assert Checkpoints(saved, said.append).restore(shapes(0))[0].step == 3 and not said
    shutil.rmtree(path)
    assert Checkpoints(saved, said.append).restore(shapes(0))[0].step == 2 and not said


def test_after_a_damaged_checkpoint_training_goes_on_from_the_one_before_it_and_keeps_it(saved, said):
    folder = saved / "checkpoints"
    (folder / "3" / "files.json").unlink()
    checkpoints = Checkpoints(saved, said.append)
    assert checkpoints.latest() == 3
    restored, _ = checkpoints.restore(shapes(0))
    assert damaged(said, folder / "3", "files.json is gone", 2) and checkpoints.latest() == 2
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"], "nothing is moved before there is a new one"
    checkpoints.save(restored._replace(step=jnp.int32(3)), {})
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3", "3.damaged"]
    assert Checkpoints(saved, said.append).restore(shapes(0))[0].step == 3 and not said


def test_where_no_checkpoint_is_whole_all_is_said_in_one_line(saved):
    for step in ("2", "3"):
        for item in (saved / "checkpoints" / step).iterdir():
            shutil.rmtree(item) if item.is_dir() else item.unlink()
    with pytest.raises(UserError, match=r"checkpoints/3 is damaged \(files.json is gone\) and no older one is whole: put"):
        Checkpoints(saved).restore(shapes(0))


def test_the_step_comes_from_the_content(saved):
    folder = saved / "checkpoints"
    (folder / "3").rename(folder / "0000000600")
    (folder / "2").rename(folder / "700")
    checkpoints = Checkpoints(saved)
    assert checkpoints.latest() == 3 and checkpoints.restore(shapes(0))[0].step == 3
    checkpoints.save(state(700), {})
    assert sorted(path.name for path in folder.iterdir()) == ["0000000600", "700", "700.damaged"]
    assert checkpoints.restore(shapes(0))[0].step == 700


def test_one_before_a_step_is_kept_and_returned_to(saved):
    checkpoints, folder = Checkpoints(saved), saved / "checkpoints"
    for step in (4, 5, 6):
        checkpoints.save(state(step), {}, before=4)
    assert sorted(path.name for path in folder.iterdir()) == ["3", "5", "6"]
    assert [checkpoints.last_before(step) for step in (3, 4, 6)] == [None, 3, 5]
    checkpoints.return_to(3)
    assert sorted(path.name for path in folder.iterdir()) == ["3"] and checkpoints.restore(shapes(0))[0].step == 3


def test_readers_beside_a_trainer_never_hear_of_damage(saved, said, monkeypatch):
    """Two new checkpoints are saved, and the one that is being read is deleted, whenever a file is about to be read."""
    trainer, opened, steps = Checkpoints(saved), checkpoint.open_file, iter(range(4, 12))

    def slow(path, **options):
        for step in itertools.islice(steps, 2):
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint, "open_file", opened)
                trainer.save(state(step), {})
        return opened(path, **options)

    monkeypatch.setattr(checkpoint, "open_file", slow)
    step, params = Checkpoints(saved, said.append).restore_parameters(shapes(0).params)
    assert (step, said) == (11, []) and params["a"].tolist() == state(11).params["a"].tolist()


def test_any_leaf_is_saved_and_restored(tmp_path):
    """Arrays of no size, NumPy's and Python's scalars, keys, and trees without a leaf."""
    leaves = {
        "empty": jnp.zeros((0, 4)), "numpy": np.ones((3, 0), np.int32), "scalar": np.float32(1.5), "bool": np.bool_(True),
        "python": 2.5, "whole": 3, "key": jax.random.key(1), "half": jnp.bfloat16(2), "none": None, "nothing": (),
    }  # fmt: skip
    whole = TrainState(jnp.int32(1), leaves, (), {"empty": jnp.zeros((2, 0))})
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(whole, {"tokens": 1})
    for wanted in (whole, jax.eval_shape(lambda: whole)):
        restored, progress = checkpoints.restore(jax.tree.map(jnp.asarray, wanted) if wanted is whole else wanted)
        assert progress == {"tokens": 1} and jax.tree.structure(restored) == jax.tree.structure(whole)
        for got, given in zip(jax.tree.leaves(restored), jax.tree.leaves(whole), strict=True):
            assert isinstance(got, jax.Array) and got.shape == np.shape(given) and got.dtype == jnp.asarray(given).dtype
            assert (got == given).all()


@pytest.mark.parametrize("mixer", [*get_args(Mixer)])
def test_the_state_of_every_layer_is_saved_and_restored(mixer, tmp_path, text):
    """With --carry; lp and Huber's memories have arrays of no size. Numbers in the place of trained ones."""
    model = small_model("tiny-hope", mixer=mixer, window=16, omega_window=1)
    config = small_config(text, tmp_path / "run", preset="tiny-hope", model=model, carry=True, accumulate=2)
    shapes, random = jax.eval_shape(lambda: init_train_state(config)), np.random.default_rng(0)
    filled = lambda x: jnp.asarray(random.integers(0, 2, x.shape), x.dtype)
    given = jax.tree.map(filled, shapes)._replace(step=jnp.int32(2))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(given, {})
    restored, _ = checkpoints.restore(shapes)
    chex.assert_trees_all_equal(given, restored)
    chex.assert_trees_all_equal_shapes_and_dtypes(given, restored)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            "No space left on device; make room and give the same command again",
        ),
        (OSError(errno.EACCES, os.strerror(errno.EACCES)), "Permission denied; older"),
        (ValueError("Cannot save what has no\nname"), "ValueError: Cannot save what has no; older"),
    ],
)
def test_what_stopped_a_save_is_told_as_what_it_is(saved, monkeypatch, error, line):
    def fail(*arguments, **options):
        raise error

    for step in ("save", "wait_until_finished"):  # while the state is copied, and while its files are written
        with monkeypatch.context() as patched:
            patched.setattr(ocp.AsyncCheckpointer, step, fail)
            with pytest.raises(UserError, match=f"checkpoints/4 cannot be written: {line}") as caught:
                Checkpoints(saved).save(state(4), {})
        assert "\n" not in str(caught.value)
        assert Checkpoints(saved).restore(shapes(0))[0].step == 3


def test_a_save_that_is_not_waited_for_has_the_state_as_it_was(tmp_path):
    """The state is donated at once; the next save, or a reader, waits."""
    update = jax.jit(lambda s: s._replace(step=s.step + 1, params=jax.tree.map(lambda x: x + 1, s.params)), donate_argnums=0)
    large = lambda n: {"a": jnp.full(2**20, float(n))}
    now = TrainState(jnp.int32(0), large(0), (), None)
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        for step in range(4):
            checkpoints.save(now, {"step": step}, wait=False)
            now = update(update(now))
            if step == 1:
                assert checkpoints.latest() == 2
        restored, progress = checkpoints.restore(now)
    assert (restored.step, progress) == (6, {"step": 3})
    assert (restored.params["a"] == 6).all()


def test_a_save_that_failed_while_training_went_on_is_told_at_the_next_or_the_end(saved, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_list_files", fail)
    checkpoints = Checkpoints(saved)
    checkpoints.save(state(4), {}, wait=False)
    with pytest.raises(UserError, match="checkpoints/4 cannot be written: No space left on device"):
        checkpoints.save(state(5), {}, wait=False)
    checkpoints.save(state(5), {}, wait=False)
    with pytest.raises(UserError, match="checkpoints/5 cannot be written: No space left on device"):
        checkpoints.close()
    assert Checkpoints(saved).latest() == 3


def test_what_a_stopped_save_has_left_is_no_checkpoint_and_is_removed(saved):
    folder = saved / "checkpoints"
    for name in ("4.part", "4.part.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp"):
        shutil.copytree(folder / "3", folder / name)
    assert Checkpoints(saved).latest() == 3
    Checkpoints(saved).save(state(4), {})
    assert sorted(path.name for path in folder.iterdir()) == ["3", "4"]


def test_a_checkpoint_far_larger_than_its_model_is_not_read(saved, said):
    for name in ("parameters", "commit_success.txt"):
        path = saved / "checkpoints" / "3"
        file = path / "commit_success.txt" if name != "parameters" else path / "parameters" / "manifest.ocdbt"
        whole = file.read_bytes()
        with file.open("r+b") as opened:
            opened.truncate(2**40)
        assert Checkpoints(saved, said.append).restore_parameters(shapes(0).params)[0] == 2
        assert damaged(said, path, "it is far larger than this model", 2)
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        (shapes(0, width=4), r"parameters a is float32\[8\] there and float32\[4\] in this run"),
        (shapes(0, dtype=jnp.int32), r"parameters a is float32\[8\] there and int32\[8\] in this run"),
        (shapes(0)._replace(params={"a": jnp.zeros(8)}), r"parameters b/c is float32\[8, 3\] there and absent"),
        (shapes(0)._replace(fast={"a": jnp.zeros(8)}), "fast a is absent there"),
    ],
)
def test_another_shape_is_told(saved, wanted, named):
    with pytest.raises(UserError, match=f"checkpoints/3 is of another shape: {named}"):
        Checkpoints(saved).restore(wanted)


def test_the_list_of_files_is_whole(saved):
    path = saved / "checkpoints" / "3"
    listed = json.loads((path / "files.json").read_text())
    assert listed["step"] == 3
    assert set(listed["files"]) == {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()} - {"files.json"}
