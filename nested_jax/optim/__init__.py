"""Optimizers as associative memories: optax transformations."""

from nested_jax.optim._clip import clip_by_norm
from nested_jax.optim._newton_schulz import newton_schulz

__all__ = ["clip_by_norm", "newton_schulz"]
