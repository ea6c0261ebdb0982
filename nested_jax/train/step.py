"""One update of the slowest level, one evaluation, and the name of whatever is no longer a number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_jax.memory.attention import AttentionState
from nested_jax.models.config import ModelConfig
from nested_jax.models.language_model import init_state, target_nats
from nested_jax.models.owners import state_owners
from nested_jax.numerics import BATCH, lay
from nested_jax.paths import path_name
from nested_jax.surprise import Pair, layers, surprise_and_grad
from nested_jax.train.optimizer import WithInputs
from nested_jax.train.state import TrainState
from nested_jax.train.stopping import NonFinite
from nested_jax.typing import Array, Float, PyTree

if TYPE_CHECKING:
    from nested_jax.data import Batch


_CAUSES = {  # what may be broken, the first cause first
    "targets": "a target is no token of the model (a slot without one has weight 0)",
    "parameters": "parameter {} is not finite",
    "fast": "fast state {} is not finite",
    "loss": "the loss is not finite",
    "gradients": "gradient of {} is not finite",
    "optimizer": "optimizer state {} is not finite after the update",
    "updated": "parameter {} is not finite after the update",
}


class Metrics(NamedTuple):
    """What an update reports."""

    loss: Array  # () float32, nats per target
    bits: Array  # () float32, bits per target
    gradient_norm: Array  # () float32, before clipping
    update_norm: Array  # () float32, of what is added to the parameters
    healthy: Array  # () bool, all of the below
    finite: PyTree  # bool for each leaf, in a dict of _CAUSES


def cross_entropy(model: ModelConfig, params: PyTree, fast: PyTree | None, batch: Batch) -> tuple[Float[Array, ""], PyTree]:
    """Summed next-token cross-entropy of a batch, in nats, float32, and the fast state after it.

    `fast` None starts from the parameters, which so get the gradients of what memories start from. A slot of weight 0 has no
    target, whatever number stands there; where it has one, a target that is no token, -1 too, makes the sum NaN.
    """
    rows, window = batch.tokens.shape
    if fast is None:
        fast = init_state(model, params, rows, max_length=window)
    # windows of one length follow one another
    known = (batch.targets >= 0) & (batch.targets < model.vocabulary)
    targets = jnp.where(known, batch.targets, 0)
    losses, fast = target_nats(model, params, batch.tokens, targets, fast, reset=batch.reset, multiple=window)
    losses = jnp.where(known | (batch.weights == 0), losses, jnp.nan)
    return (losses * batch.weights).sum(), fast


def train_step(
    model: ModelConfig, rule: optax.GradientTransformation | WithInputs, *, accumulate: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One update as a pure function (state, batch) -> (state, metrics); jit it with the state donated.

    The loss is the mean over the batch's targets. With `accumulate` the batch is computed in that many pieces by
    `lax.scan`, to the same gradient (unless the CMS has one set of fast weights a batch: then one a piece).
    A rule `WithInputs` gets those of its linear layers, of all pieces, from the same backward pass.
    """
    matrices = rule.matrices if isinstance(rule, WithInputs) else None

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        targets = jnp.maximum(batch.weights.sum(), 1)
        pieces = jax.tree.map(lambda x: lay(x.reshape(accumulate, -1, *x.shape[1:]), None, BATCH), batch)

        def loss(params, fast, piece):
            total, fast = cross_entropy(model, params, fast, piece)
            return total / targets, fast

        def differentiate(params, fast, piece):
            if matrices is None:
                return *jax.value_and_grad(loss, has_aux=True)(params, fast, piece), {}
            of_both = lambda params, given: loss(params, *given)
            value, gradients, pairs = surprise_and_grad(of_both, params, (fast, piece), has_aux=True)
            share = piece.weights * batch.weights.size / targets
            return value, gradients, layer_inputs(pairs, params, matrices, share)

        def add(sums, inputs):
            piece, fast = inputs
            (value, fast), gradients, inputs = differentiate(state.params, fast, piece)
            sums = jax.tree.map(jnp.add, sums, (value, gradients))
            if state.fast is not None:
                return sums, (fast, _finite(fast), inputs)
            return sums, (None, _finite(_unread(fast) if model.attends else fast), inputs)

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        (value, gradients), (fast, fast_finite, inputs) = jax.lax.scan(add, zeros, (pieces, state.fast))
        given = {} if matrices is None else {"inputs": jax.tree.map(lambda x: jnp.moveaxis(x, 0, -4), inputs)}
        updates, memory = rule.update(gradients, state.optimizer, state.params, **given)
        params = optax.apply_updates(state.params, updates)
        finite = {
            "parameters": _finite(state.params),
            "fast": jax.tree.map(jnp.all, fast_finite),
            "targets": ((batch.targets >= 0) & (batch.targets < model.vocabulary) | (batch.weights == 0)).all(),
            "loss": jnp.isfinite(value),
            "gradients": _finite(gradients),
            "optimizer": _finite(memory),
            "updated": _finite(params),
        }
        metrics = Metrics(
            loss=value,
            bits=value / math.log(2),
            gradient_norm=optax.global_norm(gradients),
            update_norm=optax.global_norm(updates),
            healthy=jnp.stack(jax.tree.leaves(finite)).all(),
            finite=finite,
        )
        return TrainState(state.step + 1, params, memory, fast), metrics

    return step


