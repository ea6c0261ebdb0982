"""The config of pods/run.py; its fields are the flags."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from record import Runs

IN_CONTEXT: dict[str, Any] = {"periods": (4096, 512), "blocks": 6}
"""Fields of a CMS whose last blocks learn in context."""
TOPOLOGIES = {"v5e:4x4": "fsdp=16", "v5p:4x4x4": "data=4,fsdp=16", "v6e:4x4": "fsdp=16"}
SLICES = {"v5e:2x2": 4, "v5e:4x4": 16, "v5e:8x8": 64, "v5e:16x16": 256}
WINDOWS = (2048, 8192, 32768, 131072)
SIZES = ("140m", "340m", "760m", "1.3b")


@dataclass(frozen=True)
class Job:
    """A training step to be compiled."""

    preset: str
    topology: str = "v5e:2x2"
    mesh: str = "data=1"
    rows: int = 1
    """Sequences of a batch."""
    window: int = 2048
    policy: str = "full"
    pieces: int = 1
    """Into which a batch is cut."""
    model: dict[str, Any] = field(default_factory=dict)
    """Further fields of its `ModelConfig`."""
    cms: dict[str, Any] = field(default_factory=dict)
    """Fields of its `CMSConfig`."""


def _one_chip() -> dict[str, Job]:
    jobs = {"heads of 64, chunk 64": Job("140m-hope", model={"heads": 12, "chunk": 64}), "hope": Job("140m-hope")}
    jobs |= {
        "hope, loops": Job("140m-hope", policy="loops"),
        "hope, blocks": Job("140m-hope", policy="blocks"),
        "transformer": Job("140m-transformer"),
    }
    jobs["hope, 8 rows in 8 pieces"] = Job("140m-hope", rows=8, pieces=8)
    jobs["hope, 8 rows"] = Job("140m-hope", rows=8)
    jobs["hope, 8 rows, blocks"] = Job("140m-hope", rows=8, policy="blocks")
    jobs["transformer, 8 rows"] = Job("140m-transformer", rows=8)
    return {f"one chip: {name}": job for name, job in jobs.items()}


def _lengths() -> dict[str, Job]:
    return {
        f"{window:,} tokens: {family}": Job(f"140m-{family}", window=window, policy="blocks")
        for window in WINDOWS
        for family in ("hope", "transformer")
    }


def _devices() -> dict[str, Job]:
    mesh = lambda n: f"fsdp={min(n, 16)}" + f",data={n // 16}" * (n > 16)
    return {f"{n} devices: hope": Job("140m-hope", topology, mesh(n), n) for topology, n in SLICES.items()}


def _pods() -> dict[str, Job]:
    jobs = {}
    for size in SIZES:
        for topology, mesh in TOPOLOGIES.items():
            rows = 64 if topology.startswith("v5p") else 16
            for family in ("hope", "transformer"):
                jobs[f"{topology}: {size}-{family}"] = Job(f"{size}-{family}", topology, mesh, rows, 4096, "blocks")
            for scope in ("batch", "sequence"):
                job = Job(f"{size}-hope", topology, mesh, rows, 4096, "blocks", cms=IN_CONTEXT | {"scope": scope})
                jobs[f"{topology}: {size}-hope in context, scope {scope}"] = job
    return jobs


JOBS = _one_chip() | _lengths() | _devices() | _pods()
"""All steps to be compiled, by name."""


@dataclass(frozen=True)
class Config(Runs):
    """What training steps take on TPUs, compiled by libtpu with none at hand: nothing is run."""

    rows: tuple[str, ...] = tuple(JOBS)
    """Names of `config.JOBS`."""

    def __post_init__(self):
        flags.check(self, "rows")
        flags.check_known(self, "rows", JOBS)
