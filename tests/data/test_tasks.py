"""Synthetic tasks: labels against the definitions, read token by token; lengths; what is refused."""

import itertools
import math
import re

import numpy as np
import pytest

from nested_jax import UserError
from nested_jax.data.tasks import (
    MQAR,
    TASKS,
    Compression,
    FuzzyRecall,
    GroupWords,
    InContextRecall,
    Memorization,
    Passkey,
    Repeated,
    SelectiveCopying,
    ShuffledBrackets,
    score,
    task,
)


def draw(name, rows=64, shortest=1, longest=100, seed=0):
    thing = task(name) if isinstance(name, str) else name
    return thing.sample(np.random.default_rng(seed), rows, shortest, longest)


def read(batch):
    """(tokens, {slot: label}) of each sequence."""
    for tokens, targets, weights, _ in zip(*batch, strict=True):
        yield tokens.tolist(), {int(t): int(targets[t]) for t in np.flatnonzero(weights)}


@pytest.mark.parametrize("name", TASKS)
def test_what_every_task_gives(name):
    one = draw(name, longest=120)
    assert [(x.dtype, x.shape) for x in one] == [(np.dtype(t), (64, 120)) for t in ("int32", "int32", "float32", "bool")]
    assert all((a == b).all() for a, b in zip(one, draw(name, longest=120), strict=True))
    assert (one.tokens != draw(name, longest=120, seed=1).tokens).any() or name == "aa-star"
    assert (one.reset == (np.arange(120) == 0)).all()
    assert set(one.weights.ravel()) <= {0, 1} and not one.targets[one.weights == 0].any()
    assert one.weights.any(axis=1).all()
    assert one.tokens.min() >= 0 and one.tokens.max() < task(name).tokens
    assert one.targets.min() >= 0 and one.targets.max() < task(name).labels
    assert len(set(one.targets[one.weights > 0])) > task(name).labels // 4
    assert score(one.targets, one) == (1, 1) and score(one.targets + 1, one) == (0, 0)


@pytest.mark.parametrize("name", TASKS)
def test_lengths_are_those_asked_for(name):
    """By the last label, which in recall may stand before the last slot."""
    ends = lambda batch: [max(labels) + 1 for _, labels in read(batch)]
    found = ends(draw(name, 400, 36, 60))
    assert len(set(found)) > 4 and min(found) < 40 and 55 < max(found) <= 60
    if "recall" not in name and name != "mqar":
        assert set(ends(draw(name, 400, 36, 36))) == {36} and min(found) == 36 and max(found) == 60
        batch = draw(name, 50, 1, 60)
        assert not batch.tokens[np.arange(60) >= np.array(ends(batch))[:, None]].any()
    least = next(n for n in range(1, 60) if _exists(name, n))
    assert max(ends(draw(name, 8, 1, least + 1))) <= least + 1


def _exists(name, length):
    try:
        return bool(draw(name, 1, length, length))
    except UserError as error:
        assert "\n" not in str(error) and f"from {length} to {length} tokens: give" in str(error)
        return False


def dyck(word):
    while "()" in word:
        word = word.replace("()", "")
    return not word


LANGUAGES = {
    "aa-star": ("a", 10, 6, lambda w: re.fullmatch("(aa)*", w)),
    "abab-star": ("ab", 14, 9, lambda w: re.fullmatch("(abab)*", w)),
    "anbn": ("ab", 12, 6, lambda w: re.fullmatch("a*b*", w) and w.count("a") == w.count("b")),
    "anbncn": ("abc", 9, 6, lambda w: re.fullmatch("a*b*c*", w) and w.count("a") == w.count("b") == w.count("c")),
    "shuffle-2": ("()[]", 8, 4, lambda w: dyck(re.sub(r"[\[\]]", "", w)) and dyck(re.sub(r"[()]", "", w).translate(ROUND))),
}
ROUND = str.maketrans("[]", "()")


