"""Held-out bits per byte of a model that knows nothing; the verdict; windows of any length."""

import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rare import cases
from rich.console import Console
from tiny_run import rows, small_model

from nested_jax.data import ByteTokenizer, NgramBits, SentencePieceTokenizer
from nested_jax.models.language_model import apply, init_state
from nested_jax.train import state as states
from nested_jax.train.config import TrainConfig
from nested_jax.train.evaluation import HeldOut
from nested_jax.train.loop import train
from nested_jax.train.text_report import results

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa "
TEXTS = [(WORDS * 5)[i : i + 7 * i + 3].encode() for i in range(30)]


@pytest.mark.parametrize("carry", cases([False, True], [True]))
@pytest.mark.parametrize("tokens", cases(["bytes", "sentencepiece"], ["sentencepiece"]))
def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary(tokens, carry):
    """For every target, the boundary after each document too; over the bytes of the text, not over the targets."""
    bytes_only = tokens == "bytes"
    tokenizer = ByteTokenizer() if bytes_only else SentencePieceTokenizer.train(TEXTS, 290)
    size = 256 if bytes_only else 290
    model = small_model("tiny-hope", tie_embeddings=False, vocabulary=size)
    config = TrainConfig.from_preset("tiny-hope", model=model, window=32, batch_size=4, carry=carry)
    params = states.init_params(model, 0)
    params["head"] = jnp.zeros_like(params["head"])
    heldout = HeldOut(config, tokenizer, TEXTS)
    targets = sum(len(tokenizer.encode(text)) + 1 for text in TEXTS)
    expected = math.log2(size) * targets / sum(map(len, TEXTS))
    assert heldout.text_bytes == sum(map(len, TEXTS)) != targets
    assert heldout.bits_per_byte(params) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_carried_held_out_text_is_read_as_whole_documents():
    """In windows of 32 bytes, two rows of documents: as each document read in one call; without carry it is not."""
    model, texts, tokenizer = small_model("tiny-hope"), TEXTS[-5:], ByteTokenizer()
    net, random = model, np.random.default_rng(0)
    noisy = lambda w: w + 0.3 * random.normal(size=w.shape).astype("f")
    params = jax.tree.map(noisy, states.init_params(model, 0))
    ids = np.zeros((5, 2 + max(map(len, texts))), np.int32)
    for row, text in zip(ids, texts, strict=True):
        row[1 : len(text) + 1] = list(text)
    read = jax.jit(lambda tokens: apply(net, params, tokens, init_state(net, params, 5))[0])
    nats = optax.softmax_cross_entropy_with_integer_labels(read(ids[:, :-1]), ids[:, 1:])
    whole = sum(each[: len(text) + 1].sum() for each, text in zip(nats, texts, strict=True))
    carried, apart = (
        HeldOut(TrainConfig(model=model, window=32, batch_size=2, carry=carry), tokenizer, texts).bits_per_byte(params)
        for carry in (True, False)
    )
    assert carried == pytest.approx(float(whole) / math.log(2) / sum(map(len, texts)), rel=1e-5)
    assert abs(apart - carried) > 1e-3


@pytest.mark.parametrize(
    ("bits", "verdict"), [(3.3, ", below what counting pairs"), (3.4, ", not below what counting pairs")]
)
def test_the_report_says_on_which_side_of_the_bigrams_a_run_ended(bits, verdict):
    assert verdict in results({"heldout_bits_per_byte": bits, "heldout_loss": 2.0}, NgramBits(4.5, 3.35), 9)


@pytest.mark.slow
@pytest.mark.parametrize(("window", "carry"), [(24, True), (8, True), (24, False)])
def test_any_window_trains(window, carry, tmp_path):
    """Shorter than the alignment of 16, or no multiple of it, on documents of all lengths: every step is finite."""
    (tmp_path / "text").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "text" / f"{i}.txt").write_bytes(text + b"%d" % i)
    config = TrainConfig.from_preset(
        "tiny-hope", model=small_model("tiny-hope"), window=window, carry=carry, batch_size=2, steps=12, warmup=2,
        data=str(tmp_path / "text"), run_dir=str(tmp_path / "run"), tokenizer="bytes", sample_tokens=0, eval_every=12,
        log_every=1,
    )  # fmt: skip
    state = train(config, Console(file=io.StringIO()))
    assert [row["step"] for row in rows(config) if "loss" in row] == list(range(1, 13))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
