"""Pretrained Llama-family Transformers as models of this library: attention is kept, MLPs become levels of a CMS (NL 7.3).

A Llama block is x <- x + attention(norm x), x <- x + MLP(norm x), with SwiGLU and rotary positions, as a block of
`hope-attention` is with one frozen level. What differs goes into the weights: heads that share keys and values get copies of
them, and all that is added to x is scaled by sqrt(1e-6 / epsilon), so that the norms' epsilon is that of this library.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.cms import CMSConfig
from nested_jax.errors import UserError, assert_choice, shown
from nested_jax.files import read_file
from nested_jax.models.config import ModelConfig
from nested_jax.numerics import EPSILON
from nested_jax.typing import PyTree

Way = Literal["frozen", "dealt", "split", "deltas"]


@dataclass(frozen=True)
class Llama:
    """A Llama-family decoder as a file has it.

    Args:
        vocabulary, width, layers, heads, kv_heads, hidden: sizes V, D, L, H, heads of keys and values, F.
        rotary_base: of the frequencies of positions.
        epsilon: of the RMS norms.
        tied: whether the head is the embedding.
        biased: whether queries, keys and values have biases, as in Qwen2.
        get: (name in the way of Hugging Face, such as "model.layers.0.mlp.up_proj.weight") -> its matrix (out, in), float32.
        about: what else the file says, such as its tokenizer.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    rotary_base: float
    epsilon: float
    tied: bool
    get: Callable[[str], np.ndarray]
    biased: bool = False
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    def matrix(self, name: str, kind: Literal["weight", "bias"] = "weight") -> np.ndarray:
        """`get(f"{name}.{kind}")`, of the shape that the sizes ask for. Raises UserError where it is none."""
        D, F, narrow = self.width, self.hidden, self.width // self.heads * self.kv_heads
        shapes = {"q_proj": (D, D), "k_proj": (narrow, D), "v_proj": (narrow, D), "o_proj": (D, D)}
        shapes |= {"up_proj": (F, D), "gate_proj": (F, D), "down_proj": (D, F)}
        shapes |= dict.fromkeys(("embed_tokens", "lm_head"), (self.vocabulary, D))
        try:
            found, wanted = self.get(f"{name}.{kind}"), shapes.get(name.rpartition(".")[2], (D,))
        except KeyError:
            raise UserError(f"the model has no {name}.{kind}: give all of its files") from None
        wanted = wanted if kind == "weight" else wanted[:1]
        if found.shape != wanted:
            raise UserError(
                f"{name}.{kind} is {shown(found)}, not {list(wanted)} as its config says: give the model as it was"
            )
        return found


def read_llama(path: str | Path) -> Llama:
    """A model of a GGUF file, or of a folder with config.json and safetensors.

    Args:
        path: of the file or folder. It may be anyone's: no code of it is run.

    Raises:
        UserError: it is neither, or a model of another architecture.
    """
    path = Path(path)
    if path.is_dir():
        return _of_folder(path)
    if path.suffix == ".gguf" and path.is_file():
        return _of_gguf(path)
    raise UserError(f"{path} is no model: give a .gguf file, or a folder with config.json and .safetensors files")


