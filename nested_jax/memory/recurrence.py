"""The recurrence that every parametric memory with an input-side erase shares, token by token and chunk-parallel.

For one linear map W (V x K) with layer inputs x, output errors delta, write strength eta, erase strength beta, retention
alpha, momentum decay theta and queries q:

    S_t = theta_t S_{t-1} - eta_t delta_t x_t^T
    W_t = alpha_t W_{t-1} - beta_t (W_{t-1} x_t) x_t^T + S_t          y_t = W_t q_t

`tokenwise` is that definition. `chunked` computes the same with matrix products only: the erase couples the tokens of a
chunk through one unit lower triangular system. With an anchor, W = anchor + E and only E decays.

Leading axes are batch axes and need only broadcast against one another: arrays of unequal batch shapes must have equal
rank, with axes of length 1 where they repeat. What is shared that way is computed once.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nested_jax.typing import Array, Bool, Float, PyTree

HIGHEST = jax.lax.Precision.HIGHEST  # for the triangular system: a TPU's default product of float32 is bfloat16


class MemoryState(NamedTuple):
    """Fast state of one linear map: its weights, and the momentum of its writes (None for none)."""

    weights: Float[Array, "*batch V K"]
    momentum: Float[Array, "*batch V K"] | None = None


class Gates(NamedTuple):
    """Strengths of a chunk's tokens: write eta, erase beta, retain alpha in [0, 1], momentum theta in [0, 1] or None."""

    write: Float[Array, "*batch C"]
    erase: Float[Array, "*batch C"]
    retain: Float[Array, "*batch C"]
    momentum: Float[Array, "*batch C"] | None = None


def tokenwise(
    state: MemoryState,
    inputs: Float[Array, "*batch C K"],
    errors: Float[Array, "*batch C V"],
    gates: Gates,
    queries: Float[Array, "*batch C K"] | None,
    *,
    anchor: Float[Array, "*batch V K"] | None = None,
    mask: Bool[Array, "*batch C"] | None = None,
) -> tuple[MemoryState, Float[Array, "*batch C V"] | None]:
    """The recurrence as it is defined, one token after the other: the slow twin of `chunked`, same arguments."""
    _together(state, gates)
    state, inputs, errors, gates, queries = upcast(state, inputs, errors, gates, queries)
    gates, keep = _empty_slots(gates, mask)
    anchor = jnp.zeros_like(state.weights) if anchor is None else anchor
    batch = _batch(state, inputs, errors, gates, queries, anchor)
    spread = lambda x, axes: jnp.broadcast_to(x, batch + x.shape[x.ndim - axes :])

    def step(carry, token):
        weights, momentum = carry
        x, delta, q, write, erase, retain, theta, m = token
        momentum = theta[..., None, None] * momentum - (write[..., None] * delta)[..., :, None] * x[..., None, :]
        erased = jnp.einsum("...vk,...k->...v", weights, x)
        weights = (
            anchor
            + retain[..., None, None] * (weights - anchor)
            - (erase[..., None] * erased)[..., :, None] * x[..., None, :]
            + m[..., None, None] * momentum
        )
        return (weights, momentum), jnp.einsum("...vk,...k->...v", weights, q)

    theta = jnp.zeros_like(gates.write) if gates.momentum is None else gates.momentum
    momentum = jnp.zeros_like(state.weights) if state.momentum is None else state.momentum
    q = inputs if queries is None else queries
    tokens = [jnp.moveaxis(spread(x, 2), -2, 0) for x in (inputs, errors, q)]
    tokens += [jnp.moveaxis(spread(g, 1), -1, 0) for g in (gates.write, gates.erase, gates.retain, theta, keep)]
    carry, outputs = jax.lax.scan(step, (spread(state.weights, 2), spread(momentum, 2)), tuple(tokens))
    final = MemoryState(carry[0], None if state.momentum is None else carry[1])
    return final, None if queries is None else jnp.moveaxis(outputs, 0, -2)


