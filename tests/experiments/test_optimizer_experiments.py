"""The experiments on optimizers, small: what they measure is what they say, and a command that was stopped goes on."""

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.errors import UserError

FOLDER = Path(__file__).parents[2] / "experiments" / "optimizers"


@pytest.fixture
def load(monkeypatch):
    """Imports the experiment's modules, which import one another by their plain names, for one test."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_the_surface_is_descended(load):
    """Delta momentum that erases nothing is momentum; arrival is where the last value outside the tolerance ends."""
    surface, settings = load("surface"), load("config")
    config = settings.Surface(
        frequencies=(1.0,),
        starts=3,
        tuning_starts=2,
        steps=150,
        rates=(1e-3, 0.02),
        decays=(0.8,),
        erases=(0.0,),
        raw_erases=(),
    )
    rows = {row["optimizer"]: row for row in surface.measure(config)["rows"]}
    assert rows["momentum"]["rate"] == 0.02 and rows["momentum"]["arrived"] == 1
    for name in ("delta, erase 0", "delta by entries, erase 0"):
        assert rows[name]["steps"] == rows["momentum"]["steps"]
    start = jnp.array([2.0, -1.0])
    values = surface.descend(config, "momentum", 1.0, 0.02, 0.8, start)[1]
    (steps,) = surface.arrival(config, "momentum", 1.0, 0.02, 0.8, start[None])
    assert values[steps - 1] > config.tolerance and (values[steps:] <= config.tolerance).all()


def test_tasks_overlap_as_they_are_told_to(load):
    """Principal angles have the cosine; plain gradient descent stays in its task's subspace, and told, destroys nothing."""
    orthogonal, settings = load("orthogonal"), load("config")
    config = settings.Orthogonal(tasks=3, dimension=2, outputs=2, steps=80, noise=0.0, condition=2.0)
    for overlap in (0.0, 0.4):
        bases, *_, old = orthogonal.draw(config, overlap, jax.random.key(0))
        np.testing.assert_allclose(bases[1].T @ bases[1], np.eye(2), atol=1e-6)
        cosines = jnp.linalg.svd(bases[0].T @ bases[2], compute_uv=False)
        np.testing.assert_allclose(cosines, overlap, atol=1e-6)
        np.testing.assert_allclose(old[2] @ bases[1], bases[1], atol=1e-5)
        assert not old[0].any()
    ends = {}
    for name in ("gd", "gd, told the old subspaces"):
        errors, leaving = orthogonal.teach_all(config, name, False, 0.4, jnp.array([0.3]), jnp.array([0]))
        assert (jnp.diagonal(errors[0, 0]) < 1e-3).all()
        assert (name != "gd") or (leaving < 1e-9).all()
        ends[name] = errors[0, 0, -1, 0]
    assert ends["gd, told the old subspaces"] < 1e-3 < 1e-2 < ends["gd"]


def test_a_command_that_was_stopped_goes_on(load, monkeypatch, tmp_path):
    """A run that is there is not made again, unless the flags are others or it is to be fresh."""
    record, settings = load("record"), load("config")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    made = []
    run = lambda rate: made.append(rate) or {"loss": rate / 2}
    for _ in range(2):
        results = record.resume("text", settings.Text())
        assert [record.once("text", results, run, rate=rate)["loss"] for rate in (0.5, 1.0)] == [0.25, 0.5]
    assert made == [0.5, 1.0]
    assert len(json.loads((tmp_path / "text.json").read_text())["runs"]) == 2
    assert record.resume("text", settings.Text(fresh=True))["runs"] == []
    with pytest.raises(UserError, match="was made with other flags"):
        record.resume("text", settings.Text(steps=3))
