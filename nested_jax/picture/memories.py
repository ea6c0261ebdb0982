"""The memories in an optimizer and the levels that they make, derived from what its update computes.

A leaf of the state is a memory if it depends on gradients or weights, keeps something of what it was, and is neither
emptied again (then it only gathers the context of another) nor a copy of what another memory was read as. Loops between a
memory and what reads it are levels too, such as Newton-Schulz, which solves a problem of its own at every step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nested_jax.description import Description
from nested_jax.errors import UserError
from nested_jax.picture.component import Component, distinct
from nested_jax.picture.graph import Loop
from nested_jax.picture.trial import Recurrence, Trial
from nested_jax.picture.words import listed, words_of
from nested_jax.typing import PyTree

_AROUND = ("inner_state", "inner_states", "inner_opt_state", "inner")  # fields that hold the state of another rule


@dataclass(eq=False)
class Part:
    """Something with a new state at every step: a memory, a loop, or parameters."""

    name: str
    frequency: float
    label: str  # of parameters
    ends: list[int]  # the values that are its new state
    starts: list[int]  # what its new state is computed from
    leaves: list[int] = field(default_factory=list)
    law: Recurrence | None = None
    description: Description = Description()
    decays: bool = False  # whether some of its weights shrink by a factor of their own
    loop: Loop | None = None
    solves: bool = False  # whether the loop makes matrices orthogonal
    direct: set[Part] = field(default_factory=set)  # parts whose new state it reads
    above: set[Part] = field(default_factory=set)  # of these, those that no other of them reads
    recalls: set[Part] = field(default_factory=set)  # memories whose state before the step it reads
    reads: set[int] = field(default_factory=set)  # the computation's inputs that it reads
    sources: tuple[str, ...] = ()  # of these, gradients and weights
    gathers: bool = False  # whether its context is gathered over its period
    held: list[int] = field(default_factory=list)  # leaves beside its own: what it gathers, copies of what it is read as


def learned(
    optimizer: optax.GradientTransformation,
    shapes: PyTree,
    labels: Sequence[str],
    words: Mapping[str, tuple[str, str]],
    extra: Callable[[PyTree], dict[str, Any]] | None = None,
    writers: tuple[str, ...] = (),
) -> tuple[list[Component], list[str], int]:
    """Components of an optimizer and of the parameters that it moves, the label of each, and the bytes of its state.

    Args:
        shapes: parameters, or their shapes.
        labels: a name for every leaf; leaves of one name that move at one frequency make a component.
        words: of every name, the objective and, if it is not what comes of the optimizer, the context flow.
        extra: stand-ins of the parameters -> what `update` takes beside gradients and parameters, by keyword.
        writers: components that the gradients come from.
    """
    trial, real = _tried(optimizer, shapes, extra)
    with jax.enable_x64(True):
        parts = _parts(trial, shapes, labels)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)]
    counts = [leaf.size for leaf in jax.tree.leaves(shapes)]
    n, state = len(sizes), [leaf.size * leaf.dtype.itemsize for leaf in real]
    components = []
    for part in parts:
        weights = [i for i in part.leaves if i < n]
        bytes_held = sum(sizes[i] for i in weights) + sum(state[i - n] for i in (*part.leaves, *part.held) if i >= n)
        context, goal, rule, knowledge = words_of(part, n, *words.get(part.label, ("", "")))
        components.append(
            Component(
                part.name, part.frequency, "step", context, goal, rule, knowledge,
                needs=tuple(sorted(p.name for p in part.above)),
                generated_by=writers if "gradients" in part.sources and part.frequency else (),
                parameters=sum(counts[i] for i in weights),
                state_bytes=bytes_held or None,
            )
        )  # fmt: skip
    return components, [part.label for part in parts], sum(state)


def _tried(optimizer: optax.GradientTransformation, shapes: PyTree, extra: Callable | None) -> tuple[Trial, list[Any]]:
    """The optimizer on trial, and the shapes of its state; what it says against that, in one line."""
    try:
        real = jax.tree.leaves(jax.eval_shape(optimizer.init, shapes))
        return Trial(optimizer, shapes, extra), real
    except Exception as error:  # whatever the rule, or `extra`, is made of
        name = getattr(optimizer.init, "__qualname__", "").split(".")[0] or "of no name"
        said = " ".join(str(error).split()) or type(error).__name__
        remedy = "give parameters that it takes, and what more its update takes by extra="
        raise UserError(f"describe: optimizer {name} refuses: {said}; {remedy}") from error


def _parts(trial: Trial, shapes: PyTree, labels: Sequence[str]) -> list[Part]:
    graph, (n, s) = trial.graph, trial.kept
    weights, gradients = set(graph.inputs[:n]), set(graph.inputs[n + s :])
    made = lambda i: graph.outputs[i]
    forms = lambda i: {v for v in graph.forms(made(i)) if v not in graph.inputs and graph.parents[v]}
    read_again = graph.behind(graph.outputs)

    places = _places(trial, shapes)
    memories: dict[tuple, list[int]] = {}
    for i in range(n, n + s):
        learns = trial.learns[i] and graph.behind([made(i)]) & (weights | gradients)
        if 0 not in trial.shapes[i] and learns and graph.inputs[i] in read_again:
            memories.setdefault((places[i][0], trial.frequency(i)), []).append(i)
    parts, gather, names = [], set(), {}
    for (where, frequency), leaves in memories.items():
        match = [places[i][1] for i in leaves]
        fit = [g is not None and trial.shapes[i] == trial.shapes[g] for i, g in zip(leaves, match, strict=True)]
        law = trial.recurrence(leaves, [g if ok else None for g, ok in zip(match, fit, strict=True)])
        if any(trial.emptied[i] for i in leaves) or (frequency == 0 and not law.keep):
            gather |= set(leaves)
            continue
        names[len(parts)], description = _named(trial.state, where)
        ends = [v for i in leaves for v in forms(i)]
        parts.append(Part("", frequency, "", ends, [*map(made, leaves)], leaves, law, description))
    says = {i: _named(trial.state, places[i][0])[1] for i in range(n, n + s)}
    of_memories = [says[i] for i in says if trial.learns[i]] + [Description()]
    of_weights = next((d for d in says.values() if d not in of_memories), Description())  # of states that only count
    for i, (short, long) in names.items():
        parts[i].name = short if [s for s, _ in names.values()].count(short) == 1 else long

    fed = gradients | {graph.inputs[i] for part in parts for i in part.leaves}
    for loops in _alike([loop for loop in graph.loops if _iterates(trial, loop, fed, gradients)]):
        ends, starts = ([v for loop in loops for v in vs(loop)] for vs in (lambda x: x.ends, lambda x: x.inputs))
        parts.append(Part("", _runs(trial, loops[0]), "", ends, starts, loop=loops[0]))

    remembered = {graph.inputs[i] for part in parts for i in part.leaves}
    laws = {i: trial.recurrence([i], [i]) for i in range(n) if 0 not in trial.shapes[i]}

    def said_of(i):
        """What is said of weights, where they are moved by more than their own gradient, and by no memory."""
        plain = laws[i].power == 1 and laws[i].whole
        return Description() if plain or graph.behind([made(i)]) & remembered else of_weights

    groups: dict[tuple, list[int]] = {}
    for i in laws:
        groups.setdefault((labels[i], trial.frequency(i), said_of(i)), []).append(i)
    split = len({key[:2] for key in groups}) > len({key[0] for key in groups})
    for (label, frequency, said), leaves in groups.items():
        often = Component("", frequency, "step").updates if frequency else "frozen"
        name = f"{label}, {often}" if split else label
        taken = {v for part in parts for v in part.ends}
        ends = [v for i in leaves for v in forms(i) if v not in taken]
        law = trial.recurrence(leaves, leaves)
        shrinks = lambda i: -1 + 1e-6 < (laws[i].keep or 0) < 0  # of the update; -1 forgets
        decays = frequency > 0 and any(map(shrinks, leaves))
        parts.append(Part(name, frequency, label, ends, [*map(made, leaves)], leaves, law, said, decays))

    _connect(trial, parts)
    copies = {p for p in parts if p.law and p.leaves[0] >= n and p.law.keep == 0 and not p.reads & (weights | gradients)}
    parts = [p for p in parts if p not in copies]
    _connect(trial, parts)
    while idle := [p for p in parts if p.loop and not any(p in other.above for other in parts)]:
        parts = [p for p in parts if p not in idle]  # nothing that stays depends on them
    for i in sorted(gather):
        readers = [p for p in parts if graph.inputs[i] in p.reads and p.frequency]
        for part in readers:
            part.gathers = part.frequency < 1
        for part in readers[:1]:
            part.held.append(i)
    for copy in copies:
        for part in [p for p in parts if p in copy.above][:1]:
            part.held += copy.leaves
    for part in parts:
        moves_weights = part.leaves and part.leaves[0] < n  # then it reads them in any case
        kinds = {"gradients": gradients} if moves_weights else {"gradients": gradients, "weights": weights}
        part.sources = tuple(name for name, inputs in kinds.items() if part.reads & inputs)
        before = lambda p: {graph.inputs[i] for i in p.leaves if i >= n}
        part.recalls = {p for p in parts if p is not part and part.reads & before(p)}
        part.above = part.direct - {p for other in part.direct for p in other.direct}
    _name_loops(trial, parts)
    for part, name in zip(parts, distinct([part.name for part in parts]), strict=True):
        part.name = name
    return parts


def _connect(trial: Trial, parts: Sequence[Part]) -> None:
    """What every part reads: of other parts the new state, of the computation's inputs."""
    owners: dict[int, set[Part]] = {}
    for part in parts:
        for value in part.ends:
            owners.setdefault(value, set()).add(part)
    for part in parts:
        others = lambda value, part=part: {p for p in owners.get(value, ()) if p is not part}
        mine = set(part.ends) if not part.loop else set()
        seen = trial.graph.behind(part.starts, lambda v, mine=mine, others=others: v not in mine and bool(others(v)))
        part.direct = part.above = {p for v in seen if v not in mine for p in others(v)}
        part.reads = seen & set(trial.graph.inputs)


