"""Speed of the models: `python experiments/benchmarks/run.py` writes results/benchmarks.*."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import config as settings
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from nested_jax import LanguageModel, ModelConfig

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from record import finish, start
from timing import alternate

RESULTS = Path(__file__).parent / "results"


def step(config: ModelConfig, batch_size: int, length: int) -> tuple[Callable[[], object], dict]:
    """Compiled forward and backward pass of a batch of random tokens; its parameters, compile time and memory."""
    net, weights = nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param)
    text = jax.random.randint(jax.random.key(1), (batch_size, length + 1), 0, config.vocabulary)

    def loss(weights, text):
        model = nnx.merge(net, weights)
        logits, _ = model(text[:, :-1], model.init_state(batch_size, max_length=length))
        return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()

    started = time.perf_counter()
    compiled = jax.jit(jax.value_and_grad(loss)).lower(weights, text).compile()
    facts = {
        "parameters": settings.parameters(config),
        "compile_s": round(time.perf_counter() - started, 1),
        "temporary_mb": round(compiled.memory_analysis().temp_size_in_bytes / 1e6),
    }
    return lambda: compiled(weights, text), facts


def operations(config: ModelConfig, batch_size: int, length: int) -> float:
    """Floating-point operations of a Transformer++'s forward and backward pass; half of the scores are masked."""
    embedding = 0 if config.tie_embeddings else config.vocabulary * config.width
    scores = 6 * config.layers * length * config.width
    return batch_size * length * (6 * (settings.parameters(config) - embedding) + scores)


def matrix_rate(size: int = 1024, rounds: int = 9) -> float:
    """Operations a second of a float32 matrix product."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(lambda a: a @ a)
    return 2 * size**3 / statistics.median(alternate({"product": lambda: product(a)}, rounds)["product"])


def decoding(config: ModelConfig, contexts: tuple[int, ...], tokens: int, rounds: int) -> list[dict]:
    """Milliseconds a decoded token after contexts of several lengths."""
    net, weights = nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param)
    piece = 1024
    text = jax.random.randint(jax.random.key(1), (1, piece), 0, config.vocabulary)
    read = jax.jit(lambda w, text, state: nnx.merge(net, w)(text, state, multiple=piece)[1])
    init = jax.jit(lambda w: nnx.merge(net, w).init_state(1))

    @jax.jit
    def decode(weights, token, state):
        def one(carry, _):
            token, state = carry
            logits, state = nnx.merge(net, weights)(token, state)
            return (logits.argmax(-1), state), None

        return jax.lax.scan(one, (token, state), None, length=tokens)[0]

    state, position, states = jax.tree.map(jnp.asarray, init(weights)), 0, {}
    for context in contexts:
        while position < context:
            state, position = read(weights, text, state), position + piece
        states[context] = state
    call = lambda state: lambda: decode(weights, text[:, :1], state)
    times = alternate({str(context): call(state) for context, state in states.items()}, rounds)
    return [{"context": int(name), "ms_per_token": 1e3 * statistics.median(t) / tokens} for name, t in times.items()]


def measure(config: settings.Config) -> dict:
    hope, transformer = config.hope, settings.transformer(config.hope)
    results: dict = {"transformer": dataclasses.asdict(transformer), "device": str(jax.devices()[0]), "training": []}
    for length, batch_size, rounds in zip(config.lengths, config.batch_sizes, config.rounds, strict=True):
        models = {"transformer": transformer, "hope": hope}
        if length == config.lengths[0]:
            models["hope in context"] = settings.in_context(hope)
        steps = {name: step(model, batch_size, length) for name, model in models.items()}
        rate = matrix_rate()
        times = alternate({name: call for name, (call, _) in steps.items()}, rounds)
        middle = {name: statistics.median(t) for name, t in times.items()}
        achieved = operations(transformer, batch_size, length) / middle["transformer"]
        for name, (_, facts) in steps.items():
            results["training"].append(
                {
                    "model": name,
                    "length": length,
                    "rows": batch_size,
                    **facts,
                    "seconds": times[name],
                    "tokens_per_s": batch_size * length / middle[name],
                    "times_transformer": middle["transformer"] / middle[name],
                    "step_over_frozen": middle[name] / middle["hope"],
                    "of_matrix_rate": achieved / rate if name == "transformer" else None,
                }
            )
            print(results["training"][-1], flush=True)
    results["decoding"] = decoding(hope, config.contexts, config.decode_tokens, config.decode_rounds)
    return results


def table(results: dict) -> str:
    """Markdown."""
    lines = ["| T | rows | model | parameters | tokens/s | times Transformer++ | compile, s | temporaries, MB |"]
    lines.append("|---:|---:|---|---:|---:|---:|---:|---:|")
    for row in results["training"]:
        lines.append(
            f"| {row['length']:,} | {row['rows']} | {row['model']} | {row['parameters']:,} | {row['tokens_per_s']:,.0f} "
            f"| {row['times_transformer']:.2f} | {row['compile_s']:.1f} | {row['temporary_mb']:,} |"
        )
    shares = [(r["length"], r["of_matrix_rate"]) for r in results["training"] if r["of_matrix_rate"]]
    lines += [
        "",
        "Transformer++ at " + ", ".join(f"{x:.0%} (T = {t:,})" for t, x in shares) + " of the matrix-product rate.",
    ]
    ratio = [r["step_over_frozen"] for r in results["training"] if r["model"] == "hope in context"]
    lines += [f"A step of Hope in context takes {x:.2f} times that of Hope with a frozen CMS." for x in ratio]
    lines += ["", "| tokens of context | ms per decoded token |", "|---:|---:|"]
    lines += [f"| {row['context']:,} | {row['ms_per_token']:.2f} |" for row in results["decoding"]]
    return "\n".join(lines) + "\n"


def figure(results: dict) -> Figure:
    """Training speed and decoding latency over length."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name in ("hope", "transformer"):
        rows = [row for row in results["training"] if row["model"] == name]
        left.plot([row["length"] for row in rows], [row["tokens_per_s"] for row in rows], "o-", label=name)
    left.set(xscale="log", yscale="log", xlabel="tokens T of a row", ylabel="tokens/s", title="Training step")
    left.set_xticks([row["length"] for row in rows], [f"{row['length']:,}" for row in rows])
    left.xaxis.minorticks_off()
    left.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    left.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    left.yaxis.set_minor_formatter(StrMethodFormatter("{x:,.0f}"))
    left.legend(frameon=False)
    decoded = results["decoding"]
    right.plot([row["context"] for row in decoded], [row["ms_per_token"] for row in decoded], "o-")
    right.set(xscale="log", xlabel="tokens of context", ylabel="ms per token", title="Hope, decoding")
    right.set_ylim(0, 1.2 * max(row["ms_per_token"] for row in decoded))
    return fig


def main() -> None:
    config = flags.parse(settings.Config)
    results = start(RESULTS / "benchmarks", config) | measure(config)
    finish(RESULTS / "benchmarks", results, table(results), figure(results))


if __name__ == "__main__":
    flags.run(main)
