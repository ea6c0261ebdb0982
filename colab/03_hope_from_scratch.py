# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/nested-jax/nested_jax/blob/main/colab/03_hope_from_scratch.ipynb)

# %%
# Installs nested_jax where it is missing. A new enough jax stays as it is; an older one is upgraded with its plugin.
import sys
from importlib.metadata import distributions, version
from importlib.util import find_spec

from packaging.version import Version

if find_spec("nested_jax") is None:
    installed = {d.name.lower().replace("_", "-"): d.version for d in distributions() if d.name}
    plugins = {"jax-cuda12-plugin": "cuda12", "jax-cuda13-plugin": "cuda13", "libtpu": "tpu"}
    extras = ",".join(extra for name, extra in plugins.items() if name in installed)
    old = Version(installed.get("jax", "0")) < Version("0.10.2")
    needed = f"jax[{extras}]>=0.10.2" if old else f"jax=={installed['jax']}"
    # %pip install -q "{needed}" git+https://github.com/nested-jax/nested_jax
    if old and "jax" in sys.modules:
        raise SystemExit("An older jax is still loaded. Runtime > Restart session, then run this cell again.")

import jax

device = jax.devices()[0]
versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax", "nested_jax"))
print(f"{device.platform} device {device.device_kind}: {versions}")

# %% [markdown]
# # Hope from scratch
#
# Hope ([arXiv 2512.24695](https://arxiv.org/abs/2512.24695)) is a language model whose blocks hold two things that learn
# while the model reads:
#
# - **self-modifying Titans**: deep memories that hold what was read, with memories beside them that make its keys, values,
#   rates and retention;
# - a **Continuum Memory System (CMS)**: MLPs in a chain, each with a period of its own. At the end of its period a level
#   takes a gradient step on the next-token loss of what it has just read.
#
# Training is the slowest level. It learns where all these states start, and differentiates through their updates.
#
# This notebook builds a small Hope, trains it for a minute on the text that every Python carries, and measures what it
# learns in context.

# %%
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from nested_jax import LanguageModel, preset
from nested_jax.data import ByteTokenizer, open_documents, train_batches

# %% [markdown]
# ## The model
#
# A preset is a frozen dataclass. This one starts from `tiny-hope` and gets smaller, with CMS periods short enough to see
# many updates in a window of 256 bytes. The CMS of the last block learns in context.

# %%
WINDOW, BATCH, STEPS = 256, 4, 60

tokenizer = ByteTokenizer()
config = preset("tiny-hope")
config = replace(
    config,
    vocabulary=tokenizer.vocabulary,
    width=64,
    layers=2,
    heads=2,
    chunk=32,
    cms=replace(config.cms, hidden=(128, 128), periods=(64, 32), blocks=1),
)
model = LanguageModel(config, rngs=nnx.Rngs(0))
print(f"{model.parameters:,} parameters; documents start on multiples of {config.alignment} bytes")

# %% [markdown]
# A call is `(tokens (B, T), state) -> (logits (B, T, V), state)`. The state is a value: a call changes nothing inside the
# model, and a text can be read in any split. `jax.eval_shape` tells the shapes without computing anything.

# %%
state = jax.eval_shape(lambda: model.init_state(1))
logits, _ = jax.eval_shape(model, jax.ShapeDtypeStruct((1, WINDOW), jnp.int32), state)
size = sum(leaf.size for leaf in jax.tree.leaves(state))
print(f"logits {logits.shape}; a sequence has {size:,} numbers of fast state, however long it gets")

# %% [markdown]
# ## Data
#
# The standard library's help topics and modules, split by file into train and held-out, as bytes. A window packs documents;
# `reset` marks where one starts, and `weights` is 0 in the empty slots before it.

