"""How arrays lie on a mesh: one table from the paths of leaves to `PartitionSpec`s.

Rows lie along fsdp and data, weights along fsdp and tensor, tokens along sequence: see `mesh.MeshShape`. A leaf with no rule
is an error, never copied to all devices unsaid.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nested_jax.errors import UserError
from nested_jax.numerics import BATCH
from nested_jax.paths import path_name
from nested_jax.typing import PyTree

if TYPE_CHECKING:
    from nested_jax.train.state import TrainState

WEIGHTS: dict[str, P] = {
    "embedding": P("tensor", "fsdp"),  # (V, D)
    "head": P("fsdp", "tensor"),  # (D, V)
    "norm": P(),  # (D,)
    "blocks/norm": P(),  # (L, D)
    "blocks/mixer/(query|key|value)": P(None, "fsdp", "tensor"),  # (L, D, D)
    "blocks/mixer/bias": P(None, None, "tensor"),  # (L, 3, D)
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
FAST: dict[str, dict[int, P]] = {
    "position|.*/(elapsed|newest|limit)": {0: P(), 1: P()},  # (), (L,)
    "(.*/)?memory/.*": dict.fromkeys((4, 5, 6), P(None, BATCH, "tensor")),  # (L, B, H, ...)
    ".*/recent": {4: P(None, BATCH)},  # (L, B, 3, D)
    ".*/(keys|values)": {5: P(None, BATCH, None, "tensor")},  # (L, B, T, H, d)
    ".*/document": {2: P(None, BATCH)},  # (L, B)
    ".*/(up|gate)": {4: P(None, BATCH, None, "tensor"), 3: P(None, "fsdp", "tensor")},  # (L, B, D, F), (L, D, F)
    ".*/down": {4: P(None, BATCH, "tensor"), 3: P(None, "tensor", "fsdp")},  # (L, B, F, D), (L, F, D)
    ".*/rule/.*count": {0: P(), 1: P(BATCH)},  # (), (B,)
    "learning/open/.*": {1: P(BATCH), 2: P(BATCH), 3: P(BATCH)},  # (B,), (B, P), (B, P, D)
}
"""Fast state, by path and number of axes: one set of weights a sequence, or of a CMS that learns one a batch."""


def weight_spec(path: str) -> P:
    """The rule of a weight.

    Raises:
        UserError: there is none.

    >>> tuple(weight_spec("blocks/mixer/out"))
    (None, 'tensor', 'fsdp')
    """
    for pattern, spec in WEIGHTS.items():
        if re.fullmatch(pattern, path):
            return spec
    raise UserError(f"parameter {path} has no rule for a mesh: add one to parallel.rules.WEIGHTS")


def fast_spec(path: str, axes: int) -> P:
    """The rule of a leaf of a model's fast state.

    Args:
        path: in `ModelState`.
        axes: how many it has.

    Raises:
        UserError: there is none.

    >>> tuple(fast_spec("mixers/memory/running/first/weights", 6))
    (None, ('fsdp', 'data'), 'tensor')
    """
    for pattern, specs in FAST.items():
        if re.fullmatch(pattern, path) and axes in specs:
            return specs[axes]
    raise UserError(f"fast state {path} of {axes} axes has no rule for a mesh: add one to parallel.rules.FAST")


def memory_spec(path: str, axes: int, weights: dict[str, int]) -> P:
    """The rule of a leaf of an optimizer's state: that of the weight whose gradients it keeps.

    Args:
        path: ends in that of the weight; of a deep momentum in that and the name of the memory's own matrix, up
            (L, in, hidden) or down (L, hidden, in).
        axes: how many it has.
        weights: the number of axes of each weight.

    Raises:
        UserError: it keeps those of no weight.

    >>> tuple(memory_spec("0/mu/blocks/mixer/out", 3, {"blocks/mixer/out": 3}))
    (None, 'tensor', 'fsdp')
    >>> tuple(memory_spec("0/memory/blocks/mixer/out/down", 3, {"blocks/mixer/out": 3}))
    (None, None, 'tensor')
    """
    if not axes:
        return P()
    parts = path.split("/")
    for start in range(len(parts)):
        weight, (last, of) = "/".join(parts[start:]), (parts[-1], "/".join(parts[start:-1]))
        if weights.get(weight) == axes:
            return weight_spec(weight)
        if weights.get(of) == axes == 3 and last in ("up", "down"):
            stack, inputs, _ = weight_spec(of)
            return P(stack, inputs) if last == "up" else P(stack, None, inputs)
    raise UserError(f"optimizer state {path} of {axes} axes is that of no parameter: add a rule to parallel.rules")


def weight_shardings(mesh: Mesh, weights: PyTree) -> PyTree:
    """A `NamedSharding` for each of a model's weights, or of their shapes.

    Raises:
        UserError: a weight has no rule, or the mesh does not divide it.

    >>> from nested_jax.parallel.mesh import MeshShape, make_mesh
    >>> weight_shardings(make_mesh(MeshShape()), {"norm": jax.numpy.ones(3)})["norm"].mesh.size
    1
    """
    return _named(mesh, weights, lambda path, leaf: weight_spec(path))


def state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
    """A `NamedSharding` for each leaf of a training state, or of its shapes. Raises UserError as `weight_shardings`."""
    weights = {path_name(path): leaf.ndim for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    piece = lambda path, leaf: P(None, *fast_spec(path, leaf.ndim - 1))  # the first axis is of the pieces of a batch
    places: dict[str, Any] = {
        "step": NamedSharding(mesh, P()),
        "params": weight_shardings(mesh, state.params),
        "optimizer": _named(mesh, state.optimizer, lambda path, leaf: memory_spec(path, leaf.ndim, weights)),
        "fast": _named(mesh, state.fast, piece),
    }
    return state._replace(**places)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """How arrays (B, ...) of a batch lie."""
    return NamedSharding(mesh, P(BATCH))


def _named(mesh: Mesh, tree: PyTree, rule: Any) -> PyTree:
    def named(path, leaf):
        spec = rule(path_name(path), leaf)
        for size, axes in zip(leaf.shape, spec, strict=False):
            for name in (axes,) if isinstance(axes, str) else axes or ():
                if size % mesh.shape[name]:
                    raise UserError(f"--mesh {name}={mesh.shape[name]} does not divide {path_name(path)} {list(leaf.shape)}")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(named, tree)
