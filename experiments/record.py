"""Results of an experiment: NAME.json with the command and config, a table NAME.md, a figure NAME.png.

`path` is results/NAME without a suffix. Long experiments are saved after every run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import jax
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nested_jax.checks import Count
from nested_jax.errors import UserError

matplotlib.use("agg")
LISTS = (
    "presets",
    "optimizers",
    "networks",
    "families",
    "methods",
    "tasks",
    "forms",
    "rows",
    "options",
    "starts",
    "exact",
    "chunks",
    "seeds",
)
"""Fields that say which runs to make."""
RATES = ("rates", "further")
"""Fields that say which rates are tried. All but these and `LISTS` are about each run."""


@dataclass(frozen=True)
class Runs:
    """How the runs of a long experiment are made; nothing of it changes them."""

    jobs: Count = 2
    """Processes that make runs."""
    lanes: Count = 3
    """Runs of one network that a process makes side by side, in one program."""
    fresh: bool = False
    """Replace results of other flags."""
    report: bool = False
    """Make no runs: write the table and the figure of those in the results."""
    into: str = ""
    """Name of the results' files in place of the usual one, so that results of other flags are kept beside them."""

    def path(self, usual: Path) -> Path:
        """Of the results, without a suffix.

        >>> Runs(into="longer").path(Path("results/chunks")), Runs().path(Path("results/chunks")).name
        (PosixPath('results/longer'), 'chunks')
        """
        if not re.fullmatch(r"\w*", self.into):
            raise UserError(f"--into {self.into}: give a name of letters, digits and _")
        return usual.with_name(self.into or usual.name)


RUNNING = (*(field.name for field in dataclasses.fields(Runs)), "data", "run_dir")
"""Fields that change no result: of `Runs`, and places."""


def start(path: Path, config: Any) -> dict[str, Any]:
    """Results that hold the running command, as from the repository's root, the config and the version of JAX.

    Raises:
        UserError: there can be no folder for the results.
    """
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} is no folder for results, {error.strerror}: make it one") from None
    script = f"experiments/{path.parents[1].name}/{Path(sys.argv[0]).name}"
    command = shlex.join(["python", script, *sys.argv[1:]])
    choices = {name: value for name, value in dataclasses.asdict(config).items() if name not in RUNNING}
    return {"command": command, "config": json.loads(json.dumps(choices)), "jax": jax.__version__}


def begin(path: Path, config: Any) -> dict[str, Any]:
    """`start`, where results of another config are replaced only if `config.fresh`.

    Raises:
        UserError: there are results of another config, or they cannot be read.
    """
    results = start(path, config)
    kept = None if config.fresh else _kept(path)
    if kept and kept["config"] != results["config"]:
        raise UserError(f"{path}.json was made with other flags: give those, or --fresh to replace it")
    return results


def resume(path: Path, config: Any) -> dict[str, Any]:
    """The results so far, with their runs; with `config.fresh` there are none.

    Their config holds what either has of `LISTS`, so that flags choose cells; rates may become more. Their command is the
    last one that chose all of them. With `config.report` they are as they were saved.

    Raises:
        UserError: the results are of another config, or cannot be read, or there is nothing to report.
    """
    results = start(path, config) | {"runs": []}
    report = isinstance(config, Runs) and config.report
    if report and config.fresh:
        raise UserError("--report shows the runs that --fresh would replace: leave one out")
    kept = None if config.fresh else _kept(path)
    if report and not (kept and kept.get("runs")):
        raise UserError(f"--report: {path}.json has no runs to report, make some")
    if not kept:
        return results
    old, new = kept["config"], results["config"]
    if old == new:
        return kept
    one = lambda flags: {name: value for name, value in flags.items() if name not in (*LISTS, *RATES)}
    if one(old) != one(new) or any(set(old.get(name, ())) - set(new.get(name, ())) for name in RATES):
        raise UserError(f"{path}.json was made with other flags: give those, more rates, or --fresh to replace it")
    if report:
        return kept
    either = new | {name: _either(old.get(name, ()), new[name]) for name in LISTS if name in new}
    some = any(set(old.get(name, ())) - set(new.get(name, ())) for name in LISTS)
    return (kept if some else results) | {"config": either, "runs": kept["runs"]}


