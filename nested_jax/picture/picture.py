"""The picture of a system: its components in order of their update frequency, as a table, a dict and a figure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nested_jax.picture.component import Component, closure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

COLUMNS = ("component", "level", "updates", "context flow", "objective", "rule", "knowledge", "parameters", "state bytes")


@dataclass(frozen=True)
class Picture:
    """The nested-learning picture of a system, made by `describe`.

    Args:
        components: in order of their level, the fastest first.
        optimizer_bytes: size of the optimizer's whole state, its counters and buffers included.

    >>> picture = Picture.of([Component("weights", 1, "step", needs=("momentum",)), Component("momentum", 1, "step")])
    >>> [(c.name, c.level) for c in picture.components], picture.levels
    ([('momentum', 1), ('weights', 2)], 2)
    """

    components: tuple[Component, ...]
    optimizer_bytes: int = 0

    @classmethod
    def of(cls, components: Sequence[Component], optimizer_bytes: int = 0) -> Picture:
        """Orders components by levels (NL Def. 2).

        A is faster than B if its frequency is higher, or if they are equal and B's update reads A's new state; otherwise
        they share a level. Updates per step are slower than updates per token.

        Args:
            components: with names that differ; their `level` is not read.
            optimizer_bytes: see `Picture`.

        Returns:
            The picture, in which every component has its level.
        """
        key = lambda c: (c.frequency == 0, c.unit == "step" and c.frequency > 0, -c.frequency)
        above = closure({c.name: c.needs if c.frequency else () for c in components})
        ordered: list[Component] = []
        level = 0
        for place in sorted({key(c) for c in components}):
            equal = {c.name for c in components if key(c) == place}
            while equal:  # the fastest are those that need no other, except one that needs them in return
                waits = lambda name, equal=equal: any(name not in above[other] for other in above[name] & equal)
                first = {name for name in equal if not waits(name)}
                level += 1
                ordered += [dataclasses.replace(c, level=level) for c in components if c.name in first]
                equal -= first
        return cls(tuple(ordered), optimizer_bytes)

    @property
    def levels(self) -> int:
        """The number of levels."""
        return len({c.level for c in self.components})

    @property
    def parameters(self) -> int:
        """The number of parameters that the optimizer learns, in all components."""
        return sum(c.parameters for c in self.components)

    @property
    def state_bytes_per_parameter(self) -> float:
        """Bytes of the optimizer's state per parameter."""
        return self.optimizer_bytes / max(self.parameters, 1)

    def to_dict(self) -> dict[str, Any]:
        """The picture as numbers, strings and lists, for JSON; an infinite frequency is the string "inf".

        Returns:
            The sums `levels`, `parameters`, `optimizer_bytes`, `state_bytes_per_parameter`, and `components`, a list of
            dicts with the fields of `Component`.

        >>> Picture.of([Component("weights", 1, "step")]).to_dict()["components"][0]["frequency"]
        1
        """
        plain = lambda value: [*value] if isinstance(value, tuple) else "inf" if value == math.inf else value
        rows = [{name: plain(value) for name, value in dataclasses.asdict(c).items()} for c in self.components]
        totals = {"levels": self.levels, "parameters": self.parameters, "optimizer_bytes": self.optimizer_bytes}
        return totals | {"state_bytes_per_parameter": self.state_bytes_per_parameter, "components": rows}

    def markdown(self) -> str:
        """A Markdown table with one row per component, then the sums in one line.

        >>> print(Picture.of([Component("weights", 1, "step")]).markdown().splitlines()[2])
        | weights | 1 | 1 a step |  | not stated |  |  |  |  |
        """
        line = lambda cells: "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        rule = "|" + "|".join("---:" if name in COLUMNS[-2:] else "---" for name in COLUMNS) + "|"
        return "\n".join([line(COLUMNS), rule, *(line(c.row()) for c in self.components), "", self.summary()])

    def summary(self) -> str:
        """The sums in one line.

        >>> Picture.of([Component("weights", 1, "step", parameters=4)], optimizer_bytes=8).summary()
        '1 level, 4 parameters, 2.00 bytes of optimizer state per parameter.'
        """
        text = f"{self.levels} level{'s' * (self.levels != 1)}, {self.parameters:,} parameters"
        if not self.optimizer_bytes:
            return f"{text}."
        return f"{text}, {self.state_bytes_per_parameter:.2f} bytes of optimizer state per parameter."

    def rich(self) -> Table:
        """A `rich` table for a terminal; `rich.print(picture)` prints it.

        >>> Picture.of([Component("weights", 1, "step")]).rich().row_count
        1
        """
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=box.SIMPLE, caption=self.summary(), caption_justify="left", pad_edge=False)
        names = ("level", "component", "updates", "objective, rule", "context flow, knowledge", "parameters, bytes")
        for name in names:
            table.add_column(name, justify="right" if name == names[-1] else "left", overflow="fold")
        pair = lambda above, below: f"{above}\n{below}" if below else above
        for before, c in zip((None, *self.components), self.components, strict=False):
            if before and before.level != c.level:
                table.add_section()
            name, level, updates, context, objective, rule, knowledge, parameters, size = map(escape, c.row())
            table.add_row(level, name, updates, pair(objective, rule), pair(context, knowledge), pair(parameters, size))
        return table

    def __rich__(self) -> Table:
        return self.rich()

    def plot(self) -> Figure:
        """A matplotlib figure: one row per component, fastest first, over a logarithmic axis of update frequencies.

        Arrows show whose new state an update reads, which component makes the start of another, and where gradients come
        from. `picture.plot().savefig("picture.png")` writes it to a file.

        >>> [label.get_text() for label in Picture.of([Component("weights", 1, "step")]).plot().axes[0].get_yticklabels()]
        ['level 1']
        """
        from nested_jax.picture.figure import draw

        return draw(self.components)
