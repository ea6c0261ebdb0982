"""What checkpoints hold, and what is said of those that cannot be read."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from nested_jax.errors import UserError
from nested_jax.train.checkpoint import Checkpoints
from nested_jax.train.state import TrainState


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
    assert Checkpoints(saved).restore_parameters(shapes(0).params)["a"].tolist() == state(3).params["a"].tolist()


@pytest.mark.parametrize("change", ["half", "none", "gone", "flipped"])
def test_every_file_is_missed(saved, change):
    path = saved / "checkpoints" / "3"
    for file in [file for file in path.rglob("*") if file.is_file()]:
        data = file.read_bytes()
        if file.name == "files.json" and change == "gone":
            continue  # then Orbax's own word has to do
        changed = {"half": data[: len(data) // 2], "none": b"", "flipped": bytes([data[0] ^ 1]) + data[1:], "gone": b""}
        file.write_bytes(changed[change])
        if change == "gone":
            file.unlink()
        with pytest.raises(UserError) as error:
            Checkpoints(saved).restore(shapes(0))
        assert str(error.value).startswith(f"checkpoint {path} is cut short: ")
        assert str(error.value).endswith("; delete that folder to go on from step 2")
        file.write_bytes(data)
    Checkpoints(saved).restore(shapes(0))
    shutil.rmtree(path)
    assert Checkpoints(saved).restore(shapes(0))[0].step == 2


def test_an_empty_checkpoint_is_told(saved):
    shutil.rmtree(saved / "checkpoints" / "2")
    for item in (saved / "checkpoints" / "3").iterdir():
        shutil.rmtree(item) if item.is_dir() else item.unlink()
    with pytest.raises(UserError, match="checkpoints/3 is cut short: parameters is gone; start over with --fresh"):
        Checkpoints(saved).restore(shapes(0))


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


def test_a_half_written_checkpoint_is_not_the_latest(saved):
    (saved / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    assert Checkpoints(saved).latest() == 3


def test_the_list_of_files_is_whole(saved):
    path = saved / "checkpoints" / "3"
    listed = json.loads((path / "files.json").read_text())
    assert set(listed) == {str(f.relative_to(path)) for f in Path(path).rglob("*") if f.is_file()} - {"files.json"}
