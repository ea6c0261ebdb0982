"""Slow twin of a model that learns in context: its blocks one after the other, inside `cms.reference`'s loop."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import optax

from nested_jax import cms
from nested_jax.cms.reference import learn_in_context
from nested_jax.models.block import sequence_layer
from nested_jax.models.config import ModelConfig
from nested_jax.models.language_model import embed, head, mix
from nested_jax.typing import Array, Bool, Float, Int, PyTree


def language_model(
    config: ModelConfig,
    weights: PyTree,
    rules: Sequence[optax.GradientTransformation],
    tokens: Int[Array, "B T"],
    learn: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B T V"]:
    """Logits of whole documents, see `learn_in_context`; arguments as of `nested_jax.models.language_model.apply`."""
    layer, first = sequence_layer(config), config.layers - config.adapting
    blocks = [jax.tree.map(lambda w, i=i: w[i], weights["blocks"]) for i in range(config.layers)]
    mixers = [layer.init_state(block["mixer"], len(tokens), tokens.shape[1]) for block in blocks]

    def forward(fast, mixers, tokens, position):
        x, after = embed(config, weights, tokens), []
        for i, (block, mixer) in enumerate(zip(blocks, mixers, strict=True)):
            mixer, x = mix(config, block, mixer, x, position)
            after.append(mixer)
            matrices = [level[i - first] for level in fast.values()] if i >= first else []
            x = cms.apply(config.cms, block["cms"], matrices, x)
        return head(config, weights, x), after

    return learn_in_context(config.cms, [block["cms"] for block in blocks[first:]], forward, mixers, rules, tokens, learn)
