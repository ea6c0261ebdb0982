from __future__ import annotations

import codecs
import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_jax.data import datasets, local, open_documents
from nested_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """30 files, each of which says its name and a line of prose."""
    for i in range(30):
        path = tmp_path / f"part{i % 3}" / f"{i:02d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"file {i:02d}\nIt was the best of times, it was the worst of times.\n")
    return tmp_path


def read(source, split, **options):
    return [bytes(text) for text in open_documents(source, split, **options)]


def test_splits_are_by_file_disjoint_and_complete(folder):
    train, heldout = read(folder, "train"), read(folder, "heldout")
    assert len(heldout) >= 1 and len(train) >= 25
    assert not set(train) & set(heldout)
    assert sorted(train + heldout) == sorted(path.read_bytes() for path in folder.rglob("*.txt"))
    assert train != sorted(train), "shuffled"


def test_documents_are_the_same_wherever_the_folder_is(folder, tmp_path_factory):
    moved = shutil.copytree(folder, tmp_path_factory.mktemp("moved") / "other")
    for split in ("train", "heldout"):
        assert read(folder, split) == read(moved, split)


def test_a_new_file_moves_no_other_between_splits(folder):
    heldout = set(read(folder, "heldout"))
    (folder / "new.txt").write_text("a new file")
    assert len(set(read(folder, "heldout")) ^ heldout) <= 1


def test_a_twentieth_is_held_out():
    assert len(local._hold_out([str(i) for i in range(10_000)])) == pytest.approx(500, rel=0.15)


@pytest.mark.parametrize("change", ["content", "name", "new", "gone"])
def test_changed_text_is_read_again(change, folder):
    before = read(folder, "train") + read(folder, "heldout")
    file = folder / "part0" / "00.txt"
    text = file.read_bytes()
    os.utime(file)
    assert read(folder, "train") + read(folder, "heldout") == before
    if change == "content":
        file.write_bytes(text.replace(b"best", b"rest"))
    elif change == "name":
        file.rename(folder / "part0" / "renamed.txt")
    elif change == "new":
        (folder / "new.txt").write_bytes(text + b"new")
    else:
        file.unlink()
    after = read(folder, "train") + read(folder, "heldout")
    assert sorted(after) == sorted(path.read_bytes() for path in folder.rglob("*.txt"))
    assert (sorted(after) == sorted(before)) == (change == "name")


def test_binary_empty_hidden_and_repeated_files_of_a_folder_are_left_out(folder):
    expected = sorted(read(folder, "train") + read(folder, "heldout"))
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "empty.txt").touch()
    (folder / "blank.txt").write_text(" \n")
    (folder / ".hidden").write_text("hidden")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    shutil.copy(folder / "part0" / "00.txt", folder / "repeated.txt")
    (folder / "dangling").symlink_to(folder / "nowhere")
    assert sorted(read(folder, "train") + read(folder, "heldout")) == expected


def test_a_prepared_dataset_within_the_folder_is_no_part_of_it(folder):
    expected = sorted(read(folder, "train") + read(folder, "heldout"))
    assert read("headlines/plain", "train", data_dir=folder)
    assert list(folder.glob("headlines/*/*/dataset_info.json"))
    assert sorted(read(folder, "train") + read(folder, "heldout")) == expected


def test_what_was_read_and_what_was_left_out_is_told(folder):
    said = str(open_documents(folder).summary)
    assert said == f"30 files, {30 * 61:,} bytes, 30 documents, {len(read(folder, 'heldout'))} of them held out"
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (folder / "wide.txt").write_text("wide", "utf-16")
    (folder / "empty.txt").touch()
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    (folder / ".hidden").touch()
    (folder / "part0" / "again.txt").write_bytes((folder / "part0" / "00.txt").read_bytes())
    (folder / "dangling").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe")
    (folder / "lines.jsonl").write_text('{"title": "no text"}\n')
    (folder / "damaged.txt.gz").write_bytes(b"no gzip")
    for split in ("train", "heldout"):
        summary = open_documents(folder, split).summary
        assert str(summary).startswith(f"{said}; left out: 2 hidden (.git, ...)")
        assert summary.left_out == {
            "hidden": [".git", ".hidden"], "no file": ["dangling", "pipe"], "damaged .gz": ["damaged.txt.gz"],
            "empty": ["empty.txt"], "without a field 'text'": ["lines.jsonl"], "binary": ["picture.png"],
            "UTF-16": ["wide.txt"], "repeated": ["part0/again.txt"],
        }  # fmt: skip


