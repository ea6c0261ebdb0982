"""Evolution strategies: meta-gradients from values alone, of whole inner loops or, without bias, of windows of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nested_jax.checks import Positive, allows, check_key
from nested_jax.errors import UserError, is_whole
from nested_jax.meta.bilevel import assert_smooth
from nested_jax.typing import Array, Float, PyTree


class Estimate(NamedTuple):
    """What evolution strategies return.

    Args:
        value: mean of the loss over the perturbed copies of meta, a scalar.
        gradient: estimate of the derivative by meta, a tree of the shapes and types of meta.
    """

    value: Float[Array, ""]
    gradient: PyTree


class Particles(NamedTuple):
    """State of `pes_grad`, for N pairs.

    Args:
        state: the inner state of every particle, leaves (2, N, ...), of either sign of the perturbation.
        perturbation: sum of each pair's perturbations over the windows since the start, of the shapes (N, ...) of meta,
            float32 or wider.
    """

    state: PyTree
    perturbation: PyTree


class PersistentES(NamedTuple):
    """What `pes_grad` returns.

    Args:
        init: (meta, state) -> `Particles`, all in the given inner state.
        update: (meta, key, particles, *others) -> (`Estimate`, `Particles`), through one window.
    """

    init: Callable[[PyTree, PyTree], Particles]
    update: Callable[..., tuple[Estimate, Particles]]


def es_grad(loss: Callable[..., Float[Array, ""]], *, scale: float = 0.01, pairs: int = 16) -> Callable[..., Estimate]:
    """The gradient of a smoothed loss from its values at pairs of opposite perturbations.

        g = 1 / (2 N scale^2) sum_i e_i (loss(meta + e_i) - loss(meta - e_i))        e_i ~ normal(0, scale^2)

    Its expectation is the gradient of E loss(meta + e), for a loss of degree two that of the loss itself. There its
    covariance is (|gradient|^2 I + gradient gradient^T) / N. No inner states are kept, and the loss need not be
    differentiable; it may for instance run an inner loop by `jax.lax.while_loop`.

    Args:
        loss: (meta, *others) -> scalar. A random key among the others is the same for all perturbations.
        scale: standard deviation of a perturbation.
        pairs: N; the loss is evaluated 2 N times, under `jax.vmap`.

    Returns:
        (meta, key, *others) -> `Estimate`, meta a pytree of floats.

    Raises:
        UserError: the scale is not positive and finite, pairs is no whole number from 1, a leaf of meta is no float, the key
            is none, or the loss is no scalar.

    Source: Salimans et al., arXiv 1703.03864.

    >>> estimate = es_grad(lambda w: jnp.sum((w - 1) ** 2), pairs=20_000)(jnp.array([2.0, 0.0]), jax.random.key(0))
    >>> print(estimate.gradient.round(1))
    [ 2. -2.]
    """
    _check("es_grad", scale, pairs)

    def estimate(meta, key, *others):
        meta = _floats("es_grad", meta)
        check_key("es_grad", key)
        noise = _noise(key, meta, scale, pairs)
        values = _over_pairs(lambda meta: loss(meta, *others))(_perturbed(meta, noise))
        return _estimate("es_grad", values, noise, meta, scale)

    return estimate


def pes_grad(
    window: Callable[..., tuple[PyTree, Float[Array, ""]]], *, scale: float = 0.01, pairs: int = 16
) -> PersistentES:
    """Persistent evolution strategies: an unbiased gradient of a long inner loop from short windows of it.

        g_w = 1 / (2 N scale^2) sum_i p_i (loss_w,i+ - loss_w,i-)        p_i = sum of e_i over the windows until w

    A pair's particles go on from window to window in states of their own, with a new e_i in each, so that their losses
    depend on all of its perturbations. The sum of g_w over the windows of an inner problem has as expectation the gradient,
    by a meta that all windows share, of the sum of their losses under independent perturbations: for losses of degree two,
    the gradient of the sum itself. `es_grad` or back-propagation of a window from a state that is a constant lacks what meta
    has done to that state. The price is variance: with the number of windows, up to its square.

    Args:
        window: (meta, state, *others) -> (state, loss), some steps of the inner loop and their loss, a scalar.
        scale: standard deviation of a perturbation.
        pairs: N; 2 N particles, under `jax.vmap`.

    Returns:
        `PersistentES`: `init` begins an inner problem, also when the last one is over; `update` is called window by window,
        and meta may be updated between.

    Raises:
        UserError: the scale is not positive and finite, pairs is no whole number from 1, a leaf of meta is no float, the key
            is none, or the loss is no scalar.

    Source: Vicol et al., arXiv 2112.13835 (PES).

    Two windows of s + rate, whose loss is s: by the rate, 1 and then 2.

    >>> pes = pes_grad(lambda rate, s: (s + rate, s + rate), pairs=20_000)
    >>> particles = pes.init(0.5, 0.0)
    >>> for key in jax.random.split(jax.random.key(0)):
    ...     estimate, particles = pes.update(0.5, key, particles)
    ...     print(estimate.value.round(2), estimate.gradient.round(1))
    0.5 1.0
    1.0 2.0
    """
    _check("pes_grad", scale, pairs)

    def init(meta, state):
        meta, state = _floats("pes_grad", meta), jax.tree.map(jnp.asarray, state)
        spread = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, pairs, *x.shape)), state)
        return Particles(spread, jax.tree.map(lambda x: jnp.zeros((pairs, *x.shape), _wide(x)), meta))

    def update(meta, key, particles, *others):
        meta = _floats("pes_grad", meta)
        check_key("pes_grad", key)
        noise = _noise(key, meta, scale, pairs)
        run = _over_pairs(lambda meta, state: window(meta, state, *others))
        state, values = run(_perturbed(meta, noise), particles.state)
        perturbation = jax.tree.map(jnp.add, particles.perturbation, noise)
        return _estimate("pes_grad", values, perturbation, meta, scale), Particles(state, perturbation)

    return PersistentES(init, update)


def _check(name: str, scale: float, pairs: int) -> None:
    if not allows(Positive, scale) or not is_whole(pairs):
        raise UserError(
            f"{name}: scale={scale!r}, pairs={pairs!r}: give a positive scale and a whole number of pairs from 1"
        )


def _floats(name: str, meta: PyTree) -> PyTree:
    meta = jax.tree.map(jnp.asarray, meta)
    assert_smooth(f"{name}: meta", meta)
    return meta


def _wide(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _noise(key: Array, meta: PyTree, scale: float, pairs: int) -> PyTree:
    leaves, structure = jax.tree.flatten(meta)
    keys = jax.random.split(key, max(1, len(leaves)))
    draw = lambda key, x: scale * jax.random.normal(key, (pairs, *x.shape), _wide(x))
    return structure.unflatten(map(draw, keys, leaves))


def _perturbed(meta: PyTree, noise: PyTree) -> PyTree:
    """meta plus and minus the noise, (2, N, ...)."""
    return jax.tree.map(lambda m, e: (m[None, None] + jnp.stack([e, -e])).astype(m.dtype), meta, noise)


def _over_pairs(function: Callable) -> Callable:
    return jax.vmap(jax.vmap(function))


def _estimate(name: str, values: Float[Array, "2 N"], perturbation: PyTree, meta: PyTree, scale: float) -> Estimate:
    if jnp.ndim(values) != 2:
        raise UserError(f"{name}: the loss has shape {list(values.shape[2:])}: give a scalar")
    values = values.astype(_wide(values))
    half = (values[0] - values[1]) / (2 * values.shape[1] * scale**2)
    gradient = jax.tree.map(lambda p, m: jnp.tensordot(half, p, 1).astype(m.dtype), perturbation, meta)
    return Estimate(values.mean(), gradient)
