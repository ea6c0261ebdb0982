"""A small Llama in a folder as they are published: config.json, safetensors, tokenizer.json, a template of chats."""

import json

import numpy as np
import tokenizers
from safetensors.numpy import save_file

V, D, L, H, KV, F = 300, 16, 2, 4, 2, 12


def write(folder):
    """Random weights, and a tokenizer of bytes and their pairs."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    draw = lambda *shape: (rng.normal(size=shape) * shape[-1] ** -0.5).astype(np.float32)
    weights = {"model.embed_tokens.weight": draw(V, D), "model.norm.weight": 1 + draw(D)}
    for i in range(L):
        at, narrow = f"model.layers.{i}", KV * D // H
        for name, rows in (("q", D), ("k", narrow), ("v", narrow), ("o", D)):
            weights[f"{at}.self_attn.{name}_proj.weight"] = draw(rows, D)
        for name, shape in (("up", (F, D)), ("gate", (F, D)), ("down", (D, F))):
            weights[f"{at}.mlp.{name}_proj.weight"] = draw(*shape)
        weights |= {f"{at}.{name}.weight": 1 + draw(D) for name in ("input_layernorm", "post_attention_layernorm")}
    save_file(weights, folder / "model.safetensors")
    about = dict(model_type="llama", vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=H)
    about |= dict(num_key_value_heads=KV, intermediate_size=F, rope_theta=1e4, rms_norm_eps=1e-5)
    (folder / "config.json").write_text(json.dumps(about))
    pairs = tokenizers.Tokenizer(tokenizers.models.BPE())
    pairs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    pairs.train_from_iterator(["to be, or not to be"] * 9, trainer)
    (folder / "tokenizer.json").write_text(pairs.to_str())
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[answer]"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder
