"""Continuum Memory System: MLP blocks, each of which learns from the task loss while reading, at a period of its own.

`chain`: configuration, weights and one block's output. `in_context`: learning as a nest of levels. `reader`: the state of
reading, and calls of any length. `reference`: the same as a plain loop.
"""

from nested_jax.cms.chain import MATRICES, CMSConfig, apply, init_weights
from nested_jax.cms.in_context import Emitted, FastWeights, Segment, fast_weights, inner_rule, nest_levels

__all__ = [
    "MATRICES",
    "CMSConfig",
    "Emitted",
    "FastWeights",
    "Segment",
    "apply",
    "fast_weights",
    "init_weights",
    "inner_rule",
    "nest_levels",
]
