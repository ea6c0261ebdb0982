"""Compiled programs as XLA prints them: how often each of their computations runs, and what devices send one another.

A loop's body stands there once: what is in it counts as often as the loop turns.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from nested_jax.parallel.mesh import MeshShape

_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{[^}]*\})?")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    shapes: str
    """Of its results, as printed."""
    operands: tuple[str, ...]
    attributes: str


class Program(NamedTuple):
    """Computations by name."""

    computations: dict[str, list[Instruction]]
    entry: str


class Collective(NamedTuple):
    """What every device sends to others in a step by one instruction."""

    kind: str
    axes: tuple[str, ...]
    """Axes of the mesh that it goes along."""
    shape: str
    """Of its result on one device, in one run."""
    runs: int
    """How often it runs in a step."""
    sent: int
    """Bytes that a device sends in a step, by a ring."""


def parse(text: str) -> Program:
    """Reads the text of a compiled program.

    >>> import jax
    >>> program = parse(jax.jit(lambda x: x @ x).lower(jax.numpy.ones((2, 2))).compile().as_text())
    >>> program.entry in program.computations
    True
    """
    computations, entry, lines = {}, "", []
    for line in text.splitlines():
        if match := _LINE.match(line):
            lines.append(_instruction(*match.groups()))
        elif match := _HEAD.match(line):
            lines = computations[match[2]] = []
            entry = match[2] if match[1] else entry
    return Program(computations, entry)


def runs(program: Program) -> Counter[str]:
    """How often each computation runs in one run of the program, those inside fusions too; of a conditional the branch that
    takes the most cycles, or else has the most instructions.

    >>> import jax
    >>> loop = lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0]
    >>> program = parse(jax.jit(loop).lower(jax.numpy.ones((2, 2))).compile().as_text())
    >>> max(runs(program).values())
    7
    """
    found: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        found[name] += times
        for line in program.computations[name]:
            turns = trips(program, line) if line.opcode == "while" else 1
            inside = called_by(line)
            if line.opcode == "conditional":
                inside = [max(inside, key=partial(_weight, program))]
            for called in inside:
                visit(called, times * turns)

    visit(program.entry, 1)
    return found


def cycles_of(line: Instruction) -> int:
    """Cycles of one run, as the compiler estimates; 0 where it does not."""
    match = re.search(r'"estimated_cycles":"(\d+)"', line.attributes)
    return int(match[1]) if match else 0


def _weight(program: Program, name: str) -> tuple[int, int]:
    """Cycles and instructions of a computation and of all that it runs."""
    cycles, instructions = 0, 0
    for line in program.computations[name]:
        turns = trips(program, line) if line.opcode == "while" else 1
        inner = [_weight(program, called) for called in called_by(line)]
        cycles += cycles_of(line) + turns * sum(each for each, _ in inner)
        instructions += 1 + turns * sum(each for _, each in inner)
    return cycles, instructions


def turns(program: Program) -> int:
    """Turns of all loops in one run of the program.

    >>> import jax
    >>> loop = lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0]
    >>> turns(parse(jax.jit(lambda x: loop(loop(x))).lower(jax.numpy.ones((2, 2))).compile().as_text()))
    14
    """
    loops = ((line, times) for name, times in runs(program).items() for line in program.computations[name])
    return sum(times * trips(program, line) for line, times in loops if line.opcode == "while")


def trips(program: Program, loop: Instruction) -> int:
    """How often a loop turns: what XLA found out, else the largest constant that its condition compares with."""
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(match[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    names = [condition[1]] if condition else []
    for name in names:  # of fusions in it too
        names += [called for line in program.computations[name] for called in called_by(line)]
    lines = [line for name in names for line in program.computations[name] if line.opcode == "constant"]
    whole = [line.operands[0] for line in lines if re.match(r"[su]\d+\[\]", line.shapes) and line.operands]
    return max((int(number) for number in whole if number.isdigit()), default=1)


def called_by(line: Instruction) -> list[str]:
    """The computations that an instruction runs."""
    branches = re.search(r"branch_computations=\{([^}]*)\}", line.attributes)
    names = re.findall(r"[\w.\-]+", branches[1]) if branches else []
    reduces = line.opcode in (
        "all-reduce",
        "all-reduce-start",
        "reduce-scatter",
        "reduce",
        "scatter",
        "sort",
        "reduce-window",
    )
    return names + ([] if reduces else _CALLED.findall(line.attributes))


def collectives(program: Program, mesh: MeshShape) -> list[Collective]:
    """What devices send one another, the most first; an instruction that stands in several computations counts once.

    One instruction has one channel; those of `jax.shard_map` may all have the same, and so the same call and shape too: then
    all that stand in one computation count. A TPU's all-reduce of which a device keeps its part is a reduce-scatter.

    Args:
        program: compiled for a mesh.
        mesh: its shape.
    """
    found: dict[tuple[str | None, ...], Counter[str]] = {}
    alike: dict[tuple[str | None, ...], Collective] = {}
    for name, times in runs(program).items():
        for line in program.computations[name]:
            kind = line.opcode.removesuffix("-start")
            if kind in _KINDS:
                groups = _groups(line) or [tuple(range(math.prod(mesh)))]  # {}: all devices
                size = len(groups[0]) if kind != "collective-permute" else 2
                sent = _sent(kind, line, size)
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                    kind, sent = "reduce-scatter", sent // 2
                ours = Collective(kind, _axes(groups, mesh), _result(line), times, sent)
                channel, call = (re.search(of, line.attributes) for of in (r"channel_id=(\d+)", r'op_name="([^"]*)"'))
                key = (channel[1], kind, ours.shape, call and call[1]) if channel else (line.name,)
                found.setdefault(key, Counter())[name] += times
                alike[key] = ours
    counted = []
    for key, one in alike.items():
        times = max(found[key].values())
        counted.append(one._replace(runs=times, sent=times * one.sent))
    return sorted(counted, key=lambda one: -one.sent)


def size_of(shapes: str) -> int:
    """Bytes of arrays as printed, without what pads them to tiles.

    >>> size_of("(f32[2,64]{1,0}, bf16[3]{0})")
    518
    """
    return sum(_bytes(kind, sizes) for kind, sizes in _SHAPE.findall(shapes))


def _bytes(kind: str, sizes: str) -> int:
    bits = re.search(r"\d+", kind)  # f32, bf16, f8e4m3fn; a truth value takes a byte, a token none
    return math.prod(int(n) for n in sizes.split(",") if n) * (int(bits[0]) if bits else 8 * (kind == "pred")) // 8


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text[0] == "(" else text.index(" ")
    shapes, rest = text[:end], text[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    operands = re.findall(r"%([\w.\-]+)", inside := rest[len(opcode) + 1 : close]) or [inside]
    return Instruction(name, opcode, shapes, tuple(operands), rest[close + 1 :])


def _closing(text: str, start: int) -> int:
    """Where the bracket closes that opens at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "({[") - (text[i] in ")}]")
        if not depth:
            return i
    return len(text)


