"""A scan over the chunks of a stream as one kernel, the state in the chip's fast memory, and its backward kernel.

The backward kernel reads the states before chunks and the inverses of their systems, which the forward kernel has saved, and
applies `jax.vjp` to the chunk step inside the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import Literal
from jax.sharding import PartitionSpec as P

from nested_jax.memory.kernels import VMEM, heads_at_once
from nested_jax.memory.pallas.form import Form, Tiled
from nested_jax.numerics import BATCH, HEADS, mesh_of_four, tpu_kind, upcast, varying
from nested_jax.typing import Array, Bool, Int, PyTree


def forward(form: Form, save: bool, weights, state, tokens, reset) -> tuple[PyTree, PyTree]:
    """((state, outputs), states before chunks and inverses, or None)."""
    given = form.lay(weights, state, tokens)
    out = (_VECTORS, _STATE, _STATE) if save else (_VECTORS, _STATE)
    y, after, *saved = _on_mesh(partial(_call, form, save), (_GIVEN, _ROWS), out)(given, _restarts(form, reset))
    return (form.take(after), y.reshape(*y.shape[:2], form.heads, -1)), saved[0] if save else None


def backward(form: Form, weights, state, tokens, reset, saved, cotangents) -> PyTree:
    """Cotangents of weights, state and tokens."""
    given, pull = jax.vjp(form.lay, weights, state, tokens)
    take = jax.linear_transpose(form.take, given.state)
    after, y = cotangents
    (after,) = take(after)
    y = y.reshape(*y.shape[:2], -1)
    call = _on_mesh(
        partial(_call_back, form),
        (_GIVEN, _ROWS, _STATE, _VECTORS, _STATE),
        (_STATE, _STATE, _VECTORS, _STATE),
    )  # fmt: skip
    of_weights, of_state, wide, gates = call(given, _restarts(form, reset), saved, y, after)
    of_weights = jax.tree.map(lambda x: x.sum(0), of_weights)
    return pull(Tiled(of_weights, of_state, wide, gates))


_ROWS, _STATE, _VECTORS = P(BATCH), P(BATCH, HEADS), P(BATCH, None, HEADS)
_GIVEN = Tiled(P(HEADS), _STATE, _VECTORS, _STATE)  # pyright: ignore[reportArgumentType]
"""How a kernel's arrays lie on a mesh: every device has its rows and heads, and its own kernel."""


def _on_mesh(call: Callable, inputs: PyTree, outputs: PyTree) -> Callable:
    """The call, on each device's part where `jax.set_mesh` has a mesh that is not a `jax.shard_map`'s.

    JAX's check of what is the same on all devices is left out of interpreted kernels, which do not pass it.
    """
    return (
        call
        if mesh_of_four() is None
        else jax.shard_map(call, in_specs=inputs, out_specs=outputs, check_vma=tpu_kind() is not None)
    )


def _restarts(form: Form, reset: Bool[Array, "B T"] | None) -> Int[Array, "B N 1 1"] | None:
    """1 where the state restarts before a chunk."""
    return None if reset is None else reset[:, :: form.chunk, None, None].astype(jnp.int32)


class _Blocks(NamedTuple):
    """Sizes and block specs of a call; programs run over rows, heads and, last and in order, chunks."""

    grid: tuple[int, int, int]
    heads: int
    width: int
    weights: Callable
    state: Callable
    saved: Callable
    wide: pl.BlockSpec
    gates: Callable
    reset: pl.BlockSpec


def _blocks(form: Form, given: Tiled, backwards: bool = False) -> _Blocks:
    B, T, D = given.wide[0].shape
    H, C = jax.tree.leaves(given.state)[0].shape[1], form.chunk
    K, N = D // H, T // C
    heads = heads_at_once(H, K, form.maps)
    at = (lambda n: N - 1 - n) if backwards else (lambda n: n)
    rest = lambda x, axes: (x.shape[axes:], (0,) * (x.ndim - axes))

    def spec(lead, index, axes):
        def of(x):
            sizes, zeros = rest(x, axes)
            return pl.BlockSpec((*lead, *sizes), lambda b, h, n: (*index(b, h, n), *zeros))

        return lambda tree: jax.tree.map(of, tree)

    return _Blocks(
        grid=(B, H // heads, N), heads=heads, width=K,
        weights=spec((heads,), lambda b, h, n: (h,), 1),
        state=spec((None, heads), lambda b, h, n: (b, h), 2),
        saved=spec((None, heads, None), lambda b, h, n: (b, h, at(n)), 3),
        wide=pl.BlockSpec((None, C, heads * K), lambda b, h, n: (b, at(n), h)),
        gates=spec((None, heads, None), lambda b, h, n: (b, h, at(n)), 3),
        reset=pl.BlockSpec((None, None, 1, 1), lambda b, h, n: (b, at(n), 0, 0), memory_space=pltpu.SMEM),
    )  # fmt: skip


def _options(name: str) -> dict[str, Any]:
    semantics = ("parallel", "parallel", "arbitrary")
    compiler = pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM)
    return {"compiler_params": compiler, "interpret": tpu_kind() is None, "name": name}


