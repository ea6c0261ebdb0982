from __future__ import annotations

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nested_jax.data import ByteTokenizer, SentencePieceTokenizer, load_tokenizer
from nested_jax.errors import UserError

TEXT = "def f(x):\n    return x + 1  # the one, and only\n\n\tthe end of it\n" * 20
PIECES = SentencePieceTokenizer.train([TEXT, TEXT.encode()], vocabulary=320)
RARE = SentencePieceTokenizer.train(["天地玄黄宇宙洪荒日月盈昃。" * 400 + " 天"], vocabulary=280)  # no piece is a space
TOKENIZERS = [ByteTokenizer(), PIECES, RARE]
tokenizers = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "pieces", "rare-spaces"])
SCRIPTS = "aß\u0391\u0416\u05d0\u0628\u0915\u0e01\u1100\u3042天玄\U0001d54f\U0001f469\u200d\u0301\ufffe"
MARKS = " \n\t\r\0\x01\x1b\x7f\x85\u00a0\u2028\u2047\u2580\u2581\u2582\u2585\u3000\ufeff\ufffd<0x1>"


@tokenizers
@settings(deadline=None)
@given(text=st.text() | st.text(SCRIPTS + MARKS) | st.text(MARKS))
@example(text="a b")
@example(text="\u2581 \u2581\u2581")
@example(text=" \0 天 \0\0")
@example(text="<document><unk><0x0A>\0\ufeff\ufffd")
def test_any_text_decodes_to_itself(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    np.testing.assert_array_equal(tokenizer.encode(text.encode()), ids)
    assert tokenizer.boundary not in ids
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    np.testing.assert_array_equal([tokenizer.byte_lengths[i] for i in ids if tokenizer.decode([i]) == " "], 1)


@tokenizers
def test_bytes_that_are_not_utf8_do_not_stop_it(tokenizer):
    assert tokenizer.decode(tokenizer.encode(b"a\xffb")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("a\udcffb")) == "a?b"


@tokenizers
def test_a_saved_tokenizer_comes_back(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    again = load_tokenizer(tmp_path / "tokenizer")
    assert type(again) is type(tokenizer)
    assert (again.vocabulary, again.boundary) == (tokenizer.vocabulary, tokenizer.boundary)
    np.testing.assert_array_equal(again.encode(TEXT), tokenizer.encode(TEXT))
    np.testing.assert_array_equal(again.byte_lengths, tokenizer.byte_lengths)


@tokenizers
@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_ids_out_of_range_are_named(tokenizer, wrong):
    with pytest.raises(UserError, match=f"token id {wrong} is out of range: .* 0 to {tokenizer.vocabulary - 1}"):
        tokenizer.decode([5, wrong])


def test_training_gives_the_vocabulary_asked_for_and_shorter_sequences():
    assert PIECES.vocabulary == 320
    assert len(PIECES.encode(TEXT)) < len(TEXT) / 2
    assert PIECES.decode([PIECES.boundary, *PIECES.encode("end")]) == "end"


def test_a_rare_space_is_one_byte():
    assert RARE._pieces.piece_to_id("\u2581") == RARE._pieces.unk_id(), "else these tests are of another tokenizer"
    assert [len(RARE.encode(text)) for text in ("a b", "  ", "\u2581")] == [3, 2, 3]


def test_sentences_with_the_trainers_own_sign_are_learned_from():
    text = "to be\u2585or not to be, that is the question " * 20
    assert len(SentencePieceTokenizer.train([text], vocabulary=300).encode(text)) < len(text) / 2


def test_training_is_deterministic_and_reads_no_more_than_max_bytes():
    again = SentencePieceTokenizer.train([TEXT, TEXT, "☃" * 1000], vocabulary=320, max_bytes=2 * len(TEXT))
    np.testing.assert_array_equal(again.encode(TEXT), PIECES.encode(TEXT))


@pytest.mark.parametrize(("documents", "vocabulary"), [([TEXT], 100), (["abc" * 99], 5000), ([], 300), ([""], 300)])
def test_a_vocabulary_that_does_not_fit_is_told_in_one_line(documents, vocabulary):
    with pytest.raises(UserError, match=f"vocabulary {vocabulary} does not fit the text: .+; choose") as caught:
        SentencePieceTokenizer.train(documents, vocabulary)
    assert "\n" not in str(caught.value) and "trainer_interface" not in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "empty", "short", "garbage", "foreign"])
def test_a_file_that_is_no_tokenizer_is_told_in_one_line(damage, tmp_path):
    path = tmp_path / "tokenizer"
    PIECES.save(path)
    model = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        options = {"sentence_iterator": iter(["ab"] * 99), "vocab_size": 5, "model_type": "char", "minloglevel": 2}
        sentencepiece.SentencePieceTrainer.train(model_writer=path.open("wb"), **options)
    else:
        path.write_bytes({"empty": b"", "short": model[:-100], "garbage": b"garbage"}[damage])
    with pytest.raises(UserError, match=f"^tokenizer {path}.*save$"):
        load_tokenizer(path)
