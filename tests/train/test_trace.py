"""A batch's way through a traced step: how many Python calls of the package it makes, and through which files, in order."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import nested_jax
from nested_jax import LanguageModel, preset
from nested_jax.cms import inner_rule
from nested_jax.data import Batch
from nested_jax.models.language_model import expected_shapes
from nested_jax.train.config import TrainConfig
from nested_jax.train.optimizer import optimizer
from nested_jax.train.state import init_train_state
from nested_jax.train.step import train_step

ROOT = str(Path(nested_jax.__file__).parent) + "/"


def calls_of(trace) -> list[str]:
    """The file of every Python call of the package that `trace` makes."""
    files = []

    def profile(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            files.append(frame.f_code.co_filename.removeprefix(ROOT))

    sys.setprofile(profile)
    try:
        trace()
    finally:
        sys.setprofile(None)
    return files


def test_a_training_step_of_tiny_hope():
    config = TrainConfig()
    step = train_step(config.model, optimizer(config))
    state = jax.eval_shape(lambda: init_train_state(config))
    row = jax.ShapeDtypeStruct((config.batch_size, config.window), jnp.int32)
    batch = Batch(row, row, row.update(dtype=jnp.float32), row.update(dtype=bool))
    # Made once for every config, before its first batch: the alignment, how many blocks learn, the inner rule, shapes.
    assert config.model.alignment == 256 and config.model.adapting == 1 and inner_rule(config.model.cms)
    assert expected_shapes(config.model)[1]
    files = calls_of(lambda: jax.make_jaxpr(step)(state, batch))
    way = list(dict.fromkeys(files))
    print(len(files), "calls:", *way)
    assert 100 < len(files) <= 893
    assert len(way) <= 15 and way[0] == "train/step.py" and "memory/recurrence.py" in way


@pytest.mark.slow
def test_the_gradient_of_the_readme():
    config = preset("tiny-hope")
    assert config.alignment == 256 and inner_rule(config.cms) and expected_shapes(config)[1]  # once for every config
    graph, weights = nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param)
    tokens = jnp.zeros((1, 1025), int)

    def loss(weights):
        model = nnx.merge(graph, weights)
        logits, state = model(tokens[:, :-1], model.init_state(batch_size=1))
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return nats.mean(), (nats[0], state)

    files = calls_of(lambda: jax.make_jaxpr(jax.grad(loss, has_aux=True))(weights))
    print(len(files), "calls:", *dict.fromkeys(files))
    assert 100 < len(files) <= 750
