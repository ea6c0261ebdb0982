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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/nested-jax/nested_jax/blob/main/colab/02_optimizers_as_memory.ipynb)

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
# # Optimizers as memory
#
# Nested Learning ([arXiv 2512.24695](https://arxiv.org/abs/2512.24695)) reads an optimizer as an associative memory: what it
# is given is a stream of gradients, what it keeps is a compressed record of them, and its update is what it recalls. The
# familiar rules differ in the objective of that memory. In `nested_jax.optim` each is an optax transformation.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from nested_jax import Level, describe, local_surprise, optim, preset, run


def train(rule, gradient, params, steps):
    """All parameters on the way, (steps + 1, ...)."""

    def step(carry, _):
        params, state = carry
        updates, state = rule.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    path = jax.jit(lambda: jax.lax.scan(step, (params, rule.init(params)), None, length=steps)[1])()
    return jnp.concatenate([params[None], path])


# %% [markdown]
# ## 1. What there is to remember: inputs and local surprise
#
# The gradient of a linear layer $y = W x$ is an outer product, $\delta x^\top$ with $\delta = \partial L/\partial y$. A
# step of gradient descent stores the pair: it is the proximal step (NL Eq. 31)
#
# $$W_{t+1} = \arg\min_W\; \langle W x, \delta\rangle + \tfrac1{2\eta}\|W - W_t\|^2$$
#
# $\delta$ says how the layer should have answered, its **local surprise**. `local_surprise` finds the linear
# layers of any loss and gives the pairs of all of them from one backward pass:

# %%
rng = np.random.default_rng(0)
layers = {
    "up": jnp.asarray(rng.normal(size=(8, 16)) / 8**0.5, jnp.float32),
    "down": jnp.asarray(rng.normal(size=(16, 4)) / 4, jnp.float32),
}
batch = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((32, 8), (32, 4))]


def loss(layers, batch):
    x, target = batch
    return 0.5 * jnp.mean(jnp.sum((jax.nn.gelu(x @ layers["up"]) @ layers["down"] - target) ** 2, axis=-1))


pairs, gradient = local_surprise(loss, layers, batch), jax.grad(loss)(layers, batch)
for name, (x, delta) in pairs.items():
    apart = jnp.abs(x.T @ delta - gradient[name]).max()
    print(f"{name}: inputs {x.shape}, surprise {delta.shape}, from its gradient {apart:.1e}")

# %% [markdown]
# Delta gradient descent stores the same pair by the squared error, $\tfrac12\|W x + \delta\|^2$ in place of the inner
# product: it erases what the layer answers at $x$, which then answers $-\delta$ (NL Eq. 56-57). That step overshoots for no
# $x$, however large. Here inputs are 30 times as large as before, and each example is stored once:

# %%
for name, rule in {
    "gradient descent": optax.sgd(0.05),
    "delta gradient descent": optim.delta_gradient_descent(0.05),
}.items():
    rule, weights = optax.with_extra_args_support(rule), {"kernel": jnp.zeros((8, 1))}
    state, misses = rule.init(weights), []
    for x in 30 * batch[0][:8]:
        error = lambda weights, x: 0.5 * jnp.sum((x[None] @ weights["kernel"] - 1.0) ** 2)
        inputs, surprise = local_surprise(error, weights, x)["kernel"]
        gradient = {"kernel": inputs.T @ surprise}
        updates, state = rule.update(gradient, state, weights, inputs={"kernel": inputs})
        weights = optax.apply_updates(weights, updates)
        misses.append(float(jnp.abs(inputs @ weights["kernel"] + surprise)[0, 0]))
    print(
        f"{name}: from its answer after storing a pair to -δ, for 8 examples: {', '.join(f'{miss:.1g}' for miss in misses)}"
    )

