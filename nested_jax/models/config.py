"""Model configurations and their presets: plain frozen dataclasses, one field an idea."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

from nested_jax.checks import Count, Interval, Positive, Rate, check_fields
from nested_jax.cms import CMSConfig
from nested_jax.errors import UserError
from nested_jax.memory import linear, omega
from nested_jax.memory.deep import Rule
from nested_jax.memory.self_modifying import Quantity
from nested_jax.memory.titans import titans_rate
from nested_jax.remat import Checkpoint

Mixer = Literal[
    "self-modifying",
    "titans",
    "gated-delta",
    "delta",
    "linear",
    "oja",
    "lp",
    "huber",
    "omega",
    "attention",
    "sliding-window",
]


@dataclass(frozen=True)
class ModelConfig:
    """A language model: an embedding, `layers` blocks of (sequence layer, CMS), a head.

    A field that does not concern the mixer has no effect.

    Raises UserError for a field of another type or out of range, for sizes that do not divide one another, and for choices
    with which a memory would grow at every token.

    >>> ModelConfig(width=64, mixer="titans").reading
    64
    """

    vocabulary: Count = 256
    """Number of tokens V."""
    width: Count = 128
    """Model width D."""
    layers: Count = 4
    """Number of blocks L."""
    heads: Count = 4
    """Heads H of the sequence layer; D must be a multiple."""
    mixer: Mixer = "self-modifying"
    """The sequence layer of every block."""
    chunk: Count = 64
    """Tokens between two refreshes of the main memory's errors (C_mem), and the length of one parallel product."""
    projection_chunk: Count | None = None
    """The same for the memories that make keys, values, rates and retention (C_proj), where these are generated; None: equal
    to `chunk`."""
    memory_hidden: Count = 32
    """Hidden width of the deep memories' MLPs, per head."""
    momentum: bool = True
    """Whether the deep memories' writes carry momentum."""
    damped: bool = True
    """Whether a deep memory's writes with momentum theta have strength eta (1 - theta), a running mean, or eta, a sum."""
    retention: Literal["zero", "initial", "none"] = "initial"
    """Where a deep memory's content decays to: nothing, or its learned start; none: it does not decay."""
    errors: Literal["boundary", "exact"] = "boundary"
    """Errors that a deep memory's second layer writes: as old as the chunk, or of its weights before the token."""
    step: Literal["proximal", "normalised", "raw"] = "proximal"
    """Step of a deep memory's layers at their inputs x: eta / (1 + eta |x|^2), or eta; normalised is eta / |x|^2 in the
    second layer of the memory that is read, proximal in the others."""
    erase: Literal["layer", "memory", "none"] | None = None
    """Which of a deep memory's layers erase what they hold at their inputs: each, the first alone, whose input is the
    memory's own, or none; None: layer of self-modifying Titans, none of Titans."""
    features: Literal["token", "boundary"] = "token"
    """Weights of the first layer by which a deep memory's second layer is read: those of the token, or of the last chunk
    boundary, as those by which it is written."""
    read: Literal["after", "before", "boundary"] = "after"
    """Whether a deep memory is read after or before its token's own write, or as it was at the last chunk boundary."""
    surprise: Annotated[float, Interval(above=0, finite=False)] = 2.0
    """Largest norm of an error that a token writes into a deep or an omega memory; larger ones are scaled down to it, but
    for exact errors."""
    targets: Literal["l2", "rms", "raw"] = "l2"
    """How the targets and values that self-modifying memories generate are normalised."""
    generated: tuple[Quantity, ...] = ("keys", "values", "rates", "retention")
    """What self-modifying Titans make by memories: any of keys, values, queries, rates and retention; the others are linear
    in the token."""
    values: Literal["unit", "raw"] | None = None
    """Whether the values of fixed projections have unit norm; None: those of Titans, oja, lp, huber and omega do, those of
    linear, delta and gated-delta do not."""
    rates: Literal["shared", "own"] = "shared"
    """Whether the layers of self-modifying memories share one learning rate, or learn several: one of all first layers and
    one of each second layer, that of the main memory with the largest start."""
    max_rate: Rate | None = None
    """Largest learning rate of a memory; None: 1, of Titans 4 / chunk, of lp, Huber and omega memories 2 / (chunk + 1)."""
    gated: bool = True
    """Whether linear, delta, gated-delta and oja memories learn rates and retention, of the token; else these are `max_rate`
    and 1, as in linear attention."""
    window: Count = 256
    """Tokens that sliding-window attention sees, the query's own included."""
    rotary_base: Positive = 10_000.0
    """Base of the frequencies of attention's rotary positions."""
    attention_bias: bool = False
    """Whether attention's queries, keys and values have biases."""
    omega_window: Count = 16
    """Tokens that every update of an omega memory learns from."""
    omega_features: Literal["identity", "polynomial"] = "polynomial"
    """Feature map of an omega memory's keys and queries; polynomial adds their squares."""
    lp_power: Annotated[float, Interval(least=1, most=8)] = 3.0
    """Power p of the l_p memory's objective."""
    huber_threshold: Positive = 1.0
    """Norm of an error from which on the Huber memory's objective is linear."""
    cms: CMSConfig = field(default_factory=CMSConfig)
    """The feed-forward side of every block."""
    memory_policy: Literal["none", "full", "loops", "blocks", "sqrt", "log"] | Count = "full"
    """What the backward pass keeps, the rest it computes again: none, everything; full, all of a block but for its chunks
    and segments of the CMS, of which it keeps the fast state before each; loops, what every block reads, and of its loops
    those states and what they emit, so that a block made again runs none; blocks, what every block reads, and of the block
    that it computes again what full keeps; sqrt, log or a number, as full, with the states that `unroll` keeps by these.
    Values and gradients are the same; `jax.jvp` through a CMS that learns in context needs none."""
    implementation: Literal["auto", "xla", "pallas"] = "auto"
    """What reads memories' whole chunks and attention's tokens: on TPUs Pallas' kernels where there are (auto), always XLA's
    form (xla), or kernels of memories on any machine, slowly but on TPUs (pallas). Blocks inside full meta-gradients have
    XLA's, and so must programs that are split by shardings alone, without `jax.set_mesh`."""
    tie_embeddings: bool = True
    """Whether the head is the transposed embedding."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products; fast state and parameters stay in float32."""

    @cached_property
    def adapting(self) -> int:
        """How many of the last blocks learn in context."""
        return (self.layers if self.cms.blocks is None else self.cms.blocks) if self.cms.periods else 0

    @cached_property
    def attends(self) -> bool:
        """Whether the sequence layer is attention, whose state is a cache of tokens."""
        return self.mixer in ("attention", "sliding-window")

    @cached_property
    def reading(self) -> int:
        """Tokens of the sequence layer's longest chunk; 1 for attention."""
        if self.attends:
            return 1
        return self.projection_chunk or self.chunk if self.mixer == "self-modifying" and self.generated else self.chunk

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """What `memory_policy` has loops over chunks and segments keep."""
        return "full" if self.memory_policy in ("loops", "blocks") else self.memory_policy

    @cached_property
    def rule(self) -> Rule:
        """How deep memories learn."""
        erase = self.erase or ("layer" if self.mixer == "self-modifying" else "none")
        return Rule(erase, self.step, self.errors, self.retention, self.read, self.surprise, self.damped, self.features)

    @cached_property
    def largest_rate(self) -> float:
        """`max_rate` of all but lp, Huber and omega memories, or its default."""
        if self.mixer == "titans":
            return titans_rate(self.chunk, self.max_rate)
        return 1.0 if self.max_rate is None else self.max_rate

    @cached_property
    def alignment(self) -> int:
        """Documents start on multiples of this many tokens: the longest period that counts from a document's start."""
        return math.lcm(self.reading, *self.cms.periods)

    def __post_init__(self):
        check_fields(self, "model.")
        if self.width % self.heads:
            raise UserError(f"model.width {self.width} is not a multiple of model.heads {self.heads}: change one")
        if self.projection_chunk is not None and self.projection_chunk % self.chunk:
            sizes = f"model.projection_chunk {self.projection_chunk} is not a multiple of model.chunk {self.chunk}"
            raise UserError(f"{sizes}: change one")
        if self.alignment > 2**30:
            raise UserError(
                f"model.chunk, projection_chunk and cms.periods have {self.alignment} as least common multiple: give "
                f"numbers for which it is at most 2^30 tokens"
            )
        if self.cms.blocks is not None and self.cms.blocks > self.layers:
            raise UserError(f"model.cms.blocks {self.cms.blocks} must be from 1 to model.layers {self.layers}")
        if self.mixer in ("self-modifying", "titans"):
            self.rule.assert_bounded("model.", self.largest_rate, self.momentum)
        if self.mixer in ("linear", "delta", "gated-delta", "oja"):
            linear.assert_bounded("model.", self.mixer, self.largest_rate, self.values)
        if self.mixer in ("lp", "huber", "omega"):
            power = self.lp_power if self.mixer == "lp" else 2.0
            omega.assert_bounded("model.", self.chunk, self.max_rate, self.surprise, power, self.values)


