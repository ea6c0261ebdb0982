"""nested-jax convert: a folder of a pretrained model becomes a run that is read, written with, and trained on."""

import llama_folder
import numpy as np
import pytest

import nested_jax
from nested_jax import cli
from nested_jax.cli import main
from nested_jax.models.language_model import apply, init_state
from nested_jax.serve import Learner


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder as they are published."""
    monkeypatch.chdir(tmp_path)
    return llama_folder.write(tmp_path / "model")


@pytest.mark.slow
def test_from_the_command_line(source, capsys):
    assert main(["convert", "model", "--run-dir", "still"]) == 0
    assert "levels of 12 hidden units" in capsys.readouterr().out
    ways = ["--way", "deltas", "--periods", "16", "8", "--hidden", "3", "2", "--blocks", "1"]
    assert main(["convert", "model", "--run-dir", "learns", *ways]) == 0
    still, learns = map(nested_jax.load, ("still", "learns"))
    assert learns.config.model.adapting == 1 and learns.tokenizer.decode(learns.tokenizer.encode("né")) == "né"
    ids = np.random.default_rng(1).integers(280, size=(1, 40))
    logits = [
        apply(one.config.model, one.params, ids, init_state(one.config.model, one.params, 1))[0] for one in (still, learns)
    ]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)  # with rates of 0
    (source.parent / "text.txt").write_text("to be, or not to be: that is the question.\n\n" * 60)
    assert main(["generate", "--run-dir", "learns", "--prompt", "to be", "--tokens", "3", "--learner", "l"]) == 0
    assert main(["read", "text.txt", "--run-dir", "learns", "--against", "still", "--html", "page.html"]) == 0
    said = capsys.readouterr().out
    assert (
        "learning" in said
        and "frozen" in said
        and "still" in said
        and "</html>" in (source.parent / "page.html").read_text()
    )
    sizes = "--batch-size 2 --window 64 --steps 2 --eval-bytes 300 --sample-tokens 2 --reading-documents 0 --warmup 1"
    assert main(["train", "--init-from", "learns", "--data", "text.txt", "--run-dir", "on", *sizes.split()]) == 0
    assert nested_jax.load("on").tokenizer.special == learns.tokenizer.special


def test_a_chat_is_read_in_the_models_form_and_goes_on(source, capsys):
    """The answer alone is printed; it is that of the learner to the template's tokens, and the next message follows it."""
    assert main(["convert", "model", "--run-dir", "still"]) == 0
    words = ["--run-dir", "still", "--tokens", "3", "--temperature", "0", "--chat", "--prompt"]
    capsys.readouterr()
    assert main(["generate", *words, "be"]) == 0
    said = capsys.readouterr().out
    run = nested_jax.load("still")
    learner, form = Learner(run), run.tokenizer.encode("[user]be[answer]")
    expected = "".join(learner.generate(form, tokens=3, temperature=0.0))
    assert said == expected + "\n"
    for message in ("be", "not"):
        assert main(["generate", *words, message, "--learner", "l"]) == 0
    assert capsys.readouterr().out.startswith(expected + "\n")
    learner.read(run.tokenizer.encode("[user]not[answer]"))
    kept = Learner.restore("l", run)
    assert kept.tokens_read == learner.tokens_read + 3
    assert main(["generate", "--run-dir", "still", "--chat"]) == 2
    assert capsys.readouterr().err == "nested-jax: --chat: there is no message: give --prompt TEXT too\n"
    with pytest.raises(nested_jax.UserError, match="--chat: the model in runs/x has no chat template: leave it out"):
        cli._message(nested_jax.data.ByteTokenizer(), "hi", "runs/x")


def test_a_conversion_that_fails_leaves_nothing(source, monkeypatch):
    from nested_jax.train.checkpoint import Checkpoints

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", fail)
        assert main(["convert", "model", "--run-dir", "new"]) != 0
    assert sorted(path.name for path in source.parent.iterdir()) == ["model"]
    (source.parent / "new").mkdir()
    (source.parent / "new.part").mkdir()  # of a conversion that was killed
    assert main(["convert", "model", "--run-dir", "new"]) == 0
    assert sorted(path.name for path in source.parent.iterdir()) == ["model", "new"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "there is no model to convert: give nested-jax convert FILE"),
        (["gone"], "gone is no model: give a .gguf file"),
        (["model", "--run-dir", "model"], "--run-dir model is not empty: give another one"),
        (["model", "--way", "split"], "levels that learn need periods"),
        (["model", "--way", "merged"], "--way"),
        (["model", "--rates", "-1"], "--rates (-1.0,)"),
        (["model", "--way", "deltas", "--periods", "9", "4"], "9 is not a multiple of 4"),
    ],
)
def test_a_mistake_is_one_line(source, capsys, words, told):
    assert main(["convert", *words]) == 2
    line = capsys.readouterr().err.strip()
    assert told in line and "\n" not in line
    assert not (source.parent / "runs").exists()


def test_texts_that_cannot_be_read_are_told(source, capsys):
    (source.parent / "empty.txt").touch()
    assert main(["convert", "model", "--run-dir", "still"]) == 0
    for words, told in (
        ([], "there is no text to read: give nested-jax read FILE"),
        (["empty.txt", "--run-dir", "still"], "empty.txt is empty: give a text"),
        (["gone.txt", "--run-dir", "still"], "gone.txt"),
        (["model", "--run-dir", "still"], "model is a folder, not a file"),
        (["empty.txt", "--html", "no/page.html"], "--html no/page.html: there is no folder no; make it"),
        (["empty.txt", "--learner", "no/l"], "--learner no/l: there is no folder no; make it"),
    ):
        assert main(["read", *words]) == 2
        line = capsys.readouterr().err.strip()
        assert told in line and "\n" not in line
