"""The recurrence that every parametric memory with an input-side erase shares, token by token and chunk-parallel.

For one linear map W (V x K) with layer inputs x, output errors delta, write strength eta, erase strength beta, retention
alpha, momentum decay theta and queries q:

    S_t = theta_t S_{t-1} - eta_t delta_t x_t^T
    W_t = alpha_t W_{t-1} - beta_t (W_{t-1} x_t) x_t^T + S_t          y_t = W_t q_t

`tokenwise` is that definition. `chunked` computes the same with matrix products only: the erase couples the tokens of a
chunk through one unit lower triangular system. With an anchor, W = anchor + E and only E decays.

Errors are given, or, where they are linear in the weights, exact: delta_t = W_{t-1} x_t + e_t, of which e_t is given. Then
the writes are part of that system, which gets no larger.

Leading axes are batch axes and need only broadcast against one another: arrays of unequal batch shapes must have equal
rank, with axes of length 1 where they repeat. What is shared that way is computed once.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nested_jax.errors import UserError, shown
from nested_jax.numerics import scale, shifted, solve_unit_lower
from nested_jax.typing import Array, Bool, Float, PyTree


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
    inputs: Float[Array, "*#batch C K"],
    errors: Float[Array, "*#batch C V"],
    gates: Gates,
    queries: Float[Array, "*#batch C K"] | None,
    *,
    anchor: Float[Array, "*#batch V K"] | None = None,
    mask: Bool[Array, "*#batch C"] | None = None,
    exact: bool = False,
) -> tuple[MemoryState, Float[Array, "*batch C V"] | None]:
    """The recurrence as it is defined, one token after the other: the slow twin of `chunked`.

    Args:
        state, inputs, errors, gates, queries, anchor, mask, exact: as of `chunked`.

    Returns:
        (state after the last token, outputs (..., C, V) or None), in float32 (or float64).

    Raises:
        UserError: a momentum without its decay, or a decay without its momentum; sizes or lengths C that differ, or are 0.

    Source: NL Eq. 64-65, 88, 93.

    >>> key, value, gate = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 3.0]]), jnp.ones(1)
    >>> state, read = tokenwise(MemoryState(jnp.zeros((2, 2))), key, -value, Gates(gate, gate, gate), key)
    >>> read.tolist()
    [[0.0, 3.0]]
    """
    _assert_fits(state, inputs, errors, gates, queries)
    state, inputs, errors, gates, queries = _uniform(state, inputs, errors, gates, queries)
    gates, keep = _empty_slots(gates, mask)
    anchor = jnp.zeros_like(state.weights) if anchor is None else anchor
    batch = _batch(state, inputs, errors, gates, queries, anchor)
    spread = lambda x, axes: jnp.broadcast_to(x, batch + x.shape[x.ndim - axes :])

    def step(carry, token):
        weights, momentum = carry
        x, delta, q, write, erase, retain, theta, m = token
        erased = jnp.einsum("...vk,...k->...v", weights, x)
        delta = delta + erased if exact else delta
        momentum = theta[..., None, None] * momentum - (write[..., None] * delta)[..., :, None] * x[..., None, :]
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
    inputs: Float[Array, "*#batch C K"],
    errors: Float[Array, "*#batch C V"],
    gates: Gates,
    queries: Float[Array, "*#batch C K"] | None,
    *,
    anchor: Float[Array, "*#batch V K"] | None = None,
    mask: Bool[Array, "*#batch C"] | None = None,
    exact: bool = False,
) -> tuple[MemoryState, Float[Array, "*batch C V"] | None]:
    """The recurrence over one chunk, by matrix products.

    Args:
        state: weights (..., V, K) and momentum (..., V, K) before the first token.
        inputs: what each token writes at, (..., C, K).
        errors: what each token writes, negated: (..., C, V).
        gates: strengths (..., C); beta |x|^2 <= 1 keeps the erase a contraction, exact (beta + eta) |x|^2 <= 1 + alpha
            without momentum.
        queries: (..., C, K), each read after its own token was written; None to read nothing.
        anchor: (..., V, K), where retention decays to; None for zero.
        mask: (..., C), False for empty slots, which leave the state as it is. Reads there are of no meaning.
        exact: errors are e_t of W_{t-1} x_t + e_t, the memory's output at its input less a target, say; by default they are
            the errors themselves, such as those of the weights at the chunk's start.

    Returns:
        (state after the last token, outputs (..., C, V) or None), in float32 (or float64).

    Raises:
        UserError: a momentum without its decay, or a decay without its momentum; sizes or lengths C that differ, or are 0.

    Exactly zero gates are allowed, in gradients too.

    Source: NL Eq. 64-65, 88, 93.

    >>> import jax.numpy as jnp
    >>> key, value = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 3.0]])
    >>> gate = jnp.ones(1)
    >>> state, read = chunked(MemoryState(jnp.zeros((2, 2))), key, -value, Gates(gate, gate, gate), key)
    >>> read.tolist()
    [[0.0, 3.0]]
    """
    _assert_fits(state, inputs, errors, gates, queries)
    written = write(state, inputs, errors, gates, anchor=anchor, mask=mask, exact=exact)
    return written.state, None if queries is None else read(written, queries)


class Decays(NamedTuple):
    """What a chunk's retention and momentum leave, from one token to another and from the chunk's start."""

    retained: Float[Array, "*batch C C"]  # A[t, s]: retention from after token s to after token t
    carried: Float[Array, "*batch C C"]  # c = A diag(m) Theta: the same for writes, through momentum
    retained_before: Float[Array, "*batch C C"]  # A_, to before token t: a row later
    carried_before: Float[Array, "*batch C C"]  # c_
    retention: Float[Array, "*batch C"]  # gamma: retention from the chunk's start
    inertia: Float[Array, "*batch C"] | None  # pi: weight of the starting momentum in the weights
    last: Float[Array, "*batch C"] | None  # Theta's last row: weight of each write in the momentum after the chunk
    coasting: Float[Array, "*batch"] | None  # weight of the starting momentum in the momentum after the chunk


def decays(
    retain: Float[Array, "*batch C"],
    momentum: Float[Array, "*batch C"] | None = None,
    mask: Bool[Array, "*#batch C"] | None = None,
) -> Decays:
    """What `write` makes of the gates alpha and theta: maps that share these can share the work.

    Args:
        retain: alpha (..., C), in [0, 1].
        momentum: theta (..., C), in [0, 1]; None for none.
        mask: (..., C), False for empty slots.

    Returns:
        `Decays`; the last three are None without momentum.
    """
    keep = jnp.ones_like(retain)
    if mask is not None:
        retain = jnp.where(mask, retain, 1.0)
        momentum = None if momentum is None else jnp.where(mask, momentum, 1.0)
        keep = jnp.broadcast_to(mask, retain.shape).astype(retain.dtype)
    retained = _decay(retain)
    retention = retained[..., 0] * retain[..., :1]
    if momentum is None:
        carried = retained * keep[..., None, :]
        return Decays(retained, carried, _shift_rows(retained), _shift_rows(carried), retention, None, None, None)
    momentum_decay = _decay(momentum)
    from_start = momentum_decay[..., 0] * momentum[..., :1]
    carried = (retained * keep[..., None, :]) @ momentum_decay
    return Decays(
        retained=retained,
        carried=carried,
        retained_before=_shift_rows(retained),
        carried_before=_shift_rows(carried),
        retention=retention,
        inertia=(retained @ (keep * from_start)[..., None])[..., 0],
        last=momentum_decay[..., -1, :],
        coasting=from_start[..., -1],
    )


class Written(NamedTuple):
    """One chunk's writes, ready to be read at any of its tokens by `read`.

    state: after the chunk; before: at its start; written: diag(eta) errors; erased: diag(beta) W_{t-1} x_t.
    """

    state: MemoryState
    before: MemoryState
    anchor: Float[Array, "*#batch V K"] | None
    inputs: Float[Array, "*#batch C K"]
    written: Float[Array, "*#batch C V"]
    erased: Float[Array, "*batch C V"]
    decays: Decays


def write(
    state: MemoryState,
    inputs: Float[Array, "*#batch C K"],
    errors: Float[Array, "*#batch C V"],
    gates: Gates,
    *,
    anchor: Float[Array, "*#batch V K"] | None = None,
    mask: Bool[Array, "*#batch C"] | None = None,
    exact: bool | Float[Array, "*#batch 1"] = False,
    decay: Decays | None = None,
    product: Float[Array, "*#batch C V"] | None = None,
) -> Written:
    """The state after a chunk, and what `read` needs for the states inside it.

        (I + (A_ o X X^T) diag beta) U = gamma_ o (X W_0^T) + pi_ o (X S_0^T) - (c_ o X X^T) diag(eta) Delta
        W_C = gamma_C W_0 + pi_C S_0 - [diag(c_C o eta) Delta + diag(A_C o beta) U]^T X
        S_C = coasting S_0 - [diag(last o eta) Delta]^T X

    with _ for a shift by one token, and A, c, gamma, pi, last, coasting as in `Decays`. Exact errors are Delta = E + U:

        (I + (A_ o X X^T) diag beta + (c_ o X X^T) diag eta) U = gamma_ o ... + pi_ o ... - (c_ o X X^T) diag(eta) E

    `remat.scan` keeps the system's inverse where it is no larger than the weights, which are kept too.

    Args:
        state, inputs, errors, gates, anchor, mask: as of `chunked`.
        exact: the same, for all maps or 1 for those whose errors are, 0 for others.
        decay: `decays(gates.retain, gates.momentum, mask)`, if the caller has it already.
        product: W_0 x (..., C, V), if the caller has it already.

    Returns:
        `Written`: the state after the chunk, and the factors of the states inside it.

    Raises:
        UserError: a momentum without its decay, or a decay without its momentum; sizes or lengths C that differ, or are 0.

    Source: NL Eq. 64-65, 88, 93.

    >>> import jax.numpy as jnp
    >>> key, value, gate = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 3.0]]), jnp.ones(1)
    >>> chunk = write(MemoryState(jnp.zeros((2, 2))), key, -value, Gates(gate, gate, gate))
    >>> chunk.state.weights.tolist()
    [[0.0, 0.0], [3.0, 0.0]]
    """
    _assert_fits(state, inputs, errors, gates)
    state, inputs, errors, gates = _uniform(state, inputs, errors, gates)
    gates, _ = _empty_slots(gates, mask)
    decay = decays(gates.retain, gates.momentum, mask) if decay is None else decay
    product = inputs @ state.weights.mT if product is None else product

    written = scale(gates.write, errors)
    kept = _shift(decay.retention, 1.0)
    right = scale(kept, product)
    if anchor is not None:
        right += scale(1 - kept, inputs @ anchor.mT)
    if decay.inertia is not None and state.momentum is not None:
        right += scale(_shift(decay.inertia, 0.0), inputs @ state.momentum.mT)
    right -= (decay.carried_before * (inputs @ inputs.mT)) @ written
    erases, push = gates.erase, None if exact is False else gates.write * exact
    if push is not None and gates.momentum is None:  # then carried is retained
        erases += push
    lower = decay.retained_before * (inputs @ scale(erases, inputs).mT)
    if push is not None and gates.momentum is not None:
        lower += decay.carried_before * (inputs @ scale(push, inputs).mT)
    (V, K), C = state.weights.shape[-2:], inputs.shape[-2]
    held = solve_unit_lower(lower, right, keep=C * C <= V * K)
    erased = scale(gates.erase, held)
    if push is not None:
        written += scale(push, held)

    change = scale(decay.carried[..., -1, :], written) + scale(decay.retained[..., -1, :], erased)
    kept = decay.retention[..., -1:]
    weights = scale(kept, state.weights) - change.mT @ inputs
    if anchor is not None:
        weights += scale(1 - kept, anchor)
    momentum = None
    if decay.inertia is not None and decay.coasting is not None and state.momentum is not None:
        weights += scale(decay.inertia[..., -1:], state.momentum)
        momentum = scale(decay.coasting[..., None], state.momentum) - scale(decay.last, written).mT @ inputs
    return Written(MemoryState(weights, momentum), state, anchor, inputs, written, erased, decay)


def read(chunk: Written, queries: Float[Array, "*#batch C K"], *, before: bool = False) -> Float[Array, "*batch C V"]:
    """Reads at every token of a chunk that `write` has written.

        Y = gamma o (Q W_0^T) + pi o (Q S_0^T) - (c o Q X^T) diag(eta) Delta - (A o Q X^T) diag(beta) U

    Args:
        chunk: what `write` returned.
        queries: (..., C, K).
        before: read W_{t-1} q_t, before the token's own write, instead of W_t q_t.

    Returns:
        Outputs (..., C, V).

    Source: NL Eq. 64-65, 88, 93.

    >>> import jax.numpy as jnp
    >>> key, value, gate = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 3.0]]), jnp.ones(1)
    >>> chunk = write(MemoryState(jnp.zeros((2, 2))), key, -value, Gates(gate, gate, gate))
    >>> read(chunk, key).tolist(), read(chunk, key, before=True).tolist()
    ([[0.0, 3.0]], [[0.0, 0.0]])
    """
    retained, carried, retained_before, carried_before, retention, inertia, *_ = chunk.decays
    if before:
        retained, carried, retention = retained_before, carried_before, _shift(retention, 1.0)
        inertia = None if inertia is None else _shift(inertia, 0.0)
    queries = queries.astype(retention.dtype)
    overlap = queries @ chunk.inputs.mT
    outputs = scale(retention, queries @ chunk.before.weights.mT)
    if chunk.anchor is not None:
        outputs += scale(1 - retention, queries @ chunk.anchor.mT)
    if inertia is not None and chunk.before.momentum is not None:
        outputs += scale(inertia, queries @ chunk.before.momentum.mT)
    return outputs - (carried * overlap) @ chunk.written - (retained * overlap) @ chunk.erased


def read_transposed(chunk: Written, queries: Float[Array, "*#batch C V"]) -> Float[Array, "*batch C K"]:
    """W_t^T q_t at every token t of a chunk without momentum and anchor, each after its own write.

        Y^T = gamma o (Q W_0) - (A o Q (diag(eta) Delta + diag(beta) U)^T) X

    Args:
        chunk: what `write` returned.
        queries: (..., C, V).

    Returns:
        Outputs (..., C, K).
    """
    retained, retention = chunk.decays.retained, chunk.decays.retention
    overlap = queries @ (chunk.written + chunk.erased).mT
    return scale(retention, queries @ chunk.before.weights) - (retained * overlap) @ chunk.inputs


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
    return products, (products * tangents[0][..., None, :]) @ _shift_rows(products)


def _uniform(*trees: PyTree) -> PyTree:
    """All arrays of one type, float32 or finer."""
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(trees))
    return jax.tree.map(partial(jnp.asarray, dtype=dtype), trees)


def _assert_fits(state: MemoryState, inputs: Array, errors: Array, gates: Gates, queries: Array | None = None) -> None:
    if not isinstance(state, MemoryState) or not isinstance(gates, Gates):
        raise UserError(f"state {shown(state)} and gates {shown(gates)}: give a MemoryState and Gates")
    V, K = state.weights.shape[-2:]
    arrays = {"inputs": (inputs, K), "errors": (errors, V)} | ({} if queries is None else {"queries": (queries, K)})
    for name, (array, size) in arrays.items():
        if jnp.ndim(array) < 2 or array.shape[-1] != size:
            raise UserError(f"{name} {shown(array)} and weights {shown(state.weights)} (..., V, K): give (..., C, {size})")
    lengths = {name: array.shape[-2] for name, (array, _) in arrays.items()}
    lengths |= {f"gates.{name}": gate.shape[-1] for name, gate in zip(gates._fields, gates, strict=True) if gate is not None}
    if len(set(lengths.values())) > 1 or not inputs.shape[-2]:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UserError(f"inputs, errors, gates and queries have one length C of at least 1, not {found}: give the same")
    if (state.momentum is None) != (gates.momentum is None):
        missing = "state.momentum" if state.momentum is None else "gates.momentum"
        raise UserError(f"{missing} is None: a memory has both a momentum and its decay, or neither: give both or none")


def _empty_slots(gates: Gates, mask: Array | None) -> tuple[Gates, Array]:
    """Gates that do nothing at empty slots, and the multiplier m of `+ S_t`."""
    if mask is None:
        return gates, jnp.ones_like(gates.write)
    momentum = None if gates.momentum is None else jnp.where(mask, gates.momentum, 1.0)
    gates = Gates(
        jnp.where(mask, gates.write, 0.0), jnp.where(mask, gates.erase, 0.0), jnp.where(mask, gates.retain, 1.0), momentum
    )
    return gates, mask.astype(gates.write.dtype)


def _batch(state, inputs, errors, gates, queries, anchor):
    matrices = [x for x in (state.weights, state.momentum, inputs, errors, queries, anchor) if x is not None]
    return jnp.broadcast_shapes(*(x.shape[:-2] for x in matrices), *(g.shape[:-1] for g in gates if g is not None))


def _shift(x: Float[Array, "*batch C"], first: float) -> Float[Array, "*batch C"]:
    """One token later, `first` at the start."""
    return shifted(x, x.ndim - 1, 1, -1, first)


def _shift_rows(x: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """One row down, zeros in the first."""
    return shifted(x, x.ndim - 2, 1, -1)
