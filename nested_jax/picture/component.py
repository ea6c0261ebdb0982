"""A component of a system: one row of its picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal


@dataclass(frozen=True)
class Component:
    """A set of arrays that learns with one update rule, or that is frozen: one row of a `Picture`.

    Args:
        name: unique in its picture.
        frequency: updates per unit (NL Def. 2): 0 if frozen, infinity if it solves its objective at every query.
        unit: of the frequency; an optimizer's steps are counted in tokens where the tokens of a step are known.
        context: the context flow that it compresses.
        objective: what its updates minimise; "" where it is not known.
        rule: its update.
        knowledge: how knowledge of other levels reaches it (NL section 3.3).
        needs: names of the components whose new state its update reads at the same moment.
        starts_from: names of the components that its start is a function of.
        generated_by: the component next to the output, whose gradients are its context.
        parameters: how many parameters an optimizer learns in it.
        state_bytes: bytes of its state, of one sequence where it learns in context; None if unbounded or unknown.
        level: 1 for the fastest level; 0 outside a picture.

    >>> Component("weights", 1 / 8, "step", objective="the loss L").row()[:5]
    ('weights', '0', '1/8 a step', '', 'the loss L')
    """

    name: str
    frequency: float
    unit: Literal["token", "step"]
    context: str = ""
    objective: str = ""
    rule: str = ""
    knowledge: str = ""
    needs: tuple[str, ...] = ()
    starts_from: tuple[str, ...] = ()
    generated_by: tuple[str, ...] = ()
    parameters: int = 0
    state_bytes: int | None = None
    level: int = 0

    @property
    def updates(self) -> str:
        """The frequency as text.

        >>> Component("momentum", 5 / 1024, "token").updates, Component("weights", 0.125, "step").updates
        ('5/1,024 a token', '1/8 a step')
        """
        if self.frequency in (0, math.inf):
            return "0" if self.frequency == 0 else "∞"
        share = Fraction(self.frequency).limit_denominator(10**9)
        number = f"{share.numerator:,}" + (f"/{share.denominator:,}" if share.denominator > 1 else "")
        return f"{number} a {self.unit}"

    def row(self) -> tuple[str, ...]:
        """The texts of its table row, in the order of the columns of `Picture.markdown`."""
        count = lambda number: f"{number:,}" if number else ""
        texts = self.context, self.objective or "not stated", self.rule, self.knowledge
        return self.name, str(self.level), self.updates, *texts, count(self.parameters), count(self.state_bytes)


def distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number after each that occurred before.

    >>> distinct(["a", "b", "a", "a 2"])
    ['a', 'b', 'a 2', 'a 2 2']
    """
    made: list[str] = []
    for name in names:
        numbered = (f"{name} {i}" for i in itertools.count(2))
        made.append(next(new for new in itertools.chain([name], numbered) if new not in made))
    return made


def listed(names: Iterable[str]) -> str:
    """Names joined by commas and "and", in quotation marks where a name could be read as several.

    >>> listed(["mu", "trace, slow"])
    'mu and "trace, slow"'
    """
    names = sorted(set(names))
    several = lambda name: " and " in name or (", " in name and len(names) > 1)
    return joined([f'"{name}"' if several(name) else name for name in names])


def joined(texts: Sequence[str]) -> str:
    """Texts joined by commas and "and", in their order."""
    return " and ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))


def closure(needs: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """All that each name needs, directly or through others.

    >>> sorted(closure({"a": ["b"], "b": ["c"], "c": []})["a"])
    ['b', 'c']
    """
    found = {}
    for name in needs:
        seen: set[str] = set()
        rest = list(needs[name])
        while rest:
            other = rest.pop()
            if other not in seen:
                seen.add(other)
                rest += needs.get(other, ())
        found[name] = seen
    return found
