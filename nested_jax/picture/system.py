"""describe: the nested-learning picture of a level, a sequence layer, a model, an optimizer, or of several together."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from nested_jax.errors import UserError
from nested_jax.level import Level, Nested
from nested_jax.models.config import ModelConfig
from nested_jax.models.module import LanguageModel
from nested_jax.picture.component import Component, Picture, distinct
from nested_jax.picture.graph import Graph
from nested_jax.picture.memories import learned
from nested_jax.picture.words import listed
from nested_jax.typing import PyTree

_ALONE = {"parameters": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}  # what an optimizer moves if nothing else is given


class _Learner(NamedTuple):
    """A system without its optimizer: its slow weights' shapes, what each is for, and the levels that they make."""

    shapes: PyTree
    serves: Callable[[Sequence[str]], str]
    levels: Callable[[PyTree], list[tuple[Level, int]]]
    objective: str = "the loss L"
    context: str = ""  # of the slow weights; by default what the optimizer makes of gradients


def describe(
    system: Any, *, tokens_per_step: int | None = None, extra: Callable[[PyTree], dict[str, Any]] | None = None
) -> Picture:
    """The nested-learning picture of a system: what learns in it, how often, from what, towards what (NL Def. 1-4).

    Nothing is looked up by name. A `Level` has its period and says what its objective is; of an optax transformation the
    memories, their order, periods and objectives are derived from what its `update` computes, run on small stand-ins of the
    parameters. Weights that nothing moves have frequency 0.

    Args:
        system: a `Level`, a sequence layer of `nested_jax.memory`, a `LanguageModel` or `ModelConfig`, any other
            `flax.nnx.Module`, of which only `nnx.Param`s count, or tree of parameters (or of their shapes), an optax
            transformation, or a tuple of some of these with at most one optimizer, which moves all parameters.
        tokens_per_step: data points of one step of the optimizer; None leaves its frequencies in updates a step.
        extra: for optimizers whose `update` takes more than gradients and parameters: from stand-ins of the parameters to
            these arguments, by keyword.

    Returns:
        A `Picture`: `.components`, `.levels`, `.rich()`, `.markdown()`, `.to_dict()`, `.plot()`.

    Raises:
        UserError: something that is none of these, in which nothing can learn, two optimizers, one that has no parameters
            to move, or that refuses them or `extra`; tokens_per_step is no positive number.

    >>> import optax
    >>> mlp = {"up": jnp.ones((8, 32)), "down": jnp.ones((32, 8))}
    >>> picture = describe((mlp, optax.sgd(0.1, momentum=0.9)))
    >>> for component in picture.components:
    ...     print(component.level, component.name, "|", component.objective, "|", component.rule)
    1 trace (Trace) | -<m, g> + 0.05 |m|^2 | m <- 0.9 m + g
    2 parameters | the loss L | adds what comes of trace (Trace)

    A level that says what it is:

    >>> from nested_jax import Description
    >>> mean = Level(lambda slower: jnp.zeros(3), lambda m, x, slower: (m + 0.1 * (x.mean(0) - m), m), 16, "mean",
    ...     description=Description("1/2 |m - x|^2", "gradient descent"))
    >>> [(c.name, c.updates, c.objective) for c in describe(mean).components]
    [('mean', '1/16 a token', '1/2 |m - x|^2')]

    References:
        NL, Definitions 1-4 and section 3.3.
    """
    if tokens_per_step is not None and not (isinstance(tokens_per_step, numbers.Real) and 0 < tokens_per_step < math.inf):
        raise UserError(f"describe: tokens_per_step {tokens_per_step!r} is no positive number: give one, or None")
    parts = list(system) if type(system) in (tuple, list) else [system]
    parts = [part.gradient_transformation() if isinstance(part, optax.MultiSteps) else part for part in parts]
    optimizers = [part for part in parts if isinstance(part, optax.GradientTransformation)]
    if len(optimizers) > 1:
        raise UserError(f"describe: {len(optimizers)} optimizers: give one, such as their optax.chain or optax.partition")
    learners = [_learner(part) for part in parts if not isinstance(part, optax.GradientTransformation)]
    if not learners:
        learners = [_learner(_ALONE)]
    components = _renamed([list(_in_context(learner)) for learner in learners])
    writers = tuple(c.name for c in components[-1:])
    slow, labels, size = _slow(learners, optimizers[0] if optimizers else None, extra, writers)
    if not components and not slow:
        raise UserError("describe: nothing can learn in this: give parameters that are not empty, or a level")
    slow = _renamed([components, slow])[len(components) :]
    of = lambda label: [c.name for c, its in zip(slow, labels, strict=True) if its == label]
    full = lambda label: of(label) or [label]
    starts = lambda c: tuple(name for label in c.starts_from for name in full(label))
    components = [dataclasses.replace(c, starts_from=starts(c)) for c in components]
    if tokens_per_step is not None:
        slow = [dataclasses.replace(c, frequency=c.frequency / tokens_per_step, unit="token") for c in slow]
    return Picture.of(components + slow, size)


