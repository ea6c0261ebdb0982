"""Learners: any pieces, any company and any restart give what one reading gives; nothing else of a file is believed."""

import dataclasses
import json
import pickle
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rare import cases
from safetensors.numpy import save

from nested_jax import CMSConfig, LanguageModel, ModelConfig, UserError
from nested_jax.cms.in_context import fast_weights
from nested_jax.data import ByteTokenizer
from nested_jax.serve import Learner, Learners
from nested_jax.serve.pool import _read, next_piece
from nested_jax.serve.until import until

IN_CONTEXT = {"cms": CMSConfig(hidden=(6, 5), periods=(24, 8), rate=0.5), "chunk": 4}
EXACT = dict(errors="exact", step="normalised", rates="own", features="boundary", momentum=False)  # the presets'
SIZES = {"vocabulary": 257, "width": 16, "layers": 2, "heads": 2, "memory_hidden": 4}
MODELS = {
    "learning": dict(mixer="gated-delta", **IN_CONTEXT),
    "hope": dict(mixer="self-modifying", **EXACT, **IN_CONTEXT),
    "hope-attention": dict(mixer="attention", **IN_CONTEXT),
    "nested": dict(mixer="gated-delta", chunk=3, cms=CMSConfig(hidden=(6, 6), periods=(8, 4), rate=0.5, variant="nested")),
    "transformer": dict(mixer="attention", cms=CMSConfig(hidden=(8,))),
    "titans": dict(mixer="titans", chunk=4, cms=CMSConfig(hidden=(8,))),
}


def made(name, **changes):
    return LanguageModel(ModelConfig(**SIZES | MODELS[name] | changes), rngs=nnx.Rngs(0))


def text(length=90, seed=0):
    return np.random.default_rng(seed).integers(257, size=length)


def in_one_call(model, ids):
    return np.asarray(jax.jit(lambda: model(ids[None], model.init_state(1, max_length=64))[0][0])())


same = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", cases(MODELS, ["transformer"]))
def test_pieces_of_any_size_in_any_company(name):
    """As one call of the model; learners beside it, at other places of the grids, change nothing and are not changed."""
    model, ids = made(name), text()
    want = in_one_call(model, ids)
    learners, found, at = Learners(model, 3, max_length=64), {0: [], 1: [], 2: []}, [0, 0, 0]
    for sizes in [(1, 24, 0), (7, 1, 5), (40, 47, 0), (0, 10, 1), (33, 8, 57), (9, 0, 27)]:
        pieces = {row: ids[at[row] : at[row] + size] for row, size in enumerate(sizes)}
        for row, logits in learners.read(pieces).items():
            assert logits.shape == (sizes[row], 257)
            found[row].append(logits)
            at[row] += sizes[row]
    for row, learner in enumerate(learners):
        assert learner.tokens_read == 90
        same(np.concatenate(found[row]), want)
        same(learner.logits, want[-1])


def test_two_learners_share_nothing():
    learners = Learners(made("learning"), 2)
    learners.read({0: text(50)})
    before = jax.tree.map(np.asarray, learners._pool.get(0))
    learners.read({1: text(50, seed=1)})
    list(learners[1].generate([3], tokens=3))
    jax.tree.map(np.testing.assert_array_equal, learners._pool.get(0), before)
    assert [one.tokens_read for one in learners] == [50, 54]


def test_pieces_cover_a_text_and_their_programs_are_few():
    config, programs = made("learning").config, set()
    for length in (1, 7, 100, 5000, 12345):
        read = 0
        while read < length:
            piece = next_piece(config, read, length - read)
            assert piece.closes == (read > 0 and read % 8 == 0) and read % piece.multiple == 0
            assert piece.multiple == 8 or read % 8 + piece.tokens <= 8
            programs.add(piece)
            read += piece.tokens
        assert read == length
    assert len(programs) <= 8


