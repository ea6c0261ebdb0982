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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/nested-jax/nested_jax/blob/main/colab/05_meta_gradients.ipynb)

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
# # Gradients through inner loops
#
# A level that learns is a loop, and a slower level can learn how it learns: where it starts, how fast it goes, what it
# forgets. That takes derivatives through every update of the loop. This notebook shows them at work, and what they cost:
#
# - `maml` and `hypergradient` learn starts and rates,
# - `unroll` keeps few of a loop's states and computes the others again,
# - `mixflow_grad` differentiates an inner gradient forward over reverse.
#
# It takes about two minutes on a CPU.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

from nested_jax import run
from nested_jax.meta import descent, hypergradient, maml, mixflow_grad, unroll

# %% [markdown]
# ## A start from which one step is enough
#
# Model-agnostic meta-learning ([arXiv 1703.03400](https://arxiv.org/abs/1703.03400)): a task is a sine of unknown amplitude
# and phase, of which ten points are shown. The inner level takes one gradient step on these points. The outer level learns
# the start, so that after that step *other* points of the same sine are predicted well.

# %%
SHOTS, RATE, ITERATIONS = 10, 0.01, 8000


def draw_task(key):
    """((x, y) that are shown, (x, y) to predict), of shape (10, 1)."""
    keys = jax.random.split(key, 3)
    amplitude, phase = jax.random.uniform(keys[0], minval=0.1, maxval=5.0), jax.random.uniform(keys[1], maxval=jnp.pi)
    x = jax.random.uniform(keys[2], (2, SHOTS, 1), minval=-5.0, maxval=5.0)
    y = amplitude * jnp.sin(x - phase)
    return (x[0], y[0]), (x[1], y[1])


def draw_network(key, widths=(1, 40, 40, 1)):
    """Kernels and biases of an MLP."""
    shapes, keys = list(zip(widths, widths[1:], strict=False)), jax.random.split(key, len(widths) - 1)
    return [
        (jax.random.normal(key, shape) * shape[0] ** -0.5, jnp.zeros(shape[1]))
        for key, shape in zip(keys, shapes, strict=True)
    ]


