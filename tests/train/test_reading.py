"""What is learned while reading: the curve against each document read alone, one with learning and one without."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import small_model

from nested_jax.data import ByteTokenizer
from nested_jax.models.language_model import apply, init_state
from nested_jax.train import reading, state
from nested_jax.train.config import TrainConfig

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def read():
    """A config, its parameters, documents of which three have 128 bytes, and what was read of them."""
    model = small_model("tiny-hope", mixer="delta", width=8, chunk=8)
    config = TrainConfig(model=dataclasses.replace(model, cms=dataclasses.replace(model.cms, rate=1.0)), window=32)
    params = state.init_params(config.model, 0)
    documents = [bytes([97 + i] * n) for i, n in enumerate((200, 20, 131, 128, 127))]
    return config, params, documents, reading.read(config, params, TOKENIZER, documents)


def test_positions_are_those_of_each_document(read):
    config, params, documents, found = read
    assert found.positions == [0, 64, 128]
    for learning, curve in ((True, found.learning), (False, found.frozen)):
        model, weights = config.model, params
        if not learning:  # at inner rates of zero
            cms = {
                level: {name: leaf * (name != "rate") for name, leaf in parts.items()}
                for level, parts in params["blocks"]["cms"].items()
            }
            weights = params | {"blocks": params["blocks"] | {"cms": cms}}
        for row, text in zip(curve, (documents[0], documents[2], documents[3]), strict=True):
            ids = jnp.array([[0, *text[:128]]])
            logits, _ = jax.jit(lambda w, ids, model=model: apply(model, w, ids, init_state(model, w, 1)))(
                weights, ids[:, :-1]
            )
            nats = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])[0]
            expected = [nats[:64].mean() / math.log(2), nats[64:].mean() / math.log(2)]
            np.testing.assert_allclose(row, expected, rtol=1e-5)
    assert (found.learning[:, 1] < found.frozen[:, 1] - 0.1).all(), "a text of one letter is learned"


def test_the_section_says_what_learning_saved(read, tmp_path):
    *_, found = read
    said = reading.section(found)
    assert "Learning in the CMS saves" in said and f"| 64 to 128 | {found.learning[:, 1].mean():.3f} ±" in said
    level = found._replace(learning=found.frozen)
    assert "does not show" in reading.section(level)
    reading.plot(found.curves(), found.positions, tmp_path / reading.FIGURE)
    assert (tmp_path / reading.FIGURE).read_bytes().startswith(b"\x89PNG")


def test_nothing_is_read_where_nothing_is_long_or_wanted(read):
    config, params, documents, _ = read
    assert reading.read(config, params, TOKENIZER, documents[:3]) is None
    assert reading.read(dataclasses.replace(config, reading_documents=0), params, TOKENIZER, documents) is None
