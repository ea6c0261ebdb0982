"""Non-linear momentum: a memory read through a non-linearity. Through Newton-Schulz it is Muon."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nested_jax.errors import UserError, assert_choice
from nested_jax.numerics import upcast, zeros
from nested_jax.optim._hyperparameters import check
from nested_jax.optim._newton_schulz import newton_schulz
from nested_jax.paths import DimensionNumbers, assert_matrices, map_matrices, resolve
from nested_jax.typing import Array, PyTree


class NonlinearMomentumState(NamedTuple):
    """Steps taken, and the memory: one value for every parameter, of its shape, in float32 or finer."""

    count: Array
    momentum: PyTree


def scale_by_nonlinear_momentum(
    nonlinearity: Callable[[Array], Array] = newton_schulz,
    decay: float = 0.95,
    *,
    average: bool = True,
    nesterov: bool = True,
    on: Literal["matrices", "leaves"] = "matrices",
    dimension_numbers: DimensionNumbers = None,
) -> optax.GradientTransformation:
    """A linear memory of gradients whose output passes a non-linearity.

        average:      m <- decay m + (1 - decay) g, both bias corrections
        sum:          m <- decay m + g
        emits sigma(m), or sigma(decay m + (1 - decay) g) with nesterov (of a sum: decay m + g)          (NL Eq. 52)

    Args:
        nonlinearity: sigma. The default, Newton-Schulz, makes it `optax.contrib.scale_by_muon`.
        decay: what is kept of the memory each step, from 0 to 1; of an average, below 1.
        average: an average of gradients, as in Muon, or their sum, as in the paper.
        nesterov: look one step ahead.
        on: what sigma is given: matrices (..., in, out), or leaves as they are, without dimension numbers.
        dimension_numbers: which leaves are matrices, and along which axes; as optax's Muon takes them (see `matrices`).
            None: leaves of two axes.

    Raises:
        UserError: a hyperparameter is out of range, sigma is for matrices and a parameter is none, or it is for leaves and
            there are dimension numbers.
    """
    check("nonlinear_momentum", low=0.0, high=1.0, below=1.0 if average else math.inf, decay=decay)
    assert_choice("nonlinear_momentum: on", on, ("matrices", "leaves"))
    _check_on(on, dimension_numbers=dimension_numbers)

    def init(params):
        if on == "matrices":
            assert_matrices("nonlinear_momentum", dimension_numbers, params)
        return NonlinearMomentumState(jnp.zeros((), jnp.int32), zeros(params))

    def update(updates, state, params=None):
        del params
        ahead, state = remember(upcast(updates), state, decay, average, nesterov)
        if on == "leaves":
            emitted = jax.tree.map(nonlinearity, ahead)
        else:
            emitted = map_matrices(nonlinearity, dimension_numbers, ahead, rule="nonlinear_momentum")
        return optax.tree.cast_like(emitted, updates), state

    return optax.GradientTransformation(init, update)


def _check_on(on: str, **of_matrices) -> None:
    """Raises UserError for the first option of matrices that is given where there are only leaves."""
    for option, value in of_matrices.items():
        if on == "leaves" and value is not None:
            raise UserError(
                f"nonlinear_momentum: {option} is of matrices and on is 'leaves': leave it out, or on='matrices'"
            )


def remember(gradients: PyTree, state: NonlinearMomentumState, decay, average: bool, nesterov: bool):
    """(what is read, state) after one more gradient."""
    count = optax.safe_increment(state.count)
    share = 1 - decay if average else 1
    add = lambda m, g: decay * m + share * g
    momentum = optax.tree.cast_like(jax.tree.map(add, state.momentum, gradients), state.momentum)
    correct = lambda tree, n: optax.tree.bias_correction(tree, decay, n) if average else tree
    if nesterov:
        ahead = jax.tree.map(add, correct(momentum, optax.safe_increment(count)), correct(gradients, count))
    else:
        ahead = correct(momentum, count)
    return ahead, NonlinearMomentumState(count, momentum)


def nonlinear_momentum(
    learning_rate: optax.ScalarOrSchedule,
    nonlinearity: Callable[[Array], Array] = newton_schulz,
    decay: float = 0.95,
    *,
    average: bool = True,
    nesterov: bool = True,
    on: Literal["matrices", "leaves"] = "matrices",
    consistent_rms: float | None = None,
    weight_decay: float = 0.0,
    weight_decay_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    vectors: optax.GradientTransformation | None = None,
    dimension_numbers: DimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_nonlinear_momentum` with Muon's scaling by shape, weight decay and rule for vectors. By default it is Muon.

    Args:
        learning_rate: a number or a schedule.
        nonlinearity, decay, average, nesterov, on, dimension_numbers: as of `scale_by_nonlinear_momentum`.
        consistent_rms: matrices' updates are scaled by sqrt(max(in, out)) times this; None: by sqrt(max(1, out / in)).
        weight_decay: of what sigma is given, times the learning rate.
        weight_decay_mask: as of `optax.add_decayed_weights`.
        vectors: rule of leaves that are no matrices, with its learning rate; None: `optax.adamw` as in Muon, nesterov too.

    With `on="leaves"` there are no vectors and no scaling by shape.

    Raises:
        UserError: a hyperparameter is not finite or out of range, dimension numbers do not fit a parameter, or with leaves
            there are options of matrices.

    >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
    >>> rule = nonlinear_momentum(0.1)
    >>> updates, state = rule.update(params, rule.init(params), params)
    >>> updates["kernel"].shape
    (2, 3)

    References:
        NL, Eq. 52 and 43-44; Jordan et al., Muon, 2024.
    """
    check("nonlinear_momentum", learning_rate=learning_rate, weight_decay=weight_decay)
    check("nonlinear_momentum", low=0.0, consistent_rms=0.0 if consistent_rms is None else consistent_rms)
    _check_on(on, consistent_rms=consistent_rms, vectors=vectors)
    memory = scale_by_nonlinear_momentum(
        nonlinearity, decay, average=average, nesterov=nesterov, on=on, dimension_numbers=dimension_numbers
    )
    shrinkage = optax.add_decayed_weights(weight_decay, weight_decay_mask)
    if on == "leaves":
        return optax.chain(memory, shrinkage, optax.scale_by_learning_rate(learning_rate))
    return as_muon(memory, shrinkage, learning_rate, nesterov, consistent_rms, vectors, dimension_numbers)


