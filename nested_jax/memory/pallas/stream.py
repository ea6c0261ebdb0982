"""A scan over the chunks of a stream by kernels, and its derivatives.

The first derivative in reverse is the backward kernel's. Tangents, and derivatives of the backward kernel, are those of a
twin that XLA compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from nested_jax.memory.pallas import scan
from nested_jax.memory.pallas.form import Form
from nested_jax.numerics import vary
from nested_jax.remat import LOOP
from nested_jax.typing import Array, Bool, Float, PyTree


def read(
    form: Form, twin: Callable, weights: PyTree, state: PyTree, stream: tuple[PyTree, Bool[Array, "B T"] | None]
) -> tuple[PyTree, Float[Array, "B T H K"]]:
    """`twin(weights, state, (tokens, reset))` by kernels: values and the first derivative in reverse. Others are the twin's.

    Args:
        form: the memory's.
        twin: what XLA compiles: weights, a level's state at a boundary, and a stream of whole chunks -> (state, outputs).
        weights, state, stream: as of the twin.

    Returns:
        (state, outputs).
    """
    tokens, reset = stream

    def of_memories(weights, memories, tokens, reset):
        state, y = twin(weights, form.level(memories), (tokens, reset))
        return form.of(state), y

    weights = vary(weights, state, tokens)  # the kernel's derivatives vary as they do, and are summed by this cast's
    memories, y = _read(form, of_memories, weights, form.of(state), tokens, reset)
    return form.level(memories), y


def _read(form: Form, twin: Callable, weights, memories, tokens, reset):
    kernel = jax.custom_jvp(lambda *args: scan.forward(form, False, *args)[0])
    saving, backward = jax.custom_jvp(partial(scan.forward, form, True)), jax.custom_jvp(partial(scan.backward, form))

    @partial(kernel.defjvp)
    def _(primals, tangents):
        out, saved = jax.tree.map(partial(checkpoint_name, name=LOOP), saving(*primals))
        return out, _linear(twin, backward, (*primals, saved), tangents[:3], out)

    @saving.defjvp
    def _(primals, tangents):
        out, saved = saving(*primals)
        return (out, saved), (_tangent(twin, primals, tangents[:3]), jax.tree.map(jnp.zeros_like, saved))

    @backward.defjvp
    def _(primals, tangents):
        *arguments, reset, _, cotangents = primals
        pull = lambda *args: jax.vjp(lambda *floats: twin(*floats, reset), *args[:3])[1](args[3])
        given, moved = (*arguments, cotangents), (*tangents[:3], tangents[-1])
        return backward(*primals), jax.jvp(pull, given, moved)[1]

    return kernel(weights, memories, tokens, reset)


def _tangent(twin: Callable, primals: PyTree, tangents: PyTree) -> PyTree:
    *arguments, reset = primals
    return jax.jvp(lambda *args: twin(*args, reset), tuple(arguments), tuple(tangents))[1]


# Linear in its tangents, with a transpose of its own: `jax.custom_vjp` would leave no forward mode.
_linear_p = Primitive("chunk_scan_tangent")
_linear_p.multiple_results = True


def _linear(twin: Callable, backward: Callable, kept: PyTree, tangents: PyTree, out: PyTree) -> PyTree:
    """The tangent of `out`: the twin's, transposed by `backward`."""
    (flat, tree), (moved, moved_tree), (outs, out_tree) = map(jax.tree.flatten, (kept, tangents, out))

    def forward(*args):
        kept, tangents = tree.unflatten(args[: len(flat)]), moved_tree.unflatten(args[len(flat) :])
        return jax.tree.leaves(_tangent(twin, kept[:-1], tangents))

    def transposed(kept, cotangents):
        return jax.tree.leaves(backward(*tree.unflatten(kept), out_tree.unflatten(cotangents)))

    types = tuple(map(jax.typeof, outs))
    return out_tree.unflatten(
        _linear_p.bind(*flat, *moved, forward=forward, transposed=transposed, kept=len(flat), types=types)
    )


_linear_p.def_impl(lambda *args, forward, **_: forward(*args))
_linear_p.def_abstract_eval(lambda *_, types, **__: types)
mlir.register_lowering(_linear_p, mlir.lower_fun(lambda *args, forward, **_: forward(*args), multiple_results=True))


def _batched(arguments, axes, *, forward, transposed, kept, types):
    size = next(x.shape[axis] for x, axis in zip(arguments, axes, strict=True) if axis is not None)
    arguments = [batching.bdim_at_front(x, axis, size) for x, axis in zip(arguments, axes, strict=True)]
    more = tuple(one.update(shape=(size, *one.shape)) for one in types)
    several = {"forward": lambda *args: jax.vmap(forward)(*args), "transposed": jax.vmap(transposed)}
    return _linear_p.bind(*arguments, **several, kept=kept, types=more), [0] * len(types)


def _jvp(primals, tangents, *, forward, **_):
    tangents = [ad.instantiate_zeros(t) if isinstance(t, ad.Zero) else t for t in tangents]  # float0 of what is no float
    return jax.jvp(forward, tuple(primals), tuple(tangents))


def _transpose(cotangents, *args, transposed, kept, **_):
    cotangents = [ad.instantiate_zeros(c) if isinstance(c, ad.Zero) else c for c in cotangents]
    return [None] * kept + list(transposed(args[:kept], cotangents))


batching.primitive_batchers[_linear_p] = _batched
ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
