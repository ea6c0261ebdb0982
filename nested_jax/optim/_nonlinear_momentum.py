"""Non-linear momentum: a non-linearity of a linear memory. With Newton-Schulz it is Muon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from nested_jax.errors import UserError, assert_choice
from nested_jax.numerics import bounded, zeros
from nested_jax.optim._hyperparameters import BELOW_ONE, NON_NEGATIVE, UP_TO_ONE, check, check_functions, next_count
from nested_jax.optim._newton_schulz import newton_schulz
from nested_jax.optim._precision import at_rate, finite_adam, in_float32
from nested_jax.paths import DimensionNumbers, assert_matrices, map_matrices, resolve_dimension_numbers
from nested_jax.typing import Array, PyTree


class NonlinearMomentumState(NamedTuple):
    """Steps taken, int32; the memory m, a tree of the parameters' shapes, float32 or finer."""

    count: Array
    momentum: PyTree


def scale_by_nonlinear_momentum(
    nonlinearity: Callable[[Array], Array] | None = None,
    decay: ArrayLike = 0.95,
    *,
    average: bool = True,
    nesterov: bool = True,
    on: Literal["matrices", "leaves"] = "matrices",
    dimension_numbers: DimensionNumbers = None,
) -> optax.GradientTransformation:
    """A linear memory of gradients, emitted through a non-linearity.

        average:  m <- decay m + (1 - decay) g    emits sigma(m), or sigma(decay m + (1 - decay) g) with nesterov
        sum:      m <- decay m + g                emits sigma(m), or sigma(decay m + g) with nesterov

    In an average, m and g have the bias corrections of Muon.

    Args:
        nonlinearity: sigma, from an array to one of its shape. None: `newton_schulz`, with which the rule is
            `optax.contrib.scale_by_muon`.
        decay: share of the memory kept each step, in [0, 1]; below 1 for an average.
        average: an average of gradients, as in Muon, or their sum, as in the paper.
        nesterov: emit the memory after one more step with the same gradient.
        on: arguments of sigma: matrices (..., in, out), or whole leaves, without dimension numbers.
        dimension_numbers: which leaves are matrices, and their (in, out) axes, as in `optax.contrib.muon`; see `matrices`.
            None: leaves of two axes, (in, out).

    Returns:
        A transformation with state `NonlinearMomentumState`: of matrices only, or of leaves of any shapes.

    Raises:
        UserError: a hyperparameter is out of range, a parameter is no matrix with `on="matrices"`, or there are dimension
            numbers with `on="leaves"`.

    Source: NL Eq. 52; Jordan et al., Muon, 2024.

    >>> rule = scale_by_nonlinear_momentum(jnp.sign, 0.5, average=False, nesterov=False, on="leaves")
    >>> _, state = rule.update(jnp.array([4.0]), rule.init(jnp.zeros(1)))
    >>> print(rule.update(jnp.array([-3.0]), state)[0])  # sign(0.5 * 4 - 3)
    [-1.]
    """
    check("nonlinear_momentum", BELOW_ONE if average else UP_TO_ONE, decay=decay)
    assert_choice("nonlinear_momentum: on", on, ("matrices", "leaves"))
    check_functions("nonlinear_momentum", nonlinearity=nonlinearity)
    _check_on(on, dimension_numbers=dimension_numbers)
    sigma = newton_schulz if nonlinearity is None else nonlinearity

    def init(params):
        if on == "matrices":
            assert_matrices("nonlinear_momentum", dimension_numbers, params)
        return NonlinearMomentumState(jnp.zeros((), jnp.int32), zeros(params))

    def update(updates, state, params=None):
        del params
        memory, state = update_momentum(updates, state, decay, average, nesterov)
        if on == "leaves":
            return jax.tree.map(sigma, memory), state
        return map_matrices(sigma, dimension_numbers, memory, rule="nonlinear_momentum"), state

    return in_float32(optax.GradientTransformation(init, update))


def _check_on(on: str, **options: Any) -> None:
    """Raises UserError for the first option of matrices that is given with `on="leaves"`."""
    for option, value in options.items():
        if on == "leaves" and value is not None:
            raise UserError(
                f"nonlinear_momentum: {option} is of matrices and on is 'leaves': leave it out, or give on='matrices'"
            )


def update_momentum(
    gradients: PyTree, state: NonlinearMomentumState, decay: ArrayLike, average: bool, nesterov: bool
) -> tuple[PyTree, NonlinearMomentumState]:
    """(the argument of sigma, state) after one more gradient."""
    count = next_count(state.count)
    weight = 1 - decay if average else 1
    correction = lambda n: 1 - decay**n if average else 1
    add = lambda a, b: lambda m, g: bounded(a * m + b * g, m, g)
    momentum = optax.tree.cast_like(jax.tree.map(add(decay, weight), state.momentum, gradients), state.momentum)
    if nesterov:  # the factors first: a gradient over its correction may overflow
        step = add(decay / correction(next_count(count)), weight / correction(count))
        memory = jax.tree.map(step, momentum, gradients)
    else:
        memory = jax.tree.map(lambda m: bounded(m / correction(count), m), momentum)
    return memory, NonlinearMomentumState(count, momentum)


