"""Paths of parameters, and which parameters are matrices along which axes: the dimension numbers of optax's Muon."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from nested_jax.errors import UserError
from nested_jax.typing import Array, Float, PyTree

DimensionNumbers = PyTree | Callable[[PyTree], PyTree] | None


def matrices(*patterns: str) -> Callable[[PyTree], PyTree]:
    """Dimension numbers by path: a leaf whose path ends in a match is a stack of matrices (..., in, out).

        leaf (..., in, out)  ->  MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)        others -> None

    For `dimension_numbers` here and for `muon_weight_dimension_numbers` of `optax.contrib.muon`, whose default takes
    layer-stacked kernels (L, in, out) for vectors and layer-stacked scales (L, D) for matrices.

    Args:
        patterns: regular expressions for the last parts of paths such as "blocks/cms/level1/up"; each matches some leaf.

    Returns:
        params -> a tree of their structure with `MuonDimensionNumbers(-2, -1)` where a pattern matches and None elsewhere.
        It raises a UserError for a pattern that matches no leaf, unless `optax.masked` or `optax.partition` hides some.

    Raises:
        UserError: there is no pattern, or one is no regular expression.

    Source: Jordan et al., Muon, 2024; `optax.contrib.MuonDimensionNumbers`.

    >>> params = {"blocks": {"up": jnp.ones((3, 4, 8)), "norm": jnp.ones((3, 4))}}
    >>> matrices("up|down")(params)
    {'blocks': {'norm': None, 'up': MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)}}
    """
    if not patterns:
        raise UserError('matrices: no pattern: give some, such as matrices("blocks/up")')
    expressions = {pattern: _expression(pattern) for pattern in patterns}

    def numbers(path, leaf):
        return MuonDimensionNumbers(-2, -1) if any(e.search(path_name(path)) for e in expressions.values()) else None

    def dimension_numbers(params):
        if isinstance(params, jax.Array) and params.ndim == 0 and jnp.issubdtype(params.dtype, jnp.integer):
            raise UserError("matrices: called with a number: in optax.inject_hyperparams name the argument in static_args")
        is_masked = lambda x: isinstance(x, optax.MaskedNode)
        leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_masked)
        if leaves and not any(is_masked(leaf) for _, leaf in leaves):
            names = [path_name(path) for path, _ in leaves]
            for pattern, expression in expressions.items():
                if not any(map(expression.search, names)):
                    near = difflib.get_close_matches(pattern, names, 3, 0.3) or names[:3]
                    raise UserError(f"matrices: {pattern!r} matches no parameter: give paths such as {', '.join(near)}")
        return jax.tree_util.tree_map_with_path(numbers, params)

    return dimension_numbers


def _expression(pattern: str) -> re.Pattern:
    if not isinstance(pattern, str):
        raise UserError(f"matrices: {pattern!r} is no pattern: give strings such as 'blocks/up'")
    try:
        return re.compile(f"(?:^|/)(?:{pattern})$")
    except re.error as error:
        raise UserError(f"matrices: {pattern!r} is no regular expression ({error}): give one such as 'blocks/up'") from None


def path_name(path: Sequence[Any]) -> str:
    """The path of a leaf as a string: the names of its keys, joined by "/".

    Args:
        path: a key path of `jax.tree_util`. A last key `.value`, of a variable in the state of an `nnx.Module`, is left out.

    Returns:
        The path, "" for a tree that is one leaf.

    Source: `jax.tree_util.keystr`.

    >>> [(path, _)] = jax.tree_util.tree_leaves_with_path({"dense": {"kernel": 0}})
    >>> path_name(path)
    'dense/kernel'
    """
    path = path[:-1] if path and path[-1] == jax.tree_util.GetAttrKey("value") else path
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def is_masked(tree: PyTree, path: str) -> bool:
    """Whether `optax.masked` or `optax.partition` replaced the leaf at a path, or a subtree around it, by a MaskedNode.

    Args:
        tree: parameters or gradients as an inner transformation of `optax.masked` receives them.
        path: the leaf's path, as of `path_name`.

    Returns:
        True where a `MaskedNode` is at the path or above it.

    Source: `optax.MaskedNode`.

    >>> tree = {"dense": optax.MaskedNode(), "scale": jnp.ones(())}
    >>> is_masked(tree, "dense/kernel"), is_masked(tree, "scale")
    (True, False)
    """
    is_node = lambda x: isinstance(x, optax.MaskedNode)
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_node)
    masked = [path_name(at) for at, leaf in leaves if is_node(leaf)]
    return any(at in ("", path) or path.startswith(f"{at}/") for at in masked)


def resolve_dimension_numbers(dimension_numbers: DimensionNumbers, tree: PyTree) -> list[MuonDimensionNumbers | None]:
    """The dimension numbers of every leaf, from any form in which a user may give them.

    Args:
        dimension_numbers: a tree like the parameters, or a prefix of it, of `MuonDimensionNumbers` and of None for what is
            no matrix; a function of the parameters that returns such a tree; or None for the default: leaves of two axes
            are matrices (in, out).
        tree: parameters, gradients or their shapes.

    Returns:
        A list in the order of `jax.tree.leaves(tree)`, None for a leaf that is no matrix.

    Raises:
        UserError: a leaf has no entry, or axes that do not fit its shape.

    Source: `optax.contrib.muon`, `muon_weight_dimension_numbers`.

    >>> resolve_dimension_numbers(None, {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))})
    [None, MuonDimensionNumbers(reduction_axis=0, output_axis=1)]
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if dimension_numbers is None:
        return [MuonDimensionNumbers(0, 1) if leaf.ndim == 2 else None for _, leaf in leaves]
    given = dimension_numbers(tree) if callable(dimension_numbers) else dimension_numbers
    is_entry = lambda x: x is None or isinstance(x, MuonDimensionNumbers)
    entries = dict(jax.tree_util.tree_leaves_with_path(given, is_leaf=is_entry))
    resolved = []
    for path, leaf in leaves:
        prefix = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in entries), None)
        if prefix is None:
            raise UserError(f"dimension_numbers lack parameter {path_name(path)}: give its axes, or None for no matrix")
        numbers = entries[prefix]
        if not is_entry(numbers):
            raise UserError(
                f"dimension_numbers of parameter {path_name(path)} are {numbers!r}: give optax.contrib.MuonDimensionNumbers "
                f"or None, and in optax.inject_hyperparams name the argument in static_args"
            )
        if numbers is not None:
            _check_axes(path_name(path), leaf, numbers)
        resolved.append(numbers)
    return resolved


