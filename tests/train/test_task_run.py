"""A run on a synthetic task: trained, stopped and resumed, evaluated from its folder; what does not go with it."""

import contextlib
import dataclasses
import itertools
import json
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_resume import interrupt
from tiny_run import rows, small_model

from nested_jax import load
from nested_jax.cli import main
from nested_jax.data.tasks import TASKS, score, task
from nested_jax.errors import UserError
from nested_jax.models.language_model import apply, init_state
from nested_jax.train.config import TrainConfig
from nested_jax.train.state import init_params
from nested_jax.train.stopping import Interrupted
from nested_jax.train.task import TaskBatches, TaskSource
from nested_jax.train.task_scores import TaskScores, held_out_rng


@pytest.fixture
def config(tmp_path):
    """A function that makes a TrainConfig of a second on parity, its fields changed."""
    sizes = {"window": 8, "batch_size": 4, "steps": 6, "warmup": 2, "eval_sequences": 20, "model": small_model()}
    every = {"eval_every": 3, "checkpoint_every": 2, "log_every": 1}

    def make(run="run", **fields):
        fields = sizes | every | {"task": "parity", "run_dir": str(tmp_path / run)} | fields
        return TrainConfig.from_preset("tiny-transformer", **fields)

    return make


@pytest.fixture
def say(capsys):
    """A function that runs a command and returns (exit code, its lines, those of the standard error)."""

    def run(line):
        capsys.readouterr()
        code = main(line.split())
        told = capsys.readouterr()
        return code, told.out.splitlines(), told.err.splitlines()

    return run


def test_a_run_on_a_task_from_start_to_report(config, quiet, say):
    config = config(show_surprise=True)
    _, said = quiet(config)
    folder, report = Path(config.run_dir), Path(config.run_dir, "report.md").read_text()
    assert {path.name for path in folder.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "loss.png",
        "report.md",
    }
    assert not {path.name for path in folder.iterdir()} & {"tokenizer.model", "heldout.jsonl", "reading.png"}
    assert TrainConfig.from_json(json.loads((folder / "config.json").read_text())["train"]) == config
    measured = [row for row in rows(config) if "heldout_loss" in row]
    assert [row["step"] for row in measured] == [0, 3, 6] and measured[0]["heldout_loss"] == pytest.approx(
        np.log(256), rel=0.1
    )
    last = measured[-1]
    for part in ("right_labels", "right_sequences"):
        assert all(0 <= last[f"heldout_{part}_{n}"] <= 1 for n in (1, 2, 3))
    assert any(name.startswith("surprise/") for name in last) and "Surprise of linear layers" in report
    cells = [f"{last[f'heldout_right_{what}_2']:.1%}" for what in ("labels", "sequences")]
    assert f"| 10 to 16 | {cells[0]} | {cells[1]} |" in report and "# tiny-transformer on parity" in report
    assert "32 tokens an update, in sequences of 2 to 8" in said and f"10 to 16: {cells[0]}, {cells[1]}" in said
    assert "--task parity" in report and "labels/s" in said and "| labels seen |" in report
    trained = [row for row in rows(config) if "loss" in row]
    assert trained[-1]["tokens"] == sum(next(batches).weights.sum() for batches in [TaskBatches(config)] for _ in range(6))
    for words in (said, report, json.dumps(rows(config)), "".join(say(f"eval --run-dir {folder}")[1])):
        assert not re.search("bits|bytes|sample|epoch|perplexity", words.replace("bytes/", "")), words
    assert quiet(config)[1].startswith(f"{config.run_dir} is finished")


@pytest.mark.slow
def test_a_resumed_run_is_the_run_that_never_stopped(config, quiet, monkeypatch):
    straight = quiet(config("straight"))[0]
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(
            Interrupted, match="stopped at step 3 of 6, saved .* resume with: nested-jax train .*--task parity"
        ):
            quiet(config())
    resumed, said = quiet(config())
    assert "from step 3" in said
    chex.assert_trees_all_equal(straight, resumed)
    assert rows(config("straight")) == rows(config())
    with pytest.raises(UserError, match="holds a run with --task parity, not s3: give another --run-dir"):
        quiet(config(task="s3"))
    with pytest.raises(UserError, match="holds a run with --shortest 2, not 3: give another"):
        quiet(config(shortest=3))


def test_eval_tells_the_scores_of_the_last_evaluation(config, quiet, say, monkeypatch):
    monkeypatch.setattr("nested_jax.train.progress.announced", contextlib.nullcontext)  # said on a slow machine alone
    config = config(steps=1)
    quiet(config)
    row = [row for row in rows(config) if "heldout_loss" in row][-1]
    code, told, err = say(f"eval --run-dir {config.run_dir}")
    assert (code, err) == (0, [])
    assert told[0] == f"{config.run_dir}, step 1, on 20 sequences of parity a row, right labels and sequences:"
    scores = [(row[f"heldout_right_labels_{n}"], row[f"heldout_right_sequences_{n}"]) for n in (1, 2, 3)]
    lengths = ("2 to 8", "10 to 16", "18 to 24")
    for line, words, (labels, whole) in zip(told[1:], lengths, scores, strict=True):
        assert line.split() == [*f"{words} tokens".split(), f"{labels:.1%}", f"{whole:.1%}"]
    assert "on 7 sequences" in say(f"eval --run-dir {config.run_dir} --eval-sequences 7")[1][0]
    assert load(config.run_dir).tokenizer is None and load(config.run_dir).step == 1
    for line, words in (
        (f"generate --run-dir {config.run_dir}", "is of --task parity, which has no text: give a run on text"),
        (f"eval --run-dir {config.run_dir} --data stdlib", "--data: .* is of --task parity: give --eval-sequences"),
        (f"eval --run-dir {config.run_dir} --eval-bytes 9", "--eval-bytes: .* is of --task parity: give --eval-sequences"),
    ):
        code, _, err = say(line)
        assert code == 2 and len(err) == 1 and re.search(words, err[0]), err


