"""One block's CMS: a chain or a sum of MLPs, one for each level, numbered from slow to fast (NL Eq. 70-74)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from nested_jax.checks import Count, NonNegative, check_fields, check_key
from nested_jax.errors import UserError
from nested_jax.numerics import BATCH, HEADS, TOKENS, lay, normal, rms_norm
from nested_jax.typing import Array, Float, PyTree

MATRICES = ("up", "gate", "down")  # what is fast in a level's weights


@dataclass(frozen=True)
class CMSConfig:
    """The Continuum Memory System of every block. Levels run from slow to fast, so do `hidden` and `periods`.

    Raises UserError for a field of another type or out of range, for periods that do not divide one another, and for a
    nested CMS of unequal or frozen levels.

    Source: NL Eq. 70-74.

    >>> CMSConfig(hidden=(64, 64), periods=(256, 64)).frozen
    0
    """

    hidden: tuple[Count, ...] = (256,)
    """Hidden width F of each level's MLP, from the slowest level to the fastest."""
    periods: tuple[Count, ...] = ()
    """Tokens between two updates of each level, slowest first, each a multiple of the next. Fewer periods than levels:
    the slowest levels are frozen. Empty: all are, as in a Transformer."""
    variant: Literal["sequential", "nested", "independent"] = "sequential"
    """sequential: a chain (Eq. 73). nested: a chain in which a level restarts from the next slower one each time that
    one steps (Eq. 72). independent: a weighted sum (Eq. 74)."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Non-linearity of the MLPs; swiglu adds a gate matrix."""
    meta_gradient: Literal["full", "first-order"] = "full"
    """Whether outer training differentiates through the inner gradients or takes them as constants."""
    scope: Literal["sequence", "batch"] = "sequence"
    """One set of fast weights for every sequence, or one for the whole batch (restarted when all its rows are)."""
    blocks: Count | None = None
    """How many of the last blocks learn in context; None: all of them."""
    rule: Literal["sgd", "momentum", "adam"] = "sgd"
    """Inner rule of every level. `LanguageModel(..., rule=)` takes any optax transformation instead."""
    rate: NonNegative = 0.1
    """Start of the inner learning rates, which are learned: one for each level of each block."""
    clip: NonNegative = 1.0
    """Largest norm of a level's summed gradient, per set of fast weights; 0 for none."""

    @property
    def frozen(self) -> int:
        """How many levels, the slowest ones, do not learn in context."""
        return len(self.hidden) - len(self.periods)

    def __post_init__(self):
        check_fields(self, "model.cms.")
        if not self.hidden:
            raise UserError("model.cms.hidden () has no level: give one hidden width a level")
        if self.frozen < 0:
            raise UserError(f"model.cms.periods {self.periods} are more than the {len(self.hidden)} levels of cms.hidden")
        for slow, fast in zip(self.periods, self.periods[1:], strict=False):
            if slow % fast:
                raise UserError(
                    f"model.cms.periods: {slow} is not a multiple of {fast}: give periods that divide one another"
                )
        if self.variant == "nested" and len(set(self.hidden)) > 1:
            raise UserError(f"model.cms.hidden {self.hidden}: a nested CMS needs equal widths")
        if self.variant == "nested" and self.periods and self.frozen:
            raise UserError(
                f"model.cms.periods {self.periods}: a nested CMS needs a period for each of its {len(self.hidden)} levels"
            )


def init_weights(key: Array, config: CMSConfig, width: int) -> dict[str, dict[str, Array]]:
    """Slow weights of one block's CMS: level1 (slowest), level2, ... and, if independent, mix (N,).

    Args:
        key: of `jax.random`.
        config: of the CMS.
        width: D.

    Returns:
        For each level up (D, F), down (F, D), with swiglu gate (D, F), norm (D,) and, if it learns, rate (); float32.
        Levels of a nested CMS after the first have no matrices: they start as the slower one is.

    Source: NL Eq. 70-74.

    >>> jax.tree.map(jnp.shape, init_weights(jax.random.key(0), CMSConfig(hidden=(3,)), 2))
    {'level1': {'down': (3, 2), 'norm': (2,), 'up': (2, 3)}}
    """
    check_key("cms.init_weights", key)
    weights = {}
    for i, (hidden, own) in enumerate(zip(config.hidden, jax.random.split(key, len(config.hidden)), strict=True)):
        shapes = {"up": (width, hidden), "gate": (width, hidden), "down": (hidden, width)}
        if config.activation != "swiglu":
            del shapes["gate"]
        if config.variant == "nested" and i and config.periods:
            shapes = {}  # starts as the slower level is
        keys = dict(zip(shapes, jax.random.split(own, 3), strict=False))
        level = {name: normal(keys[name], shape) * shape[0] ** -0.5 for name, shape in shapes.items()}
        level["norm"] = jnp.ones(width)
        if i >= config.frozen:
            level["rate"] = jnp.full((), config.rate, jnp.float32)
        weights[f"level{i + 1}"] = level
    if config.variant == "independent":
        weights["mix"] = jnp.ones(len(config.hidden))
    return weights


def apply(config: CMSConfig, weights: PyTree, fast: Sequence[PyTree], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """One block's CMS, residual connections included.

        sequential, nested: x <- x + MLP_l(norm x), l from slow to fast        independent: x + sum_l mix_l MLP_l(norm x)

    Args:
        config: of the CMS.
        weights: as of `init_weights`.
        fast: matrices of the levels that learn, slow to fast, (B, ...) or shared by the batch. Other levels, and all of
            them if it is empty, use the slow weights.
        x: (B, T, D).

    Returns:
        (B, T, D), of x's type.

    Source: NL Eq. 70-74.

    >>> config = CMSConfig(hidden=(3, 3))
    >>> apply(config, init_weights(jax.random.key(0), config, 2), (), jnp.ones((1, 5, 2))).shape
    (1, 5, 2)
    """
    slow = len(config.hidden) - len(fast)
    outputs = []
    for i in range(len(config.hidden)):
        level = weights[f"level{i + 1}"]
        matrices = fast[i - slow] if i >= slow else (level if "up" in level else weights["level1"])
        outputs.append(_mlp(matrices, rms_norm(level["norm"], x)))
        if config.variant != "independent":
            x = x + outputs.pop()
    for mix, y in zip(weights.get("mix", ()), outputs, strict=True):
        x = x + mix.astype(x.dtype) * y
    return x


def _mlp(matrices: PyTree, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    product = lambda x, w: jnp.matmul(x, w.astype(x.dtype))  # w is (D, F) or one for each row, (B, D, F)
    hidden = lambda w: lay(product(x, w), BATCH, TOKENS, HEADS)

    @jax.checkpoint  # the backward pass keeps the hidden layer before its activation, and nothing more
    def down(hidden, gate, w):
        return product(_gelu(hidden) if gate is None else _silu(gate) * hidden, w)

    gate = hidden(matrices["gate"]) if "gate" in matrices else None
    return lay(down(hidden(matrices["up"]), gate, matrices["down"]), BATCH, TOKENS)


def _with_slope(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The function, its derivative computed with its value: the backward pass, which XLA's CPU would compute along a
    transposed operand, is then one product."""

    def jvp(primals, tangents):
        value, slope = jax.jvp(function, primals, (jnp.ones_like(primals[0]),))
        return value, slope * tangents[0]

    with_slope = jax.custom_jvp(lambda x: function(x))
    with_slope.defjvp(jvp)
    return with_slope


_gelu, _silu = _with_slope(jax.nn.gelu), _with_slope(jax.nn.silu)
