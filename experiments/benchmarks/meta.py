"""Cost of derivatives through inner loops: `python experiments/benchmarks/meta.py` writes results/meta.*."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# libtpu, if installed, compiles for a TPU that is not attached.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import config as settings  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from nested_jax.meta import mixflow_grad, unroll  # noqa: E402

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags  # noqa: E402
from record import finish, start  # noqa: E402
from timing import alternate  # noqa: E402

RESULTS = Path(__file__).parent / "results"
CHECKPOINTS = ("none", "full", "sqrt", "log")
RATE = 0.05
GRAINS = {"layers": "each layer and each step", "halves": "each half of a layer, each step, and steps by twos"}
TPU = "v5e:2x2"
Call = tuple[Callable, tuple]  # a function and its arguments


def mlp_memory(config: settings.MetaConfig, length: int, checkpoint: str) -> Call:
    """The gradient with respect to its start of an MLP memory's mean loss over T batches of pairs."""
    D = config.width
    start = [jax.random.normal(jax.random.key(i), (D, D)) * D**-0.5 for i in range(2)]
    pairs = tuple(jax.random.normal(jax.random.key(i), (length, config.rows, D)) for i in (2, 3))

    def loss(w, pair):
        keys, values = pair
        return jnp.mean(jnp.sum((jax.nn.silu(keys @ w[0]) @ w[1] - values) ** 2, axis=-1)) / 2

    def step(w, pair):
        value, gradient = jax.value_and_grad(loss)(w, pair)
        return jax.tree.map(lambda w, g: w - RATE * g, w, gradient), value

    return jax.grad(lambda start, pairs: unroll(step, start, pairs, checkpoint=checkpoint)[1].mean()), (start, pairs)


def transformer(config: settings.MetaConfig, gradient: Callable, grain: str) -> Call:
    """Value and gradient with respect to start and rate of a Transformer's loss after steps of gradient descent.

    `grain` is what backward passes recompute: "layers" a layer and an inner step at a time, "halves" attention and MLP
    apart and two inner steps at a time.
    """
    D, heads, vocabulary = config.width, config.width // 64, 256
    keys = jax.random.split(jax.random.key(0), 6)
    draw = lambda key, *shape: jax.random.normal(key, shape) * shape[-2] ** -0.5
    shapes = {"qkv": (D, 3 * D), "out": (D, D), "up": (D, 4 * D), "down": (4 * D, D)}
    blocks = {name: draw(key, config.layers, *shape) for key, (name, shape) in zip(keys, shapes.items(), strict=False)}
    start = {"embedding": draw(keys[4], vocabulary, D), "blocks": blocks}
    text = jax.random.randint(keys[5], (config.steps, config.batch_size, config.tokens + 1), 0, vocabulary)
    norm = lambda x: x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)

    recompute = lambda part: jax.checkpoint(part, prevent_cse=False)

    def attention(x, w):
        split = (norm(x) @ w["qkv"]).reshape(*x.shape[:2], 3 * heads, D // heads)
        attended = jax.nn.dot_product_attention(*jnp.split(split, 3, axis=2), is_causal=True)
        return x + attended.reshape(x.shape) @ w["out"]

    def mlp(x, w):
        return x + jax.nn.gelu(norm(x) @ w["up"]) @ w["down"]

    if grain == "halves":
        layer, kept = lambda x, w: (recompute(mlp)(recompute(attention)(x, w), w), None), (config.steps // 2, 2)
    else:
        layer, kept = recompute(lambda x, w: (mlp(attention(x, w), w), None)), "full"

    def loss(w, tokens):
        x, _ = jax.lax.scan(layer, w["embedding"][tokens[:, :-1]], w["blocks"])
        logits = jax.nn.log_softmax(norm(x) @ w["embedding"].T)
        return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1))

    def outer(start, rate, text):
        step = lambda w, tokens: (jax.tree.map(lambda w, g: w + -rate * g, w, gradient(loss)(w, tokens)), None)
        return loss(unroll(step, start, text, checkpoint=kept)[0], text[0])

    return jax.value_and_grad(outer, (0, 1)), (start, RATE, text)


