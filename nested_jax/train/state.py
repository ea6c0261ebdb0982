"""The slowest level's state: parameters, the optimizer's memory of their gradients, and the fast state carried along."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from nested_jax.models.config import ModelConfig
from nested_jax.models.language_model import LanguageModel
from nested_jax.optim import clip_by_norm
from nested_jax.train.config import TrainConfig
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


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up from learning_rate / warmup, then a cosine to a tenth at the last step.

    >>> rate = learning_rate(TrainConfig(steps=100, warmup=10, learning_rate=1.0))
    >>> [round(float(rate(step)), 2) for step in (0, 10, 55, 100)]
    [0.1, 1.0, 0.55, 0.1]
    """
    peak, warmup = config.learning_rate, config.warmup
    return optax.warmup_cosine_decay_schedule(
        peak / max(warmup, 1), peak, warmup, max(config.steps, warmup + 1), end_value=peak / 10
    )


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW (0.9, 0.95) that decays matrices only."""
    adamw = optax.adamw(learning_rate(config), b1=0.9, b2=0.95, weight_decay=config.weight_decay, mask=decayed)
    return optax.chain(clip_by_norm(config.clip), adamw) if config.clip else adamw


def decayed(parameters: PyTree) -> PyTree:
    """Which leaves decay: a tree of bools, by path."""

    def matrix(path, leaf):
        names = {key.key for key in path}
        stacked = "blocks" in names
        return leaf.ndim - stacked >= 2 and not names & {"start", "norm"}

    return jax.tree_util.tree_map_with_path(matrix, parameters)
