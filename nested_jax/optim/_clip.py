"""Clipping by the global norm, with finite derivatives at zero."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from nested_jax.numerics import safe_sqrt, upcast
from nested_jax.optim._hyperparameters import POSITIVE, check


def clip_by_norm(max_norm: ArrayLike) -> optax.GradientTransformation:
    """Scales a whole tree of gradients down to a norm of at most `max_norm`.

        g <- g min(1, max_norm / |g|)

    As `optax.clip_by_global_norm`, with derivatives that are finite where the gradient is exactly zero.

    Args:
        max_norm: the largest Euclidean norm of the tree, above 0.

    Returns:
        A transformation of gradients of any shapes, without state.

    Raises:
        UserError: `max_norm` is not finite, or not above 0.

    Source: Pascanu et al., arXiv 1211.5063; `optax.clip_by_global_norm`.

    >>> import jax
    >>> clip = clip_by_norm(1.0)
    >>> [jax.grad(lambda g: clip.update(g, clip.init(g))[0])(g).item() for g in (0.0, 0.5, 2.0)]
    [1.0, 1.0, 0.0]
    """
    check("clip_by_norm", POSITIVE, max_norm=max_norm)

    def update(updates, state, params=None):
        del params
        norm = safe_sqrt(jnp.asarray(optax.tree.norm(upcast(updates), squared=True)))
        over = norm > max_norm
        scale = jnp.where(over, max_norm / jnp.where(over, norm, 1.0), 1.0)
        return optax.tree.cast_like(optax.tree.scale(scale, updates), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)
