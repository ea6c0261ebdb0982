"""The record of a run: rows of numbers in metrics.jsonl and, for live pictures, in TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter


class Record:
    """metrics.jsonl and TensorBoard of a run folder, to be appended to after `step`: later rows are dropped."""

    def __init__(self, folder: Path, step: int):
        self._path = folder / "metrics.jsonl"
        self.rows = [row for row in read_rows(folder) if row["step"] <= step]
        part = self._path.with_name("metrics.jsonl.part")
        part.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        part.rename(self._path)
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, **numbers: float) -> None:
        """Writes a row, at once."""
        self.rows.append({"step": step, **numbers})
        self._file.write(json.dumps(self.rows[-1]) + "\n")
        self._file.flush()
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)

    def heldout(self, step: int) -> dict[str, Any] | None:
        """The row of the evaluation at a step, if it was made."""
        return next((row for row in self.rows if row["step"] == step and "heldout_bits_per_byte" in row), None)

    def close(self) -> None:
        """Writes what TensorBoard still holds back."""
        self._file.close()
        self._board.close()


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run folder's metrics.jsonl, without a last one that was cut short."""
    path, rows = folder / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
