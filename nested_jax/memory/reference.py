"""Slow twins: every sequence layer for one sequence from its start, token by token, as the papers define it.

Each function is (layer, weights, x (T, D)) -> outputs (T, D); tests compare the layers' values and gradients with it.
The recurrence's own slow twin is `recurrence.tokenwise`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from nested_jax.memory.attention import Attention, rotate
from nested_jax.memory.deep import Rule
from nested_jax.memory.linear import LARGEST, LinearMemory
from nested_jax.memory.omega import OmegaMemory
from nested_jax.memory.projections import project_in
from nested_jax.memory.self_modifying import SelfModifyingTitans
from nested_jax.memory.stream import CONVOLUTION, MemoryLayer, project_out
from nested_jax.memory.titans import Titans
from nested_jax.numerics import clip_rows, l2norm, rms_norm
from nested_jax.typing import Array, Float, PyTree


def linear_memory(layer: LinearMemory, weights: PyTree, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    """`LinearMemory` token by token, as its rule is written."""
    q, k, v, *gates = _project(layer, weights, x)
    rate, retain = [*gates, *[jnp.ones(k.shape[:-1])] * (2 - len(gates))]
    rate = layer.max_rate * rate
    rate = rate if layer.rule == "linear" else jnp.minimum(rate, LARGEST)

    def token(memory, now):
        q, k, v, rate, retain = now
        v = layer.normalised(v)
        if layer.rule == "oja":
            erased = jnp.einsum("h,hv,hu,huk->hvk", rate, v, v, memory)
            memory = retain[:, None, None] * memory - erased + jnp.einsum("h,hv,hk->hvk", rate, v, k)
            return memory, jnp.einsum("hvk,hk->hv", memory, q)
        memory = retain[:, None, None] * memory
        stored = jnp.einsum("hvk,hk->hv", memory, k) if layer.rule != "linear" else 0.0
        memory = memory + jnp.einsum("h,hv,hk->hvk", rate, v - stored, k)
        return memory, jnp.einsum("hvk,hk->hv", memory, q)

    start = weights["start"].swapaxes(1, 2) if layer.rule == "oja" else weights["start"]
    _, y = jax.lax.scan(token, start, (q, k, v, rate, retain))
    return project_out(weights, y[None], x.dtype)[0]


def omega_memory(layer: OmegaMemory, weights: PyTree, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    """`OmegaMemory` token by token, `jax.grad` for the errors."""
    q, k, v, rate, retain, *strength = _project(layer, weights, x)
    before = lambda part: jnp.pad(part, [(layer.window - 1, 0)] + [(0, 0)] * (part.ndim - 1))
    gamma = strength[0] / layer.window if strength else jnp.ones_like(rate)
    v = l2norm(v) if layer.values == "unit" else v
    history = [before(part) for part in (layer.lift(k), v, gamma)]

    def gradient(memory, key, value):
        error = jax.grad(lambda y: layer.bias.loss(y, value))(memory @ key)
        return jnp.outer(clip_rows(error, layer.surprise), key)

    def token(carry, now):
        memory, snapshot = carry
        t, q, rate, retain = now
        snapshot = jnp.where(t % layer.chunk == 0, memory, snapshot)
        keys, values, strengths = (jax.lax.dynamic_slice_in_dim(part, t, layer.window) for part in history)
        each = jax.vmap(jax.vmap(gradient), (None, 0, 0))(snapshot, keys, values)  # (c, H, V, phi)
        memory = retain[:, None, None] * memory - layer.largest_rate * jnp.einsum("h,ch,chvk->hvk", rate, strengths, each)
        return (memory, snapshot), jnp.einsum("hvk,hk->hv", memory, layer.lift(q))

    carry = (weights["start"], weights["start"])
    _, y = jax.lax.scan(token, carry, (jnp.arange(len(x)), q, rate, retain))
    return project_out(weights, y[None], x.dtype)[0]


def titans(layer: Titans, weights: PyTree, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    """The same layer for one sequence from its start, token by token: the slow twin, with `jax.vjp` for the surprise."""
    tokens, rule = _project(layer, weights, x), layer.rule

    def one_head(start, q, k, v, rate, retain, momentum=None):
        def token(carry, now):
            running, snapshot, velocity = carry
            t, q, k, v, eta, alpha, theta = now
            eta, v = layer.largest_rate * eta, l2norm(v) if layer.values == "unit" else v
            renewed = jax.tree.map(lambda new, old: jnp.where(t % layer.chunk == 0, new, old), running, snapshot)
            after, pushes = {}, {}
            for part, (z, surprise) in _local_surprise(renewed, k, v, rule.surprise).items():
                step = _step(rule, part == "second", eta, alpha, z)
                if rule.errors == "exact" and part == "second":
                    surprise = k + running[part] @ z - v
                after[part], pushes[part] = _write(
                    rule, part, running[part], velocity[part], start[part], z, surprise, step, alpha, theta
                )
            return (after, renewed, pushes), _read(rule, running, after, renewed, q)

        theta = jnp.zeros_like(rate) if momentum is None else momentum
        carry = (start, start, jax.tree.map(jnp.zeros_like, start))
        return jax.lax.scan(token, carry, (jnp.arange(len(q)), q, k, v, rate, retain, theta))[1]

    starts = {part: w[:, 0] for part, w in weights["start"].items()}
    y = jax.vmap(one_head, in_axes=(0,) + (1,) * len(tokens), out_axes=1)(starts, *tokens)
    return project_out(weights, y[None], x.dtype)[0]


def self_modifying_titans(
    layer: SelfModifyingTitans, weights: PyTree, x: Float[Array, "T D"], periods: Mapping[str, int] | None = None
) -> Float[Array, "T D"]:
    """The same layer for one sequence from its start, token by token: the slow twin, with `jax.vjp` for the surprise.

    `periods` gives some memories a number of tokens between two refreshes of their own: what they make, and their errors,
    are no older than that.
    """
    (*makers, _), rule = layer.memories, layer.rule
    names = layer.memories
    period = {name: layer.chunk if name == "memory" else layer.period for name in names} | dict(periods or {})

    x = _convolve(weights["taps"], x)
    heads = lambda y: y.reshape(len(x), layer.heads, -1)
    if layer.momentum:
        theta = jax.nn.sigmoid(x @ weights["momentum"] + weights["momentum_bias"][None])
    else:
        theta = jnp.zeros((len(x), layer.heads))

    def one_head(start, gates, x, fixed, theta):
        def token(carry, now):
            running, snapshot, velocity = carry
            t, x, fixed, theta = now
            renew = lambda name: jax.tree.map(
                lambda new, old: jnp.where(t % period[name] == 0, new, old), running[name], snapshot[name]
            )
            snapshot = {name: renew(name) for name in names}
            made = {**fixed, "rates": x, "retention": x} | {name: _memory(snapshot[name], x) for name in makers}
            squash = lambda name, z: jax.nn.sigmoid(gates[name] @ z + gates[f"{name}_bias"])
            key, value, q = l2norm(made["keys"]), layer.normalise(made["values"]), l2norm(made["queries"])
            rates, alpha = layer.max_rate * squash("rate", made["rates"]), squash("retention", made["retention"])
            own = lambda name, part: rates[0 if part == "first" else 1 + names.index(name)]
            eta = own if layer.rates == "own" else lambda name, part: rates
            before, running, velocity = running, {}, {}
            for name in names:
                w = before[name]
                target = layer.normalise(_memory(snapshot[name], value))
                running[name], velocity[name] = {}, {}
                for part, (z, surprise) in _local_surprise(snapshot[name], key, target, rule.surprise).items():
                    read = name == "memory" and part == "second"
                    rate = _step(rule, read, eta(name, part), alpha, z)
                    if rule.errors == "exact" and read:
                        surprise = key + w[part] @ z - target
                    running[name][part], velocity[name][part] = _write(
                        rule, part, w[part], carry[2][name][part], start[name][part], z, surprise, rate, alpha, theta
                    )
            y = _read(rule, before["memory"], running["memory"], snapshot["memory"], q)
            return (running, snapshot, velocity), y

        carry = (start, start, jax.tree.map(jnp.zeros_like, start))
        return jax.lax.scan(token, carry, (jnp.arange(len(x)), x, fixed, theta))[1]

    starts = {n: {part: w[:, i] for part, w in weights["start"].items()} for i, n in enumerate(names)}
    gates = {k: weights[k] for k in ("rate", "rate_bias", "retention", "retention_bias")}
    maps = {"keys": "key", "values": "value", "queries": "query"}
    fixed = {name: heads(x @ weights[of]) for name, of in maps.items() if name not in makers}
    y = jax.vmap(one_head, in_axes=(0, 0, 1, 1, 1), out_axes=1)(starts, gates, heads(x), fixed, theta)
    return rms_norm(weights["norm"], y[None]).reshape(len(x), -1) @ weights["out"]


def attention(layer: Attention, weights: PyTree, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    """`Attention` of one document, query by query."""
    T, D = x.shape
    q, k, v = ((x @ weights[name]).reshape(1, T, layer.heads, -1) for name in ("query", "key", "value"))
    at = jnp.arange(T)[None]
    q, k, v = rotate(q, at)[0], rotate(k, at)[0], v[0]
    rows = []
    for t in range(T):
        seen = slice(max(0, t + 1 - (layer.window or T)), t + 1)
        scores = jnp.einsum("hk,shk->hs", q[t], k[seen]) * q.shape[-1] ** -0.5
        rows.append(jnp.einsum("hs,shk->hk", jax.nn.softmax(scores, axis=-1), v[seen]).reshape(D))
    return jnp.stack(rows) @ weights["out"]


def _convolve(taps: Float[Array, "W D"], x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    padded = jnp.pad(x, ((CONVOLUTION - 1, 0), (0, 0)))
    return jnp.sum(jnp.stack([taps[i][None] * padded[i : i + len(x)] for i in range(CONVOLUTION)]), axis=0)


def _project(layer: MemoryLayer, weights: PyTree, x: Float[Array, "T D"]) -> list[Array]:
    """q, k, v and gates of convolved tokens, (T, H, ...)."""
    return [part[0] for part in project_in(weights, _convolve(weights["taps"], x)[None], layer.heads)]


def _step(rule: Rule, read: bool, eta: Float[Array, ""], alpha: Float[Array, ""], x: Float[Array, " K"]) -> Float[Array, ""]:
    """eta' of a layer at its input x, of the second layer of the memory that is read or another one."""
    if rule.step == "raw":
        return eta
    step = eta / (x @ x + 1e-3) if rule.step == "normalised" and read else eta / (1 + eta * x @ x)
    kept = 1.0 if rule.retention == "none" else alpha
    return step * (1 + kept) / 2 if read and (rule.step == "normalised" or rule.errors == "exact") else step