def as_muon(
    rule: optax.GradientTransformation,
    shrinkage: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    nesterov: bool,
    consistent_rms: float | None,
    vectors: optax.GradientTransformation | None,
    dimension_numbers: DimensionNumbers,
) -> optax.GradientTransformationExtraArgs:
    """A rule for matrices with what Muon puts around it: scaling by shape, weight decay, AdamW for other leaves."""
    if vectors is None:  # eps_root keeps the derivative at a zero gradient finite
        vectors = optax.adamw(learning_rate, eps_root=1e-30, weight_decay=0.0, nesterov=nesterov)
    shape = _scale_by_shape(consistent_rms, dimension_numbers)

    def labels(params):
        kinds = ["vectors" if numbers is None else "matrices" for numbers in resolve(dimension_numbers, params)]
        return jax.tree.unflatten(jax.tree.structure(params), kinds)

    matrices = optax.chain(rule, shape, shrinkage, optax.scale_by_learning_rate(learning_rate))
    return optax.partition({"matrices": matrices, "vectors": vectors}, labels)


def _scale_by_shape(consistent_rms: float | None, dimension_numbers: DimensionNumbers) -> optax.GradientTransformation:
    """Muon's factor of every matrix: sqrt(max(1, out / in)), or consistent_rms sqrt(max(in, out))."""

    def factor(x):
        rows, columns = x.shape[-2:]
        return max(1.0, columns / rows) ** 0.5 if consistent_rms is None else max(rows, columns) ** 0.5 * consistent_rms

    return optax.stateless(lambda updates, _: map_matrices(lambda x: x * factor(x), dimension_numbers, updates))