@pytest.mark.parametrize("name", cases(MODELS, ["learning"]))
def test_a_restored_learner_goes_on_alike(name, tmp_path):
    """From the middle of a segment and of a chunk, to the last bit; the file has no weights of the model."""
    model, path = made(name), tmp_path / "learner"
    learner = Learner(model, max_length=64)
    learner.read(text(45))
    learner.save(path)
    other = Learner.restore(path, made(name))
    assert other.tokens_read == 45 and (other.logits == learner.logits).all()
    np.testing.assert_array_equal(other.read(text(20, seed=1)), learner.read(text(20, seed=1)))
    options = {"tokens": 5, "seed": 7, "top_k": 9}
    assert list(other.generate([1], **options)) == list(learner.generate([1], **options))
    assert path.stat().st_size < sum(leaf.nbytes for leaf in jax.tree.leaves(learner._all._pool.states))
    copy = learner.copy()
    copy.read(text(9))
    assert copy.tokens_read == learner.tokens_read + 9
    (learners := Learners(model, 3, max_length=64))[1].load(path)
    assert [one.tokens_read for one in learners] == [0, 45, 0]


def test_a_file_has_what_attention_has_read_and_no_empty_slots(tmp_path):
    """It grows with the text to the cache's length; from a part and from a whole cache the learner goes on alike."""
    model, sizes = made("transformer"), []
    for read in (0, 5, 45, 64, 100):
        learner = Learner(model, max_length=64)
        learner.read(text(read))
        learner.save(tmp_path / "learner")
        sizes.append((tmp_path / "learner").stat().st_size)
        other = Learner.restore(tmp_path / "learner", model)
        np.testing.assert_array_equal(other.read(text(20, seed=1)), learner.read(text(20, seed=1)))
    assert sizes[0] < sizes[1] < sizes[2] < sizes[3] and abs(sizes[4] - sizes[3]) < 100


def test_files_that_are_none_of_this_model_are_refused(tmp_path):
    model, path, ran = made("learning"), tmp_path / "learner", tmp_path / "ran"
    Learner(model, max_length=64).save(path)
    whole = path.read_bytes()
    with pytest.raises(UserError, match="of another model, or of other weights: give the model"):
        Learner.restore(path, LanguageModel(model.config, rngs=nnx.Rngs(1)))
    with pytest.raises(UserError, match="max_length 64, the learner 4096"):
        Learner(model).load(path)

    class Evil:
        def __reduce__(self):
            return (ran.write_text, ("",))

    header = struct.unpack("<Q", whole[:8])[0]
    about = whole[8 : 8 + header]
    damaged = {
        "pickle": pickle.dumps(Evil()),
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "longer": whole + b"\0" * 8,
        "huge header": struct.pack("<Q", 2**60) + whole[8:],
        "no format": whole.replace(b"nested_jax learner 1", b"nested_jax_learner 1"),
        "a length": whole[:8] + about.replace(b'"max_length":"64"', b'"max_length":"65"') + whole[8 + header :],
        "not a length": whole[:8] + about.replace(b'"max_length":"64"', b'"max_length":"-4"') + whole[8 + header :],
        "a position": whole[:8] + about.replace(b'"read":"0"', b'"read":"9"') + whole[8 + header :],
    }
    for name, data in damaged.items():
        assert data != whole, name
        path.write_bytes(data)
        with pytest.raises(UserError, match="(is damaged|is no learner's file|max_length 65).*: give"):
            Learner(model, max_length=64).load(path)
    assert not ran.exists()
    with pytest.raises(FileNotFoundError):
        Learner.restore(tmp_path / "gone", model)


def test_a_file_whose_header_asks_for_too_much_is_refused(tmp_path):
    """Numbers of any size, types of no use, and a length that fills no memory where the model is another one."""
    model, path = made("transformer"), tmp_path / "learner"
    fingerprint = Learner(model)._all._pool.fingerprint
    for most, kind, of in (
        ("9" * 5000, "is damaged: give a copy", fingerprint),
        (str(2**31), "is damaged: give a copy", fingerprint),
        (str(2**31 - 1), "of another model", "0" * 64),
    ):
        about = {"format": "nested_jax learner 1", "model": of, "read": "0", "max_length": most}
        path.write_bytes(save({"a": np.zeros(1, np.float32)}, about))
        with pytest.raises(UserError, match=kind):
            Learner.restore(path, model)
    header = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}, "__metadata__": about}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(UserError, match="is damaged, or no learner's file"):
        Learner.restore(path, model)