# %%
batches = train_batches(
    open_documents("stdlib", "train"), tokenizer, window=WINDOW, batch_size=BATCH, alignment=config.alignment, seed=0
)
batch = next(batches)
print({name: (array.shape, str(array.dtype)) for name, array in batch._asdict().items()})
print(tokenizer.decode(batch.tokens[0])[:120])

# %% [markdown]
# ## Training
#
# `nnx.split` takes the slow weights out of the module and `nnx.merge` puts them back, so that plain JAX transforms apply.
# `init_state` is called inside the loss: the starts of the memories get gradients too.

# %%
graph, weights = nnx.split(model, nnx.Param)
rule = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optax.warmup_cosine_decay_schedule(1e-3, 1e-2, 10, STEPS, 1e-3), b2=0.95),
)


def loss(weights, batch):
    model = nnx.merge(graph, weights)
    logits, _ = model(batch.tokens, model.init_state(BATCH), reset=batch.reset)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return (nats * batch.weights).sum() / batch.weights.sum() / math.log(2)


@jax.jit
def update(weights, memory, batch):
    value, gradient = jax.value_and_grad(loss)(weights, batch)
    updates, memory = rule.update(gradient, memory, weights)
    return optax.apply_updates(weights, updates), memory, value


memory, losses, trained = rule.init(weights), [], []
for _ in range(STEPS):
    batch = next(batches)
    weights, memory, value = update(weights, memory, batch)
    losses.append(float(value))
    trained.append(batch.targets[batch.weights > 0])
print(f"bits per byte: {losses[0]:.2f} at first, {np.mean(losses[-10:]):.2f} over the last 10 steps")

# %%
fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.plot(np.arange(1, STEPS + 1), losses)
ax.set(xlabel="step", ylabel="bits per byte", title=f"training, {BATCH} windows of {WINDOW} bytes a step")
plt.show()

# %% [markdown]
# ## Reading is learning
#
# The model reads held-out passages of 256 bytes twice in a row. The second pass is easier as far as the first one
# was learned. For comparison, it reads them once after the 256 bytes that come before them. Three readers, with the same
# slow weights but for the inner learning rates of the CMS:
#
# - as learned. They started at 0.1 and are trained with everything else;
# - zero: only the memories of the sequence layers learn;
# - ten times those learned.

# %%
PASSAGE = 256
texts = [tokenizer.encode(text) for text in open_documents("stdlib", "heldout") if len(text) > 2 * PASSAGE]
before, passages = np.stack([text[: 2 * PASSAGE].reshape(2, PASSAGE) for text in texts[:24]], axis=1)
start = np.full((len(passages), 1), tokenizer.boundary, np.int32)
twice = np.concatenate([start, passages, passages], axis=1)
once = np.concatenate([start, before, passages], axis=1)


@jax.jit
def bits(weights, tokens):
    """Bits of each byte (T,), mean over the passages."""
    model = nnx.merge(graph, weights)
    logits, _ = model(tokens[:, :-1], model.init_state(len(tokens)))
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(axis=0) / math.log(2)


def scale_rates(weights, factor):
    """The weights with the CMS's inner learning rates multiplied."""
    weights = nnx.to_pure_dict(weights)
    for level in weights["blocks"]["cms"].values():
        if "rate" in level:
            level["rate"] = factor * level["rate"]
    return nnx.State(weights)


for name, level in nnx.to_pure_dict(weights)["blocks"]["cms"].items():
    print(f"{name}: learned rate in the last block {level['rate'][-1]:.3f}")
factors = {"rates zero": 0.0, "rates as learned": 1.0, "ten times the rates": 10.0}
read = {name: np.asarray(bits(scale_rates(weights, factor), twice)) for name, factor in factors.items()}
print(f"{'bits per byte of a passage':<27}{'first pass':>12}{'after its text':>16}{'second pass':>13}")
for name, factor in factors.items():
    first, second = read[name].reshape(2, PASSAGE).mean(axis=1)
    after = bits(scale_rates(weights, factor), once)[PASSAGE:].mean()
    print(f"{name:<27}{first:>12.3f}{after:>16.3f}{second:>13.3f}")

