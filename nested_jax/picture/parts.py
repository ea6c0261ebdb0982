"""The memories in an optimizer and the levels that they make, derived from what its update computes.

A leaf of the state is a memory if it depends on gradients or weights, keeps something of what it was, and is neither
emptied again (then it only gathers the context of another) nor a copy of what another memory was read as. Loops between a
memory and what reads it are levels too, such as Newton-Schulz, which solves a problem of its own at every step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_jax.description import Description
from nested_jax.errors import UserError
from nested_jax.jaxpr.views import aval_of
from nested_jax.picture.component import Component, distinct, listed
from nested_jax.picture.graph import Loop
from nested_jax.picture.trial import Extra, Recurrence, Trial
from nested_jax.typing import PyTree

_AROUND = ("inner_state", "inner_states", "inner_opt_state", "inner")  # fields that hold the state of another rule


@dataclass(eq=False)
class Part:
    """Something with a new state at every step: a memory, a loop, or parameters."""

    name: str
    frequency: float
    ends: list[int]  # the values that are its new state
    starts: list[int]  # what its new state is computed from
    law: Recurrence | None = None  # None for a loop
    label: str | None = None  # of parameters
    description: Description = Description()
    loop: Loop | None = None
    leaves: list[int] = field(default_factory=list)
    extra_leaves: list[int] = field(default_factory=list)  # what it gathers, and copies of what it is read as
    direct: set[Part] = field(default_factory=set)  # parts whose new state it reads
    recalls: set[Part] = field(default_factory=set)  # memories whose state before the step it reads
    reads: set[int] = field(default_factory=set)  # the inputs of the computation that it reads
    sources: tuple[str, ...] = ()  # of these, gradients, weights and what more `update` takes
    gathers: bool = False  # whether its context is gathered over its period
    orthogonalises: bool = False  # whether the loop makes matrices orthogonal
    decays: bool = False  # whether some of its parameters shrink by a factor of their own
    rate: float | None = None  # of parameters whose rate is a function of the gradient: minus that rate, once
    restarts: int | None = None  # after how many steps parameters are replaced by
    restarts_from: list[Part] = field(default_factory=list)
    weights: int = 0  # how many parameters it has
    bytes: int | None = None

    @property
    def above(self) -> set[Part]:
        """Of the parts whose new state it reads, those that no other of them reads."""
        return self.direct - {part for other in self.direct for part in other.direct}


def parts_of(
    optimizer: optax.GradientTransformation, shapes: PyTree, labels: Sequence[str], extra: Extra | None = None
) -> tuple[list[Part], int]:
    """The parts of an optimizer and of the parameters that it moves, and the bytes of its state.

    Args:
        shapes: parameters, or their shapes.
        labels: a name for every leaf; leaves of one name that move at one frequency make a part.
        extra: stand-ins of the parameters -> what `update` takes besides gradients and parameters, by keyword.
    """
    try:
        real = jax.tree.leaves(jax.eval_shape(optimizer.init, shapes))
        trial = Trial(optimizer, shapes, extra)
    except Exception as error:  # whatever the rule, or `extra`, is made of
        name = getattr(optimizer.init, "__qualname__", "").split(".")[0] or "of no name"
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = "give parameters that it takes, and what more its update takes by extra="
        raise UserError(f"describe: optimizer {name} refuses: {reason}; {remedy}") from error
    with jax.enable_x64(True):
        parts = _parts(trial, shapes, labels)
    leaves = [*jax.tree.leaves(shapes), *real]
    size = lambda i: leaves[i].size * leaves[i].dtype.itemsize
    for part in parts:
        part.weights = sum(leaves[i].size for i in part.leaves) if part.label is not None else 0
        part.bytes = sum(map(size, (*part.leaves, *part.extra_leaves))) or None
    return parts, sum(map(size, range(trial.kept[0], len(leaves))))


def _parts(trial: Trial, shapes: PyTree, labels: Sequence[str]) -> list[Part]:
    graph, n = trial.graph, trial.kept[0]
    data = trial.inputs()
    learned_from = data["gradients"] | data["weights"]
    memories, gathered, other = _memories(trial, shapes)
    loops = _loops(trial, data["gradients"] | {graph.inputs[i] for part in memories for i in part.leaves})
    parts = [*memories, *loops, *_parameters(trial, labels, memories, loops, other)]
    _connect(trial, parts)
    copies = [p for p in memories if p.law and p.law.keep == 0 and not p.reads & learned_from]
    parts = [p for p in parts if p not in copies]
    _connect(trial, parts)
    state = lambda p: {graph.inputs[i] for i in p.leaves if i >= n}
    for part in parts:  # what reads a copy reads what was copied
        part.direct |= {p for copy in copies if part.reads & state(copy) for p in copy.direct if p in parts}
    while idle := [p for p in parts if p.loop and not any(p in other.above for other in parts)]:
        parts = [p for p in parts if p not in idle]  # nothing that stays depends on them
    for i in gathered:
        readers = [p for p in parts if graph.inputs[i] in p.reads and p.frequency]
        for part in readers:
            part.gathers = part.frequency < 1
        for part in readers[:1]:
            part.extra_leaves.append(i)
    for copy in copies:
        for part in [p for p in parts if p in copy.above][:1]:
            part.extra_leaves += copy.leaves
    for part in parts:
        own = {"weights"} if part.label is not None else set()  # which parameters read in any case
        part.sources = tuple(name for name, inputs in data.items() if part.reads & inputs and name not in own)
        part.recalls = {p for p in parts if p is not part and part.reads & state(p)}
        if part.label is not None and part.frequency:
            alone = not (part.direct or part.recalls or part.gathers)
            part.rate = trial.own_rate(part.leaves, far=len(part.sources) > 1) if alone else None
            part.restarts = trial.restarts(part.leaves[0])
            if part.restarts:
                part.restarts_from = [p for p in part.recalls if set(p.leaves) & set(trial.copies(part.leaves[0]))]
        if part.loop:
            kind = "orthogonalisation" if part.orthogonalises else "inner loop"
            memories = [p.name for p in part.above if not p.loop]
            part.name = f"{kind} of {listed(memories or {'gradients', 'weights'} & {*part.sources})}"
    for part, name in zip(parts, distinct([part.name for part in parts]), strict=True):
        part.name = name
    return parts


def _memories(trial: Trial, shapes: PyTree) -> tuple[list[Part], list[int], Description]:
    """The memories, leaves that only gather, and the description of parameters by a state that is no memory."""
    graph, (n, s) = trial.graph, trial.kept
    data, places = trial.inputs(), _places(trial, shapes)
    behind = {i: graph.behind([graph.outputs[i]]) for i in range(n, n + s)}
    read_again = graph.behind(graph.outputs)
    groups: dict[tuple, list[int]] = {}
    for i in range(n, n + s):
        learns = trial.learns[i] and behind[i] & (data["gradients"] | data["weights"])
        if 0 not in trial.shapes[i] and learns and graph.inputs[i] in read_again:
            groups.setdefault((places[i][0], trial.frequency(i)), []).append(i)
    parts, gathered, names = [], [], []
    for (where, frequency), leaves in groups.items():
        first = n + s if behind[leaves[0]] & data["gradients"] else 0  # what it could be a memory of
        owners = [places[i][1] for i in leaves]
        fits = [g is not None and trial.shapes[i] == trial.shapes[g] for i, g in zip(leaves, owners, strict=True)]
        law = trial.recurrence(leaves, [first + (g or 0) if fit else None for g, fit in zip(owners, fits, strict=True)])
        if any(trial.emptied[i] for i in leaves) or (frequency == 0 and not law.keep):
            gathered += leaves
            continue
        name, description = _named(trial.state, where)
        names.append(name)
        ends = [v for i in leaves for v in _forms(trial, i)]
        starts = [graph.outputs[i] for i in leaves]
        parts.append(Part("", frequency, ends, starts, law, description=description, leaves=leaves))
    for part, (short, long) in zip(parts, names, strict=True):
        part.name = short if [other for other, _ in names].count(short) == 1 else long
    described = [(trial.learns[i], _named(trial.state, places[i][0])[1]) for i in range(n, n + s)]
    of_memories = [description for learns, description in described if learns]
    return parts, sorted(gathered), next((d for _, d in described if d not in of_memories), Description())


def _loops(trial: Trial, fed: set[int]) -> list[Part]:
    """Loops that solve something at a step: they start from what has been learned, and are no pass over gradients."""
    graph, kinds = trial.graph, {}
    for loop in graph.loops:
        start = loop.inputs[loop.first : loop.first + len(loop.ends)]
        if graph.behind(start) & fed and not graph.behind(loop.streams) & trial.inputs()["gradients"]:
            kinds.setdefault(loop.kind, []).append(loop)
    parts = []
    for alike in kinds.values():
        ends, starts = ([v for loop in alike for v in values(loop)] for values in (lambda x: x.ends, lambda x: x.inputs))
        solves = _orthogonalises(trial, alike[0])
        parts.append(Part("", _runs(trial, alike[0]), ends, starts, loop=alike[0], orthogonalises=solves))
    return parts


def _parameters(
    trial: Trial, labels: Sequence[str], memories: list[Part], loops: list[Part], other: Description
) -> list[Part]:
    """Parameters by label and frequency; those updated by more than their own gradient, and by no memory, are described by
    `other`.
    """
    graph = trial.graph
    remembered = {graph.inputs[i] for part in memories for i in part.leaves}
    taken = {v for part in (*memories, *loops) for v in part.ends}
    groups: dict[tuple, list[int]] = {}
    streams, decays = [sum(trial.kept) + i for i in range(trial.kept[0])], set()
    for i in (i for i in range(trial.kept[0]) if 0 not in trial.shapes[i]):
        law, frequency = trial.recurrence([i], [streams[i]]), trial.frequency(i)
        keep, pull = law.keep or 0.0, 0.0  # of the update; -1 forgets
        if keep and (copies := trial.copies(i)):
            keep, pull = trial.recurrence([i], [streams[i]], along=copies).keep or 0.0, keep  # a pull to these is no decay
        if frequency and -1 + 1e-6 < keep < 0 and abs(keep) > 1e-6 * abs(pull):
            decays.add(i)
        own = (law.power == 1 and law.whole) or graph.behind([graph.outputs[i]]) & remembered
        groups.setdefault((labels[i], frequency, Description() if own else other), []).append(i)
    split = len({key[:2] for key in groups}) > len({key[0] for key in groups})
    parts = []
    for (label, frequency, description), leaves in groups.items():
        often = Component("", frequency, "step").updates if frequency else "frozen"
        ends = [v for i in leaves for v in _forms(trial, i) if v not in taken]
        law = trial.recurrence(leaves, [streams[i] for i in leaves])
        parts.append(Part(
            f"{label}, {often}" if split else label, frequency, ends, [graph.outputs[i] for i in leaves], law, label,
            description, leaves=leaves, decays=any(i in decays for i in leaves),
        ))  # fmt: skip
    return parts


def _forms(trial: Trial, leaf: int) -> list[int]:
    """The values that are a leaf's new state, up to casts and branches, except what is given or constant."""
    graph = trial.graph
    return [v for v in graph.forms(graph.outputs[leaf]) if v not in graph.inputs and graph.parents[v]]


