"""Optimizers as associative memories: optax transformations."""

from nested_jax.optim._clip import clip_by_norm

__all__ = ["clip_by_norm"]