def _write(rule: Rule, part: str, w, velocity, start, z, surprise, step, alpha, theta) -> tuple[Array, Array]:
    """(weights, momentum) of a layer after its token; the first layer's input is that of the memory."""
    push = theta * velocity - step * (1 - theta if rule.damped else 1) * jnp.outer(surprise, z)
    erases = rule.erase == "layer" or (rule.erase == "memory" and part == "first")
    erased = step * jnp.outer(w @ z, z) if erases else 0.0
    if rule.retention == "none":
        return w - erased + push, push
    origin = start if rule.retention == "initial" else 0.0
    return origin + alpha * (w - origin) - erased + push, push


def _memory(w: PyTree, z: Float[Array, " K"], pushed: PyTree | None = None) -> Float[Array, " K"]:
    """M(z) of one memory; `pushed` is added to the outputs of its layers."""
    first, second = (0.0, 0.0) if pushed is None else (pushed["first"], pushed["second"])
    return z + w["second"] @ jax.nn.silu(w["first"] @ z + first) + second


def _read(rule: Rule, before: PyTree, after: PyTree, snapshot: PyTree, q: Float[Array, " K"]) -> Float[Array, " K"]:
    """What is read at a token of the memory before and after its write, and as it was at the last boundary."""
    now = {"after": after, "before": before, "boundary": snapshot}[rule.read]
    return _memory(now | {"first": snapshot["first"]} if rule.features == "boundary" else now, q)


def _local_surprise(w: PyTree, key: Float[Array, " K"], target: Float[Array, " K"], largest: float) -> dict:
    """{layer: (its input, its clipped surprise)} of one memory, by `jax.vjp`."""
    inputs = {"first": key, "second": jax.nn.silu(w["first"] @ key)}
    still = {"first": jnp.zeros_like(inputs["second"]), "second": jnp.zeros_like(key)}
    output, pull = jax.vjp(partial(_memory, w, key), still)
    (surprise,) = pull(clip_rows(output - target, largest))
    return {part: (z, clip_rows(surprise[part], largest)) for part, z in inputs.items()}