# Hidden widths of the CMS make the families of one size equal in parameters.
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(vocabulary=1_024, width=128, layers=4, heads=4, memory_hidden=16),
    "140m": dict(vocabulary=32_000, width=768, layers=12, heads=12, memory_hidden=64),
    "340m": dict(vocabulary=32_000, width=1024, layers=24, heads=16, memory_hidden=64),
    "760m": dict(vocabulary=32_000, width=1536, layers=24, heads=16, memory_hidden=96),
    "1.3b": dict(vocabulary=32_000, width=2048, layers=24, heads=32, memory_hidden=64),
}
_MIXERS: dict[str, Mixer] = {
    "hope": "self-modifying",
    "hope-paper": "self-modifying",
    "hope-attention": "attention",
    "titans": "titans",
    "transformer": "attention",
    "linear": "linear",
    "delta": "delta",
    "gated-delta": "gated-delta",
    "oja": "oja",
    "lp": "lp",
    "huber": "huber",
    "omega": "omega",
}
_EXACT: dict[str, Any] = dict(errors="exact", step="normalised", rates="own", features="boundary", momentum=False)
_PAPER: dict[str, Any] = dict(
    targets="raw", step="raw", damped=False, surprise=math.inf, retention="zero", erase="memory", read="boundary"
)
PRESETS = tuple(f"{size}-{family}" for size in _SIZES for family in _MIXERS)


