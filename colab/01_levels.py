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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/nested-jax/nested_jax/blob/main/colab/01_levels.ipynb)

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
# # Levels: the paradigm by hand
#
# Nested Learning ([arXiv 2512.24695](https://arxiv.org/abs/2512.24695)) describes a learning system as a set of
# **levels**. Each level compresses a context flow of its own into a state, and each has a frequency at which that state
# changes. Attention memories, momentum and the training loop are all levels.
#
# In `nested_jax` a level is a pair of pure functions and a number:
#
# | | |
# |---|---|
# | `init(slower) -> state` | where the state starts |
# | `step(state, context, slower) -> (state, emitted)` | one update from the context of one period |
# | `period` | tokens between two updates; the frequency is 1 / period |
#
# `slower` is the tuple of the slower levels' states, nearest first, read-only. `run` lets a level read a stream.
# `nest(fast, slow)` runs the fast level inside one step of the slow one; what the fast one emits is the slow one's context.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from nested_jax import Level, nest, run

# %% [markdown]
# ## 1. A linear associative memory
#
# The memory is a matrix $M$ that maps keys to values. Its objective on a token is $\tfrac12\|M k_t - v_t\|^2$, and its
# rule is one step of gradient descent per token, the delta rule:
#
# $$M_t = M_{t-1} - \eta\,(M_{t-1} k_t - v_t)\,k_t^\top$$
#
# The context of a step has a leading axis, the tokens of one period (here one token).

# %%
KEY, VALUE = 8, 8


def objective(M, tokens):
    k, v = tokens
    return 0.5 * ((k @ M.T - v) ** 2).sum()


def delta_step(M, tokens, slower, rate=0.5):
    surprise, gradient = jax.value_and_grad(objective)(M, tokens)
    return M - rate * gradient, surprise


memory = Level(lambda slower: jnp.zeros((VALUE, KEY)), delta_step, period=1, name="memory")

rng = np.random.default_rng(0)
truth = rng.normal(size=(VALUE, KEY)).astype(np.float32)
keys = rng.normal(size=(128, KEY)).astype(np.float32)
keys /= np.linalg.norm(keys, axis=1, keepdims=True)
stream = (jnp.asarray(keys), jnp.asarray(keys @ truth.T))

M, surprise = run(memory, None, stream)
print(f"surprise over the first 8 tokens {surprise[:8].mean():.3f}, over the last 8 {surprise[-8:].mean():.6f}")
print(f"largest difference between M and the map behind the stream: {jnp.abs(M - truth).max():.4f}")

# %% [markdown]
# ## 2. Momentum is a level
#
# Gradient descent with momentum has two states. The momentum $S$ compresses the stream of gradients; the weights $M$
# compress what the momentum emits:
#
# $$S_t = \theta\,S_{t-1} + \nabla_t \qquad M_t = M_{t-1} - \eta\,S_t$$
#
# So it is two nested levels. The inner one sees the weights as its `slower[0]`, takes the gradient there and emits the new
# momentum; the outer one applies it. Both have period 1 here. The result is that of `optax.sgd(momentum=...)`.


# %%
def momentum_step(S, tokens, slower, decay=0.8):
    surprise, gradient = jax.value_and_grad(objective)(slower[0], tokens)
    S = decay * S + gradient
    return S, (S, surprise)


def weights_step(M, emitted, slower, rate=0.2):
    S, surprise = emitted  # stacked over the ticks of the faster level
    return M - rate * S.sum(axis=0), surprise


zeros = lambda slower: jnp.zeros((VALUE, KEY))
momentum = Level(zeros, momentum_step, period=1, name="momentum")
weights = Level(zeros, weights_step, period=1, name="weights")
state, surprise_momentum = run(nest(momentum, weights), None, stream)

rule = optax.sgd(0.2, momentum=0.8)
M, memory_of_gradients = jnp.zeros((VALUE, KEY)), rule.init(jnp.zeros((VALUE, KEY)))
for k, v in zip(*stream, strict=True):
    updates, memory_of_gradients = rule.update(jax.grad(objective)(M, (k[None], v[None])), memory_of_gradients)
    M = optax.apply_updates(M, updates)
