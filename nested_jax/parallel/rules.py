"""How arrays lie on a mesh: one table from the paths of leaves to `PartitionSpec`s.

Axes of a mesh: data, copies of the model that each see some of the batch; fsdp, the same, but the weights are split too and
gathered where they are used; tensor, heads and hidden units; sequence, tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nested_jax.errors import UserError
from nested_jax.paths import path_name
from nested_jax.typing import PyTree

BATCH = ("data", "fsdp")
WEIGHTS: dict[str, P] = {
    "embedding": P("tensor", "fsdp"),  # (V, D)
    "head": P("fsdp", "tensor"),  # (D, V)
    "norm": P(),  # (D,)
    "blocks/norm": P(),  # (L, D)
    "blocks/mixer/(query|key|value)": P(None, "fsdp", "tensor"),  # (L, D, D)
    "blocks/mixer/out": P(None, "tensor", "fsdp"),  # (L, D, D)
    "blocks/mixer/(gates|momentum)": P(None, "fsdp"),  # (L, D, n H)
    "blocks/mixer/(gates|momentum)_bias": P(),  # (L, n H)
    "blocks/mixer/(rate|retention|norm)": P(None, "tensor"),  # (L, H, ...)
    "blocks/mixer/(rate|retention)_bias": P(None, "tensor"),  # (L, H, ...)
    "blocks/mixer/start(/first|/second)?": P(None, "tensor"),  # (L, H, ...)
    "blocks/mixer/taps": P(),  # (L, 4, D)
    "blocks/cms/mix": P(),  # (L, N)
    r"blocks/cms/level\d+/(norm|rate)": P(),  # (L, D), (L,)
    r"blocks/cms/level\d+/(up|gate)": P(None, "fsdp", "tensor"),  # (L, D, F)
    r"blocks/cms/level\d+/down": P(None, "tensor", "fsdp"),  # (L, F, D)
}
"""Slow weights, by path; L blocks are stacked."""


def spec_of(path: str) -> P:
    """The rule of a weight.

    Raises:
        UserError: there is none.

    >>> spec_of("blocks/mixer/out")
    PartitionSpec(None, 'tensor', 'fsdp')
    """
    for pattern, spec in WEIGHTS.items():
        if re.fullmatch(pattern, path):
            return spec
    raise UserError(f"parameter {path} has no rule for a mesh: add one to parallel.rules.WEIGHTS")


def weight_shardings(mesh: Mesh, weights: PyTree) -> PyTree:
    """A `NamedSharding` for each of a model's weights, or of their shapes.

    Raises:
        UserError: a weight has no rule, or an axis of the mesh does not divide it.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _named(mesh, path_name(path), leaf, spec_of(path_name(path))), weights)


def _named(mesh: Mesh, path: str, leaf: Any, spec: P) -> NamedSharding:
    for size, axes in zip(leaf.shape, spec, strict=False):
        names: Sequence[str] = () if axes is None else (axes,) if isinstance(axes, str) else axes
        for name in names:
            if size % mesh.shape[name]:
                raise UserError(f"--mesh {name}={mesh.shape[name]} does not divide {size} of {path} {list(leaf.shape)}")
    return NamedSharding(mesh, spec)
