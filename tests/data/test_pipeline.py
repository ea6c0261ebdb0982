from __future__ import annotations

import itertools
import json
import re

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_jax.data import ByteTokenizer, SentencePieceTokenizer, heldout_batches, train_batches
from nested_jax.data.pipeline import Batch, PackedWindows
from nested_jax.errors import UserError

BYTES = ByteTokenizer()
TEXTS = [f"{i:03d}" + "abcdefghij" * (i % 5) for i in range(23)]
quick = settings(max_examples=60, deadline=None)


def texts(min_size=1):
    return st.lists(st.text("abc", max_size=30).map(lambda text: f"<{text}>"), min_size=min_size, max_size=9)


sizes = lambda: st.tuples(st.integers(1, 24), st.integers(1, 24))  # window, alignment: neither need divide the other


def read_row(windows, window, alignment, carry):
    """The documents, as (inputs, targets), of a row's windows; checks where they start and where the row resets."""
    documents = []
    for begun, (tokens, targets, weights, reset) in zip(itertools.count(0, window if carry else 0), windows):
        assert set(np.unique(weights)) <= {0.0, 1.0}
        for slot in range(window):
            if weights[slot]:
                previous = documents[-1][1][-1] if documents else 0
                starts = tokens[slot] == 0  # a NUL is the boundary, which only starts a document
                assert starts or previous == tokens[slot], "inputs are the targets before them"
                if starts:
                    assert (begun + slot) % alignment == 0
                    documents.append(([], []))
                documents[-1][0].append(int(tokens[slot]))
                documents[-1][1].append(int(targets[slot]))
                assert reset[slot] == (starts or (slot == 0 and not carry))
            else:
                assert tokens[slot] == targets[slot] == 0
                assert reset[slot] == (slot == 0 and not carry)
    return [(bytes(inputs), bytes(targets)) for inputs, targets in documents]


def rows_of(batches):
    return [[tuple(array[row] for array in batch) for batch in batches] for row in range(len(batches[0].tokens))]