print(f"largest difference between the nest and optax: {jnp.abs(state.slow - M).max():.1e}")

# %% [markdown]
# ## 3. Three frequencies
#
# Now the map behind the stream changes while it is read: a part that never changes, a part that is redrawn every 512
# tokens and a part that is redrawn every 64, observed with noise. Three levels with periods 4, 32 and 256 predict with
# the sum of their states. The fastest level computes the gradient of the prediction and emits it; each slower one sums the
# gradients of its period and takes a step of its own. The quicker a level, the quicker it also forgets (`retain`).

# %%
PERIODS = {"fast": 4, "middle": 32, "slow": 256}
RATES = {"fast": 0.3, "middle": 0.05, "slow": 0.012}
RETAIN = {"fast": 0.9, "middle": 0.95, "slow": 1.0}


def three_levels(names):
    """A nest of the named levels, fast to slow, whose states add up to the prediction."""

    def fastest(state, tokens, slower):
        k, v = tokens
        error = k @ (state + sum(slower)) - v
        gradient = error @ k
        name = names[0]
        return RETAIN[name] * state - RATES[name] * gradient, (gradient, error, (state, *slower))

    def slower_step(name):
        def step(state, emitted, slower):
            gradient, error, states = emitted
            gradient = gradient.sum(axis=0)
            return RETAIN[name] * state - RATES[name] * gradient, (gradient, error, states)

        return step

    start = lambda slower: jnp.zeros(KEY)
    level = Level(start, fastest, PERIODS[names[0]], names[0])
    for name in names[1:]:
        level = nest(level, Level(start, slower_step(name), PERIODS[name], name))
    return level