def compile_for(device: jax.Device | None, made: Call) -> tuple[jax.stages.Compiled, float]:
    """A call compiled for this machine or another device, and its temporary memory in MB as planned by the compiler."""
    function, arguments = made
    if device:
        sharding = SingleDeviceSharding(device)
        shape = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=sharding)
        arguments = jax.tree.map(shape, arguments)
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled, compiled.memory_analysis().temp_size_in_bytes / 1e6


def tpu() -> jax.Device | None:
    """A TPU to compile for, if libtpu is installed."""
    if importlib.util.find_spec("libtpu") is None:
        return None
    return topologies.get_topology_desc(platform="tpu", topology_name=TPU).devices[0]


def torch_unroll(config: settings.MetaConfig) -> list[dict]:
    """The MLP memory by torch.func, if torch is installed, each length in its own process."""
    if importlib.util.find_spec("torch") is None:
        return []
    script = Path(__file__).with_name("torch_unroll.py")
    flags = [str(n) for n in (config.width, config.rows, config.rounds)]
    lengths = [length for length in config.lengths if length <= config.timed]
    call = lambda length: subprocess.run(
        [sys.executable, script, str(length), *flags], capture_output=True, text=True, check=True
    )
    return [json.loads(call(length).stdout) for length in lengths]


def measure(config: settings.MetaConfig) -> dict:
    unrolled, calls = [], {}
    for length in config.lengths:
        for checkpoint in CHECKPOINTS:
            made = mlp_memory(config, length, checkpoint)
            compiled, megabytes = compile_for(None, made)
            unrolled.append({"checkpoint": checkpoint, "steps": length, "temporary_mb": megabytes})
            print(unrolled[-1], flush=True)
            if length == config.timed:
                calls[checkpoint] = lambda run=compiled, arguments=made[1]: run(*arguments)
    times = alternate(calls, config.rounds)
    device = str(jax.devices()[0])
    results = {"device": device, "unroll": unrolled, "unroll_seconds": times, "torch": torch_unroll(config)}

    inner, calls = {"mixflow_grad": mixflow_grad, "jax.grad": jax.grad}, {}
    devices = {"CPU": None} | ({f"TPU {TPU.split(':')[0]}, compiled only": device} if (device := tpu()) else {})
    results["mixflow"] = []
    for where, device in devices.items():
        for grain, name in itertools.product(GRAINS, inner):
            made = transformer(config, inner[name], grain)
            compiled, megabytes = compile_for(device, made)
            row = {"grain": grain, "gradient": name, "device": where, "temporary_mb": megabytes}
            results["mixflow"].append(row)
            print(row, flush=True)
            if device is None:
                calls[f"{grain} {name}"] = lambda run=compiled, arguments=made[1]: run(*arguments)
    results["mixflow_seconds"] = alternate(calls, config.rounds)
    return results


