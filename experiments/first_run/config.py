"""What is run: one dataclass, whose fields are the flags of run.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Train models by the README's command, from several seeds."""

    presets: tuple[str, ...] = ("tiny-hope", "tiny-transformer")
    """The default model, and one to hold it against."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    """Seeds of the parameters and of the order of the text."""
