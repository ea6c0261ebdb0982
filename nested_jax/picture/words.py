"""What a table says of the parts of an optimizer: context flow, objective, rule, knowledge transfer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from nested_jax.picture.trial import Recurrence

if TYPE_CHECKING:
    from nested_jax.picture.memories import Part


def words_of(part: Part, n: int, objective: str, context: str) -> tuple[str, str, str, str]:
    """(context flow, objective, rule, knowledge transfer)."""
    above, read = (listed(p.name for p in parts) for parts in (part.direct, part.direct | part.recalls))
    flow = _in_a_row([*part.sources, *([f"what comes of {read}"] if read else [])])
    if part.gathers:
        flow = f"s, gathered from the {flow} of {1 / part.frequency:.0f} steps"
    if part.loop:
        goal = "1/4 |O^T O - I|^2" if part.solves else ""
        count = part.loop.length or "some"
        return flow, goal, f"{count} iterations", f"initialisation: starts from {above or 'gradients'} each time"
    if part.leaves[0] < n:
        return _weights(part, flow, objective, context)
    transfer = "generation: back-propagation writes the gradients"
    if "gradients" not in part.sources and not above:
        transfer = "direct parametric conditioning on the weights"
    goal, rule = _law(part.law, "u" if above else "s" if part.gathers else "g", part.gathers)
    own = part.description
    return own.context or flow, own.objective or goal, own.rule or rule, own.knowledge or transfer


def _weights(part: Part, flow: str, objective: str, context: str) -> tuple[str, str, str, str]:
    law = part.law
    if part.frequency == 0:
        return "", objective, "frozen", ""
    letter = "s" if part.gathers else "g"
    plain = law.power == 1 and (law.whole or part.gathers)
    if part.direct or part.recalls:
        step = f"adds {flow}"
    else:
        step = f"W <- W {'-' if law.add < 0 else '+'} eta {letter}" if plain else f"W <- W + f({letter})"
    decay = ", decays" if part.decays else ""
    own = part.description
    return (
        context or flow,
        own.objective or objective,
        own.rule or step + decay,
        "back-propagation through the faster levels",
    )


def _law(law: Recurrence, letter: str, gathers: bool) -> tuple[str, str]:
    """The objective whose gradient step, with decay, is the measured recurrence, and that."""
    holds = law.whole or gathers  # what was gathered before adds to the gradient
    if law.keep is None or not law.apart:
        return "", ""
    if law.add == 0 and not holds and letter != "u":
        return "", ""
    held = "alpha m" if law.varies[0] else _terms(law.keep, "m")
    if law.add is None or not holds or letter == "u":  # what comes of another memory is not taken apart
        what = "u" if letter == "u" else "phi(g)"
        goal = f"-<m, {what}>" + (" + decay" if law.keep < 1 - 1e-9 else "")
        return goal, f"m <- {held} + {what}" if law.keep else f"m <- {what}"
    if law.add == 0:
        return "", f"m <- {held}"
    what = letter if law.power == 1 else f"{letter}^2"
    pull = (1 - law.keep) / abs(law.add)
    signed = what if law.add > 0 else f"-{what}"
    decay = "decay" if any(law.varies) else _terms(pull / 2, "|m|^2")
    goal = f"-<m, {signed}>" + (f" + {decay}" if pull > 1e-9 else "")
    sign = "+" if law.add > 0 else "-"
    kept = f"{held} {sign} " if law.keep else "-" * (law.add < 0)
    return goal, f"m <- {kept}{f'eta {what}' if law.varies[1] else _terms(abs(law.add), what)}"


def _terms(factor: float, what: str) -> str:
    return what if abs(factor - 1) < 1e-6 else f"{factor:.4g} {what}"


def listed(names: Iterable[str]) -> str:
    """Names in a row, in quotation marks where a name could be taken for several.

    >>> listed(["mu", "trace, slow"])
    'mu and "trace, slow"'
    """
    names = sorted(set(names))
    several = lambda name: " and " in name or (", " in name and len(names) > 1)
    return _in_a_row([f'"{name}"' if several(name) else name for name in names])


def _in_a_row(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
