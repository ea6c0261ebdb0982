"""What a model's parameters and fast state belong to, in the words of errors and of `describe`."""

from __future__ import annotations

import jax

from nested_jax.cms.reader import InContext
from nested_jax.level import Nested
from nested_jax.memory.layer import LayerState
from nested_jax.models.config import ModelConfig
from nested_jax.models.language_model import ModelState


def state_owners(config: ModelConfig, state: ModelState) -> ModelState:
    """What each leaf of a model's state belongs to, in words: a tree of the state's structure."""
    memories = "memories of the sequence layers, chunk {}"
    layers = "caches of the sequence layers" if config.attends else memories.format(config.chunk)

    def label(name, tree):
        return jax.tree.map(lambda _: name, tree)

    def mixers(tree):
        if isinstance(tree, LayerState) and isinstance(tree.memory, Nested):
            slow = label(memories.format(config.reading), tree.memory.slow)
            return label(layers, tree)._replace(memory=Nested(slow, label(layers, tree.memory.fast)))
        return label(layers, tree)

    def levels(nest, index=0):
        if not isinstance(nest, Nested):
            return type(nest)(*map(mixers, nest))
        name = f"CMS level{config.cms.frozen + index + 1}, period {config.cms.periods[index]}"
        return Nested(label(name, nest.slow), levels(nest.fast, index + 1))

    learning = state.learning
    if learning is not None:
        segment = label(f"open segment of the CMS, period {config.cms.periods[-1]}", learning.open)
        learning = InContext(levels(learning.levels), segment)
    return ModelState("position", mixers(state.mixers), learning)
