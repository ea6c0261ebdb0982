"""Converted Llamas: logits of an independent forward pass, frozen or with levels whose rates are 0; files that are none."""

import dataclasses
import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from nested_jax.cms.in_context import fast_weights
from nested_jax.errors import UserError
from nested_jax.models import reference
from nested_jax.models.convert import Llama, convert, read_llama
from nested_jax.models.language_model import apply, init_state

V, D, L, H, KV, F, BASE, EPSILON = 37, 24, 3, 6, 2, 20, 5_000.0, 1e-3
K = D // H


def named(tied, seed=0, biased=False):
    """Weights by name, with outputs that are small beside epsilon, so that it matters."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: (rng.normal(size=shape) * shape[-1] ** -0.5).astype(np.float32)
    weights = {"model.embed_tokens.weight": 0.05 * draw(V, D), "model.norm.weight": 1 + draw(D)}
    for i in range(L):
        at = f"model.layers.{i}"
        for name, shape in (("q", (D, D)), ("k", (KV * K, D)), ("v", (KV * K, D)), ("o", (D, D))):
            weights[f"{at}.self_attn.{name}_proj.weight"] = draw(*shape)
        for name, shape in (("up", (F, D)), ("gate", (F, D)), ("down", (D, F))):
            weights[f"{at}.mlp.{name}_proj.weight"] = draw(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}.{name}.weight"] = 1 + draw(D)
        if biased:
            for name, n in zip("qkv", (D, KV * K, KV * K), strict=True):
                weights[f"{at}.self_attn.{name}_proj.bias"] = 3 * draw(n)
    return weights if tied else weights | {"lm_head.weight": draw(V, D)}


def llama(tied=True, biased=False):
    weights = named(tied, biased=biased)
    return Llama(V, D, L, H, KV, F, BASE, EPSILON, tied, weights.__getitem__, biased)


WAYS = {
    "frozen": dict(),
    "dealt": dict(periods=(8, 4)),
    "split": dict(periods=(8, 4)),
    "split, one frozen": dict(periods=(4,), hidden=(15, 5)),
    "deltas": dict(periods=(8, 4), hidden=(3, 2), blocks=2),
}
TOKENS = np.random.default_rng(1).integers(V, size=19)


def read(config, weights):
    return jax.jit(lambda: apply(config, weights, TOKENS[None], init_state(config, weights, 1))[0][0])()


@pytest.mark.parametrize(("tied", "biased"), [(True, False), (False, True)])
@pytest.mark.parametrize("way", WAYS)
def test_logits_are_those_of_the_source(way, tied, biased):
    source, name = llama(tied, biased), way.partition(",")[0]
    config, weights = convert(source, name, **WAYS[way])
    np.testing.assert_allclose(read(config, weights), reference.llama(source, TOKENS), rtol=1e-4, atol=1e-5)
    if name != "frozen":  # and not with rates
        config, weights = convert(source, name, **WAYS[way], rates=(3.0,))
        assert np.abs(read(config, weights) - reference.llama(source, TOKENS)).max() > 1e-3


def saved(path, changes=None, dtype=np.float32, biased=False, **extra):
    """A folder with a model in two files."""
    weights = {name: w.astype(dtype) for name, w in (named(True, biased=biased) | extra).items()}
    about = dict(model_type="llama", vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=H)
    about |= dict(num_key_value_heads=KV, intermediate_size=F, rope_theta=BASE, rms_norm_eps=EPSILON) | (changes or {})
    names = sorted(weights)
    save_file({name: weights[name] for name in names[::2]}, path / "model-1.safetensors")
    save_file({name: weights[name] for name in names[1::2]}, path / "model-2.safetensors")
    (path / "config.json").write_text(json.dumps(about))
    return path


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_folder_is_read(tmp_path, dtype):
    source = read_llama(saved(tmp_path, dtype=dtype))
    assert dataclasses.astuple(source)[:9] == (V, D, L, H, KV, F, BASE, EPSILON, True)
    for name, w in named(True).items():
        np.testing.assert_array_equal(source.get(name), w.astype(dtype).astype(np.float32))


def test_biases_of_queries_keys_and_values_are_read(tmp_path):
    """From a folder and from GGUF, where Qwen2's pairs lie as in the folder and a Llama's are neighbours."""
    for source in (
        read_llama(saved(tmp_path, {"model_type": "qwen2"}, biased=True)),
        read_llama(written(tmp_path / "a.gguf", kind="qwen2", biased=True)),
        read_llama(written(tmp_path / "b.gguf", biased=True)),
    ):
        assert source.biased
        for name, w in named(True, biased=True).items():
            kept = np.float16 if "up" in name and not source.tied else np.float32
            np.testing.assert_array_equal(source.get(name), w.astype(kept))
    (weights := named(True, biased=True)).pop("model.layers.1.self_attn.k_proj.bias")
    with pytest.raises(UserError, match="the model has no model.layers.1.self_attn.k_proj.bias"):
        convert(dataclasses.replace(llama(biased=True), get=weights.__getitem__))


@pytest.mark.slow
def test_dealt_layers_learn_at_their_level_alone():
    """Layers 0 and 2 are of the slow level, 1 of the fast one; in each, what the other level has stays zero."""
    config, weights = convert(llama(), "dealt", periods=(16, 8), rates=(1.0,))
    start = init_state(config, weights, 1)
    for read_so_far, expected in ((12, [[0, 0, 0], [0, 1, 0]]), (18, [[1, 0, 1], [0, 1, 0]])):
        state = apply(config, weights, TOKENS[None, :read_so_far], start)[1]
        levels = (fast_weights(each.learning.levels) for each in (state, start))
        for now, before, changed in zip(*levels, expected, strict=True):
            for name, w in now.matrices.items():
                assert [int((w[i] != before.matrices[name][i]).any()) for i in range(L)] == changed, name


def test_each_level_has_its_rate():
    blocks = convert(llama(), "deltas", periods=(16, 8), rates=(0.5, 0.25))[1]["blocks"]["cms"]
    assert [np.unique(blocks[f"level{n}"]["rate"]).tolist() for n in (2, 3)] == [[0.5], [0.25]] and "rate" not in blocks[
        "level1"
    ]


def written(path, fields=None, kind="llama", biased=False, **extra):
    """The model as a GGUF file; of a Llama the two numbers that a position turns are neighbours there."""
    writer = gguf.GGUFWriter(path, kind)
    writer.add_embedding_length(D)
    writer.add_block_count(L)
    writer.add_feed_forward_length(F)
    writer.add_head_count(H)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_freq_base(BASE)
    writer.add_token_list([str(i) for i in range(V)])
    for name, value in (fields or {}).items():
        writer.add_string(name, value)
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = dict(q_proj="attn_q", k_proj="attn_k", v_proj="attn_v", o_proj="attn_output", up_proj="ffn_up")
    parts |= dict(gate_proj="ffn_gate", down_proj="ffn_down")
    parts |= dict(input_layernorm="attn_norm", post_attention_layernorm="ffn_norm")
    for name, w in (named(False, biased=biased) | extra).items():
        stem, _, ending = name.rpartition(".") if "." in name else (name, "", "weight")
        part = stem.split(".")[-1]
        if part in ("q_proj", "k_proj") and kind == "llama":
            w = np.concatenate([w[at + np.ravel([range(K // 2), range(K // 2, K)], "F")] for at in range(0, len(w), K)])
        kept = w.astype(np.float16) if part == "up_proj" else w
        place = whole.get(stem) or (f"blk.{stem.split('.')[2]}.{parts[part]}" if "." in stem else stem)
        writer.add_tensor(f"{place}.{ending}", kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_read(tmp_path):
    source = read_llama(written(tmp_path / "a.gguf"))
    assert dataclasses.astuple(source)[:7] == (V, D, L, H, KV, F, BASE) and not source.tied
    for name, w in named(False).items():
        np.testing.assert_array_equal(source.get(name), w.astype(np.float16 if "up_proj" in name else np.float32))
    expected = reference.llama(llama(False), TOKENS)
    np.testing.assert_allclose(read(*convert(source)), expected, rtol=3e-3, atol=1e-3)  # one of its matrices is float16
    with pytest.raises(UserError, match="scales its positions"):
        read_llama(written(tmp_path / "b.gguf", {"llama.rope.scaling.type": "linear"}))
    with pytest.raises(UserError, match="has rope_freqs.weight, which models here have not"):
        read_llama(written(tmp_path / "c.gguf", rope_freqs=np.ones(K // 2, np.float32)))


def test_what_cannot_be_converted_is_told(tmp_path):
    with pytest.raises(UserError, match="is no model: give a .gguf file, or a folder"):
        read_llama(tmp_path / "gone")
    with pytest.raises(UserError, match="has no config.json that can be read"):
        read_llama(tmp_path)
    for changes, message in (
        ({"model_type": "gpt2"}, "is of type 'gpt2': give a model of the Llama family"),
        ({"head_dim": 8}, "has heads of 8, 6 of them, and width 24"),
        ({"vocab_size": None}, "config.json has no vocab_size"),
        ({"num_key_value_heads": 4}, "has 6 heads and 4 of keys"),
        ({"rope_scaling": {"type": "linear"}}, "scales its positions"),
        ({"rope_parameters": {"rope_theta": BASE, "rope_type": "llama3"}}, "scales its positions"),
        ({"rope_parameters": {"rope_theta": BASE, "partial_rotary_factor": 0.5}}, "scales its positions"),
        ({"rope_parameters": [1]}, "has rope_parameters .*: give a model's folder as it was"),
        ({"hidden_act": "gelu"}, "has MLPs with gelu: give a model with silu"),
    ):
        with pytest.raises(UserError, match=message):
            read_llama(saved(tmp_path, changes))
    with pytest.raises(UserError, match="has model.layers.0.self_attn.o_proj.bias, which models here have not"):
        read_llama(saved(tmp_path, **{"model.layers.0.self_attn.o_proj.bias": np.zeros(D)}))
    with pytest.raises(UserError, match="embed_tokens.weight is float32\\[37, 24\\], not \\[38, 24\\] as its config says"):
        convert(read_llama(saved(tmp_path, {"vocab_size": V + 1})))
    (saved(tmp_path) / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match="the model has no model.*weight: give all of its files"):
        convert(read_llama(tmp_path))
    file = tmp_path / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="model-1.safetensors is damaged"):
        read_llama(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="has no config.json that can be read"):
        read_llama(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(UserError, match="a.gguf is (damaged|of architecture)"):
        read_llama(tmp_path / "a.gguf")
    for arguments, message in (
        (("merged",), "way 'merged' is unknown: give one of frozen, dealt, split, deltas"),
        (("split",), "levels that learn need periods"),
        (("split", dict(periods=(8, 4), hidden=(10, 9))), "give widths that sum to 20"),
        (("deltas", dict(periods=(8, 4), hidden=(3,))), "give one for each of the 2 periods"),
        (("frozen", dict(periods=(8,))), "a frozen CMS has none"),
        (("split", dict(periods=(8, 4), rates=(0.1, 0.2, 0.3))), "give a tuple of one, or one for each of the 2 periods"),
        (("split", dict(periods=(8, 4), rates=0.1)), "rates 0.1: give a tuple"),
        (("split", dict(periods=(8, 4), rates=(-0.1,))), "model.cms.rate -0.1: give a finite number of at least 0"),
        (("frozen", dict(rates=())), "give a tuple of one, or one for each of the 0 periods"),
        (("frozen", dict(hidden=(F,))), "as wide as the MLPs, leave it out"),
    ):
        with pytest.raises(UserError, match=message):
            convert(llama(), arguments[0], **(arguments[1] if arguments[1:] else {}))
    with pytest.raises(UserError, match="source 3: give what read_llama gives"):
        convert(3)
