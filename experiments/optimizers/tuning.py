"""An optimizer's learning rate is chosen on the tuning seed, its result measured on test seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any


def tuned(run: Callable[..., dict], config: Any, by: str, further: Sequence[float] = (), **choices: Any) -> list[dict]:
    """Runs at all rates on the tuning seed, then on all test seeds at the rate with the least `by`.

    NaN and None count as infinite. Further rates are tried in turn while the largest tried is the best.
    """
    value = lambda row: row[by] if row[by] is not None and math.isfinite(row[by]) else math.inf
    at = lambda rate: run(**choices, rate=rate, seed=config.tuning_seed)
    tries = [at(rate) for rate in sorted(config.rates)]
    for rate in further:
        if min(tries, key=value) is not tries[-1]:
            break
        tries.append(at(rate))
    best = min(tries, key=value)["rate"]
    return tries + [run(**choices, rate=best, seed=seed) for seed in config.seeds]


def tried(results: dict, **choices: Any) -> list[dict]:
    """The runs of these choices on the tuning seed."""
    choices["seed"] = results["config"]["tuning_seed"]
    return [row for row in results["runs"] if choices.items() <= row.items()]


def counted(results: dict, **choices: Any) -> list[dict]:
    """The runs of these choices on the test seeds."""
    seeds = results["config"]["seeds"]
    return [row for row in results["runs"] if choices.items() <= row.items() and row["seed"] in seeds]


def chosen(results: dict, **choices: Any) -> str:
    """The rate of the runs on test seeds, marked if it is the smallest or largest that was tried."""
    rate, rates = counted(results, **choices)[0]["rate"], [row["rate"] for row in tried(results, **choices)]
    return f"{rate:g}" + (" (edge)" if rate in (min(rates), max(rates)) else "")
