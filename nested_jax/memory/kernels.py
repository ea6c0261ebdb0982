"""Which memories are read by Pallas' kernels, and why others are not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from nested_jax.numerics import BATCH, HEADS, TOKENS, devices_along, mesh_divides, mesh_of_four, tpu_kind

if TYPE_CHECKING:
    from nested_jax.memory.pallas.form import Form
    from nested_jax.memory.stream import MemoryLayer

_LANES, _ROWS = 128, 16  # of a TPU's tiles of bfloat16
_MAPS = 8
_SMALL = ("TPU v2", "TPU v3", "TPU v4", "TPU v4 lite")  # 16 MiB
VMEM = 48 * 2**20
"""Bytes of a chip's fast memory that kernels take at most."""


def kernel_of(layer: MemoryLayer, shape: tuple[int, ...], dtype: Any) -> Form | str:
    """How kernels read the layer's whole chunks of tokens (B, T, D) of a type, or why XLA compiles them, in words."""
    B, T, _ = shape
    H, K = layer.heads, layer.width // layer.heads
    if layer.implementation == "xla":
        return "implementation is xla"
    if (kind := tpu_kind()) is None and layer.implementation == "auto":
        return "there is no TPU"
    if is_symbolic_dim(B) or is_symbolic_dim(T):
        return "its sizes are symbols"
    if layer.chunk > T:
        return f"{T} tokens are no chunk of {layer.chunk}"
    if layer.checkpoint not in ("none", "full"):
        return f"checkpoint {layer.checkpoint!r} keeps fewer states than kernels do"
    if devices_along(TOKENS, max(1, T // layer.chunk)) > 1:
        return "its tokens lie along the mesh's sequence"
    mesh, around = mesh_of_four(), jax.sharding.get_abstract_mesh()
    if mesh is None and not around.empty and not (kind and set(around.manual_axes) == set(around.axis_names)):
        return "the mesh around is neither one of nested_jax.parallel nor a TPU's in jax.shard_map"
    if mesh is not None and not mesh_divides((B, H), BATCH, HEADS):
        return f"the mesh does not divide {B} rows and {H} heads"
    form = layer.form(dtype)
    if isinstance(form, str) or kind is None:
        return form
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"its tokens are {jnp.dtype(dtype).name}"
    if kind in _SMALL:
        return f"a {kind} has too little fast memory"
    if layer.chunk % _ROWS:
        return f"chunk {layer.chunk} is no multiple of {_ROWS}"
    if K < 8:
        return f"heads of {K} are narrower than 8"
    if form.hidden is not None and form.hidden % 8:
        return f"its hidden width {form.hidden} is no multiple of 8"
    heads = H // (1 if mesh is None else mesh.shape[HEADS])
    together = heads_at_once(heads, K, form.maps)
    if together * form.maps > 4 * _MAPS:
        return f"{together} heads of {K} together would fill lanes: too many"
    needed = together * (10 * form.bytes + 40 * form.maps * layer.chunk**2)  # blocks twice, inverses and tiles
    return f"its states and chunks need {needed >> 20} MiB of fast memory" if needed > VMEM * 2 // 3 else form


def heads_at_once(heads: int, width: int, maps: int) -> int:
    """Heads of K = `width` and so many linear maps that one program of a kernel reads.

    Their vectors fill a tile's lanes. Of those numbers the largest with which at most `_MAPS` maps are at work, or the
    least: one map's operations wait for one another, those of many do not find room in the registers.
    """
    least = _LANES // math.gcd(width, _LANES)
    numbers = [n for n in range(least, heads + 1, least) if heads % n == 0] or [heads]
    return max([n for n in numbers if n * maps <= _MAPS], default=numbers[0])