@pytest.mark.parametrize("name", LANGUAGES)
def test_labels_are_the_sets_of_symbols_that_may_follow(name):
    """All words up to a length, by a recogniser; prefixes so short that every set is complete."""
    alphabet, most, longest, accepts = LANGUAGES[name]
    follow = {}
    for n in range(1, most + 1):
        for word in filter(accepts, map("".join, itertools.product(alphabet, repeat=n))):
            for t in range(n):
                follow.setdefault(word[: t + 1], set()).update(word[t + 1 : t + 2] or {"end"})
    sets, words = {}, set()
    for tokens, labels in read(draw(name, 300, 1, longest)):
        word = "".join(alphabet[token] for token in tokens[: len(labels)])
        assert accepts(word) and len(labels) == max(labels) + 1
        words.add(word)
        for t, label in labels.items():
            sets.setdefault(label, set()).add(frozenset(follow[word[: t + 1]]))
    assert sorted(sets) == list(range(task(name).labels)), sets
    assert all(len(one) == 1 for one in sets.values()) and len(set.union(*sets.values())) == len(sets)
    assert words == {
        word for n in range(1, longest + 1) for word in map("".join, itertools.product(alphabet, repeat=n)) if accepts(word)
    }


def test_long_words_of_brackets_are_balanced_and_of_all_depths():
    depths, ended, alone = [], 0, 0
    for tokens, labels in read(draw("shuffle-2", 300, 2, 100)):
        word = "".join("()[]"[token] for token in tokens[: len(labels)])
        assert LANGUAGES["shuffle-2"][3](word)
        for t, label in labels.items():
            round_, square = (word[: t + 1].count(a) > word[: t + 1].count(b) for a, b in ("()", "[]"))
            assert label == round_ + 2 * square
        depths.append(
            max(
                word[:t].count("(") + word[:t].count("[") - word[:t].count(")") - word[:t].count("]")
                for t in range(len(word))
            )
        )
        ended += 0 in list(labels.values())[:-1]
        alone += len({*word} & {*"(["}) == 1
    assert min(depths) <= 2 and np.quantile(depths, 0.8) > 10 and max(depths) > 30
    assert 60 < ended < 240 and alone < 60


def test_parity():
    for tokens, labels in read(draw("parity")):
        odd = False
        for t, label in labels.items():
            odd ^= bool(tokens[t])
            assert label == odd
    assert 0.45 < draw("parity").tokens[draw("parity").weights > 0].mean() < 0.55


@pytest.mark.parametrize(("name", "size", "order"), [("s3", 3, 6), ("a5", 5, 60)])
def test_products_are_those_of_matrices(name, size, order):
    """Row i of a permutation's matrix has its one in column p(i): then the first factor of a product acts first."""
    matrices = [np.eye(size, dtype=int)[list(p)] for p in GroupWords(name).elements]
    assert len({m.tobytes() for m in matrices}) == order and (matrices[0] == np.eye(size)).all()
    assert name == "s3" or all(round(np.linalg.det(m)) == 1 for m in matrices)
    for tokens, labels in read(draw(name, 20, 1, 30)):
        product = np.eye(size, dtype=int)
        for t, label in labels.items():
            product = product @ matrices[tokens[t]]
            assert (product == matrices[label]).all()


