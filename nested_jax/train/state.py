"""The slowest level's state: parameters, the optimizer's memory of their gradients, and the fast state carried along."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from nested_jax.models.config import ModelConfig
from nested_jax.models.language_model import LanguageModel
from nested_jax.train.config import TrainConfig
from nested_jax.train.optimizer import optimizer
from nested_jax.typing import Array, PyTree


class TrainState(NamedTuple):
    """What one update turns into the next, and what a checkpoint holds."""

    step: Array  # () int32, updates made
    parameters: PyTree  # nested dicts
    optimizer: PyTree  # optax's state
    fast: PyTree | None  # with `carry`: the model's fast state, a leading axis for the pieces of a batch


def network(config: ModelConfig) -> nnx.GraphDef:
    """The model without its parameters; `bind` puts them in. Raises UserError for a config that makes no model."""
    return nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))), nnx.Param)[0]


def bind(net: nnx.GraphDef, parameters: PyTree) -> LanguageModel:
    """The model with these parameters: a view for use inside one pure function."""
    return nnx.merge(net, nnx.State(parameters))


def draw_parameters(config: ModelConfig, seed: int) -> PyTree:
    """Fresh parameters as nested dicts."""
    return nnx.to_pure_dict(nnx.split(LanguageModel(config, rngs=nnx.Rngs(seed)), nnx.Param)[1])


def start(config: TrainConfig) -> TrainState:
    """The state before the first update. `jax.eval_shape` of it gives shapes only; jit it for speed."""
    parameters = draw_parameters(config.model, config.seed)
    fast = None
    if config.carry:
        model = bind(network(config.model), parameters)
        piece = model.init_state(config.batch // config.accumulate, max_length=config.window)
        fast = jax.tree.map(lambda x: jnp.broadcast_to(x, (config.accumulate, *x.shape)), piece)
    return TrainState(jnp.zeros((), jnp.int32), parameters, optimizer(config).init(parameters), fast)
