"""Plans of a run under other meshes, memory policies, pieces, chunks and batch sizes, and the best of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from nested_jax.errors import UserError
from nested_jax.parallel.mesh import MeshShape, parse
from nested_jax.parallel.plan import Plan, plan
from nested_jax.train.config import TrainConfig


class Trial(NamedTuple):
    """A run under some flags, and what its step takes."""

    flags: dict[str, Any]
    """Those that are not the given run's, by name."""
    tokens: int
    """Of a step."""
    plan: Plan

    @property
    def rank(self) -> tuple[bool, float]:
        """Whether it does not fit, and the least seconds a token: the least is the best."""
        return not self.plan.fits, max(self.plan.seconds.values()) / self.tokens


def search(
    config: TrainConfig,
    topology: str,
    *,
    compile: Callable[[TrainConfig, str], Plan] = plan,
    tell: Callable[[Trial], object] = id,
) -> list[Trial]:
    """Changes one flag after the other, the mesh first, and keeps of each the value that ranks best.

    A chunk is tried where the model has one; another chunk is another model. Meshes are of all the topology's chips. What
    the mesh, the model or the compiler refuses is left out.

    Args:
        config: the run; its mesh, if it has one, is tried first.
        topology: as of `plan`.
        compile: what makes a plan.
        tell: called with each trial when it is made.

    Returns:
        All trials, the best first.

    Raises:
        UserError: as of `plan`, where the run as given is refused.
    """
    given = {"mesh": config.mesh, "accumulate": config.accumulate, "batch_size": config.batch_size}
    given |= {f"model.{name}": getattr(config.model, name) for name in ("memory_policy", "chunk")}

    def trial(flags: dict[str, Any]) -> Trial:
        flags = {name: value for name, value in flags.items() if value != given[name]}
        own = {name: value for name, value in flags.items() if not name.startswith("model.")}
        model = {name.removeprefix("model."): value for name, value in flags.items() if name.startswith("model.")}
        run = dataclasses.replace(config, model=dataclasses.replace(config.model, **model), **own)
        made = Trial(flags, run.batch_size * run.window, compile(run, topology))
        tell(made)
        return made

    trials = [trial({})]
    best = trials[0]
    chips = math.prod(map(int, topology.partition(":")[2].split("x")))
    for choices in (partial(_meshes, devices=chips), _memory, _chunks, _batches):
        for change in choices(config, best.plan.shape):
            try:
                trials.append(trial(best.flags | change))
            except (UserError, jax.errors.JaxRuntimeError):  # what the compiler cannot do ends no search
                continue
        best = min([best, *trials], key=lambda one: one.rank)
    return sorted(trials, key=lambda one: one.rank)


def _meshes(config: TrainConfig, given: MeshShape, devices: int) -> list[dict[str, Any]]:
    parts = [n for n in (2, 4) if not devices % n]
    shapes = [f"fsdp={devices // n},{axis}={n}" for n in parts for axis in ("tensor", "data", "sequence")]
    return [{"mesh": text} for text in (f"fsdp={devices}", *shapes) if parse(text) != given]


def _memory(config: TrainConfig, best: MeshShape) -> list[dict[str, Any]]:
    """Ways to need less memory: what is kept for the backward pass, and pieces of a device's rows."""
    rows, given = config.batch_size // (best.data * best.fsdp), (config.model.memory_policy, config.accumulate)
    both = itertools.product(dict.fromkeys((given[0], "full", "loops", "blocks")), sorted({1, 2, rows, given[1]}))
    both = [(policy, pieces) for policy, pieces in both if (policy, pieces) != given and not rows % pieces]
    return [{"model.memory_policy": policy, "accumulate": pieces} for policy, pieces in both]


def _chunks(config: TrainConfig, best: MeshShape) -> list[dict[str, Any]]:
    return [] if config.model.attends else [{"model.chunk": n} for n in (64, 128, 256) if n != config.model.chunk]


def _batches(config: TrainConfig, best: MeshShape) -> list[dict[str, Any]]:
    return [{"batch_size": n * config.batch_size} for n in (2, 4)]


def ranking(trials: list[Trial]) -> str:
    """The trials in lines, the best first."""
    lines = [f"{'tokens/s':>12}  {'memory, GB':>10}  bound by; flags that are other than given"]
    for one in trials:
        seconds = one.plan.seconds
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in one.flags.items())
        size = f"{(one.plan.arguments + one.plan.temporaries) / 1e9:,.2f}" if not one.plan.excess else "-"
        speed = f"{one.tokens / max(seconds.values()):,.0f}" if one.plan.fits else "does not fit"
        lines.append(f"{speed:>12}  {size:>10}  {max(seconds, key=seconds.__getitem__)}; {flags or 'as given'}")
    return "\n".join(lines)