def test_queries_of_mqar_are_answered_by_the_pairs():
    pairs, distances = 8, []
    for tokens, labels in read(draw("mqar", 200, 1, 100)):
        values = dict(zip(tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
        assert len(values) == len(set(values.values())) == pairs
        assert max(values) < 32 <= min(values.values())
        end = max(t for t, token in enumerate(tokens) if token) + 1
        assert labels == {t: values[tokens[t]] for t in range(2 * pairs, end) if tokens[t] < 32}
        assert len(labels) == pairs and all((t - 2 * pairs) % 2 == 0 for t in labels)
        distances += [(t - 2 * pairs) // 2 for t in labels]
    near = np.bincount([d for d in distances if d < 8])
    assert near[0] > near[1] > near[3] > near[7]


def test_distances_of_queries_follow_the_power():
    """One pair: the distance has the distribution itself."""
    first = lambda power: [min(labels) // 2 - 1 for _, labels in read(draw(MQAR(1, 8, power), 4000, 18, 18))]
    for power in (0.5, 1.0):
        expected = (np.arange(8) + 1.0) ** (power - 1)
        np.testing.assert_allclose(np.bincount(first(power)) / 4000, expected / expected.sum(), atol=0.025)


@pytest.mark.parametrize("name", ["mad-recall", "mad-noisy-recall"])
def test_recall_is_of_keys_that_were_read_before(name):
    noisy = []
    for tokens, labels in read(draw(name, 200, 3, 61)):
        known, expected, end = {}, {}, max(labels) + 1
        for t in range(0, end, 2):
            if tokens[t] < 8:
                if tokens[t] in known:
                    expected[t] = known[tokens[t]]
                if t + 1 < end:
                    assert 8 <= known.setdefault(tokens[t], tokens[t + 1]) == tokens[t + 1] < 16
            noisy.append(tokens[t] >= 16)
            assert t + 1 == end or (tokens[t] >= 16) == (tokens[t + 1] >= 16)
        assert labels == expected
    assert (0.1 < np.mean(noisy) < 0.25) if name == "mad-noisy-recall" else not any(noisy)


def test_fuzzy_recall_is_of_keys_that_were_read_before():
    fuzzy, sizes = FuzzyRecall(), set()
    for tokens, labels in read(draw(fuzzy, 200, 9, 90)):
        word = "".join("kv"[token >= 8] for token in tokens[: max(labels) + 1])
        known, expected = {}, {}
        for pair in re.finditer("(k{3})(v*)", word):
            key, value = (tokens[slice(*pair.span(n))] for n in (1, 2))
            assert len(set(key)) == 3 and len(set(value)) == len(value) <= 3
            before, end = known.get(tuple(key)), pair.end() == len(word)
            if before:
                assert value == before[: len(value)] and (end or len(value) == len(before))
                expected |= {pair.end(1) - 1 + i: token for i, token in enumerate(before) if pair.end(1) - 1 + i < len(word)}
            elif not end:
                known[tuple(key)] = value
                sizes.add(len(value))
        assert labels == expected and len(known) <= 8
    assert sizes == {1, 2, 3}


def test_selective_copying_asks_for_the_tokens_in_their_order():
    places = []
    for tokens, labels in read(draw(SelectiveCopying(3, 5), 300, 7, 20)):
        asked = tokens.index(6)
        assert list(labels) == [asked + 1, asked + 2, asked + 3] and tokens[asked + 1 : asked + 4] == [5, 5, 5]
        assert list(labels.values()) == [token for token in tokens[:asked] if token != 5]
        places += [t / asked for t in range(asked) if tokens[t] != 5]
    assert 0.35 < np.mean(places) < 0.55


def test_compression_asks_for_all_tokens():
    for tokens, labels in read(draw(Compression(4), 100, 1, 21)):
        half = tokens.index(4)
        assert labels == {half + i: tokens[i] for i in range(half)} and tokens[half : 2 * half] == [4] * half
        assert not any(tokens[2 * half :])


def test_memorization_is_of_one_map():
    known = {}
    for seed in (0, 1):
        for tokens, labels in read(draw(Memorization(5), 20, 2, 20, seed)):
            assert list(labels) == list(range(1, max(labels) + 1, 2))
            assert all(tokens[t] == 10 and known.setdefault(tokens[t - 1], label) == label for t, label in labels.items())
    assert sorted(known) == [0, 1, 2, 3, 4] and sorted(known.values()) == [5, 6, 7, 8, 9]
    assert known != dict(enumerate(Memorization(5, seed=0).values))


def test_a_passkey_is_told_by_its_marker_alone():
    depths, filler, batch = [], [], draw("passkey", 500, 9, 64)
    for tokens, labels in read(batch):
        marker, end = tokens.index(10), max(labels) + 1
        assert labels == {end - 4 + i: tokens[marker + 1 + i] for i in range(4)}
        assert tokens[end - 4 : end] == [11, 12, 13, 14] and tokens.count(10) == 1
        depths.append(marker / max(end - 9, 1))
        filler += tokens[:marker] + tokens[marker + 5 : end - 4]
    assert 0.4 < np.mean(depths) < 0.6 and min(depths) == 0 and max(depths) == 1
    assert set(filler) == set(range(10)) == set(batch.targets[batch.weights > 0])
    digits = batch.targets[:, :][batch.weights > 0].reshape(500, 4)
    same = np.mean([(batch.tokens[:, t] == digits[:, i])[:100].mean() for t in range(9) for i in range(4)])
    assert same < 0.2, "what is not the passkey tells nothing of it"


def test_another_passkey_changes_its_digits_and_the_labels_alone(monkeypatch):
    class Other:
        """The same draws, with other digits after the marker."""

        def __init__(self):
            self.inner, self.calls = np.random.default_rng(0), 0

        def integers(self, *args, **kwargs):
            self.calls += 1
            drawn = self.inner.integers(*args, **kwargs)
            return np.where(needle, (drawn + 1) % 10, drawn) if self.calls == 2 else drawn

    needle = np.zeros((8, 40), bool)
    one = Passkey().sample(Other(), 8, 20, 40)
    for row, tokens in enumerate(one.tokens.tolist()):
        needle[row, tokens.index(10) + 1 :][:4] = True
    other = Passkey().sample(Other(), 8, 20, 40)
    assert ((one.tokens != other.tokens) == needle).all() and (one.weights == other.weights).all()
    assert ((one.targets != other.targets) == (one.weights > 0)).all()


@pytest.mark.parametrize("name", sorted({*TASKS} - {"abab-star", "anbn", "anbncn"}))
def test_no_label_is_read_off_its_own_slot(name):
    batch = draw(name, 256)
    labelled = batch.weights > 0
    counts = np.zeros((task(name).tokens, task(name).labels), int)
    np.add.at(counts, (batch.tokens[labelled], batch.targets[labelled]), 1)
    assert counts.max(axis=1).sum() < (0.75 if name == "shuffle-2" else 0.6) * counts.sum()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: draw("abab-star", 2, 5, 7),
            r"no sequence of \(abab\)\* has from 5 to 7 tokens: give 8 or more as the longest",
        ),
        (lambda: draw("anbncn", 2, 4, 5), r"no sequence of a\^n b\^n c\^n has from 4 to 5 tokens: give 6 or more"),
        (lambda: draw("shuffle-2", 2, 3, 3), "no sequence of shuffle-2 has from 3 to 3 tokens: give 4 or more"),
        (lambda: draw("mqar", 2, 2, 31), "no sequence of mqar with 8 pairs has from 2 to 31 tokens: give 32 or more"),
        (lambda: draw("mad-recall", 2, 1, 2), "no sequence of in-context recall has from 1 to 2 tokens: give 3 or more"),
        (
            lambda: draw("mad-selective-copying", 2, 1, 32),
            "selective copying of 16 tokens has from 1 to 32 tokens: give 33 or",
        ),
        (lambda: draw("passkey", 2, 1, 8), "no sequence of a passkey of 4 digits has from 1 to 8 tokens: give 9 or more"),
        (lambda: draw("parity", 2, 9, 8), "no sequence of parity has from 9 to 8 tokens: give 9 or more as the longest"),
        (lambda: draw("parity", 0), "parity: batch_size 0: give a whole number of at least 1"),
        (lambda: draw("parity", 2, 0), "parity: shortest 0: give a whole number of at least 1"),
        (lambda: draw("parity", 2, 1, 2.0), "parity: longest 2.0: give a whole number of at least 1"),
        (lambda: task("mad-recal"), "task 'mad-recal' is unknown: give mad-recall, "),
        (lambda: task("sorting things"), "task 'sorting things' is unknown: give "),
        (lambda: task(3), "task 3 is unknown: give parity, aa-star"),
        (lambda: Repeated(""), "Repeated: string '': give the string to repeat"),
        (lambda: MQAR(pairs=40), "MQAR: vocabulary 64 for 40 pairs: give 80 or more"),
        (lambda: GroupWords("s4"), "GroupWords: group 's4': give one of s3, a5"),
        (lambda: InContextRecall(noise=1.0), "InContextRecall: noise 1.0: give a finite number of at least 0 and below 1"),
        (lambda: FuzzyRecall(letters=2), "FuzzyRecall: letters 2 for keys or values of 3 tokens: give 3 or more"),
        (lambda: FuzzyRecall(keys=7, letters=3), "FuzzyRecall: keys 7, of 6 that there are: give 6 or fewer"),
        (lambda: FuzzyRecall(letters=16, key_size=6), "letters 16 and key_size 6 make 6e\\+06 keys: give less"),
        (lambda: ShuffledBrackets(0), "ShuffledBrackets: kinds 0: give a whole number of at least 1"),
        (lambda: ShuffledBrackets(31), "ShuffledBrackets: kinds 31: give a whole number of at least 1 and below 31"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(wrong, message):
    with pytest.raises(UserError, match=message) as caught:
        wrong()
    assert "\n" not in str(caught.value)


def test_fuzzy_keys_are_all_there_are():
    """As many keys as there are: each is drawn once."""
    keys = FuzzyRecall(keys=math.perm(4, 2), letters=4, key_size=2, value_size=1)._keys(np.random.default_rng(0), 3)
    assert all({tuple(key) for key in row.tolist()} == set(itertools.permutations(range(4), 2)) for row in keys)