def _either(old: Sequence[Any], new: Sequence[Any]) -> list[Any]:
    """All of both, in the order of the new ones where they are all.

    >>> _either([1, 2], [2, 1, 3]), _either([1, 2], [3, 2])
    ([2, 1, 3], [1, 2, 3])
    """
    return list(new) if set(old) <= set(new) else [*old, *(one for one in new if one not in old)]


def _kept(path: Path) -> dict[str, Any] | None:
    try:
        kept = dict(json.loads(Path(f"{path}.json").read_text()))
        return kept | {"config": kept.get("config", {})}
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError):
        raise UserError(f"{path}.json cannot be read as results: move it, or give --fresh to replace it") from None


def once(path: Path, results: dict[str, Any], run: Callable[..., dict[str, Any]], **choices: Any) -> dict[str, Any]:
    """The run of these choices: the one in the results, or a new one, saved to NAME.json."""
    for row in results["runs"]:
        if all(row[key] == value for key, value in choices.items()):
            return row
    row = choices | run(**choices)
    results["runs"].append(row)
    save(path, results)
    print({key: value for key, value in row.items() if not isinstance(value, list)}, flush=True)
    return row


def each_once(
    path: Path,
    results: dict[str, Any],
    run: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    choices: Iterable[dict[str, Any]],
    kind: Callable[[dict[str, Any]], Any],
    config: Runs,
) -> list[dict[str, Any]]:
    """The runs of all these choices. Those that are not in the results yet are made, and saved to NAME.json as they end;
    with `config.report` none are made.

    Where one fails, those that have begun are still saved, no other begins, and its error is raised.

    Args:
        path: of the results.
        results: so far.
        run: choices of one kind -> a row for each; a function of a module.
        choices: of each run.
        kind: what runs have in common that can be made by one call of `run`.
        config: how many are made at a time.

    Returns:
        A row for each of the choices that has one.
    """
    choices, kinds = list(choices), {}
    for one in choices:
        if not config.report and not rows_of(results, **one):
            kinds.setdefault(kind(one), []).append(one)
    calls = [group[i : i + config.lanes] for group in kinds.values() for i in range(0, len(group), config.lanes)]
    waiting, running, failed = iter(calls), {}, None
    with ProcessPoolExecutor(config.jobs, get_context("spawn"), _end_with_parent) as pool:
        while True:
            while not failed and len(running) < config.jobs and (group := next(waiting, None)):
                running[pool.submit(_call, run, group)] = group
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                group = running.pop(done)
                if error := done.exception():
                    failed = failed or error
                    continue
                for one, row in zip(group, done.result(), strict=True):
                    results["runs"].append(json.loads(json.dumps(strict(one | row))))
                    print(
                        {key: value for key, value in results["runs"][-1].items() if key not in ("loss", "norms", "scores")},
                        flush=True,
                    )
                save(path, results)
    if failed:
        raise failed
    return [row for one in choices for row in rows_of(results, **one)]


def _end_with_parent() -> None:
    """Ends this process once the one that started it has, though a call may be running."""

    def wait() -> None:
        if parent := parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _call(run: Callable[[Any], Any], choices: Any) -> Any:
    """A call after which a process holds none of its programs."""
    rows = run(choices)
    jax.clear_caches()
    return rows


def rows_of(results: dict[str, Any], **choices: Any) -> list[dict[str, Any]]:
    """The runs of these choices."""
    return [row for row in results["runs"] if choices.items() <= row.items()]


