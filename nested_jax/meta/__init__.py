"""Differentiate through inner loops."""

from nested_jax.meta.mixflow import mixflow_grad
from nested_jax.meta.unrolling import unroll

__all__ = ["mixflow_grad", "unroll"]
