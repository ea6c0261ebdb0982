"""Configs of the benchmarks; their fields are the flags of run.py, optimizers.py, meta.py, tpu_static.py and
rounding.py."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from flax import nnx

from nested_jax import CMSConfig, LanguageModel, ModelConfig
from nested_jax.checks import Count
from nested_jax.errors import UserError

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from flags import Counts
from record import Runs

HOPE = ModelConfig(
    vocabulary=4096, width=256, layers=4, heads=4, chunk=64, memory_hidden=16, cms=CMSConfig(hidden=(512, 512))
)


@dataclass(frozen=True)
class Config:
    """Time Hope against a Transformer++ of as many parameters, on this machine."""

    lengths: Counts = (512, 2048, 16_384)
    """Tokens T of a row."""
    batch_sizes: Counts = (2, 1, 1)
    """Rows B at each length."""
    rounds: Counts = (9, 7, 3)
    """Timed rounds at each length; in a round, every model takes one step."""
    contexts: Counts = (1024, 4096, 16_384, 65_536, 262_144)
    """Tokens of context before the decoding of single tokens is timed."""
    decode_tokens: Count = 64
    """Tokens decoded at each context in a round."""
    decode_rounds: Count = 25
    """Rounds of decoding; in a round, every context is timed once."""
    hope: ModelConfig = HOPE
    """Hope, its CMS frozen."""

    def __post_init__(self):
        flags.check(self, "lengths", "contexts")
        if not len(self.lengths) == len(self.batch_sizes) == len(self.rounds):
            raise UserError(f"{flags.given(self, 'lengths')}: give as many --batch-sizes and --rounds")


def transformer(hope: ModelConfig) -> ModelConfig:
    """The Transformer++ whose number of parameters is nearest."""
    made = lambda hidden: replace(hope, mixer="attention", cms=CMSConfig(hidden=(hidden,), activation="swiglu"))
    return min((made(8 * n) for n in range(1, 256)), key=lambda config: abs(parameters(config) - parameters(hope)))


def in_context(hope: ModelConfig) -> ModelConfig:
    """Hope whose fastest CMS level, in the last quarter of the blocks, learns every chunk, with full meta-gradients."""
    return replace(hope, cms=replace(hope.cms, periods=(hope.chunk,), blocks=max(1, hope.layers // 4)))


def parameters(config: ModelConfig) -> int:
    """Number of learned parameters."""
    return nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))).parameters


@dataclass(frozen=True)
class OptimizersConfig:
    """Time updates of one square matrix by every optimizer."""

    width: Count = 1024
    """Rows and columns of the matrix."""
    slow_period: Count = 8
    """Steps between two steps of m3's slow memory; so many updates are timed together."""
    steps: Count = 5
    """Newton-Schulz steps, in Muon and in m3."""
    rounds: Count = 9
    """Timed rounds."""

    def __post_init__(self):
        flags.check(self)


@dataclass(frozen=True)
class MetaConfig:
    """Memory and time of derivatives through inner loops."""

    width: Count = 256
    """Width of the MLP memory, and of the Transformer."""
    rows: Count = 32
    """Pairs of keys and values in a batch of the MLP memory."""
    lengths: Counts = (64, 256, 1024, 4096)
    """Inner steps T of the MLP memory whose memory is counted."""
    timed: Count = 1024
    """Inner steps of the MLP memory that are timed, one of `lengths`."""
    layers: Count = 4
    """Layers of the Transformer, the inner model of mixflow_grad."""
    batch_size: Count = 4
    """Rows B of a Transformer's batch."""
    tokens: Count = 256
    """Tokens T of a row."""
    steps: Count = 8
    """Inner steps of the Transformer."""
    rounds: Count = 5
    """Timed rounds; in a round, everything is timed once."""

    def __post_init__(self):
        flags.check(self, "lengths")
        if self.timed not in self.lengths:
            raise UserError(f"--timed {self.timed}: give one of {flags.given(self, 'lengths')}")


TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SIZES, FAMILIES = ("140m", "340m", "760m", "1.3b"), ("hope", "titans", "gated-delta", "delta", "linear", "transformer")
STEPS = {f"140m-{family}": (2048, 8192) for family in ("hope", "transformer")}
"""Tokens of whole steps that are compiled: other lengths are on the line through both."""
TOKENS = (2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
KERNELS = tuple(
    [f"v5e {preset}, a step of {tokens} tokens" for preset, windows in STEPS.items() for tokens in windows]
    + [f"{chip} {size}-{family}" for chip in TOPOLOGIES for size in SIZES for family in FAMILIES]
)  # fmt: skip


@dataclass(frozen=True)
class Static(Runs):
    """Count the bundles of memories' and attention's kernels on TPUs, compiled by libtpu; nothing is run."""

    jobs: Count = 1
    rows: tuple[str, ...] = KERNELS
    """Steps, and layers by chip and preset."""

    def __post_init__(self):
        flags.check(self, "rows")
        flags.check_known(self, "rows", KERNELS)


@dataclass(frozen=True)
class Rounding:
    """Read with products of bfloat16, by XLA's form and by kernels, beside float64."""

    width: Count = 64
    """D, of one head."""
    chunk: Count = 64
    """Tokens C of a chunk."""
    chunks: Count = 4
    """Chunks of the stream."""
    seed: flags.Seed = 0
    """Of weights and tokens."""
    fresh: bool = False
    """Replace results of other flags."""

    def __post_init__(self):
        flags.check(self)
