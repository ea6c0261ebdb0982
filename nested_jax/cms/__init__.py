"""Continuum Memory System: MLP blocks, each of which learns from the task loss while reading, at a period of its own.

`chain`: configuration, weights and one block's output. `in_context`: learning as a nest of levels. `reader`: the state of
reading, and calls of any length. `reference`: the same as a plain loop.
"""

from nested_jax.cms.chain import MATRICES, CMSConfig, apply, init_weights
from nested_jax.cms.in_context import Emitted, FastWeights, Segment, SegmentState, fast_weights, inner_rule, nest_levels
from nested_jax.cms.reader import InContext, OpenSegment, Reader

__all__ = [
    "MATRICES",
    "CMSConfig",
    "Emitted",
    "FastWeights",
    "InContext",
    "OpenSegment",
    "Reader",
    "Segment",
    "SegmentState",
    "apply",
    "fast_weights",
    "init_weights",
    "inner_rule",
    "nest_levels",
]
