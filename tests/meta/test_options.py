"""What `maml`, `descent` and `hypergradient` carry, start from and refuse, against plain loops and closed forms."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax import Level
from nested_jax.errors import UserError
from nested_jax.meta import Descent, descent, hypergradient, maml

RATE, TARGETS = 0.1, (1.0, -0.5, 2.0)
PENALTY, FAR = 3.0, 0.5


def fit(w, x, penalty):
    """Its least is at x / (1 + penalty)."""
    return jnp.sum((w - x) ** 2 + penalty * w**2) / 2


def assert_close(got, expected, rtol=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-14), got, expected)


def test_state_fresh_data_and_auxiliary_outputs(x64):
    """A loss on deviations from a running mean, with data of its own at each step; cut in two, it goes on."""

    def loss(w, x, mean):
        mean = 0.9 * mean + 0.1 * x
        return (jnp.tanh(w) * x - mean) ** 2, mean

    def with_aux(w, x, mean):
        value, mean = loss(w, x, mean)
        return (value, mean), {"x": x}

    def loop(w, mean):
        losses = []
        for x in TARGETS:
            value, gradient = jax.value_and_grad(lambda w, x=x, mean=mean: loss(w, x, mean)[0])(w)
            losses, mean, w = [*losses, value], loss(w, x, mean)[1], w - RATE * gradient
        return (w, mean), jnp.stack(losses)

    options = {"fresh": True, "carries": True, "return_state": True}
    xs, start = jnp.array(TARGETS), (0.3, 0.2)
    adapt = maml(with_aux, optax.sgd(RATE), 3, has_aux=True, checkpoint="none", **options)

    def got(w, mean):
        state, (losses, aux) = adapt(w, xs, None, mean)
        return (state.params, state.carried), losses, aux["x"]

    (ends, losses), found = loop(*start), got(*start)
    assert_close(found, (ends, losses, xs))
    total = lambda both: both[0][0] + 2 * both[0][1] + both[1].sum()
    slopes = [jax.grad(lambda w, mean, f=f: total(f(w, mean)), (0, 1))(*start) for f in (got, loop)]
    assert_close(*slopes)

    part = lambda n, **how: maml(loss, optax.sgd(RATE), n, checkpoint="none", **options, **how)
    state, first = part(2)(start[0], xs[:2], None, start[1])
    state, last = part(1)(state, xs[2:])
    assert_close(((state.params, state.carried), jnp.concatenate([first, last])), (ends, losses))
    assert isinstance(state, Descent)
    cut, on_the_way = part(3, truncate=1)(start[0], xs, None, start[1])
    assert_close((cut.params, on_the_way), (ends[0], losses))
    _, none = part(0)(start[0], xs[:0], None, start[1])
    assert none.shape == (0,)


def test_the_inner_gradient_allows_forward_mode(x64):
    """`jax.shard_map`: tests/multi_device/test_meta.py."""
    loss = lambda w, t: jnp.sum(jnp.cos(w * t))
    adapt = maml(loss, optax.sgd(RATE), 2, inner_gradient=jax.grad)
    by = lambda w: loss(adapt(w, 2.0), 1.0)
    assert_close(jax.jvp(by, (0.7,), (1.0,))[1], jax.grad(by)(0.7))


def test_rules_that_take_other_arguments_or_change_their_types():
    """Sharpness-aware minimisation, by steps in turn and by gradients of its own, whose state zero_nans is a part of."""
    loss = lambda w, task: jnp.sum(jnp.array([1.0, 3.0]) * (w - task) ** 2) / 2
    start, task, slope = jnp.array([3.0, -1.0]), jnp.array([1.0, 2.0]), jax.grad(loss)
    inner = optax.chain(optax.zero_nans(), optax.sgd(0.1))
    rules = [optax.contrib.sam(inner, optax.sgd(0.05), opaque_mode=opaque) for opaque in (True, False)]
    expected = start
    for _ in range(2):
        expected = expected - 0.1 * slope(expected + 0.05 * slope(expected, task), task)
    for rule, steps in zip(rules, (2, 4), strict=True):
        adapt = maml(loss, rule, steps)
        assert_close(adapt(start, task), expected, 1e-6)
        assert jnp.isfinite(jax.grad(lambda w, adapt=adapt: adapt(w, task).sum())(start)).all()
    with pytest.raises(
        UserError, match="maml: a part of the optimizer refuses optax's extra arguments .*not in optax.chain"
    ):
        maml(loss, optax.chain(rules[0], optax.identity()), 2)(start, task)


def test_a_hypergradient_starts_from_a_state_and_returns_more(x64):
    """Two halves of a stream, online: the second one's start is a constant."""
    level = descent(fit, optax.sgd(RATE), start=lambda meta: jnp.zeros(()))
    outer = lambda meta, state, losses: ((state.params - FAR) ** 2, (state, losses))
    for truncate in (None, 2):
        by = hypergradient(outer, level, has_aux=True, truncate=truncate, checkpoint="none")
        whole, first = by(PENALTY, jnp.ones(4)), by(PENALTY, jnp.ones(2))
        second = by(PENALTY, jnp.ones(2), state=first.aux[0])
        assert_close((second.value, second.aux[0]), (whole.value, whole.aux[0]))
        assert_close(jnp.concatenate([first.aux[1], second.aux[1]]), whole.aux[1])
        w = jnp.asarray(first.aux[0].params)

        def after(penalty, w=w):
            for _ in range(2):
                w = w - RATE * jax.grad(fit)(w, 1.0, penalty)
            return (w - FAR) ** 2

        assert_close(second.gradient, jax.grad(after)(PENALTY))