def test_a_save_that_is_cut_off_leaves_the_old_file(tmp_path, monkeypatch):
    learner, path = Learner(made("transformer")), tmp_path / "learner"
    learner.read([1, 2])
    learner.save(path)
    old = path.read_bytes()
    learner.read([3])
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            learner.save(path)
    assert path.read_bytes() == old
    learner.save(path)
    assert Learner.restore(path, learner._all.model).tokens_read == 3


def test_what_is_not_to_be_learned_leaves_the_cms_as_it_is():
    """And is in the context: the next logits are not those of a learner that has not read it."""
    learner, fresh = Learner(made("learning")), Learner(made("learning"))
    learner.read(text(60), learn=False)
    matrices = lambda one: [level.matrices for level in fast_weights(one._all._pool.get(0)[0].learning.levels)]
    jax.tree.map(np.testing.assert_array_equal, matrices(learner), matrices(fresh))
    fresh.read(text(60, seed=1), learn=False)
    assert not np.allclose(learner.logits, fresh.logits)
    learner.read(text(60))
    assert not np.allclose(jax.tree.leaves(matrices(learner))[0], jax.tree.leaves(matrices(fresh))[0])


@pytest.mark.parametrize("learn_from", ["prompt", "all"])
def test_what_is_written_is_learned_from_or_not(learn_from):
    """A learner that writes is one that reads the same tokens, learning from them or not."""
    model = made("learning")
    writer, reader = Learner(model, learn_from=learn_from), Learner(model)
    writer.read(text(20))
    written = list(writer.generate(tokens=60, seed=1))
    reader.read(text(20))
    reader.read(written, learn=learn_from == "all")
    assert writer.tokens_read == reader.tokens_read == 80
    jax.tree.map(same, writer._all._pool.get(0), reader._all._pool.get(0))


@pytest.mark.slow
def test_nothing_is_compiled_for_more_of_a_text_and_nothing_grows():
    learner, ids = Learner(made("learning"), max_length=64), text(200)
    learner.read(ids)
    sizes = lambda: [leaf.nbytes for leaf in jax.tree.leaves(learner._all._pool.states)]
    programs, before = _read._cache_size(), sizes()
    for _ in range(3):
        learner.read(ids)
    assert _read._cache_size() == programs and sizes() == before


def test_a_level_forgets_alone():
    learner = Learner(made("learning"))
    learner.read(text(50))
    levels = lambda: fast_weights(learner._all._pool.get(0)[0].learning.levels)
    before = levels()
    learner.reset("level2")
    (slow, fast), start = levels(), fast_weights(learner._all._pool.start()[0].learning.levels)
    jax.tree.map(np.testing.assert_array_equal, slow, before[0])
    jax.tree.map(np.testing.assert_array_equal, fast.matrices, start[1].matrices)
    assert not np.allclose(before[1].matrices["up"], start[1].matrices["up"]) and fast.elapsed == before[1].elapsed
    learner.read(text(50))
    learner.reset()
    assert learner.tokens_read == 0
    same(learner.read(text()), in_one_call(learner._all.model, text()))
    with pytest.raises(UserError, match="reset: level 'level3' is unknown: give one of None, level1, level2"):
        learner.reset("level3")


