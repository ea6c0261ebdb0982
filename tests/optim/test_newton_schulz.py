"""Newton-Schulz iterations against what they do to singular values, and against the gradient they follow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.errors import UserError
from nested_jax.optim import newton_schulz as eager_newton_schulz

newton_schulz = jax.jit(eager_newton_schulz, static_argnums=1, static_argnames=("steps", "form", "step_size", "dtype"))


def matrix(rows, columns, seed=0):
    return jax.random.normal(jax.random.key(seed), (rows, columns), jnp.float64)


@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7)], ids=str)
@pytest.mark.parametrize("steps", [1, 5])
def test_quintic_is_a_polynomial_of_the_singular_values(x64, shape, steps):
    u, s, vt = np.linalg.svd(matrix(*shape), full_matrices=False)
    s = s / np.sqrt(np.sum(s**2))
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    np.testing.assert_allclose(newton_schulz(matrix(*shape), steps), (u * s) @ vt, rtol=1e-6, atol=1e-7)


def test_five_quintic_steps_bring_singular_values_near_one(x64):
    """From the smallest that is promised, a fiftieth of the norm, on."""
    values = jnp.geomspace(0.03, 1, 25)
    assert values.min() / jnp.linalg.norm(values) < 1 / 50
    values = values[values / jnp.linalg.norm(values) > 1 / 50]
    after = jnp.linalg.svd(newton_schulz(jnp.diag(values)))[1]
    assert after.min() > 0.65 and after.max() < 1.15


@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7)], ids=str)
def test_gradient_form_descends_on_the_distance_to_orthogonality(x64, shape):
    """The objective is written on the side where it can be zero."""
    start = matrix(*shape) / jnp.linalg.norm(matrix(*shape))

    def distance(o):
        gram = o @ o.T if shape[0] < shape[1] else o.T @ o
        return jnp.sum((gram - jnp.eye(min(shape))) ** 2) / 4

    slope = jax.jit(jax.grad(distance))
    for step_size in (0.5, 0.3):
        expected = start
        for _ in range(3):
            expected = expected - step_size * slope(expected)
        got = newton_schulz(matrix(*shape), 3, form="gradient", step_size=step_size)
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7)], ids=str)
def test_gradient_form_converges_to_the_polar_factor(x64, shape):
    u, _, vt = np.linalg.svd(matrix(*shape), full_matrices=False)
    np.testing.assert_allclose(newton_schulz(matrix(*shape), 60, form="gradient"), u @ vt, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", ["quintic", "gradient"])
def test_stacked_matrices_are_each_their_own(x64, form):
    """Under two leading axes, one of the matrices zero."""
    stack = jax.random.normal(jax.random.key(1), (2, 3, 4, 6), jnp.float64).at[1, 2].set(0.0)
    got = jax.jit(lambda x: newton_schulz(x, form=form))(stack)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_allclose(got[i, j], newton_schulz(stack[i, j], form=form), rtol=1e-10)
    assert jnp.all(got[1, 2] == 0) and jnp.any(got[0, 2] != 0)


@pytest.mark.parametrize("form", ["quintic", "gradient"])
def test_derivatives_are_finite_at_zero_and_right_elsewhere(x64, form):
    call = lambda x: jnp.sum(jnp.sin(newton_schulz(x, 3, form=form)))
    twice = lambda x: jnp.sum(jax.grad(call)(x) ** 2)
    gradient = jax.jit(jax.grad(call))
    for derivative in (gradient, jax.jit(jax.grad(twice))):
        np.testing.assert_array_equal(derivative(jnp.zeros((3, 4))), 0)
    x, direction, step = matrix(3, 4), matrix(3, 4, seed=2), 1e-5
    numeric = (call(x + step * direction) - call(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(jnp.sum(gradient(x) * direction), numeric, rtol=1e-6)


@pytest.mark.parametrize("form", ["quintic", "gradient"])
def test_bfloat16_on_request(form):
    x = jax.random.normal(jax.random.key(0), (8, 16))
    exact, rough = newton_schulz(x, 1, form=form), newton_schulz(x, 1, form=form, dtype=jnp.bfloat16)
    assert rough.dtype == jnp.float32
    assert 0 < optax.global_norm(rough - exact) < 4 * 2**-8 * optax.global_norm(exact)  # a few roundings a step


def test_quintic_in_bfloat16_is_as_orthogonal():
    """Its five steps enlarge rounding errors, but singular values end where they do in float32."""
    values = jnp.linalg.svd(newton_schulz(jax.random.normal(jax.random.key(0), (8, 16)), dtype=jnp.bfloat16))[1]
    assert values.min() > 0.65 and values.max() < 1.25


def test_invalid_arguments_are_refused():
    for x, options, line in [
        (jnp.ones(3), {}, r"takes matrices, not shape \[3\]"),
        (jnp.ones((3, 3)), {"steps": 0}, "newton_schulz: steps 0 is out of range: give a whole number of at least 1"),
        (jnp.ones((3, 3)), {"form": "cubic"}, "form 'cubic' is unknown: give one of quintic, gradient"),
        (jnp.ones((3, 3)), {"form": "gradient", "step_size": float("nan")}, "newton_schulz: step_size nan is not finite"),
        (jnp.ones((3, 3)), {"form": "gradient", "step_size": -0.5}, "step_size -0.5 .*: give a number above 0"),
    ]:
        with pytest.raises(UserError, match=line):
            eager_newton_schulz(x, **options)
