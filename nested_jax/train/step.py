"""One update of the slowest level, one evaluation, and the name of whatever is no longer a number."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from nested_jax.models.config import ModelConfig
from nested_jax.train.state import TrainState, bind
from nested_jax.train.stopping import NonFinite
from nested_jax.typing import Array, PyTree

if TYPE_CHECKING:
    from nested_jax.data import Batch


_CAUSES = {  # what may be broken, the first cause first
    "parameters": "parameter {}",
    "fast": "fast state {}",
    "loss": "the loss",
    "gradients": "gradient of {}",
    "updated": "parameter {} after the update",
}


class Metrics(NamedTuple):
    """What an update tells about itself."""

    loss: Array  # () float32, nats per target
    bits: Array  # () float32, bits per target
    gradient_norm: Array  # () float32, before clipping
    healthy: Array  # () bool, everything below is finite
    finite: PyTree  # bool for each leaf, in a dict of _CAUSES


def cross_entropy(net: nnx.GraphDef, parameters: PyTree, fast: PyTree | None, batch: Batch) -> tuple[Array, PyTree]:
    """Summed next-token cross-entropy of a batch, in nats, () float32, and the fast state after it.

    `fast` None starts from the parameters, which so get the gradients of what memories start from.
    """
    rows, window = batch.tokens.shape
    model = bind(net, parameters)
    if fast is None:
        fast = model.init_state(rows, max_length=window)
    logits, fast = model(batch.tokens, fast, reset=batch.reset, multiple=window)  # windows of one length follow one another
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch.targets)
    return (losses * batch.weights).sum(), fast


def train_step(
    net: nnx.GraphDef, rule: optax.GradientTransformation, *, accumulate: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One update as a pure function (state, batch) -> (state, metrics); jit it with the state donated.

    The loss is the mean over the batch's targets. With `accumulate` the batch is computed in that many pieces by
    `lax.scan`, to the same gradient (unless the CMS has one set of fast weights a batch: then one a piece).
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        targets = jnp.maximum(batch.weights.sum(), 1)
        pieces = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)

        def loss(parameters, fast, piece):
            total, fast = cross_entropy(net, parameters, fast, piece)
            return total / targets, jax.lax.stop_gradient(fast)

        def add(sums, inputs):
            piece, fast = inputs
            (value, fast), gradients = jax.value_and_grad(loss, has_aux=True)(state.parameters, fast, piece)
            sums = jax.tree.map(jnp.add, sums, (value, gradients))
            return sums, (fast if state.fast is not None else None, _finite(fast))

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.parameters))
        (value, gradients), (fast, fast_finite) = jax.lax.scan(add, zeros, (pieces, state.fast))
        updates, memory = rule.update(gradients, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        finite = {
            "parameters": _finite(state.parameters),
            "fast": _finite(fast_finite, jnp.all),
            "loss": jnp.isfinite(value),
            "gradients": _finite(gradients),
            "updated": _finite(parameters),
        }
        metrics = Metrics(
            loss=value,
            bits=value / math.log(2),
            gradient_norm=optax.global_norm(gradients),
            healthy=jnp.stack(jax.tree.leaves(finite)).all(),
            finite=finite,
        )
        return TrainState(state.step + 1, parameters, memory, fast), metrics

    return step


def eval_step(net: nnx.GraphDef) -> Callable[[PyTree, PyTree | None, Batch], tuple[Array, PyTree]]:
    """`cross_entropy` of a network, to be jitted."""
    return lambda parameters, fast, batch: cross_entropy(net, parameters, fast, batch)


def assert_healthy(step: int, metrics: Metrics, model: ModelConfig) -> None:
    """Raises NonFinite naming the step, the level and the leaf: the first cause, of all that a broken number breaks."""
    if metrics.healthy:
        return
    wrong = [path for path, finite in jax.tree_util.tree_leaves_with_path(metrics.finite) if not finite]
    wrong.sort(key=lambda path: list(_CAUSES).index(path[0].key))
    kind = wrong[0][0].key
    leaf = jax.tree_util.keystr(wrong[0][1:], simple=True, separator="/")
    level = _level(leaf, model) if kind == "fast" else "pre-training"
    raise NonFinite(f"step {step}, level {level}: {_CAUSES[kind].format(leaf)} is not finite")


def _level(leaf: str, model: ModelConfig) -> str:
    """What users call the level that a leaf of the fast state belongs to."""
    if found := re.match("learning/levels/((fast/)*)slow/", leaf):  # a nest: slow, fast/slow, fast/fast/slow, ...
        index = found[1].count("/")
        return f"CMS level{model.cms.frozen + index + 1}, period {model.cms.periods[index]}"
    if leaf.startswith("learning/open/"):
        return f"open segment of the CMS, period {model.cms.periods[-1]}"
    if model.mixer in ("attention", "sliding-window"):
        return "caches of the sequence layers"
    return f"memories of the sequence layers, chunk {model.reading if '/memory/slow/' in leaf else model.chunk}"


def _finite(tree: PyTree, check: Callable = lambda x: jnp.isfinite(x).all()) -> PyTree:
    return jax.tree.map(check, tree)
