"""Slow twin of learning in context: a plain loop over segments with `jax.grad`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import optax

from nested_jax.cms.chain import MATRICES, CMSConfig
from nested_jax.typing import Array, Bool, Float, Int, PyTree


def learn_in_context(
    config: CMSConfig,
    blocks: Sequence[PyTree],
    forward: Callable[[dict[str, list[PyTree]], PyTree, Int[Array, "B P"], int], tuple[Array, PyTree]],
    mixers: PyTree,
    rules: Sequence[optax.GradientTransformation],
    tokens: Int[Array, "B T"],
    learn: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B T V"]:
    """Logits of documents that share one set of fast weights: with one set a sequence, it is for one row.

        theta_l <- theta_l - eta_l sum over its last C_l tokens of grad L(theta; x_t)        when C_l divides the token count

    Args:
        config: with periods.
        blocks: slow CMS weights of each block that learns.
        forward: (matrices of the blocks by level, mixers, tokens, position) -> (logits, mixers).
        mixers: state of the sequence layers.
        rules: inner rules, slow to fast.
        tokens: of whole documents.
        learn: the tokens whose prediction is learned from, in a mean over all of a segment; None: all.

    Source: NL Eq. 70-74.
    """
    P, names = config.periods[-1], [f"level{i + 1}" for i in range(config.frozen, len(config.hidden))]
    start = lambda name: [{k: w for k, w in block[name].items() if k in MATRICES} for block in blocks]
    fast = {name: start("level1" if config.variant == "nested" else name) for name in names}
    gradient = jax.tree.map(jnp.zeros_like, fast)
    memory = {name: rule.init(fast[name]) for name, rule in zip(names, rules, strict=True)}
    forward = jax.jit(forward)
    learn = jnp.ones_like(tokens, bool) if learn is None else learn

    @jax.jit
    def differentiate(fast, mixers, tokens, targets, learned, position):
        logits = lambda fast: forward(fast, mixers, tokens, position)[0]
        nats = lambda fast: optax.softmax_cross_entropy_with_integer_labels(logits(fast), targets)
        loss = lambda fast: (nats(fast) * learned).mean()
        gradient = jax.grad(loss)(fast)
        return jax.lax.stop_gradient(gradient) if config.meta_gradient == "first-order" else gradient

    outputs = []
    for begin in range(0, tokens.shape[1], P):
        end = begin + P
        now, targets, learned = tokens[:, begin:end], tokens[:, begin + 1 : end + 1], learn[:, begin + 1 : end + 1]
        logits, after = forward(fast, mixers, now, begin)
        outputs.append(logits)
        if targets.shape[1] == P:
            gradient = jax.tree.map(jnp.add, gradient, differentiate(fast, mixers, now, targets, learned, begin))
            for i, (name, period) in enumerate(zip(names, config.periods, strict=True)):
                if end % period == 0:
                    updates, memory[name] = rules[i].update(gradient[name], memory[name], fast[name])
                    rates = [block[name]["rate"] for block in blocks]
                    step = lambda w, u, rate: jax.tree.map(lambda w, u: w + rate * u, w, u)
                    fast[name] = [step(*each) for each in zip(fast[name], cast(list, updates), rates, strict=True)]
                    gradient[name] = jax.tree.map(jnp.zeros_like, gradient[name])
            for i, (slower, name) in enumerate(zip(names, names[1:], strict=False)):
                if config.variant == "nested" and end % config.periods[i] == 0:
                    fast[name], memory[name] = fast[slower], rules[i + 1].init(fast[slower])
        mixers = after
    return jnp.concatenate(outputs, axis=1)
