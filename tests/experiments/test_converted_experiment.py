"""Small runs of converted: what is read, by which rate, and what is chosen on which documents."""

import dataclasses

import llama_folder
import numpy as np
import pytest

from nested_jax import UserError
from nested_jax.models import reference

FOLDER = "converted"


@pytest.fixture
def source(tmp_path):
    return llama_folder.write(tmp_path / "model")


def test_documents_are_read_frozen_and_learning(load, source, tmp_path, monkeypatch):
    """Frozen bits are those of the independent forward pass; a rate lowers those of a text that repeats itself."""
    (tmp_path / "text.txt").write_text("\n\n".join(f"to be, or not to be: {i} " * 200 for i in range(60)))
    settings, script = load("config"), load("run")
    forms = {"frozen": {"way": "frozen"}, "deltas": {"way": "deltas", "periods": (64, 32), "blocks": 1}}
    for module in (settings, script.settings):
        monkeypatch.setattr(module, "FORMS", forms)
    fields = {"source": str(source), "text": str(tmp_path / "text.txt"), "tokens": 512, "documents": 2, "tuning": 1}
    config = settings.Config(**fields, forms=tuple(forms), rates=(0.1, 1.0))
    cell = lambda form, rate, split="heldout": {"form": form, "rate": rate, "split": split}
    model, tokenizer = script.opened(str(source))
    (ids, _), (other,) = (script.texts(config, tokenizer, split) for split in ("heldout", "train"))
    assert len(ids) == 513 and not np.array_equal(ids, other)
    (frozen,) = script.run(config, [cell("frozen", 0.0)])
    logits = reference.llama(model, ids[:-1])
    shifted = logits - logits.max(-1, keepdims=True)
    nats = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(512), ids[1:]]
    np.testing.assert_allclose(frozen["bits"][0], nats.reshape(8, 64).sum(1) / np.log(2), rtol=1e-4)
    assert np.sum(frozen["bytes"][0]) == len(tokenizer.decode(ids[1:]).encode())
    zero, *learned = script.run(config, [cell("deltas", rate) for rate in (0.0, 0.1, 1.0)])
    np.testing.assert_allclose(zero["bits"], frozen["bits"], rtol=1e-4)
    assert min(script.second_half(row).mean() for row in learned) < script.second_half(frozen).mean() - 0.05
    faithful = script.faithful(config)
    assert all(faithful[form]["difference"] < 1e-3 * faithful["largest logit"] for form in forms)
    assert faithful["frozen"]["completions"] == faithful["deltas"]["completions"]


def test_forms_are_chosen_on_tuning_documents(load):
    """By the second half alone; the table compares held-out documents one by one."""
    script, settings = load("run"), load("config")
    config = dataclasses.asdict(settings.Config(forms=("frozen", "deltas, 2 blocks"), documents=3))

    def row(form, rate, split, last):
        halves = {"bits": [[1.0] * 4 + [one] * 4 for one in last], "bytes": [[1] * 8] * len(last)}
        return {"form": form, "rate": rate, "split": split} | halves

    rows = [row("frozen", 0.0, "train", [4.0]), row("deltas, 2 blocks", 0.03, "train", [3.0])]
    rows += [row("deltas, 2 blocks", 0.3, "train", [3.5]), row("deltas, 2 blocks", 3.0, "train", [np.nan])]
    rows += [row("frozen", 0.0, "heldout", [4.0, 4.0, 4.0]), row("deltas, 2 blocks", 0.03, "heldout", [3.0, 2.0, 4.5])]
    results = {"config": config, "runs": rows}
    assert script.chosen(results) == script.best(results) == {"frozen": 0.0, "deltas, 2 blocks": 0.03}
    with pytest.raises(UserError, match="there is no form that learns with finite readings"):
        script.best(results | {"runs": [rows[0], rows[3]]})
    more = [*rows, row("deltas, 6 blocks", 0.3, "train", [2.0])]
    config["forms"] = (*config["forms"], "deltas, 6 blocks")
    assert script.best(results | {"runs": more}) == {"frozen": 0.0, "deltas, 6 blocks": 0.3}
    line = next(line for line in script.table(results).splitlines() if line.startswith("| deltas"))
    assert "| 0.03 | 3.000 |" in line and "| 3.167 | -0.833 (-3.959 to +2.292) | 2 of 3 |" in line


def test_what_is_wrong_is_told(load, source, tmp_path):
    settings, script = load("config"), load("run")
    for fields, message in (
        (dict(forms=("frozen",)), "--forms 'frozen': give frozen and one or more that learn"),
        (dict(forms=("frozen", "more")), "--forms 'more': give one of frozen"),
        (dict(tokens=600), "--tokens 600: give a multiple of 512"),
        (dict(documents=1), "--documents 1: give two or more"),
    ):
        with pytest.raises(UserError, match=message):
            settings.Config(**fields)
    with pytest.raises(UserError, match="--source: give a GGUF file"):
        script.opened("")
    (tmp_path / "text.txt").write_text("to be\n\n" * 400)
    config = settings.Config(source=str(source), text=str(tmp_path / "text.txt"))
    with pytest.raises(UserError, match="has 0 documents of 2,048 tokens to train, not 3: give fewer"):
        script.texts(config, script.opened(str(source))[1], "train")
