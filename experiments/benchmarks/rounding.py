"""What products of bfloat16 cost: `python experiments/benchmarks/rounding.py` reads with XLA's form and with kernels.

On a CPU: the operands of XLA's products of default precision are rounded as a TPU rounds them; kernels, which round theirs
themselves, are interpreted. Distances are from the same memory in float64.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import config as settings
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.extend import core
from matplotlib.figure import Figure

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from record import in_one_go, markdown

from nested_jax.memory.deep import Rule
from nested_jax.memory.linear import LinearMemory
from nested_jax.memory.self_modifying import SelfModifyingTitans
from nested_jax.memory.stream import MemoryLayer
from nested_jax.memory.titans import Titans

RESULTS = Path(__file__).parent / "results"
HOPE = Rule(errors="exact", step="normalised", features="boundary")
WHAT = ("outputs", "states", "gradients of weights", "gradients of tokens")


def layers(config: settings.Rounding) -> dict[str, tuple[MemoryLayer, dict[str, Any]]]:
    """Memories, and weights with which they write and erase as strongly as they can, and keep what they hold."""
    D, C = config.width, config.chunk
    hope = SelfModifyingTitans(D, 1, D // 2, chunk=C, momentum=False, rates="own", rule=HOPE)
    strong = {"rate_bias": jnp.full((1, 6), 4.0), "retention_bias": jnp.full(1, 9.0)}
    gates = {"gates_bias": jnp.array([8.0, 9.0])}
    return {
        "Hope": (hope, strong),
        "Titans": (Titans(D, 1, D // 2, chunk=C), {}),
        "gated delta": (LinearMemory(D, 1, "gated-delta", chunk=C), gates),
        "gated delta, rates to 2": (LinearMemory(D, 1, "gated-delta", chunk=C, max_rate=2.0), gates),
    }


def rounded(function: Callable) -> Callable:
    """The function, with operands of its float32 products of default precision rounded to bfloat16."""

    def call(*arguments):
        traced, out = jax.make_jaxpr(function, return_shape=True)(*arguments)
        results = _run(traced, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(out), results)

    return call


def _run(traced: core.ClosedJaxpr, arguments: list) -> list:
    known: dict[Any, Any] = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))
    known |= dict(zip(traced.jaxpr.invars, arguments, strict=True))
    value = lambda atom: atom.val if isinstance(atom, core.Literal) else known[atom]
    for equation in traced.jaxpr.eqns:
        given, params = list(map(value, equation.invars)), equation.params
        if "call_jaxpr" in params:  # a function with a rule of its own, behind which the gradient is
            results = _run(params["call_jaxpr"], given)
        else:
            if equation.primitive.name == "dot_general" and not _exact(params["precision"]):
                given = [jax.lax.reduce_precision(x, 8, 7) if x.dtype == jnp.float32 else x for x in given]
            inner = lambda leaf: isinstance(leaf, core.ClosedJaxpr | core.Jaxpr)
            params = {key: jax.tree.map(_inside, param, is_leaf=inner) for key, param in params.items()}
            results = equation.primitive.bind(*given, **params)
            results = results if equation.primitive.multiple_results else [results]
        known |= dict(zip(equation.outvars, results, strict=True))
    return list(map(value, traced.jaxpr.outvars))


def _exact(precision: Any) -> bool:
    return precision is not None and any(each not in (None, jax.lax.Precision.DEFAULT) for each in precision)


def _inside(param: Any) -> Any:
    """The same inside of what an operation calls."""
    if isinstance(param, core.Jaxpr):
        return _inside(core.ClosedJaxpr(param, ())).jaxpr
    if not isinstance(param, core.ClosedJaxpr):
        return param
    return jax.make_jaxpr(lambda *arguments: _run(param, list(arguments)))(*param.in_avals)


def measure(config: settings.Rounding) -> dict:
    """Relative distances, by memory, keys and form."""
    draws = np.random.default_rng(config.seed).normal(size=(1, config.chunks * config.chunk, config.width))
    keys = {"random": draws, "equal": draws[:, :1] + 0 * draws, "nearly equal": draws[:, :1] + 0.01 * draws}
    rows = []
    for name, (layer, strong) in layers(config).items():
        for kind, x in keys.items():
            tokens, weights = jnp.asarray(x, jnp.bfloat16), layer.init_weights(jax.random.key(config.seed)) | strong
            with jax.enable_x64(True):
                wide = jax.tree.map(lambda w: w.astype(jnp.float64), (weights, tokens))
                expected = jax.tree.map(np.asarray, jax.jit(partial(results, layer))(*wide))
            kernel = dataclasses.replace(layer, implementation="pallas")
            forms = {"XLA": rounded(partial(results, layer)), "kernel": partial(results, kernel)}
            for form, function in forms.items():
                got = jax.jit(function)(weights, tokens)
                distances = [distance(a, b) for a, b in zip(got, expected, strict=True)]
                rows.append({"memory": name, "keys": kind, "form": form, "distances": distances})
    return {"rows": rows}


def results(layer: MemoryLayer, weights: Any, tokens: Any) -> tuple:
    """`WHAT`, the gradients of a sum of the outputs with signs that alternate; not of what comes after the memory."""

    def loss(weights, tokens):
        state, y = layer(weights, layer.init_state(weights, 1), tokens, 0)
        signs = jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(jnp.promote_types(y.dtype, jnp.float32))
        return jnp.sum(y * signs), (y, state.memory)

    (of_weights, of_tokens), (y, memory) = jax.grad(loss, (0, 1), has_aux=True)(weights, tokens)
    return y, memory, {name: leaf for name, leaf in of_weights.items() if name not in ("out", "norm")}, of_tokens


def distance(got: Any, expected: Any) -> float:
    """Of all floats together, relative."""
    flat = lambda tree: np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree) if np.ndim(x)])
    return float(np.linalg.norm(flat(got) - flat(expected)) / np.linalg.norm(flat(expected)))


def table(results: dict) -> str:
    """Markdown: distances in per cent."""
    percents = lambda row: [f"{100 * value:.2f}" for value in row["distances"]]
    rows = [[row["memory"], row["keys"], row["form"], *percents(row)] for row in results["rows"]]
    return "\n".join(["Distances from float64, per cent:", "", *markdown(("memory", "keys", "form", *WHAT), rows, 3)]) + "\n"


def figure(results: dict) -> Figure:
    """Kernels' distances against XLA's."""
    fig, ax = plt.subplots(figsize=(4.2, 3.6), layout="constrained")
    pairs = list(zip(results["rows"][::2], results["rows"][1::2], strict=True))
    for i, what in enumerate(WHAT):
        ax.plot(*zip(*((a["distances"][i], b["distances"][i]) for a, b in pairs), strict=True), ".", label=what)
    every = [value for row in results["rows"] for value in row["distances"]]
    span = (min(every) / 1.3, 1.3 * max(every))
    ax.plot(span, span, color="gray", linewidth=0.8)
    ax.set(xscale="log", yscale="log", xlabel="XLA's form: distance from float64", ylabel="kernel", xlim=span, ylim=span)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return fig


def main() -> None:
    config = flags.parse(settings.Rounding)
    in_one_go(RESULTS / "rounding", config, measure, table, figure)


if __name__ == "__main__":
    flags.run(main)
