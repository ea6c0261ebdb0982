"""A reading as one page that needs no network: the text coloured by surprise, and what was learned from where."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from nested_jax.data import Tokenizer
from nested_jax.serve.reading import Reading
from nested_jax.train.sample import runs
from nested_jax.typing import Float

POINTS = 200
"""Points of a curve at most."""


def page(title: str, tokenizer: Tokenizer, readings: Mapping[str, Reading]) -> str:
    """HTML of a text that was read in several ways.

    Args:
        title: of the page.
        tokenizer: of the text.
        readings: by name, the first one's levels are shown. All have the same tokens.

    Returns:
        The page.
    """
    first = next(iter(readings.values()))
    cells = list(runs(tokenizer, first.tokens.tolist()))
    starts = np.cumsum([0, *(len(run) for run, _ in cells)])[:-1]
    bits = {name: np.nan_to_num(one.nats) / math.log(2) for name, one in readings.items()}
    size = tokenizer.byte_lengths[first.tokens].astype(float)
    texts: dict[int, int] = {}
    known = lambda token: texts.setdefault(int(token), len(texts))
    data = {
        "title": title,
        "cells": [text for _, text in cells],
        "bits": {name: np.add.reduceat(each, starts).round(2).tolist() for name, each in bits.items()},
        "tokens": len(first.tokens),
        "bytes": int(size.sum()),
        "perByte": {name: round(float(each.sum() / max(size.sum(), 1)), 4) for name, each in bits.items()},
        "likeliest": {
            name: [
                [
                    [known(token), round(float(p) * 100, 1)]
                    for token, p in zip(one.likeliest[at], one.chances[at], strict=True)
                ]
                for at in starts
            ]
            for name, one in readings.items()
        },
        "curves": {name: _curve(each, size) for name, each in bits.items()},
        "levels": [_level(first, i) for i in range(len(first.levels))],
        "starts": starts.tolist(),
    }
    data["texts"] = [tokenizer.decode([token]) if token < tokenizer.vocabulary else "" for token in texts]
    template = files("nested_jax.serve").joinpath("page.html").read_text("utf-8")
    packed = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"title": html.escape(title), "data": packed}
    return re.sub("{{(title|data)}}", lambda name: parts[name[1]], template)  # at once: a text may have such words


def summary(tokenizer: Tokenizer, readings: Mapping[str, Reading]) -> str:
    """Lines: bits per byte of each quarter of a text and of all of it, by name."""
    first = next(iter(readings.values()))
    size = tokenizer.byte_lengths[first.tokens].astype(float)
    parts = [*np.array_split(np.arange(len(size)), min(4, len(size))), np.arange(len(size))]
    heads = [f"{int(part[0]) + 1:,}-{int(part[-1]) + 1:,}" for part in parts[:-1]]
    lines = [
        f"bits per byte of {len(size):,} tokens, {int(size.sum()):,} bytes:",
        "  ".join([" " * 20, *(f"{head:>15}" for head in [*heads, "all"])]),
    ]
    for name, one in readings.items():
        bits = np.nan_to_num(one.nats) / math.log(2)
        each = [f"{bits[part].sum() / max(size[part].sum(), 1):>15.3f}" for part in parts]
        lines.append("  ".join([f"{name:<20}", *each]))
    return "\n".join(line.rstrip() for line in lines)


def _curve(bits: Float[np.ndarray, " T"], size: Float[np.ndarray, " T"]) -> list[list[float]]:
    """[tokens read, bits per byte] of parts of a text."""
    parts = np.array_split(np.arange(len(bits)), min(POINTS, max(1, len(bits) // 16)))
    return [[int(part[-1]) + 1, round(float(bits[part].sum() / max(size[part].sum(), 1)), 4)] for part in parts]


def _level(reading: Reading, index: int) -> dict[str, Any]:
    """What a level wrote and held, at places of the text."""
    ends = reading.ends - reading.ends[-1] + len(reading.tokens)
    groups: Sequence[np.ndarray] = np.array_split(np.arange(len(ends)), min(POINTS, len(ends)))
    written = [float(np.sqrt(np.square(reading.written[group, index]).sum())) for group in groups]
    held = [float(reading.held[group[-1], index]) for group in groups]
    number = lambda value: float(f"{value:.4g}")
    return {
        "name": reading.levels[index],
        "at": [int(ends[group[-1]]) for group in groups],
        "written": [*map(number, written)],
        "held": [*map(number, held)],
    }