def _shape(shape: tuple[int, ...], dtype: Any, *like: PyTree) -> jax.ShapeDtypeStruct:
    """An output that varies over the axes of `jax.shard_map` over which the inputs do."""
    axes = frozenset().union(*map(varying, map(jax.typeof, jax.tree.leaves(like))))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=axes))


def _inverses(form: Form, given: Tiled, dtype: Any) -> jax.ShapeDtypeStruct | None:
    """Of all chunks those that the backward kernel reads (B, H, N, ., C, C); None: there are none."""
    B, T, D = given.wide[0].shape
    H, C, like = jax.tree.leaves(given.state)[0].shape[1], form.chunk, jax.ShapeDtypeStruct

    def tile(x, axes):
        one = like(x.shape[-2:], x.dtype)
        return one if x.ndim == axes + 2 else [one] * x.shape[axes]

    of = lambda tree, axes: jax.tree.map(lambda x: tile(x, axes), tree)
    wide = [like((C, D // H), jnp.promote_types(x.dtype, jnp.float32)) for x in given.wide]
    found = jax.eval_shape(form.step, of(given.weights, 1), of(given.state, 2), wide, of(given.gates, 3))[2]
    return _shape((B, H, T // C, len(found), C, C), dtype, given) if found else None


def _call(form: Form, save: bool, given: Tiled, reset):
    at, N = _blocks(form, given), given.wide[0].shape[1] // form.chunk
    like = partial(jax.tree.map, lambda x: _shape(x.shape, x.dtype, given))
    every = partial(jax.tree.map, lambda x: _shape((*x.shape[:2], N, *x.shape[2:]), x.dtype, given))
    wide, dtype = given.wide[0], jnp.result_type(jnp.float32, *jax.tree.leaves(given))
    shapes, specs = [_shape(wide.shape, dtype, given), like(given.state)], [at.wide, at.state(given.state)]
    if save:
        shapes.append((every(given.state), _inverses(form, given, dtype)))
        specs.append(at.saved(shapes[2]))
    return pl.pallas_call(
        partial(_forward_kernel, form, at),
        grid=at.grid,
        in_specs=[
            at.weights(given.weights), at.state(given.state), [at.wide] * len(given.wide), at.gates(given.gates),
            None if reset is None else at.reset,
        ],
        out_specs=specs,
        out_shape=shapes,
        **_options("chunk_scan"),
    )(*given, reset)  # fmt: skip


def _call_back(form: Form, given: Tiled, reset, saved, y, after):
    at, rows = _blocks(form, given, backwards=True), given.wide[0].shape[0]
    like = partial(jax.tree.map, lambda x: _shape(x.shape, x.dtype, given, y, after))
    own = partial(jax.tree.map, lambda x: _shape((rows, *x.shape), x.dtype, given, y, after))
    weights = own(given.weights)
    given_specs = [at.weights(given.weights), at.saved(saved), [at.wide] * len(given.wide), at.gates(given.gates)]
    return pl.pallas_call(
        partial(_backward_kernel, form, at),
        grid=at.grid,
        in_specs=[*given_specs, None if reset is None else at.reset, at.wide, at.state(after)],
        out_specs=[at.state(weights), at.state(given.state), [at.wide] * len(given.wide), at.gates(given.gates)],
        out_shape=[weights, like(given.state), like(given.wide), like(given.gates)],
        **_options("chunk_scan_backward"),
    )(given.weights, saved, given.wide, given.gates, reset, y, after)


def _load(refs: PyTree, head: int) -> PyTree:
    return jax.tree.map(lambda ref: ref[head] if len(ref.shape) == 3 else [ref[head, m] for m in range(ref.shape[1])], refs)


def _store(refs: PyTree, head: int, values: Any, *, add: bool = False) -> None:
    def store(ref, value):
        pairs = [(head, value)] if len(ref.shape) == 3 else [((head, m), each) for m, each in enumerate(value)]
        for place, each in pairs:
            ref[place] = ref[place] + each if add else each

    jax.tree.map(store, refs, values)


def _vectors(refs: list, head: int, width: int) -> list[Array]:
    return [upcast(ref[:, head * width : (head + 1) * width]) for ref in refs]


def _in_step(function: Callable, arguments: list[tuple]) -> list[Any]:
    """The function of each head's arguments. Each operation is written down for all heads before the next: none waits."""
    traced, out = jax.make_jaxpr(function, return_shape=True)(*arguments[0])
    heads = _bind(traced.jaxpr, traced.consts, list(map(jax.tree.leaves, arguments)))
    return [jax.tree.unflatten(jax.tree.structure(out), leaves) for leaves in heads]


def _bind(jaxpr: Any, constants: list, arguments: list[list]) -> list[list]:
    known = [dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *leaves), strict=True)) for leaves in arguments]
    value = lambda at, atom: atom.val if isinstance(atom, Literal) else at[atom]
    for equation in jaxpr.eqns:
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        assert inner is None or equation.primitive.name in ("jit", "custom_vjp_call", "custom_jvp_call"), equation.primitive
        given = [[value(at, atom) for atom in equation.invars] for at in known]
        if inner is not None:
            results = _bind(inner.jaxpr, inner.consts, given)
        else:
            results = [equation.primitive.bind(*each, **equation.params) for each in given]
            results = results if equation.primitive.multiple_results else [[one] for one in results]
        for at, each in zip(known, results, strict=True):
            at.update(zip(equation.outvars, each, strict=True))
    return [[value(at, atom) for atom in jaxpr.outvars] for at in known]


def _forward_kernel(form, at, weights, state, wide, gates, reset, y, now, saved: Any = None):
    n, heads = pl.program_id(2), range(at.heads)

    @pl.when(n == 0)
    def _():
        jax.tree.map(lambda to, ref: to.__setitem__(..., ref[...]), now, state)

    if reset is not None:

        @pl.when(reset[0, 0] == 1)
        def _():
            for head in heads:
                _store(now, head, form.start(_load(weights, head)))

    given = [
        (_load(weights, head), _load(now, head), _vectors(wide, head, at.width), _load(gates, head)) for head in heads
    ]  # fmt: skip
    for head, (after, read, found) in enumerate(_in_step(form.step, given)):
        if saved is not None:
            _store(saved, head, (given[head][1], found or None))
        y[:, head * at.width : (head + 1) * at.width] = read.astype(y.dtype)
        _store(now, head, after)


def _backward_kernel(form, at, weights, saved, wide, gates, reset, y, after, to_weights, to_state, to_wide, to_gates):
    n, heads = pl.program_id(2), range(at.heads)

    @pl.when(n == 0)
    def _():
        jax.tree.map(lambda to, ref: to.__setitem__(..., ref[...]), to_state, after)
        jax.tree.map(lambda to: to.__setitem__(..., jnp.zeros(to.shape, to.dtype)), to_weights)

    def pull(given, found, cotangents):
        return jax.vjp(lambda *given: form.step(*given, found or [])[:2], *given)[1](cotangents)

    before, inverses = saved
    given = [
        (_load(weights, head), _load(before, head), _vectors(wide, head, at.width), _load(gates, head)) for head in heads
    ]  # fmt: skip
    cotangents = [(_load(to_state, head), *_vectors([y], head, at.width)) for head in heads]
    pulled = [*zip(given, [_load(inverses, head) for head in heads], cotangents, strict=True)]
    for head, (of_weights, of_state, of_wide, of_gates) in enumerate(_in_step(pull, pulled)):
        for ref, value in zip(to_wide, of_wide, strict=True):
            ref[:, head * at.width : (head + 1) * at.width] = value.astype(ref.dtype)
        _store(to_gates, head, of_gates)
        _store(to_weights, head, of_weights, add=True)
        _store(to_state, head, of_state)
    if reset is not None:

        @pl.when(reset[0, 0] == 1)
        def _():
            for head in heads:
                (more,) = jax.vjp(form.start, _load(weights, head))[1](_load(to_state, head))
                _store(to_weights, head, more, add=True)
                _store(to_state, head, jax.tree.map(jnp.zeros_like, _load(to_state, head)))
