"""Training of two processes on this machine, each with CPU devices of its own, and what goes on without one of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

HOPE = ["--preset", "tiny-hope", "--model.width", "32", "--model.heads", "2", "--model.layers", "1", "--model.chunk", "16"]
HOPE += ["--model.cms.periods", "32", "16", "--model.cms.hidden", "32", "32", "--tokenizer", "bytes"]
RUN = ["--batch-size", "8", "--window", "64", "--steps", "60", "--warmup", "2", "--learning-rate", "1e-3", "--carry"]
RUN += ["--log-every", "1", "--checkpoint-every", "5", "--eval-every", "20", "--eval-bytes", "2000", "--sample-tokens", "4"]
RUN += ["--reading-documents", "1"]
PATIENCE = 240  # seconds


@contextlib.contextmanager
def processes(number, devices, *words, cwd):
    """A context in which as many processes run a command, each with so many devices; then they are killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "OMP_NUM_THREADS": "1"}
    for index in range(number):
        if number > 1:
            environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
            environment |= {"JAX_NUM_PROCESSES": str(number), "JAX_PROCESS_ID": str(index)}
        command = [sys.executable, "-m", "nested_jax", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, cwd=cwd, **pipes))
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def ended(started):
    """Exit codes and what was printed, without gloo's line, whose pieces several threads print at once."""
    gloo = r"\[Gloo\] Rank |\d* is connected to |\d+ peer ranks\. |Expected number of connected peer ranks is : "
    kept = lambda out: "\n".join(line for line in re.sub(gloo, "", out).split("\n") if line.strip("0123456789"))
    outcomes = []
    for process in started:
        out, err = process.communicate(timeout=PATIENCE)
        outcomes.append((process.returncode, kept(out), err))
    return outcomes


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]
    return {row["step"]: row["loss"] for row in map(json.loads, lines) if "loss" in row}


def wait_for(step, folder, started):
    """Until a step is recorded."""
    end = time.monotonic() + PATIENCE
    while not (folder / "metrics.jsonl").exists() or max(losses(folder), default=0) < step:
        assert time.monotonic() < end and all(process.poll() is None for process in started), ended(started)
        time.sleep(0.005)


@pytest.fixture
def run(tmp_path):
    """The words of a run in a folder, with more flags."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{i} " + "the quick brown fox. " * (i % 7) for i in range(200)))
    return lambda folder, *flags: ["train", *HOPE, *RUN, "--data", str(text), "--run-dir", folder, *flags]


@pytest.mark.slow
def test_processes_may_be_killed_and_others_go_on(tmp_path, run):
    """Two are killed, one with eight devices goes on, two with another mesh end it: the losses of a run of one device."""
    with processes(1, 1, *run("alone"), cwd=tmp_path) as alone:
        assert ended(alone)[0][0] == 0
    with processes(2, 2, *run("together", "--mesh", "data=2,tensor=2"), cwd=tmp_path) as two:
        wait_for(13, tmp_path / "together", two)
        for process in two:
            process.kill()
    with processes(1, 8, *run("together", "--mesh", "fsdp=4,tensor=2"), cwd=tmp_path) as one:
        wait_for(max(losses(tmp_path / "together")) + 3, tmp_path / "together", one)
        one[0].send_signal(signal.SIGTERM)
        assert ended(one)[0][0] == 128 + signal.SIGTERM
    with processes(2, 2, *run("together", "--mesh", "fsdp=4"), cwd=tmp_path) as two:
        (code, out, err), (other, silent, _) = ended(two)
        assert (code, other, silent) == (0, 0, ""), err
        assert "2 processes" in out and "held-out" in out
    expected, found = losses(tmp_path / "alone"), losses(tmp_path / "together")
    assert [*found] == [*expected] == [*range(1, 61)]
    np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=1e-5)
    assert (tmp_path / "together" / "report.md").exists()
    assert {path.name for path in (tmp_path / "together" / "checkpoints").iterdir()} == {"55", "60"}


@pytest.mark.slow
def test_a_signal_to_one_process_saves_all_at_one_step(tmp_path, run):
    with processes(2, 1, *run("a"), cwd=tmp_path) as two:
        wait_for(4, tmp_path / "a", two)
        two[1].send_signal(signal.SIGTERM)
        first, second = ended(two)
    assert first[0] == second[0] == 128 + signal.SIGTERM
    saved = max(losses(tmp_path / "a"))
    assert f"stopped at step {saved} of 60, saved in a; resume with: nested-jax train" in first[2]
    assert (tmp_path / "a" / "checkpoints" / str(saved)).exists()


def test_what_does_not_fit_together_is_said_in_every_process(tmp_path):
    """An error of one process, a folder that holds no run, ends both with one line."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    with processes(2, 1, "train", "--task", "parity", "--run-dir", "a", cwd=tmp_path) as two:
        for code, out, err in ended(two):
            assert (code, out) == (2, "")
            assert err.strip() == "nested-jax: a holds files and no run (no config.json): give another --run-dir"