@pytest.mark.parametrize("far", [2**24, 2**31, 2**33])
def test_positions_do_not_run_out(far):
    """Past 2^24, where float32 would round, and past int32: as just as far from a document's start, but for its place."""
    model, ids = made("learning"), text()
    near, distant = Learner(model), Learner(model)
    near.read(ids[:40])
    grid = model.config.alignment
    more = (far - 16) // grid * grid
    (state, logits) = near._all._pool.get(0)
    bound = np.int32(2**30 // grid * grid + 40 % grid)
    position = bound if more + 40 >= 3 * 2**29 else np.int32(more + 40)
    distant._all._pool.put(0, (state._replace(position=position), logits), more + 40)
    for begin, end in ((40, 41), (41, 47), (47, 90)):
        same(distant.read(ids[begin:end]), near.read(ids[begin:end]))
    assert distant.tokens_read == more + 90 > far and 0 < int(distant._all._pool.states.position[0]) < 3 * 2**29


def test_text_that_is_written_ends_before_a_stop():
    """At temperature 0 the same as token by token; learners at once as each alone; what is written has been read."""
    model, tokenizer = made("transformer"), ByteTokenizer()
    learner = Learner(model, tokenizer=tokenizer)
    whole = "".join(learner.copy().generate("ab", tokens=40, temperature=0.0))
    learner.read("ab")
    want = []
    while len(want) < 40:
        token = int(jnp.argmax(learner.logits[: tokenizer.vocabulary]))
        if token == tokenizer.boundary:
            break
        want.append(token)
        learner.read([token])
    assert tokenizer.decode(want) == whole
    part = whole[5:7]
    again = Learner(model, tokenizer=tokenizer)
    assert "".join(again.generate("ab", tokens=40, temperature=0.0, stop=[part])) == whole[: whole.index(part)]
    learners = Learners(model, 2, tokenizer=tokenizer)
    written = {0: [], 1: []}
    for row, token in learners.generate({0: "ab", 1: "xyz"}, tokens=12, seed=3):
        written[row].append(token)
    alone = Learner(model)
    alone.read(np.concatenate([[tokenizer.boundary], tokenizer.encode("xyz")]))
    own = Learner(model, tokenizer=tokenizer)
    own.read("xyz")
    assert (own.logits == alone.logits).all()
    assert written[1] == [token for _, token in own._all._write({0: ""}, {0: 4}, 12, 1.0, 0, 1.0)]
    assert len(written[0]) <= 12 and learners[0].tokens_read == 3 + len(written[0])


def test_strings_that_end_a_text():
    assert list(until(["a", "b", "c"], [])) == ["a", "b", "c"]
    assert "".join(until(iter(["xx<", "en", "d>yy"]), ["<end>"])) == "xx"
    assert "".join(until(["aab"], ["ab"])) == "a"
    assert list(until(["abab", "abc"], ["ababc"])) == ["ab"]
    assert "".join(until(["one two"], ["two", "ne"])) == "o"
    assert list(until(["stop"], ["stop"])) == []


WRONG = {
    "model 3: give a LanguageModel": lambda model: Learner(3),
    "number 0: give": lambda model: Learners(model, 0),
    "max_length 0: give": lambda model: Learner(model, max_length=0),
    "learn_from 'none' is unknown: give one of all, prompt": lambda model: Learner(model, learn_from="none"),
    "no tokenizer: give tokens": lambda model: Learner(model).read("text"),
    "token 257 is out of range": lambda model: Learner(model).read([1, 257]),
    "token -1 is out of range": lambda model: Learner(model).read([-1]),
    "give a string, or whole numbers": lambda model: Learner(model).read([0.5]),
    "give a string, or whole numbers ": lambda model: Learner(model).read([[1]]),
    "learner 2: there are 0 to 1": lambda model: Learners(model, 2).read({2: [1]}),
    "tokens 0: give": lambda model: Learner(model).generate([1], tokens=0),
    "temperature nan: give": lambda model: Learner(model).generate([1], temperature=float("nan")),
    "temperature 'hot': give": lambda model: Learner(model).generate([1], temperature="hot"),
    "top_k -1: give": lambda model: Learner(model).generate([1], top_k=-1),
    "top_p 0: give": lambda model: Learner(model).generate([1], top_p=0),
    "seed -1: give": lambda model: Learner(model).generate([1], seed=-1),
    "has read nothing": lambda model: Learner(model).generate(),
    "stop \\('a',\\): the learner has no tokenizer": lambda model: Learner(model).generate([1], stop="a"),
    "stop \\('',\\): give strings": lambda model: Learner(model, tokenizer=ByteTokenizer()).generate("a", stop=[""]),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_is_told_at_once(message):
    with pytest.raises(UserError, match=message):
        WRONG[message](made("transformer"))


@pytest.mark.slow
def test_a_model_of_bfloat16_is_saved_whole(tmp_path):
    model = made("learning", dtype="bfloat16")
    learner = Learner(model)
    learner.read(text(13))
    learner.save(tmp_path / "learner")
    other = Learner.restore(tmp_path / "learner", model)
    np.testing.assert_array_equal(other.read(text(20)), learner.read(text(20)))
    assert dataclasses.asdict(model.config)["dtype"] == "bfloat16"
