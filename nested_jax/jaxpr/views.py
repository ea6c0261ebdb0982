"""Where a parameter lies in the arrays of a traced function: followed through casts, turns, reshapes and cuts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

_SAME = ("convert_element_type", "copy", "copy_p", "sharding_constraint")


class Piece(NamedTuple):
    """A factor of a parameter's axis: entries `stride` apart."""

    axis: int
    stride: int
    size: int


class Loop(NamedTuple):
    """A `lax.scan`, and what of the parameter it runs over."""

    length: int
    label: tuple[Piece, ...]


class View(NamedTuple):
    """A parameter, or a part of it, as it lies in an array."""

    parameter: int
    sizes: tuple[int, ...]  # of the parameter's axes
    ranges: tuple[tuple[int, int], ...]  # of each axis, the part that is here
    dims: tuple[tuple[Piece, ...], ...]  # of each dimension of the array
    loops: tuple[Loop, ...] = ()  # around it, the outermost first


def whole(parameter: int, shape: Sequence[int]) -> View:
    """A parameter as it is."""
    ranges, dims = zip(*(((0, n), (Piece(i, 1, n),)) for i, n in enumerate(shape)), strict=True) if shape else ((), ())
    return View(parameter, tuple(shape), ranges, dims)


def follow(eqn: JaxprEqn, view: View) -> list[View] | None:
    """The outputs of an equation that only casts, turns, reshapes or cuts what the view holds; None for any other."""
    shape, dims = aval_of(eqn.outvars[0]).shape, view.dims
    one = lambda dims: [view._replace(dims=tuple(dims))]
    match eqn.primitive.name:
        case name if name in _SAME:
            return one(dims) if inexact(eqn.outvars[0]) else None
        case "transpose":
            return one(dims[i] for i in eqn.params["permutation"])
        case "squeeze":
            return one(label for i, label in enumerate(dims) if i not in eqn.params["dimensions"])
        case "reshape" if eqn.params["dimensions"] is None and math.prod(shape):
            parts = _reshape([p for label in dims for p in label], shape)
            return one(parts) if parts is not None else None
        case "broadcast_in_dim":
            places = dict(zip(eqn.params["broadcast_dimensions"], dims, strict=True))
            same = math.prod(shape) == aval_of(eqn.invars[0]).size
            return one(places.get(i, ()) for i in range(len(shape))) if same else None
        case "slice" if set(eqn.params["strides"] or [1]) == {1}:
            cuts = zip(eqn.params["start_indices"], eqn.params["limit_indices"], strict=True)
            part: View | None = view
            for dim, (start, stop) in enumerate(cuts):
                part = part and _cut(part, dim, start, stop, aval_of(eqn.invars[0]).shape[dim])
            return [part] if part else None
        case "split":
            axis, stops = eqn.params["axis"], list(itertools.accumulate(map(int, eqn.params["sizes"])))
            return _all(_cut(view, axis, start, stop, stops[-1]) for start, stop in zip([0, *stops], stops, strict=False))
        case "unstack":
            axis, size = eqn.params["axis"], len(eqn.outvars)
            parts = _all(_cut(view, axis, i, i + 1, size) for i in range(size))
            drop = lambda part: part._replace(dims=part.dims[:axis] + part.dims[axis + 1 :])
            return [drop(part) for part in parts] if parts else None
    return None


def _all(parts: Iterable[View | None]) -> list[View] | None:
    found = [*parts]
    there = [part for part in found if part]
    return there if len(there) == len(found) else None


def _cut(view: View, dim: int, start: int, stop: int, size: int) -> View | None:
    """A part of one dimension; None where it is not one axis of the parameter."""
    if (start, stop) == (0, size):
        return view
    axes = [p.axis for label in view.dims for p in label]
    if len(view.dims[dim]) != 1 or axes.count(axis := view.dims[dim][0].axis) != 1:
        return None
    begin = view.ranges[axis][0]
    ranges, dims = list(view.ranges), list(view.dims)
    ranges[axis], dims[dim] = (begin + start, begin + stop), (Piece(axis, 1, stop - start),)
    return view._replace(ranges=tuple(ranges), dims=tuple(dims))


def _reshape(pieces: list[Piece], shape: Sequence[int]) -> list[tuple[Piece, ...]] | None:
    """The pieces, from the slowest on, dealt to dimensions of a shape; None where that would cut one unevenly."""
    dims, pieces = [], pieces[::-1]
    for size in shape:
        label, room = [], size
        while room > 1 or (size == 1 and not label and pieces and pieces[-1].size == 1):
            piece = pieces.pop()
            if room % piece.size and piece.size % room:
                return None
            if piece.size > room:
                rest = piece.size // room
                pieces.append(piece._replace(size=rest))
                piece = piece._replace(stride=piece.stride * rest, size=room)
            label.append(piece)
            room //= piece.size
        dims.append(tuple(label))
    return dims


def aval_of(v: Any) -> Any:
    """The shape and type of a variable; JAX declares less of them than arrays have."""
    return v.aval


def inexact(v: Any) -> bool:
    """Whether a variable holds real or complex numbers."""
    return jnp.issubdtype(getattr(v.aval, "dtype", jnp.int32), jnp.inexact)