def _check_axes(path: str, leaf: Array, numbers: MuonDimensionNumbers) -> None:
    axes = [axis for group in numbers for axis in _axes(group)]
    if any(not -leaf.ndim <= axis < leaf.ndim for axis in axes) or len({axis % leaf.ndim for axis in axes}) < len(axes):
        raise UserError(
            f"dimension_numbers of parameter {path} do not fit its shape {list(leaf.shape)}: reduction_axis "
            f"{numbers.reduction_axis}, output_axis {numbers.output_axis}"
        )


def _axes(group: int | Sequence[int]) -> tuple[int, ...]:
    return (group,) if isinstance(group, int) else tuple(group)


def as_matrices(x: Array, numbers: MuonDimensionNumbers) -> Float[Array, "*stack N M"]:
    """A leaf as a stack of matrices (..., in, out).

    Args:
        x: a leaf of any shape.
        numbers: its reduction axes, flattened to `in`, and its output axes, flattened to `out`.

    Returns:
        (..., in, out), the other axes first, in their order.

    Source: `optax.contrib.muon`, its reshape for dimension numbers.

    >>> as_matrices(jnp.ones((3, 2, 4, 5)), MuonDimensionNumbers(reduction_axis=(3, 0), output_axis=2)).shape
    (2, 15, 4)
    """
    rows, columns = ([axis % x.ndim for axis in _axes(group)] for group in numbers)
    stacked = [axis for axis in range(x.ndim) if axis not in rows + columns]
    size = lambda axes: math.prod(x.shape[axis] for axis in axes)
    moved = jnp.transpose(x, stacked + rows + columns)
    return moved.reshape(*(x.shape[axis] for axis in stacked), size(rows), size(columns))


