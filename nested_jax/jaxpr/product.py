"""A product with a parameter: which of its axes are stacked, which go in and which out, and x and y laid out by them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from nested_jax.jaxpr.views import Piece, View, aval_of
from nested_jax.typing import Array

Label = tuple[Piece, ...] | None  # what of the parameter a dimension runs over; () for none, None for a unit one to drop


class Product(NamedTuple):
    """A product of x and a parameter. Labels are of x's and of the product's dimensions, loops first."""

    view: View
    operand: int  # which operand is x
    x: tuple[Label, ...]
    y: tuple[Label, ...]
    shape: tuple[int, ...]  # of the product, loops first
    dtype: jnp.dtype

    @property
    def roles(self) -> tuple[tuple[int, ...], ...]:
        """(stacked, in, out) axes of the parameter."""
        x, y = (_axes_of(labels) for labels in (self.x, self.y))
        axes = range(len(self.view.ranges))
        stacked, rows, columns = (tuple(a for a in axes if (a in x, a in y) in role) for role in _ROLES)
        shared = {a for a in columns if rows and a < rows[0] and rows[-1] < columns[-1]}  # of layers of the same inputs
        if any(label and len({piece.axis in shared for piece in label}) > 1 for label in self.y):
            shared = set()  # they are one axis with the outputs
        return tuple(sorted({*stacked, *shared})), rows, tuple(a for a in columns if a not in shared)


def _axes_of(labels: Sequence[Label]) -> set[int]:
    return {piece.axis for label in labels for piece in label or ()}


_ROLES = (((True, True), (False, False)), ((True, False),), ((False, True),))


def product_of(eqn: JaxprEqn, given: list[View | None]) -> Product | None:
    """The product that a dot is, if one side is a parameter and every axis of it plays one part."""
    if eqn.primitive.name != "dot_general" or all(given):
        return None
    side = 0 if given[0] else 1
    kernel = given[side]
    if kernel is None:
        return None
    dims = kernel.dims
    contracted, batched = eqn.params["dimension_numbers"]
    label = lambda dim: dims[dim] or None
    x: list[Label] = [()] * aval_of(eqn.invars[1 - side]).ndim
    for theirs, ours in ((contracted[1 - side], contracted[side]), (batched[1 - side], batched[side])):
        for dim, own in zip(theirs, ours, strict=True):
            x[dim] = label(own)
    free: list[list[Label]] = [[()] * (len(x) - len(contracted[0]) - len(batched[0]))]
    free.insert(side, [label(dim) for dim in range(len(dims)) if dim not in (*contracted[side], *batched[side])])
    y = [*map(label, batched[side]), *free[0], *free[1]]
    aval, around = aval_of(eqn.outvars[0]), [loop.label for loop in kernel.loops]
    shape = (*(loop.length for loop in kernel.loops), *aval.shape)
    product = Product(kernel, 1 - side, (*around, *x), (*around, *y), shape, aval.dtype)
    return product if _sound(product) else None


def _sound(product: Product) -> bool:
    """Whether the parameter is a stack of whole matrices here, its axes and their entries in order."""
    view, (stacked, *matrix) = product.view, product.roles
    cut = {axis for axis, span in enumerate(view.ranges) if span != (0, view.sizes[axis])}
    role = lambda piece: piece.axis in stacked
    ordered = lambda pieces: sorted(pieces, key=_place) == pieces
    return (
        all(matrix)
        and cut <= set(stacked[:1])
        and all(len({role(piece) for piece in label}) == 1 for label in (*product.x, *product.y) if label)
        and all(
            ordered([piece for dim in dims for piece in labels[dim] or ()])
            for labels in (product.x, product.y)
            for dims in _order(labels, stacked)[1::2]
        )
    )


def _place(piece: Piece) -> tuple[int, int]:
    return piece.axis, -piece.stride


def _order(labels: Sequence[Label], stacked: Sequence[int]) -> tuple[list[int], ...]:
    """Dimensions that are (dropped, stacked, examples, of the matrix)."""
    first = lambda dim: _place(next(iter(labels[dim] or ())))
    own = sorted((dim for dim, label in enumerate(labels) if label), key=first)
    return (
        [dim for dim, label in enumerate(labels) if label is None],
        [dim for dim in own if first(dim)[0] in stacked],
        [dim for dim, label in enumerate(labels) if label == ()],
        [dim for dim in own if first(dim)[0] not in stacked],
    )


def arrange(product: Product, array: Array, labels: Sequence[Label]) -> Array:
    """x or the surprise of a product, as (stacked axes..., examples..., in or out); repeated along axes that it lacks."""
    stacked = product.roles[0]
    dropped, stack, examples, own = _order(labels, stacked)
    lengths = [stop - start for start, stop in (product.view.ranges[axis] for axis in stacked)]
    here, rest = _axes_of(labels), (*(array.shape[dim] for dim in examples), math.prod(array.shape[dim] for dim in own))
    once = [length if axis in here else 1 for axis, length in zip(stacked, lengths, strict=True)]
    return jnp.broadcast_to(array.transpose(*dropped, *stack, *examples, *own).reshape(*once, *rest), (*lengths, *rest))