def implicit(level, meta=PENALTY, how="symmetric", stream=None, **options):
    outer = lambda meta, state, emitted: jnp.sum((state.params - FAR) ** 2) / 2
    return hypergradient(outer, level, implicit=how, **options)(meta, jnp.ones(300) if stream is None else stream)


def of_rule(rule, **options):
    return descent(fit, rule, start=lambda meta: jnp.zeros(()), **options)


EXACT = 0.015625  # (1 / (1 + penalty) - 1 / 2) times -1 / (1 + penalty)^2


def test_a_condition_and_a_solver_of_the_user():
    """Momentum's parameters are the unknowns of a symmetric system, the Hessian's, whatever the rule that found them."""
    momentum, condition = of_rule(optax.sgd(RATE, momentum=0.5)), jax.grad(fit)
    seen = []

    def exactly(matvec, v):
        seen.append(v)
        return jax.tree.map(lambda x: x / matvec([jnp.ones(())])[0], v)

    for options in ({}, {"solver": exactly}, {"how": "general"}):
        found = implicit(momentum, condition=condition, **options)
        assert float(found.gradient) == pytest.approx(EXACT, rel=1e-5) and found.linear_residual < 1e-5
    assert len(seen) == 1
    first = of_rule(optax.sgd(RATE), first_order=True)  # whose own step has no such derivative
    assert float(implicit(first, condition=condition).gradient) == pytest.approx(EXACT, rel=1e-5)
    with pytest.raises(UserError, match=r"the condition returns shapes \(\): return those of its first argument"):
        hypergradient(lambda *_: 0.0, descent(fit, optax.sgd(RATE)), implicit="general", condition=lambda *_: jnp.zeros(()))(
            jnp.ones(2), jnp.ones(2)
        )


@pytest.mark.skipif(importlib.util.find_spec("lineax") is None, reason="lineax is optional")
def test_solvers_of_lineax():
    import lineax  # pyright: ignore

    for solver, how in ((lineax.CG(1e-6, 1e-6), "symmetric"), (lineax.GMRES(1e-6, 1e-6), "general")):
        assert float(implicit(of_rule(optax.sgd(RATE)), how=how, solver=solver).gradient) == pytest.approx(EXACT, rel=1e-4)


def test_implicit_in_float16_is_computed_in_float32():
    level = descent(fit, optax.sgd(RATE), start=lambda meta: jnp.zeros((), jnp.float16))
    for how in ("symmetric", "general"):
        found = jax.jit(lambda meta, xs, how=how: implicit(level, meta, how, xs))(jnp.float16(3), jnp.ones(200, jnp.float16))
        assert found.gradient.dtype == jnp.float16 and found.linear_residual < 1e-5
        assert float(found.gradient) == pytest.approx(EXACT, rel=2e-3)


def test_implicit_derivatives_that_would_be_wrong_or_zero_are_refused():
    with pytest.raises(
        UserError, match="level 'descent' is first-order, .*: make it without first_order, or give a condition"
    ):
        implicit(of_rule(optax.sgd(RATE), first_order=True))
    with pytest.raises(UserError, match="has floats other than its parameters, such as a momentum, .*: give 'general'"):
        jax.jit(lambda: implicit(of_rule(optax.sgd(RATE, momentum=0.5))))()
    start_only = descent(lambda w, x, meta: (w - x) ** 2, optax.sgd(RATE), start=lambda meta: meta["w"])
    with pytest.raises(UserError, match=r"meta\['w'\] moves neither the fixed point nor the outer loss"):
        implicit(start_only, {"w": jnp.zeros(())})

    # A rate for each of two coupled parameters: no state, but a derivative that is not symmetric.
    rates = optax.stateless(lambda g, params: -jnp.array([0.1, 0.3]) * g)
    coupled = descent(lambda w, x, meta: fit(w, jnp.full(2, x), meta) + w[0] * w[1] / 2, rates, start=lambda m: jnp.zeros(2))
    with pytest.raises(
        UserError, match="implicit='symmetric', but the level's step has a derivative that is not: give 'general'"
    ):
        implicit(coupled)
    assert jnp.isnan(jax.jit(lambda meta: implicit(coupled, meta).gradient)(PENALTY))
    least = lambda penalty: jnp.sum((jnp.full(2, 1 / (1.5 + penalty)) - FAR) ** 2) / 2
    assert float(implicit(coupled, how="general").gradient) == pytest.approx(float(jax.grad(least)(PENALTY)), rel=1e-4)


def test_misplaced_options_are_refused():
    level = of_rule(optax.sgd(RATE))
    for options in ({"condition": jax.grad(fit)}, {"solver": lambda matvec, v: v}):
        with pytest.raises(UserError, match="condition and solver are of implicit='symmetric' or 'general'"):
            hypergradient(lambda *_: 0.0, level, **options)
    loss = lambda w, task, *carried: (w - task) ** 2
    with pytest.raises(UserError, match=r"maml: a leaf of a fresh task has shape \(2,\): give data of 3 steps"):
        maml(loss, optax.sgd(RATE), 3, fresh=True)(0.0, jnp.ones(2))
    for carries, carried in ((True, None), (False, 1.0)):
        with pytest.raises(UserError, match=r"maml: with carries=True give adapt\(start, task, hyper, carried\)"):
            maml(loss, optax.sgd(RATE), 1, carries=carries)(0.0, 1.0, None, carried)
    nested = Level(lambda slower: 0.0, lambda s, x, slower: (s, x), 1, first_order=True)
    with pytest.raises(UserError, match="is first-order"):
        hypergradient(lambda *_: 0.0, nested, implicit="general")