# %% [markdown]
# ## 2. Momentum: a memory with one objective
#
# The momentum $m$ descends on $-\langle m, -g_t\rangle$, one step per gradient, and decays by $\alpha$ (NL Eq. 33-34):
#
# $$m_t = \alpha\,m_{t-1} - g_t \qquad W_t = W_{t-1} + \eta\,m_t$$
#
# That is `optax.sgd` with momentum, also under a schedule.

# %%
A = jnp.asarray(rng.normal(size=(12, 8)), jnp.float32)
quadratic = jax.grad(lambda w: 0.5 * jnp.mean((A @ w - 1.0) ** 2))
schedule = optax.cosine_decay_schedule(0.3, 100)
ours = train(optim.momentum(schedule, decay=0.9), quadratic, jnp.zeros(8), 100)
optaxs = train(optax.sgd(schedule, momentum=0.9), quadratic, jnp.zeros(8), 100)
print(f"largest difference over 100 steps: {jnp.abs(ours - optaxs).max():.1e}")

# %% [markdown]
# What does this memory hold? A gradient that is $s$ steps old has the weight $\alpha^s$. With $\alpha = 0.9$ the last few
# gradients are nearly all of it: everything older is forgotten, however useful it was.

# %%
age = np.arange(60)
for decay in (0.9, 0.99):
    held = 1 - decay ** (age + 1)
    plt.plot(age + 1, held, label=f"decay {decay}")
    counts = {share: int(np.ceil(np.log(1 - share) / np.log(decay))) for share in (0.5, 0.99)}
    print(f"decay {decay}: half of the weight is in the last {counts[0.5]} gradients, 99 % in the last {counts[0.99]}")
plt.xlabel("last gradients")
plt.ylabel("share of the momentum's weight")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 3. Delta momentum: make room before you write
#
# With the squared error $\tfrac12\|m\,g - P(g)\|^2$ as its objective, the memory first erases what it holds along the new
# gradient (NL Eq. 48-49). On a surface whose valley bends, plain momentum carries on along directions that have become
# wrong. Each rule takes the learning rate at which it arrives soonest from 32 random points:
#
# $$\psi(r, \varphi) = r^2 + k\,(r - \varphi + a \sin \omega r)^2$$

# %%


def surface(point, k=10.0, a=1.0, omega=2.0):
    r, phi = point.reshape(2)
    return r**2 + k * (r - phi + a * jnp.sin(omega * r)) ** 2


STEPS, WITHIN = 400, 1e-2
starts = jax.random.uniform(jax.random.key(0), (32, 2, 1), minval=-3, maxval=3)
rules = {
    "momentum": lambda rate: optim.momentum(rate, decay=0.9),
    "delta momentum": lambda rate: optim.delta_momentum(rate, decay=0.9, erase=0.1),
}
found = {}
for name, make in rules.items():
    descend = jax.vmap(lambda start, rate, make=make: train(make(rate), jax.grad(surface), start, STEPS), (0, None))
    paths = {rate: descend(starts, rate) for rate in (0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02)}
    values = {rate: np.asarray(jax.vmap(jax.vmap(surface))(path)) for rate, path in paths.items()}
    outside = {rate: ~(v <= WITHIN) for rate, v in values.items()}  # what is not a number is outside
    steps = {rate: np.max(np.where(out, np.arange(1, STEPS + 2), 0), axis=1) for rate, out in outside.items()}
    best = min(steps, key=lambda rate: steps[rate].mean())
    found[name] = np.asarray(paths[best]).reshape(32, STEPS + 1, 2), values[best], steps[best]
    print(f"{name}: {steps[best].mean():.0f} ± {steps[best].std():.0f} steps until it stays below {WITHIN}, at rate {best}")
plain, delta = (steps for _, _, steps in found.values())
print(f"delta momentum stays there sooner from {np.sum(delta < plain)} of 32 starts, later from {np.sum(delta > plain)}")

# %% [markdown]
# The two maps show the descents from the first start, with a dot for each step. The dashed line is the floor of the valley,
# where the second term of $\psi$ is zero.

