"""What an experiment leaves in results/: JSON with its command, a table, a figure; long ones are kept run by run."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from nested_jax.errors import UserError

matplotlib.use("agg")
RESULTS = Path(__file__).parent / "results"
LISTS = ("presets", "optimizers", "rates", "further", "seeds")  # they say which runs there are, the other flags what one is


def begin(config: Any) -> dict[str, Any]:
    """Results without any: the command line that is running, as from the repository's root, and its config."""
    command = shlex.join(["python", f"experiments/optimizers/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    choices = {name: value for name, value in dataclasses.asdict(config).items() if name != "fresh"}
    return {"command": command, "config": json.loads(json.dumps(choices)), "jax": jax.__version__}


def resume(name: str, config: Any) -> dict[str, Any]:
    """What results/NAME.json has of this config's runs, which may be more than that has; with `fresh`, none.

    Raises UserError if its runs are another config's, or would not all be this one's.
    """
    path, results = RESULTS / f"{name}.json", begin(config) | {"runs": []}
    if config.fresh or not path.exists():
        return results
    kept = json.loads(path.read_text())
    old, new = kept["config"], results["config"]
    if old == new:
        return kept
    one = lambda flags: {name: value for name, value in flags.items() if name not in LISTS}
    if one(old) != one(new) or any(set(old.get(name, ())) - set(new.get(name, ())) for name in LISTS):
        raise UserError(f"{path} was made with other flags: give those, longer lists of runs, or --fresh to replace it")
    return results | {"runs": kept["runs"]}


def once(name: str, results: dict[str, Any], run: Callable[..., dict[str, Any]], **choices: Any) -> dict[str, Any]:
    """The run of some choices: found in the results, or made and written to results/NAME.json."""
    for row in results["runs"]:
        if all(row[key] == value for key, value in choices.items()):
            return row
    row = choices | run(**choices)
    results["runs"].append(row)
    save(name, results)
    print({key: value for key, value in row.items() if not isinstance(value, list)}, flush=True)
    return row


def save(name: str, results: dict[str, Any]) -> None:
    """Writes results/NAME.json, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    part = RESULTS / f"{name}.json.part"
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.rename(RESULTS / f"{name}.json")


def finish(name: str, results: dict[str, Any], table: str, figure: Figure) -> None:
    """Writes results/NAME.json, NAME.md and NAME.png, and prints the table."""
    save(name, results)
    (RESULTS / f"{name}.md").write_text(table)
    figure.savefig(RESULTS / f"{name}.png", dpi=130)
    plt.close(figure)
    print(table)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> list[str]:
    """The lines of a table whose first columns are words, the others numbers.

    >>> markdown(["rule", "loss"], [["gd", "0.5"]])
    ['| rule | loss |', '|---|---:|', '| gd | 0.5 |']
    """
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return [line(heads), "|---" * words + "|---:" * (len(heads) - words) + "|", *map(line, rows)]


def spread(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Mean and standard deviation; of one value that alone.

    >>> spread([1.0, 2.0]), spread([0.25], 1, "+")
    ('1.500 ± 0.707', '+0.2')
    """
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.{digits}f}{deviation}"


def band(ax, x: Sequence[float], curves: np.ndarray, **line: Any) -> None:
    """Draws the mean of curves, (curves, points), and one standard deviation around it."""
    mean, deviation = curves.mean(0), curves.std(0, ddof=min(1, len(curves) - 1))
    ax.plot(x, mean, **line)
    ax.fill_between(x, np.maximum(mean - deviation, 1e-5), mean + deviation, alpha=0.2)  # an axis may be logarithmic