T = 4096
parts = [np.repeat(rng.normal(size=(T // every, KEY)), every, axis=0) for every in (T, 512, 64)]
target = (parts[0] + 0.7 * parts[1] + 0.5 * parts[2]).astype(np.float32)
k = rng.normal(size=(T, KEY)).astype(np.float32) / np.sqrt(KEY)
v = ((k * target).sum(axis=1) + 0.2 * rng.normal(size=T)).astype(np.float32)
stream = (jnp.asarray(k), jnp.asarray(v))

error = {}
for names in (["fast"], ["middle"], ["slow"], ["fast", "middle"], ["fast", "middle", "slow"]):
    state, (_, errors, states) = run(three_levels(names), None, stream)
    error[" + ".join(names)] = jnp.square(errors.reshape(-1)[T // 4 :]).mean()
for name, value in error.items():
    print(f"{name:<22} mean squared error after the first quarter {value:.3f}")

# %% [markdown]
# `states` are those of the last run, one row for each tick of the fastest level. The staircases are the levels'
# frequencies: a state is constant until its period ends. The first three panels show three of the eight coordinates.

# %%
fig, axes = plt.subplots(4, 1, figsize=(8, 6.5), sharex=True, layout="constrained")
ticks = np.arange(T // 4) * 4
for ax, (name, period), values in zip(axes, PERIODS.items(), states, strict=False):
    ax.step(ticks, values.reshape(-1, KEY)[:, :3], where="post", linewidth=1)
    ax.set_ylabel(name)
    ax.set_title(f"{name} level, period {period}", fontsize=9, loc="left")
total = sum(values.reshape(-1, KEY)[:, 0] for values in states)
axes[3].plot(target[:, 0], color="0.6", linewidth=1, label="map behind the stream")
axes[3].step(ticks, total, where="post", linewidth=1, label="sum of the levels")
axes[3].set_title("first coordinate", fontsize=9, loc="left")
axes[3].set_ylabel("sum")
axes[3].set_ylim(-2, 2.2)
axes[3].legend(fontsize=8, ncols=2, loc="upper right")
axes[3].set_xlabel("tokens read")
axes[0].set_xlim(0, T // 2)
plt.show()

# %% [markdown]
# ## 4. Learning how to learn
#
# A level's start and rate are knowledge too, and a slower level can learn them. `run` is a `lax.scan`, so a gradient goes
# through the whole inner loop.
#
# The tasks: maps that lie near one common map, each shown for 16 tokens. The *task* level reads one task: it
# runs the memory of section 1 from the slower level's start, at the slower level's rate, and emits the gradient of the
# memory's surprise with respect to both. The *outer* level sums the gradients of 8 tasks and gives them to Adam.

# %%
N, TASKS = 16, 8
common = rng.normal(size=(VALUE, KEY))
adam = optax.adam(0.05)


def read_task(knowledge, tokens):
    """Surprise at each token of one task."""
    rate = jnp.exp(knowledge["log_rate"])
    step = lambda M, tokens, slower: delta_step(M, tokens, slower, rate)
    return run(Level(lambda slower: knowledge["start"], step, period=1), None, tokens)[1]


def task_step(state, tokens, slower):
    knowledge, _ = slower[0]
    loss, gradient = jax.value_and_grad(lambda knowledge: read_task(knowledge, tokens).mean())(knowledge)
    return state, (gradient, loss)


def outer_init(slower):
    knowledge = {"start": jnp.zeros((VALUE, KEY)), "log_rate": jnp.log(0.1)}
    return knowledge, adam.init(knowledge)


def outer_step(state, emitted, slower):
    knowledge, optimizer = state
    gradients, losses = emitted
    gradient = jax.tree.map(lambda g: g.mean(axis=0), gradients)
    updates, optimizer = adam.update(gradient, optimizer)
    return (optax.apply_updates(knowledge, updates), optimizer), losses.mean()


def draw_tasks(count):
    maps = common + 0.3 * rng.normal(size=(count, VALUE, KEY))
    k = rng.normal(size=(count, N, KEY))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = np.einsum("cvk,cnk->cnv", maps, k)
    return jax.tree.map(lambda x: jnp.asarray(x.reshape(count * N, -1), jnp.float32), (k, v))


task = Level(lambda slower: (), task_step, period=N, name="task")
outer = Level(outer_init, outer_step, period=N * TASKS, name="outer")
state, losses = run(nest(task, outer), None, draw_tasks(200 * TASKS))
learned, _ = state.slow
print(f"outer loss: first {losses[0]:.3f}, last {losses[-1]:.3f}; learned rate {jnp.exp(learned['log_rate']):.3f}")
print(f"mean distance of the learned start to the common map: {jnp.abs(learned['start'] - common).mean():.3f}")

# %% [markdown]
# Both on new tasks: the first token's surprise shows the learned start, the slope shows the learned rate.
# The keys are unit vectors and the values carry no noise, so a rate of 1, which stores a pair exactly, is what is learned.

# %%
fresh = jax.tree.map(lambda x: x.reshape(256, N, -1), draw_tasks(256))
surprise = lambda knowledge: jax.vmap(lambda k, v: read_task(knowledge, (k, v)))(*fresh).mean(axis=0)
only_start = {**learned, "log_rate": jnp.log(0.1)}
only_rate = {**learned, "start": jnp.zeros((VALUE, KEY))}

fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
left.plot(losses)
left.set(xlabel="outer updates", ylabel="surprise, mean over a task", yscale="log", title="the outer level learns")
for label, knowledge in {
    "at the outset": outer_init(())[0],
    "rate learned": only_rate,
    "start learned": only_start,
    "both learned": learned,
}.items():
    right.plot(np.arange(1, N + 1), surprise(knowledge), label=label)
right.set(xlabel="token of a new task", ylabel="surprise", yscale="log", title="how the inner level learns")
right.legend(fontsize=8)
plt.show()

# %% [markdown]
# These are the pieces that the models are made of. A Hope block holds memories like that of section 1, whose starts,
# keys, values, rates and retention are learned by a slower level as in section 4, and a Continuum Memory System, MLP blocks
# at several frequencies as in section 3. [03_hope_from_scratch](03_hope_from_scratch.ipynb) trains one.