def table(results: dict) -> str:
    """Markdown."""
    config, times = results["config"], results["unroll_seconds"]
    at = {(row["checkpoint"], row["steps"]): row["temporary_mb"] for row in results["unroll"]}
    none = statistics.median(times["none"])
    lengths, timed = config["lengths"], config["timed"]
    lines = [
        "Temporary memory, MB, of the gradient through T steps of a two-layer MLP memory "
        f"(width {config['width']}, batch {config['rows']}), and its time at {timed:,} steps:",
        "",
        "| `checkpoint` |" + "".join(f" T = {length:,} |" for length in lengths) + ' seconds | times "none" |',
        "|---|" + "---:|" * (len(lengths) + 2),
    ]
    for checkpoint in CHECKPOINTS:
        cells = "".join(f" {at[checkpoint, length]:,.1f} |" for length in lengths)
        seconds = statistics.median(times[checkpoint])
        lines.append(f"| {checkpoint} |{cells} {seconds:.2f} | {seconds / none:.2f} |")
    if results["torch"]:
        by = {row["steps"]: row for row in results["torch"]}
        cells = "".join(f" {by[length]['resident_mb']:,.0f} |" if length in by else " - |" for length in lengths)
        seconds = statistics.median(by[timed]["seconds"])
        lines.append(f"| torch.func, resident |{cells} {seconds:.2f} | - |")  # no ratio: not timed in the same rounds
    share = at["none", timed] / at["sqrt", timed]
    lines += [
        "",
        f'"sqrt" takes {share:.1f} times less than "none" at {timed:,} steps.',
        "",
        f"Through {config['steps']} steps of a Transformer ({config['layers']} layers, width {config['width']}, "
        f"{config['batch_size']} x {config['tokens']} tokens):",
        "",
        "| recomputed | compiler | `jax.grad`, MB | `mixflow_grad`, MB | ratio | `jax.grad`, s | `mixflow_grad`, s | time |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for ours, plain in _pairs(results):
        a, b = ours["temporary_mb"], plain["temporary_mb"]
        took = " - | - | - |"
        if ours["device"] == "CPU":
            x, y = (statistics.median(results["mixflow_seconds"][f"{r['grain']} {r['gradient']}"]) for r in (ours, plain))
            took = f" {y:.1f} | {x:.1f} | {x / y:.2f} |"
        lines.append(f"| {GRAINS[ours['grain']]} | {ours['device']} | {b:,.0f} | {a:,.0f} | {b / a:.2f} |{took}")
    return "\n".join(lines) + "\n"


def _pairs(results: dict) -> list[tuple[dict, dict]]:
    """Rows of mixflow_grad and of jax.grad, device by device."""
    rows = results["mixflow"]
    return list(zip(rows[::2], rows[1::2], strict=True))


def figure(results: dict) -> Figure:
    """Memory over length of the MLP memory, and of both gradients of the Transformer."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for checkpoint in CHECKPOINTS:
        rows = [row for row in results["unroll"] if row["checkpoint"] == checkpoint]
        left.plot([row["steps"] for row in rows], [row["temporary_mb"] for row in rows], "o-", label=checkpoint)
    if results["torch"]:
        rows = results["torch"]
        left.plot([row["steps"] for row in rows], [row["resident_mb"] for row in rows], "s:", label="torch.func, resident")
    lengths = results["config"]["lengths"]
    base = next(row["temporary_mb"] for row in results["unroll"] if row["checkpoint"] == "sqrt")
    root = [base * (length / lengths[0]) ** 0.5 for length in lengths]
    left.plot(lengths, root, color="grey", linestyle="--", label="growth of sqrt T")
    left.set(xscale="log", yscale="log", xlabel="inner steps T", ylabel="temporary memory, MB", title="MLP memory, unrolled")
    left.set_xticks(lengths, [f"{length:,}" for length in lengths])
    left.xaxis.minorticks_off()
    left.set_ylim(top=4e4)
    left.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    pairs = _pairs(results)
    for shift, name, which in ((-0.2, "mixflow_grad", 0), (0.2, "jax.grad", 1)):
        heights = [pair[which]["temporary_mb"] for pair in pairs]
        bars = right.bar([i + shift for i in range(len(pairs))], heights, 0.36, label=name)
        right.bar_label(bars, fmt="%.0f", fontsize=8)
    label = lambda row: f"{row['grain']}\n{row['device']}".replace(", ", "\n")
    right.set_xticks(range(len(pairs)), [label(ours) for ours, _ in pairs], fontsize=8)
    right.set(ylabel="temporary memory, MB", title=f"Transformer, {results['config']['steps']} inner steps")
    right.set_ylim(0, 1.25 * max(row["temporary_mb"] for row in results["mixflow"]))
    right.legend(frameon=False, fontsize=8)
    return fig


def main() -> None:
    config = flags.parse(settings.MetaConfig)
    results = start(RESULTS / "meta", config) | measure(config)
    finish(RESULTS / "meta", results, table(results), figure(results))


if __name__ == "__main__":
    flags.run(main)
