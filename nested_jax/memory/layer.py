"""The protocol of sequence layers. `stream.MemoryLayer` is what those built on a memory share."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from nested_jax.level import Level
from nested_jax.typing import Array, Bool, Float, Position, PyTree


@runtime_checkable
class SequenceLayer(Protocol):
    """A map from T tokens to T outputs that remembers what it has read: a frozen dataclass of options, without arrays.

    Weights are learned by an outer level; the state is what the layer learns, or keeps, while reading. Both are pytrees.
    Rows of a batch are independent, and output t depends on tokens up to t. Any split of a sequence into calls gives the
    same outputs and the same last state, if each call is given the position at which it begins.
    """

    def init_weights(self, key: Array) -> dict[str, PyTree]:
        """Random weights, float32, from a key of `jax.random`. Those of memories' starts are called "start"."""
        ...

    def init_state(self, weights: PyTree, batch_size: int, max_length: int | None = None) -> PyTree:
        """The state before the first token, leaves (B, ...): a differentiable function of the weights.

        Args:
            weights: as of `init_weights`.
            batch_size: rows B.
            max_length: most tokens that a cache holds, for layers with one; None: it grows.

        Raises:
            UserError: batch_size or max_length is no whole number from 1.
        """
        ...

    def __call__(
        self,
        weights: PyTree,
        state: PyTree,
        x: Float[Array, "B T D"],
        position: Position,
        *,
        reset: Bool[Array, "B T"] | None = None,
        aligned: bool = False,
    ) -> tuple[PyTree, Float[Array, "B T D"]]:
        """Reads T more tokens.

        Args:
            weights: as of `init_weights`.
            state: of `init_state`, or of the call before.
            x: tokens, float32 or bfloat16.
            position: tokens that the state has read, or any other number on the same place of the layer's grid: of it only
                that place counts and whether it is 0, so that it may turn back before an int32 ends, see `stream.bounded`.
            reset: true where a row's document starts, on the layer's grid of chunks: the state restarts before that token.
            aligned: a promise that the position is on that grid, though it is not known while tracing.

        Returns:
            (state after the last token, outputs of x's type).

        Raises:
            UserError: x is not of floats (B, T, D), with the state's rows, the layer's width and at least a token; reset is
                not of bools (B, T), or is true off the grid (noticed where it and the position are known).
        """
        ...

    def levels(self, weights: PyTree, batch_size: int) -> tuple[Level, ...]:
        """What learns in it, fastest first."""
        ...


class LayerState(NamedTuple):
    """Fast state of a layer built on a memory: that of the memory's level, and the last inputs of the convolution."""

    memory: PyTree
    recent: Float[Array, "B 3 D"]
