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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/nested-jax/nested_jax/blob/main/colab/06_tpu_pod.ipynb)

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
# # From a laptop to a TPU pod
#
# A model that is too large or too slow for one device is laid on a mesh of many. The model's code does not change: a table
# says along which axis of the mesh each array is split, and XLA places the messages. This notebook simulates eight devices
# on a CPU, shows where each tensor lives and what devices send one another, and asks the TPUs' compiler what a step takes
# of chips that need not be there.
#
# It takes about two minutes on a CPU.

# %%
import dataclasses
from importlib.util import find_spec

import jax
import jax.numpy as jnp
from jax.extend.backend import clear_backends

clear_backends()  # the first cell has started JAX with the devices that there are
jax.config.update("jax_num_cpu_devices", 8)
devices = jax.devices("cpu")
print(len(devices), "devices:", *devices[:2], "...")

# %% [markdown]
# ## A mesh
#
# | axis | what is split along it |
# |---|---|
# | `data` | rows of a batch; each group holds all weights |
# | `fsdp` | rows too, and every weight; a weight is gathered where it is used |
# | `tensor` | heads, hidden units, the vocabulary |
# | `sequence` | tokens; a memory's state passes from each device to the next |
#
# `data` times `fsdp` divides the batch, `fsdp` the width, `tensor` the heads.

# %%
from nested_jax.parallel.mesh import MeshShape, make_mesh

shape = MeshShape(data=2, fsdp=2, tensor=2)
mesh = make_mesh(shape, devices)
print(mesh)

# %% [markdown]
# ## Where each tensor lives
#
# `parallel/rules.py` has one line for each kind of weight. The state is made where it belongs: no device ever holds it all.

# %%
from nested_jax import preset
from nested_jax.paths import path_name
from nested_jax.train.config import TrainConfig
from nested_jax.train.optimizer import optimizer
from nested_jax.train.state import init_train_state, places_of

model = preset("tiny-hope")
cms = dataclasses.replace(model.cms, hidden=(128, 128), periods=(64, 32))
model = dataclasses.replace(model, layers=2, chunk=16, cms=cms)
config = TrainConfig.from_preset("tiny-hope", model=model, batch_size=8, window=128)

shapes = jax.eval_shape(lambda: init_train_state(config))
places = places_of(mesh, shapes, config.batch_size)
with jax.set_mesh(mesh):
    state = jax.jit(lambda: init_train_state(config), out_shardings=places.state)()

for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
    print(f"{path_name(path):<32}{str(leaf.shape):<18}{leaf.sharding.spec}")

# %% [markdown]
# A matrix of the CMS, width by hidden units: `fsdp` splits its rows, `tensor` its columns, both groups of `data` hold it.

# %%
up = jax.jit(lambda w: w[0], out_shardings=jax.NamedSharding(mesh, jax.P("fsdp", "tensor")))(
    state.params["blocks"]["cms"]["level1"]["up"]
)
jax.debug.visualize_array_sharding(up)

# %% [markdown]
# A batch: rows lie along `fsdp` and `data`, so that every device of these axes reads its own text.

# %%
jax.debug.visualize_array_sharding(jax.device_put(jnp.zeros((8, 128), jnp.int32), places.batch))

# %%
of_one = lambda tree: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
of_all = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
for name in ("params", "optimizer"):
    tree = getattr(state, name)
    print(f"{name:<10} {of_all(tree):>10,} bytes, of which a device has {of_one(tree):>9,}")

# %% [markdown]
# ## A step
#
# The same function, on one device and on eight: the loss is the same, and no number but rounding changes.

# %%
import numpy as np

from nested_jax.data import Batch
from nested_jax.train.step import train_step

rng = np.random.default_rng(0)
tokens = rng.integers(model.vocabulary, size=(8, 129)).astype(np.int32)
batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((8, 128), np.float32), np.zeros((8, 128), bool))
update = train_step(model, optimizer(config))

with jax.default_device(devices[0]):
    alone = jax.jit(update)(jax.jit(lambda: init_train_state(config))(), batch)[1]
with jax.set_mesh(mesh):
    step = jax.jit(update, in_shardings=(places.state, places.batch), out_shardings=(places.state, None))
    compiled = step.lower(state, batch).compile()
    state, metrics = compiled(state, batch)
print(f"loss on one device {alone.loss:.6f}, on eight {metrics.loss:.6f}")

# %% [markdown]
# ## What devices send one another
#
# Read from the compiled program: what every device sends in a step, by kind and axis. Weights are gathered along `fsdp`, a
# block at a time, and their gradients summed; along `tensor` partial sums are added.

# %%
from nested_jax.parallel import hlo

program = hlo.parse(compiled.as_text())
for kind, axes, runs, sent in hlo.by_kind(hlo.collectives(program, shape))[:8]:
    print(f"{kind:<20} along {', '.join(axes):<14} {runs:>5} runs {sent:>12,} bytes")

# %% [markdown]
# ## A plan
#
# `nested-jax plan` compiles the real training step with the TPUs' own compiler, for chips that need not be there, and says
# what it takes of each: memory, operations, messages, cycles. On a command line:
#
#     pip install "nested-jax[tpu]"
#     nested-jax plan --preset 1.3b-hope --topology v5p:4x4x4 --mesh data=4,fsdp=16 --batch-size 64 --window 4096
#
# Here it is a small Transformer on four v5e; larger plans take minutes, and some are in `experiments/pods`.

# %%
from nested_jax.parallel.plan import plan, table

small = dataclasses.replace(preset("tiny-transformer"), layers=2)
config = TrainConfig.from_preset("tiny-transformer", model=small, batch_size=8, window=512, mesh="fsdp=2,tensor=2")
if find_spec("libtpu"):
    print(table(plan(config, "v5e:2x2")))
else:
    print('The plan needs the TPUs\' compiler: pip install "nested-jax[tpu]", then restart the session.')

# %% [markdown]
# ## On a pod
#
# The same command in every process trains across hosts; TPU pods and Slurm tell JAX which processes there are. Each reads
# its own rows, the first one prints, and a signal to any of them saves all at one step:
#
#     nested-jax train --preset 1.3b-hope --data c4/en --mesh data=4,fsdp=16 --batch-size 128 --window 4096 --run-dir HOPE
#
# Commands that start it on TPU slices and on GPUs by Slurm are in `experiments/pods`.
