"""Streams whose tokens lie on several devices: what passes between those.

A memory's state passes from each device to the next, a group of rows after the other. Along the mesh's axis `sequence`
device s has the s-th part of the tokens. In round t it reads those of group t - s, from the state that the device before it
has sent, so that all n devices are busy from round n - 1 on. None has more of the stream, or of what is kept for the
backward pass, than its part.

Keys and values of attention go to all devices, and each reads a part of the queries from all over the sequence, so that none
has more keys to read than the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from nested_jax.numerics import BATCH, HEADS, TOKENS, mesh_of_four, vary
from nested_jax.typing import Array, Float, Int, PyTree


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


def read_spread(
    read: Callable[..., Float[Array, "B G P H K"]],
    groups: int,
    q: Float[Array, "B T H K"],
    keys: Float[Array, "B T H K"],
    values: Float[Array, "B T H K"],
    number: Int[Array, "B T"],
    kernel: PyTree = (),
    places: PyTree = (),
    *,
    check: bool = True,
) -> Float[Array, "B T H K"]:
    """Reads of queries that lie along the mesh's sequence, on n devices: of each of so many groups of T / G tokens every
    device reads P = T / G / n queries.

    Args:
        read: (kernel, q (B, G, P, H, K), their numbers (B, G, P), keys, values and numbers of all T tokens) -> reads.
        groups: G, a multiple of n.
        q, keys, values: of all tokens; the mesh's axes divide rows, tokens and heads.
        number: of each token, what tells documents apart.
        kernel: what else it reads with, and
        places: the axes of the mesh that each leaf of it lies along.
        check: whether JAX checks what is the same on all devices, which no Pallas kernel says.

    Returns:
        What the queries read.
    """

    def local(kernel, q, keys, values, number):
        n, (B, T) = jax.lax.axis_size(TOKENS), number.shape
        whole = [jax.lax.all_gather(x, TOKENS, axis=1, tiled=True) for x in (keys, values, number)]

        def spread(x):
            x = x.reshape(B, groups // n, n, T // groups, *x.shape[2:])
            return jax.lax.all_to_all(x, TOKENS, 2, 1, tiled=True).squeeze(2)

        y = read(kernel, spread(q), spread(number), *whole)
        y = jax.lax.all_to_all(y[:, :, None], TOKENS, 1, 2, tiled=True)
        return y.reshape(B, T, *y.shape[-2:])

    rows, heads = P(BATCH, TOKENS), P(BATCH, TOKENS, HEADS)
    specs = (places, heads, heads, heads, rows)
    return jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=check)(kernel, q, keys, values, number)
