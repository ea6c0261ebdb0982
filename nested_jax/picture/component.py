"""The picture of a system: its components in order of their update frequency, as a table and as a dict."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import rich.table
    from matplotlib.figure import Figure

COLUMNS = ("component", "level", "updates", "context flow", "objective", "rule", "knowledge", "parameters", "state bytes")


@dataclass(frozen=True)
class Component:
    """One row: something that learns, or would if it were not frozen.

    level: 1 for the fastest; frequency: updates per unit; needs: components whose new state its update reads at the same
    moment, by name; starts_from: components that its start is a function of; generated_by: the nearest component that writes
    its context by back-propagation; parameters: learned by an optimizer; state_bytes: what it holds, of one sequence where
    it learns in context; None where that has no bound, or is not known.
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
        """The frequency in words.

        >>> Component("momentum", 5 / 1024, "token").updates, Component("weights", 0.125, "step").updates
        ('5/1,024 a token', '1/8 a step')
        """
        if self.frequency in (0, math.inf):
            return "0" if self.frequency == 0 else "∞"
        share = Fraction(self.frequency).limit_denominator(10**9)
        number = f"{share.numerator:,}" + (f"/{share.denominator:,}" if share.denominator > 1 else "")
        return f"{number} a {self.unit}"

    def row(self) -> tuple[str, ...]:
        """What a table shows, by `COLUMNS`."""
        count = lambda number: f"{number:,}" if number else ""
        words = self.context, self.objective or "not stated", self.rule, self.knowledge
        return self.name, str(self.level), self.updates, *words, count(self.parameters), count(self.state_bytes)


@dataclass(frozen=True)
class Picture:
    """The nested-learning picture of a system, see `describe`. Components are sorted from fast to slow.

    optimizer_bytes: of the whole state of the optimizer, its counters and buffers too.
    """

    components: tuple[Component, ...]
    optimizer_bytes: int = 0

    @classmethod
    def of(cls, components: Sequence[Component], optimizer_bytes: int = 0) -> Picture:
        """Puts components on levels (NL Def. 2).

        A is faster than B if its frequency is higher, or if they are equal and B's update reads A's new state; otherwise
        they share a level. Updates a step are slower than updates a token.
        """
        key = lambda c: (c.frequency == 0, c.unit == "step" and c.frequency > 0, -c.frequency)
        above = closure({c.name: set(c.needs) if c.frequency else set() for c in components})
        levels, level = [], 0
        for place in sorted({key(c) for c in components}):
            equal = {c.name for c in components if key(c) == place}
            while equal:  # those that need no other, but for what needs them in return, are the fastest
                waits = lambda name, equal=equal: any(name not in above[other] for other in above[name] & equal)
                first = {name for name in equal if not waits(name)}
                level += 1
                levels += [dataclasses.replace(c, level=level) for c in components if c.name in first]
                equal -= first
        return cls(tuple(levels), optimizer_bytes)

    @property
    def levels(self) -> int:
        """How many there are."""
        return len({c.level for c in self.components})

    @property
    def parameters(self) -> int:
        """Learned by an optimizer, in all components."""
        return sum(c.parameters for c in self.components)

    @property
    def state_bytes_per_parameter(self) -> float:
        """Of the optimizer."""
        return self.optimizer_bytes / max(self.parameters, 1)

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings and lists, for JSON: an infinite frequency is the string "inf"."""
        plain = lambda value: [*value] if isinstance(value, tuple) else "inf" if value == math.inf else value
        rows = [{name: plain(value) for name, value in dataclasses.asdict(c).items()} for c in self.components]
        totals = {"levels": self.levels, "parameters": self.parameters, "optimizer_bytes": self.optimizer_bytes}
        return totals | {"state_bytes_per_parameter": self.state_bytes_per_parameter, "components": rows}

    def markdown(self) -> str:
        """The table, and a line with the sums."""
        line = lambda cells: "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        rule = "|" + "|".join("---:" if name in COLUMNS[-2:] else "---" for name in COLUMNS) + "|"
        return "\n".join([line(COLUMNS), rule, *(line(c.row()) for c in self.components), "", self.summary()])

    def summary(self) -> str:
        """The sums in a line."""
        words = f"{self.levels} level{'s' * (self.levels != 1)}, {self.parameters:,} parameters"
        if not self.optimizer_bytes:
            return f"{words}."
        return f"{words}, {self.state_bytes_per_parameter:.2f} bytes of optimizer state per parameter."

    def rich(self) -> rich.table.Table:
        """The table for a terminal."""
        from rich import box, table
        from rich.markup import escape

        made = table.Table(box=box.SIMPLE, caption=self.summary(), caption_justify="left", pad_edge=False)
        names = ("level", "component", "updates", "objective, rule", "context flow, knowledge", "parameters, bytes")
        for name in names:
            made.add_column(name, justify="right" if name in names[-1:] else "left", overflow="fold")
        pair = lambda above, below: f"{above}\n{below}" if below else above
        for before, c in zip((None, *self.components), self.components, strict=False):
            if before and before.level != c.level:
                made.add_section()
            name, level, updates, context, objective, rule, knowledge, parameters, size = map(escape, c.row())
            made.add_row(level, name, updates, pair(objective, rule), pair(context, knowledge), pair(parameters, size))
        return made

    def __rich__(self) -> rich.table.Table:
        return self.rich()

    def plot(self) -> Figure:
        """A matplotlib figure: one lane a level, from fast to slow, over a logarithmic axis of update frequencies."""
        from nested_jax.picture.figure import draw

        return draw(self)


def distinct(names: Sequence[str]) -> list[str]:
    """With a number after a name that was there before.

    >>> distinct(["a", "b", "a", "a 2"])
    ['a', 'b', 'a 2', 'a 2 2']
    """
    made = []
    for name in names:
        numbered = (f"{name} {i}" for i in itertools.count(2))
        made.append(next(new for new in itertools.chain([name], numbered) if new not in made))
    return made


def closure(needs: dict[str, set[str]]) -> dict[str, set[str]]:
    """All that each needs, also by way of others."""
    found = {}
    for name in needs:
        seen, rest = set(), list(needs[name])
        while rest:
            other = rest.pop()
            if other not in seen:
                seen.add(other)
                rest += needs.get(other, ())
        found[name] = seen
    return found
