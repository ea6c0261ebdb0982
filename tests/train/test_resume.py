"""A run that was stopped and resumed equals the run that was not; a config of another run is refused."""

import dataclasses
import gzip
import itertools
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import chex
import jax
import pytest
from rare import cases
from tiny_run import rows, small_model

from nested_jax.errors import UserError
from nested_jax.models.config import Mixer
from nested_jax.train import checkpoint, evaluation, loop
from nested_jax.train.checkpoint import Checkpoints
from nested_jax.train.folder import lock, write_config
from nested_jax.train.record import read_rows
from nested_jax.train.stopping import Interrupted


def interrupt(monkeypatch, step, number=signal.SIGINT):
    """Sends this process a signal when an update is shown."""
    show = loop.Display.update

    def update(self, now, *args, **kwargs):
        if now == step:
            os.kill(os.getpid(), number)
        return show(self, now, *args, **kwargs)

    monkeypatch.setattr(loop.Display, "update", update)


IN_CONTEXT = {"preset": "tiny-hope", "carry": True, "window": 64, "eval_bytes": 500}
ONE_LEVEL = dataclasses.replace(small_model("tiny-hope").cms, hidden=(16,), periods=(16,))
DELTA = small_model("tiny-hope", mixer="delta", cms=ONE_LEVEL)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"carry": True, "accumulate": 2}, marks=pytest.mark.slow),
        pytest.param(IN_CONTEXT | {"model": DELTA, "accumulate": 2}, marks=pytest.mark.slow),
        pytest.param(IN_CONTEXT | {"model": small_model("tiny-hope")}, marks=pytest.mark.slow),
    ],
    ids=["plain", "carry-accumulate", "delta-cms-carry-accumulate", "hope-carry"],
)
def test_a_resumed_run_is_the_run_that_never_stopped(small, finished, quiet, monkeypatch, fields):
    straight = quiet(small("straight", **fields))[0] if fields else finished(6, "straight")[1]
    config = small("stopped", **fields)
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        with pytest.raises(Interrupted, match="stopped at step 4 of 6, saved .* resume with: nested-jax train") as stop:
            quiet(config)
    assert stop.value.signal == signal.SIGINT
    assert Checkpoints(Path(config.run_dir)).latest() == 4
    compiled = []
    note = lambda event, seconds, **of: compiled.append((event, of.get("fun_name")))
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        resumed, said = quiet(config)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert "from step 4" in said
    assert [name for event, name in compiled if "mlir" in event and "step" in str(name)] == ["jit(step)"], compiled
    chex.assert_trees_all_equal(straight, resumed)
    assert all(leaf.committed for leaf in jax.tree.leaves((straight, resumed)))  # else each compiles updates of its own
    assert rows(small("straight")) == rows(config)
    if config.carry:
        assert jax.tree.leaves(resumed.fast)


def test_a_signal_during_an_evaluation_postpones_it(small, finished, quiet, monkeypatch):
    config = small()
    measure = evaluation.HeldOut.bits_per_byte

    calls = itertools.count()

    def signalled(self, params, stop):
        if next(calls) == 2:  # after that which compiles it and that at step 0
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, params, stop)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.HeldOut, "bits_per_byte", signalled)
        with pytest.raises(Interrupted, match="step 3 of 6"):
            quiet(config)
    assert [row["step"] for row in rows(config) if "heldout_bits_per_byte" in row] == [0]
    quiet(config)
    assert rows(config) == rows(finished(6, "straight")[0])


@pytest.mark.parametrize("number", cases([signal.SIGINT, signal.SIGTERM], [signal.SIGINT]))
def test_a_signal_inside_a_save_ends_the_run_after_it(small, finished, quiet, monkeypatch, number):
    """Before the first checkpoint has its list of files, beside training; in the program, and twice, in test_cli.py."""
    config, inner = small(), checkpoint._list_files
    listed = lambda path, step: (step == 2 and os.kill(os.getpid(), number)) or inner(path, step)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_list_files", listed)
        with pytest.raises(Interrupted, match="stopped at step [2-6] of 6, saved") as stop:
            quiet(config)
    assert stop.value.signal == number
    step = int(str(stop.value).split()[3])
    assert step in {int(path.name) for path in Path(config.run_dir, "checkpoints").iterdir()}
    assert f"from step {step};" in quiet(config)[1]
    assert rows(config) == rows(finished(6, "straight")[0])


