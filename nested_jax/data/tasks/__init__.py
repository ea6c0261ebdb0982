"""Synthetic tasks whose labels show what a model can do with its memory: formal languages, groups, recall, MAD, passkey."""

from __future__ import annotations

import difflib

from nested_jax.data.tasks.blocks import EqualBlocks
from nested_jax.data.tasks.groups import GroupWords
from nested_jax.data.tasks.mad_compression import Compression
from nested_jax.data.tasks.mad_copying import SelectiveCopying
from nested_jax.data.tasks.mad_fuzzy import FuzzyRecall
from nested_jax.data.tasks.mad_memorization import Memorization
from nested_jax.data.tasks.mad_recall import InContextRecall
from nested_jax.data.tasks.mqar import MQAR
from nested_jax.data.tasks.parity import Parity
from nested_jax.data.tasks.passkey import Passkey
from nested_jax.data.tasks.repeated import Repeated
from nested_jax.data.tasks.shuffle import ShuffledBrackets
from nested_jax.data.tasks.task import Task, score
from nested_jax.errors import UserError, shown

TASKS: dict[str, Task] = {
    "parity": Parity(),
    "aa-star": Repeated("aa"),
    "abab-star": Repeated("abab"),
    "anbn": EqualBlocks(2),
    "anbncn": EqualBlocks(3),
    "shuffle-2": ShuffledBrackets(2),
    "s3": GroupWords("s3"),
    "a5": GroupWords("a5"),
    "mqar": MQAR(),
    "mad-recall": InContextRecall(),
    "mad-fuzzy-recall": FuzzyRecall(),
    "mad-noisy-recall": InContextRecall(noise=0.2),
    "mad-selective-copying": SelectiveCopying(),
    "mad-compression": Compression(),
    "mad-memorization": Memorization(),
    "passkey": Passkey(),
}
"""Tasks with their default options, by name."""


def task(name: str) -> Task:
    """The task of a name, with its default options.

    Args:
        name: one of `TASKS`.

    Returns:
        The task.

    Raises:
        UserError: there is no such task.

    >>> task("parity")
    Parity()
    >>> task("pairity")
    Traceback (most recent call last):
    nested_jax.errors.UserError: task 'pairity' is unknown: give parity
    """
    if not isinstance(name, str) or name not in TASKS:
        near = difflib.get_close_matches(name if isinstance(name, str) else "", TASKS) or list(TASKS)
        raise UserError(f"task {shown(name)} is unknown: give {', '.join(near[:-1])}{' or ' * (len(near) > 1)}{near[-1]}")
    return TASKS[name]


__all__ = [
    "MQAR",
    "TASKS",
    "Compression",
    "EqualBlocks",
    "FuzzyRecall",
    "GroupWords",
    "InContextRecall",
    "Memorization",
    "Parity",
    "Passkey",
    "Repeated",
    "SelectiveCopying",
    "ShuffledBrackets",
    "Task",
    "score",
    "task",
]