def in_one_go(path: Path, config: Any, measure: Callable, table: Callable, figure: Callable) -> None:
    """Measures, and writes the results with the seconds taken."""
    results, started = begin(path, config), time.monotonic()
    results |= measure(config)
    results["seconds"] = round(time.monotonic() - started)
    finish(path, results, table(results), figure(results))


def save(path: Path, results: dict[str, Any]) -> None:
    """Writes NAME.json, whole or not at all."""
    part = Path(f"{path}.json.part")
    part.write_text(json.dumps(strict(results), indent=1, allow_nan=False) + "\n")
    part.rename(f"{path}.json")


def strict(value: Any) -> Any:
    """Results with null for every number that is not finite, which `np.array(..., float)` reads as NaN.

    >>> strict({"error": (0.5, float("nan"), [float("inf")])})
    {'error': [0.5, None, [None]]}
    """
    if isinstance(value, dict):
        return {key: strict(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [strict(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def finish(path: Path, results: dict[str, Any], table: str, figure: Figure) -> None:
    """Writes NAME.json, NAME.md and NAME.png, and prints the table."""
    save(path, results)
    Path(f"{path}.md").write_text(table)
    figure.savefig(f"{path}.png", dpi=130)
    plt.close(figure)
    print(table)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> list[str]:
    """The lines of a table: the first columns are words, aligned left, the others numbers, aligned right.

    >>> markdown(["rule", "loss"], [["gd", "0.5"]])
    ['| rule | loss |', '|---|---:|', '| gd | 0.5 |']
    """
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return [line(heads), "|---" * words + "|---:" * (len(heads) - words) + "|", *map(line, rows)]


def spread(values: Sequence[float], digits: int = 3, sign: str = "", kind: str = "f") -> str:
    """Mean ± standard deviation; of one value the mean alone.

    >>> spread([1.0, 2.0]), spread([0.25], 1, "+"), spread([10.0, 20.0], kind="g")
    ('1.500 ± 0.707', '+0.2', '15 ± 7.07')
    """
    deviation = f" ± {deviations(values):.{digits}{kind}}" if len(values) > 1 else ""
    return f"{np.mean(np.array(values, float)):{sign}.{digits}{kind}}{deviation}"


def deviations(values: Sequence[float]) -> np.ndarray:
    """Standard deviation along the leading axis; zero of one value."""
    return np.std(np.array(values, float), axis=0, ddof=min(1, len(values) - 1))


def with_diverged(values: Sequence[float | None], text: str) -> str:
    """A cell of those values that are numbers, which says how many runs have none.

    >>> with_diverged([1.0, None], "1.0"), with_diverged([None], ""), with_diverged([1.0], "1.0")
    ('1.0, 1 of 2 diverged', '1 of 1 diverged', '1.0')
    """
    lost = sum(value is None for value in values)
    return ", ".join(part for part in (text, f"{lost} of {len(values)} diverged" if lost else "") if part)


def largest(values: Iterable[float | None]) -> str:
    """The largest number; inf where a run diverged, empty without runs.

    >>> largest([1.0, 20.5]), largest([1.0, None]), largest([])
    ('20.5', 'inf', '')
    """
    found = [math.inf if value is None else value for value in values]
    return f"{max(found):.3g}" if found else ""


def band(ax: Axes, x: Sequence[float], curves: np.ndarray, geometric: bool = False, **line: Any) -> None:
    """Draws the mean of curves (curves, points) ± one standard deviation; `geometric`: both of the logarithms."""
    curves = np.array(curves, float)
    curves = np.log(curves) if geometric else curves
    mean, deviation = curves.mean(0), deviations(curves)
    low, high = mean - deviation, mean + deviation
    low = low if geometric else np.maximum(low, 1e-5)  # the axis may be logarithmic
    mean, low, high = np.exp([mean, low, high]) if geometric else (mean, low, high)
    (drawn,) = ax.plot(x, mean, **line)
    ax.fill_between(x, low, high, alpha=0.2, facecolor=drawn.get_color(), linewidth=0)
