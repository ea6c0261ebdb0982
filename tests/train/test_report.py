"""What a run leaves behind."""

import dataclasses
import json
import math
import re
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from tiny_run import rows, small_model

from nested_jax.data import ByteTokenizer, SentencePieceTokenizer, load_tokenizer
from nested_jax.models.language_model import apply, init_state
from nested_jax.train import report, trained
from nested_jax.train.config import TrainConfig, command
from nested_jax.train.optimizer import learning_rate
from nested_jax.train.record import _tag, read_rows
from nested_jax.train.sample import characters, sample, samples
from nested_jax.train.state import init_params, init_train_state
from nested_jax.train.stopping import NonFinite
from nested_jax.train.text import open_text


def events(folder: Path) -> list[Event]:
    """What TensorBoard would read, but for each file's first event, which names the format."""
    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        data, own = file.read_bytes(), []
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            own.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
        assert own[0].file_version == "brain.Event:2"
        found += own[1:]
    return found


def test_a_run_folder_is_complete(small, quiet):
    config = small(sample_tokens=8, seed=3)
    state, said = quiet(config)
    folder = Path(config.run_dir)
    assert TrainConfig.from_json(json.loads((folder / "config.json").read_text())["train"]) == config
    first, *told = events(folder)
    assert first.session_log.status == SessionLog.START and first.step == 1
    shown = [(event.step, value) for event in told for value in event.summary.value]
    told = {(step, value.tag): value.simple_value for step, value in shown if value.WhichOneof("value") == "simple_value"}
    written = {(row["step"], _tag(name)): x for row in read_rows(folder) for name, x in row.items() if name != "step"}
    assert told == pytest.approx(written, rel=1e-6)
    assert {tag.split("/")[0] for _, tag in told} == {"train", "heldout"}
    others = {value.tag: value for _, value in shown if value.WhichOneof("value") != "simple_value"}
    choices = HParamsPluginData.FromString(others["_hparams_/session_start_info"].metadata.plugin_data.content)
    assert choices.session_start_info.hparams["seed"].number_value == 3
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    heldout = [row for row in rows(config) if "heldout_bits_per_byte" in row]
    assert [row["step"] for row in heldout] == [0, 3, 6]
    assert heldout[0]["heldout_loss"] == pytest.approx(math.log(256), rel=0.05)  # before the first update
    assert heldout[0]["heldout_perplexity"] == pytest.approx(math.exp(heldout[0]["heldout_loss"]))
    assert 0 < heldout[0]["bigram"] < heldout[0]["unigram"] < 8
    updates = [row for row in rows(config) if "loss" in row]
    assert [row["step"] for row in updates] == [1, 2, 3, 4, 5, 6]
    assert [row["learning_rate"] for row in updates] == [float(learning_rate(config)(n)) for n in range(6)]
    drawn = sample(config.model, state.params, ByteTokenizer(), tokens=8, temperature=0.8, seed=3)
    continuation = "".join(characters(ByteTokenizer(), drawn))
    text = (folder / "report.md").read_text()
    assert others["sample/text_summary"].tensor.string_val[0].decode().removeprefix("    ").strip("\n") in text
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    tokens = updates[-1]["tokens"]
    for part in (
        f"**{heldout[-1]['heldout_bits_per_byte']:.3f} bits per byte**",
        f"| counts of tokens | {heldout[-1]['unigram']:.3f} |",
        f"| counts of pairs of tokens | {heldout[-1]['bigram']:.3f} |",
        "(loss.png)",
        f"| parameters | {parameters:,} |",
        f"loss is {heldout[-1]['heldout_loss']:.3f} nats per token",
        f"perplexity of {heldout[-1]['heldout_perplexity']:,.2f}",
        f"| tokens seen | {tokens:,}, {updates[-1]['epoch']:.2f} epochs |",
        "| wall time |",
        "| of it compiling, evaluating, training |",
        command(config),
        f"```text\n{continuation}\n```\n",
    ):
        assert part in text
    assert f"{parameters:,} parameters" in said and str(folder / "report.md") in said
    assert re.search(r"on cpu, JAX [\d.]+; 128 tokens an update, \d{3},\d{3} an epoch\n", said)
    assert re.search(r"step 6/6  epoch 0\.00  loss [\d.]+  [\d.]+ bits/byte  [1-9][\d,]* tokens/s  0:00 left\n", said)


def test_a_sample_cannot_break_the_page(tmp_path):
    outcome = report.Outcome("stdlib", "", "1", "tokens", sample="a ``` b ````\n# c")
    report.write(tmp_path, TrainConfig(), outcome, report.Costs(1, 1, 1.0, compiling=0.5, evaluating=0.1))
    assert (tmp_path / "report.md").read_text().count("`````") == 2