def test_scores_are_those_of_each_sequence_read_alone(config):
    """Of random weights, batches that do not divide the sequences: likeliest labels and the loss."""
    config = config(eval_sequences=21, task="s3")
    noisy = lambda w: w + 0.3 * np.random.default_rng(0).normal(size=w.shape).astype("f")
    params = jax.tree.map(noisy, init_params(config.model, 0))
    scores = TaskScores(config)
    row = scores.measure(params)
    read = jax.jit(lambda tokens: apply(config.model, params, tokens, init_state(config.model, params, len(tokens)))[0])
    for n, (shortest, longest) in enumerate(scores.lengths, 1):
        batch = task("s3").sample(held_out_rng(n - 1), 21, shortest, longest)
        logits = read(batch.tokens)
        right = score(logits.argmax(axis=-1), batch)
        assert (row[f"heldout_right_labels_{n}"], row[f"heldout_right_sequences_{n}"]) == pytest.approx(right)
        if n == 1:
            nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)[..., 0]
            assert row["heldout_loss"] == pytest.approx(float((nats * batch.weights).sum() / batch.weights.sum()), rel=1e-4)
    for sizes in ({"eval_sequences": 10**12}, {"window": 10**12}):
        with pytest.raises(UserError, match="needs .* GB, more than this machine has"):
            TaskScores(dataclasses.replace(config, **sizes))
    stops = itertools.count()
    assert scores.measure(params, stop=lambda: next(stops) == 3) is None


def test_batches_depend_on_the_seed_and_their_number(config):
    first, again, other = TaskBatches(config()), TaskBatches(config()), TaskBatches(config(seed=1))
    batches = [next(first) for _ in range(3)]
    again.set_state({"batch": 2})
    assert (next(again).tokens == batches[2].tokens).all() and again.get_state() == first.get_state() == {"batch": 3}
    assert (next(other).tokens != batches[0].tokens).any() and (batches[0].tokens != batches[1].tokens).any()
    assert TaskSource(config()).fingerprint != TaskSource(config(shortest=5)).fingerprint


def test_held_out_sequences_are_not_those_of_training(config):
    """Of any seed. Sizes are those with which numpy's streams were once the same ones: a batch as large as the set."""
    held = task("parity").sample(held_out_rng(0), 16, 64, 64).tokens
    for seed in (0, 1, 2**31):
        batches = TaskBatches(config(seed=seed, task="parity", shortest=64, window=64, batch_size=16))
        trained = np.concatenate([next(batches).tokens for _ in range(4)])
        assert not {row.tobytes() for row in held} & {row.tobytes() for row in trained}


@pytest.mark.slow
def test_a_model_learns_a_task(config, quiet):
    """In (abab)* an a is followed by a b, and a b half of the time by an a alone: three labels in four by the token."""
    state, _ = quiet(config(task="abab-star", steps=60, learning_rate=0.02, eval_every=0, log_every=60))
    assert state.step == 60
    row = [row for row in rows(config()) if "heldout_loss" in row][-1]
    assert row["heldout_right_labels_1"] > 0.7 and row["heldout_loss"] < 0.6


@pytest.mark.slow
def test_the_command_line_makes_a_model_of_the_task(tmp_path, monkeypatch, say):
    monkeypatch.chdir(tmp_path)
    small = "--model.width 16 --model.heads 2 --model.layers 1 --window 8 --batch-size 2 --eval-sequences 2 --steps 1"
    code, told, err = say(f"train --preset tiny-transformer --task a5 {small}")
    assert (code, err) == (0, []), err
    saved = load("runs/tiny-transformer-a5")
    assert saved.config.model.vocabulary == 60 and saved.config.task == "a5"
    assert told[-1].endswith("nested-jax eval --run-dir runs/tiny-transformer-a5 measures it again")
    assert say("train --run-dir runs/tiny-transformer-a5")[1][0].startswith("runs/tiny-transformer-a5 is finished")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--task pairity", "task 'pairity' is unknown: give parity"),
        ("--task parity --data stdlib.txt", "--data stdlib.txt is for text, which --task parity takes the place of"),
        ("--task parity --tokenizer bytes", "--tokenizer bytes is for text, which --task parity takes the place of"),
        ("--task parity --carry", "--carry is for text, which --task parity takes the place of: leave one out"),
        ("--task a5 --model.vocabulary 32", "--model.vocabulary 32 is too small for --task a5: give 60"),
        ("--task parity --shortest 70", "--shortest 70 is more than --window 64: change one"),
        ("--task mqar --window 20", "--shortest 2 and --window 20: no sequence of mqar with 8 pairs has from 2 to 20"),
        ("--task parity --batch-size 1000000000000", "--batch-size 1000000000000 of 64 needs "),
        ("--task parity --window 1 --shortest 1", "no sequence of parity has from 3 to 2 tokens: give 3 or more"),
        ("--task", "--task"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_a_task_is_refused(flags, words, tmp_path, monkeypatch, say):
    monkeypatch.chdir(tmp_path)
    code, told, err = say(f"train --preset tiny-transformer {flags}")
    assert code == 2 and len(err) == 1 and words in err[0] and not Path("runs").exists(), (told, err)


def test_help_names_every_task(say, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    told = " ".join(re.sub("[│╭╰─]", " ", capsys.readouterr().out).split())
    named = re.search("in place of text: (.*?)\\. Sequences have", told)[1]
    assert re.split(", | or ", named) == list(TASKS)