def predict(network, x):
    for kernel, bias in network[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    return x @ network[-1][0] + network[-1][1]


def error(network, points):
    return jnp.mean((predict(network, points[0]) - points[1]) ** 2)


# %% [markdown]
# `maml` returns the adaptation as an ordinary function of the start and the task. What is done with it is up to the outer
# level; here Adam takes steps along the gradient, averaged over 25 tasks.

# %%
adapt = maml(error, optax.sgd(RATE), steps=1)
outer_rule = optax.adam(3e-3)


def outer_loss(start, key):
    shown, others = jax.vmap(draw_task)(jax.random.split(key, 25))
    return jax.vmap(lambda shown, others: error(adapt(start, shown), others))(shown, others).mean()


@jax.jit
def meta_train(start, keys):
    def iteration(carry, key):
        start, memory = carry
        loss, gradient = jax.value_and_grad(outer_loss)(start, key)
        updates, memory = outer_rule.update(gradient, memory)
        return (optax.apply_updates(start, updates), memory), loss

    (start, _), losses = jax.lax.scan(iteration, (start, outer_rule.init(start)), keys)
    return start, losses


random_start = draw_network(jax.random.key(0))
learned_start, losses = meta_train(random_start, jax.random.split(jax.random.key(1), ITERATIONS))
print(f"error after one step, first and last 500 iterations: {losses[:500].mean():.2f}, {losses[-500:].mean():.2f}")

# %% [markdown]
# New sines, and up to ten steps although one was trained for: the error on points that were not shown.

# %%
COUNTS = (0, 1, 2, 5, 10)


@jax.jit
def held_out(start):
    shown, others = jax.vmap(draw_task)(jax.random.split(jax.random.key(2), 600))
    after = lambda steps: jax.vmap(lambda shown, others: error(maml(error, optax.sgd(RATE), steps)(start, shown), others))(
        shown, others
    )
    return jnp.stack([after(steps).mean() for steps in COUNTS])


errors = {"learned start": held_out(learned_start), "random start": held_out(random_start)}
for name, of in errors.items():
    print(f"{name}: " + ", ".join(f"{e:.2f} after {n}" for n, e in zip(COUNTS, of, strict=True)))

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for name, of in errors.items():
    left.plot(COUNTS, of, "o-", label=name)
left.set(xlabel="inner gradient steps", ylabel="mean squared error", title="600 new sines")
left.legend(frameon=False)
(shown, others), x = draw_task(jax.random.key(5)), jnp.linspace(-5, 5, 200)[:, None]
for steps, style in ((0, ":"), (1, "--"), (10, "-")):
    network = maml(error, optax.sgd(RATE), steps)(learned_start, shown)
    right.plot(x[:, 0], predict(network, x)[:, 0], style, label=f"after {steps}")
right.plot(*shown, "k.", label="shown")
right.set(xlabel="x", ylabel="y", title="one of them, from the learned start")
right.legend(frameon=False)
plt.show()

# %% [markdown]
# ## A memory that starts with what all contexts share
#
# A memory reads pairs of keys and values one by one, and takes a gradient step on $\frac12\|Mk - v\|^2$ for each: the delta
# rule. `descent` makes it a level. The level above holds its start and its rate, and `hypergradient` says how these should
# change so that the last pairs are predicted before they are read.
#
# Every context has a map of its own, which differs from a common one.

# %%
D, PAIRS = 8, 16
common = jax.random.normal(jax.random.key(3), (D, D))


def draw_context(key):
    of_map, of_keys = jax.random.split(key)
    own = common + 0.3 * jax.random.normal(of_map, (D, D))
    keys = jax.random.normal(of_keys, (PAIRS, D))
    keys /= jnp.linalg.norm(keys, axis=1, keepdims=True)
    return keys, keys @ own.T


memory = descent(
    lambda M, pair, meta: jnp.sum((M @ pair[0] - pair[1]) ** 2) / 2,
    lambda meta: optax.sgd(jax.nn.sigmoid(meta["rate"])),
    start=lambda meta: meta["start"],
)
# What a level emits comes back stacked by steps: here the error at every pair, before the memory has learned from it.
of_context = hypergradient(lambda meta, state, emitted: emitted[PAIRS // 2 :].mean(), memory)
meta_rule = optax.adam(0.05)


@jax.jit
def improve(carry, key):
    meta, adam = carry
    found = jax.vmap(of_context, (None, 0))(meta, jax.vmap(draw_context)(jax.random.split(key, 16)))
    updates, adam = meta_rule.update(jax.tree.map(lambda g: g.mean(axis=0), found.gradient), adam)
    return (optax.apply_updates(meta, updates), adam), found.value.mean()


zero = {"start": jnp.zeros((D, D)), "rate": jnp.zeros(())}
(learned, _), values = jax.lax.scan(improve, (zero, meta_rule.init(zero)), jax.random.split(jax.random.key(4), 300))
print(f"learned rate {jax.nn.sigmoid(learned['rate']):.2f}")
distance = jnp.sqrt(jnp.mean((learned["start"] - common) ** 2))
print(f"distance of the learned start from the common map, per entry: {distance:.3f}")

contexts = jax.vmap(draw_context)(jax.random.split(jax.random.key(6), 200))
read = lambda meta: jax.vmap(lambda context: run(memory, None, context, slower=(meta,))[1])(contexts).mean(axis=0)
plt.figure(figsize=(5, 3.2), layout="constrained")
plt.plot(read(learned), label="learned start")
plt.plot(read(zero | {"rate": learned["rate"]}), label="zero, same rate")
plt.gca().set(xlabel="pairs read before", ylabel="error at the next pair", title="200 new contexts", ylim=(0, None))
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# The learned start is what the contexts have in common: no context said so, the gradient through its learning did.
#
# ## Three gradients of one settled loop
#
# A penalty's best strength: the inner level fits $(w - 1)^2/2 + \lambda w^2/2$ by 200 steps, the outer loss is
# $(w - 0.5)^2/2$. Where the loop has settled, its derivative is that of a linear system, and nothing of it has to be kept.

# %%
fit = descent(lambda w, x, penalty: ((w - x) ** 2 + penalty * w**2) / 2, optax.sgd(0.1), start=lambda meta: jnp.zeros(()))
far = lambda meta, state, emitted: (state.params - 0.5) ** 2 / 2
for name, how in {"unrolled": {}, "last 20 steps": {"truncate": 20}, "implicit": {"implicit": "symmetric"}}.items():
    print(f"{name:>14}: {hypergradient(far, fit, **how)(3.0, jnp.ones(200)).gradient:.6f}")
print(f"{'by hand':>14}: {-(1 / 4 - 1 / 2) / 4**2:.6f}")

# %% [markdown]
# ## What it costs
#
# The backward pass through a loop needs its states. `unroll(checkpoint=)` says how many are kept; the rest are computed
# again. The compiler knows the memory before anything is run: here for an MLP memory that learns from T batches.

# %%
WIDTH, BATCH = 64, 16


def learning_loss(start, pairs, checkpoint):
    def step(w, pair):
        loss = lambda w: jnp.mean((jax.nn.silu(pair[0] @ w[0]) @ w[1] - pair[1]) ** 2)
        return jax.tree.map(lambda w, g: w - 0.1 * g, w, jax.grad(loss)(w)), None

    w, _ = unroll(step, start, pairs, checkpoint=checkpoint)
    return jnp.mean((jax.nn.silu(pairs[0][0] @ w[0]) @ w[1] - pairs[1][0]) ** 2)


def megabytes(checkpoint, length):
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    pairs, start = (shape(length, BATCH, WIDTH),) * 2, (shape(WIDTH, WIDTH),) * 2
    gradient = jax.jit(jax.grad(lambda start, pairs: learning_loss(start, pairs, checkpoint)))
    return gradient.lower(start, pairs).compile().memory_analysis().temp_size_in_bytes / 1e6


LENGTHS = (16, 64, 256, 1024)
plt.figure(figsize=(5, 3.2), layout="constrained")
for checkpoint in ("none", "full", "sqrt", "log"):
    used = [megabytes(checkpoint, length) for length in LENGTHS]
    print(f"{checkpoint:>5}: " + ", ".join(f"{mb:.1f} MB" for mb in used))
    plt.loglog(LENGTHS, used, "o-", label=checkpoint)
plt.gca().set(xlabel="inner steps T", ylabel="temporary memory, MB", title="MLP memory of width 64")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# The inner gradient has a backward pass of its own, and reverse-over-reverse stores what that stored. `mixflow_grad` is
# `jax.grad` with another derivative: forward over reverse ([arXiv 2505.00793](https://arxiv.org/abs/2505.00793)). The
# values are the same. Here the inner model is a deep MLP that learns in four steps.

# %%
LAYERS, ROWS = 12, 512


def deep_loss(kernels, x):
    layer = jax.checkpoint(lambda h, kernel: (h + jnp.tanh(h @ kernel), None))
    return jnp.mean(jax.lax.scan(layer, x, kernels)[0] ** 2)


def after_steps(kernels, rate, xs, gradient):
    step = lambda w, x: (w - rate * gradient(deep_loss)(w, x), None)
    return deep_loss(unroll(step, kernels, xs, checkpoint="full")[0], xs[0])


kernels = jax.random.normal(jax.random.key(7), (LAYERS, WIDTH, WIDTH)) * 0.1
xs = jax.random.normal(jax.random.key(8), (4, ROWS, WIDTH))


def derivative(gradient):
    return jax.jit(jax.grad(lambda kernels, rate, xs: after_steps(kernels, rate, xs, gradient), argnums=1))


for name, gradient in (("jax.grad", jax.grad), ("mixflow_grad", mixflow_grad)):
    compiled = derivative(gradient).lower(kernels, 0.1, xs).compile()
    used = compiled.memory_analysis().temp_size_in_bytes / 1e6
    print(f"{name:>12}: {used:.1f} MB, derivative {compiled(kernels, 0.1, xs):.4f}")

# %% [markdown]
# A `LanguageModel` takes both by itself: its CMS learns by `mixflow_grad`, and `ModelConfig(memory_policy=)`, on the command
# line `--memory-policy`, is `unroll`'s knob for everything in it that learns while reading.
