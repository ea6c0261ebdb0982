"""Slow twins: of a model that learns in context, block after block inside `cms.reference`'s loop; of a Llama, in NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
import optax

from nested_jax import cms
from nested_jax.cms.reference import learn_in_context
from nested_jax.models.block import sequence_layer
from nested_jax.models.config import ModelConfig
from nested_jax.models.convert import Llama
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


def llama(source: Llama, tokens: Sequence[int]) -> Float[np.ndarray, "T V"]:
    """Logits of a Llama-family decoder by its definition, token after token and head after head, in float64."""
    H, KV, K = source.heads, source.kv_heads, source.width // source.heads
    matrix = lambda name, x: source.matrix(name).astype(float) @ x
    affine = lambda name, x: matrix(name, x) + (source.matrix(name, "bias") if source.biased else 0)
    norm = lambda name, x: x / np.sqrt(np.mean(x**2) + source.epsilon) * source.matrix(name)

    def turn(x, position):
        pairs, angle = x.reshape(-1, 2, K // 2), position * source.rotary_base ** (-2 * np.arange(K // 2) / K)
        a, b = pairs[:, 0], pairs[:, 1]
        return np.stack([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1).reshape(-1, K)

    keys, values = ([[] for _ in range(source.layers)] for _ in range(2))
    embedding, logits = source.matrix("model.embed_tokens"), []
    for position, token in enumerate(tokens):
        x = embedding[token].astype(float)
        for i in range(source.layers):
            at = f"model.layers.{i}"
            y = norm(f"{at}.input_layernorm", x)
            q, k, v = (affine(f"{at}.self_attn.{part}_proj", y) for part in "qkv")
            q = turn(q, position)
            keys[i].append(turn(k, position))
            values[i].append(v.reshape(KV, K))
            read = []
            for h in range(H):
                scores = np.array([k[h * KV // H] @ q[h] for k in keys[i]]) / np.sqrt(K)
                chances = np.exp(scores - scores.max())
                read.append(sum(p * v[h * KV // H] for p, v in zip(chances / chances.sum(), values[i], strict=True)))
            x = x + matrix(f"{at}.self_attn.o_proj", np.concatenate(read))
            y = norm(f"{at}.post_attention_layernorm", x)
            gate = matrix(f"{at}.mlp.gate_proj", y)
            x = x + matrix(f"{at}.mlp.down_proj", gate / (1 + np.exp(-gate)) * matrix(f"{at}.mlp.up_proj", y))
        logits.append(matrix("model.embed_tokens" if source.tied else "lm_head", norm("model.norm", x)))
    return np.stack(logits)