def _connect(trial: Trial, parts: Sequence[Part]) -> None:
    """Sets what every part reads: of other parts the new state, and of the computation's inputs."""
    owners: dict[int, set[Part]] = {}
    for part in parts:
        for value in part.ends:
            owners.setdefault(value, set()).add(part)
    for part in parts:
        solved = lambda v: any(p.loop for p in owners[v])
        mine = {v for v in part.ends if not solved(v)}
        others = lambda value, part=part: {p for p in owners.get(value, ()) if p is not part}
        seen = trial.graph.behind(part.starts, lambda v, mine=mine, others=others: v not in mine and bool(others(v)))
        part.direct = {p for v in seen if v not in mine for p in others(v)}
        part.reads = seen & set(trial.graph.inputs)


def _runs(trial: Trial, loop: Loop) -> float:
    """Iterations per step."""
    where, branch = loop.branch or ((), 0)
    taken = np.mean(trial.branches.get(where, branch) == branch)
    return float(taken * (loop.length or np.mean(trial.branches.get(loop.where, 1))))


def _orthogonalises(trial: Trial, loop: Loop) -> bool:
    """Whether the loop brings random matrices of norm 1 much nearer to O^T O = I."""
    graph, (n, _) = trial.graph, trial.kept
    known = graph.known | dict(zip(graph.inputs[n:], jax.tree.leaves(trial.state), strict=False))
    rng, types = np.random.default_rng(0), [aval_of(v) for v in loop.equation.invars]
    before = after = 0.0
    for _ in range(8):
        values, matrices = [], []
        for i, (value, kind) in enumerate(zip(loop.inputs, types, strict=True)):
            constant = next((known[v] for v in graph.forms(value) if v in known), None)
            carried = loop.first <= i < loop.first + len(loop.ends)
            if carried and jnp.issubdtype(kind.dtype, jnp.inexact) and kind.ndim >= 2:
                matrix = rng.normal(size=kind.shape)
                values.append(jnp.asarray(matrix / np.linalg.norm(matrix, axis=(-2, -1), keepdims=True), kind.dtype))
                matrices.append(i)
            elif constant is None:
                return False
            else:
                values.append(jnp.broadcast_to(jnp.asarray(constant, kind.dtype), kind.shape))
        if len(matrices) != 1:
            return False
        out = loop.equation.primitive.bind(*values, **loop.equation.params)[matrices[0] - loop.first]
        before, after = before + _distance(values[matrices[0]]), after + _distance(out)
    return after < before / 2