# %%
fig, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained", width_ratios=(1, 1, 1.15))
r, phi = np.meshgrid(np.linspace(-1, 4, 200), np.linspace(-1, 4, 200))
height = jax.vmap(jax.vmap(surface))(jnp.stack([r, phi], -1))
for ax, color, (name, (paths, values, steps)) in zip(axes, ("C0", "C1"), found.items(), strict=False):
    ax.contourf(r, phi, np.log10(height), levels=np.arange(-2, 3.1, 0.5), cmap="Greys", vmax=7, extend="min")
    ax.plot(r[0], r[0] + np.sin(2 * r[0]), "k--", lw=1, label="floor of the valley")
    ax.plot(*paths[0].T, "o-", lw=1, ms=3, color=color)
    ax.plot(*paths[0, 0], "ks", ms=7, label="start")
    ax.plot(0, 0, "k*", ms=13, label="minimum")
    ax.set(xlabel="r", ylabel="φ", xlim=(-1, 4), ylim=(-1, 4), aspect="equal", title=f"{name}: {steps[0]} steps")
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
    axes[2].semilogy(middle, color=color, label=name)
    axes[2].fill_between(np.arange(STEPS + 1), low, high, color=color, alpha=0.2, lw=0)
axes[0].legend(loc="lower right", fontsize=9)
axes[2].axhline(WITHIN, color="0.5", lw=1, ls=":", label=f"ψ = {WITHIN}")
axes[2].set(xlabel="step", ylabel="ψ", xlim=(0, 150), ylim=(1e-5, 1e2), title="median and quartiles of 32 starts")
axes[2].legend(fontsize=9)
plt.show()

# %% [markdown]
# ## 4. Muon: a momentum that is read through Newton-Schulz
#
# A matrix of momentum is dominated by a few directions. Newton-Schulz makes all its singular values alike before it is used
# (NL Eq. 43-44, 52). One step of the cubic form is a gradient step on $\tfrac14\|O^\top O - I\|^2$: the read-out is an
# inner optimisation problem of its own, one more level.

# %%
g = jnp.asarray(rng.normal(size=(16, 8)) @ np.diag(2.0 ** -np.arange(8)), jnp.float32)
for steps in (0, 3, 5):
    read = optim.newton_schulz(g, steps=steps) if steps else g / jnp.linalg.norm(g)
    plt.plot(np.linalg.svd(np.asarray(read), compute_uv=False), "o-", label=f"{steps} steps")
plt.yscale("log")
plt.xlabel("singular value, largest first")
plt.ylabel("size")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 5. Adam: the best element-wise memory
#
# Which element-wise map $m$ recalls a gradient's size $P$ from the gradient, $\min_m \sum_t \|m \odot g_t - P\|^2$? The
# answer is $P$ times the first moment $\sum_t g_t$ over the second, $h = \sum_t g_t^2$ (NL Eq. 101-105). With moving
# averages, $P = \sqrt h$ and both bias corrections it is Adam.

# %%
noisy = lambda w: quadratic(w) * (1 + jnp.arange(8.0))
ours = train(optim.adam_memory(0.05), noisy, jnp.zeros(8), 100)
optaxs = train(optax.adam(0.05), noisy, jnp.zeros(8), 100)
print(f"largest difference from optax.adam over 100 steps: {jnp.abs(ours - optaxs).max():.1e}")

# %% [markdown]
# ## 6. Deep momentum, and where it starts
#
# The memory may be an MLP, one for every matrix, which learns from the stream of gradients by gradient descent on an
# objective of its own (NL Eq. 50). Its start is a parameter like any other: here it is learned, through ten inner steps, so
# that a regression with badly scaled inputs is solved faster. The tasks it is tried on are new ones.

# %%
SIZE, STEPS, RATE = 6, 10, 0.3
scales = jnp.asarray(2.0 ** -np.arange(SIZE), jnp.float32)
zero = {"W": jnp.zeros((SIZE, SIZE))}


