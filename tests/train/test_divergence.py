"""Divergence is seen while its numbers are finite, and a lower rate goes on from before it."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
from tiny_run import rows

from nested_jax.train.divergence import Running
from nested_jax.train.stopping import Diverged, NonFinite


def rises(losses, vocabulary=256):
    values = Running()
    for loss in losses:
        values = values.after(float(loss), 1.0)
        yield values.rise(vocabulary)


def test_noise_is_no_rise_and_a_rise_is_one():
    falling = 2 + 3.5 * np.exp(-np.arange(400) / 50)
    assert max(rises(falling + np.random.default_rng(0).normal(0, 0.4, 400))) < 0.6
    assert max(rises([*falling, *(falling[-1] + 2.0,) * 20])) > 1.5
    assert next(i for i, rise in enumerate(rises([*falling, 1e4])) if rise > 1.5) == 400


def test_a_loss_above_the_uniform_guess_is_a_rise():
    assert max(rises([math.log(256) + 2] * 9)) == 0  # where it starts from
    assert max(rises([math.log(256) + 2] * 12)) == pytest.approx(2)


def test_the_parameters_before_the_least_loss_are_good():
    values = Running()
    for loss in (5.0, 3.0, 2.0, 4.0, 9.0):
        values = values.after(loss, 1.0)
    assert (values.best, values.least, values.steps) == (3, pytest.approx(10 / 3), 5)
    assert Running(**values._asdict()) == values


def test_a_run_that_diverges_stops_and_goes_on_from_before_at_a_lower_rate(small, quiet):
    fields = {"steps": 60, "eval_every": 0, "checkpoint_every": 1, "warmup": 2000, "max_loss_rise": 0.5}
    config = small(learning_rate=100.0, **fields)
    with pytest.raises(Diverged, match=r"nats above its least .*; the checkpoint of step \d+, before that") as stop:
        quiet(config)
    assert not isinstance(stop.value, NonFinite) and "--learning-rate 25" in str(stop.value)
    good = int(re.search("checkpoint of step ([0-9]+)", str(stop.value))[1])
    steps = {int(path.name) for path in Path(config.run_dir, "checkpoints").iterdir()}
    assert good in steps and len(steps) == 3 and good < min(steps - {good})
    before = [row for row in rows(config) if row["step"] <= good]
    assert all(math.isfinite(row["loss"]) for row in before)
    state, said = quiet(dataclasses.replace(config, learning_rate=0.1, checkpoint_every=30))
    assert f"goes back to step {good}" in said and state.step == 60
    assert rows(config)[:good] == before
    assert [row["step"] for row in rows(config) if "loss" in row] == [*range(1, 61)]