def test_the_same_text_packed_or_by_another_path_is_the_same_documents(folder, tmp_path_factory):
    packed = tmp_path_factory.mktemp("packed")
    for path in folder.rglob("*.txt"):
        target = packed / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        target.with_name(f"{target.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    one, other = packed / "one.txt", packed / "other.md.gz"
    one.write_text("To be, or not to be, that is the question.\n" * 500)
    other.write_bytes(gzip.compress(one.read_bytes()))
    for split in ("train", "heldout"):
        assert read(one, split) == read(other, split)
    one.unlink(), other.unlink()
    for split in ("train", "heldout"):
        assert read(folder, split) == read(packed, split)


@pytest.mark.parametrize("source", ["bomb.txt.gz", "."])
def test_a_file_that_unpacks_to_too_much_is_refused_before_it_is_in_memory(folder, monkeypatch, source):
    bomb, most = folder / "bomb.txt.gz", 2**20
    monkeypatch.setattr(local, "_MOST", most)
    bomb.write_bytes(gzip.compress(bytes(2**26)))
    assert bomb.stat().st_size < 2**17
    tracemalloc.start()
    with pytest.raises(UserError, match="bomb.txt.gz unpacks to more than 1,048,576 bytes: unpack it, or split it"):
        open_documents(folder / source)
    assert tracemalloc.get_traced_memory()[1] < 8 * most
    tracemalloc.stop()
    bomb.write_bytes(gzip.compress(b"It was the best of times, it was".ljust(most)))
    assert open_documents(bomb).summary.text_bytes == most


@pytest.mark.parametrize("name", ["poems.jsonl", "poems.ndjson", "poems.jsonl.gz", "poems:old.jsonl"])
def test_lines_of_json_are_documents(name, tmp_path):
    poems = [f"poem {i}\n" + "Tyger Tyger, burning bright,\n" * (i % 7) for i in range(60)]
    lines = "\n".join(json.dumps({"title": f"title {i}", "text": poem}) for i, poem in enumerate(poems)) + "\n\n"
    data = codecs.BOM_UTF8 + lines.encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    for source in (path, tmp_path):
        documents = open_documents(source)
        assert sorted(read(source, "train") + read(source, "heldout")) == sorted(poem.encode() for poem in poems)
        assert documents.summary[:3] == (1, sum(map(len, poems)), 60) and documents.summary.heldout == 60 - len(documents)
        titles = read(f"{source}:title", "train") + read(f"{source}:title", "heldout")
        assert sorted(titles) == sorted(f"title {i}".encode() for i in range(60))
    with pytest.raises(UserError, match="is without a field 'body': in line 1, it has title, text; give FILE:FIELD$"):
        open_documents(f"{path}:body")
    path.with_suffix("").with_suffix(".jsonl").write_text('{"text": "a"}\n[' + "[" * 100_000)
    with pytest.raises(UserError, match="is damaged: line 2 is no JSON$"):
        open_documents(path.with_suffix("").with_suffix(".jsonl"))


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be, that is the question.\n" * 99, "utf-8-sig")
    assert not any(codecs.BOM_UTF8 in text for text in read(path, "train") + read(path, "heldout"))
    path.write_text("To be" * 99, "utf-16")
    with pytest.raises(UserError, match="text.txt is UTF-16: write it in UTF-8$"):
        open_documents(path)


def test_a_folder_named_stdlib_is_a_folder(folder, monkeypatch):
    folder.rename(folder.with_name("stdlib"))
    monkeypatch.chdir(folder.parent)
    assert len(read("./stdlib", "train") + read("./stdlib", "heldout")) == 30


def test_a_single_file_is_cut_at_blank_lines(tmp_path):
    paragraphs = [f"{i} " + "It is a far, far better thing that I do.\n" * 20 + "\n" for i in range(400)]
    path = tmp_path / "tale of two cities.txt"
    path.write_text("".join(paragraphs))
    train, heldout = read(path, "train"), read(path, "heldout")
    assert all(text.endswith(b"\n\n") and len(text) <= 2**14 for text in train + heldout)
    assert sum(len(text) > 2**13 for text in train + heldout) >= len(train + heldout) - 1
    assert len(heldout) >= 1 and sum(map(len, train + heldout)) == path.stat().st_size
    assert sorted(b"".join(train + heldout)) == sorted(path.read_bytes())


def test_a_few_files_are_cut_too(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.md").write_text(f"{i}: To be, or not to be, that is the question.\n" * 500)
    train, heldout = read(tmp_path, "train"), read(tmp_path, "heldout")
    assert len(train) > 15 and len(heldout) >= 1
    assert sum(map(len, train + heldout)) == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_a_file_without_line_ends_is_cut_between_characters(tmp_path):
    path = tmp_path / "snow.txt"
    path.write_text("☃" * 3000)
    texts = read(path, "train") + read(path, "heldout")
    assert len(texts) > 5 and "".join(text.decode() for text in texts) == "☃" * 3000


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("aé☃𝕏 \n"), max_size=300), st.integers(32, 80))
def test_cutting_loses_nothing(text, size):
    pieces = local.cut(text.encode(), size)
    assert b"".join(pieces) == text.encode()
    assert all(len(piece) <= size and piece.decode() is not None for piece in pieces)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "holds 0 bytes of UTF-8 text: give "),
        (b" \n ", "holds 0 bytes of UTF-8 text: give "),
        (b"short", "holds 5 bytes of UTF-8 text: give "),
        (b"text\0" * 99, "is binary: it holds NUL bytes or is not UTF-8; give UTF-8 text"),
        ("é".encode("latin-1") * 99, "is binary: it holds NUL bytes or is not UTF-8; give UTF-8 text"),
    ],
)
def test_a_file_that_is_no_text_is_named_in_one_line(content, line, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path} {line}") as caught:
        open_documents(path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_text_is_named_in_one_line(tmp_path):
    (tmp_path / "binary").write_bytes(bytes(100))
    with pytest.raises(UserError, match=rf"^{tmp_path} holds 0 bytes of UTF-8 text \(left out: 1 binary \(binary\)\): give"):
        open_documents(tmp_path)


def test_a_pipe_is_no_source(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is neither a file nor a folder: give"):
        open_documents(tmp_path / "pipe")


def test_a_file_that_cannot_be_read_is_named_in_one_line(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=f"^{folder}/part0/00.txt: Permission denied; give a source that can be read$"):
        open_documents(folder)


@pytest.mark.parametrize("source", ["./no/such", "/no/such", "~/no_such_folder", "no/such", "no_such.txt"])
def test_a_missing_path_is_named_in_one_line(source):
    with pytest.raises(UserError, match=f'^path {source} does not exist: .*give "stdlib", the path of .* or a TFDS .*$'):
        open_documents(source)


@pytest.mark.parametrize("source", ["no_such_dataset", "no_such:text", "stdlb", ""])
def test_an_unknown_dataset_is_named_in_one_line(source):
    with pytest.raises(UserError, match=f"^dataset ({source}|'') is unknown: .*give \"stdlib\", the path of .*$"):
        open_documents(source)


def test_an_unknown_split_is_named_in_one_line():
    with pytest.raises(UserError, match="^split 'test' is unknown"):
        open_documents("stdlib", "test")


def test_local_text_needs_no_tfds_and_prints_nothing(folder):
    code = f"""
        import sys
        from nested_jax.data import ByteTokenizer, heldout_batches, open_documents, train_batches
        options = dict(window=64, batch_size=2, alignment=16)
        next(train_batches(open_documents({str(folder)!r}), ByteTokenizer(), seed=0, **options))
        next(iter(heldout_batches(open_documents({str(folder)!r}, "heldout"), ByteTokenizer(), **options)))
        assert not {{"tensorflow", "tensorflow_datasets"}} & set(sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class Headlines(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("plain", "tested", "single", "wordless")]

    def _info(self):
        texts = {"headline": tfds.features.Text(), "body": tfds.features.Text()}
        features = {"number": np.int64} if self.builder_config.name == "wordless" else texts
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        count = 1 if self.builder_config.name == "single" else 100
        splits = {"train": self._generate_examples(0, count)}
        return splits | ({"test": self._generate_examples(100, 30)} if self.builder_config.name == "tested" else {})

    def _generate_examples(self, first, count):
        for i in range(first, first + count):
            yield i, {"headline": f"headline {i}", "body": f"body {i}\n" * (10**4 if count == 1 else 1)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder in which TFDS prepares datasets."""
    return tmp_path_factory.mktemp("cache")


def test_a_prepared_dataset_is_opened_by_its_folder(folder, cache):
    texts = read("headlines/tested", "heldout", data_dir=cache)
    path = cache / "headlines/tested/1.0.0"
    rows = tfds.builder_from_directory(path).as_data_source("test")
    assert read(path, "heldout") == texts == [row["body"] for row in rows]
    assert read(f"{path}:headline", "heldout") == [row["headline"] for row in rows]
    with pytest.raises(UserError, match=f"^TFDS dataset {path}:nose has no such feature: it has body, headline; give"):
        open_documents(f"{path}:nose")
    with pytest.raises(UserError, match=f"^{folder} holds 0 bytes of UTF-8 text .left out: 30 no JSON Lines"):
        open_documents(f"{folder}:text")


def test_the_classes_that_a_prepared_dataset_names_are_not_imported(cache, tmp_path, monkeypatch):
    read("headlines/tested", "train", data_dir=cache)
    foreign = shutil.copytree(cache / "headlines/tested/1.0.0", tmp_path / "1.0.0")
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    features = (foreign / "features.json").read_text()
    for name in ("trap.Text", "os.path"):
        (foreign / "features.json").write_text(features.replace("tensorflow_datasets.core.features.text_feature.Text", name))
        with pytest.raises(UserError, match=f"features.json names {name}, which is not of TFDS"):
            open_documents(foreign)
    assert not (tmp_path / "sprung").exists()


def test_an_unknown_dataset_is_told_with_the_nearest(cache):
    with pytest.raises(UserError, match="^dataset lm1bb is unknown: did you mean lm1b\\? give"):
        open_documents("lm1bb")


def test_a_download_whose_host_does_not_answer_is_refused_at_once(cache, monkeypatch):
    """TFDS tries ten times, for minutes."""
    monkeypatch.setattr(datasets.urllib.request, "getproxies", dict)
    urls = {"http://no-such-host.invalid/text.tar.gz": None}
    monkeypatch.setattr(Headlines, "url_infos", urls)
    begun = time.monotonic()
    with pytest.raises(UserError, match="^TFDS dataset headlines/plain cannot be downloaded: no-such-host.invalid does not"):
        open_documents("headlines/plain", data_dir=cache / "elsewhere")
    assert time.monotonic() - begun < 30 and not (cache / "elsewhere").exists()


def test_tfds_needs_no_tensorflow(cache):
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_text
        assert len(test_text.read("headlines/tested", "train", data_dir={str(cache)!r})) == 100
        assert "tensorflow" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_tfds_name_is_opened_with_its_own_splits(cache):
    assert set(read("headlines/tested", "train", data_dir=cache)) == {b"body %d\n" % i for i in range(100)}
    assert set(read("headlines/tested", "heldout", data_dir=cache)) == {b"body %d\n" % i for i in range(100, 130)}


def test_a_tfds_name_without_a_held_out_split_loses_its_last_twentieth(cache):
    train = read("headlines/plain:headline", "train", data_dir=cache)
    heldout = read("headlines/plain:1.0.0:headline", "heldout", data_dir=cache)
    assert (len(train), len(heldout)) == (95, 5)
    assert set(train + heldout) == {b"headline %d" % i for i in range(100)}


def test_a_tfds_split_of_a_few_documents_is_cut(cache):
    train = read("headlines/single", "train", data_dir=cache)
    heldout = read("headlines/single", "heldout", data_dir=cache)
    assert len(train) == 4 and b"".join(train + heldout) == b"body 0\n" * 10**4


def test_a_tfds_dataset_that_does_not_fit_is_named_in_one_line(cache):
    no_feature = "^TFDS dataset headlines{} has no such feature: it has {}; give name:feature$"
    with pytest.raises(UserError, match=no_feature.format("/wordless", "no text at all")):
        open_documents("headlines/wordless", data_dir=cache)
    with pytest.raises(UserError, match=no_feature.format(":nose", "body, headline")):
        open_documents("headlines:nose", data_dir=cache)
    with pytest.raises(
        UserError, match="^TFDS dataset headlines has no config nose: it has .*single.*; give headlines/CONFIG"
    ):
        open_documents("headlines/nose", data_dir=cache)
    with pytest.raises(UserError, match="^TFDS dataset headlines has no config singel: it has single"):
        open_documents("headlines/singel", data_dir=cache)
    assert not list(cache.glob("headlines/wordless")), "refused before anything is downloaded"


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that opens and cannot be read")
def test_what_cannot_be_read_is_named():
    with pytest.raises(UserError, match="^/proc/self/mem: Input/output error; give a source that can be read"):
        open_documents("/proc/self/mem")


def test_the_standard_library():
    train, heldout = open_documents("stdlib"), open_documents("stdlib", "heldout")
    assert 0.01 < len(heldout) / (len(train) + len(heldout)) < 0.1
    assert sum(map(len, train)) > 5e6 and sum(map(len, heldout)) > 1e5
    assert not set(map(bytes, train)) & set(map(bytes, heldout))
    everything = [bytes(text) for documents in (train, heldout) for text in documents]
    assert all(b"\0" not in text and text.decode() for text in everything)
    assert any(text.startswith(b'The "assert" statement') for text in everything), "prose"
    assert any(b"class ThreadPoolExecutor" in text for text in everything), "modules"
    assert not any(b"class TestCase(unittest.TestCase)" in text for text in everything), "no tests"