def preset(name: str) -> ModelConfig:
    """The configuration of a preset SIZE-FAMILY.

    Sizes: tiny (1,024 pieces, float32), 140m, 340m, 760m, 1.3b (32,000 pieces, bfloat16). Families: hope, hope-attention,
    titans, transformer, linear, delta, gated-delta, oja, lp, huber, omega; those of one size are within 3 % of one another
    in parameters. The last block of the tiny Hopes learns in context, with CMS periods of 256 and 64 tokens.

    The memories of hope write exact errors by normalised steps of rates of their own, without momentum, and are read by the
    features of the last chunk boundary. From 140m on its heads and chunks are of 128, as a TPU's tiles are.

    hope-paper is hope by the paper's equations to the letter: raw targets and steps, a sum as momentum, decay to zero, an
    erase by the memory's input alone, reads of the last boundary's weights, a CMS that is not clipped. Nothing bounds its
    memories: from random weights they overflow within five chunks. With targets "l2" they do not, but at rates of 1
    within 16,384 tokens.

    Args:
        name: SIZE-FAMILY.

    Returns:
        A `ModelConfig`.

    Raises:
        UserError: the name is unknown.

    >>> preset("tiny-hope").cms.periods
    (256, 64)
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, 3, 0.3)
        raise UserError(f"preset {name!r} is unknown: give SIZE-FAMILY, such as {' or '.join(near) or 'tiny-hope'}")
    size, family = name.split("-", 1)
    options = {"hope": _EXACT, "hope-paper": _PAPER}.get(family, {})
    sizes = _SIZES[size]
    if family == "hope" and size != "tiny":
        sizes = sizes | {"heads": sizes["width"] // 128, "chunk": 128}  # as many as a TPU's tiles have columns
    hope = family.startswith("hope")
    hidden = _cms_hidden(sizes["width"], sizes["heads"], sizes["memory_hidden"], family, 8 if size == "tiny" else 64)
    cms = CMSConfig(
        hidden=(hidden,) * (2 if hope else 1),
        activation="gelu" if hope else "swiglu",
        periods=(256, 64) if hope and size == "tiny" else (),
        blocks=1 if hope and size == "tiny" else None,
        clip=0.0 if family == "hope-paper" else CMSConfig.clip,
    )
    return ModelConfig(
        **sizes,
        **options,
        mixer=_MIXERS[family],
        cms=cms,
        dtype="float32" if size == "tiny" else "bfloat16",
        tie_embeddings=size != "tiny",
    )


def _cms_hidden(width: int, heads: int, memory_hidden: int, family: str, multiple: int) -> int:
    """Hidden width of each CMS level that gives a block of 12 D^2 parameters, counting its matrices."""
    memories = {"self-modifying": 5, "titans": 1}.get(_MIXERS[family], 0) * 2 * heads * (width // heads) * memory_hidden
    matrix = {"linear": 1, "delta": 1, "gated-delta": 1, "oja": 1, "lp": 1, "huber": 1, "omega": 2}.get(family, 0)
    linear = matrix * heads * (width // heads) ** 2
    mixer = (2 if _MIXERS[family] == "self-modifying" else 4) * width**2 + memories + linear
    matrices = 4 if family.startswith("hope") else 3  # two levels of two, or one gated level
    return round((12 * width**2 - mixer) / (matrices * width) / multiple) * multiple
