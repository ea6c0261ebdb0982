"""Back-propagation as memory: a linear layer stores pairs of its input x and its local surprise delta = dL/dy.

    W <- argmin_W  <W x, delta> + |W - W_t|^2 / (2 eta)  =  W_t - eta delta x^T                              (NL Eq. 31)

The pairs of all linear layers of a model come from one backward pass of its loss: a probe, which is zero, is added to
every product y = x W, and the loss is differentiated by the probes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from nested_jax.errors import UserError, shown
from nested_jax.jaxpr.product import Product, arrange
from nested_jax.jaxpr.views import View, inexact, whole
from nested_jax.jaxpr.walk import Found, evaluate, find
from nested_jax.paths import path_name
from nested_jax.typing import Array, Float, PyTree


class Pair(NamedTuple):
    """The inputs and the local surprise of a linear layer; x^T delta, summed over the examples, is its kernel's gradient.

    Args:
        inputs: x (stacked axes..., examples..., in).
        surprise: delta = dL/dy (stacked axes..., examples..., out), y = x W.

    >>> pair = Pair(jnp.ones((5, 3)), jnp.ones((5, 2)))
    >>> (pair.inputs.T @ pair.surprise).shape
    (3, 2)
    """

    inputs: Float[Array, "*stack *examples in"]  # x
    surprise: Float[Array, "*stack *examples out"]  # delta = dL/dy, y = x W


class Backward(NamedTuple):
    """The results of one backward pass, of `surprise_and_grad`.

    Args:
        value: the loss (), or (loss, aux).
        gradient: of the model or the parameters, as of `nnx.grad` or `jax.grad`.
        pairs: as of `local_surprise`.
    """

    value: PyTree  # the loss, or (loss, aux)
    gradient: PyTree  # of the model or the parameters, as of `jax.grad` or `nnx.grad`
    pairs: dict[str, Pair]


def local_surprise(loss: Callable[[Any, Any], Any], model_or_params: Any, batch: PyTree, *, has_aux: bool = False) -> Any:
    """The inputs and local surprise of every linear layer, by one backward pass.

        delta = dL/dy,  y = x W;      x^T delta, summed over the examples, is dL/dW         (NL, section 4.1, Eq. 29-31)

    Linear layers are found in the traced loss: parameters that reach it in no other way than as one side of products
    (`@`, `einsum`, `dot_general`, `nnx.Linear`, ...), after casts, transposes, reshapes, and cuts into layers; also inside
    `jit`, `lax.scan`, `jax.checkpoint` and `custom_jvp`. So norms, biases, convolutions and embeddings are none, nor is a
    kernel that is also an embedding, is in the loss's weight decay, or is changed before its use, as the fast weights of a
    CMS are. `while_loop`, `cond` and `custom_vjp` are not entered: a kernel used there is left out. A `custom_vjp`
    whose outputs are `nested_jax.jaxpr.transparent`, as those of `mixflow_grad`, is entered.

    Args:
        loss: (model or parameters, batch) -> () or, with `has_aux`, ((), aux).
        model_or_params: an `nnx.Module`, whose `nnx.Param`s count and whose other variables are constants, or a pytree.
        batch: the loss's second argument.
        has_aux: whether the loss returns a pair.

    Returns:
        {path of the kernel, such as "dense/kernel": Pair(inputs (..., in), surprise (..., out))}, or (that, aux).

        - The axes in front are the examples', those of x, after those of `lax.scan`s around a product.
        - Kernels stacked along some axes, of layers or heads, have those in front: (L, ..., in). An axis in front of `in`
          is one of these also where all read the same inputs, which are then repeated. If only some layers of a stack are
          linear, or their examples differ in shape, each run of layers has a key: "up[0:3]", read by `layers`.
        - A kernel of several axes in, or out, has them as one. A kernel stored (out, in) has the gradient delta^T x.
        - A kernel used more than once has its uses' examples one after another along one axis.

    Under `jax.jit` it compiles as a whole; its result can be differentiated again.

    Raises:
        UserError: the loss is no real scalar, is no pair with `has_aux`, or has no linear layer; a kernel's path is also
            that of another parameter, or could be that of layers of a stack, "up[0:3]".

    Source: NL, section 4.1, Eq. 29-31.

    >>> params = {"dense": {"kernel": jnp.eye(2)}}
    >>> loss = lambda params, x: ((x @ params["dense"]["kernel"]) ** 2).sum() / 2
    >>> pairs = local_surprise(loss, params, jnp.array([[3.0, 4.0]]))
    >>> pairs["dense/kernel"].inputs.tolist(), pairs["dense/kernel"].surprise.tolist()
    ([[3.0, 4.0]], [[3.0, 4.0]])
    """
    traced = _trace(loss, model_or_params, batch, has_aux)
    value, pull, (aux, inputs) = jax.vjp(lambda probes: _run(traced, traced.parameters, probes), traced.probes, has_aux=True)
    pairs = _pairs(traced, inputs, *pull(jnp.ones_like(value)))
    return (pairs, aux) if has_aux else pairs


def surprise_and_grad(loss: Callable, model_or_params: Any, batch: Any, *, has_aux: bool = False) -> Backward:
    """`local_surprise`, the loss and its gradient, by the same backward pass.

        delta = dL/dy,  y = x W;      dL/dW = x^T delta, summed over the examples           (NL, section 4.1, Eq. 29-31)

    Args:
        loss: (model or parameters, batch) -> () or, with `has_aux`, ((), aux).
        model_or_params: an `nnx.Module`, whose `nnx.Param`s count, or a pytree.
        batch: the loss's second argument.
        has_aux: whether the loss returns a pair.

    Returns:
        `Backward`: (loss or (loss, aux), gradient, {path of the kernel: `Pair`}).

    Raises:
        UserError: as `local_surprise`.

    Source: NL, section 4.1.

    >>> params = {"dense": {"kernel": jnp.eye(2)}}
    >>> loss = lambda params, x: ((x @ params["dense"]["kernel"]) ** 2).sum() / 2
    >>> value, gradient, pairs = surprise_and_grad(loss, params, jnp.array([[3.0, 4.0]]))
    >>> x, delta = pairs["dense/kernel"]
    >>> float(value), bool((x.T @ delta == gradient["dense"]["kernel"]).all())
    (12.5, True)
    """
    traced = _trace(loss, model_or_params, batch, has_aux)
    run = lambda parameters, probes: _run(traced, parameters, probes)
    value, pull, (aux, inputs) = jax.vjp(run, traced.parameters, traced.probes, has_aux=True)
    gradient, surprises = pull(jnp.ones_like(value))
    value = (value, aux) if has_aux else value
    return Backward(value, traced.structure.unflatten(gradient), _pairs(traced, inputs, surprises))


def layers(key: str) -> tuple[str, slice]:
    """The path in a key of `local_surprise`, and which layers of the stack it covers: all, but for a key "path[0:3]".

    >>> layers("blocks/up[0:3]"), layers("blocks/out[0]")
    (('blocks/up', slice(0, 3, None)), ('blocks/out[0]', slice(None, None, None)))
    """
    run = re.fullmatch(r"(.*)\[(\d+):(\d+)\]", key, re.DOTALL)
    return (run[1], slice(int(run[2]), int(run[3]))) if run else (key, slice(None))


@jax.custom_jvp
def _beside(y: Array, probe: Array) -> Array:
    """y, whose change is that of y and of the probe: the zeros of a probe are never made."""
    return y


_beside.defjvp(lambda primals, tangents: (primals[0], tangents[0] + tangents[1]))


class _Layers(NamedTuple):
    """Layers of a parameter, all of them (0, 1) if it is no stack, whose every use is in these products."""

    start: int
    stop: int
    products: tuple[int, ...]


class _Traced(NamedTuple):
    """A loss traced at some parameters and batch, and the linear layers in it."""

    found: Found
    parameters: list[Array]
    structure: jax.tree_util.PyTreeDef
    batch: list[Array]
    outputs: jax.tree_util.PyTreeDef  # the loss, or (loss, aux)
    linear: dict[str, list[_Layers]]  # by path
    probes: list[Array | None]  # of each product


def _trace(loss: Callable, model_or_params: Any, batch: Any, has_aux: bool) -> _Traced:
    params = model_or_params
    if not callable(loss):
        raise UserError(f"local_surprise: loss {shown(loss)}: give a function (model or parameters, batch) -> scalar")
    if isinstance(model_or_params, nnx.Module):
        graph, params, rest = nnx.split(model_or_params, nnx.Param, ...)
        of_model, loss = loss, lambda params, batch: of_model(nnx.merge(graph, params, rest, copy=True), batch)
    with_paths, structure = jax.tree_util.tree_flatten_with_path(params)
    parameters = [leaf for _, leaf in with_paths]
    call = lambda parameters, batch: loss(structure.unflatten(parameters), batch)
    closed, shape = jax.make_jaxpr(call, return_shape=True)(parameters, batch)
    if has_aux and not (isinstance(shape, (tuple, list)) and len(shape) == 2):
        what = f"{type(shape).__name__} of {len(shape)}" if isinstance(shape, (tuple, list, dict)) else "single value"
        raise UserError(f"local_surprise: with has_aux=True the loss is a {what}: give a pair, (scalar, more)")
    scalar: Any = shape[0] if has_aux else shape
    outputs = jax.tree.structure(shape)
    if getattr(scalar, "shape", None) != ():
        what = f"has shape {list(scalar.shape)}" if hasattr(scalar, "shape") else f"is a {type(scalar).__name__}"
        raise UserError(f"local_surprise: the loss {what}: give a scalar, or has_aux=True for a pair of a scalar and more")
    if not jnp.issubdtype(scalar.dtype, jnp.floating):
        raise UserError(f"local_surprise: the loss is of type {scalar.dtype}: give a real floating-point number")

    invars: list[Any] = closed.jaxpr.invars
    views = [whole(i, v.aval.shape) if inexact(v) else None for i, v in enumerate(invars)]
    views[len(parameters) :] = [None] * len(jax.tree.leaves(batch))
    found = find(closed, views, [True] + [False] * (outputs.num_leaves - 1))
    products, linear = found.products, {}
    for i, (path, _) in enumerate(with_paths):
        own = {n: product for n, product in enumerate(products) if product.view.parameter == i}
        if own and (rows := _linear_layers(own, [view for view in found.others if view.parameter == i])):
            _assert_told_apart(path, [other for other, _ in with_paths if other is not path])
            linear[path_name(path)] = rows
    if not linear:
        raise UserError(
            "local_surprise: the loss has no linear layer: none of its parameters is used as one side of products alone"
        )
    used = {n for rows in linear.values() for row in rows for n in row.products}
    probes = [jnp.zeros(p.shape, p.dtype) if n in used else None for n, p in enumerate(products)]
    return _Traced(found, parameters, structure, jax.tree.leaves(batch), outputs, linear, probes)


def _assert_told_apart(path: Sequence, others: list[Sequence]) -> None:
    """Raises UserError where the key of a kernel could be read in two ways."""
    key = path_name(path)
    if layers(key)[0] != key:
        raise UserError(f"local_surprise: parameter {key} is named as layers of {layers(key)[0]} are: give it another name")
    if same := next((other for other in others if path_name(other) == key), None):
        both = " and ".join(jax.tree_util.keystr(tuple(keys)) for keys in (path, same))
        raise UserError(f"local_surprise: parameters {both} are both named {key}: give one another name")


def _linear_layers(products: dict[int, Product], others: list[View]) -> list[_Layers]:
    """The layers of a parameter whose every use is a product, of one kind."""
    roles = next(iter(products.values())).roles
    others = others + [product.view for product in products.values() if product.roles != roles]
    products = {n: product for n, product in products.items() if product.roles == roles}
    span = lambda view: view.ranges[roles[0][0]] if roles[0] else (0, 1)
    ends = sorted({end for view in [*others, *(p.view for p in products.values())] for end in span(view)})
    found = []
    for start, stop in itertools.pairwise(ends):
        within = lambda view, start=start, stop=stop: span(view)[0] < stop and start < span(view)[1]
        uses = tuple(n for n, product in products.items() if within(product.view))
        if uses and not any(map(within, others)):
            found.append(_Layers(start, stop, uses))
    return found


def _run(traced: _Traced, parameters: list[Array], probes: list[Array | None]) -> tuple[Array, tuple[PyTree, list]]:
    """(loss, (aux, x of each product))."""
    outputs, inputs = evaluate(traced.found, [*parameters, *traced.batch], probes, _beside)
    result = traced.outputs.unflatten(outputs)
    return (result[0], (result[1], inputs)) if traced.outputs.num_nodes > 1 else (result, (None, inputs))


def _pairs(traced: _Traced, inputs: list, surprises: list) -> dict[str, Pair]:
    products = traced.found.products
    arranged = {
        n: Pair(arrange(product, x, product.x), arrange(product, surprise, product.y))
        for n, (product, x, surprise) in enumerate(zip(products, inputs, surprises, strict=True))
        if x is not None
    }
    pairs = {}
    for path, rows in traced.linear.items():
        view, (stacked, *_) = products[rows[0].products[0]].view, products[rows[0].products[0]].roles
        size, runs = view.sizes[stacked[0]] if stacked else 1, []
        for row in rows:
            parts = [_cut(arranged[n], products[n], row) for n in row.products]
            pair = parts[0] if len(parts) == 1 else _in_a_row(parts, len(stacked))
            before = runs[-1] if runs else None
            if before and before[1] == row.start and _alike(before[2], pair):
                runs[-1] = (before[0], row.stop, jax.tree.map(lambda *x: jnp.concatenate(x), before[2], pair))
            else:
                runs.append((row.start, row.stop, pair))
        for start, stop, pair in runs:
            pairs[path if (start, stop) == (0, size) else f"{path}[{start}:{stop}]"] = pair
    return pairs


def _cut(pair: Pair, product: Product, row: _Layers) -> Pair:
    if not product.roles[0]:
        return pair
    first = product.view.ranges[product.roles[0][0]][0]
    return jax.tree.map(lambda x: x[row.start - first : row.stop - first], pair)


def _in_a_row(pairs: list[Pair], stacked: int) -> Pair:
    """The examples of several uses, along one axis."""
    flat = lambda x: x.reshape(*x.shape[:stacked], -1, x.shape[-1])
    return jax.tree.map(lambda *x: jnp.concatenate([flat(part) for part in x], axis=stacked), *pairs)


def _alike(one: Pair, other: Pair) -> bool:
    return all(a.shape[1:] == b.shape[1:] and a.dtype == b.dtype for a, b in zip(one, other, strict=True))
