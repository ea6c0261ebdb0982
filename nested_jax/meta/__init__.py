"""Differentiate through inner loops."""

from nested_jax.meta.bilevel import Descent, descent, maml
from nested_jax.meta.hypergradients import Hypergradient, hypergradient
from nested_jax.meta.mixflow import mixflow_grad
from nested_jax.meta.unrolling import unroll

__all__ = ["Descent", "Hypergradient", "descent", "hypergradient", "maml", "mixflow_grad", "unroll"]