def test_a_broken_run_keeps_its_checkpoint_and_saves_nothing_broken(small, quiet):
    config = small(learning_rate=1e30, steps=20, checkpoint_every=1)
    with pytest.raises(NonFinite, match=r"step \d+, level .* is not finite.*; .* at a lower rate with: nested-jax train"):
        quiet(config)
    kept = trained.load_run(config.run_dir)
    assert all(jax.numpy.isfinite(leaf).all() for leaf in jax.tree.leaves(kept.params))
    with pytest.raises(NonFinite):
        quiet(config)


@pytest.mark.slow
def test_the_seed_decides_a_sample(finished):
    config, _ = finished(1)
    saved, params, tokenizer, _ = trained.load_run(config.run_dir)
    net = saved.model
    draw = lambda prompt, **options: list(sample(net, params, tokenizer, prompt, tokens=6, **options))
    for prompt in ("", "it"):
        assert draw(prompt) == draw(prompt) != draw(prompt, seed=1)


@pytest.mark.slow
def test_several_samples_have_the_seeds_that_follow(finished):
    config, _ = finished(1)
    saved, params, tokenizer, _ = trained.load_run(config.run_dir)
    options = {"tokens": 6, "temperature": 0.9}
    several = [list(ids) for ids in samples(saved.model, params, tokenizer, "it", number=2, seed=4, **options)]
    assert several == [list(sample(saved.model, params, tokenizer, "it", seed=seed, **options)) for seed in (4, 5)]
    greedy = list(sample(saved.model, params, tokenizer, "it", tokens=6, temperature=0.0))
    for choice in ({"top_k": 1}, {"top_p": 1e-6}, {"top_p": 1e-45}):  # float32 has no 1e-45
        (only,) = samples(saved.model, params, tokenizer, "it", number=1, **options, **choice)
        assert list(only) == greedy
    (every,) = samples(saved.model, params, tokenizer, "it", number=1, seed=4, **options, top_k=10**20)
    assert list(every) == several[0]


@pytest.mark.slow
def test_the_likeliest_continuation_is_that_of_one_reading():
    """Of a model that learns from what it writes: over five of its segments, each token is the next one's argmax."""
    model, tokenizer = small_model("tiny-hope"), ByteTokenizer()
    model = dataclasses.replace(model, cms=dataclasses.replace(model.cms, rate=3.0))
    net, random = model, np.random.default_rng(0)
    params = jax.tree.map(lambda w: w + 0.6 * random.normal(size=w.shape).astype("f"), init_params(model, 0))
    greedy, again = (list(sample(net, params, tokenizer, "it", tokens=40, temperature=0.0, seed=seed)) for seed in (0, 1))
    assert greedy == again and len(greedy) == 40 and len(set(greedy)) > 10
    read = jax.jit(lambda tokens: apply(net, params, tokens, init_state(net, params, 1))[0])
    whole = read(np.array([[tokenizer.boundary, *b"it", *greedy]]))
    assert whole[0, 2:-1].argmax(axis=-1).tolist() == greedy


def test_the_seed_decides_the_parameters_and_the_order_of_the_text(small):
    def begin(seed):
        config = small(seed=seed)
        return init_train_state(config).params["embedding"], next(open_text(config, None).batches).tokens

    for first, again, other in zip(*map(begin, (0, 0, 1)), strict=True):
        assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_sentencepiece_is_trained_once_and_kept(small, quiet):
    model = dataclasses.replace(small().model, vocabulary=400)
    config = small(model=model, tokenizer="sentencepiece", steps=1)
    quiet(config)
    saved = Path(config.run_dir, "tokenizer.model")
    (row,), text = [row for row in rows(config) if "loss" in row], open_text(config, saved.parent)
    batch = next(text.batches)
    size = (text.tokenizer.byte_lengths[batch.targets] * batch.weights).sum()
    assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2) * row["tokens"] / size)
    assert row["tokens"] == batch.weights.sum() < 0.8 * size
    assert isinstance(load_tokenizer(saved), SentencePieceTokenizer)
    before, inode = saved.read_bytes(), saved.stat().st_ino
    Path(config.run_dir, "report.md").unlink()
    quiet(config)  # resumes, for the report
    assert (saved.read_bytes(), saved.stat().st_ino) == (before, inode)
    quiet(small("other", model=model, tokenizer=str(saved), steps=1))
    rows_of = [[row for row in rows(c) if row["step"] == 1] for c in (config, small("other"))]
    assert rows_of[0][0]["loss"] == rows_of[1][0]["loss"]


def test_characters_wait_for_their_last_byte():
    tokenizer = ByteTokenizer()
    assert list(characters(tokenizer, "é☃😀".encode())) == ["é", "☃", "😀"]
    assert "".join(characters(tokenizer, [65, 254, 66, 67, 68])) == "A\ufffdBCD"
    assert list(characters(tokenizer, [0xE2, 0x98])) == ["\ufffd"]
