"""A small run of experiments/learners: it goes on where it was stopped, and bits are those of the tokens."""

import json

import numpy as np
import pytest
from flax import nnx

from nested_jax import LanguageModel, ModelConfig, UserError
from nested_jax.serve import Learner

FOLDER = "learners"


@pytest.fixture
def parts(load, tmp_path):
    """The module with pieces of 64 tokens, and a run of so many tokens from the rows before."""
    module = load("run")
    module.PIECE, module.READ, module.WRITTEN = 64, 16, 4
    model = LanguageModel(ModelConfig(vocabulary=256, width=8, layers=1, heads=1, mixer="gated-delta"), rngs=nnx.Rngs(0))

    def run(tokens, rows, folder):
        config = module.settings.Config(tokens=tokens, every=128, served=(1, 2), run_dir=str(tmp_path / folder))
        (tmp_path / folder).mkdir(exist_ok=True)
        results = {"runs": rows}
        module.read_on(config, tmp_path / folder / "results", results, model)
        return module, config, model, results

    return run


def test_learners_go_on_where_they_stopped(parts, tmp_path):
    """The rows of a run in two parts are those of a run in one; bits are those that a plain learner finds."""
    (_, config, _, first), (module, _, model, whole) = parts(128, [], "two"), parts(256, [], "one")
    *_, second = parts(256, json.loads(json.dumps(first["runs"])), "two")
    found = lambda results: [(row["stream"], row["tokens"], row["bits"], row["held"]) for row in results["runs"]]
    assert found(second) == found(whole) and len(found(whole)) == 8
    assert len(list((tmp_path / "two").glob("*.safetensors"))) == 4  # those of the last row alone
    for stream, tokens in module.streams(config).items():
        text = np.concatenate([tokens(start, start + 64) for start in range(0, 256, 64)])
        logits = Learner(model).read(text)
        nats = [np.log(np.exp(row).sum()) - row[token] for row, token in zip(logits[127:], text[128:], strict=False)]
        row = next(row for row in whole["runs"] if (row["stream"], row["tokens"]) == (stream, 256))
        np.testing.assert_allclose(row["bits"], np.mean(nats) / np.log(2), rtol=1e-4)


def test_learners_side_by_side_are_timed_once_and_shown(parts, tmp_path):
    module, config, model, results = parts(128, [], "one")
    path = tmp_path / "one" / "results"
    module.serve(config, path, results, model)
    before = json.dumps(results)
    module.serve(config, path, results, model)
    assert json.dumps(results) == before and [row.get("learners") for row in results["runs"]][-2:] == [1, 2]
    assert all(row["tokens_read_a_second"] > 0 for row in results["runs"][-2:])
    table = module.table(results)
    assert table.count("| text | 128 |") == 1 and "| 2 | " in table
    module.plt.close(module.figure(results))


def test_what_a_picture_needs_is_told(load, tmp_path, monkeypatch):
    page = load("page")
    with pytest.raises(UserError, match="--text gone is no file: give one of text"):
        page.Config("gone")
    (tmp_path / "text").write_text("text")
    monkeypatch.setattr(page, "CHROMIUM", None)
    with pytest.raises(UserError, match="the picture needs a Chromium: apt-get install chromium"):
        page.Config(str(tmp_path / "text"))
