"""Which parameters are matrices, and along which axes: the dimension numbers of optax's Muon, looked up by path."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from nested_jax.errors import UserError
from nested_jax.typing import Array, PyTree

DimensionNumbers = PyTree | Callable[[PyTree], PyTree] | None


def matrices(*patterns: str) -> Callable[[PyTree], PyTree]:
    """Dimension numbers by path: a leaf whose path ends in a match is (..., in, out), leading axes stacked.

    For `dimension_numbers` here and `muon_weight_dimension_numbers` of `optax.contrib.muon`, which by default would take
    layer-stacked kernels (L, in, out) for vectors and layer-stacked scales (L, D) for matrices.

    Args:
        patterns: regular expressions of the last parts of paths such as "blocks/cms/level1/up".

    Returns:
        params -> tree of `MuonDimensionNumbers(-2, -1)` where a pattern matches and None elsewhere.

    >>> params = {"blocks": {"up": jnp.ones((3, 4, 8)), "norm": jnp.ones((3, 4))}}
    >>> matrices("up", "down")(params)
    {'blocks': {'norm': None, 'up': MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)}}
    """
    pattern = re.compile("|".join(f"(?:^|/)(?:{p})$" for p in patterns))
    number = lambda path, leaf: MuonDimensionNumbers(-2, -1) if pattern.search(path_name(path)) else None
    return lambda params: jax.tree_util.tree_map_with_path(number, params)


def path_name(path: Sequence) -> str:
    """A leaf's path as users write it, also in the state of an `nnx.Module`, whose leaves are `.value` of variables."""
    path = path[:-1] if path and path[-1] == jax.tree_util.GetAttrKey("value") else path
    return jax.tree_util.keystr(path, simple=True, separator="/")


def masked(tree: PyTree) -> Callable[[str], bool]:
    """Whether a path, as users write it, lies where `optax.masked` or `optax.partition` took out a leaf or a subtree."""
    ends = lambda x: isinstance(x, optax.MaskedNode)
    found = [path_name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=ends) if ends(leaf)]
    return lambda path: any(hole in ("", path) or path.startswith(f"{hole}/") for hole in found)


def resolve(dimension_numbers: DimensionNumbers, tree: PyTree) -> list[MuonDimensionNumbers | None]:
    """Of every leaf of the tree, None for one that is no matrix.

    Raises UserError, naming the leaf, where numbers are missing or do not fit.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if dimension_numbers is None:
        return [MuonDimensionNumbers(0, 1) if leaf.ndim == 2 else None for _, leaf in leaves]
    given = dimension_numbers(tree) if callable(dimension_numbers) else dimension_numbers
    ends = lambda x: x is None or isinstance(x, MuonDimensionNumbers)
    table = dict(jax.tree_util.tree_leaves_with_path(given, is_leaf=ends))
    found = []
    for path, leaf in leaves:
        prefix = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in table), None)
        if prefix is None:
            raise UserError(
                f"dimension_numbers say nothing of parameter {path_name(path)}: give axes, or None for no matrix"
            )
        numbers = table[prefix]
        if numbers is not None:
            _check(path_name(path), leaf, numbers)
        found.append(numbers)
    return found


def _check(path: str, leaf: Array, numbers: MuonDimensionNumbers) -> None:
    used = [axis for group in numbers for axis in _axes(group)]
    if any(not -leaf.ndim <= axis < leaf.ndim for axis in used) or len({axis % leaf.ndim for axis in used}) < len(used):
        raise UserError(
            f"dimension_numbers of parameter {path} do not fit its shape {list(leaf.shape)}: reduction_axis "
            f"{numbers.reduction_axis}, output_axis {numbers.output_axis}"
        )


def _axes(group: int | Sequence[int]) -> tuple[int, ...]:
    return (group,) if isinstance(group, int) else tuple(group)


def as_matrices(x: Array, numbers: MuonDimensionNumbers) -> Array:
    """(..., in, out), stacked axes first in their order."""
    rows, columns = ([axis % x.ndim for axis in _axes(group)] for group in numbers)
    stacked = [axis for axis in range(x.ndim) if axis not in rows + columns]
    size = lambda axes: math.prod(x.shape[axis] for axis in axes)
    moved = jnp.transpose(x, stacked + rows + columns)
    return moved.reshape(*(x.shape[axis] for axis in stacked), size(rows), size(columns))


def from_matrices(matrix: Array, numbers: MuonDimensionNumbers, shape: Sequence[int]) -> Array:
    """Inverse of `as_matrices`."""
    rows, columns = ([axis % len(shape) for axis in _axes(group)] for group in numbers)
    order = [axis for axis in range(len(shape)) if axis not in rows + columns] + rows + columns
    moved = matrix.reshape([shape[axis] for axis in order])
    return jnp.transpose(moved, [order.index(axis) for axis in range(len(shape))])


def assert_matrices(rule: str, dimension_numbers: DimensionNumbers, tree: PyTree) -> None:
    """Raises UserError, naming the leaf, where one is no matrix. `rule` is what cannot take it, in words."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), numbers in zip(leaves, resolve(dimension_numbers, tree), strict=True):
        if numbers is None:
            raise UserError(
                f"{rule} is for matrices and parameter {path_name(path)} of shape {list(leaf.shape)} is none: give its "
                f"dimension_numbers, or another rule for it by optax.partition"
            )


def map_matrices(
    function: Callable, dimension_numbers: DimensionNumbers, *trees: PyTree, vectors: Callable | None = None, rule: str = ""
) -> PyTree:
    """`function` of every matrix, as (..., in, out), and of what other trees hold for it; `vectors` of other leaves.

    Raises UserError, naming the leaf, where there are other leaves and no `vectors`.
    """
    if vectors is None:
        assert_matrices(rule, dimension_numbers, trees[0])
    structure = jax.tree.structure(trees[0])
    columns = [jax.tree.leaves(tree) for tree in trees]
    results = []
    for numbers, *leaves in zip(resolve(dimension_numbers, trees[0]), *columns, strict=True):
        if numbers is not None:
            turned = function(*[as_matrices(leaf, numbers) for leaf in leaves])
            results.append(from_matrices(turned, numbers, leaves[0].shape))
        else:
            results.append(vectors(*leaves))
    return structure.unflatten(results)
