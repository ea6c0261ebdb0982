"""Models of a few dozen parameters, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nested_jax import CMSConfig, LanguageModel, ModelConfig

SMALL = ModelConfig(vocabulary=11, width=8, layers=2, heads=2, chunk=4, memory_hidden=3, window=5)


def config(mixer="gated-delta", **fields) -> ModelConfig:
    cms = {name: fields.pop(name) for name in list(fields) if name in {f.name for f in dataclasses.fields(CMSConfig)}}
    cms = CMSConfig(**({"hidden": (5, 5), "rate": 0.5, "clip": 0.3} | cms))
    return dataclasses.replace(SMALL, mixer=mixer, cms=cms, **fields)


def model(config: ModelConfig, seed=0, rule=None) -> LanguageModel:
    net, weights = nnx.split(LanguageModel(config, rngs=nnx.Rngs(seed), rule=rule), nnx.Param)
    noise = iter(jax.random.split(jax.random.key(seed + 1), 99))
    jitter = lambda w: w.astype(jnp.float64) + 0.1 * jax.random.normal(next(noise), w.shape, jnp.float64)
    return nnx.merge(net, jax.tree.map(jitter, weights))


def tokens(batch=1, length=27, seed=5) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, SMALL.vocabulary)


def differentiable(model: LanguageModel):
    """(net, weights): `nnx.merge(net, weights)` is the model."""
    return nnx.split(model, nnx.Param)


def without_rates(weights):
    """The weights with the CMS's inner learning rates at zero."""
    still = lambda path, w: 0 * w if {"cms", "rate"} <= {getattr(key, "key", None) for key in path} else w
    return jax.tree_util.tree_map_with_path(still, weights)


def read(model: LanguageModel, tokens, max_length=None, **keywords):
    return model(tokens, model.init_state(len(tokens), max_length=max_length), **keywords)


def cms_forward(config, weights, x):
    """NL Eq. 73 (a chain, each MLP behind its norm and beside a residual) or 74 (a weighted sum); gelu in its tanh form."""
    start, total = x, x
    for i in range(len(config.hidden)):
        level = jax.tree.map(np.asarray, weights[f"level{i + 1}"])
        z = start / np.sqrt(np.mean(start**2, -1, keepdims=True) + 1e-6) * level["norm"]
        h = z @ level["up"]
        if config.activation == "swiglu":
            gate = z @ level["gate"]
            h = h * gate / (1 + np.exp(-gate))
        else:
            h = h / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (h + 0.044715 * h**3)))
        y = h @ level["down"]
        if config.variant == "independent":
            total = total + float(weights["mix"][i]) * y
        else:
            start = total = start + y
    return total