def test_rows_after_the_last_checkpoint_are_dropped(small, finished, quiet, monkeypatch):
    """As after SIGKILL: updates 5 and half of a row were written, the last checkpoint is of step 4."""
    config = small()
    with monkeypatch.context() as patch:
        save = Checkpoints.save
        patch.setattr(
            Checkpoints, "save", lambda self, state, _, **of: save(self, state, _, **of) if state.step < 5 else None
        )
        interrupt(patch, 5)
        with pytest.raises(Interrupted):
            quiet(config)
    with Path(config.run_dir, "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert "from step 4" in quiet(config)[1]
    assert rows(config) == rows(finished(6, "straight")[0])


def test_a_finished_run_stays_as_it_is(finished, quiet):
    config, state = finished()
    files = {path: path.stat().st_mtime_ns for path in Path(config.run_dir).rglob("*") if path.is_file()}
    again, said = quiet(config)
    assert said.startswith(f"{config.run_dir} is finished") and len(said.splitlines()) == 1
    chex.assert_trees_all_equal(state, again)
    assert files == {path: path.stat().st_mtime_ns for path in Path(config.run_dir).rglob("*") if path.is_file()}


def test_a_run_stopped_before_its_report_gets_it(finished, quiet):
    config, _ = finished()
    Path(config.run_dir, "report.md").unlink()
    quiet(config)
    assert Path(config.run_dir, "report.md").exists()


@pytest.mark.slow
def test_more_steps_go_on(small, quiet, monkeypatch):
    """The clock goes on too: one that counts how often it is read."""
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    quiet(small())
    state, said = quiet(small(steps=9))
    assert "from step 6" in said and state.step == 9
    assert [row["step"] for row in rows(small()) if "loss" in row] == [*range(1, 10)]
    seconds = [row["seconds"] for row in read_rows(Path(small().run_dir)) if "seconds" in row]
    assert seconds == sorted(seconds)
    assert "| steps | 9 |" in Path(small().run_dir, "report.md").read_text()
    with pytest.raises(UserError, match="--steps 9, not 6: give --steps 9 or more"):
        quiet(small())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"batch_size": 2}, "--batch-size 4, not 2"),
        ({"model": small_model(width=32)}, "--model.width 16, not 32"),
        ({"model": dataclasses.replace(small_model(), cms=small_model("tiny-hope").cms)}, "--model.cms."),
        ({"preset": "tiny-hope", "learning_rate": 1.0}, "--preset tiny-transformer, not tiny-hope"),
    ],
)
def test_another_config_is_refused_and_changes_nothing(small, finished, quiet, fields, named):
    finished(1)
    files = {path: path.read_bytes() for path in Path(small().run_dir).rglob("*") if path.is_file()}
    with pytest.raises(UserError) as error:
        quiet(small(steps=1, **fields))
    assert named in str(error.value) and "--fresh" in str(error.value) and "--run-dir" in str(error.value)
    assert files == {path: path.read_bytes() for path in Path(small().run_dir).rglob("*") if path.is_file()}


def test_how_often_to_report_is_no_other_run(small, finished, quiet):
    finished(1)
    quiet(small(steps=6, log_every=4, eval_every=0, checkpoint_every=7, eval_bytes=1000, sample_tokens=2))
    assert [row["step"] for row in rows(small()) if "loss" in row] == [1, 4, 6]
    assert [row["step"] for row in rows(small()) if "heldout_bits_per_byte" in row] == [0, 1, 6]
    assert {path.name for path in Path(small().run_dir, "checkpoints").iterdir()} == {"1", "6"}


