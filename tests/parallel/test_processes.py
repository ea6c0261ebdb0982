from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from nested_jax.errors import UserError
from nested_jax.parallel import processes


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"ADDRESS": "host:1"}, "JAX_COORDINATOR_ADDRESS without JAX_NUM_PROCESSES and JAX_PROCESS_ID: give all three"),
        (
            {"NUMBER": "2", "INDEX": "0"},
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID without JAX_COORDINATOR_ADDRESS: give all three",
        ),
        ({"NUMBER": "two"}, "JAX_NUM_PROCESSES 'two': give a whole number"),
        ({"NUMBER": "0"}, "JAX_NUM_PROCESSES '0': give a whole number"),
        ({"INDEX": "-1"}, "JAX_PROCESS_ID '-1': give a whole number"),
        ({"NUMBER": "2", "INDEX": "2"}, "JAX_PROCESS_ID 2 of JAX_NUM_PROCESSES 2: give 0 to 1"),
        *(
            ({"ADDRESS": address, "NUMBER": "2", "INDEX": "1"}, f"JAX_COORDINATOR_ADDRESS '{address}': give host:port")
            for address in ("host", "host:", ":80", "host:port", "host:99999")
        ),
    ],
)
def test_what_the_environment_lacks_is_named_in_one_line(monkeypatch, given, line):
    for name in ("ADDRESS", "NUMBER", "INDEX"):
        monkeypatch.delenv(getattr(processes, f"_{name}"), raising=False)
    for name, value in given.items():
        monkeypatch.setenv(getattr(processes, f"_{name}"), value)
    with pytest.raises(UserError) as error:
        processes.start()
    assert str(error.value) == line


def test_a_first_process_that_does_not_listen_is_named_in_one_line(monkeypatch):
    """JAX itself would end the process with a dump."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for name, value in {"ADDRESS": address, "NUMBER": "2", "INDEX": "1"}.items():
        monkeypatch.setenv(getattr(processes, f"_{name}"), value)
    monkeypatch.setattr(processes, "_PATIENCE", 0.3)
    with pytest.raises(UserError, match=f"^JAX_COORDINATOR_ADDRESS '{address}': Connection refused; start process 0 there$"):
        processes.start()


def test_without_others_it_starts_alone(monkeypatch):
    for name in ("ADDRESS", "NUMBER", "INDEX"):
        monkeypatch.delenv(getattr(processes, f"_{name}"), raising=False)
    processes.start()
    assert not jax.distributed.is_initialized() and processes.first()


def test_each_row_is_read_where_it_lies_and_counted_once(monkeypatch):
    """Six rows on four devices of three processes, the last of which has rows that the first two have."""
    lies = [(0, slice(0, 3)), (1, slice(3, 6)), (2, slice(0, 3)), (2, slice(3, None))]

    class Device:
        def __init__(self, process_index):
            self.process_index = process_index

    places = {Device(process): (rows,) for process, rows in lies}
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    found = []
    for index in range(3):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        found.append(processes.rows_of(SimpleNamespace(devices_indices_map=lambda shape: places), 6))
    assert found == [([0, 1, 2], [0, 1, 2]), ([3, 4, 5], [3, 4, 5]), ([0, 1, 2, 3, 4, 5], [])]


def test_values_that_differ_and_errors_of_one_process_are_errors_of_all(monkeypatch):
    """As two processes see them, the second of which has had an error."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "_gathered", lambda value: [value, {"error": "no such file", "type": ""}])
    with pytest.raises(UserError, match="^no such file$"):
        processes.in_each(lambda: 1)
    full = processes._outcome(Path("no/such/folder").read_text)
    monkeypatch.setattr(processes, "_gathered", lambda value: [value, full])
    with pytest.raises(FileNotFoundError, match="No such file or directory in process 1: 'no/such/folder'"):
        processes.in_each(lambda: 1)
    monkeypatch.setattr(processes, "_gathered", lambda value: [value, "b"])
    with pytest.raises(UserError, match="^the text is a in process 0 and b in another: give all the same$"):
        processes.assert_same("the text", "a")
