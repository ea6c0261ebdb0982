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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/nested-jax/nested_jax/blob/main/colab/04_continual_learning.ipynb)

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
# # Learning on, and forgetting
#
# A Transformer that is to learn something new is trained on: its weights change, and what they held before is partly
# overwritten. Hope ([arXiv 2512.24695](https://arxiv.org/abs/2512.24695)) learns while it reads. Its weights stay as they
# are; memories and the levels of its Continuum Memory System (CMS) hold what is new, each at a speed of its own.
#
# This notebook trains a small Hope and a Transformer of equal size on Python's standard library, lets both meet the
# same text in another language, and then the first one again. It measures, after every few thousand bytes, what they know
# of either. It takes about four minutes on two CPU cores.

# %%
import dataclasses
import itertools
import string

import matplotlib.pyplot as plt
import numpy as np
import optax

from nested_jax import load, preset
from nested_jax.data import open_documents
from nested_jax.models.language_model import init_state, target_nats
from nested_jax.serve import Learner
from nested_jax.train.config import TrainConfig
from nested_jax.train.loop import train

# %% [markdown]
# ## Two languages
#
# The second language is a cipher: every letter stands for another one, the same all the time. It needs no download, it is as
# hard as the first one by its letters' counts, and nothing of its words is known before.

# %%
letters = string.ascii_lowercase
other = "".join(np.random.default_rng(0).permutation([*letters]))
CIPHER = bytes.maketrans((letters + letters.upper()).encode(), (other + other.upper()).encode())
tokens = lambda text: np.frombuffer(text, np.uint8).astype(np.int32)

documents, heldout = open_documents("stdlib", "train"), b"\n".join(open_documents("stdlib", "heldout")[:8])[: 2**13]
read = b"\n".join(documents[:60])[: 2**17]
tests = {"the first language": tokens(heldout), "the second language": tokens(heldout.translate(CIPHER))}
print(heldout[2000:2120].decode(), heldout[2000:2120].translate(CIPHER).decode(), sep="\n---\n")

# %% [markdown]
# ## Two models
#
# Hope's last block has a CMS of three levels. The first is frozen, the second takes a step every 256 bytes, the third every
# 64. Training differentiates through these steps, so that it learns where the levels start and how fast they learn.

# %%
sizes = {"vocabulary": 2**8, "width": 64, "layers": 2, "heads": 2}
hope, transformer = preset("tiny-hope"), preset("tiny-transformer")
models = {
    "Hope": dataclasses.replace(hope, **sizes, cms=dataclasses.replace(hope.cms, hidden=(64, 64, 64))),
    "Transformer": dataclasses.replace(transformer, **sizes, cms=dataclasses.replace(transformer.cms, hidden=(144,))),
}
trained = {}
for name, model in models.items():
    choices = {"steps": 200, "batch_size": 4, "eval_every": 0, "sample_tokens": 0, "reading_documents": 0, "log_every": 100}
    run = f"runs/continual/{name}"
    train(TrainConfig.from_preset("tiny-hope", model=model, tokenizer="bytes", run_dir=run, fresh=True, **choices))
    trained[name] = load(run)

# %% [markdown]
# ## Reading on
#
# Both meet 65,536 bytes of the second language, then 16,384 of the first again. Hope reads; the Transformer takes a step of
# Adam for every 512 bytes, at two learning rates. What either knows is measured on 8,192 bytes that it never learns from.

# %%
NEW, AGAIN, STEP = 2**16, 2**14, 512
stream = np.concatenate([tokens(read[:NEW].translate(CIPHER)), tokens(read[NEW : NEW + AGAIN])])
marks = [0, 1024, 2048, 4096, 8192, 16384, 32768, NEW, *(NEW + n for n in (1024, 2048, 4096, 8192, AGAIN))]
curves = {}


def bits(learner, text):
    """Bits per byte of a text that a copy of the learner reads, and that its CMS does not learn from."""
    logits = learner.copy().read(text, learn=False)
    return float(optax.softmax_cross_entropy_with_integer_labels(logits[:-1], text[1:]).mean() / np.log(2))