def nonlinear_momentum(
    learning_rate: optax.ScalarOrSchedule,
    nonlinearity: Callable[[Array], Array] | None = None,
    decay: ArrayLike = 0.95,
    *,
    average: bool = True,
    nesterov: bool = True,
    on: Literal["matrices", "leaves"] = "matrices",
    consistent_rms: ArrayLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    vectors: optax.GradientTransformation | None = None,
    dimension_numbers: DimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon and its relatives: `scale_by_nonlinear_momentum` with Muon's scaling, weight decay and rule for vectors.

        W <- W - learning_rate (s sigma(m) + weight_decay W)        s = sqrt(max(1, out / in)) for matrices (in, out)

    By default it is `optax.contrib.muon`. With `on="leaves"`, s is 1 and there is no other rule for vectors.

    Args:
        learning_rate: a number or a schedule.
        nonlinearity, decay, average, nesterov, on, dimension_numbers: as of `scale_by_nonlinear_momentum`.
        consistent_rms: s is sqrt(max(in, out)) times this. None: s is sqrt(max(1, out / in)).
        weight_decay: of the leaves that sigma is applied to, times the learning rate.
        weight_decay_mask: as of `optax.add_decayed_weights`.
        vectors: optimizer of leaves that are no matrices, with its learning rate. None: `optax.adamw`, as in Muon.

    Returns:
        An optimizer of parameters of any shapes; kernels are (in, out).

    Raises:
        UserError: a hyperparameter is not finite or out of range, dimension numbers do not fit a parameter, or there are
            options of matrices with `on="leaves"`.

    Source: NL Eq. 52 and 43-44; Jordan et al., Muon, 2024.

    >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
    >>> rule = nonlinear_momentum(0.1)
    >>> updates, state = rule.update(params, rule.init(params), params)
    >>> updates["kernel"].shape
    (2, 3)
    """
    check("nonlinear_momentum", learning_rate=learning_rate, weight_decay=weight_decay)
    check("nonlinear_momentum", NON_NEGATIVE, consistent_rms=0.0 if consistent_rms is None else consistent_rms)
    _check_on(on, consistent_rms=consistent_rms, vectors=vectors)
    memory = scale_by_nonlinear_momentum(
        nonlinearity, decay, average=average, nesterov=nesterov, on=on, dimension_numbers=dimension_numbers
    )
    decayed = optax.add_decayed_weights(weight_decay, weight_decay_mask)
    if on == "leaves":
        return at_rate(optax.chain(memory, decayed), learning_rate)
    return as_muon(memory, decayed, learning_rate, nesterov, consistent_rms, vectors, dimension_numbers)


def as_muon(
    rule: optax.GradientTransformation,
    weight_decay: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    nesterov: bool,
    consistent_rms: ArrayLike | None,
    vectors: optax.GradientTransformation | None,
    dimension_numbers: DimensionNumbers,
) -> optax.GradientTransformationExtraArgs:
    """A rule for matrices with Muon's scaling by shape, weight decay, learning rate, and its AdamW for other leaves."""
    if vectors is None:  # eps_root keeps the derivative at a zero gradient finite
        vectors = finite_adam(optax.adamw(learning_rate, eps_root=1e-30, weight_decay=0.0, nesterov=nesterov))
    shape = _scale_by_shape(consistent_rms, dimension_numbers)

    def labels(params):
        numbered = resolve_dimension_numbers(dimension_numbers, params)
        kinds = ["vectors" if numbers is None else "matrices" for numbers in numbered]
        return jax.tree.unflatten(jax.tree.structure(params), kinds)

    matrices = optax.chain(rule, shape, weight_decay, optax.scale_by_learning_rate(learning_rate))
    return in_float32(optax.partition({"matrices": matrices, "vectors": vectors}, labels))


def _scale_by_shape(consistent_rms: ArrayLike | None, dimension_numbers: DimensionNumbers) -> optax.GradientTransformation:
    """Muon's factor of every matrix (in, out): sqrt(max(1, out / in)), or consistent_rms sqrt(max(in, out))."""

    def factor(x):
        rows, columns = x.shape[-2:]
        return max(1.0, columns / rows) ** 0.5 if consistent_rms is None else max(rows, columns) ** 0.5 * consistent_rms

    return optax.stateless(lambda updates, _: map_matrices(lambda x: x * factor(x), dimension_numbers, updates))