# %%
fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
BIN = 32
for name, values in read.items():
    ax.stairs(values.reshape(-1, BIN).mean(axis=1), np.arange(0, 2 * PASSAGE + 1, BIN), baseline=None, label=name)
ax.axvline(PASSAGE, color="0.6", linestyle=":", linewidth=1)
ax.text(PASSAGE + 5, 0.97, "second pass", transform=ax.get_xaxis_transform(), va="top", color="0.4", fontsize=8)
ax.set(xlabel="bytes read", ylabel="bits per byte", title=f"{PASSAGE} bytes read twice, mean of {len(passages)} texts")
fig.legend(fontsize=8, loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# With rates of zero the second pass is hardly easier than the first: after so little training, the memories of the
# sequence layers do not keep a passage. What the CMS adds grows with its rates. It shows in the first pass already, as the
# levels step every 32 and 64 bytes. The middle column is what 256 bytes of the same text teach about the passage; what the
# second pass gains beyond it was learned from the passage itself.

# %% [markdown]
# Why do the passages start at 4.7 bits per byte, when training ended at 3.3? The next table compares them with other parts
# of the same files, each read with no text before it. `spaces` is the share of spaces, and `counts` the bits per byte of a
# code made from the byte counts of the training text alone.

# %%
counts = np.bincount(np.concatenate(trained), minlength=tokenizer.vocabulary) + 1
known = -np.log2(counts / counts.sum())
middles = np.stack([text[(len(text) - PASSAGE) // 2 :][:PASSAGE] for text in texts[:24]])
parts = {
    "training, last 10 steps": (np.concatenate(trained[-10:]), np.array(losses[-10:])),
    "held out, bytes 0 to 255": (before, bits(weights, once)[:PASSAGE]),
    "held out, bytes 256 to 511": (passages, read["rates as learned"][:PASSAGE]),
    "held out, middle of the file": (middles, bits(weights, np.concatenate([start, middles, middles], axis=1))[:PASSAGE]),
}
print(f"training read {sum(map(len, trained)):,} of {sum(map(len, open_documents('stdlib'))):,} bytes")
print(f"{'bits per byte':<30}{'spaces':>8}{'counts':>8}{'model':>8}")
for name, (text, model_bits) in parts.items():
    print(f"{name:<30}{np.mean(text == ord(' ')):>8.0%}{known[text].mean():>8.2f}{model_bits.mean():>8.2f}")

# %% [markdown]
# The passages are bytes 256 to 511 of a file. They are harder than most of what training read: half as many spaces, and one
# bit more by the byte counts alone. The middle of a file is mostly indented code, as the windows of training are, and
# starts at 3.9 bits. Text before a passage is not what is missing, as it saves only 0.05 bits (the row "as learned" above).

# %% [markdown]
# ## Writing
#
# Generation is the same call, one byte at a time, the state carried by `lax.scan`. After a minute of training the model
# knows the look of the text and little more; `nested-jax train` trains a larger one on the same bytes.

# %%
prompt = np.concatenate([[tokenizer.boundary], tokenizer.encode("    def __init__(self, ")]).astype(np.int32)


@jax.jit
def generate(weights, keys):
    model = nnx.merge(graph, weights)
    logits, state = model(prompt[None], model.init_state(1))

    def write(carry, key):
        state, logits = carry
        byte = jax.random.categorical(key, logits / 0.8)
        logits, state = model(byte[None, None], state)
        return (state, logits[0, -1]), byte

    carry = (jax.tree.map(jnp.asarray, state), logits[0, -1])
    return jax.lax.scan(write, carry, keys)[1]


written = generate(weights, jax.random.split(jax.random.key(0), 300))
print(tokenizer.decode(prompt[1:]) + tokenizer.decode(np.asarray(written)))
