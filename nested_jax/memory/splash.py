"""Softmax attention by a TPU's own kernel, which has no T x T scores in memory: Pallas' splash attention.

It has a first derivative and no second one, nor a forward mode.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nested_jax.memory.passing import read_spread
from nested_jax.numerics import BATCH, HEADS, TOKENS, mesh_divides, mesh_of_four, tpu_kind
from nested_jax.typing import Array, Float, Int

_BLOCKS = (512, 256, 128)  # queries, or keys, at a time


def fits(shape: tuple[int, ...]) -> bool:
    """Whether the kernel can read queries (B, T, H, K): on a TPU, in whole tiles of tokens, on each device of a mesh too."""
    mesh = mesh_of_four()
    if not on_tpu() or shape[1] % (_BLOCKS[-1] * (1 if mesh is None else mesh.shape[TOKENS] ** 2)):
        return False
    return jax.sharding.get_abstract_mesh().empty if mesh is None else mesh_divides(shape, BATCH, TOKENS, HEADS)


def block_of(tokens: int) -> int:
    """The largest block that divides a device's queries of a group, or all keys.

    >>> block_of(1280)
    256
    """
    return next(size for size in _BLOCKS if tokens % size == 0)


def on_tpu() -> bool:
    """Whether what is traced will run on TPUs."""
    return tpu_kind() is not None


def splash(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H K"],
    document: Int[Array, "B T"],
    window: int | None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """Causal attention inside documents.

    Args:
        q, k, v: queries, keys and values of the same tokens.
        document: a number for each token, the same for those of one document.
        window: tokens that a query sees, its own included; None for all.
        interpret: runs anywhere, slowly: for tests.

    Returns:
        What the queries read.
    """
    (_, T, H, K), mesh = q.shape, mesh_of_four()
    n, heads = (1, 1) if mesh is None else (mesh.shape[TOKENS], mesh.shape[HEADS])
    kernel = _kernel(T, H // heads, n, window, interpret)
    q = (q.astype(jnp.float32) * K**-0.5).astype(q.dtype)
    if mesh is None:
        return _read(kernel, q[:, None], document[:, None], k, v, document)[:, 0]
    places = kernel.manual_sharding_spec(NamedSharding(mesh, P(None, TOKENS)))
    return read_spread(_read, n, q, k, v, document, kernel, places, check=False)  # a kernel is not split by itself


def _kernel(T: int, heads: int, n: int, window: int | None, interpret: bool) -> Any:
    """The kernel of n devices, of which each has its part of every one of n groups of queries, see `read_spread`."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    part = T // n**2
    queries = dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), block_of(part))
    keys = dict.fromkeys(("block_kv", "block_kv_dkv", "block_kv_dq"), block_of(T))
    mask = pallas.LocalMask((T, T), (window - 1, 0), 0) if window else pallas.CausalMask((T, T))
    mask.q_sequence = mask.q_sequence.reshape(n, n, part).swapaxes(0, 1).ravel()
    every = pallas.MultiHeadMask([mask] * heads)
    sizes = pallas.BlockSizes(**queries, **keys)
    return pallas.make_splash_mha(every, block_sizes=sizes, head_shards=1, q_seq_shards=n, interpret=interpret)


def _read(kernel, q, document, keys, values, documents):
    """Reads of queries (B, G, P, H, K)."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    first = lambda x: x.reshape(x.shape[0], -1, *x.shape[-2:]).swapaxes(1, 2)
    of_row = lambda q, k, v, d, documents: kernel(q, k, v, pallas.SegmentIds(d, documents))
    y = jax.vmap(of_row)(first(q), first(keys), first(values), document.reshape(len(q), -1), documents)
    return y.swapaxes(1, 2).reshape(q.shape)