def convert(
    source: Llama,
    way: Way = "frozen",
    *,
    periods: tuple[int, ...] = (),
    hidden: tuple[int, ...] = (),
    blocks: int | None = None,
    rates: tuple[float, ...] = (0.0,),
    seed: int = 0,
) -> tuple[ModelConfig, PyTree]:
    """The model's config and weights here: with rates of 0 its logits are the source's.

    Args:
        source: of `read_llama`.
        way: how the MLPs become levels. "frozen": one level that does not learn. "dealt": that of layer i is level i mod n
            of the n, and the layer's others, of its width, are zeros that stay zeros. "split": their hidden units are
            shared out to the levels, whose sum they are (an independent CMS, Eq. 74). "deltas": they are kept, frozen, and
            each level is a further MLP after them whose output starts at zero.
        periods: tokens between two updates of each level that learns, slow to fast.
        hidden: widths of the levels, slow to fast. Of split ones their shares of the hidden units; if they are more than the
            periods, the first are frozen; (): equal shares. Of deltas one for each period; (): an eighth of the MLP's.
            Others have none.
        blocks: the last blocks, which learn; None: all.
        rates: start of the learning rates: one of all levels that learn, or one of each, slow to fast.
        seed: of the deltas' inputs.

    Returns:
        (config, weights), float32.

    Raises:
        UserError: a way, periods, widths and rates that do not fit one another or the source.

    Source: NL section 7.3, ad-hoc level stacking.
    """
    assert_choice("convert: way", way, get_args(Way))
    if not isinstance(source, Llama):
        raise UserError(f"convert: source {shown(source)}: give what read_llama gives")
    if bool(periods) != (way != "frozen"):
        raise UserError(f"convert: periods {periods} and way {way!r}: levels that learn need periods, a frozen CMS has none")
    F = source.hidden
    if way in ("frozen", "dealt"):
        if hidden:
            raise UserError(f"convert: hidden {hidden} and way {way!r}: its levels are as wide as the MLPs, leave it out")
        hidden = (F,) * max(len(periods), 1)
    elif way == "split":
        share = [F * i // len(periods) for i in range(len(periods) + 1)]
        hidden = hidden or tuple(b - a for a, b in zip(share, share[1:], strict=False))
        if sum(hidden) != F or len(hidden) < len(periods):
            raise UserError(f"convert: hidden {hidden} of split levels: give widths that sum to {F}, one or more a period")
    else:
        hidden = hidden or (max(1, F // 8),) * len(periods)
        if len(hidden) != len(periods):
            raise UserError(f"convert: hidden {hidden} of deltas: give one for each of the {len(periods)} periods")
        hidden = (F, *hidden)
    if not isinstance(rates, tuple) or not rates or len(rates) not in (1, len(periods)):
        raise UserError(f"convert: rates {rates}: give a tuple of one, or one for each of the {len(periods)} periods")
    variant = "independent" if way == "split" else "sequential"
    cms = CMSConfig(hidden, periods, variant, activation="swiglu", blocks=blocks if periods else None, rate=rates[0])
    config = ModelConfig(
        vocabulary=source.vocabulary,
        width=source.width,
        layers=source.layers,
        heads=source.heads,
        mixer="attention",
        rotary_base=source.rotary_base,
        attention_bias=source.biased,
        tie_embeddings=source.tied,
        cms=cms,
    )
    rates = rates * (len(periods) // len(rates))
    return config, _weights(source, way, cms, rates, np.random.default_rng(seed))


def _weights(source: Llama, way: Way, cms: CMSConfig, rates: Sequence[float], rng: np.random.Generator) -> PyTree:
    D, scale = source.width, math.sqrt(EPSILON / source.epsilon)

    def mlp(i: int, part: slice) -> dict[str, np.ndarray]:
        get = lambda name: source.matrix(f"model.layers.{i}.mlp.{name}_proj")
        return {"up": get("up")[part].T, "gate": get("gate")[part].T, "down": scale * get("down")[:, part].T}

    def delta(width: int) -> dict[str, np.ndarray]:
        draw = lambda: rng.normal(size=(D, width)) * D**-0.5
        return {"up": draw(), "gate": draw(), "down": np.zeros((width, D))}

    def block(i: int) -> dict[str, Any]:
        get = lambda name: source.matrix(f"model.layers.{i}.{name}")
        copies, K = source.heads // source.kv_heads, D // source.heads
        spread = lambda w: np.repeat(w.reshape(source.kv_heads, K, -1), copies, 0).reshape(D, -1)
        bias = lambda part: source.matrix(f"model.layers.{i}.self_attn.{part}_proj", "bias")
        norm, levels, begin = get("post_attention_layernorm"), {}, 0
        for n, width in enumerate(cms.hidden):
            if way == "dealt" and i % len(cms.hidden) != n:
                own = {"up": np.zeros((D, width)), "gate": np.zeros((D, width)), "down": np.zeros((width, D))}
            else:
                own = delta(width) if way == "deltas" and n else mlp(i, slice(begin, begin + width))
            begin += width if way != "dealt" else 0
            rate = {"rate": np.array(rates[n - cms.frozen])} if n >= cms.frozen else {}
            levels[f"level{n + 1}"] = own | {"norm": norm} | rate
        mixer = {
            "query": get("self_attn.q_proj").T,
            "key": spread(get("self_attn.k_proj")).T,
            "value": spread(get("self_attn.v_proj")).T,
            "out": scale * get("self_attn.o_proj").T,
        }
        if source.biased:
            mixer["bias"] = np.stack([bias("q"), spread(bias("k"))[:, 0], spread(bias("v"))[:, 0]])
        mix = {"mix": np.ones(len(cms.hidden))} if cms.variant == "independent" else {}
        return {"norm": get("input_layernorm"), "mixer": mixer, "cms": levels | mix}

    single = lambda leaf: jnp.asarray(leaf, jnp.float32)
    stack = lambda *leaves: single(np.stack(leaves))
    embedding, norm = source.matrix("model.embed_tokens"), source.matrix("model.norm")
    weights = {
        "embedding": single(scale * D**-0.5 * embedding),
        "blocks": jax.tree.map(stack, *map(block, range(source.layers))),
        "norm": single(norm * (D**0.5 / scale if source.tied else 1.0)),
    }
    return weights if source.tied else weights | {"head": single(source.matrix("lm_head").T)}


_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rms_norm_eps")


def _of_folder(path: Path) -> Llama:
    from safetensors import SafetensorError, safe_open

    try:
        about = json.loads(read_file(path / "config.json", 2**20))
        kind = about.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} has no config.json that can be read ({error}): give a model's folder") from None
    if kind not in ("llama", "mistral", "qwen2", "qwen3"):
        raise UserError(f"{path} is of type {kind!r}: give a model of the Llama family")
    where: dict[str, Path] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, "np") as tensors:
                where |= dict.fromkeys(tensors.keys(), file)
        except SafetensorError as error:
            raise UserError(f"{file} is damaged ({error}): give a copy that is whole") from None

    def get(name: str) -> np.ndarray:
        with safe_open(where[name], "flax") as tensors:  # bfloat16 too
            return np.asarray(tensors.get_tensor(name), np.float32)

    rope = about.get("rope_parameters") or {"rope_theta": about.get("rope_theta", 10_000.0)}
    if not isinstance(rope, dict):
        raise UserError(f"{path / 'config.json'} has rope_parameters {shown(rope)}: give a model's folder as it was")
    scaled = about.get("rope_scaling") or rope.get("rope_type", "default") != "default"
    scaled = scaled or any(each.get("partial_rotary_factor", 1) != 1 for each in (about, rope))
    if scaled or about.get("sliding_window") and about.get("use_sliding_window", True):
        raise UserError(f"{path} scales its positions or slides a window: give a model that does neither")
    if (activation := about.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise UserError(f"{path} has MLPs with {activation}: give a model with silu")
    buffers = {name for name in where if name.endswith("rotary_emb.inv_freq")}  # rotary_base says the same
    _assert_known(path, where.keys() - buffers, _GGUF_WHOLE, "model.layers.", _GGUF, "self_attn.[qkv]_proj")
    if missing := [name for name in _SIZES if not isinstance(about.get(name), int | float)]:
        raise UserError(f"{path / 'config.json'} has no {missing[0]}: give a model's folder")
    return _checked(
        path,
        Llama(
            vocabulary=about["vocab_size"],
            width=about["hidden_size"],
            layers=about["num_hidden_layers"],
            heads=about["num_attention_heads"],
            kv_heads=about.get("num_key_value_heads") or about["num_attention_heads"],
            hidden=about["intermediate_size"],
            rotary_base=float(rope.get("rope_theta", 10_000.0)),
            epsilon=float(about["rms_norm_eps"]),
            tied="lm_head.weight" not in where,
            get=get,
            biased="model.layers.0.self_attn.q_proj.bias" in where,
            about=about,
        ),
        about.get("head_dim") or about["hidden_size"] // about["num_attention_heads"],
    )


_GGUF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GGUF_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _of_gguf(path: Path) -> Llama:
    try:
        import gguf
    except ImportError:
        raise UserError(f'{path} needs gguf to be read: pip install "nested-jax[convert]"') from None
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # the library raises whatever its parsing meets
        raise UserError(f"{path} is damaged, or no GGUF file ({' '.join(str(error).split())[:80]}): give another") from None
    about = {name: each.contents() for name, each in reader.fields.items()}
    kind = about.get("general.architecture")
    if kind not in ("llama", "qwen2"):
        raise UserError(f"{path} is of architecture {kind!r}: give a model of architecture llama or qwen2")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    names = ("embedding_length", "block_count", "feed_forward_length", "attention.head_count", "attention.head_count_kv")
    names = (*(f"{kind}.{name}" for name in (*names, "attention.layer_norm_rms_epsilon")), "tokenizer.ggml.tokens")
    if missing := [name for name in names if name not in about]:
        raise UserError(f"{path} has no {missing[0]}: give a whole model")
    of = lambda name: about[f"{kind}.{name}"]
    if about.get(f"{kind}.rope.scaling.type", "none") != "none":
        raise UserError(f"{path} scales its positions: give a model that does not")
    _assert_known(path, tensors, _GGUF_WHOLE.values(), "blk.", _GGUF.values(), "attn_[qkv]")
    heads, kv_heads = of("attention.head_count"), of("attention.head_count_kv")

    def get(name: str) -> np.ndarray:
        stem, _, ending = name.rpartition(".")
        if stem.startswith("model.layers."):
            _, _, i, part = stem.split(".", 3)
            tensor = tensors[f"blk.{i}.{_GGUF[part]}.{ending}"]
        else:
            part, tensor = "", tensors[f"{_GGUF_WHOLE[stem]}.{ending}"]
        found = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if kind == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):  # pairs that are turned are neighbours
            each = heads if part == "self_attn.q_proj" else kv_heads
            found = found.reshape(each, -1, 2, *found.shape[1:]).swapaxes(1, 2).reshape(found.shape)
        return found

    return _checked(
        path,
        Llama(
            vocabulary=len(about["tokenizer.ggml.tokens"]),
            width=of("embedding_length"),
            layers=of("block_count"),
            heads=heads,
            kv_heads=kv_heads,
            hidden=of("feed_forward_length"),
            rotary_base=float(about.get(f"{kind}.rope.freq_base", 10_000.0)),
            epsilon=float(of("attention.layer_norm_rms_epsilon")),
            tied="output.weight" not in tensors,
            get=get,
            biased="blk.0.attn_q.bias" in tensors,
            about=about,
        ),
        about.get(f"{kind}.rope.dimension_count", of("embedding_length") // heads),
    )


def _assert_known(
    path: Path, names: Iterable[str], whole: Iterable[str], layer: str, parts: Iterable[str], biased: str
) -> None:
    """Whatever else a file has would change the logits."""
    of_layers = rf"{layer}\d+\.(({'|'.join(parts)})\.weight|{biased}\.bias)"
    known = re.compile(rf"({'|'.join(whole)})\.weight|{of_layers}")
    if wrong := [name for name in names if not known.fullmatch(name)]:
        raise UserError(f"{path} has {wrong[0]}, which models here have not: give a Llama, or a Qwen without norms of heads")


def _checked(path: Path, found: Llama, head_width: int) -> Llama:
    if found.heads < 1 or found.kv_heads < 1 or found.heads % found.kv_heads:
        raise UserError(
            f"{path} has {found.heads} heads and {found.kv_heads} of keys: give a model where these divide those"
        )
    if head_width * found.heads != found.width:
        raise UserError(
            f"{path} has heads of {head_width}, {found.heads} of them, and width {found.width}: they must fill it"
        )
    return found
