"""Delta gradient descent: linear layers trained by the exact proximal step on their squared error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_jax.description import Description
from nested_jax.errors import UserError
from nested_jax.numerics import bounded, split_scale, upcast
from nested_jax.optim._accumulation import refuse_sums
from nested_jax.optim._hyperparameters import NON_NEGATIVE, check, learning_rate_at, next_count
from nested_jax.optim._precision import at_rate, in_float32
from nested_jax.paths import DimensionNumbers, as_matrices, from_matrices, is_masked, path_name, resolve_dimension_numbers
from nested_jax.typing import Array, Float


class DeltaGradientDescentState(NamedTuple):
    """Steps taken, int32, for schedules."""

    count: Array
    description = Description("1/2 |W x - u|^2, u = -surprise", "closed form: the proximal step, delta rule")


def scale_by_delta_gradient_descent(
    learning_rate: optax.ScalarOrSchedule, *, dimension_numbers: DimensionNumbers = None
) -> optax.GradientTransformationExtraArgs:
    """A linear layer takes the proximal step on its squared error, with target minus its local surprise, u = -delta.

        W <- argmin_W  |W x - u|^2 / 2 + |W - W_t|^2 / (2 eta)
           = W_t (I - eta' x x^T) - eta' delta x^T,      eta' = eta / (1 + eta |x|^2)

    For a batch it minimises the mean error, with C = sum x x^T / examples and G the gradient of the mean loss. For a Flax
    kernel K (in, out), which is W^T:

        emits  (I + eta C)^{-1} (G + C K)       the step is -eta times that

    The step contracts for inputs of any norm. Leaves that are no matrices, or have no inputs, such as biases, emit their
    gradient.

    Args:
        learning_rate: eta, a number of at least 0 or a schedule; the proximal problem contains it.
        dimension_numbers: which leaves are matrices, and their (in, out) axes, as in `optax.contrib.muon`; see `matrices`.
            None: leaves of two axes, (in, out).

    Returns:
        A transformation whose `update(gradients, state, params, inputs=...)` takes the inputs of linear layers: a mapping
        from their kernel's path, such as "dense/kernel", to inputs (..., in), or (L, ..., in) of a stack (L, in, out).
        `nested_jax.local_surprise` computes them. All their leading axes count as examples: those of all the examples whose
        mean the gradients are, so it cannot be inside `optax.MultiSteps`. Under `optax.masked` or `optax.partition`, inputs
        of masked kernels are ignored. Its state is `DeltaGradientDescentState`.

    Raises:
        UserError: the learning rate is not finite or below 0; inputs or params are missing, inputs fit no kernel, or
            gradients of several steps are summed.

    Source: NL Eq. 56-57.

    >>> params, x = {"kernel": jnp.array([[1.0], [0.0]])}, jnp.array([[1.0, 1.0]])
    >>> rule = scale_by_delta_gradient_descent(0.5)
    >>> updates, _ = rule.update({"kernel": jnp.zeros((2, 1))}, rule.init(params), params, inputs={"kernel": x})
    >>> print(updates["kernel"].T.round(3))  # C K / (1 + 0.5 |x|^2)
    [[0.5 0.5]]
    """
    check("delta_gradient_descent", NON_NEGATIVE, learning_rate=learning_rate)

    def init(params):
        del params
        return DeltaGradientDescentState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, inputs: Mapping[str, Array] | None = None, **extra):
        del extra
        refuse_sums("delta_gradient_descent", "inputs")
        if params is None:
            raise UserError("delta_gradient_descent: params are missing: call update(gradients, state, params, inputs=...)")
        if inputs is None:
            raise UserError(
                "delta_gradient_descent: inputs are missing: call update(gradients, state, params, inputs={path: x})"
            )
        rate, emitted, unused = learning_rate_at(learning_rate, state.count), [], set(inputs)
        paths, structure = jax.tree_util.tree_flatten_with_path(updates)
        leaves = zip(
            paths, resolve_dimension_numbers(dimension_numbers, updates), structure.flatten_up_to(params), strict=True
        )
        for (key_path, g), numbers, kernel in leaves:
            path = path_name(key_path)
            x = inputs.get(path)
            unused.discard(path)
            if x is None or g.size == 0:
                emitted.append(g)
                continue
            if numbers is None:
                raise UserError(f"delta_gradient_descent: there are inputs of parameter {path}, which is no matrix")
            gradient, kernel = (as_matrices(part, numbers) for part in (g, kernel))
            emitted.append(from_matrices(_direction(path, rate, gradient, kernel, upcast(x)), numbers, g.shape))
        unknown = sorted(path for path in unused if not is_masked(updates, path))
        if unknown:
            raise UserError(f"delta_gradient_descent: there are inputs for {unknown[0]}, which is no parameter")
        return structure.unflatten(emitted), DeltaGradientDescentState(next_count(state.count))

    return in_float32(optax.GradientTransformationExtraArgs(init, update))


def _direction(
    path: str,
    rate: Array,
    gradient: Float[Array, "*stack N M"],
    kernel: Float[Array, "*stack N M"],
    x: Array,
) -> Float[Array, "*stack N M"]:
    """(I + eta C)^{-1} (G + C K) of every matrix of a stack."""
    stacked, width = gradient.shape[:-2], gradient.shape[-2]
    if x.shape[: len(stacked)] != stacked or x.ndim <= len(stacked) or x.shape[-1] != width:
        raise UserError(
            f"delta_gradient_descent: inputs of {path} have shape {list(x.shape)}: give one that begins with "
            f"{list(stacked)} and ends with {width}"
        )
    x = x.reshape(*stacked, -1, width).astype(gradient.dtype)
    C = jnp.swapaxes(x, -2, -1) @ x / x.shape[-2]
    identity = jnp.expand_dims(jnp.eye(width, dtype=x.dtype), tuple(range(len(stacked))))
    scale = jnp.maximum(split_scale(gradient, (-2, -1))[1], 1)  # the sums of a solve may overflow
    sides = (identity + rate.astype(x.dtype) * C, gradient / scale + C @ (kernel / scale))
    solve = lambda sides: jax.scipy.linalg.solve(*sides, assume_a="pos")
    if not stacked:
        solutions = solve(sides)
    else:  # One layer after the other: several batched LAPACK calls in one program deadlock in XLA on two CPU cores.
        solutions = jax.lax.map(solve, jax.tree.map(lambda side: side.reshape(-1, *side.shape[-2:]), sides))
    solutions = solutions.reshape(gradient.shape)
    return bounded(solutions * scale, solutions)


def delta_gradient_descent(
    learning_rate: optax.ScalarOrSchedule, *, dimension_numbers: DimensionNumbers = None
) -> optax.GradientTransformationExtraArgs:
    """Delta gradient descent: `scale_by_delta_gradient_descent`, then the same learning rate.

        K <- K - eta (I + eta C)^{-1} (G + C K)        kernels K (in, out)

    Args:
        learning_rate: eta, a number of at least 0 or a schedule.
        dimension_numbers: as of `scale_by_delta_gradient_descent`.

    Returns:
        An optimizer whose `update(gradients, state, params, inputs=...)` takes the inputs of linear layers, as
        `scale_by_delta_gradient_descent` does.

    Raises:
        UserError: the learning rate is not finite or below 0; inputs or params are missing, inputs fit no kernel, or
            gradients of several steps are summed.

    Source: NL Eq. 56-57.

    One example at a high rate: the layer's output becomes its target, minus the surprise.

    >>> params = {"kernel": jnp.zeros((2, 1))}
    >>> x, surprise = jnp.array([[3.0, 4.0]]), jnp.array([[-1.0]])
    >>> rule = delta_gradient_descent(1e4)
    >>> updates, _ = rule.update({"kernel": x.T @ surprise}, rule.init(params), params, inputs={"kernel": x})
    >>> (x @ optax.apply_updates(params, updates)["kernel"]).round(3).tolist()
    [[1.0]]
    """
    rule = scale_by_delta_gradient_descent(learning_rate, dimension_numbers=dimension_numbers)
    return at_rate(rule, learning_rate)
