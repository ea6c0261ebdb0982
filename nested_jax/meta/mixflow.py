"""Gradients inside an inner loop whose own derivatives are Hessian-vector products."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import SupportsIndex

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from nested_jax.errors import UserError
from nested_jax.jaxpr.transparent import transparent
from nested_jax.typing import Array


def mixflow_grad(loss: Callable, argnums: SupportsIndex | Sequence[int] = 0, has_aux: bool = False) -> Callable:
    """`jax.grad` for inner loops: its own backward pass is forward-over-reverse and keeps only the arguments.

    With cotangent v of an outer reverse pass, one `jax.jvp` of the gradient computes

        v^T d(grad_a loss) / d(all arguments) = d/de grad_(all arguments) loss(a + e v)        at e = 0

    Hessians are symmetric, so this equals reverse-over-reverse, which would need all residuals of the inner backward pass;
    here the inner backward pass is computed again.

    Args:
        loss: a scalar function of pytrees of arrays; the derivative includes values it closes over.
        argnums: positions of the arguments to differentiate by.
        has_aux: loss returns (value, aux); the gradient function then returns (gradient, aux).

    Returns:
        A function of the arguments of loss, which returns the gradient, of their shapes. It is differentiable in reverse
        mode, to any order. In forward mode JAX raises a TypeError with "forward-mode" and "custom_vjp": use `jax.grad`
        there. The same error occurs in reverse mode if loss contains a `jax.custom_vjp` whose forward rule has no
        forward-mode derivative, such as one that calls the function itself.

    Raises:
        UserError: argnums are no positions of the arguments.

    Source: Kemaev et al., MixFlow-MG, arXiv 2505.00793.

    >>> def outer(rate, w=2.0):
    ...     gradient = mixflow_grad(lambda w: w**4)(w)
    ...     return w - rate * gradient
    >>> print(jax.grad(outer, argnums=1)(0.1, 2.0))  # 1 - rate 12 w^2
    -3.8000002
    """
    single = not isinstance(argnums, Sequence)
    numbers = (operator.index(argnums),) if single else tuple(map(operator.index, argnums))

    def gradient(*arguments, **keywords):
        if not numbers or not all(-len(arguments) <= i < len(arguments) for i in numbers):
            raise UserError(f"mixflow_grad: argnums={argnums!r} of {len(arguments)} arguments: give positions of arguments")

        def of_selected(*selected):  # closes over the other arguments, which need not be arrays
            filled = list(arguments)
            for i, x in zip(numbers, selected, strict=True):
                filled[i] = x
            return loss(*filled, **keywords)

        selected = [arguments[i] for i in numbers]
        program, shape = jax.make_jaxpr(of_selected, return_shape=True)(*selected)
        structure = jax.tree.structure(shape)

        def closed(consts, *selected):
            run = jaxpr_as_fun(ClosedJaxpr(program.jaxpr, consts))
            return structure.unflatten(run(*jax.tree.leaves(selected)))

        positions = 1 if single else tuple(range(1, len(selected) + 1))
        return _gradient(closed, positions, has_aux)(program.consts, *selected)

    return gradient


def _gradient(loss: Callable, argnums: int | Sequence[int], has_aux: bool) -> Callable:
    """`mixflow_grad` of a loss that closes over no traced values."""

    @jax.custom_vjp
    def mixflow_gradient(*arguments):
        return transparent(jax.grad(loss, argnums, has_aux)(*arguments))

    def forward(*arguments):
        return jax.grad(loss, argnums, has_aux)(*arguments), arguments

    def backward(arguments, cotangent):
        cotangent, of_aux = cotangent if has_aux else (cotangent, None)
        leaves, structure = jax.tree.flatten(arguments)
        smooth = [i for i, leaf in enumerate(leaves) if _is_inexact(leaf)]  # integers and keys have no derivative
        direction = {i: jnp.zeros_like(leaves[i]) for i in smooth}
        places = structure.unflatten(range(len(leaves)))
        for number, v in [(argnums, cotangent)] if isinstance(argnums, int) else zip(argnums, cotangent, strict=True):
            for i, part in zip(jax.tree.leaves(places[number]), jax.tree.leaves(v), strict=True):
                direction[i] += part

        def value_and_aux(values):
            merged = list(leaves)
            for i, value in values.items():
                merged[i] = value
            result = loss(*structure.unflatten(merged))
            value, aux = result if has_aux else (result, None)
            return value, [x for x in jax.tree.leaves(aux) if _is_inexact(x)]

        def pulled(values, of_aux):
            (value, _), pull = jax.vjp(value_and_aux, values)
            return pull((jnp.ones_like(value), of_aux))[0]

        # The pull-back is linear in the cotangent of aux, so the derivative along that cotangent is its part.
        of_aux = [c for c in jax.tree.leaves(of_aux) if c.dtype != jax.dtypes.float0]
        point = {i: leaves[i] for i in smooth}, list(map(jnp.zeros_like, of_aux))
        gradient = jax.jvp(pulled, point, (direction, of_aux))[1]
        return structure.unflatten(map(gradient.get, range(len(leaves))))

    mixflow_gradient.defvjp(forward, backward)
    return mixflow_gradient


def _is_inexact(x: Array) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)
