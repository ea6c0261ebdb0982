"""The meter of kernels: what it makes of bundles, and that the committed table is that of the committed numbers."""

import json

import pytest
from scripts import EXPERIMENTS

from nested_jax.memory.kernels import heads_at_once

FOLDER, RESULTS = "benchmarks", EXPERIMENTS / "benchmarks/results/tpu_static"


def test_the_table_is_that_of_the_numbers(load):
    results = json.loads(RESULTS.with_suffix(".json").read_text())
    assert RESULTS.with_suffix(".md").read_text() == load("tpu_static").table(results)


def test_bundles_of_all_heads_are_shared_out_to_a_chunks_tokens(load):
    """140m-titans: 12 heads of two maps, four of them a program; attention: the blocks of 512 that are not masked."""
    meter, row = load("tpu_static"), {"kernels": {"chunk_scan": {"bundles": 640}, "chunk_scan_backward": {"bundles": 1280}}}
    assert heads_at_once(12, 64, 2) == 4
    assert meter.per_token("140m-titans", row) == 1920 * 3 / 64
    assert meter.per_token("140m-transformer", row, 2048) == pytest.approx(1920 * 12 * (1 + 2 + 3 + 4) / 2048)


def test_steps_are_on_the_line_through_those_compiled(load):
    """At 1.5 GHz, 12 layers; nothing is said where a row lacks."""
    meter, rows = load("tpu_static"), []
    rows.append({"row": "v5e 140m-hope", "kernels": {"chunk_scan": {"bundles": 12800}}})
    rows += [
        {"row": f"v5e 140m-hope, a step of {n} tokens", "milliseconds": ms, "tokens": n}
        for n, ms in ((2048, 40.0), (8192, 100.0))
    ]  # fmt: skip
    kernel, rest = meter.milliseconds({"runs": rows}, "v5e", "140m-hope", 4096)
    assert rest == pytest.approx(60) and kernel == pytest.approx(1e3 * 12800 * 6 / 128 * 4096 * 12 / 1.5e9)
    assert meter.milliseconds({"runs": rows[:2]}, "v5e", "140m-hope", 4096) is None