def _iterates(trial: Trial, loop: Loop, fed: set[int], gradients: set[int]) -> bool:
    """Whether a loop solves something at a step: it starts from what has been learned, and is not a pass over gradients."""
    graph = trial.graph
    start = loop.inputs[loop.first : loop.first + len(loop.ends)]
    return bool(graph.behind(start) & fed) and not graph.behind(loop.streams) & gradients


def _alike(loops: Sequence[Loop]) -> list[list[Loop]]:
    kinds: dict[tuple, list[Loop]] = {}
    for loop in loops:
        kinds.setdefault(loop.kind, []).append(loop)
    return list(kinds.values())


def _runs(trial: Trial, loop: Loop) -> float:
    """Iterations a step."""
    share = 1.0
    if loop.branch and loop.branch[0] in trial.branches:
        share = float(np.mean(trial.branches[loop.branch[0]] == loop.branch[1]))
    length = loop.length
    if length is None:
        length = np.mean(trial.branches[loop.where]) if loop.where in trial.branches else 1
    return share * float(length)


def _name_loops(trial: Trial, parts: Sequence[Part]) -> None:
    for part in (p for p in parts if p.loop):
        part.solves = _orthogonalises(trial, part.loop)
        kind = "orthogonalisation" if part.solves else "inner loop"
        part.name = f"{kind} of {listed([p.name for p in part.above] or part.sources)}"


def _orthogonalises(trial: Trial, loop: Loop) -> bool:
    """Whether the loop brings random matrices of norm 1 much nearer to O^T O = I."""
    graph, (n, _) = trial.graph, trial.kept
    known = dict(graph.known)
    known |= dict(zip(graph.inputs[n:], jax.tree.leaves(trial.state), strict=False))
    rng, types = np.random.default_rng(0), [v.aval for v in loop.equation.invars]
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
    """Of every leaf of the state: the path to the tree that it is in, and the gradient of the parameter it belongs to."""
    n, s = trial.kept
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


def _named(state: Any, path: Sequence[Any]) -> tuple[list[str], Description]:
    """A memory's names, from short to long, by the field that holds it, the class of the state and the groups that it is in,
    and what that class says of itself."""
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
    return [short, ", ".join([short, *groups])], description
