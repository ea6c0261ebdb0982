"""Newton-Schulz iterations: orthogonalisation by matrix products alone."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from nested_jax.errors import UserError, assert_choice
from nested_jax.numerics import unit_norm, upcast
from nested_jax.optim._hyperparameters import POSITIVE, check, check_count
from nested_jax.typing import Array, Float


def newton_schulz(
    x: Float[Array, "*batch M N"],
    steps: int = 5,
    *,
    form: Literal["quintic", "gradient"] = "quintic",
    step_size: ArrayLike = 0.5,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch M N"]:
    """Orthogonalises matrices: U V^T of x = U diag(s) V^T, approximately (quintic) or in the limit (gradient).

        O_0 = x / |x|_F
        quintic:   O <- a O + b (O O^T) O + c (O O^T)^2 O        a, b, c = 3.4445, -4.7750, 2.0315
        gradient:  O <- O - step_size O (O^T O - I)

    The quintic form is Muon's, as in optax: five steps bring singular values above |x|_F / 50 to between 0.65 and 1.15,
    and smaller ones closer to 1. The gradient form is gradient descent on |O^T O - I|^2 / 4; with a step size of 1/2 it is
    the cubic Newton-Schulz iteration. Zeros stay zeros, with zero derivatives; in the quintic form float32 or float64 whose
    squares overflow become zeros, as in optax.

    Args:
        x: matrices (..., M, N) in either orientation: the iteration commutes with transposition.
        steps: number of iterations, at least 1.
        form: which iteration.
        step_size: of the gradient form, above 0.
        dtype: dtype of the products, such as bfloat16. None: that of x.

    Returns:
        Matrices of the shape and dtype of x.

    Raises:
        UserError: x is no matrix or not of floats, the form is unknown, steps are below 1, or the step size is not finite
            and above 0.

    Source: NL Eq. 43-44 (gradient); Jordan et al., Muon, 2024 (quintic).

    >>> x = jnp.array([[3.0, 0.0], [0.0, 4.0]])
    >>> newton_schulz(x, 20, form="gradient").round(3).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    if x.ndim == 0:
        raise UserError(
            f"newton_schulz takes matrices, not the number {x}: in optax.inject_hyperparams name its argument in static_args"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"newton_schulz takes floats, not {x.dtype}: give x.astype(float)")
    if x.ndim < 2:
        raise UserError(f"newton_schulz takes matrices, not shape {list(x.shape)}: give at least two axes")
    check_count("newton_schulz", steps=steps)
    assert_choice("newton_schulz form", form, ("quintic", "gradient"))
    check("newton_schulz", POSITIVE, step_size=step_size)
    if x.size == 0:
        return x
    o, dtype = upcast(x), dtype or x.dtype
    if dtype != o.dtype:  # squares of float16 overflow above 255
        o = unit_norm(o, (-2, -1)).astype(dtype)
    o = _quintic(o, steps) if form == "quintic" else _gradient(o, steps, step_size)
    return o.astype(x.dtype)


def _quintic(x, steps):
    """optax's iteration: its Muon with a momentum of decay 0."""
    nonzero = jnp.sum(jnp.square(upcast(x)), (-2, -1), keepdims=True) != 0
    x = jnp.where(nonzero, x, 1)  # a norm has no derivative at zero
    axes = optax.contrib.MuonDimensionNumbers(-2, -1)
    muon = optax.contrib.scale_by_muon(ns_steps=steps, beta=0.0, nesterov=False, weight_dimension_numbers=axes)
    return jnp.where(nonzero, jnp.asarray(muon.update(x, muon.init(x))[0]), 0)


def _gradient(x, steps, step_size):
    o = unit_norm(x, (-2, -1))
    wide = o.shape[-2] < o.shape[-1]

    def step(_, o):
        transposed = jnp.swapaxes(o, -2, -1)
        cube = (o @ transposed) @ o if wide else o @ (transposed @ o)  # by the smaller of the two Gram matrices
        return o - step_size * (cube - o)

    return jax.lax.fori_loop(0, steps, step, o)
