"""Meshes of devices: from flags or chosen, checked against what has to be divided."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from nested_jax.errors import UserError, shown


class MeshShape(NamedTuple):
    """Devices along each axis of a mesh.

    >>> str(MeshShape(fsdp=8, tensor=2))
    'fsdp=8,tensor=2'
    """

    data: int = 1
    """Groups of rows; each holds all weights."""
    fsdp: int = 1
    """Groups of rows within those of data; each holds a part of every weight, gathered where it is used."""
    tensor: int = 1
    """Groups of heads, of hidden units and of the vocabulary."""
    sequence: int = 1
    """Pieces of a sequence."""

    def __str__(self) -> str:
        return ",".join(f"{name}={n}" for name, n in self._asdict().items() if n > 1) or "data=1"


class Divided(NamedTuple):
    """What the axes of a mesh divide: data times fsdp the rows, fsdp the width, tensor the heads, hidden units and
    vocabulary, sequence the tokens."""

    rows: int
    width: int
    tensor: tuple[int, ...]
    """Heads, hidden units, vocabulary."""
    tokens: int

    def by(self, shape: MeshShape) -> bool:
        """Whether a mesh divides it.

        >>> sizes = Divided(rows=8, width=128, tensor=(4, 280, 1024), tokens=512)
        >>> sizes.by(MeshShape(data=2, fsdp=4)), sizes.by(MeshShape(tensor=8))
        (True, False)
        """
        rows, sizes = shape.data * shape.fsdp, (self.width, *self.tensor, self.tokens)
        by = (shape.fsdp, *(shape.tensor for _ in self.tensor), shape.sequence)
        return not self.rows % rows and not any(size % n for size, n in zip(sizes, by, strict=True))


def parse(text: str) -> MeshShape:
    """The shape that a flag gives.

    Raises:
        UserError: it is not of the form data=2,fsdp=4.

    >>> parse("data=2,fsdp=4")
    MeshShape(data=2, fsdp=4, tensor=1, sequence=1)
    """
    found = [re.fullmatch(r"\s*(\w+)=([1-9]\d{0,8})\s*", part) for part in text.split(",")]
    names = [match[1] for match in found if match]
    if len(names) < len(found) or len({*names}) < len(names) or not {*names} <= {*MeshShape._fields}:
        axes = ", ".join(MeshShape._fields)
        raise UserError(f"--mesh {shown(text)}: give sizes of some of {axes}, each once, such as data=2,fsdp=4")
    return MeshShape(**{match[1]: int(match[2]) for match in found if match})


def choose(text: str | None, devices: int, divided: Divided, *, slices: int = 1) -> MeshShape:
    """The shape that a flag gives, or without one as many devices as divide the rows: data across the slices, and in them
    fsdp if it divides the width.

    Args:
        text: the flag's value, or None.
        devices: how many there are.
        divided: what the mesh has to divide.
        slices: that the devices are of.

    Returns:
        The shape, of these devices or fewer.

    Raises:
        UserError: the flag's shape is of more devices, or does not divide.

    >>> sizes = Divided(rows=8, width=128, tensor=(4, 280, 1024), tokens=512)
    >>> choose(None, 6, sizes)
    MeshShape(data=1, fsdp=4, tensor=1, sequence=1)
    >>> choose("data=2,fsdp=4", 4, sizes)
    Traceback (most recent call last):
    nested_jax.errors.UserError: --mesh data=2,fsdp=4 is 8 devices, there are 4: give fsdp=4
    """
    if text is None:
        rows = [MeshShape(n // fsdp, fsdp) for n in range(1, devices + 1) for fsdp in range(1, n + 1) if not n % fsdp]
        whole = lambda one: math.prod(one) <= devices // slices or (math.prod(one) == devices and not one.data % slices)
        return max(filter(whole, filter(divided.by, rows)), key=lambda one: (math.prod(one), one.fsdp))
    shape = parse(text)
    if math.prod(shape) <= devices and divided.by(shape):
        return shape
    if math.prod(shape) > devices:
        fault = f"is {math.prod(shape)} devices, there are {devices}"
    else:
        sizes = f"{divided.rows} rows (data, fsdp), a width of {divided.width} (fsdp), "
        sizes += f"{', '.join(map(str, divided.tensor))} heads, hidden units and vocabulary (tensor) "
        fault = f"does not divide {sizes}and {divided.tokens} tokens (sequence)"
    far = lambda one: (sum(abs(math.log(a / b)) for a, b in zip(one, shape, strict=True)), one.sequence, one.tensor)
    fitting = ([one for one in _shapes(n) if divided.by(one)] for n in range(devices, 0, -1))  # one device always fits
    raise UserError(f"--mesh {shape} {fault}: give {min(next(filter(None, fitting)), key=far)}")


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh whose axes lie as the devices are wired: tensor and sequence on neighbours, data across slices.

    Args:
        shape: devices along each axis; data is a multiple of the number of slices.
        devices: as many, or more; None: all there are.

    Returns:
        The mesh, of axes data, fsdp, tensor, sequence.

    Raises:
        UserError: there are not so many devices, or they or data do not divide into the slices.

    >>> make_mesh(MeshShape()).axis_names
    ('data', 'fsdp', 'tensor', 'sequence')
    """
    devices, count = list(jax.devices() if devices is None else devices), math.prod(shape)
    if count > len(devices):
        raise UserError(f"mesh {shape} is {count} devices, there are {len(devices)}: give a smaller one")
    each, kinds = _by_slice(devices[:count]), (AxisType.Auto,) * len(shape)
    if (slices := len(each)) == 1:
        try:
            laid = mesh_utils.create_device_mesh(shape, devices[:count], allow_split_physical_axes=True)
        except AssertionError:  # chips that are no box, such as three of four: as they are numbered
            laid = np.asarray(devices[:count]).reshape(shape)
        return Mesh(laid, MeshShape._fields, axis_types=kinds)
    if len({*each.values()}) > 1:
        sizes = " and ".join(map(str, each.values()))
        raise UserError(f"mesh {shape} takes {sizes} devices of {slices} slices: give one that takes all, or those of one")
    if shape.data % slices:
        raise UserError(f"mesh {shape} on {slices} slices: give a multiple of {slices} as data")
    inner, outer = shape._replace(data=shape.data // slices), MeshShape(data=slices)
    laid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices[:count], allow_split_physical_axes=True)
    return Mesh(np.asarray(laid), MeshShape._fields, axis_types=kinds)


def slices_of(devices: Sequence[Any]) -> int:
    """How many slices of a pod devices are of."""
    return len(_by_slice(devices))


def _by_slice(devices: Sequence[Any]) -> Counter[int]:
    """How many devices are of each slice."""
    return Counter(getattr(device, "slice_index", 0) for device in devices)


def _shapes(devices: int) -> list[MeshShape]:
    """All meshes of so many devices."""
    divisors = [n for n in range(1, devices + 1) if not devices % n]
    sizes = [(n, devices // math.prod(n)) for n in itertools.product(divisors, repeat=3) if not devices % math.prod(n)]
    return [MeshShape(data, fsdp, tensor, sequence) for (data, fsdp, tensor), sequence in sizes]
