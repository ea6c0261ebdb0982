"""Differentiate through inner loops. recipes.md has short examples of common studies."""

from nested_jax.meta.bilevel import Descent, descent, maml
from nested_jax.meta.evolution import Estimate, Particles, PersistentES, es_grad, pes_grad
from nested_jax.meta.hypergradients import Hypergradient, hypergradient
from nested_jax.meta.mixflow import mixflow_grad
from nested_jax.meta.unrolling import unroll

__all__ = [
    "Descent",
    "Estimate",
    "Hypergradient",
    "Particles",
    "PersistentES",
    "descent",
    "es_grad",
    "hypergradient",
    "maml",
    "mixflow_grad",
    "pes_grad",
    "unroll",
]