def chunked(
    state: MemoryState,
    inputs: Float[Array, "*batch C K"],
    errors: Float[Array, "*batch C V"],
    gates: Gates,
    queries: Float[Array, "*batch C K"] | None,
    *,
    anchor: Float[Array, "*batch V K"] | None = None,
    mask: Bool[Array, "*batch C"] | None = None,
) -> tuple[MemoryState, Float[Array, "*batch C V"] | None]:
    """The recurrence over one chunk, by matrix products.

    Args:
        state: weights (..., V, K) and momentum (..., V, K) before the first token.
        inputs: what each token writes at, (..., C, K).
        errors: what each token writes, negated: (..., C, V).
        gates: strengths (..., C); beta |x|^2 <= 1 keeps the erase a contraction.
        queries: (..., C, K), each read after its own token was written; None to read nothing.
        anchor: (..., V, K), where retention decays to; None for zero.
        mask: (..., C), False for empty slots, which leave the state as it is. Reads there are of no meaning.

    Returns:
        (state after the last token, outputs (..., C, V) or None), in float32 (or float64).

    Raises:
        ValueError: a momentum without its decay, or a decay without its momentum.

    Exactly zero gates are allowed, in gradients too. Source: NL Eq. 64-65, 88, 93; derivation in the module's docstring.

    >>> import jax.numpy as jnp
    >>> key, value = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 3.0]])
    >>> gate = jnp.ones(1)
    >>> state, read = chunked(MemoryState(jnp.zeros((2, 2))), key, -value, Gates(gate, gate, gate), key)
    >>> read.tolist()
    [[0.0, 3.0]]
    """
    written = write(state, inputs, errors, gates, anchor=anchor, mask=mask)
    return written.state, None if queries is None else read(written, queries)


class Written(NamedTuple):
    """One chunk's writes, ready to be read at any of its tokens (`read`)."""

    state: MemoryState
    before: MemoryState
    anchor: Array | None
    inputs: Array
    written: Array  # diag(eta) errors
    erased: Array  # diag(beta) W_{t-1} x_t
    retained: Array  # A, (C, C): retention from after token s to after token t
    carried: Array  # c = A diag(m) Theta, (C, C): the same for writes, through momentum
    retention: Array  # gamma, (C): retention from the chunk's start
    inertia: Array | None  # pi, (C): weight of the starting momentum


def write(state, inputs, errors, gates, *, anchor=None, mask=None) -> Written:
    """The state after a chunk, and what `read` needs for the states inside it. Arguments as of `chunked`."""
    _together(state, gates)
    state, inputs, errors, gates = upcast(state, inputs, errors, gates)
    gates, keep = _empty_slots(gates, mask)
    retained = _decay(gates.retain)
    retention = retained[..., 0] * gates.retain[..., :1]
    if gates.momentum is None:
        carried, inertia = retained * keep[..., None, :], None
    else:
        momentum_decay = _decay(gates.momentum)
        carried = _mm(retained * keep[..., None, :], momentum_decay)
        from_start = momentum_decay[..., 0] * gates.momentum[..., :1]
        inertia = _mm(retained, (keep * from_start)[..., None])[..., 0]

    overlap = _mm(inputs, _t(inputs))
    before = _shift(retention, 1.0)[..., None] * _mm(inputs, _t(_minus(state.weights, anchor)))
    if anchor is not None:
        before += _mm(inputs, _t(anchor))
    if inertia is not None:
        before += _shift(inertia, 0.0)[..., None] * _mm(inputs, _t(state.momentum))
    written = gates.write[..., None] * errors
    before -= _mm(_shift_rows(carried) * overlap, written)
    erased = _mm(_unit_lower_inverse(_shift_rows(retained) * overlap * gates.erase[..., None, :]), before, HIGHEST)
    erased *= gates.erase[..., None]

    last = carried[..., -1, :, None] * written + retained[..., -1, :, None] * erased
    weights = retention[..., -1, None, None] * _minus(state.weights, anchor) - _mm(_t(last), inputs)
    if anchor is not None:
        weights += anchor
    momentum = None
    if inertia is not None:
        weights += inertia[..., -1, None, None] * state.momentum
        momentum = from_start[..., -1, None, None] * state.momentum
        momentum -= _mm(_t(momentum_decay[..., -1, :, None] * written), inputs)
    after = MemoryState(weights, momentum)
    return Written(after, state, anchor, inputs, written, erased, retained, carried, retention, inertia)


def read(chunk: Written, queries: Float[Array, "*batch C K"], *, before: bool = False) -> Float[Array, "*batch C V"]:
    """W_t q_t at every token t of a chunk, each after its own write; W_{t-1} q_t with `before`."""
    if before:
        chunk = chunk._replace(
            retained=_shift_rows(chunk.retained),
            carried=_shift_rows(chunk.carried),
            retention=_shift(chunk.retention, 1.0),
            inertia=None if chunk.inertia is None else _shift(chunk.inertia, 0.0),
        )
    queries = queries.astype(chunk.retention.dtype)
    overlap = _mm(queries, _t(chunk.inputs))
    outputs = chunk.retention[..., None] * _mm(queries, _t(_minus(chunk.before.weights, chunk.anchor)))
    if chunk.anchor is not None:
        outputs += _mm(queries, _t(chunk.anchor))
    if chunk.inertia is not None:
        outputs += chunk.inertia[..., None] * _mm(queries, _t(chunk.before.momentum))
    return outputs - _mm(chunk.carried * overlap, chunk.written) - _mm(chunk.retained * overlap, chunk.erased)


