"""What is timed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Updates of one square matrix by every optimizer, in turns."""

    width: int = 1024
    """Rows and columns of the matrix."""
    slow_period: int = 8
    """Steps between two steps of m3's slow memory; so many updates are timed together."""
    steps: int = 5
    """Of Newton-Schulz, in Muon and in m3."""
    rounds: int = 9
    """Turns of each optimizer that count."""
