"""The record of a run: rows of numbers in metrics.jsonl and, for live pictures, in TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from nested_jax.errors import UserError


class Record:
    """metrics.jsonl and TensorBoard of a run folder, to be appended to after `step`: later rows are dropped."""

    def __init__(self, folder: Path, step: int):
        self._path = folder / "metrics.jsonl"
        self.rows = [row for row in read_rows(folder) if row["step"] <= step]
        part = self._path.with_name("metrics.jsonl.part")
        part.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        part.rename(self._path)
        self._file = self._path.open("a")
        (folder / "tensorboard").mkdir(exist_ok=True)
        self._board = EventsWriter(str(folder / "tensorboard" / "events"))
        self._write(step + 1, session_log=SessionLog(status=SessionLog.START))  # TensorBoard drops what it had from here on

    def add(self, step: int, **numbers: float) -> None:
        """Writes a row, at once."""
        self.rows.append({"step": step, **numbers})
        self._file.write(json.dumps(self.rows[-1]) + "\n")
        self._file.flush()
        for name, value in numbers.items():
            self._write(step, summary=scalar(name, value))
        self._board.flush()

    def _write(self, step: int, **content: Any) -> None:
        self._board.write_event(Event(wall_time=time.time(), step=step, **content))

    def heldout(self, step: int) -> dict[str, Any] | None:
        """The row of the evaluation at a step, if it was made."""
        return next((row for row in self.rows if row["step"] == step and "heldout_bits_per_byte" in row), None)

    def close(self) -> None:
        """Writes what TensorBoard still holds back."""
        self._file.close()
        self._board.close()


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run folder's metrics.jsonl, without a last one that was cut short.

    Raises UserError naming a line that is no row.
    """
    path, rows = folder / "metrics.jsonl", []
    lines = path.read_text(errors="replace").split("\n") if path.exists() else [""]
    for number, line in enumerate(lines[:-1], 1):
        try:
            rows.append(json.loads(line))
            int(rows[-1]["step"])
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}, line {number} is damaged: remove that line, or put the file back") from None
    return rows
