"""Prints the lower bounds of pyproject.toml as constraints of pip: `jax>=0.10.2` is `jax==0.10.2`."""

import tomllib
from pathlib import Path

project = tomllib.loads(Path(__file__, "../../pyproject.toml").resolve().read_text())["project"]
bounds = [*project["dependencies"], *project["optional-dependencies"]["test"]]
print("\n".join(sorted({bound.replace(">=", "==") for bound in bounds})))
