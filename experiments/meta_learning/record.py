"""What an experiment leaves in results/: JSON with the command that made it, and a table."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"


def begin(config: Any) -> dict[str, Any]:
    """Results without any: the command line that is running, as from the repository's root, and its config."""
    command = shlex.join(["python", f"experiments/meta_learning/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return {"command": command, "config": json.loads(json.dumps(dataclasses.asdict(config))), "jax": jax.__version__}


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
