"""Tokenizers of pretrained models: every text decodes to itself, special tokens are never text, what is saved is read."""

import json
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_jax.data import load_tokenizer
from nested_jax.data.pretrained import PretrainedTokenizer, of_folder, of_gguf
from nested_jax.errors import UserError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def trained():
    """A tokenizer as the `tokenizers` library trains it, with special tokens first."""
    one = tokenizers.Tokenizer(tokenizers.models.BPE())
    one.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    one.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    text = ["to be, or not to be: that is the question. né ☃ 1234\n\n" * 20]
    one.train_from_iterator(
        text, tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return one


@pytest.fixture
def folder(trained, tmp_path):
    (tmp_path / "tokenizer.json").write_text(trained.to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}))
    return tmp_path


def gguf_fields(trained):
    model = json.loads(trained.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [3 if piece in SPECIAL else 1 for piece in pieces],
        "tokenizer.ggml.merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_texts_are_encoded_as_by_the_library(trained, folder, kind):
    one = of_folder(folder) if kind == "folder" else of_gguf(gguf_fields(trained))
    for text in ("to be or not", "né ☃ 12345", "\n\n\tx  y ", "日本", ""):
        np.testing.assert_array_equal(one.encode(text), trained.encode(text, add_special_tokens=False).ids)
    assert one.vocabulary == trained.get_vocab_size() and one.boundary == 0 and one.ends == {0, 2}
    ids = one.encode("a <|im_end|> b")  # is text here
    assert not {0, 1, 2} & set(ids.tolist()) and one.decode(ids) == "a <|im_end|> b"
    assert one.byte_lengths[:3].tolist() == [0, 0, 0] and one.decode([0, *one.encode("é"), 1]) == "é"
    with pytest.raises(UserError, match=f"token id {one.vocabulary} is out of range"):
        one.decode([one.vocabulary])


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_every_text_decodes_to_itself(trained, text):
    one = of_gguf(gguf_fields(trained))
    text = text.encode(errors="replace").decode()
    ids = one.encode(text)
    assert one.decode(ids) == text and one.byte_lengths[ids].sum() == len(text.encode())
    assert (one.encode(text.encode()) == ids).all()


def test_what_is_saved_is_read(folder, tmp_path):
    one = of_folder(folder)
    one.save(tmp_path / "saved")
    other = load_tokenizer(tmp_path / "saved")
    assert isinstance(other, PretrainedTokenizer) and (other.ends, other.special) == (one.ends, one.special)
    np.testing.assert_array_equal(other.encode("to be ☃"), one.encode("to be ☃"))
    messages = [{"role": "user", "content": "Hi"}]
    np.testing.assert_array_equal(other.chat(messages), one.chat(messages))
    (tmp_path / "saved").write_bytes((tmp_path / "saved").read_bytes()[:-9])
    with pytest.raises(UserError, match="is damaged or of another kind"):
        load_tokenizer(tmp_path / "saved")


def test_a_chat_has_special_tokens_of_its_form_alone(folder):
    """What a message holds stays text, whatever it looks like."""
    one = of_folder(folder)
    ids = one.chat([{"role": "user", "content": "be <|im_end|>\n"}, {"role": "assistant", "content": "no"}]).tolist()
    expected = [1, *one.encode("user\nbe <|im_end|>\n"), 2, *one.encode("\n"), 1, *one.encode("assistant\nno"), 2]
    assert ids == [*expected, *one.encode("\n"), 1, *one.encode("assistant\n")]
    plain = PretrainedTokenizer(one._saved["pairs"], one.special, one.boundary)
    with pytest.raises(UserError, match="the model has no template of a chat"):
        plain.chat([])
    for template in ("{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{% for %}", "{{ ''.__class__.__mro__ }}"):
        refusing = PretrainedTokenizer(one._saved["pairs"], one.special, one.boundary, template=template)
        with pytest.raises(UserError, match="template refuses the messages"):
            refusing.chat([{"role": "user", "content": "Hi"}])


def test_what_is_no_such_tokenizer_is_told(trained, folder, tmp_path):
    fields = gguf_fields(trained)
    for change in ({"tokenizer.ggml.model": "llama"}, {"tokenizer.ggml.pre": "other"}):
        with pytest.raises(UserError, match="give a model with one of gpt-2, smollm, llama-bpe, qwen2"):
            of_gguf(fields | change)
    for cut in ("gpt-2", "default", "llama-bpe", "qwen2"):
        one = of_gguf(fields | {"tokenizer.ggml.pre": cut})
        assert one.decode(one.encode("It's 12345 x\n\n y")) == "It's 12345 x\n\n y"
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram"}}))
    with pytest.raises(UserError, match="is no byte-level BPE"):
        of_folder(folder)
    (folder / "tokenizer.json").write_text("[1]")
    for where in (folder, tmp_path / "gone"):
        with pytest.raises(UserError, match="has no tokenizer.json that can be read"):
            of_folder(where)


def test_without_the_library_it_is_asked_for(folder, tmp_path, monkeypatch):
    of_folder(folder).save(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for read in (lambda: of_folder(folder), lambda: load_tokenizer(tmp_path / "saved")):
        with pytest.raises(UserError, match=r'needs tokenizers: pip install "nested-jax\[convert\]"$'):
            read()
