"""The model of a family: a CMS of four levels, of classes behind one layer, of bytes in the blocks of a language model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from families import Family
from methods import LEVELS

from nested_jax import CMSConfig, ModelConfig
from nested_jax.cms import chain
from nested_jax.models import language_model
from nested_jax.numerics import rms_norm
from nested_jax.typing import Array, Float, Int, PyTree


class Model(NamedTuple):
    """Pure functions of weights, as nested dicts."""

    init: Callable[[Array], PyTree]
    """(key) -> weights."""
    nats: Callable[[PyTree, Array, Array], Array]
    """(weights, examples (N, inputs), classes (N,)) -> losses (N,)."""
    score: Callable[[PyTree, Array, Array], Array]
    """(weights, examples, classes) -> the part that is right; of texts bits per byte, negative, as more is better."""


def model(family: Family, width: int, hidden: int) -> Model:
    """A model of a family.

    Args:
        family: of the tasks.
        width: of the model.
        hidden: of each level of the CMS.
    """
    cms = CMSConfig(hidden=(hidden,) * LEVELS)
    if family.texts:
        config = ModelConfig(vocabulary=256, width=width // 2, layers=2, heads=2, mixer="attention", cms=cms)
        of_pieces = partial(_nats_of_bytes, config)
        score = lambda weights, x, y: -of_pieces(weights, x, y).mean() / jnp.log(2)
        return Model(partial(language_model.init_weights, config), of_pieces, score)
    of_classes = partial(_logits, cms)
    loss = lambda weights, x, y: optax.softmax_cross_entropy_with_integer_labels(of_classes(weights, x), y)
    right = lambda weights, x, y: (of_classes(weights, x).argmax(-1) == y).mean()
    return Model(partial(_init, cms, width, family.train.shape[-1], family.total), loss, right)


def _nats_of_bytes(config: ModelConfig, weights: PyTree, x: Int[Array, "N T"], y: Array) -> Float[Array, " N"]:
    N, T = x[:, 1:].shape
    start = language_model.init_state(config, weights, N, max_length=T)
    return language_model.target_nats(config, weights, x[:, :-1], x[:, 1:], start, multiple=T)[0].mean(axis=1)


def _init(cms: CMSConfig, width: int, inputs: int, classes: int, key: Array) -> PyTree:
    """Weights: a layer that enters, a CMS, a head that starts at zero."""
    enter, levels = jax.random.split(key)
    return {
        "enter": jax.random.normal(enter, (inputs, width)) * inputs**-0.5,
        "cms": chain.init_weights(levels, cms, width),
        "head": jnp.zeros((width, classes)),
    }


def _logits(cms: CMSConfig, weights: PyTree, x: Float[Array, "N inputs"]) -> Float[Array, "N classes"]:
    """Of every class, also of those that have not been met."""
    x = chain.apply(cms, weights["cms"], (), (x @ weights["enter"])[:, None])[:, 0]
    return rms_norm(jnp.ones(x.shape[-1]), x) @ weights["head"]
