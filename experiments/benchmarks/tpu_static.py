"""Bundles of kernels on TPUs: `python experiments/benchmarks/tpu_static.py` compiles them and writes results/tpu_static.*.

A bundle is what a TPU's core does in a cycle at best. libtpu writes those of every kernel that it compiles; each program of
a kernel's grid runs all of its own once, but that of attention, which has some for masked blocks that it skips.
"""

from __future__ import annotations

import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory

import config as settings
import jax
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
from nested_jax.parallel.chips import CHIPS
from nested_jax.parallel.mesh import MeshShape, make_mesh
from nested_jax.parallel.plan import devices_of, plan
from nested_jax.train.config import TrainConfig

RESULTS = Path(__file__).parent / "results"
SLOTS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")
"""What a bundle has slots for: the matrix unit, moves across lanes, arithmetic, the matrix unit's results, and more."""
CHUNKS, ATTENDED = 4, 2048
"""Chunks of a memory's stream, and tokens of attention's, that are compiled."""


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
        made = plan(config, settings.TOPOLOGIES[chip])
        numbers = {"milliseconds": 1e3 * made.seconds["cycles, as the compiler estimates them"], "tokens": tokens}
        numbers |= {"temporaries": made.temporaries, "arguments": made.arguments, "traffic": made.traffic}
    else:
        with TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as pool:
            numbers = {"kernels": pool.submit(kernels, name, settings.TOPOLOGIES[chip], folder).result()}
    return numbers | {"seconds": round(time.monotonic() - started, 1)}


def kernels(name: str, topology: str, folder: str) -> dict[str, dict]:
    """The kernels of a preset's sequence layer, forward and backward: {name: bundles, slots used}.

    Args:
        folder: an empty one, in which libtpu writes what it compiles: it is told once, when a process loads it.
    """
    options = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_mosaic_dump_to={folder}"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {options}"
    layer = sequence_layer(preset(name))
    mesh = make_mesh(MeshShape(data=1), devices_of(topology)[:1])
    place = jax.NamedSharding(mesh, jax.P())
    shaped = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place))
    weights = shaped(jax.eval_shape(layer.init_weights, jax.random.key(0)))
    length = CHUNKS * layer.chunk if isinstance(layer, MemoryLayer) else ATTENDED
    x = shaped(jax.ShapeDtypeStruct((1, length, layer.width), jnp.bfloat16))

    def loss(weights, x):
        return jnp.square(layer(weights, layer.init_state(weights, 1, length), x, 0)[1].astype(jnp.float32)).sum()

    with jax.set_mesh(mesh):
        jax.jit(jax.grad(loss, (0, 1))).lower(weights, x).compile()
    found = {}
    for path in sorted(Path(folder).iterdir()):
        if match := re.match(r"\d+-(chunk_scan|splash)(\w*)\S*-final_hlo-static-per-bundle-utilization", path.name):
            lines = [list(map(int, line.split())) for line in path.read_text().splitlines() if re.match(r"[\d ]+$", line)]
            bundles = [line for line in lines if len(line) == len(SLOTS)][1:]  # the first is how many slots there are
            slots = dict(zip(SLOTS, map(sum, zip(*bundles, strict=True)), strict=True))
            found[match[1] + match[2]] = {"bundles": len(bundles), "slots": slots}
    return found


def per_token(name: str, row: dict, tokens: int = ATTENDED) -> float:
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
    (first,), (last,) = steps
    slope = (last["milliseconds"] - first["milliseconds"]) / (last["tokens"] - first["tokens"])
    return 1e3 * kernel, first["milliseconds"] + slope * (tokens - first["tokens"])


def table(results: dict) -> str:
    """Markdown: a layer's kernels; a step's time against tokens."""
    cells = []
    for row in results["config"]["rows"]:
        if (found := rows_of(results, row=row)) and "kernels" in found[0]:
            chip, name = row.split()
            each = found[0]["kernels"].values()
            used = sum(kernel["slots"]["MXU"] for kernel in each) / max(1, 4 * sum(kernel["bundles"] for kernel in each))
            bundles = " + ".join(f"{kernel['bundles']:,}" for kernel in each) or "none"
            tokens = f"{per_token(name, found[0]):,.0f}"
            cells.append([chip, name, bundles, tokens, f"{used:.0%}" if each else ""])
    heads = ("chip", "layer", "bundles of a program of each kernel", "bundles a token", "matrix unit's slots used")
    lines = [*markdown(heads, cells, 2), ""]
    steps = []
    for tokens in settings.TOKENS:
        both = [milliseconds(results, "v5e", f"140m-{family}", tokens) for family in ("hope", "transformer")]
        if all(both):
            hope, transformer = (sum(times or ()) for times in both)
            split = [f"{kernel:,.1f} + {rest:,.1f}" for kernel, rest in filter(None, both)]
            steps.append([f"{tokens:,}", *split, f"{transformer / hope:.2f}"])
    heads = ("tokens", "140m-hope, ms: kernels + the rest", "140m-transformer, ms", "Hope's speed, of the Transformer's")
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
