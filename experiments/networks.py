"""Networks of equal parameters for experiments on synthetic tasks, a row each in `NETWORKS`."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx

from nested_jax import CMSConfig, ModelConfig, preset
from nested_jax.models.language_model import apply, init_state, init_weights

_HOPE = {"mixer": "self-modifying"}
_FIELDS = (
    *("errors", "step", "rates", "features", "momentum", "damped", "retention", "erase", "read", "surprise"),
    *("targets", "generated", "max_rate"),
)
EXACT, PAPER = ({name: getattr(preset(of), name) for name in _FIELDS} for of in ("tiny-hope", "tiny-hope-paper"))
"""The memories of the presets hope, which write exact errors, and hope-paper, as fields of `ModelConfig`."""
BOUNDARY = {"errors": "boundary", "step": "proximal", "rates": "shared", "features": "token", "momentum": True}
"""Memories whose errors are as old as the chunk, and that read by what they learn inside it."""
_ATTENTION = {"mixer": "attention"}

NETWORKS: dict[str, dict[str, Any] | None] = {
    **{f"hope, chunk {chunk}": _HOPE | {"chunk": chunk} for chunk in (1, 16, 64)},
    **{f"hope exact, chunk {chunk}": _HOPE | EXACT | {"chunk": chunk} for chunk in (1, 4, 16, 64, 128)},
    "hope exact without erase, chunk 16": _HOPE | EXACT | {"erase": "none", "chunk": 16},
    "hope exact with momentum, chunk 16": _HOPE | EXACT | {"momentum": True, "chunk": 16},
    "hope-attention": _ATTENTION,
    "titans, chunk 16": {"mixer": "titans", "chunk": 16},
    "gated-delta": {"mixer": "gated-delta", "chunk": 16},
    "gated-delta, rates to 2": {"mixer": "gated-delta", "chunk": 16, "max_rate": 2.0},
    "transformer": _ATTENTION,
    "lstm": None,
}
"""Fields of `ModelConfig`; None: an LSTM."""


class Network(NamedTuple):
    """A network as two pure functions."""

    init: Callable[[jax.Array], Any]
    """Random key -> parameters."""
    logits: Callable[[Any, jax.Array], jax.Array]
    """(parameters, tokens (B, T)) -> logits (B, T, V)."""


def network(name: str, vocabulary: int, width: int, layers: int, changes: dict[str, Any] | None = None) -> Network:
    """A network of `NETWORKS`, its feed-forward width chosen so that all have as many parameters as Hope, within 2 %.

    Args:
        name: a key of `NETWORKS`.
        vocabulary: tokens and labels V.
        width: of Hope and of all models but the LSTM.
        layers: number of blocks.
        changes: further fields of the `ModelConfig`.

    Returns:
        Its functions.
    """
    goal = count(language_model(config_of("hope, chunk 16", vocabulary, width, layers)))
    if NETWORKS[name] is None:
        sizes, of_size = range(4, 4 * width), lambda n: _lstm(vocabulary, n, layers)
    else:
        config = config_of(name, vocabulary, width, layers, changes)
        if config.mixer == "self-modifying":
            return language_model(config)
        with_hidden = lambda n: dataclasses.replace(config, cms=dataclasses.replace(config.cms, hidden=(n,)))
        sizes, of_size = range(4, 8 * width, 2), lambda n: language_model(with_hidden(n))
    above = bisect.bisect(sizes, goal, key=lambda n: count(of_size(n)))  # counts rise with the size
    return min(map(of_size, sizes[max(above - 1, 0) : above + 1]), key=lambda one: abs(count(one) - goal))


def config_of(name: str, vocabulary: int, width: int, layers: int, changes: dict[str, Any] | None = None) -> ModelConfig:
    """The model of a name. Its CMS is one level that does not learn in context: tasks are shorter than its periods.

    Args:
        name, vocabulary, width, layers, changes: as of `network`, but no LSTM.

    Returns:
        The config, with a feed-forward width of twice the model's.
    """
    cms = CMSConfig(hidden=(2 * width,), activation="gelu" if name.startswith("hope") else "swiglu")
    sizes = {"vocabulary": vocabulary, "width": width, "layers": layers, "heads": 2, "memory_hidden": 16}
    return ModelConfig(**sizes, cms=cms, tie_embeddings=False, **((NETWORKS[name] or {}) | (changes or {})))


def language_model(config: ModelConfig) -> Network:
    """The network of a config."""
    logits = lambda params, tokens: apply(config, params, tokens, init_state(config, params, len(tokens)))[0]
    return Network(partial(init_weights, config), logits)


def count(network: Network) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(network.init, jax.random.key(0))))


class _LSTM(nnx.Module):
    """Embedding, LSTM layers, linear head."""

    def __init__(self, vocabulary: int, width: int, layers: int, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(vocabulary, width, rngs=rngs)
        self.layers = nnx.List([nnx.RNN(nnx.OptimizedLSTMCell(width, width, rngs=rngs)) for _ in range(layers)])
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def _lstm(vocabulary: int, width: int, layers: int) -> Network:
    make = lambda key: _LSTM(vocabulary, width, layers, nnx.Rngs(key))

    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        module = make(jax.random.key(0))  # of its own random numbers nothing is used
        nnx.update(module, params)
        return module(tokens)

    return Network(lambda key: nnx.state(make(key), nnx.Param), logits)
