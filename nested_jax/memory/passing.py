"""A memory's stream that lies on several devices: the state passes from each to the next, a group of rows after the other.

Along the mesh's axis `sequence` device s has the s-th part of the tokens. In round t it reads those of group t - s, from the
state that the device before it has sent, so that all n devices are busy from round n - 1 on. None has more of the stream,
or of what the backward pass keeps, than its part.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from nested_jax.numerics import BATCH, TOKENS, mesh_of_four, vary
from nested_jax.typing import PyTree


def read_passing(
    of_rows: Callable[[PyTree, int], Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]],
    weights: PyTree,
    state: PyTree,
    stream: PyTree,
) -> tuple[PyTree, PyTree]:
    """`of_rows(weights, B)(state, stream)`, where the stream lies along the mesh's sequence.

    Args:
        of_rows: what reads so many rows, from a state at a part's first token: the state after it and outputs, leaves
            (B, T, ...). It uses no other arrays.
        weights: what it reads with.
        state: leaves (B, ...), or () of all rows.
        stream: leaves (B, T, ...); every device's part is one that a reader may start from.

    Returns:
        (state, outputs) of all.
    """
    mesh, rows = mesh_of_four(), jax.tree.leaves(stream)[0].shape[0]
    assert mesh is not None, "`numerics.devices_along` has found one"
    n, split = mesh.shape[TOKENS], math.prod(mesh.shape[name] for name in BATCH)
    groups = math.gcd(rows // split, n) if rows % split == 0 else 1  # each has rows of all devices along the batch

    def grouped(x):
        return jnp.moveaxis(x.reshape(rows // groups, groups, *x.shape[1:]), 1, 0) if x.ndim else jnp.tile(x, groups)

    def whole(x):
        return jnp.moveaxis(x, 0, 1).reshape(rows, *x.shape[2:]) if x.ndim > 1 else x[0]

    def local(weights, states, stream):
        device = jax.lax.axis_index(TOKENS)
        weights, states = vary((weights, states), device)  # so gradients are summed once, after the rounds

        read = of_rows(weights, rows // groups)

        def turn(arrived, t):
            group = jnp.clip(t - device, 0, groups - 1)
            of_group = lambda tree: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, group, keepdims=False), tree)
            begins = (device == 0) | (t < device) | (t - device >= groups)  # but for the first, what is read is left out
            start = jax.tree.map(lambda a, b: jnp.where(begins, a, b), of_group(states), arrived)
            after, outputs = read(start, of_group(stream))
            send = lambda x: jax.lax.ppermute(x, TOKENS, [(i, i + 1) for i in range(n - 1)])
            return jax.tree.map(send, after), (after, outputs)

        first = jax.tree.map(lambda x: jnp.zeros_like(x[0]), states)
        _, turns = jax.lax.scan(turn, first, jnp.arange(groups + n - 1))
        states, outputs = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, device, groups), turns)
        return jax.tree.map(lambda x: x[None], states), outputs

    along = P(None, None, TOKENS)
    passed = jax.shard_map(local, in_specs=(P(), P(), along), out_specs=(P(TOKENS), along), axis_names={TOKENS})
    states, outputs = passed(weights, *jax.tree.map(grouped, (state, stream)))
    return jax.tree.map(lambda x: whole(x[-1]), states), jax.tree.map(whole, outputs)
