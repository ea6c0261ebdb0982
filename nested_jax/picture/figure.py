"""The picture drawn: one lane a level, from fast to slow, over a logarithmic axis of update frequencies."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from nested_jax.picture.component import closure

if TYPE_CHECKING:
    from nested_jax.picture.component import Component, Picture

SHADES = ("#eef3f8", "#ffffff")
CONTEXT, START, GENERATED = "#1f5a99", "#c26a1b", "#7a7a7a"


def draw(picture: Picture) -> Figure:
    """A dot for every component, its name and objective beside it; arrows for its context and for its start."""
    places = _places(picture.components)
    at = {c.name: (places[_key(c)], row) for row, c in enumerate(picture.components)}
    rows, most = len(at), max(places.values())
    figure = Figure(figsize=(13, 1.6 + 0.55 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(
        xlabel="update frequency, logarithmic, close ones set apart", xlim=(-0.6, most + 2.8), ylim=(rows - 0.4, -0.6)
    )
    for c in picture.components:
        x, y = at[c.name]
        axes.axhspan(y - 0.5, y + 0.5, color=SHADES[c.level % 2], zorder=0, linewidth=0)
        axes.plot(x, y, "o", color=CONTEXT if c.frequency else "gray", markersize=9, zorder=3)
        name, size = c.name, f"{c.parameters:,} parameters" if c.parameters else ""
        words = ", ".join(filter(None, [c.objective or "objective not stated", size]))
        for text, down, font, color in ((name, 5, 10, "black"), (words, -8, 8, "#444444")):
            box = {"boxstyle": "square,pad=0.1", "color": SHADES[c.level % 2], "alpha": 0.85}
            axes.annotate(
                text,
                (x, y),
                (12, down),
                textcoords="offset points",
                fontsize=font,
                color=color,
                va="center",
                bbox=box,
                zorder=4,
            )
    above = closure({c.name: set(c.needs) for c in picture.components})
    for c in picture.components:
        nearest = {
            n for n in c.needs if n in at and not any(n in above[m] for m in c.needs if m != n and n not in above.get(n, ()))
        }
        kinds = (
            (CONTEXT, "-", nearest, 0.25),
            (START, "--", c.starts_from, -0.25),
            (GENERATED, ":", c.generated_by if not nearest else (), 0.25),
        )
        for color, dashes, names, bend in kinds:
            for name in names:
                if name in at:
                    arrow = FancyArrowPatch(
                        at[name], at[c.name], connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=13,
                        color=color, linestyle=dashes, shrinkA=6, shrinkB=6, linewidth=1.2, zorder=2,
                    )  # fmt: skip
                    axes.add_patch(arrow)
    ticks = {place: c.updates for c in picture.components for place in [places[_key(c)]]}
    axes.set_xticks(list(ticks), [text.replace(" a ", "\na ") for text in ticks.values()])
    first = {}
    for c in picture.components:
        first.setdefault(c.level, []).append(at[c.name][1])
    axes.set_yticks([sum(r) / len(r) for r in first.values()], [f"level {level}" for level in first])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.plot([], [], color=CONTEXT, label="context: its new state is read by")
    axes.plot([], [], color=GENERATED, linestyle=":", label="generation: gradients through it are the context of")
    axes.plot([], [], color=START, linestyle="--", label="initialisation: it makes the start of")
    axes.legend(loc="upper left", bbox_to_anchor=(0, 1.0), frameon=False, fontsize=9)
    return figure


def _key(component: Component) -> tuple[bool, str, float]:
    return component.frequency == 0, component.unit, component.frequency


def _places(components: tuple[Component, ...]) -> dict[tuple, float]:
    """Where each frequency lies: by its logarithm, at least 1 apart, 0 and infinity at the ends."""
    places, x, last = {}, 0.0, None
    for c in reversed(components):
        if _key(c) in places:
            continue
        if last is not None:
            finite = last.unit == c.unit and last.frequency and c.frequency < math.inf
            x += max(1.0, math.log10(c.frequency / last.frequency)) if finite else 1.3
        places[_key(c)], last = x, c
    return places
