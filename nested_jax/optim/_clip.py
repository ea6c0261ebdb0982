"""Clipping by the norm, safe to differentiate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from nested_jax.numerics import upcast
from nested_jax.optim._hyperparameters import check


def clip_by_norm(largest: float) -> optax.GradientTransformation:
    """Scales a whole tree of gradients down to a norm of at most `largest`.

    As `optax.clip_by_global_norm`, with derivatives that are finite where the gradient is exactly zero.

    Raises:
        UserError: `largest` is not finite, or not above 0.

    >>> clip = clip_by_norm(1.0)
    >>> [jax.grad(lambda g: clip.update(g, clip.init(g))[0])(g).item() for g in (0.0, 0.5, 2.0)]
    [1.0, 1.0, 0.0]
    """
    check("clip_by_norm", above=0.0, largest=largest)

    def update(updates, state, params=None):
        del params
        squares = sum(jnp.sum(jnp.square(upcast(x))) for x in jax.tree.leaves(updates))
        over = squares > largest**2
        scale = jnp.where(over, largest * jax.lax.rsqrt(jnp.where(over, squares, 1.0)), 1.0)
        return jax.tree.map(lambda x: x * scale.astype(x.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)
