"""Model configurations and their presets: plain frozen dataclasses, one field an idea."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

Mixer = Literal["self-modifying", "titans", "gated-delta", "delta", "linear", "attention", "sliding-window"]


@dataclass(frozen=True)
class CMSConfig:
    """The Continuum Memory System of every block: a chain or a sum of MLPs with periods of their own (NL Eq. 70-74).

    Levels run from slow to fast, so `hidden` and `periods` are in that order.
    """

    hidden: tuple[int, ...] = (256,)
    """Hidden width of each level's MLP, from the slowest level to the fastest."""
    periods: tuple[int, ...] = ()
    """Tokens between two updates of each level, slowest first; each a multiple of the next. Empty: frozen."""
    variant: Literal["sequential", "nested", "independent"] = "sequential"
    """sequential: a chain (Eq. 73). nested: a faster level restarts from the slower one (Eq. 72). independent: a
    weighted sum (Eq. 74)."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Non-linearity of the MLPs; swiglu adds a gate matrix."""
    meta_gradient: Literal["full", "first-order"] = "full"
    """Whether outer training differentiates through the inner gradients or takes them as constants."""
    scope: Literal["sequence", "batch"] = "sequence"
    """One set of fast weights for every sequence, or one for the whole batch."""
    blocks: int | None = None
    """How many of the last blocks learn in context; None: all of them."""
    rule: Literal["sgd", "momentum", "adam"] = "sgd"
    """Inner rule of every level; any optax transformation can be given to LanguageModel instead."""
    rate: float = 0.1
    """Start of the learned inner learning rate of every level."""
    clip: float = 1.0
    """Largest norm of a level's summed inner gradient, per sequence; 0 for none."""


@dataclass(frozen=True)
class ModelConfig:
    """A language model: an embedding, `layers` blocks of (sequence layer, CMS), a head."""

    vocabulary: int = 256
    """Number of tokens V."""
    width: int = 128
    """Model width D."""
    layers: int = 4
    """Number of blocks L."""
    heads: int = 4
    """Heads H of the sequence layer; D must be a multiple."""
    mixer: Mixer = "self-modifying"
    """The sequence layer of every block."""
    chunk: int = 64
    """Tokens between two refreshes of the main memory's errors (C_mem), and the length of one parallel product."""
    projection_chunk: int | None = None
    """The same for the memories that make keys, values, rates and retention (C_proj); None: equal to `chunk`."""
    memory_hidden: int = 32
    """Hidden width of the deep memories' MLPs, per head."""
    momentum: bool = True
    """Whether the deep memories' writes carry momentum."""
    retention: Literal["zero", "initial"] = "initial"
    """Where a memory's content decays to: nothing, or its learned start."""
    window: int = 256
    """Tokens that sliding-window attention looks back on."""
    cms: CMSConfig = field(default_factory=CMSConfig)
    """The feed-forward side of every block."""
    tie_embeddings: bool = True
    """Whether the head is the transposed embedding."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products; fast state and parameters stay in float32."""

    @property
    def alignment(self) -> int:
        """Documents start on multiples of this many tokens: the longest period that counts from a document's start."""
        return math.lcm(self.chunk, self.projection_chunk or self.chunk, *self.cms.periods)