_PAIRS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}")  # {{0,1},{2,3}}
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # [4,2]T(1,0): the numbers in order, their axes turned
_LISTED = re.compile(r"replica_groups=\[([\d,]+)\]<=" + _IOTA)
_MESHED = re.compile(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(" + _IOTA + r"\))? \{(.*?)\}")  # along named axes


def _groups(line: Instruction) -> list[tuple[int, ...]]:
    """Devices that take part together, none where all do; of a permutation each pair of source and target."""
    if re.search(r"(?:replica_groups|source_target_pairs)=\{\}", line.attributes):
        return []
    if match := _PAIRS.search(line.attributes):
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", match[1])]
    if match := _LISTED.search(line.attributes):
        return _rows(_devices(match[2], match[3]).reshape(_numbers(match[1])))
    if match := _MESHED.search(line.attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        devices = _devices(match[2] or str(math.prod(sizes.values())), match[3])
        split, inside = [], []  # of an axis parts may be named: 'x':(4)2 are the 2 after its first 4
        for name, size in sizes.items():
            parts = [(int(at), int(n)) for at, n in re.findall(rf"'{name}':\((\d+)\)(\d+)", match[4])]
            parts = [(1, size)] if re.search(rf"'{name}'(?!:)", match[4]) else sorted(parts)
            done = 1
            for at, n in parts:
                split += [at // done, n]
                inside += [False, True]
                done = at * n
            split.append(size // done)
            inside.append(False)
        order = sorted(range(len(split)), key=lambda axis: inside[axis])  # those of a group last
        group = math.prod(n for n, own in zip(split, inside, strict=True) if own)
        return _rows(devices.reshape(split).transpose(order).reshape(-1, group))
    raise ValueError(f"the devices of {line.name} cannot be read: {line.attributes[:200]}")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _devices(sizes: str, order: str | None) -> np.ndarray:
    numbers = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return numbers.transpose(_numbers(order)) if order else numbers


def _rows(devices: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(row) for row in devices.tolist()]


def _axes(groups: Sequence[Sequence[int]], mesh: MeshShape) -> tuple[str, ...]:
    """Axes along which the members of a group differ."""
    places = [np.stack(np.unravel_index(np.array(group), mesh)) for group in groups]
    return tuple(name for i, name in enumerate(mesh._fields) if any(np.ptp(place[i]) for place in places))


def _result(line: Instruction) -> str:
    """The arrays that come out; of a -start, but that of an all-reduce, its tuple holds the operands before them."""
    shapes = line.shapes
    if line.opcode.endswith("-start") and line.opcode != "all-reduce-start":
        outer = shapes.strip()[1:]
        first = _closing(outer, 0) + 1 if outer[0] == "(" else _closing_of_array(outer)
        rest = outer[first:].lstrip(", ")
        shapes = rest[: _closing(rest, 0) + 1 if rest[0] == "(" else _closing_of_array(rest)]
    return ", ".join(f"{kind}[{sizes}]" for kind, sizes in _SHAPE.findall(shapes))


def _closing_of_array(text: str) -> int:
    """Where the first array of a text ends."""
    match = _SHAPE.match(text)
    return match.end() if match else len(text)


def _sent(kind: str, line: Instruction, group: int) -> int:
    """Bytes that a device sends."""
    size, others = size_of(_result(line)), max(group - 1, 0)
    if kind == "all-reduce":
        return 2 * size * others // group
    if kind == "reduce-scatter":
        return size * others
    return size if kind == "collective-permute" else size * others // max(group, 1)


def by_kind(found: Sequence[Collective]) -> list[tuple[str, tuple[str, ...], int, int]]:
    """(kind, axes, runs, bytes sent) in a step, the most bytes first."""
    times: Counter[tuple[str, tuple[str, ...]]] = Counter()
    sent: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for one in found:
        times[one.kind, one.axes] += one.runs
        sent[one.kind, one.axes] += one.sent
    return [(*key, times[key], size) for key, size in sent.most_common()]
