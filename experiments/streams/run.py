"""State norms over hostile streams: `python experiments/streams/run.py` writes results/streams.*."""

from __future__ import annotations

import sys
import time
from functools import partial
from operator import itemgetter
from pathlib import Path

import config as settings
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from record import each_once, finish, markdown, resume, rows_of

from nested_jax import CMSConfig, ModelConfig
from nested_jax.data import open_documents
from nested_jax.models.language_model import apply, init_state, init_weights

RESULTS = Path(__file__).parent / "results"
PIECE = 2**14  # tokens of one call
LARGE = 20.0  # logit of a gate that is 1 in float32, and negative nearly 0
MOMENTUM = float(np.log(9))  # logit of 0.9
STREAMS = ("one token", "period two", "random", "two texts in turn")


def streams(tokens: int, seed: int) -> np.ndarray:
    """(4, tokens) bytes: one repeated; two in turn; random ones; the first 2,048 of two held-out documents, in turn."""
    texts = b"".join(text[:2048] for text in open_documents("stdlib", "heldout")[:2])
    random = np.random.default_rng(seed).integers(256, size=tokens)
    repeated = [np.resize(np.frombuffer(piece, np.uint8), tokens) for piece in (b"a", b"ab", texts)]
    return np.stack([*repeated[:2], random, repeated[2]]).astype(np.int32)


def largest(config: ModelConfig, weights: dict, swinging: bool = False) -> dict:
    """Weights whose learning rates are at their largest; half of the heads never decay, half decay at once.

    Momentum is 0.9, or swings from token to token between 0 and 1.
    """
    mixer, heads = dict(weights["blocks"]["mixer"]), config.heads
    retention = jnp.where(jnp.arange(heads) % 2, -LARGE, LARGE)
    for name, value in (("rate_bias", LARGE), ("retention_bias", retention), ("momentum_bias", MOMENTUM)):
        if name in mixer:
            mixer[name] = jnp.broadcast_to(value, mixer[name].shape)
    if swinging:
        shape = mixer["momentum"].shape
        mixer["momentum"] = LARGE * jax.random.normal(jax.random.key(0), shape)
        mixer["momentum_bias"] = jnp.zeros_like(mixer["momentum_bias"])
    if "gates_bias" in mixer:  # of rate, then of retention, if there are any, and of Titans' momentum or omega's strengths
        third = jnp.full(heads, MOMENTUM if config.mixer == "titans" else LARGE)
        gates = jnp.concatenate([jnp.full(heads, LARGE), retention, third])
        mixer["gates_bias"] = jnp.broadcast_to(gates[: mixer["gates_bias"].shape[1]], mixer["gates_bias"].shape)
    return weights | {"blocks": weights["blocks"] | {"mixer": mixer}}


def run(config: settings.Config, cells: list[dict]) -> list[dict]:
    """The norms of the fast state after each piece of each stream, to the first that is no number."""
    return [measure(config, cell["option"]) for cell in cells]


def measure(config: settings.Config, option: str) -> dict:
    """norms: (pieces, streams), of what the sequence layers hold; finite: tokens read until a logit or norm is no number."""
    started = time.monotonic()
    sizes = {"width": config.width, "layers": config.layers, "heads": 2, "memory_hidden": 16}
    model = ModelConfig(**sizes, cms=CMSConfig(hidden=(2 * config.width,)), **settings.OPTIONS[option])
    weights = jax.jit(partial(init_weights, model))(jax.random.key(config.seed))
    weights = largest(model, weights, option in settings.SWINGING)

    @jax.jit
    def read(state, tokens):
        logits, state = apply(model, weights, tokens, state, multiple=PIECE)
        held = [leaf for leaf in jax.tree.leaves(state.mixers) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        squares = [jnp.square(leaf).sum((0, *range(2, leaf.ndim))) for leaf in held]  # leaves (L, B, ...)
        return state, jnp.sqrt(sum(squares)), jnp.isfinite(logits).all((1, 2))

    state, norms, finite = init_state(model, weights, len(STREAMS)), [], []
    for piece in np.split(streams(PIECE * -(-config.tokens // PIECE), config.seed), -(-config.tokens // PIECE), axis=1):
        state, norm, good = read(state, piece)
        norms.append(norm)
        finite.append(good & jnp.isfinite(norm))
    ends = PIECE * np.logical_and.accumulate(finite).sum(axis=0)
    row = {"norms": np.array(norms).tolist(), "finite": ends.tolist()}
    return row | {"seconds": round(time.monotonic() - started, 1), "device": jax.devices()[0].device_kind}


def table(results: dict) -> str:
    """Markdown: a row for each option, the norms after the first piece, half of the stream and all of it."""
    cells = []
    for option in results["config"]["options"]:
        for row in rows_of(results, option=option):
            norms = np.array(row["norms"], float)
            of = lambda i: " / ".join(f"{norms[at, i]:.3g}" for at in (0, len(norms) // 2, -1))  # noqa: B023
            lost = min(row["finite"]) < PIECE * len(norms)
            line = [of(i) for i in range(len(STREAMS))]
            cells.append([option, *line, f"no: within {min(row['finite']) + PIECE:,}" if lost else "yes"])
    pieces = -(-results["config"]["tokens"] // PIECE)
    at = ", ".join(f"{PIECE * (i + 1):,}" for i in (0, pieces // 2, pieces - 1))
    note = f"Norm of all that the sequence layers hold after {at} tokens."
    return "\n".join([*markdown(("memory", *STREAMS, "all finite"), cells), "", note]) + "\n"


def figure(results: dict) -> Figure:
    """The largest norm of the four streams after the first piece, half of them and all, a row for each option."""
    rows = [row for option in results["config"]["options"] for row in rows_of(results, option=option)]
    fig, axes = plt.subplots(figsize=(8, 0.22 * len(rows) + 1.2), layout="constrained")
    norms = [np.array(row["norms"], float).max(axis=1) for row in rows]  # NaN where one stream's is
    for i, (name, marker) in enumerate((("first piece", "|"), ("half", "."), ("all", "o"))):
        at = [norm[(0, len(norm) // 2, -1)[i]] for norm in norms]
        axes.plot(at, range(len(rows)), marker, color=plt.cm.Blues(0.4 + 0.3 * i), label=name)
    for y, norm in enumerate(norms):
        if not np.isfinite(norm).all():
            axes.text(0.01, y, "overflows", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set(xscale="log", xlabel="largest norm of the fast state", yticks=range(len(rows)))
    axes.set_yticklabels([row["option"] for row in rows], fontsize=8)
    axes.grid(axis="y", linewidth=0.3)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    fig.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    return fig


def main() -> None:
    config = flags.parse(settings.Config)
    path = config.path(RESULTS / "streams")
    results = resume(path, config)
    choices = ({"option": option} for option in config.options)
    each_once(path, results, partial(run, config), choices, itemgetter("option"), config)
    finish(path, results, table(results), figure(results))


if __name__ == "__main__":
    flags.run(main)