def from_matrices(matrix: Float[Array, "*stack N M"], numbers: MuonDimensionNumbers, shape: Sequence[int]) -> Array:
    """The leaf that `as_matrices` turned into matrices: its inverse.

    Args:
        matrix: (..., in, out).
        numbers: the leaf's dimension numbers.
        shape: the leaf's shape.

    Returns:
        An array of that shape.

    Source: `optax.contrib.muon`, its reshape for dimension numbers.

    >>> from_matrices(jnp.ones((2, 15, 4)), MuonDimensionNumbers((3, 0), 2), (3, 2, 4, 5)).shape
    (3, 2, 4, 5)
    """
    rows, columns = ([axis % len(shape) for axis in _axes(group)] for group in numbers)
    order = [axis for axis in range(len(shape)) if axis not in rows + columns] + rows + columns
    moved = matrix.reshape([shape[axis] for axis in order])
    return jnp.transpose(moved, [order.index(axis) for axis in range(len(shape))])


def assert_matrices(rule: str, dimension_numbers: DimensionNumbers, tree: PyTree) -> None:
    """Checks that every leaf is a matrix.

    Args:
        rule: name of the rule that takes matrices only, for the error.
        dimension_numbers: as of `resolve_dimension_numbers`.
        tree: parameters, gradients or their shapes.

    Raises:
        UserError: a leaf is no matrix; the error has its path and shape.

    >>> assert_matrices("m3", None, {"bias": jnp.ones(3)})
    Traceback (most recent call last):
    nested_jax.errors.UserError: m3 is for matrices and parameter bias of shape [3] is none: give its dimension_numbers, or \
another rule for it by optax.partition
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), numbers in zip(leaves, resolve_dimension_numbers(dimension_numbers, tree), strict=True):
        if numbers is None:
            raise UserError(
                f"{rule} is for matrices and parameter {path_name(path)} of shape {list(leaf.shape)} is none: give its "
                f"dimension_numbers, or another rule for it by optax.partition"
            )


def map_matrices(
    function: Callable[..., Array],
    dimension_numbers: DimensionNumbers,
    *trees: PyTree,
    vectors: Callable[..., Array] | None = None,
    rule: str = "",
) -> PyTree:
    """`jax.tree.map` over matrices (..., in, out), with another function for other leaves.

    Args:
        function: of one matrix from every tree; it returns one of the same shape. A leaf of no size stays as it is.
        dimension_numbers: as of `resolve_dimension_numbers`, of the first tree.
        trees: trees of one structure and of equal shapes.
        vectors: function of a leaf that is no matrix, from every tree; None where there must be none.
        rule: name of the rule, for the error.

    Returns:
        A tree of the results, in the leaves' own shapes.

    Raises:
        UserError: a leaf is no matrix and there is no `vectors`, or its dimension numbers do not fit.

    Source: `optax.contrib.muon`, its reshape for dimension numbers.

    >>> tree = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    >>> jax.tree.map(float, jax.tree.map(jnp.sum, map_matrices(lambda x: 2 * x, None, tree, vectors=jnp.negative)))
    {'bias': -3.0, 'kernel': 12.0}
    """
    if vectors is None:
        assert_matrices(rule, dimension_numbers, trees[0])
    structure = jax.tree.structure(trees[0])
    columns = [jax.tree.leaves(tree) for tree in trees]
    results = []
    for numbers, *leaves in zip(resolve_dimension_numbers(dimension_numbers, trees[0]), *columns, strict=True):
        if numbers is not None and leaves[0].size == 0:
            results.append(leaves[0])
        elif numbers is not None:
            result = function(*[as_matrices(leaf, numbers) for leaf in leaves])
            results.append(from_matrices(result, numbers, leaves[0].shape))
        elif vectors is not None:
            results.append(vectors(*leaves))
    return structure.unflatten(results)
