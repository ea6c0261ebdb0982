"""The texts of an optimizer's parts: context flow, objective, rule, knowledge transfer."""

from __future__ import annotations

from collections.abc import Sequence

from nested_jax.picture.component import Component, joined, listed
from nested_jax.picture.parts import Part
from nested_jax.picture.trial import Recurrence


def component_of(part: Part, objective: str, context: str = "", writers: tuple[str, ...] = ()) -> Component:
    """The row of a part.

    Args:
        objective: of parameters.
        context: the context flow of parameters, if it is not what the optimizer makes of gradients.
        writers: names of the components that the gradients come from.
    """
    from_gradients = "gradients" in part.sources and part.frequency > 0
    flow, goal, rule, knowledge = _texts(part, objective, context, bool(writers))
    return Component(
        part.name, part.frequency, "step", flow, goal, rule, knowledge,
        needs=tuple(sorted(p.name for p in part.above)),
        starts_from=tuple(p.name for p in part.restarts_from),
        generated_by=writers if from_gradients else (),
        parameters=part.weights,
        state_bytes=part.bytes,
    )  # fmt: skip


def _texts(part: Part, objective: str, context: str, nested: bool) -> tuple[str, str, str, str]:
    """(context flow, objective, rule, knowledge transfer)."""
    own, law = part.description, part.law
    above, read = (listed(p.name for p in parts) for parts in (part.direct, part.direct | part.recalls))
    flow = _flow(part, part.sources, read)
    if law is None:
        count = part.loop.length if part.loop and part.loop.length else "some"
        goal = "1/4 |O^T O - I|^2" if part.orthogonalises else ""
        return flow, goal, f"{count} iterations", f"initialisation: starts from {above or 'gradients'} each time"
    if part.label is None:
        letter = "s" if part.gathers else "g" if "gradients" in part.sources else "W"
        goal, rule = _law(part, law, "u" if above else letter)
        transfer = "generation: back-propagation writes the gradients" if "gradients" in part.sources else ""
        if part.sources == ("weights",):
            transfer = "direct parametric conditioning on the weights"
        return own.context or flow, own.objective or goal, own.rule or rule, own.knowledge or transfer
    if part.frequency == 0:
        return "", objective, "frozen", ""
    knowledge = ["back-propagation through the faster levels"] if nested else []
    if part.restarts_from:
        knowledge.append(f"initialisation: restarts from {listed(p.name for p in part.restarts_from)}")
    rule = own.rule or _step(part, law, read)
    return context or flow, own.objective or objective, rule, "; ".join(knowledge)


def _step(part: Part, law: Recurrence, read: str) -> str:
    """The rule of parameters; `read`: the parts that they read."""
    letter, more = "s" if part.gathers else "g", [name for name in part.sources if name != "gradients"]
    given = ", ".join([*([letter] if part.rate else []), *more])
    if part.direct or part.recalls:
        step = f"adds {_flow(part, [name for name in part.sources if name == 'gradients'], read)}"
    elif part.rate or (law.power == 1 and (law.whole or part.gathers)):
        minus = (part.rate or law.add or 0) < 0
        step = f"W <- W {'-' if minus else '+'} eta{given and f'({given})'} {letter}"
    else:
        step = f"W <- W + f({letter})"
    restarts = f", restarts every {part.restarts} steps" if part.restarts else ""
    return step + ", decays" * part.decays + restarts


def _flow(part: Part, sources: Sequence[str], read: str) -> str:
    flow = joined([*sources, *([f"what comes of {read}"] if read else [])])
    return f"s, gathered from the {flow} of {1 / part.frequency:.0f} steps" if part.gathers else flow


def _law(part: Part, law: Recurrence, letter: str) -> tuple[str, str]:
    """The objective whose gradient step, with decay, is the measured recurrence, and that."""
    whole = law.whole or part.gathers  # what was gathered before adds to the gradient
    if law.keep is None or not law.apart or (law.add == 0 and not whole and letter != "u"):
        return "", ""
    kept = "alpha m" if law.varies[0] else _term(law.keep, "m")
    if law.add is None or not whole or letter == "u":  # what comes of another memory is not taken apart
        both = letter == "g" and "weights" in part.sources
        what = "u" if letter == "u" else "phi(g, W)" if both else f"phi({'g' if letter == 's' else letter})"
        goal = f"-<m, {what}>" + (" + decay" if law.keep < 1 - 1e-9 else "")
        return goal, f"m <- {kept} + {what}" if law.keep else f"m <- {what}"
    if law.add == 0:
        return "", f"m <- {kept}"
    what = letter if law.power == 1 else f"{letter}^2"
    decay = "decay" if any(law.varies) else _term(law.pull / 2, "|m|^2")
    goal = f"-<m, {what if law.add > 0 else f'-{what}'}>" + (f" + {decay}" if law.pull > 1e-9 else "")
    sign = "+" if law.add > 0 else "-"
    start = f"{kept} {sign} " if law.keep else "-" * (law.add < 0)
    return goal, f"m <- {start}{f'eta {what}' if law.varies[1] else _term(abs(law.add), what)}"


def _term(factor: float, what: str) -> str:
    return what if abs(factor - 1) < 1e-6 else f"{factor:.4g} {what}"
