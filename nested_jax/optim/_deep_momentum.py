"""Deep momentum: an MLP for every matrix that learns from its gradients, by gradient descent on an objective of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_jax.description import Description
from nested_jax.errors import UserError, assert_choice
from nested_jax.numerics import safe_divide, safe_norm, upcast, zeros
from nested_jax.optim._hyperparameters import check, check_count
from nested_jax.paths import DimensionNumbers, as_matrices, assert_matrices, from_matrices, masked, path_name, resolve
from nested_jax.typing import Array, Float, PyTree


class DeepMemory(NamedTuple):
    """The residual MLP m(z) = z + gelu(z up) down of one leaf, stacked as its matrices are."""

    up: Float[Array, "*stacked N F"]
    down: Float[Array, "*stacked F N"]


class DeepMomentumState(NamedTuple):
    """Of every leaf that is a matrix, its memory and where it started; of another, its momentum and None.

    All are float32 or finer.
    """

    memory: PyTree
    start: PyTree
    description = Description(
        "of an MLP m: -<m(z), P(z)>, or 1/2 |m(z) - P(z)|^2, z rows of g / |g|",
        "gradient descent, decay to the start",
        knowledge="generation: back-propagation writes the gradients; initialisation: a start that can be learned",
    )


def deep_momentum_start(
    params: PyTree, hidden: int = 32, *, seed: int = 0, dimension_numbers: DimensionNumbers = None
) -> PyTree:
    """Starts of `deep_momentum`'s memories: a `DeepMemory` for every matrix, None for other leaves.

    Its output layer is zero, so that it gives every gradient back as it came. A tree to meta-learn.

    Args:
        params: parameters, or their shapes.
        hidden: width F of the memories.
        seed: of their random input layers.
        dimension_numbers: as of `scale_by_deep_momentum`.

    Raises:
        UserError: dimension numbers do not fit a parameter, or there is no hidden unit.
    """
    check_count("deep_momentum", hidden=hidden)
    leaves, structure = jax.tree.flatten(params)
    starts = []
    for i, (leaf, numbers) in enumerate(zip(leaves, resolve(dimension_numbers, params), strict=True)):
        if numbers is None:
            starts.append(None)
            continue
        shape = jax.eval_shape(lambda x, n=numbers: as_matrices(x, n), leaf).shape
        width, dtype = shape[-2], jnp.promote_types(leaf.dtype, jnp.float32)
        up = jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), (*shape[:-2], width, hidden), dtype)
        starts.append(DeepMemory(up, jnp.zeros((*shape[:-2], hidden, width), dtype)))
    return structure.unflatten(starts)


def scale_by_deep_momentum(
    decay: float = 0.9,
    rate: float = 1.0,
    *,
    objective: Literal["dot", "l2"] = "dot",
    target: Callable[[Array], Array] | None = None,
    scale: Literal["gradient", "rms"] = "gradient",
    hidden: int = 32,
    seed: int = 0,
    start: PyTree | None = None,
    dimension_numbers: DimensionNumbers = None,
) -> optax.GradientTransformation:
    """The momentum of every matrix is a residual MLP m that reads the gradient it is about to replace (NL Eq. 50).

    Keys z are the columns of u = g / |g|_F of a kernel (in, out), what each output's weights would learn, times sqrt(out):
    of unit norm on average. Targets are those of P(u). The memory goes back towards its start and takes one step:

        m(z) = z + gelu(z up) down / sqrt(F)
        w <- start + decay (w - start) - rate grad mean_z L(m(z), P(z))     dot: L = -<m(z), P(z)>   l2: |m(z) - P(z)|^2 / 2
        emits |g|_F m(u), or with `scale` "rms" m(u) over its root mean square

    The default start gives m(u) = u, the gradient itself, so that it descends from the first step. From there the l2
    objective has nothing to learn unless P is given. Other leaves have an element-wise momentum, (1 - decay) sum decay^s g.

    Args:
        decay: what is kept of what has been learned each step, from 0 to 1; below 1 where there are other leaves.
        rate: learning rate of the memories, at least 0. A key and its targets are of the scale of 1 for any loss.
        objective: dot or l2.
        target: P, of normalised gradients (..., in, out), such as `newton_schulz`; None for P(u) = u.
        scale: what the update's size follows: the gradient's norm, or 1 for every entry on average.
        hidden, seed: of the default start.
        start: `DeepMemory`s of all matrices, None for other leaves, as of `deep_momentum_start`: may be meta-learned.
            Under `optax.masked` or `optax.partition`, those of all parameters: what is masked is left out.
        dimension_numbers: which leaves are matrices, and along which axes; as optax's Muon takes them (see `matrices`).
            None: leaves of two axes.

    Raises:
        UserError: a hyperparameter is out of range, or a start does not fit its parameter.
    """
    check("deep_momentum", low=0.0, high=1.0, decay=decay)
    check("deep_momentum", low=0.0, rate=rate)
    check_count("deep_momentum", hidden=hidden)
    assert_choice("deep_momentum: objective", objective, ("dot", "l2"))
    assert_choice("deep_momentum: scale", scale, ("gradient", "rms"))

    def init(params):
        if not isinstance(decay, jax.core.Tracer) and decay == 1:
            assert_matrices("deep_momentum with decay 1 (give less)", dimension_numbers, params)  # others would never move
        draw = lambda hidden: deep_momentum_start(params, hidden, seed=seed, dimension_numbers=dimension_numbers)
        if start is None:
            starts = draw(hidden)
        else:
            made = jax.eval_shape(lambda: draw(_hidden_width(start, hidden)))
            starts = jax.tree.map(jnp.copy, _fitting(start, made))
        structure = jax.tree.structure(params)
        pairs = zip(jax.tree.leaves(zeros(params)), structure.flatten_up_to(starts), strict=True)
        memories = [empty if begun is None else jax.tree.map(jnp.copy, begun) for empty, begun in pairs]
        return DeepMomentumState(structure.unflatten(memories), starts)

    def matrix(memory, begun, g):
        size, count = safe_norm(g, (-2, -1)), g.shape[-1]
        u = safe_divide(g, size)
        keys, targets = (jnp.swapaxes(x, -2, -1) * count**0.5 for x in (u, u if target is None else target(u)))

        def loss(memory):
            out = read(memory, keys)
            each = -jnp.sum(out * targets, (-2, -1)) if objective == "dot" else jnp.sum((out - targets) ** 2, (-2, -1)) / 2
            return jnp.sum(each) / count

        move = lambda w, first, slope: first + decay * (w - first) - rate * slope
        memory = jax.tree.map(move, memory, begun, jax.grad(loss)(memory))
        out = jnp.swapaxes(read(memory, keys), -2, -1) * count**-0.5
        mean = safe_norm(out, (-2, -1)) * (out.shape[-2] * out.shape[-1]) ** -0.5
        return memory, out * size if scale == "gradient" else safe_divide(out, mean)

    def update(updates, state, params=None):
        del params
        leaves, structure = jax.tree.flatten(updates)
        memories, starts = structure.flatten_up_to(state.memory), structure.flatten_up_to(state.start)
        moved, emitted = [], []
        for g, numbers, memory, begun in zip(leaves, resolve(dimension_numbers, updates), memories, starts, strict=True):
            if numbers is None:
                after = out = decay * memory + (1 - decay) * upcast(g)
            else:
                after, out = matrix(memory, begun, as_matrices(upcast(g), numbers))
                out = from_matrices(out, numbers, g.shape)
            moved.append(optax.tree.cast_like(after, memory))
            emitted.append(out.astype(g.dtype))
        return structure.unflatten(emitted), DeepMomentumState(structure.unflatten(moved), state.start)

    return optax.GradientTransformation(init, update)


def _hidden_width(start: PyTree, hidden: int) -> int:
    widths = [x.up.shape[-1] for x in jax.tree.leaves(start, is_leaf=lambda x: isinstance(x, DeepMemory))]
    return widths[0] if widths else hidden


def read(memory: DeepMemory, keys: Float[Array, "*stacked M N"]) -> Float[Array, "*stacked M N"]:
    """m(z) = z + gelu(z up) down / sqrt(F) of every row z."""
    return keys + jax.nn.gelu(keys @ memory.up) @ memory.down * memory.up.shape[-1] ** -0.5


def _fitting(start: PyTree, made: PyTree) -> PyTree:
    """The given starts, of the widths of those that would have been made, where those are: some parameters may be masked."""
    ends = lambda x: x is None or isinstance(x, DeepMemory)
    table = lambda tree: dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=ends))
    given, found = table(start), []
    for path, wanted in table(made).items():
        own = given.pop(path, None)
        found.append(own)
        if (own is None) != (wanted is None):
            kind = "a DeepMemory" if wanted else "None: it is no matrix"
            raise UserError(f"deep_momentum: the start of parameter {path_name(path)} must be {kind}")
        if own is not None and (own.up.shape != wanted.up.shape or own.down.shape != wanted.down.shape):
            shapes = [list(x.shape) for x in (*own, *wanted)]
            raise UserError(
                f"deep_momentum: the start of parameter {path_name(path)} has up {shapes[0]} and down {shapes[1]}: give "
                f"{shapes[2]} and {shapes[3]}"
            )
    hidden = masked(made)
    unknown = [path for path in map(path_name, given) if not hidden(path)]
    if unknown:
        raise UserError(f"deep_momentum: there is a start for {unknown[0]} and no such parameter")
    return jax.tree.structure(made, is_leaf=ends).unflatten(found)


def deep_momentum(
    learning_rate: optax.ScalarOrSchedule,
    decay: float = 0.9,
    rate: float = 1.0,
    *,
    objective: Literal["dot", "l2"] = "dot",
    target: Callable[[Array], Array] | None = None,
    scale: Literal["gradient", "rms"] = "gradient",
    hidden: int = 32,
    seed: int = 0,
    start: PyTree | None = None,
    dimension_numbers: DimensionNumbers = None,
) -> optax.GradientTransformation:
    """`scale_by_deep_momentum`, then the learning rate.

    Args:
        learning_rate: a number or a schedule.
        decay, rate, objective, target, scale, hidden, seed, start, dimension_numbers: as of `scale_by_deep_momentum`.

    Raises:
        UserError: a hyperparameter is not finite or out of range, or a start does not fit its parameter.

    The first update is plain gradient descent, if the memory does not learn:

    >>> rule = deep_momentum(0.1, rate=0.0)
    >>> gradient = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> print(rule.update(gradient, rule.init(gradient))[0].round(3))
    [[-0.1 -0.2]
     [-0.3 -0.4]]

    References:
        NL, Eq. 50.
    """
    check("deep_momentum", learning_rate=learning_rate)
    rule = scale_by_deep_momentum(
        decay, rate, objective=objective, target=target, scale=scale, hidden=hidden, seed=seed, start=start,
        dimension_numbers=dimension_numbers,
    )  # fmt: skip
    return optax.chain(rule, optax.scale_by_learning_rate(learning_rate))