def same(left, right):
    for a, b in zip(left, right, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


@quick
@given(texts(), sizes(), st.integers(1, 3), st.booleans(), st.integers(0, 3))
def test_packing_holds_every_document_whole_and_aligned(documents, size, batch, carry, seed):
    window, alignment = size
    options = {"window": window, "batch_size": batch, "alignment": alignment, "carry": carry}
    batches = list(itertools.islice(train_batches(documents, BYTES, seed=seed, **options), 12))
    for packed in batches:
        shapes = [(array.shape, array.dtype.name) for array in packed]
        assert shapes == [((batch, window), dtype) for dtype in ("int32", "int32", "float32", "bool")]
    for row in rows_of(batches):
        *whole, last = read_row(row, window, alignment, carry)
        for inputs, targets in whole:
            assert inputs[:1] == b"\0" == targets[-1:]
            assert inputs[1:] == targets[:-1] and targets[:-1].decode() in documents
        assert any(text.encode().startswith(last[0][1:]) for text in documents)


@quick
@given(texts(), sizes(), st.integers(1, 3), st.booleans(), st.none() | st.integers(1, 60))
def test_held_out_targets_are_covered_exactly_once(documents, size, batch, carry, limit):
    window, alignment = size
    options = {"window": window, "batch_size": batch, "alignment": alignment, "carry": carry, "limit_tokens": limit}
    heldout = heldout_batches(documents, BYTES, **options)
    rows = rows_of(list(heldout))
    if not carry:  # windows follow one another along the rows
        rows = [[window for windows in zip(*rows, strict=True) for window in windows]]
    found = [targets for row in rows for _, targets in (read_row(row, window, alignment, carry) if row else [])]
    expected, left = [], limit or 10**9
    for text in documents:
        expected.append((text.encode() + b"\0")[:left])
        left -= len(expected[-1])
    assert sorted(found) == sorted(targets for targets in expected if targets)
    assert heldout.targets == sum(map(len, found))
    assert heldout.text_bytes == sum(len(targets.rstrip(b"\0")) for targets in found)
    same(heldout, heldout)  # any number of times


def test_held_out_text_bytes_do_not_depend_on_the_tokenizer():
    pieces = SentencePieceTokenizer.train(TEXTS, vocabulary=290)
    options = {"window": 8, "batch_size": 2, "alignment": 4}
    by_bytes, by_pieces = heldout_batches(TEXTS, BYTES, **options), heldout_batches(TEXTS, pieces, **options)
    assert by_bytes.text_bytes == by_pieces.text_bytes == sum(map(len, TEXTS))
    assert by_pieces.targets < by_bytes.targets == by_bytes.text_bytes + len(TEXTS)
    for heldout, tokenizer in ((by_bytes, BYTES), (by_pieces, pieces)):
        assert sum((tokenizer.byte_lengths[b.targets] * b.weights).sum() for b in heldout) == heldout.text_bytes
    assert sum(batch.weights.sum() for batch in by_pieces) == by_pieces.targets


def test_a_nul_in_a_document_is_text_and_no_boundary():
    heldout = heldout_batches(["a\0b", "\0"], BYTES, window=8, batch_size=1, alignment=1)
    assert (heldout.targets, heldout.text_bytes) == (6, 4)
    ((tokens, targets, weights, _),) = rows_of(list(heldout))[0]
    assert tokens.tolist()[:6] == [0, 97, 255, 98, 0, 255] and targets.tolist()[:6] == [97, 255, 98, 0, 255, 0]
    assert weights.sum() == 6


def test_a_document_goes_on_in_its_row_alike_with_and_without_carry():
    options = {"window": 8, "batch_size": 2, "alignment": 4, "seed": 3}
    carrying = train_batches(TEXTS, BYTES, carry=True, **options)
    for carried, fresh in itertools.islice(zip(carrying, train_batches(TEXTS, BYTES, **options), strict=False), 30):
        same([carried[:3]], [fresh[:3]])
        assert fresh.reset[:, 0].all()
        np.testing.assert_array_equal(carried.reset[:, 0], carried.tokens[:, 0] == 0)
        np.testing.assert_array_equal(carried.reset[:, 1:], fresh.reset[:, 1:])


def test_the_seed_decides_the_order():
    options = {"window": 16, "batch_size": 2, "alignment": 8}
    first, again, other = (
        list(itertools.islice(train_batches(TEXTS, BYTES, seed=seed, **options), 20)) for seed in (7, 7, 8)
    )
    same(first, again)
    with pytest.raises(AssertionError):
        same(first, other)


def started(batches, steps):
    """The first three bytes of the documents that start in the batches, in order, row by row."""
    rows = rows_of(list(itertools.islice(batches, steps)))
    return [[text[1][:3] for text in read_row(row, 64, 64, False)] for row in rows]


def test_every_epoch_holds_every_document_once_in_an_order_of_its_own():
    (row,) = started(train_batches(TEXTS, BYTES, window=64, batch_size=1, alignment=64, seed=0), 46)
    names = {text[:3].encode() for text in TEXTS}
    assert set(row[:23]) == names == set(row[23:46])
    (other,) = started(train_batches(TEXTS, BYTES, window=64, batch_size=1, alignment=64, seed=1), 23)
    assert row[:23] != row[23:46] != other, "nor is it another seed's"


def test_processes_read_rows_of_one_batch_and_any_others_go_on():
    options = {"window": 64, "batch_size": 6, "alignment": 64, "seed": 1}
    whole, states = train_batches(TEXTS, BYTES, **options), {}
    before, after = list(itertools.islice(whole, 50)), list(itertools.islice(whole, 5))
    stream = itertools.chain.from_iterable(zip(*started(iter(before), 50), strict=True))
    for epoch in (list(itertools.islice(stream, 23)) for _ in range(2)):
        assert set(epoch) == {text[:3].encode() for text in TEXTS}
    for rows in ([0, 1], [2, 3, 4], [5]):
        batches = train_batches(TEXTS, BYTES, **options, rows=rows)
        same(itertools.islice(batches, 50), [Batch(*(array[rows] for array in batch)) for batch in before])
        states |= batches.get_state()
    for rows in ([4, 0], [1, 2, 3, 5], None):
        batches = train_batches(TEXTS, BYTES, **options, rows=rows)
        batches.set_state(json.loads(json.dumps(states)))
        some = slice(None) if rows is None else rows
        same(itertools.islice(batches, 5), [Batch(*(array[some] for array in batch)) for batch in after])


@settings(quick, max_examples=25)
@given(texts(), sizes(), st.integers(1, 3), st.booleans(), st.integers(0, 15))
def test_resumes_exactly_from_any_step(documents, size, batch, carry, step):
    window, alignment = size
    options = {"window": window, "batch_size": batch, "alignment": alignment, "carry": carry, "seed": 5}
    batches = train_batches(documents, BYTES, **options)
    for _ in range(step):
        next(batches)
    state = json.dumps(batches.get_state())
    assert len(state) < 100 * (batch + 1)
    expected = list(itertools.islice(batches, 6))
    resumed = train_batches(documents, BYTES, **options)
    resumed.set_state(json.loads(state))
    assert json.dumps(resumed.get_state()) == state
    same(itertools.islice(resumed, 6), expected)
    batches.set_state(json.loads(state))  # and back, on an iterator that has gone on
    same(itertools.islice(batches, 6), expected)


def test_packed_windows_pass_grains_own_check():
    documents = grain.MapDataset.source([np.array([0, *text, 0], np.int32) for text in ([5] * 7, [6], [], [7] * 9)])
    options = {"window": 4, "alignment": 2, "boundary": 0, "carry": False}
    grain.experimental.assert_equal_output_after_checkpoint(PackedWindows(documents.to_iter_dataset(), **options))


def test_documents_may_be_a_grain_dataset_of_bytes():
    documents = grain.MapDataset.source(TEXTS).map(str.encode)
    options = {"window": 8, "batch_size": 2, "alignment": 4, "seed": 3}
    same(
        itertools.islice(train_batches(documents, BYTES, **options), 9),
        itertools.islice(train_batches(TEXTS, BYTES, **options), 9),
    )


def test_a_document_is_encoded_once_each_time_it_is_read():
    class Counting(ByteTokenizer):
        calls = 0

        def encode(self, text):
            self.calls += 1
            return super().encode(text)

    tokenizer = Counting()
    batches = train_batches(["a" * 100], tokenizer, window=10, batch_size=1, alignment=1, seed=0)
    for _ in range(20):  # 200 slots, 101 for each document
        next(batches)
    assert tokenizer.calls == 2


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"window": 0}, "window 0 must be a whole number of at least 1"),
        ({"batch_size": -2}, "batch_size -2 must be a whole number of at least 1"),
        ({"alignment": 0}, "alignment 0 must be a whole number of at least 1"),
        ({"documents": []}, "no documents to make batches of: give at least one"),
    ],
)
def test_sizes_that_do_not_fit_are_named_in_one_line(wrong, line):
    options = {"documents": TEXTS, "tokenizer": BYTES, "window": 8, "batch_size": 1, "alignment": 4} | wrong
    with pytest.raises(UserError, match=f"^{line}$"):
        train_batches(**options, seed=0)
    with pytest.raises(UserError, match=f"^{line}$"):
        heldout_batches(**options)


@pytest.mark.parametrize("rows", [[], [1], [-1], [0, 7]])
def test_wrong_rows_and_a_wrong_limit_are_named_in_one_line(rows):
    options = {"window": 8, "batch_size": 1, "alignment": 4}
    with pytest.raises(UserError, match=rf"^rows {re.escape(str(rows))} of batch_size 1: give some of 0 to 0$"):
        train_batches(TEXTS, BYTES, seed=0, rows=rows, **options)
    with pytest.raises(UserError, match="^limit_tokens 0 must be a whole number of at least 1$"):
        heldout_batches(TEXTS, BYTES, limit_tokens=0, **options)