learner, curves["Hope"] = Learner(trained["Hope"]), []
levels = {}
for start, end in itertools.pairwise([0, *marks]):
    learner.read(stream[start:end])
    curves["Hope"].append([bits(learner, text) for text in tests.values()])
    if end == NEW:
        levels = {"all levels": learner.copy()} | {f"without {name}": learner.copy() for name in ("level2", "level3")}
        for name in ("level2", "level3"):
            levels[f"without {name}"].reset(name)

# %%
model = models["Transformer"]


@jax.jit
def nats(params, text):
    start = init_state(model, params, 1, max_length=STEP)
    return target_nats(model, params, text[None, :-1], text[None, 1:], start)[0].mean()


windows = lambda text: np.stack([text[i : i + STEP + 1] for i in range(0, len(text) - STEP, STEP)])
measured = lambda params: [
    float(np.mean([nats(params, one) for one in windows(text)]) / np.log(2)) for text in tests.values()
]


@jax.jit
def update(rate, params, state, text):
    updates, state = optax.adam(rate).update(jax.grad(nats)(params, text), state, params)
    return optax.apply_updates(params, updates), state


for rate in (1e-3, 3e-4):
    params, curve = trained["Transformer"].params, []
    state = optax.adam(rate).init(params)
    for start, end in itertools.pairwise([0, *marks]):
        for window in windows(np.append(stream[start:end], 0)) if end > start else ():
            params, state = update(rate, params, state, window)
        curve.append(measured(params))
    curves[f"Transformer, Adam at {rate:g}"] = curve

# %% [markdown]
# ## The curves

# %%
fig, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
for i, (language, axes) in enumerate(zip(tests, panels, strict=True)):
    for name, curve in curves.items():
        axes.plot(np.array(marks) / 1024, np.array(curve)[:, i], "o-", markersize=3, label=name)
    axes.axvspan(NEW / 1024, marks[-1] / 1024, color="0.9")
    axes.set(
        title=f"held-out text of {language}", xlabel="KiB read: the second language, then the first", ylabel="bits per byte"
    )
panels[0].legend(fontsize=8)
plt.show()

heads = ["before", "2 KiB of the second", "64 KiB of the second", "2 KiB of the first again", "16 KiB"]
at = [marks.index(n) for n in (0, 2048, NEW, NEW + 2048, NEW + AGAIN)]
for i, language in enumerate(tests):
    print(f"{language:<28}" + "".join(f"{head:>26}" for head in heads))
    for name, curve in curves.items():
        print(f"  {name:<26}" + "".join(f"{curve[n][i]:>26.2f}" for n in at))

# %% [markdown]
# - **Hope adapts in 1 to 2 KiB**: 5.5 to 4.1 bits of the second language, for which the Transformer needs 8 KiB at the
#   larger rate and 32 at the smaller. After 64 KiB the Transformer at the larger rate knows more of it.
# - **It forgets as fast**: the state that reads the second language expects it. At the end of it Hope has lost 1.4 bits of
#   the first language; the Transformer 1.3 at the rate that learned more, 0.7 at the other, which learned as much as Hope.
# - **It comes back as fast**: 2 KiB of the first language give back 1.1 of the 1.4 bits, where the Transformer still stands
#   at 3.5 and more; and then Hope, not the Transformer, has lost the second one.
# - One seed each, and a CMS of two learning levels in one of two blocks: what more levels and longer periods hold is for
#   `experiments/continual` to measure.
#
# ## Which level holds what, and how to forget at will
#
# A level can be set back to its start alone, and everything at once: the weights never changed. Here the fast level holds
# most of the second language, and most of what the first one lost.

# %%
fresh = Learner(trained["Hope"])
for name, one in [*levels.items(), ("everything set back", fresh)]:
    first, second = (bits(one, text) for text in tests.values())
    print(f"{name:<22} the first language {first:.2f}, the second {second:.2f} bits per byte")
print({name: round(norm, 1) for name, norm in learner.held.items()}, "is how far each level is from its start")
