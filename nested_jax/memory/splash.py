"""Softmax attention by a TPU's own kernel, which has no T x T scores in memory: Pallas' splash attention.

It has a first derivative and no second one, nor a forward mode.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from nested_jax.numerics import BATCH, HEADS, TOKENS, mesh_of_four
from nested_jax.typing import Array, Float, Int

_BLOCKS = (512, 256, 128)  # queries and keys at a time: the largest that divides T


def fits(q: Float[Array, "B T H K"]) -> bool:
    """Whether the kernel can read these queries: on a TPU, tokens in whole tiles, and on a mesh that splits no sequence."""
    (B, T, H, _), mesh = q.shape, mesh_of_four()
    if not on_tpu() or T % _BLOCKS[-1]:
        return False
    if mesh is None:
        return jax.sharding.get_abstract_mesh().empty
    rows = mesh.shape[BATCH[0]] * mesh.shape[BATCH[1]]
    return mesh.shape[TOKENS] == 1 and B % rows == 0 and H % mesh.shape[HEADS] == 0


def on_tpu() -> bool:
    """Whether what is traced will run on TPUs: those of JAX's mesh, else those that it puts arrays on."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.device_kind.startswith("TPU")
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return (default.platform if isinstance(default, jax.Device) else default or jax.default_backend()) == "tpu"


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
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    T, K = q.shape[1], q.shape[-1]
    block = next(size for size in _BLOCKS if T % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes = pallas.BlockSizes(**dict.fromkeys(names, block))
    mask = pallas.LocalMask((T, T), (window - 1, 0), 0) if window else pallas.CausalMask((T, T))

    def read(q, k, v, document):
        heads = pallas.MultiHeadMask([mask] * q.shape[2])
        kernel = pallas.make_splash_mha(heads, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
        of_row = lambda q, k, v, d: kernel(q, k, v, pallas.SegmentIds(d, d))
        first = lambda x: x.swapaxes(1, 2)
        return first(jax.vmap(of_row)(first(q), first(k), first(v), document))

    q = (q.astype(jnp.float32) * K**-0.5).astype(q.dtype)
    if mesh_of_four() is not None:  # a kernel is not split by itself
        places = P(BATCH, None, HEADS)
        read = jax.shard_map(read, in_specs=(places, places, places, P(BATCH)), out_specs=places, check_vma=False)
    return read(q, k, v, document)
