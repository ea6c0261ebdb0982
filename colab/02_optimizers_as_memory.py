# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %%
try:
    import nested_jax  # noqa: F401
except ImportError:
    # %pip install -q git+https://github.com/nested-jax/nested_jax
    import nested_jax  # noqa: F401

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

from nested_jax import optim


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
# ## 1. Momentum: a memory with one objective
#
# The momentum $m$ descends on $-\langle m, -g_t\rangle$, one step per gradient, and decays by $\alpha$ (NL Eq. 33-34):
#
# $$m_t = \alpha\,m_{t-1} - g_t \qquad W_t = W_{t-1} + \eta\,m_t$$
#
# That is `optax.sgd` with momentum, also under a schedule.

# %%
rng = np.random.default_rng(0)
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
# ## 2. Delta momentum: make room before you write
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
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
r, phi = np.meshgrid(np.linspace(-3, 3, 200), np.linspace(-4, 4, 200))
left.contourf(r, phi, np.log1p(jax.vmap(jax.vmap(surface))(jnp.stack([r, phi], -1))), levels=20, cmap="Greys")
for name, make in rules.items():
    descend = jax.vmap(lambda start, rate, make=make: train(make(rate), jax.grad(surface), start, STEPS), (0, None))
    paths = {rate: descend(starts, rate) for rate in (0.002, 0.003, 0.005, 0.007, 0.01, 0.015)}
    values = {rate: np.asarray(jax.vmap(jax.vmap(surface))(path)) for rate, path in paths.items()}
    outside = {rate: ~(v <= WITHIN) for rate, v in values.items()}  # what is not a number is outside
    steps = {rate: np.max(np.where(out, np.arange(1, STEPS + 2), 0), axis=1) for rate, out in outside.items()}
    best = min(steps, key=lambda rate: steps[rate].mean())
    print(f"{name}: {steps[best].mean():.0f} ± {steps[best].std():.0f} steps until it stays below {WITHIN}, at rate {best}")
    left.plot(*paths[best][3].reshape(-1, 2).T, "-", lw=1, label=name)
    right.semilogy(np.median(values[best], axis=0), label=name)
left.plot(*starts[3].reshape(2), "ko")
left.set(xlabel="r", ylabel="φ", xlim=(-3, 3), ylim=(-4, 4), title="one descent")
right.set(xlabel="step", ylabel="ψ", title="median of 32 starts")
right.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 3. Muon: a momentum that is read through Newton-Schulz
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
# ## 4. Adam: the best element-wise memory
#
# Which element-wise map $m$ recalls a gradient's size from the gradient, $\min_m \sum_t \|m \odot g_t - P\|^2$? The
# answer is the first moment over the second (NL Eq. 101-105). With moving averages, $P = \sqrt h$ and both bias
# corrections it is Adam.

# %%
noisy = lambda w: quadratic(w) * (1 + jnp.arange(8.0))
ours = train(optim.adam_memory(0.05), noisy, jnp.zeros(8), 100)
optaxs = train(optax.adam(0.05), noisy, jnp.zeros(8), 100)
print(f"largest difference from optax.adam over 100 steps: {jnp.abs(ours - optaxs).max():.1e}")

# %% [markdown]
# ## 5. Deep momentum, and where it starts
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
print(f"loss after {STEPS} steps on new tasks: {mean_loss(memory, held_out):.3f} from the default start,", end=" ")
print(f"{mean_loss(learned, held_out):.3f} from the learned one")
plt.plot(curve)
plt.xlabel("outer step")
plt.ylabel(f"loss after {STEPS} inner steps")
plt.show()
