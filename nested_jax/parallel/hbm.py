"""What a compiled program has in a chip's large memory, HBM: arrays as they lie there in tiles, and bytes to and fro.

A TPU lays arrays in tiles, such as 8 x 128 of float32: 64 columns take the room of 128. What its layout calls memory space 0
is HBM; the compiler keeps what it can in VMEM.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from nested_jax.parallel.hlo import Instruction, Program, called_by, runs, size_of, trips

_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "opt-barrier"}
_NO_WORK = ('"AllocateBuffer"', '"ConcatBitcast"', '"AssumeGatherIndicesInBound"')
_CALLS = {"while", "conditional", "call"}
_UNDER_WAY = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}
"""What a fusion may have a part of, that goes on meanwhile, and hand on whole: its bytes are among those that are sent."""


class Laid(NamedTuple):
    """An array in memory."""

    shape: str
    """As printed, without its layout."""
    bytes: int
    """Of its numbers."""
    padded: int
    """With what fills its tiles up."""
    in_hbm: bool


def arrays(shapes: str) -> list[Laid]:
    """Arrays as printed.

    >>> [one] = arrays("f32[6,64,64]{2,1,0:T(8,128)}")
    >>> one.bytes, one.padded, one.in_hbm
    (98304, 196608, True)
    >>> arrays("bf16[8,64]{1,0:T(8,128)(2,1)S(1)}")[0].in_hbm
    False
    """
    found = []
    for kind, sizes, order, layout in _ARRAY.findall(shapes):
        shape = f"{kind}[{sizes}]"
        dims, tile = [[int(n) for n in text.split(",") if n] for text in (sizes, _first(r"T\(([\d,]+)\)", layout))]
        minor = [dims[int(axis)] for axis in order.split(",") if axis] or dims[::-1]  # from the axis whose entries adjoin
        full = [-(-n // t) * t for n, t in zip(minor, tile[::-1], strict=False)]
        numbers, laid = math.prod(dims), math.prod(full + minor[len(full) :])
        size = size_of(shape)
        found.append(Laid(shape, size, size * laid // max(numbers, 1), "S(" not in layout or "S(0)" in layout))
    return found


def carried(program: Program) -> list[tuple[int, Laid, int]]:
    """(loop's turns, array, how many) that loops carry a slice a turn of: what they make, read, or keep for a backward pass.

    The most padded bytes in HBM first; of loops that carry alike arrays the one with the most.
    """
    most: Counter[tuple[int, Laid]] = Counter()
    for line in (line for lines in program.computations.values() for line in lines if line.opcode == "while"):
        turns = trips(program, line)
        stacked = [one for one in arrays(line.shapes) if one.in_hbm and re.search(rf"\[{turns}[,\]]", one.shape)]
        for laid, count in Counter(stacked).items():
            most[turns, laid] = max(most[turns, laid], count)
    found = [(turns, laid, count) for (turns, laid), count in most.items() if turns > 1]
    return sorted(found, key=lambda one: -one[1].padded * one[2])


def traffic(program: Program) -> int:
    """Bytes to and from HBM in a run of a program: of each instruction the arrays there once, of a slice its part."""
    every = [line for lines in program.computations.values() for line in lines]
    inside = {name for line in every if line.opcode not in _CALLS for name in called_by(line)}  # of fusions
    total = 0
    for name in (counts := runs(program)):
        if name not in inside:
            lines = {line.name: line for line in program.computations[name]}
            total += counts[name] * sum(_moved(program, lines, line) for line in lines.values())
    return total


def _moved(program: Program, lines: dict[str, Instruction], line: Instruction) -> int:
    """Bytes that an instruction reads and writes in HBM."""
    opcode = line.opcode
    if opcode in _FREE or opcode in _CALLS or opcode.endswith("-done"):
        return 0
    in_hbm = lambda shapes: sum(one.padded for one in arrays(shapes) if one.in_hbm)
    if opcode.endswith("-start"):  # its tuple holds both ends, and of a slice the whole array before it
        ends = arrays(line.shapes)
        if opcode == "slice-start":
            return ends[1].padded * (ends[0].in_hbm + ends[1].in_hbm)
        return sum(one.padded for one in ends if one.in_hbm)
    if any(target in line.attributes for target in _NO_WORK):
        return 0
    parts, updates = _sliced(program, lines.values(), line)
    read = 0
    for i, operand in enumerate(line.operands):
        source = lines.get(operand)
        if source and source.opcode != "tuple":
            size = in_hbm(source.shapes)
            read += min(size, parts[i]) if i in parts else size
    results = arrays(line.shapes)
    return read + sum(updates.get(i, one.padded) for i, one in enumerate(results) if one.in_hbm)


def _sliced(program: Program, around: Iterable[Instruction], line: Instruction) -> tuple[dict[int, int], dict[int, int]]:
    """Bytes of an instruction's operands that are read in part, and of its results that are written in part, by number."""
    if line.opcode in ("dynamic-slice", "slice", "gather"):
        return {0: _padded(line)}, {}
    if line.opcode == "dynamic-update-slice":  # the update is its second operand
        update = next((one for one in around if one.name == line.operands[1]), None)
        return {0: 0}, {0: _padded(update)} if update else {}
    if line.opcode != "fusion":
        return {}, {}
    lines = program.computations[called_by(line)[0]]
    by_name = {one.name: one for one in lines}
    numbers = {one.name: int(one.operands[0]) for one in lines if one.opcode == "parameter"}
    touched = {i: _touched(program, lines, name) for name, i in numbers.items()}
    results, updates = lines[-1], {}
    for i, name in enumerate(results.operands if results.opcode == "tuple" else [results.name]):
        made = by_name[name]
        while made.opcode == "bitcast":
            made = by_name[made.operands[0]]
        if made.opcode == "parameter" or made.opcode in _UNDER_WAY:
            updates[i] = 0
        elif made.opcode == "dynamic-update-slice" and made.operands[1] in by_name:
            updates[i] = _padded(by_name[made.operands[1]])
        elif made.opcode == "fusion" and 0 in (inner := _sliced(program, lines, made)[1]) and made.shapes[0] != "(":
            updates[i] = inner[0]
    return {i: n for i, n in touched.items() if n is not None}, updates


def _touched(program: Program, lines: list[Instruction], name: str) -> int | None:
    """Bytes that the lines of a fusion read of an array; None: all of it."""
    total = 0
    for user in (user for user in lines if name in user.operands):
        if user.opcode == "bitcast":
            part = _touched(program, lines, user.name)
        elif user.opcode == "tuple" or user.opcode in _UNDER_WAY:
            part = 0
        else:
            part = _sliced(program, lines, user)[0].get(user.operands.index(name))
        if part is None:
            return None
        total += part
    return total


def _padded(line: Instruction) -> int:
    return sum(one.padded for one in arrays(line.shapes))


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""
