"""Bundles of kernels on TPUs: `python experiments/benchmarks/tpu_static.py` compiles them and writes results/tpu_static.*.

See `nested_jax.parallel.bundles`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

import config as settings
import jax.numpy as jnp
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from record import each_once, finish, markdown, resume, rows_of

from nested_jax import preset
from nested_jax.memory.kernels import heads_at_once
from nested_jax.memory.stream import MemoryLayer
from nested_jax.models.block import sequence_layer
from nested_jax.parallel import bundles
from nested_jax.parallel.chips import CHIPS
from nested_jax.parallel.plan import plan
from nested_jax.train.config import TrainConfig

RESULTS = Path(__file__).parent / "results"


def run(cells: list[dict]) -> list[dict]:
    """What the compiler says of each row."""
    return [compiled(cell["row"]) for cell in cells]


def compiled(row: str) -> dict:
    """A step's milliseconds without its kernels and its bytes, or a layer's kernels: bundles and slots of one program."""
    started, (chip, name) = time.monotonic(), row.split(" ", 1)
    name, _, window = name.partition(", a step of ")
    if window:
        tokens = int(window.split()[0])
        config = TrainConfig.from_preset(name, batch_size=1, window=tokens, mesh="data=1")
        made = plan(config, settings.TOPOLOGIES[chip], count_bundles=False)
        cycles = sum(cycles for _, cycles in made.cycles)
        numbers = {"milliseconds": 1e3 * cycles / made.chip.clock, "tokens": tokens}
        numbers |= {"temporaries": made.temporaries, "arguments": made.arguments, "traffic": made.traffic}
    else:
        numbers = {"kernels": bundles.of_layer(preset(name), settings.TOPOLOGIES[chip], bundles.ATTENDED)}
    return numbers | {"seconds": round(time.monotonic() - started, 1)}


def per_token(name: str, row: dict, tokens: int = bundles.ATTENDED) -> float:
    """Bundles a token and layer, forward and backward."""
    layer, total = sequence_layer(preset(name)), sum(kernel["bundles"] for kernel in row["kernels"].values())
    if isinstance(layer, MemoryLayer):
        together = heads_at_once(layer.heads, layer.width // layer.heads, layer.form(jnp.bfloat16).maps)
        return total * layer.heads / together / layer.chunk
    blocks = tokens // 512
    return total * layer.heads * blocks * (blocks + 1) / 2 / tokens


def milliseconds(results: dict, chip: str, name: str, tokens: int) -> tuple[float, float] | None:
    """Of a step of one sequence: kernels', and all else's, on the line through the steps that were compiled."""
    layer = rows_of(results, row=f"{chip} {name}")
    steps = [rows_of(results, row=f"{chip} {name}, a step of {n} tokens") for n in settings.STEPS.get(name, ())]
    if not layer or not steps or not all(steps):
        return None
    kernel = per_token(name, layer[0], tokens) * tokens * preset(name).layers / CHIPS[chip].clock
    return 1e3 * kernel, on_the_line([row for (row,) in steps], "milliseconds", tokens)


def on_the_line(steps: Sequence[dict], key: str, tokens: int) -> float:
    """A number of a step of so many tokens, on the line through two steps."""
    first, last = steps
    slope = (last[key] - first[key]) / (last["tokens"] - first["tokens"])
    return first[key] + slope * (tokens - first["tokens"])


def gigabytes(results: dict, chip: str, name: str, tokens: int) -> float:
    """Of a step of one sequence, state and temporaries, on the line through the steps that were compiled."""
    steps = [rows_of(results, row=f"{chip} {name}, a step of {n} tokens")[0] for n in settings.STEPS[name]]
    return sum(on_the_line(steps, key, tokens) for key in ("arguments", "temporaries")) / 1e9


def table(results: dict) -> str:
    """Markdown: a layer's kernels; a step's time against tokens."""
    cells = []
    for row in results["config"]["rows"]:
        if (found := rows_of(results, row=row)) and "kernels" in found[0]:
            chip, name = row.split()
            each = found[0]["kernels"].values()
            used = sum(kernel["slots"]["MXU"] for kernel in each) / max(1, 4 * sum(kernel["bundles"] for kernel in each))
            programs = " + ".join(f"{kernel['bundles']:,}" for kernel in each) or "none"
            tokens = f"{per_token(name, found[0]):,.0f}"
            cells.append([chip, name, programs, tokens, f"{used:.0%}" if each else ""])
    heads = ("chip", "layer", "bundles of a program of each kernel", "bundles a token", "matrix unit's slots used")
    lines = [*markdown(heads, cells, 2), ""]
    steps = []
    for tokens in settings.TOKENS:
        both = [milliseconds(results, "v5e", f"140m-{family}", tokens) for family in ("hope", "transformer")]
        if all(both):
            hope, transformer = (sum(times or ()) for times in both)
            split = [f"{kernel:,.1f} + {rest:,.1f}" for kernel, rest in filter(None, both)]
            size = [f"{gigabytes(results, 'v5e', f'140m-{family}', tokens):,.1f}" for family in ("hope", "transformer")]
            steps.append([f"{tokens:,}", *split, f"{transformer / hope:.2f}", " / ".join(size)])
    heads = ("tokens", "140m-hope, ms: kernels + the rest", "140m-transformer, ms", "Hope's speed, of the Transformer's")
    heads = (*heads, "GB of both, of 17.2")
    note = "Compiled for one v5e, nothing run. Kernels: bundles at the clock, no waits for memory. The rest: the compiler's"
    windows = " and ".join(f"{n:,}" for n in settings.STEPS["140m-hope"])
    return (
        "\n".join([*lines, *markdown(heads, steps), "", f"{note} cycles at {windows} tokens, and on the line through both."])
        + "\n"
    )


def figure(results: dict) -> Figure:
    """Microseconds a token of a step against its tokens; a layer's bundles by preset on v5e."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", width_ratios=(1, 1.3))
    for family in ("hope", "transformer"):
        times = [milliseconds(results, "v5e", f"140m-{family}", n) for n in settings.TOKENS]
        points = [(n, 1e3 * sum(each) / n) for n, each in zip(settings.TOKENS, times, strict=True) if each]
        if points:
            left.plot(*zip(*points, strict=True), "o-", label=f"140m-{family}")
    left.set(xscale="log", xlabel="tokens of a sequence", ylabel="µs a token, v5e, estimated", ylim=0)
    width = 0.8 / len(settings.FAMILIES)
    for i, family in enumerate(settings.FAMILIES):
        found = [(at, rows_of(results, row=f"v5e {size}-{family}")) for at, size in enumerate(settings.SIZES)]
        points = [(at + width * i, per_token(f"{settings.SIZES[at]}-{family}", rows[0])) for at, rows in found if rows]
        if points:
            right.bar(*zip(*points, strict=True), width, label=family)
    middle = [at + 0.4 - width / 2 for at in range(len(settings.SIZES))]
    right.set(xticks=middle, xticklabels=settings.SIZES, ylabel="bundles a token and layer, v5e")
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return fig


def main() -> None:
    config = flags.parse(settings.Static)
    path = config.path(RESULTS / "tpu_static")
    results = resume(path, config)
    each_once(path, results, run, ({"row": row} for row in config.rows), itemgetter("row"), config)
    finish(path, results, table(results), figure(results))


if __name__ == "__main__":
    flags.run(main)