def _distance(matrices: Any) -> float:
    x = np.asarray(matrices, np.float64)
    x = x if x.shape[-2] >= x.shape[-1] else np.swapaxes(x, -2, -1)
    return float(np.sum((np.swapaxes(x, -2, -1) @ x - np.eye(x.shape[-1])) ** 2))


def _places(trial: Trial, shapes: PyTree) -> dict[int, tuple[tuple, int | None]]:
    """Of every leaf of the state: the path to the tree that it is in, and the parameter that it belongs to."""
    n = trial.kept[0]
    plain = lambda path: [jax.tree_util.keystr((key,), simple=True) for key in path]
    params = [plain(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    places = {}
    for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(trial.state)):
        words, found = plain(path), (len(path), None)
        for g, name in sorted(enumerate(params), key=lambda pair: len(pair[1])):
            ends = [at for at in range(len(words) - len(name) + 1) if words[at : at + len(name)] == name]
            found = (ends[-1], g) if ends else found
        places[n + i] = tuple(path[: found[0]]), found[1]
    return places


def _named(state: Any, path: Sequence[Any]) -> tuple[tuple[str, str], Description]:
    """A memory's short and long name, by the field that holds it, the class of the state and the groups that it is in,
    and that class's description."""
    name, kind, groups, description = "memory", "", [], Description()
    for key in path:
        if isinstance(key, jax.tree_util.GetAttrKey):
            if key.name not in _AROUND:
                kind = re.sub("^ScaleBy|State$", "", type(state).__name__)
                name, description = key.name, getattr(type(state), "description", Description())
            state = getattr(state, key.name)
        elif isinstance(key, jax.tree_util.SequenceKey):
            state = state[key.idx]
        else:
            groups.append(str(getattr(key, "key", key)))
            state = state[key.key] if isinstance(key, jax.tree_util.DictKey) else None
    short = f"{name} ({kind})" if kind else name
    return (short, ", ".join([short, *groups])), description