def _renamed(groups: Sequence[Sequence[Component]]) -> list[Component]:
    """All components, each of a name of its own; what they need and start from is of their own group."""
    names = iter(distinct([c.name for group in groups for c in group]))
    made = []
    for group in groups:
        new = {c.name: next(names) for c in group}
        for c in group:
            needs, starts = tuple(new[n] for n in c.needs), tuple(new.get(n, n) for n in c.starts_from)
            made.append(dataclasses.replace(c, name=new[c.name], needs=needs, starts_from=starts))
    return made


def _learner(system: Any) -> _Learner:
    if isinstance(system, nnx.Optimizer):
        raise UserError(
            "describe: nnx.Optimizer holds a state that is no parameter: give (model, tx), a model and its optax rule"
        )
    if isinstance(system, ModelConfig):
        system = nnx.eval_shape(lambda: LanguageModel(system, rngs=nnx.Rngs(0)))
    if isinstance(system, Level):
        return _Learner({}, lambda path: "", lambda weights: [(system, 1)])
    if isinstance(system, nnx.Module):
        graph, weights, rest = nnx.split(system, nnx.Param, ...)
        shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), nnx.to_pure_dict(weights))
        if not isinstance(system, LanguageModel):
            return _Learner(shapes, lambda path: "parameters", lambda weights: [])
        levels = lambda weights: nnx.merge(graph, nnx.State(weights), rest).levels()
        return _Learner(shapes, system.serves, levels, "next-token loss", "corpus")
    if hasattr(system, "init_weights") and hasattr(system, "levels"):
        shapes = jax.eval_shape(system.init_weights, jax.random.key(0))
        return _Learner(shapes, lambda path: "slow weights", lambda w: [(v, 1) for v in system.levels(w, 1)])
    leaves = jax.tree.leaves(system)
    odd = next((leaf for leaf in leaves if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype")), None)
    if odd is not None or not leaves:
        what = type(system if odd is None else odd).__name__
        raise UserError(f"describe: {what} is no level, layer, model, optimizer or tree of parameters: give one of these")
    return _Learner(system, lambda path: "parameters", lambda weights: [])


def _slow(learners: Sequence[_Learner], optimizer, extra, writers) -> tuple[list[Component], list[str], int]:
    """Components of the parameters and of what moves them, their labels, and the bytes of the optimizer's state."""
    learners = [learner for learner in learners if any(leaf.size for leaf in jax.tree.leaves(learner.shapes))]
    if not learners and optimizer is not None:
        raise UserError("describe: the optimizer has no parameters to move: give these too, (system, parameters, optimizer)")
    if not learners:
        return [], [], 0
    shapes = learners[0].shapes if len(learners) == 1 else tuple(learner.shapes for learner in learners)
    labels = [label for learner in learners for label in _labels(learner)]
    words = {label: (learner.objective, learner.context) for learner in learners for label in _labels(learner)}
    return learned(optimizer or optax.set_to_zero(), shapes, labels, words, extra, writers)


def _labels(learner: _Learner) -> list[str]:
    """What every leaf is for."""
    plain = lambda path: tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    return [learner.serves(plain(path)) for path, _ in jax.tree_util.tree_leaves_with_path(learner.shapes)]


def _in_context(learner: _Learner) -> Iterator[Component]:
    """Components of the levels, each after those whose new state it needs."""
    found: list[tuple[Level, int]] = []

    def states(weights):
        found[:] = learner.levels(weights)
        return [_start(level) for level, _ in found]

    shapes = jax.eval_shape(states, learner.shapes)
    graph = Graph(states, learner.shapes)
    labels = dict(zip(graph.inputs, _labels(learner), strict=True))
    leaves, structure = jax.tree.flatten(shapes)
    teachers = [{labels[v] for v in graph.behind([out]) if v in labels} for out in graph.outputs]
    states = structure.unflatten(map(_Leaf, leaves, teachers))
    names: list[str] = []
    taken: list[str] = []
    apart = [(_apart(level, blocks, taken), blocks) for level, blocks in found]
    for (level, blocks), state in zip(apart, states, strict=True):
        for component in _walk(level, state, blocks, tuple(names)):
            names.append(component.name)
            yield component


class _Leaf:
    """A leaf of a level's state, and the slow weights that its start is made from."""

    def __init__(self, shape, teachers):
        self.bytes, self.teachers = shape.size * shape.dtype.itemsize, teachers


def _start(level: Level) -> PyTree:
    try:
        return level.init(())
    except IndexError as error:
        if str(error) != "tuple index out of range":
            raise
        return ()  # it starts from slower levels, and none are given


def _apart(level: Level, blocks: int, taken: list[str]) -> Level:
    """The level, each that learns in it by the name of its component, of which there is one."""
    if level.parts:
        *two, reset = level.parts
        return dataclasses.replace(level, parts=(*(_apart(part, blocks, taken) for part in two), reset))
    if level.description.objective is None:
        return level
    name = f"{level.name}, {blocks} blocks" if blocks > 1 else level.name
    taken.append(distinct([*taken, name])[-1])
    return dataclasses.replace(level, name=taken[-1])


def _learners(level: Level) -> tuple[str, ...]:
    """The names of what learns in a level."""
    if level.parts:
        return _learners(level.parts[0]) + _learners(level.parts[1])
    return () if level.description.objective is None else (level.name,)


def _walk(
    level: Level, state: PyTree, blocks: int, before: tuple[str, ...], restarts: tuple[str, ...] = ()
) -> Iterator[Component]:
    """A level's components, from fast to slow. `before`: the faster ones; `restarts`: those that reset this one."""
    if level.parts:
        fast, slow, reset = level.parts
        state = state if isinstance(state, Nested) else Nested((), ())
        for component in _walk(fast, state.fast, blocks, before, _learners(slow) if reset else ()):
            before = (*before, component.name)
            yield component
        yield from _walk(slow, state.slow, blocks, before, restarts)
        return
    says, frequency = level.description, level.description.updates / level.period
    if says.objective is None:
        return
    name, step = level.name, ""
    for inner in says.inner:
        if isinstance(inner, optax.GradientTransformation):
            try:
                *memories, weights = learned(inner, {"parameters": jax.ShapeDtypeStruct((4, 4), jnp.float32)}, [""], {})[0]
                step = weights.rule
            except UserError:  # it is for parameters of its own
                memories, step = [], "an optax rule"
        else:
            memories = [Component(inner.name, 1, "step", inner.context, inner.objective, inner.rule, inner.knowledge)]
        new = distinct([*before, *(f"{c.name} of {name}" for c in memories)])[len(before) :]
        renamed = dict(zip((c.name for c in memories), new, strict=True))
        for c in memories:
            needs = (*before, *(renamed[n] for n in c.needs))
            yield dataclasses.replace(
                c, name=renamed[c.name], frequency=c.frequency * frequency, unit="token", needs=needs, state_bytes=None
            )
        before = (*before, *renamed.values())
    start = "initialisation: " + (f"restarts from {listed(restarts)}" if restarts else "a start that slow weights learn")
    leaves = jax.tree.leaves(state)
    teachers = restarts or sorted({label for leaf in leaves for label in leaf.teachers})
    bounded = all(leaf.bytes for leaf in leaves)  # an empty one grows
    yield Component(
        name, frequency, "token",
        context=says.context or (f"what {before[-1]} emits" if before else "a stream of data points"),
        objective=says.objective,
        rule=says.rule or step,
        knowledge="; ".join(filter(None, [start if teachers else "", says.knowledge])),
        needs=before,
        starts_from=tuple(teachers),
        state_bytes=sum(leaf.bytes for leaf in leaves) * blocks or None if bounded else None,
    )  # fmt: skip
