"""A config is flags, JSON and a dataclass, and each gives back the others."""

import dataclasses
import json
import re
import shlex
import typing

import numpy as np
import pytest
import tyro
from tiny_run import small_model

from nested_jax import load
from nested_jax.checks import allows
from nested_jax.errors import UserError
from nested_jax.models.config import preset
from nested_jax.train.config import TrainConfig, command, difference, flag, flatten
from nested_jax.train.folder import read_config, write_config


def other(hint, value):
    """Another value of the same type."""
    if typing.get_origin(hint) is typing.Literal:
        return next(choice for choice in typing.get_args(hint) if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        doubled = tuple(2 * item for item in value) or (8,)
        return doubled if allows(hint, doubled) else value[1:]
    if value is None:
        return next(choice for choice in (0.5, 1024, "data=2", "layer", "raw") if allows(hint, choice))
    return 2 * value or 1 if isinstance(value, int | float) else value


def changed(config):
    hints = typing.get_type_hints(type(config), include_extras=True)
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    values.pop("task", None)  # in place of the text that the other fields choose
    new = {name: changed(v) if dataclasses.is_dataclass(v) else other(hints[name], v) for name, v in values.items()}
    return dataclasses.replace(config, **new)


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig.from_preset("tiny-transformer", run_dir="runs/a b", data="it's"),
        changed(TrainConfig()),
        TrainConfig.from_preset("tiny-hope", task="parity", shortest=3, window=40),
        TrainConfig(model=small_model("tiny-transformer", projection_chunk=32)),
    ],
)
def test_flags_and_json_give_the_config_back(config):
    line = command(config)
    words = shlex.split(line)[2:]
    default = TrainConfig.from_preset(config.preset, task=config.task)
    assert tyro.cli(TrainConfig, args=words, default=default) == dataclasses.replace(config, fresh=False)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_a_preset_brings_its_sizes():
    config = TrainConfig.from_preset("140m-hope")
    assert config.run_dir == "runs/140m-hope" and config.tokenizer == "sentencepiece"
    sizes = (config.window, config.batch_size, config.steps, config.warmup, config.learning_rate, config.eval_every)
    assert sizes == (2048, 8, 20_000, 500, 6e-4, 1000)
    assert TrainConfig() == TrainConfig.from_preset("tiny-hope")
    with pytest.raises(UserError, match="tiny-hop"):
        TrainConfig.from_preset("tiny-hop")
    with pytest.raises(UserError, match="preset 'tiny-hop' is unknown"):
        TrainConfig(preset="tiny-hop")
    with pytest.raises(UserError, match="preset None is unknown"):
        preset(None)
    with pytest.raises(UserError, match="--preset tiny-titans with the model of tiny-hope: give TrainConfig.from_preset"):
        TrainConfig(preset="tiny-titans")
    with pytest.raises(UserError, match="no field 'stps'"):
        TrainConfig.from_preset("tiny-hope", stps=3)
    with pytest.raises(UserError, match="run_dir None: give the path"):
        load(None)


def test_numpys_numbers_are_written_and_read(tmp_path):
    config = TrainConfig(steps=np.int64(5))
    write_config(tmp_path, config, "")
    assert read_config(tmp_path) == config


def test_the_first_difference_is_named():
    config = TrainConfig()
    assert difference(config, config) is None
    assert difference(config, dataclasses.replace(config, steps=config.steps + 1)) is None
    assert difference(config, dataclasses.replace(config, steps=10)) == ("--steps", str(config.steps), "10")
    model = dataclasses.replace(config.model, cms=dataclasses.replace(config.model.cms, periods=()))
    name, saved, given = difference(config, dataclasses.replace(config, model=model, seed=3))
    assert (name, saved, given) == ("--seed", "0", "3")
    name, saved, given = difference(config, dataclasses.replace(config, model=model))
    assert name == "--model.cms.periods" and saved and given == "nothing"


@pytest.mark.parametrize(
    "fields",
    [
        {name: value}
        for name in ("steps", "window", "batch_size", "accumulate", "eval_bytes", "checkpoint_every", "log_every")
        for value in (0, -1)
    ]
    + [{"learning_rate": float("nan")}, {"clip": float("inf")}, {"weight_decay": -0.1}, {"seed": -1}, {"warmup": -1}]
    + [
        {"steps": 2.5},
        {"run_dir": 3},
        {"carry": 1},
        {"optimizer": "adam"},
        {"seed": 2**32},
        {"batch_size": 6, "accumulate": 4},
    ],
)
def test_impossible_values_are_named(fields):
    name, value = next(iter(fields.items()))
    with pytest.raises(UserError, match=re.escape(f"{flag(name)} {value!r}") + "(: give|.*: change)"):
        TrainConfig(**fields)


def test_every_field_is_documented(capsys):
    """`nested-jax train --help` has a sentence on every flag, those of the model and its CMS too."""
    with pytest.raises(SystemExit):
        tyro.cli(TrainConfig, args=["--help"], default=TrainConfig())
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=--[a-z])", capsys.readouterr().out)[1:]]
    said = {name: entry for entry in entries for name in re.findall(r"(?:^|, )(--[a-z][\w.-]*)", entry)}
    names = [flag(name) for name, _ in flatten(TrainConfig())]
    assert [name for name in names if not re.search(r"[\w)`]\. \(default:", said[name])] == []


@pytest.mark.parametrize("data", ["\u3000\u00a0wide spaces", "family \U0001f468\u200d\U0001f469.txt", "n\u0301"])
def test_a_run_of_text_by_any_name_that_is_accepted_is_read_back(data, tmp_path):
    config = TrainConfig(data=data)
    write_config(tmp_path, config, "")
    assert read_config(tmp_path) == config
