"""Associative memories that learn while reading. A layer is a `SequenceLayer`: (weights, state, x, position) -> (state, y).

| layer | memory | learns by |
|---|---|---|
| `Attention` | the tokens themselves | nothing: softmax attention, full or sliding-window, is a closed form |
| `LinearMemory` | a matrix per head | Hebbian rule with decay, delta, gated delta or Oja's rule |
| `OmegaMemory` | a matrix per head | gradient descent on a window of tokens, by an l2, l_p or Huber objective |
| `Titans` | an MLP per head | gradient descent with momentum and decay, from fixed projections |
| `SelfModifyingTitans` | five MLPs per head | delta gradient descent; keys, values, rates and retention are memories too |

`Rule` holds the options of the deep memories. `chunked` and `tokenwise` are the recurrence that all matrix and deep memories
share, by matrix products and as it is defined; `MemoryState` and `Gates` are its state and its gates. A layer of your own is
a `MemoryLayer`, or anything with the methods of `SequenceLayer`. Slow twins of all layers are in `memory.reference`.
"""

from nested_jax.memory.attention import Attention
from nested_jax.memory.deep import Rule
from nested_jax.memory.layer import SequenceLayer
from nested_jax.memory.linear import LinearMemory
from nested_jax.memory.omega import OmegaMemory
from nested_jax.memory.recurrence import Gates, MemoryState, chunked, tokenwise
from nested_jax.memory.self_modifying import SelfModifyingTitans
from nested_jax.memory.stream import MemoryLayer
from nested_jax.memory.titans import Titans

__all__ = [
    "Attention",
    "Gates",
    "LinearMemory",
    "MemoryLayer",
    "MemoryState",
    "OmegaMemory",
    "Rule",
    "SelfModifyingTitans",
    "SequenceLayer",
    "Titans",
    "chunked",
    "tokenwise",
]
