"""The picture drawn: names at the left, dots on a logarithmic axis of frequencies at the right, joined by arrows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from nested_jax.picture.component import Component, closure

SHADES = ("#eef3f8", "#ffffff")
CONTEXT, START, GENERATED, BAR = "#1f5a99", "#c26a1b", "#7a7a7a", "#a9bfd6"
MEANINGS = {
    CONTEXT: ("-", "context: its new state is read by"),
    GENERATED: (":", "generation: gradients through it are the context of"),
    START: ("--", "initialisation: it makes the start of"),
}
ROW, UNIT, LEVELS, BOTTOM = 0.55, 1.15, 0.9, 0.75  # in inches: a row, a unit of the axis, and margins
TOP, LINE = 0.3, 0.2  # inches above the rows, and for each line of the legend
PAD = 0.08  # inches between the edge of the shading and a name


def draw(components: Sequence[Component]) -> Figure:
    """A figure of components in the order of their levels.

    Names and objectives stand in a column of their own, at the left of all dots. Arrows bend to the right of the dots that
    they join and stay between their rows, so that none crosses a text. Where the same arrows lead to neighbouring rows of
    a level, a bar joins their dots and each arrow is drawn once, to the nearest of them.
    """
    places = _places(components)
    x = {c.name: places[_key(c)] for c in components}
    y = {c.name: float(row) for row, c in enumerate(components)}
    rows, width = len(components), max(max(places.values()), 1.0) + 1.7
    arrows = list(_arrows(components))
    groups = _groups(components, arrows)
    legend = [(words, color, dashes, 1.5) for color, (dashes, words) in MEANINGS.items() if color in {a[2] for a in arrows}]
    legend += [("an arrow to one of these leads to each of them", BAR, "-", 5)] if groups else []
    texts = [(c, ", ".join(filter(None, [c.objective or "objective not stated", _count(c)]))) for c in components]
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.4, width - 0.4), ylim=(rows - 0.5, -0.5))
    axes.set_xlabel("update frequency, logarithmic", loc="left")
    options = {
        "xycoords": ("axes fraction", "data"),
        "textcoords": "offset points",
        "va": "center",
        "annotation_clip": False,
    }
    labels = []
    for c, text in texts:
        for words, up, font, color in ((c.name, 6, 10, "black"), (text, -7, 8, "#444444")):
            labels.append(axes.annotate(words, (0, y[c.name]), (0, up), fontsize=font, color=color, **options))
    column = max(label.get_window_extent().width for label in labels) / figure.dpi + 0.3  # inches
    size = LEVELS + column + width * UNIT, TOP + LINE * len(legend) + rows * ROW + BOTTOM
    figure.set_size_inches(*size)
    axes.set_position(((LEVELS + column) / size[0], BOTTOM / size[1], width * UNIT / size[0], rows * ROW / size[1]))
    for label in labels:
        label.set_x(-72 * (column - PAD))
    for c in components:
        at, left = y[c.name], -column / (width * UNIT)
        axes.axhspan(at - 0.5, at + 0.5, left, 1, color=SHADES[c.level % 2], zorder=-1, linewidth=0, clip_on=False)
        axes.plot(x[c.name], at, "o", color=CONTEXT if c.frequency else "gray", markersize=9, zorder=3)
    for group in groups:
        axes.plot([x[group[0]]] * 2, [y[group[0]], y[group[-1]]], color=BAR, linewidth=5, zorder=1)
    for source, target, color in arrows:
        group = next((g for g in groups if target in g), [target])
        if target != min(group, key=lambda name: abs(y[name] - y[source])):  # noqa: B023
            continue
        over, up = (x[target] - x[source]) * UNIT, (y[source] - y[target]) * ROW
        bend = min(0.4 if color == START else 0.25, abs(up / (2 * over)) if over else 1, 1.5 * UNIT / abs(up))
        arrow = FancyArrowPatch(
            (x[source], y[source]), (x[target], y[target]), connectionstyle=f"arc3,rad={math.copysign(bend, up)}",
            arrowstyle="-|>", mutation_scale=13, color=color, linestyle=MEANINGS[color][0], shrinkA=6, shrinkB=6,
            linewidth=1.2, zorder=2,
        )  # fmt: skip
        axes.add_patch(arrow)
    ticks = {places[_key(c)]: c.updates.replace(" a ", "\na ") for c in components}
    axes.set_xticks(list(ticks), list(ticks.values()))
    rows_of: dict[int, list[float]] = {}
    for c in components:
        rows_of.setdefault(c.level, []).append(y[c.name])
    axes.set_yticks([sum(r) / len(r) for r in rows_of.values()], [f"level {level}" for level in rows_of])
    axes.tick_params(length=0)
    axes.tick_params(axis="y", pad=72 * column + 8)
    axes.spines[:].set_visible(False)
    for words, color, dashes, thick in legend:
        axes.plot([], [], color=color, linestyle=dashes, linewidth=thick, label=words)
    if legend:
        axes.legend(loc="lower left", bbox_to_anchor=(-column / (width * UNIT), 1.0), frameon=False, fontsize=9)
    return figure


def _arrows(components: Sequence[Component]) -> Iterator[tuple[str, str, str]]:
    """(from, to, colour), of needs only those that no other need leads to."""
    names = {c.name for c in components}
    above = closure({c.name: c.needs for c in components})
    through = lambda name, needs: any(name in above[m] and m not in above[name] for m in needs if m != name)
    for c in components:
        there = lambda others: [name for name in others if name in names]
        needs = [name for name in there(c.needs) if not through(name, there(c.needs))]
        kinds: tuple[tuple[str, Iterable[str]], ...] = (
            (CONTEXT, needs), (START, there(c.starts_from)), (GENERATED, () if needs else there(c.generated_by))
        )  # fmt: skip
        yield from ((name, c.name, color) for color, others in kinds for name in others)


def _groups(components: Sequence[Component], arrows: Sequence[tuple[str, str, str]]) -> list[list[str]]:
    """Names of neighbours of a level to which the same arrows lead, at least two each."""
    into = lambda c: frozenset((source, color) for source, name, color in arrows if name == c.name)
    runs = itertools.groupby(components, lambda c: (c.level, _key(c), into(c)))
    groups = [(sources, [c.name for c in run]) for (_, _, sources), run in runs]
    return [names for sources, names in groups if sources and len(names) > 1]


def _count(component: Component) -> str:
    return f"{component.parameters:,} parameters" if component.parameters else ""


def _key(component: Component) -> tuple[bool, str, float]:
    return component.frequency == 0, component.unit, component.frequency


def _places(components: Sequence[Component]) -> dict[tuple, float]:
    """The place of each frequency on the axis: its logarithm, at least 1 apart; 0 and infinity are the ends."""
    places: dict[tuple, float] = {}
    x, last = 0.0, None
    for c in reversed(components):
        if _key(c) in places:
            continue
        if last is not None:
            finite = last.unit == c.unit and last.frequency and c.frequency < math.inf
            x += max(1.0, math.log10(c.frequency / last.frequency)) if finite else 1.3
        places[_key(c)], last = x, c
    return places
