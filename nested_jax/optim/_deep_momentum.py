"""Deep momentum: the momentum of every matrix is an MLP, trained on its gradients by gradient descent."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from nested_jax.description import Description
from nested_jax.errors import UserError, assert_choice
from nested_jax.numerics import bounded, normal, safe_divide, safe_norm, split_scale, vary, zeros
from nested_jax.optim._hyperparameters import NON_NEGATIVE, UP_TO_ONE, as_size, check, check_count, check_functions
from nested_jax.optim._precision import at_rate, in_float32
from nested_jax.paths import (
    DimensionNumbers,
    as_matrices,
    assert_matrices,
    from_matrices,
    is_masked,
    path_name,
    resolve_dimension_numbers,
)
from nested_jax.typing import Array, Float, PyTree


class DeepMemory(NamedTuple):
    """Weights of the residual MLP that is the momentum of one leaf, stacked as the leaf's matrices are.

        m(z) = z + gelu(z up) down / sqrt(F)

    Args:
        up: (..., in, F) for matrices (..., in, out).
        down: (..., F, in).

    Source: NL Eq. 50.

    >>> DeepMemory(up=jnp.ones((4, 32)), down=jnp.zeros((32, 4))).up.shape
    (4, 32)
    """

    up: Float[Array, "*stacked N F"]
    down: Float[Array, "*stacked F N"]


class DeepMomentumState(NamedTuple):
    """Of a matrix, its `DeepMemory` and the start of that; of another leaf, its momentum and None; float32 or finer."""

    memory: PyTree
    start: PyTree
    description = Description(
        "of an MLP m: -<m(z), P(z)>, or 1/2 |m(z) - P(z)|^2, z rows of g / |g|",
        "gradient descent, decay to the start or to zero",
        knowledge="generation: back-propagation writes the gradients; initialisation: a start that can be learned",
    )


def deep_momentum_start(
    params: PyTree, hidden: int | None = None, *, seed: int = 0, dimension_numbers: DimensionNumbers = None
) -> PyTree:
    """Starts of `deep_momentum`'s memories: a `DeepMemory` for every matrix, None for other leaves.

        up ~ N(0, 1)        down = 0        so that m(z) = z

    A leaf's start depends on its path, its shape and the seed alone. The result can be meta-learned.

    Args:
        params: parameters, or their shapes.
        hidden: width F of the memories, at least 1. None: 32.
        seed: of the random input layers.
        dimension_numbers: as of `scale_by_deep_momentum`.

    Returns:
        A tree of the structure of params, with `DeepMemory`(up (..., in, F), down (..., F, in)) and None.

    Raises:
        UserError: dimension numbers do not fit a parameter, or `hidden` is below 1.

    Source: NL Eq. 50.

    >>> start = deep_momentum_start({"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, hidden=8)
    >>> start["kernel"].up.shape, start["kernel"].down.shape, start["bias"]
    ((4, 8), (8, 4), None)
    """
    hidden = 32 if hidden is None else as_size("deep_momentum", "hidden", hidden)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    starts = []
    for (path, leaf), numbers in zip(leaves, resolve_dimension_numbers(dimension_numbers, params), strict=True):
        if numbers is None:
            starts.append(None)
            continue
        shape = jax.eval_shape(lambda x, n=numbers: as_matrices(x, n), leaf).shape
        width, dtype = shape[-2], jnp.promote_types(leaf.dtype, jnp.float32)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path_name(path).encode()))
        up = normal(key, (*shape[:-2], width, hidden), dtype)
        starts.append(DeepMemory(up, jnp.zeros((*shape[:-2], hidden, width), dtype)))
    return structure.unflatten(starts)


def scale_by_deep_momentum(
    decay: ArrayLike = 0.9,
    rate: ArrayLike = 1.0,
    *,
    objective: Literal["dot", "l2"] = "dot",
    target: Callable[[Array], Array] | None = None,
    scale: Literal["gradient", "rms"] = "gradient",
    retention: Literal["initial", "zero"] = "initial",
    hidden: int | None = None,
    seed: int = 0,
    start: PyTree | None = None,
    dimension_numbers: DimensionNumbers = None,
) -> optax.GradientTransformation:
    """The momentum of every matrix is a residual MLP m, whose output for the present gradient is the update.

        m(z) = z + gelu(z up) down / sqrt(F)                 weights w = (up, down)
        w <- start + decay (w - start) - rate grad_w mean_z L(m(z), P(z))
             dot: L = -<m(z), P(z)>        l2: L = |m(z) - P(z)|^2 / 2
        emits |g|_F m(u), or with `scale` "rms" m(u) over its root mean square

    Keys z are the columns of u = g / |g|_F for a kernel (in, out), one for each output, times sqrt(out), which makes their
    norm 1 on average. Targets are the columns of P(u), scaled alike. The default start has m(u) = u, the gradient, so the
    first steps descend; from it the l2 objective has zero gradient unless P is given. Other leaves have the element-wise
    momentum (1 - decay) sum_s decay^s g.

    Args:
        decay: share of the learned change w - start kept each step, in [0, 1]; below 1 if there are other leaves. With 1
            nothing decays.
        rate: learning rate of the memories, at least 0. Keys and targets have unit scale for any scale of the loss.
        objective: dot product or squared error.
        target: P, of normalised gradients (..., in, out), such as `newton_schulz`. None: P(u) = u.
        scale: size of the update: the gradient's norm, or a root mean square of 1.
        retention: decay to the start, or of the weights themselves to zero, as in the paper: w <- decay w - rate grad_w.
        hidden: width F of the default start. None: that of `deep_momentum_start`.
        seed: of the default start.
        start: `DeepMemory` of every matrix and None of other leaves, as of `deep_momentum_start`; may be meta-learned.
            Under `optax.masked` or `optax.partition`, give it for all parameters: masked ones are ignored.
        dimension_numbers: which leaves are matrices, and their (in, out) axes, as in `optax.contrib.muon`; see `matrices`.
            None: leaves of two axes, (in, out).

    Returns:
        A transformation of gradients of any shapes, with state `DeepMomentumState`.

    Raises:
        UserError: a hyperparameter is out of range, or a start does not fit its parameter.

    Source: NL Eq. 50.

    >>> rule = scale_by_deep_momentum(rate=0.0)
    >>> gradient = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> updates, _ = rule.update(gradient, rule.init(gradient))
    >>> jnp.allclose(updates, gradient).item()  # the untrained memory is the identity
    True
    """
    check("deep_momentum", UP_TO_ONE, decay=decay)
    check("deep_momentum", NON_NEGATIVE, rate=rate)
    check_count("deep_momentum", hidden=1 if hidden is None else hidden)
    check_functions("deep_momentum", target=target)
    assert_choice("deep_momentum: objective", objective, ("dot", "l2"))
    assert_choice("deep_momentum: scale", scale, ("gradient", "rms"))
    assert_choice("deep_momentum: retention", retention, ("initial", "zero"))

    def init(params):
        if not isinstance(decay, Tracer) and decay == 1:
            # the momentum of other leaves, (1 - decay) sum decay^s g, would be zero
            assert_matrices("deep_momentum with decay 1 (give less)", dimension_numbers, params)
        default = lambda hidden: deep_momentum_start(params, hidden, seed=seed, dimension_numbers=dimension_numbers)
        if start is None:
            starts = default(hidden)
        else:
            shapes = jax.eval_shape(lambda: default(_hidden_width(start, hidden)))
            starts = jax.tree.map(jnp.copy, _select_starts(start, shapes))
        structure = jax.tree.structure(params)
        pairs = zip(jax.tree.leaves(zeros(params)), structure.flatten_up_to(starts), strict=True)
        memories = [empty if first is None else jax.tree.map(jnp.copy, first) for empty, first in pairs]
        return DeepMomentumState(structure.unflatten(memories), starts)

    def matrix(memory, first, g):
        g, scaled = split_scale(g, (-2, -1))
        size, count = safe_norm(g, (-2, -1)), g.shape[-1]
        u = safe_divide(g, size)
        keys, targets = (jnp.swapaxes(x, -2, -1) * count**0.5 for x in (u, u if target is None else target(u)))

        memory = vary(memory, keys)

        def loss(memory):
            out = forward(memory, keys)
            each = -jnp.sum(out * targets, (-2, -1)) if objective == "dot" else jnp.sum((out - targets) ** 2, (-2, -1)) / 2
            return jnp.sum(each) / count

        step = lambda w, w0, slope: w0 + decay * (w - w0) - rate * slope
        first = first if retention == "initial" else jax.tree.map(jnp.zeros_like, first)
        memory = jax.tree.map(step, memory, first, jax.grad(loss)(memory))
        out = jnp.swapaxes(forward(memory, keys), -2, -1) * count**-0.5
        rms = safe_norm(out, (-2, -1)) * (out.shape[-2] * out.shape[-1]) ** -0.5
        return memory, bounded(out * size * scaled, out, size) if scale == "gradient" else safe_divide(out, rms)

    def update(updates, state, params=None):
        del params
        leaves, structure = jax.tree.flatten(updates)
        memories, starts = structure.flatten_up_to(state.memory), structure.flatten_up_to(state.start)
        numbered = resolve_dimension_numbers(dimension_numbers, updates)
        learned, emitted = [], []
        for g, numbers, memory, first in zip(leaves, numbered, memories, starts, strict=True):
            if g.size == 0:
                after, out = memory, g
            elif numbers is None:
                after = out = bounded(decay * memory + (1 - decay) * g, memory, g)
            else:
                after, out = matrix(memory, first, as_matrices(g, numbers))
                out = from_matrices(out, numbers, g.shape)
            learned.append(optax.tree.cast_like(after, memory))
            emitted.append(out)
        return structure.unflatten(emitted), DeepMomentumState(structure.unflatten(learned), state.start)

    return in_float32(optax.GradientTransformation(init, update))


def _hidden_width(start: PyTree, hidden: int | None) -> int | None:
    widths = [x.up.shape[-1] for x in jax.tree.leaves(start, is_leaf=lambda x: isinstance(x, DeepMemory))]
    return widths[0] if widths else hidden


def forward(memory: DeepMemory, keys: Float[Array, "*stacked M N"]) -> Float[Array, "*stacked M N"]:
    """m(z) = z + gelu(z up) down / sqrt(F) of every row z."""
    return keys + jax.nn.gelu(keys @ memory.up) @ memory.down * memory.up.shape[-1] ** -0.5


def _select_starts(start: PyTree, shapes: PyTree) -> PyTree:
    """The given starts of the parameters in `shapes`, a tree of default starts' shapes from which some may be masked."""
    is_start = lambda x: x is None or isinstance(x, DeepMemory)
    by_path = lambda tree: dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_start))
    given, selected = by_path(start), []
    for path, expected in by_path(shapes).items():
        own = given.pop(path, None)
        selected.append(own)
        if (own is None) != (expected is None):
            kind = "a DeepMemory" if expected else "None: it is no matrix"
            raise UserError(f"deep_momentum: the start of parameter {path_name(path)} must be {kind}")
        if own is not None and (own.up.shape != expected.up.shape or own.down.shape != expected.down.shape):
            sizes = [list(x.shape) for x in (*own, *expected)]
            raise UserError(
                f"deep_momentum: the start of parameter {path_name(path)} has up {sizes[0]} and down {sizes[1]}: give "
                f"{sizes[2]} and {sizes[3]}"
            )
    unknown = [path for path in map(path_name, given) if not is_masked(shapes, path)]
    if unknown:
        raise UserError(f"deep_momentum: there is a start for {unknown[0]} and no such parameter")
    return jax.tree.structure(shapes, is_leaf=is_start).unflatten(selected)


