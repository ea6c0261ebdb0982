"""A reading and its page: numbers of the model's own logits and state, and what a person sees of them in a browser."""

import html
import json
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest
from test_learner import made, text

from nested_jax import UserError
from nested_jax.cms.in_context import fast_weights
from nested_jax.data import ByteTokenizer, SentencePieceTokenizer
from nested_jax.serve import Learner
from nested_jax.serve.page import page, summary
from nested_jax.serve.reading import Reading

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def surprise(logits, tokens):
    return -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(tokens)[:, None], axis=1)[:, 0]


def test_a_reading_is_of_the_logits_and_of_the_weights():
    learner, watched, ids = Learner(made("learning")), Learner(made("learning")), text(45)
    logits = learner.read(ids)
    found = watched.read(ids[:17], record=True), watched.read(ids[17:], record=True)
    assert np.isnan(found[0].nats[0]) and found[0].levels == ("sequence layers", "CMS level1", "CMS level2")
    nats = np.concatenate([one.nats for one in found])
    np.testing.assert_allclose(nats[1:], surprise(logits[:-1], ids[1:]), rtol=1e-4, atol=1e-5)
    chances = np.asarray(jax.nn.softmax(logits))
    for at in (1, 20, 44):
        one, i = (found[0], at) if at < 17 else (found[1], at - 17)
        np.testing.assert_allclose(one.chances[i], np.sort(chances[at - 1])[::-1][:3], rtol=1e-4)
        np.testing.assert_allclose(one.chances[i], chances[at - 1][one.likeliest[i]], rtol=1e-4)
    assert found[0].ends[-1] == 17 and found[1].ends[-1] == 45 and (np.diff(found[1].ends) <= 8).all()
    levels = [fast_weights(one._all._pool.get(0)[0].learning.levels) for one in (watched, Learner(made("learning")))]
    for i, (now, start) in enumerate(zip(*levels, strict=True)):
        apart = [now.matrices[name] - start.matrices[name] for name in now.matrices]
        want = np.sqrt(sum(np.square(each).sum() for each in apart))
        np.testing.assert_allclose(found[1].held[-1, i + 1], want, rtol=1e-5)
        writes = found[1].ends[found[1].written[:, i + 1] > 0]
        assert ((writes - 1) // (24, 8)[i] > 0).all() and len(writes) == (1, 3)[i]  # at 33; at 25, 33 and 41
    assert (found[1].written[:, 0] > 0).all()


def test_a_frozen_reading_writes_nothing_into_the_cms():
    found = Learner(made("learning")).read(text(45), learn=False, record=True)
    assert (found.written[:, 1:] == 0).all() and (found.held[:, 1:] == 0).all() and (found.written[:, 0] > 0).all()
    attention = Learner(made("transformer")).read(text(70), record=True)
    assert attention.levels == () and attention.written.shape == (len(attention.ends), 0)
    with pytest.raises(UserError, match="the text is empty: give a token"):
        Learner(made("transformer")).read([], record=True)


WORDS = "Tyger — burning <bright>,\n</script><b>né</b> {{title}}\n"


def read_twice(words=WORDS):
    tokenizer = ByteTokenizer()
    learner = Learner(made("learning"), tokenizer=tokenizer)
    frozen = learner.copy().read(words, learn=False, record=True)
    return tokenizer, {"learning": learner.read(words, record=True), "frozen": frozen}


@pytest.fixture(scope="module")
def both():
    return read_twice(WORDS * 3)


def test_a_page_has_every_character_and_its_surprise(both):
    tokenizer, readings = both
    made = page("A <title> of {{data}}", tokenizer, readings)
    assert "<title>A &lt;title&gt; of {{data}}</title>" in made
    assert "http" not in made.replace("http://www.w3.org/2000/svg", "")
    (packed,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', made, re.DOTALL)
    data = json.loads(packed)
    assert "".join(data["cells"]) == WORDS * 3 and len(data["cells"]) == len(WORDS * 3) + 1  # the mark of the start
    for name, one in readings.items():
        bits = np.nan_to_num(one.nats) / np.log(2)
        assert sum(data["bits"][name]) == pytest.approx(bits.sum(), abs=0.01 * len(bits))
        assert data["perByte"][name] == pytest.approx(bits.sum() / len((WORDS * 3).encode()), abs=1e-4)
    lines = summary(tokenizer, readings).splitlines()
    assert f"{len((WORDS * 3).encode())} bytes" in lines[0] and lines[-1].split()[0] == "frozen"
    assert float(lines[-1].split()[-1]) == pytest.approx(data["perByte"]["frozen"], abs=1e-3)


def test_tokens_that_are_no_characters_are_shown_with_those_that_make_one():
    tokenizer = SentencePieceTokenizer.train(["to be, or not to be: " * 20], vocabulary=280)
    ids = tokenizer.encode("to be ☃ or")
    nothing = np.zeros((len(ids), 3))
    one = Reading(ids, np.ones(len(ids)), nothing.astype(int), nothing, np.array([len(ids)]), (), *[np.zeros((1, 0))] * 2)
    (packed,) = re.findall(r'id="data">(.*?)</script>', page("", tokenizer, {"frozen": one}), re.DOTALL)
    cells = json.loads(packed)["cells"]
    assert "".join(cells) == "to be ☃ or" and "☃" in cells and "\ufffd" not in "".join(cells)


def seen(path, *, script="", view=""):
    """The page's elements after its scripts, one more at its end, have run."""
    path.write_text(path.read_text().replace("</html>", f"<script>{script}</script></html>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, f"{path.as_uri()}{view}"], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium")
def test_what_a_person_sees(both, tmp_path):
    """Every token, the switch, and with the arrow keys a token's alternatives."""
    tokenizer, readings = both
    path = tmp_path / "page.html"
    whole = page("Blake", tokenizer, readings)
    path.write_text(whole)
    keys = "for (let i = 0; i < 3; i++) find('text').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}));"
    dom = seen(path, script=keys)
    shown = re.findall(r'<span data-i="(\d+)"(?: style="([^"]*)")?[^>]*>([^<]*)</span>', dom)
    assert [int(i) for i, _, _ in shown] == [*range(len(WORDS * 3) + 1)]
    assert html.unescape("".join(text for *_, text in shown)) == WORDS * 3
    assert "rgba(var(--hot)" in shown[5][1] and 'class="at"' in dom
    (about,) = re.findall(r'<div id="about"[^>]*>(.*?)</div><', dom, re.DOTALL)
    bits = [one.nats[2] / np.log(2) for one in readings.values()]
    assert "<b>y</b> token 3" in about and all(f"{each:.2f} bits; likeliest " in about for each in bits)
    assert dom.count('<input type="radio"') == 3 and dom.count("<polyline") == 2 + 2 * 3
    path.write_text(whole)
    dom = seen(path, view="#learning%20less%20frozen")
    assert 'data-view="learning less frozen"' in dom
    path.write_text(whole)
    dom = seen(path, script="document.querySelectorAll('input')[1].click()")
    assert 'data-view="frozen"' in dom
    starts = np.cumsum([0, 1, *(len(letter.encode()) for letter in (WORDS * 3)[:-1])])  # a byte is a token
    for colours, name in ((shown, "learning"), (re.findall(r'<span data-i="(\d+)"(?: style="([^"]*)")?', dom), "frozen")):
        strength = np.minimum(1, np.add.reduceat(readings[name].nats, starts) / np.log(2) / 12)
        for (i, style, *_), expected in zip(colours[1:], strength[1:], strict=True):
            painted = re.search(r"rgba\(var\(--hot\), ([\d.]+)\)", style)
            assert float(painted[1] if painted else 0) == pytest.approx(0.85 * expected, abs=0.02), (name, i)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium")
def test_a_page_of_100_000_tokens_has_few_elements_at_a_time(tmp_path):
    n, rng = 100_000, np.random.default_rng(0)
    ids = np.frombuffer(b"the tyger burns bright in forests of the night\n" * (n // 47 + 1), np.uint8)[:n].astype(np.int32)
    nothing = np.zeros((n, 3))
    fields = rng.random(n) * 5, nothing.astype(int) + 65, nothing, np.arange(64, n + 64, 64), ("CMS level1",)
    one = Reading(ids, *fields, *[rng.random((len(fields[3]), 1))] * 2)
    (tmp_path / "page.html").write_text(page("long", ByteTokenizer(), {"learning": one, "frozen": one}))
    jump = "find('text').dispatchEvent(new KeyboardEvent('keydown', {key: 'End'}));"
    dom = seen(tmp_path / "page.html", script=jump)
    assert "token 100,000" in dom and 400 < dom.count("<span data-i=") < 20_000
