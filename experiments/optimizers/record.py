"""What an experiment leaves in results/: JSON with the command that made it, and a table; long ones are kept run by run."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from nested_jax.errors import UserError

RESULTS = Path(__file__).parent / "results"


def begin(config: Any) -> dict[str, Any]:
    """Results without any: the command line that is running, as from the repository's root, and its config."""
    command = shlex.join(["python", f"experiments/optimizers/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    choices = {name: value for name, value in dataclasses.asdict(config).items() if name != "fresh"}
    return {"command": command, "config": json.loads(json.dumps(choices)), "jax": jax.__version__}


def resume(name: str, config: Any) -> dict[str, Any]:
    """What results/NAME.json has of this config's runs; with `fresh`, none.

    Raises UserError if its runs are another config's.
    """
    path, results = RESULTS / f"{name}.json", begin(config) | {"runs": []}
    if config.fresh or not path.exists():
        return results
    kept = json.loads(path.read_text())
    if kept["config"] != results["config"]:
        raise UserError(f"{path} was made with other flags: give those, or --fresh to replace it")
    return kept


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


def finish(name: str, results: dict[str, Any], table: str) -> None:
    """Writes results/NAME.json and results/NAME.md, and prints the table."""
    save(name, results)
    (RESULTS / f"{name}.md").write_text(table)
    print(table)
