"""A run folder may be anyone's: to load it reads nothing outside it, runs nothing, and allocates nothing on its word."""

import json
import os
import re
import shutil
import signal
import stat
from pathlib import Path

import pytest

import nested_jax
from nested_jax.cli import main
from nested_jax.data import datasets, local
from nested_jax.errors import UserError


@pytest.fixture(autouse=True)
def at_once():
    """No test waits, as on a pipe."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(120)
    yield
    signal.alarm(0)


@pytest.fixture
def run(finished):
    return Path(finished(6)[0].run_dir)


def change(run, **fields):
    """Changes fields of config.json; model__width stands for one of the model."""
    values = json.loads((run / "config.json").read_text())
    for name, value in fields.items():
        part = values["train"]["model"] if name.startswith("model__") else values["train"]
        part[name.removeprefix("model__")] = value
    (run / "config.json").write_text(json.dumps(values))


def said(capsys, *words):
    """The exit code of eval on a folder, and the one line of its error."""
    capsys.readouterr()
    code = main(["eval", *map(str, words)])
    lines = capsys.readouterr().err.splitlines()
    return code, *lines


@pytest.mark.parametrize("name", ["secrets", "stdlib", "lm1b", "prepared"])
def test_text_that_only_the_folder_names_is_not_opened(run, name, tmp_path, capsys, monkeypatch):
    """eval has the run's held-out text from the folder itself, which its owner alone can read."""
    report = (run / "report.md").read_text()
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "dataset_info.json").write_text("{}")
    (tmp_path / "secrets").write_text("secret " * 1000)
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    change(run, data=name)
    for module, opener in ((local, "_files"), (datasets, "_tfds_builder")):
        monkeypatch.setattr(module, opener, lambda *_: pytest.fail("it was opened"))
    assert stat.S_IMODE((run / "heldout.jsonl").stat().st_mode) == 0o600
    assert main(["eval", "--run-dir", str(run)]) == 0
    bits = re.search(r"this model +([0-9.]+)", capsys.readouterr().out)[1]
    assert f"**{bits} bits per byte**" in report
    code, line = said(capsys, "--run-dir", run, "--eval-bytes", 10**6)
    assert code == 2 and re.search(
        "--eval-bytes 1000000: .* keeps 2000 bytes of held-out text: name the text with --data", line
    )
    (run / "heldout.jsonl").unlink()
    code, line = said(capsys, "--run-dir", run)
    assert code == 2 and f"keeps no held-out text: name the text with --data (the run's was {name})" in line


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "heldout.jsonl", "checkpoints"])
@pytest.mark.parametrize("kind", ["pipe", "device", "link", "deep", "sparse"])
def test_what_is_no_plain_file_is_told_at_once(run, name, kind, tmp_path, capsys):
    path = run / name
    if name == "checkpoints":
        shutil.rmtree(run / "checkpoints" / "4")
        path = run / "checkpoints" / "6" / "files.json"
    whole = tmp_path / "whole"
    path.rename(whole)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link":
        path.symlink_to(whole)
    elif kind == "deep":
        path.write_text("[" * 10**6)
    else:
        with path.open("wb") as file:
            file.truncate(2**40)
    code, line = said(capsys, "--run-dir", run)
    assert code == 2 and path.name in line
    words = {"pipe": "is a pipe", "device": "is a device", "link": "is a link", "sparse": "is larger than"}
    assert words.get(kind, "damaged") in line or (kind, name) == ("device", "checkpoints"), line  # there, no link is allowed


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"model__vocabulary": 10**9, "model__width": 10**6}, "more than this machine has"),
        ({"model__layers": 10**12}, "more than this machine has|sizes that no model has"),
        ({"model__vocabulary": 10**30}, "more than this machine has|sizes that no model has"),
        ({"window": 10**12}, "a batch of 4 windows of 1000000000000 needs .* more than this machine has"),
        ({"batch_size": 10**12}, "a batch of 1000000000000 windows of 32 needs"),
    ],
)
def test_sizes_are_bounded_before_anything_is_allocated(run, fields, line, capsys):
    change(run, **fields)
    code, said_line = said(capsys, "--run-dir", run)
    assert code == 2 and re.search(line, said_line), said_line


def test_train_takes_no_size_on_trust(run, capsys):
    for fields, line in (
        ({"model__width": 10**30}, "has sizes that no model has"),
        ({"model__width": 10**6, "model__layers": 10**4}, "more than this machine has"),
        ({"batch_size": 10**12, "steps": 7}, "a batch of 1000000000000 windows of 32 needs"),
        ({"model": 3}, "config.json is damaged or of another version .field model 3: give an object of fields"),
        ({"steps": 10**30}, "--steps 10+: give a whole number of at least 1 and below 2147483648"),
        ({"learning_rate": 10**400}, "--learning-rate 10+: give a finite number"),
    ):
        whole = (run / "config.json").read_text()
        change(run, **fields)
        code, told = main(["train", "--run-dir", str(run)]), capsys.readouterr().err.splitlines()
        assert code == 2 and len(told) == 1 and re.search(line, told[0]), told
        (run / "config.json").write_text(whole)


def test_what_would_steer_a_terminal_is_not_printed(run, capsys):
    change(run, data="\x1b]0;title\x07")
    code, line = said(capsys, "--run-dir", run)
    assert code == 2 and "config.json is damaged" in line and line.isprintable()


def test_loading_writes_nothing(run):
    listing = lambda: {path: path.lstat().st_mtime_ns for path in run.rglob("*")}
    before = listing()
    assert nested_jax.load(run).step == 6
    assert listing() == before
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        nested_jax.load(run)
    assert not (run / "checkpoints").exists()


def test_a_reader_of_a_damaged_checkpoint_is_told_and_has_the_one_before_it(run):
    (run / "checkpoints" / "6" / "files.json").unlink()
    with pytest.warns(UserWarning, match=r"checkpoints/6 is damaged \(files.json is gone\): step 4 is read in its place"):
        assert nested_jax.load(run).step == 4