def deep_momentum(
    learning_rate: optax.ScalarOrSchedule,
    decay: ArrayLike = 0.9,
    rate: ArrayLike = 1.0,
    *,
    objective: Literal["dot", "l2"] = "dot",
    target: Callable[[Array], Array] | None = None,
    scale: Literal["gradient", "rms"] = "gradient",
    retention: Literal["initial", "zero"] = "initial",
    hidden: int | None = None,
    seed: int = 0,
    start: PyTree | None = None,
    dimension_numbers: DimensionNumbers = None,
) -> optax.GradientTransformation:
    """Deep momentum: `scale_by_deep_momentum`, then the learning rate.

        w <- start + decay (w - start) - rate grad_w mean_z L(m(z), P(z))        W <- W - learning_rate |g|_F m(g / |g|_F)

    Args:
        learning_rate: a number or a schedule.
        decay, rate, objective, target, scale, retention, hidden, seed, start, dimension_numbers: as of
            `scale_by_deep_momentum`.

    Returns:
        An optimizer of parameters of any shapes; kernels are (in, out).

    Raises:
        UserError: a hyperparameter is not finite or out of range, or a start does not fit its parameter.

    Source: NL Eq. 50.

    The first update is plain gradient descent if the memory does not learn:

    >>> rule = deep_momentum(0.1, rate=0.0)
    >>> gradient = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> print(rule.update(gradient, rule.init(gradient))[0].round(3))
    [[-0.1 -0.2]
     [-0.3 -0.4]]
    """
    check("deep_momentum", learning_rate=learning_rate)
    rule = scale_by_deep_momentum(
        decay, rate, objective=objective, target=target, scale=scale, retention=retention, hidden=hidden, seed=seed,
        start=start, dimension_numbers=dimension_numbers,
    )  # fmt: skip
    return at_rate(rule, learning_rate)
