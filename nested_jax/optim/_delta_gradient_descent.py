"""Delta gradient descent: linear layers trained by the exact proximal step on their squared error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_jax.description import Description
from nested_jax.errors import UserError
from nested_jax.numerics import upcast
from nested_jax.optim._hyperparameters import check, rate_at
from nested_jax.paths import DimensionNumbers, as_matrices, from_matrices, masked, path_name, resolve
from nested_jax.typing import Array


class DeltaGradientDescentState(NamedTuple):
    """Steps taken, by which a schedule is read."""

    count: Array
    description = Description("1/2 |W x - u|^2, u = -surprise", "closed form: the proximal step, delta rule")


def scale_by_delta_gradient_descent(
    learning_rate: optax.ScalarOrSchedule, *, dimension_numbers: DimensionNumbers = None
) -> optax.GradientTransformationExtraArgs:
    """A linear layer stores its input x and target u = -delta, minus the local surprise, and first forgets what x recalls.

        W <- argmin_W  |W x - u|^2 / 2 + |W - W_t|^2 / (2 eta)
           = W (I - eta' x x^T) - eta' delta x^T,      eta' = eta / (1 + eta |x|^2)             (NL Eq. 56-57)

    Of a batch it minimises the mean error, with C = sum x x^T / examples and G the gradient of the mean loss; for a Flax
    kernel K (in, out), which is W^T:

        emits  (I + eta C)^{-1} (G + C K)       the step is -eta times that

    The step contracts for inputs of any norm. Leaves that are no matrices, or have no inputs, such as biases, emit their
    gradient.

    Args:
        learning_rate: eta, a number or a schedule; it is needed inside.
        dimension_numbers: which leaves are matrices, and along which axes; as optax's Muon takes them (see `matrices`).
            None: leaves of two axes.

    Returns:
        A transformation whose `update(gradients, state, params, inputs=...)` takes the inputs of linear layers: a mapping
        from their kernel's path, such as "dense/kernel", to inputs (..., in), or (L, ..., in) of a stack (L, in, out).
        `nested_jax.local_surprise` gives them. All their leading axes count as examples. Under `optax.masked` or
        `optax.partition`, those of kernels that are masked are left alone.

    Raises:
        UserError: the learning rate is not finite; inputs are missing, or fit no kernel.
    """
    check("delta_gradient_descent", low=0.0, learning_rate=learning_rate)

    def init(params):
        del params
        return DeltaGradientDescentState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, inputs: Mapping[str, Array] | None = None, **extra):
        del extra
        if params is None:
            raise UserError("delta_gradient_descent: params are missing: call update(gradients, state, params, inputs=...)")
        if inputs is None:
            raise UserError(
                "delta_gradient_descent: inputs are missing: call update(gradients, state, params, inputs={path: x})"
            )
        rate, emitted, unused = rate_at(learning_rate, state.count), [], set(inputs)
        paths, structure = jax.tree_util.tree_flatten_with_path(updates)
        kernels = structure.flatten_up_to(params)
        for (path, g), numbers, kernel in zip(paths, resolve(dimension_numbers, updates), kernels, strict=True):
            x = inputs.get(path_name(path))
            if x is None:
                emitted.append(g)
                continue
            unused.discard(path_name(path))
            if numbers is None:
                raise UserError(
                    f"delta_gradient_descent: there are inputs for parameter {path_name(path)}, which is no matrix"
                )
            turned = [as_matrices(upcast(part), numbers) for part in (g, kernel)]
            direction = _direction(path_name(path), rate, *turned, upcast(x))
            emitted.append(from_matrices(direction, numbers, g.shape).astype(g.dtype))
        hidden = masked(updates)
        unknown = sorted(path for path in unused if not hidden(path))
        if unknown:
            raise UserError(f"delta_gradient_descent: there are inputs for {unknown[0]}, which is no parameter")
        return structure.unflatten(emitted), DeltaGradientDescentState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _direction(path: str, rate: Array, gradient: Array, kernel: Array, x: Array) -> Array:
    stacked, width = gradient.shape[:-2], gradient.shape[-2]
    if x.shape[: len(stacked)] != stacked or x.ndim <= len(stacked) or x.shape[-1] != width:
        raise UserError(
            f"delta_gradient_descent: inputs of {path} have shape {list(x.shape)}: give one that begins with "
            f"{list(stacked)} and ends with {width}"
        )
    x = x.reshape(*stacked, -1, width).astype(gradient.dtype)
    C = jnp.swapaxes(x, -2, -1) @ x / x.shape[-2]
    one = jnp.expand_dims(jnp.eye(width, dtype=x.dtype), tuple(range(len(stacked))))
    sides = (one + rate.astype(x.dtype) * C, gradient + C @ kernel)
    solve = lambda sides: jax.scipy.linalg.solve(*sides, assume_a="pos")
    if not stacked:
        return solve(sides)
    # One layer after another: of several batched LAPACK calls in one program, XLA on two CPU cores never comes back.
    one_by_one = jax.lax.map(solve, jax.tree.map(lambda side: side.reshape(-1, *side.shape[-2:]), sides))
    return one_by_one.reshape(gradient.shape)


def delta_gradient_descent(
    learning_rate: optax.ScalarOrSchedule, *, dimension_numbers: DimensionNumbers = None
) -> optax.GradientTransformationExtraArgs:
    """Delta gradient descent: `scale_by_delta_gradient_descent`, then the same learning rate.

    Args:
        learning_rate: a number or a schedule.
        dimension_numbers: as of `scale_by_delta_gradient_descent`.

    Raises:
        UserError: the learning rate is not finite; inputs are missing, or fit no kernel.

    One example, at a rate so high that the layer then gives its target, which is minus the surprise:

    >>> params = {"kernel": jnp.zeros((2, 1))}
    >>> x, surprise = jnp.array([[3.0, 4.0]]), jnp.array([[-1.0]])
    >>> rule = delta_gradient_descent(1e4)
    >>> updates, _ = rule.update({"kernel": x.T @ surprise}, rule.init(params), params, inputs={"kernel": x})
    >>> (x @ optax.apply_updates(params, updates)["kernel"]).round(3).tolist()
    [[1.0]]

    References:
        NL, Eq. 56-57.
    """
    return optax.chain(
        scale_by_delta_gradient_descent(learning_rate, dimension_numbers=dimension_numbers),
        optax.scale_by_learning_rate(learning_rate),
    )