def final_loss(memory, task):
    """Loss after some steps from W = 0 on the linear regression with this solution."""
    loss = lambda p: 0.5 * jnp.mean(jnp.sum((scales[:, None] * (p["W"] - task)) ** 2, axis=0))
    rule = optim.deep_momentum(RATE, start=memory, rate=0.1)

    def step(carry, _):
        params, state = carry
        updates, state = rule.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (zero, rule.init(zero)), None, length=STEPS)
    return loss(params)


mean_loss = lambda memory, key: jax.vmap(lambda t: final_loss(memory, t))(jax.random.normal(key, (16, SIZE, SIZE))).mean()
memory, outer = optim.deep_momentum_start(zero, hidden=16), optax.adam(3e-2)


@jax.jit
def learn_start(carry, key):
    memory, state = carry
    value, gradient = jax.value_and_grad(mean_loss)(memory, key)
    updates, state = outer.update(gradient, state)
    return (optax.apply_updates(memory, updates), state), value


(learned, _), curve = jax.lax.scan(learn_start, (memory, outer.init(memory)), jax.random.split(jax.random.key(0), 200))
held_out = jax.random.key(1)
default, ours = mean_loss(memory, held_out), mean_loss(learned, held_out)
print(f"loss after {STEPS} steps on new tasks: {default:.3f} from the default start, {ours:.3f} from the learned one")
plt.plot(curve)
plt.xlabel("outer step")
plt.ylabel(f"loss after {STEPS} inner steps")
plt.show()

# %% [markdown]
# ## 7. Architecture and optimizer are one system
#
# What makes a layer an MLP, and what makes it an attention? Take $y_t = M\,\sigma(Q x_t)$. If $M$ is a slow weight, that is
# an MLP block. If the same $M$ is a memory that takes a step on $-\langle M k_t, v_t\rangle$ at each token, it is linear
# attention. Nothing but the level of one weight differs:

# %%


def block(weights, rate):
    def step(M, x, slower):
        q, k, v = (W @ x[0] for W in (weights["Q"], weights["K"], weights["V"]))
        objective = lambda M: -jnp.dot(M @ jax.nn.silu(k), v)
        M = M - rate * jax.grad(objective)(M)
        return M, M @ jax.nn.silu(q)

    return Level(lambda slower: weights["M"], step, period=1, name="M")


weights = {name: jnp.asarray(rng.normal(size=(8, 8)) / 8**0.5, jnp.float32) for name in "QKVM"}
x = jnp.asarray(rng.normal(size=(20, 8)), jnp.float32)
keys, queries, values = jax.nn.silu(x @ weights["K"].T), jax.nn.silu(x @ weights["Q"].T), x @ weights["V"].T
mlp = queries @ weights["M"].T
attention = mlp + jnp.tril(queries @ keys.T) @ values  # all pairs of tokens at once
print(f"rate 0 and the MLP:              {jnp.abs(run(block(weights, 0.0), None, x)[1] - mlp).max():.1e}")
print(f"rate 1 and the linear attention: {jnp.abs(run(block(weights, 1.0), None, x)[1] - attention).max():.1e}")

# %% [markdown]
# So a model and its optimizer are drawn as one system of levels. `describe` finds the memories of any optax transformation
# in what its update computes: which of them change when, which needs which, and what objective a linear rule descends.

# %%
for name, rule in {
    "SGD": optax.sgd(0.1),
    "momentum": optim.momentum(0.1),
    "Adam": optax.adam(1e-3),
    "Muon": optax.contrib.muon(0.02),
    "M3": optim.m3(0.02, slow_period=8),
}.items():
    picture = describe(rule)
    print(f"{name}, {picture.levels} level{'s' * (picture.levels > 1)}:")
    for c in picture.components:
        print(f"  {c.level}  {c.name}, {c.updates}: {c.objective or c.rule}")

# %%
describe((preset("tiny-hope"), optim.m3(0.02, slow_period=8)), tokens_per_step=1024).plot()
