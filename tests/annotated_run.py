"""Traces the whole package under jaxtyping's import hook: every annotation is checked against what is really passed."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
from jaxtyping import install_import_hook

if __name__ != "__main__":
    raise ImportError("a script for a process of its own: its import hook would stay")

with install_import_hook("nested_jax", "typecheck.typecheck"):
    import optax
    from flax import nnx

    from nested_jax import PRESETS, LanguageModel, describe, local_surprise, optim, preset
    from nested_jax.data import Batch
    from nested_jax.models.language_model import apply, init_state, init_weights
    from nested_jax.train.config import TrainConfig
    from nested_jax.train.optimizer import optimizer
    from nested_jax.train.state import init_train_state
    from nested_jax.train.step import train_step

jax.config.update("jax_numpy_rank_promotion", "raise")
TOKENS = jnp.zeros((2, 19), int)


def small(name):
    model = preset(name)
    periods = (16, 8) if model.cms.periods else ()
    cms = dataclasses.replace(model.cms, hidden=tuple(8 for _ in model.cms.hidden), periods=periods)
    return dataclasses.replace(model, width=16, layers=2, heads=2, chunk=8, memory_hidden=4, cms=cms)


def read(config, weights, reset=None):
    """Whole chunks and a rest, from a fresh state."""
    logits, state = apply(config, weights, TOKENS, init_state(config, weights, 2, max_length=64), reset=reset)
    return logits.mean(), state


def read_in_pieces(config, weights):
    """The same, then a piece off the grid, and a token at a traced position."""
    _, state = read(config, weights)
    _, state = apply(config, weights, TOKENS[:, :3], state)
    return apply(config, weights, TOKENS[:, :1], jax.tree.map(jnp.asarray, state))


def trace_model(name):
    config = small(name)
    weights = jax.eval_shape(lambda: init_weights(config, jax.random.key(0)))
    reset = jnp.zeros((2, 19), bool)
    jax.eval_shape(jax.grad(lambda weights: read(config, weights, reset), has_aux=True), weights)
    config = dataclasses.replace(config, dtype="bfloat16")
    jax.eval_shape(lambda weights: read_in_pieces(config, weights), weights)


def trace_step(name, rule):
    config = TrainConfig.from_preset(name, model=small(name), optimizer=rule, window=32, batch_size=2, carry=True)
    row = jnp.zeros((2, 32), jnp.int32)
    batch = Batch(row, row, row.astype(jnp.float32), row.astype(bool))
    state = jax.eval_shape(lambda: init_train_state(config))
    jax.eval_shape(train_step(config.model, optimizer(config)), state, batch)


def run():
    for name in PRESETS:
        if name.startswith("tiny-"):
            trace_model(name)
            print(name)
    for name, rule in (("tiny-hope", "m3"), ("tiny-transformer", "delta-gradient-descent")):
        trace_step(name, rule)
        print("train step of", name, rule)
    params = {"dense": {"kernel": jnp.ones((4, 3))}}
    loss = lambda params, x: ((x @ params["dense"]["kernel"]) ** 2).sum()
    local_surprise(loss, params, jnp.ones((2, 4)))
    shell = nnx.eval_shape(lambda: LanguageModel(small("tiny-hope"), rngs=nnx.Rngs(0)))
    describe((shell, optax.adam(0.1)))
    describe((params, optim.momentum(0.1)))
    print("picture and surprise")


if __name__ == "__main__":
    sys.exit(run())
