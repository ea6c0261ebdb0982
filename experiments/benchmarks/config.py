"""What is measured: dataclasses whose fields are the flags of run.py, optimizers.py and meta.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flax import nnx

from nested_jax import CMSConfig, LanguageModel, ModelConfig

HOPE = ModelConfig(
    vocabulary=4096, width=256, layers=4, heads=4, chunk=64, memory_hidden=16, cms=CMSConfig(hidden=(512, 512))
)


@dataclass(frozen=True)
class Config:
    """Time Hope against a Transformer++ of as many parameters, on this machine."""

    lengths: tuple[int, ...] = (512, 2048, 16_384)
    """Tokens T of a row."""
    batches: tuple[int, ...] = (2, 1, 1)
    """Rows B at each length."""
    rounds: tuple[int, ...] = (9, 7, 3)
    """Timed rounds at each length; in a round, every model takes one step."""
    contexts: tuple[int, ...] = (1024, 4096, 16_384, 65_536, 262_144)
    """Tokens read before the decoding of single tokens is timed."""
    decode_tokens: int = 64
    """Tokens decoded at each context in a round."""
    decode_rounds: int = 25
    """Rounds of decoding; in a round, every context has its turn."""
    hope: ModelConfig = HOPE
    """Hope, its CMS frozen."""


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
    """Updates of one square matrix by every optimizer, in turns."""

    width: int = 1024
    """Rows and columns of the matrix."""
    slow_period: int = 8
    """Steps between two steps of m3's slow memory; so many updates are timed together."""
    steps: int = 5
    """Of Newton-Schulz, in Muon and in m3."""
    rounds: int = 9
    """Turns of each optimizer that count."""


@dataclass(frozen=True)
class MetaConfig:
    """Memory and time of derivatives through inner loops."""

    width: int = 256
    """Width of the MLP memory, and of the Transformer."""
    rows: int = 32
    """Keys and values that the MLP memory learns from at each step."""
    lengths: tuple[int, ...] = (64, 256, 1024, 4096)
    """Inner steps T of the MLP memory whose memory is counted."""
    timed: int = 1024
    """Inner steps of the MLP memory that are timed, one of `lengths`."""
    layers: int = 4
    """Layers of the Transformer that is the inner model of mixflow_grad."""
    batch: int = 4
    """Its rows at each step."""
    tokens: int = 256
    """Its tokens of a row."""
    steps: int = 8
    """Its inner steps."""
    rounds: int = 5
    """Timed rounds, in each of which everything has its turn."""