@jax.custom_jvp
def _decay(gate: Float[Array, "*batch C"]) -> Float[Array, "*batch C C"]:
    """Lower triangle of products of gates: [t, s] = gate_{s+1} ... gate_t, 1 on the diagonal, 0 above it."""
    size = gate.shape[-1]
    below = jnp.tril(jnp.ones((size, size), bool), -1)
    factors = jnp.where(below, gate[..., :, None], 1.0)
    return jnp.where(jnp.tril(jnp.ones_like(below)), jnp.cumprod(factors, axis=-2), 0.0)


@_decay.defjvp
def _decay_jvp(primals, tangents):
    """d[t, s] = sum_u [t, u] dgate_u [u - 1, s]: exact at zero gates too, where a logarithm is not."""
    products = _decay(*primals)
    return products, _mm(products * tangents[0][..., None, :], _shift_rows(products))


@jax.custom_jvp
def _unit_lower_inverse(lower: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """(I + lower)^-1 for a strictly lower triangular matrix, by inverting blocks of 8, 16, 32, ... rows.

    Eight rows L have L^8 = 0, so that (I + L)^-1 = (I - L)(I + L^2)(I + L^4); over more rows that series loses digits.
    Where blocks P and Q on the diagonal are inverted, the block B below them becomes -Q^-1 B P^-1.
    """
    size, block = lower.shape[-1], 8
    full = max(block, 1 << (size - 1).bit_length())
    lower = jnp.pad(lower, [(0, 0)] * (lower.ndim - 2) + [(0, full - size)] * 2)

    def blocks(row, column, every):
        """Blocks of the matrix at (row, column), (row + every, column + every), ..., stacked."""
        corners = range(0, full, every)
        cut = [lower[..., i + row : i + row + block, i + column : i + column + block] for i in corners]
        return jnp.stack(cut, axis=-3)

    tiles = blocks(0, 0, block)
    square = _mm(tiles, tiles, HIGHEST)
    one = jnp.expand_dims(jnp.eye(block, dtype=lower.dtype), tuple(range(tiles.ndim - 2)))
    inverse = _mm(_mm(one - tiles, one + square, HIGHEST), one + _mm(square, square, HIGHEST), HIGHEST)
    while block < full:
        below = blocks(block, 0, 2 * block)
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -_mm(_mm(second, below, HIGHEST), first, HIGHEST)
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, second], axis=-1)], axis=-2)
        block *= 2
    return inverse[..., 0, :size, :size]


@_unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals, tangents):
    inverse = _unit_lower_inverse(*primals)
    return inverse, -_mm(_mm(inverse, tangents[0], HIGHEST), inverse, HIGHEST)


def _together(state: MemoryState, gates: Gates) -> None:
    if (state.momentum is None) != (gates.momentum is None):
        missing = "state.momentum" if state.momentum is None else "gates.momentum"
        raise ValueError(f"{missing} is None: a memory has both a momentum and its decay, or neither")


def upcast(*trees: PyTree) -> PyTree:
    """Fast state and accumulation are float32 whatever the inputs are (float64 stays)."""
    trees = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), trees)
    return trees[0] if len(trees) == 1 else trees


def _empty_slots(gates: Gates, mask: Array | None) -> tuple[Gates, Array]:
    """Gates that do nothing at empty slots, and the multiplier m of `+ S_t`."""
    if mask is None:
        return gates, jnp.ones_like(gates.write)
    off = lambda gate, value: None if gate is None else jnp.where(mask, gate, value)
    gates = Gates(off(gates.write, 0.0), off(gates.erase, 0.0), off(gates.retain, 1.0), off(gates.momentum, 1.0))
    return gates, mask.astype(gates.write.dtype)


def _batch(state, inputs, errors, gates, queries, anchor):
    matrices = [x for x in (state.weights, state.momentum, inputs, errors, queries, anchor) if x is not None]
    return jnp.broadcast_shapes(*(x.shape[:-2] for x in matrices), *(g.shape[:-1] for g in gates if g is not None))


def _mm(a: Array, b: Array, precision: jax.lax.Precision | None = None) -> Array:
    return jnp.matmul(a, b, precision=precision)


def _t(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _minus(weights: Array, anchor: Array | None) -> Array:
    return weights if anchor is None else weights - anchor


def _shift(x: Float[Array, "*batch C"], first: float) -> Float[Array, "*batch C"]:
    """One token later, `first` at the start."""
    return jnp.concatenate([jnp.full_like(x[..., :1], first), x[..., :-1]], axis=-1)


def _shift_rows(x: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """One row down, zeros in the first."""
    return jnp.concatenate([jnp.zeros_like(x[..., :1, :]), x[..., :-1, :]], axis=-2)
