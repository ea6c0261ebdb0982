"""describe: the nested-learning picture of a level, a sequence layer, a model, an optimizer, or of several together."""

from __future__ import annotations

import dataclasses
import itertools
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from nested_jax.description import Description
from nested_jax.errors import UserError, shown
from nested_jax.level import Level, Nested
from nested_jax.models.config import ModelConfig
from nested_jax.models.module import LanguageModel
from nested_jax.picture.component import Component, distinct, listed
from nested_jax.picture.graph import Graph
from nested_jax.picture.parts import Part, parts_of
from nested_jax.picture.picture import Picture
from nested_jax.picture.trial import Extra
from nested_jax.picture.words import component_of
from nested_jax.typing import PyTree

_ALONE = {"parameters": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}  # what an optimizer moves if nothing else is given


class _Learner(NamedTuple):
    """A system without its optimizer: its slow weights' shapes, what each is for, and the levels that they make."""

    shapes: PyTree
    serves: Callable[[Sequence[str]], str]
    levels: Callable[[PyTree], list[tuple[Level, int]]]
    objective: str = "the loss L"
    context: str = ""  # of the slow weights; by default what the optimizer makes of gradients


def describe(system: Any, *, tokens_per_step: float | None = None, extra: Extra | None = None) -> Picture:
    """The nested-learning picture of a system: what learns in it, how often, from what, towards what (NL Def. 1-4).

        f_A = updates of A per token;      A is faster than B if f_A > f_B, or f_A = f_B and B_t is a function of A_t

    No optimizer is known by its name. A `Level` has a period and a `Description`. Of an optax transformation the memories,
    their order, periods and objectives are measured: its `update` is traced, and run on small stand-ins of the parameters
    with random gradients. Weights that nothing updates have frequency 0.

    Args:
        system: a `Level`, a sequence layer of `nested_jax.memory`, a `LanguageModel` or `ModelConfig`, any other
            `flax.nnx.Module`, of which only `nnx.Param`s count, or tree of parameters (or of their shapes), an optax
            transformation, or a tuple of some of these with at most one optimizer, which moves all parameters.
        tokens_per_step: data points of one step of the optimizer; None leaves its frequencies in updates a step.
        extra: for optimizers whose `update` takes more than gradients and parameters: from stand-ins of the parameters to
            these arguments, by keyword.

    Returns:
        A `Picture`: `.components` from fast to slow, `.levels`, `.rich()`, `.markdown()`, `.to_dict()`, `.plot()`.

    Raises:
        UserError: the system is none of these, nothing in it can learn, it has two optimizers or one without parameters, an
            optimizer raises an error on the parameters or on `extra`, or tokens_per_step is no positive number.

    >>> import optax
    >>> mlp = {"up": jnp.ones((8, 32)), "down": jnp.ones((32, 8))}
    >>> picture = describe((mlp, optax.sgd(0.1, momentum=0.9)))
    >>> for component in picture.components:
    ...     print(component.level, component.name, "|", component.objective, "|", component.rule)
    1 trace (Trace) | -<m, g> + 0.05 |m|^2 | m <- 0.9 m + g
    2 parameters | the loss L | adds what comes of trace (Trace)

    A level with a description:

    >>> from nested_jax import Description
    >>> mean = Level(lambda slower: jnp.zeros(3), lambda m, x, slower: (m + 0.1 * (x.mean(0) - m), m), 16, "mean",
    ...     description=Description("1/2 |m - x|^2", "gradient descent"))
    >>> [(c.name, c.updates, c.objective) for c in describe(mean).components]
    [('mean', '1/16 a token', '1/2 |m - x|^2')]

    Source: NL, Definitions 1-4 and section 3.3.
    """
    if extra is not None and not callable(extra):
        raise UserError(f"describe: extra {shown(extra)}: give a function of the parameters, or None")
    if tokens_per_step is not None and not (isinstance(tokens_per_step, numbers.Real) and 0 < tokens_per_step < math.inf):
        raise UserError(f"describe: tokens_per_step {tokens_per_step!r} is no positive number: give one, or None")
    given = list(system) if type(system) in (tuple, list) else [system]
    given = [one.gradient_transformation() if isinstance(one, optax.MultiSteps) else one for one in given]
    if not given:
        raise UserError("describe: () is empty: give a level, layer, model, optimizer or tree of parameters")
    optimizers = [one for one in given if isinstance(one, optax.GradientTransformation)]
    if len(optimizers) > 1:
        raise UserError(f"describe: {len(optimizers)} optimizers: give one, such as their optax.chain or optax.partition")
    learners = [_learner(one) for one in given if not isinstance(one, optax.GradientTransformation)] or [_learner(_ALONE)]
    fast = [memory for learner in learners for memory in _in_context(learner)]
    parts, size, words = _slow(learners, optimizers[0] if optimizers else None, extra)
    if not fast and not parts:
        raise UserError("describe: nothing can learn in this: give parameters that are not empty, or a level")
    for one, name in zip([*fast, *parts], distinct([one.name for one in [*fast, *parts]]), strict=True):
        one.name = name
    rows = [memory.component(parts) for memory in fast]
    writers = tuple(memory.name for memory in fast[-1:])
    slow = [component_of(part, *words.get(part.label or "", ("", "")), writers) for part in parts]
    if tokens_per_step is not None:
        slow = [dataclasses.replace(c, frequency=c.frequency / tokens_per_step, unit="token") for c in slow]
    return Picture.of(rows + slow, size)


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
        model = lambda weights: cast(LanguageModel, nnx.merge(graph, nnx.State(weights), rest))
        return _Learner(shapes, system.serves, lambda weights: model(weights).levels(), "next-token loss", "corpus")
    if hasattr(system, "init_weights") and hasattr(system, "levels"):
        shapes = jax.eval_shape(system.init_weights, jax.random.key(0))
        return _Learner(shapes, lambda path: "slow weights", lambda w: [(v, 1) for v in system.levels(w, 1)])
    leaves = jax.tree.leaves(system)
    odd = next((leaf for leaf in leaves if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype")), None)
    if odd is not None or not leaves:
        what = type(system if odd is None else odd).__name__
        raise UserError(f"describe: {what} is no level, layer, model, optimizer or tree of parameters: give one of these")
    return _Learner(system, lambda path: "parameters", lambda weights: [])


def _slow(
    learners: Sequence[_Learner], optimizer: optax.GradientTransformation | None, extra: Extra | None
) -> tuple[list[Part], int, dict[str, tuple[str, str]]]:
    """The parts of the parameters and of what moves them, the bytes of its state, (objective, context) by label."""
    learners = [learner for learner in learners if any(leaf.size for leaf in jax.tree.leaves(learner.shapes))]
    if not learners and optimizer is not None:
        raise UserError("describe: the optimizer has no parameters to move: give these too, (system, parameters, optimizer)")
    if not learners:
        return [], 0, {}
    shapes = learners[0].shapes if len(learners) == 1 else tuple(learner.shapes for learner in learners)
    labels = [label for learner in learners for label in _labels(learner)]
    words = {label: (learner.objective, learner.context) for learner in learners for label in _labels(learner)}
    return *parts_of(optimizer or optax.set_to_zero(), shapes, labels, extra), words


def _labels(learner: _Learner) -> list[str]:
    """What every leaf is for."""
    plain = lambda path: tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    return [learner.serves(plain(path)) for path, _ in jax.tree_util.tree_leaves_with_path(learner.shapes)]


@dataclass(eq=False)
class _Fast:
    """What learns in context: a level, or a memory whose new state a level's step reads."""

    name: str
    frequency: float  # updates per token
    description: Description
    blocks: int = 1
    start: PyTree = None
    resets: tuple[_Fast, ...] = ()  # levels that restart it
    needs: tuple[_Fast, ...] = ()  # whose new state its update reads
    teachers: tuple[str, ...] = ()  # the slow weights that its start is a function of, by label
    bytes: int | None = None

    def component(self, slow: Sequence[Part]) -> Component:
        """Its row, of a system with these slow parts."""
        of = lambda label: [part.name for part in slow if part.label == label] or [label]
        resets = [level.name for level in self.resets if level.description.objective is not None]
        starts = resets or [name for label in self.teachers for name in of(label)]
        flow = f"what {self.needs[-1].name} emits" if self.needs else "a stream of data points"
        start = f"restarts from {listed(resets)}" if resets else "a start that slow weights learn"
        return Component(
            self.name, self.frequency, "token",
            context=self.description.context or flow,
            objective=self.description.objective or "",
            rule=self.description.rule,
            knowledge="; ".join(filter(None, [f"initialisation: {start}" if starts else "", self.description.knowledge])),
            needs=tuple(memory.name for memory in self.needs),
            starts_from=tuple(starts),
            state_bytes=self.bytes,
        )  # fmt: skip


def _in_context(learner: _Learner) -> list[_Fast]:
    """What learns in context, from fast to slow."""
    levels: list[_Fast] = []

    def starts(weights: PyTree) -> list[PyTree]:
        levels[:] = [one for level, blocks in learner.levels(weights) for one in _opened(level, _Slower(), blocks)[1]]
        return [level.start for level in levels]

    graph = Graph(starts, learner.shapes)
    labels = dict(zip(graph.inputs, _labels(learner), strict=True))
    avals: list[Any] = graph.closed.out_avals
    leaves = iter(zip(graph.outputs, avals, strict=True))
    learning: list[_Fast] = []
    for level in levels:
        own = list(itertools.islice(leaves, len(jax.tree.leaves(level.start))))
        sizes = [aval.size * aval.dtype.itemsize for _, aval in own]
        level.bytes = sum(sizes) * level.blocks or None if all(sizes) else None  # an empty one grows
        level.teachers = tuple(sorted({labels[v] for v in graph.behind([out for out, _ in own]) if v in labels}))
        if level.description.objective is None:
            continue
        for inner in level.description.inner:
            learning += _inner(level, inner, tuple(learning))
        level.needs = tuple(learning)
        learning.append(level)
    return learning


def _inner(level: _Fast, inner: Any, faster: tuple[_Fast, ...]) -> list[_Fast]:
    """The memories inside a level's step, of a description or of an optax rule, which also gives the level its rule."""
    if isinstance(inner, Description):
        return [_Fast(f"{inner.name} of {level.name}", level.frequency, inner, needs=faster)]
    try:
        *parts, weights = parts_of(inner, {"parameters": jax.ShapeDtypeStruct((4, 4), jnp.float32)}, [""])[0]
        step = component_of(weights, "").rule
    except UserError:  # it is for parameters of its own
        parts, step = [], "an optax rule"
    level.description = dataclasses.replace(level.description, rule=level.description.rule or step)
    memories = {}
    for part in parts:
        row = component_of(part, "")
        description = Description(row.objective, row.rule, row.context, row.knowledge)
        memories[part] = _Fast(f"{part.name} of {level.name}", part.frequency * level.frequency, description)
    for part, memory in memories.items():
        memory.needs = (*faster, *(memories[other] for other in part.above))
    return list(memories.values())


class _Unknown(Exception):
    """The state of a slower level was read that is not known."""


class _Slower(tuple):
    """The states of slower levels as far as they are known: `_Unknown` is raised for one that is not, and for any other."""

    def __getitem__(self, index):
        try:
            found = super().__getitem__(index)
        except IndexError:
            raise _Unknown from None
        if found is _Unknown or (isinstance(index, slice) and (not found or any(one is _Unknown for one in found))):
            raise _Unknown
        return found


def _opened(level: Level, slower: _Slower, blocks: int, resets: tuple[_Fast, ...] = ()) -> tuple[PyTree, list[_Fast]]:
    """A level's first state, `_Unknown` if it reads one that is not known; and the levels in it, from fast to slow."""
    if level.parts is not None:
        fast, slow, reset = level.parts
        slow_state, slow_levels = _opened(slow, slower, blocks, resets)
        restart = tuple(slow_levels) if reset else ()
        fast_state, fast_levels = _opened(fast, _Slower((slow_state, *slower)), blocks, restart)
        known = slow_state is not _Unknown and fast_state is not _Unknown
        return Nested(slow_state, fast_state) if known else _Unknown, fast_levels + slow_levels
    try:
        state = level.init(slower)
    except _Unknown:
        state = _Unknown
    name = f"{level.name}, {blocks} blocks" if blocks > 1 else level.name
    frequency, start = level.description.updates / (level.period * level.tokens), () if state is _Unknown else state
    return state, [_Fast(name, frequency, level.description, blocks, start, resets)]