def test_fresh_keeps_the_old_run_aside(small, finished, quiet):
    finished(6)
    old = Path(small().run_dir, "metrics.jsonl").read_text()
    for n in (1, 2):
        _, said = quiet(small(steps=1, seed=1, fresh=True))
        assert f"is now in {small().run_dir}.{n}" in said
    assert Path(f"{small().run_dir}.1", "metrics.jsonl").read_text() == old
    assert len([row for row in rows(small()) if "loss" in row]) == 1


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_other_things_is_left_alone(small, quiet, fresh):
    folder = Path(small().run_dir)
    folder.mkdir()
    (folder / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="no run|and no run"):
        quiet(small(fresh=fresh))
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_folder_in_use_is_left_alone(small, finished, quiet):
    finished(1)
    for file in Path(small().run_dir, "checkpoints").rglob("*"):
        file.write_bytes(b"half") if file.is_file() else None  # nothing is read before the lock is taken
    with lock(Path(small().run_dir)):
        for fields in ({"steps": 2}, {"fresh": True}):
            with pytest.raises(UserError, match="another process is training"):
                quiet(small(**fields))


def test_changed_text_is_another_run(small, quiet, tmp_path):
    path = tmp_path / "poem.txt"
    path.write_text("Tyger Tyger, burning bright,\n\n" * 200)
    quiet(small(data=str(path), steps=1, eval_bytes=100))
    path.write_text("In the forests of the night;\n\n" * 200)
    with pytest.raises(UserError, match="text of --data has changed"):
        quiet(small(data=str(path), steps=2, eval_bytes=100))


def test_the_same_text_by_another_path_is_the_same_run(small, finished, quiet, text, tmp_path):
    finished(6)
    (tmp_path / "moved.md.gz").write_bytes(gzip.compress(Path(text).read_bytes()))
    (tmp_path / "other.txt").write_text("Tyger Tyger, burning bright,\n\n" * 200)
    for steps, said in ((6, "run is finished"), (8, "from step 6")):
        assert said in quiet(small(steps=steps, data=str(tmp_path / "moved.md.gz")))[1]
        with pytest.raises(UserError, match="text of --data has changed since the run .* or is another"):
            quiet(small(steps=steps, data=str(tmp_path / "other.txt")))


def test_lost_rows_are_noticed_and_given_up_by_a_line(small, finished, quiet):
    finished(6)
    metrics = Path(small().run_dir, "metrics.jsonl")
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if '"step": 2,' not in line and '"step": 3,' not in line))
    with pytest.raises(UserError, match="holds 5 of 8 rows before step 6: put it back, or add the line") as caught:
        quiet(small(steps=8))
    line = re.search(r"add the line (.*) to go on", str(caught.value))[1]
    metrics.write_text(metrics.read_text() + line + "\n")
    assert "from step 6" in quiet(small(steps=8))[1]
    assert [row["step"] for row in rows(small()) if "loss" in row] == [1, 4, 5, 6, 7, 8]


def test_a_step_beyond_those_asked_for_is_told(small, finished, quiet):
    finished(6)
    write_config(Path(small().run_dir), small(steps=3), "")
    with pytest.raises(UserError, match="was trained to step 6, beyond --steps 3: give --steps 6 or more"):
        quiet(small(steps=3))


# Those left out have states like these's.
MIXERS = [mixer for mixer in get_args(Mixer) if mixer not in ("linear", "delta", "oja", "huber")]


@pytest.mark.parametrize("mixer", cases(MIXERS, default=["lp"]))
def test_every_layer_is_saved_and_resumed(small, quiet, mixer):
    """With --carry: memories of lp, and Omega's over a window of 1, have arrays of no size."""
    model = small_model("tiny-hope", mixer=mixer, window=16, omega_window=1, cms=small_model().cms)
    fields = {"carry": True, "model": model, "checkpoint_every": 1, "eval_every": 0, "eval_bytes": 200}
    quiet(small(steps=1, **fields))
    assert "from step 1" in quiet(small(steps=2, **fields))[1]


def test_a_damaged_config_is_refused(small, finished, quiet):
    finished(1)
    for damage in ("{", "{}", '{"train": 3}', '{"train": {"steps": 3}}'):
        Path(small().run_dir, "config.json").write_text(damage)
        with pytest.raises(UserError, match="config.json is damaged or of another version"):
            quiet(small(steps=1))
    quiet(small(steps=1, fresh=True))
