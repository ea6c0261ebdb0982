"""Methods of learning one task after the other: what is trained by which optimizer, what holds it, what is stored."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import optax

from nested_jax import optim

LEVELS = 4
PERIODS = {2: (16, 1), 3: (16, 4, 1), 4: (64, 16, 4, 1)}
"""Updates between two of a level's own, by the number of frequencies, slowest first."""


class Method(NamedTuple):
    """One method; the rates and strengths that it tries are nine pairs for every one."""

    optimizer: Callable[[float], optax.GradientTransformation] | None
    """By the rate; None: a memory in place of a trained model."""
    rates: tuple[float, ...]
    strengths: tuple[float, ...] = (0.0,)
    """Of what the kind has: EWC's penalty, attention's sharpness, the penalty of a least-squares memory."""
    kind: Literal["plain", "ewc", "replay", "attention", "delta", "squares"] = "plain"
    stored: int = 0
    """Examples that it keeps of all tasks together."""


def cms(frequencies: int, rate: float) -> optax.GradientTransformation:
    """Adam; the CMS's levels step at so many frequencies (NL Eq. 71), slowest first, all else at every update."""
    periods = PERIODS[frequencies]
    return _by_period(rate, {f"level{i + 1}": periods[i * frequencies // LEVELS] for i in range(LEVELS)})


def continuum(rate: float) -> optax.GradientTransformation:
    """Adam; everything steps at a frequency of its own, the first layer at the slowest, the head at the fastest."""
    return _by_period(rate, {"enter": 64, "embedding": 64, "level1": 64, "level2": 16, "level3": 4})


def _by_period(rate: float, periods: dict[str, int]) -> optax.GradientTransformation:
    """Of parts of the model, by name; of those without a period it is 1."""
    period = lambda path: next((periods[key.key] for key in path if key.key in periods), 1)
    groups = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: f"every {period(path)}", params)
    return optim.continuum(rate, {f"every {n}": n for n in {1, *periods.values()}}, groups)


def frozen(rate: float) -> optax.GradientTransformation:
    """Adam, of all but the CMS, which stays as it is drawn."""
    still = lambda path: any(getattr(key, "key", None) == "cms" for key in path)
    groups = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: "still" if still(path) else "adam", params)
    return optax.partition({"adam": optax.adam(rate), "still": optax.set_to_zero()}, groups)


def m3(rate: float) -> optax.GradientTransformation:
    """M3 of matrices, with updates of the size of Adam's, which does all else, the head too."""
    own = {
        "second_moment": False,
        "consistent_rms": 0.2,
        "dimension_numbers": optim.matrices("enter|up|down|query|key|value|out"),
    }
    return optim.m3(rate, **own, vectors=optax.adam(rate))


RATES = (3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
METHODS: dict[str, Method] = {
    "fine-tuning": Method(optax.adam, RATES),
    "EWC": Method(optax.adam, (3e-6, 1e-4, 1e-3), (1e3, 1e5, 1e7), kind="ewc"),
    "replay of 200": Method(optax.adam, RATES, kind="replay", stored=200),
    "M3": Method(m3, RATES),
    "CMS frozen": Method(frozen, RATES),
    **{f"CMS, {n} frequencies": Method(partial(cms, n), RATES) for n in (2, 3, 4)},
    "continuum optimizer": Method(continuum, RATES),
    "attention over all": Method(None, (1.0,), (3.0, 6.0, 12.0, 25.0, 50.0, 100.0, 200.0, 400.0, 800.0), kind="attention"),
    "least-squares memory": Method(None, (1.0,), (1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0), kind="squares"),
    "delta memory": Method(None, (1e-3, 3e-3, 1e-2, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0), kind="delta"),
}
"""By name; fine-tuning is a CMS of one frequency."""
