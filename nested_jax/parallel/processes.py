"""The processes of one run: each has some of the devices, and all of them do the same in the same order."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from nested_jax.errors import UserError, shown
from nested_jax.typing import PyTree

T = TypeVar("T")
_PATIENCE = 300  # seconds
_ADDRESS, _NUMBER, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def start() -> None:
    """Joins the run's other processes, if the environment names some; to be called before JAX's devices are used.

    TPU pods, Slurm's and Open MPI's jobs name them by themselves. Elsewhere give JAX_COORDINATOR_ADDRESS (host:port of the
    first one), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
        UserError: the environment is not complete, or the others are not there in time.
    """
    if jax.distributed.is_initialized():
        return
    given = {name: os.environ[name] for name in (_ADDRESS, _NUMBER, _INDEX) if name in os.environ}
    number, index = (_whole(name, given.get(name)) for name in (_NUMBER, _INDEX))
    if number is not None and index is not None and index >= number:
        raise UserError(f"{_INDEX} {index} of {_NUMBER} {number}: give 0 to {number - 1}")
    if index and _ADDRESS in given:
        _reach(given[_ADDRESS])
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
    try:
        jax.distributed.initialize(num_processes=number, process_id=index)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"the run's processes do not meet: {str(error).splitlines()[0][:160]}; start them again") from error
    except (RuntimeError, TypeError, ValueError) as error:  # there are no others, unless the environment says so
        if missing := [name for name in (_ADDRESS, _NUMBER, _INDEX) if name not in given]:
            if given:
                raise UserError(f"{' and '.join(given)} without {' and '.join(missing)}: give all three") from error
        elif isinstance(error, RuntimeError):
            raise UserError(f"{_ADDRESS} {shown(given[_ADDRESS])}: {str(error).splitlines()[0][:160]}") from error
        else:
            raise UserError(f"{_ADDRESS} {shown(given[_ADDRESS])}: give host:port") from error


def first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def of_first(call: Callable[[], T]) -> T:
    """In all processes what `call()`, a JSON value, is in the first one alone; or its error.

    >>> of_first(lambda: 7)
    7
    """
    if jax.process_count() == 1:
        return call()
    return _settled(_gathered(_outcome(call) if first() else {}))[0]


def in_each(call: Callable[[], T]) -> T:
    """What `call()` is in this process; where it is an error in any, that error in all."""
    if jax.process_count() == 1:
        return call()
    made = []
    _settled(_gathered(_outcome(lambda: made.append(call()))))
    return made[0]


def merged(mine: dict[str, Any]) -> dict[str, Any]:
    """The JSON dicts of all processes as one.

    >>> merged({"row": 3})
    {'row': 3}
    """
    if jax.process_count() == 1:
        return mine
    return {key: value for one in _gathered(mine) for key, value in one.items()}


def assert_same(what: str, value: Any) -> None:
    """Raises UserError where a JSON value is not the same in all processes."""
    if jax.process_count() > 1 and (others := [one for one in _gathered(value) if one != value]):
        raise UserError(f"{what} is {value} in process {jax.process_index()} and {others[0]} in another: give all the same")


def total(amounts: Sequence[float]) -> np.ndarray:
    """Sums over the processes.

    >>> total([1.0, 2.5]).tolist()
    [1.0, 2.5]
    """
    mine = np.asarray(amounts, np.float64)
    return mine if jax.process_count() == 1 else np.stack([_float64(one) for one in _spread(mine.view(np.uint32))]).sum(0)


def whole(array: jax.Array) -> np.ndarray:
    """The values of an array of which this process may have a part."""
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))


def rows_of(sharding: Sharding, rows: int) -> tuple[Sequence[int], Sequence[int]]:
    """The rows of a batch that this process reads, and those of them that no process before it reads."""
    if jax.process_count() == 1:
        return range(rows), range(rows)
    owners: dict[int, set[int]] = {}
    for device, (index, *_) in sharding.devices_indices_map((rows,)).items():
        for row in range(*index.indices(rows)):
            owners.setdefault(row, set()).add(device.process_index)
    me = jax.process_index()
    return [row for row in range(rows) if me in owners[row]], [row for row in range(rows) if me == min(owners[row])]


def put(batch: PyTree, rows: Sequence[int], sharding: Sharding, count: int) -> PyTree:
    """Arrays (count, ...) on their devices, of which this process has read some rows."""
    if jax.process_count() == 1:
        return batch
    place = {row: i for i, row in enumerate(rows)}

    def build(mine: np.ndarray) -> jax.Array:
        own = lambda index: mine[[place[row] for row in range(*index[0].indices(count))]][:, *index[1:]]
        return jax.make_array_from_callback((count, *mine.shape[1:]), sharding, own)

    return jax.tree.map(build, batch)


def _reach(address: str) -> None:
    """Waits for the first process to listen. Raises UserError where it does not: JAX would end this one with a dump."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) >= 2**16:
        raise UserError(f"{_ADDRESS} {shown(address)}: give host:port")
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(f"{_ADDRESS} {shown(address)}: {error.strerror or error}; start process 0 there") from error
            time.sleep(0.2)


def _whole(name: str, value: str | None) -> int | None:
    if value is None:
        return None
    if not value.isdecimal() or (name == _NUMBER and not int(value)):
        raise UserError(f"{name} {shown(value)}: give a whole number")
    return int(value)


def _outcome(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": call()}
    except Exception as error:  # whatever it is, the others must not wait for this process
        if isinstance(error, OSError) and isinstance(error.errno, int) and not isinstance(error, BrokenPipeError):
            return {"system": [error.errno, str(error.strerror), os.fsdecode(error.filename) if error.filename else None]}
        kind = "" if isinstance(error, UserError) else f"{type(error)}"
        return {"error": str(error) or type(error).__name__, "type": kind}


def _settled(outcomes: list[dict[str, Any]]) -> list[Any]:
    """Values of outcomes. Where one is an error, raises it: an OSError as one, with its number, any other as UserError."""
    for index, outcome in enumerate(outcomes):
        if "system" in outcome:
            number, text, path = outcome["system"]
            raise OSError(number, f"{text} in process {index}", path)
        if "error" in outcome:
            kind = f"process {index}: {outcome['type']}: " if outcome["type"] else ""
            raise UserError(f"{kind}{outcome['error']}")
    return [outcome.get("value") for outcome in outcomes]


def _gathered(value: Any) -> list[Any]:
    """The JSON values of all processes, by their index."""
    words = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = _spread(np.array([len(words)], np.int32))[:, 0]
    rows = _spread(np.pad(words, (0, int(lengths.max()) - len(words))))
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def _spread(mine: np.ndarray) -> np.ndarray:
    """Arrays of one shape of all processes, stacked."""
    return np.asarray(multihost_utils.process_allgather(mine))


def _float64(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words).view(np.float64)
