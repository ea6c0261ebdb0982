"""Gradients inside an inner loop whose own derivatives are Hessian-vector products."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def mixflow_grad(loss: Callable, argnums: int | Sequence[int] = 0, has_aux: bool = False) -> Callable:
    """`jax.grad` for use inside an inner loop: its backward pass is forward-over-reverse, and keeps its arguments alone.

    Differentiated by an outer reverse pass with cotangent v, it computes by one `jax.jvp` of the gradient

        v^T d(grad_a loss) / d(all arguments) = d/de grad_(all arguments) loss(a + e v)        at e = 0

    Hessians are symmetric: what reverse-over-reverse would compute from everything that the inner backward pass stored is
    the derivative along v of a backward pass computed anew.

    Args:
        loss: a scalar function, of pytrees of arrays.
        argnums: which arguments the gradient is taken of.
        has_aux: loss returns (value, what else); so then does the gradient, (gradient, what else).

    Returns:
        A function of the same arguments. It can be differentiated in reverse as often as wanted; in forward mode it can
        not, since its rule is one of the reverse pass: there, take `jax.grad`. JAX then raises a TypeError that names
        "custom_vjp".

    Source: Kemaev et al., MixFlow-MG, arXiv 2505.00793.

    >>> def outer(rate, w=2.0):
    ...     gradient = mixflow_grad(lambda w: w**4)(w)
    ...     return w - rate * gradient
    >>> print(jax.grad(outer, argnums=1)(0.1, 2.0))  # 1 - rate 12 w^2
    -3.8000002
    """
    single = isinstance(argnums, int)

    def split(arguments):
        """The differentiable leaves of all arguments, and how to put them back."""
        leaves, structure = jax.tree.flatten(arguments)
        smooth = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]
        chosen = [leaf for leaf, keep in zip(leaves, smooth, strict=True) if keep]

        def join(chosen):
            chosen = iter(chosen)
            return structure.unflatten([next(chosen) if keep else leaf for leaf, keep in zip(leaves, smooth, strict=True)])

        return chosen, join

    gradient = jax.custom_vjp(lambda *arguments: jax.grad(loss, argnums, has_aux)(*arguments))

    def forward(*arguments):
        return jax.grad(loss, argnums, has_aux)(*arguments), arguments

    def backward(arguments, cotangent):
        cotangent, of_aux = cotangent if has_aux else (cotangent, None)
        wanted = (argnums,) if single else tuple(argnums)
        direction = [jax.tree.map(jnp.zeros_like, argument) for argument in arguments]
        for i, v in zip(wanted, (cotangent,) if single else cotangent, strict=True):
            direction[i] = jax.tree.map(jnp.add, direction[i], v)
        leaves, join = split(arguments)
        along, _ = split(tuple(direction))
        value = lambda leaves: loss(*join(leaves))
        slope = jax.grad((lambda leaves: value(leaves)[0]) if has_aux else value)
        _, products = jax.jvp(slope, (leaves,), (along,))
        if has_aux:
            _, pull = jax.vjp(lambda leaves: value(leaves)[1], leaves)
            products = jax.tree.map(jnp.add, products, pull(of_aux)[0])
        products = iter(products)
        every, structure = jax.tree.flatten(arguments)
        given = [next(products) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else None for x in every]
        return structure.unflatten(given)

    gradient.defvjp(forward, backward)
    return gradient