def layer_inputs(
    pairs: dict[str, Pair], params: PyTree, matrices: Callable[[PyTree], PyTree], share: Float[Array, "B T"]
) -> dict[str, Array]:
    """Inputs (..., B, T, in) of the linear layers among some matrices, times the root of each slot's share in the mean.

    So sum x x^T over the slots is that of the targets, over their number times the slots'. Layers of a stack that are not
    linear, as those of a CMS that learns in context, have inputs of zeros, and so no error to descend but their gradient.
    """
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    chosen = jax.tree_util.tree_leaves_with_path(matrices(params), is_leaf=lambda x: isinstance(x, tuple))
    chosen, inputs = {path_name(path) for path, _ in chosen}, {}
    for key, pair in pairs.items():
        (path, run), x = layers(key), pair.inputs
        *stacked, width, _ = shapes[path]
        if path in chosen and x.shape[-3:-1] == share.shape and x.ndim == len(stacked) + 3:
            x = x * jnp.sqrt(share).reshape(*(1 for _ in stacked), *share.shape, 1)
            empty = jnp.zeros((*stacked, *share.shape, width), x.dtype)
            inputs[path] = x if key == path else inputs.get(path, empty).at[run].set(x)
    return inputs


def assert_healthy(step: int, metrics: Metrics, model: ModelConfig) -> None:
    """Raises NonFinite naming the step, the level and the leaf: the first cause, of all that a broken number breaks."""
    if metrics.healthy:
        return
    kind = next(kind for kind in _CAUSES if not all(jax.tree.leaves(metrics.finite.get(kind))))
    leaves = jax.tree_util.tree_leaves_with_path(metrics.finite[kind])
    owners = jax.tree.leaves(state_owners(model, metrics.finite[kind])) if kind == "fast" else ["pre-training"] * len(leaves)
    path, level = next((path, level) for (path, finite), level in zip(leaves, owners, strict=True) if not finite)
    leaf = jax.tree_util.keystr(path, simple=True, separator="/")
    raise NonFinite(f"step {step}, level {level}: {_CAUSES[kind].format(leaf)}")


def _unread(fast: PyTree) -> PyTree:
    """A fast state that nothing will read, with numbers in place of its attention caches, which then need not be made."""
    is_cache = lambda tree: isinstance(tree, AttentionState)
    blank = lambda tree: jax.tree.map(lambda _: jnp.zeros(()), tree) if is_cache(tree) else tree
    return jax.tree.map(blank, fast, is_leaf=is_cache)


def _finite(tree: PyTree) -> PyTree:
    """Of each leaf, whether all its entries are finite."""
    return jax.tree.map(jnp.all, jax.tree.map(jnp.isfinite, tree))
