"""MAML and hypergradients against plain loops, finite differences and closed forms; truncated, first-order, implicit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax import Level, optim
from nested_jax.errors import UserError
from nested_jax.meta import descent, hypergradient, maml

RULES = {
    "sgd": lambda hyper: optax.sgd(hyper["rate"]),
    "momentum": lambda hyper: optax.sgd(hyper["rate"], momentum=hyper["decay"]),
    "adam": lambda hyper: optax.adam(hyper["rate"], b1=hyper["decay"], eps_root=1e-8),
    "deep momentum": lambda hyper: optim.deep_momentum(hyper["rate"], start=hyper["start"]),
}


@pytest.fixture
def setting(x64):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    start = {"up": draw(3, 4), "down": draw(4, 2)}
    hyper = {"rate": jnp.asarray(0.1), "decay": jnp.asarray(0.8)}
    return start, hyper, (draw(5, 3), draw(5, 2)), (draw(6, 3), draw(6, 2))


def inner_loss(params, task):
    x, target = task
    return jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"] - target) ** 2)


def plain(start, hyper, support, steps, name, constant=0, first_order=False):
    """A loop with `jax.grad`; the first `constant` steps have the derivative of the identity."""
    params, state = start, RULES[name](hyper).init(start)
    stop = jax.lax.stop_gradient
    fixed, kept = (stop((start, hyper)), RULES[name](stop(hyper)).init(stop(start))), (params, state)
    (params, hyper_), state = fixed if constant else ((params, hyper), state)
    for t in range(steps):
        if t == constant and constant:
            through = lambda a, b: b + (a - stop(a)) if jnp.issubdtype(b.dtype, jnp.inexact) else b
            params, state = jax.tree.map(through, kept, stop((params, state)))
            hyper_ = hyper
        gradient = jax.grad(inner_loss)(params, support)
        gradient = stop(gradient) if first_order else gradient
        updates, state = RULES[name](hyper_).update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(lambda a, b: stop(b) + a - stop(a), start, params) if constant == steps else params


def assert_close(got, expected, rtol=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-14), got, expected)


OPTIONS = [{}, {"first_order": True}, {"truncate": 0}, {"truncate": 2}, {"truncate": 5}]
RARE = [("deep momentum", i) for i in range(5)] + [("adam", i) for i in (1, 2, 4)]  # combinations of name and options


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, marks=[pytest.mark.slow] * ((name, i) in RARE))
        for name in RULES
        for i, options in enumerate(OPTIONS)
    ],
)
def test_maml_is_a_plain_loop(setting, name, options):
    start, hyper, support, query = setting
    if name == "deep momentum":
        hyper = hyper | {"start": optim.deep_momentum_start(start, 3)}
    steps, last = 5, options.get("truncate", 5)
    adapt = maml(inner_loss, RULES[name], steps, **options)
    by = lambda start, hyper: inner_loss(adapt(start, support, hyper), query)
    loop = functools.partial(plain, steps=steps, name=name, constant=steps - last, first_order="first_order" in options)
    expected = lambda start, hyper: inner_loss(loop(start, hyper, support), query)
    got, want = (jax.jit(jax.value_and_grad(f, (0, 1)))(start, hyper) for f in (by, expected))
    assert_close(got, want)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(want[1][0]))
    assert (jnp.abs(want[1][1]["rate"]) > 0) == (last > 0)


def test_truncation_covers_what_the_loss_closes_over():
    """Two of five steps of w - rate scale (w - 1) are differentiated, by whichever way the scale comes in."""
    by = lambda truncate, scale: maml(lambda w, t: scale * (w - t) ** 2 / 2, optax.sgd(0.1), 5, truncate=truncate)(3.0, 1.0)
    slopes = [jax.grad(functools.partial(by, truncate))(1.0) for truncate in (0, 2, 5)]
    np.testing.assert_allclose(slopes, [-2 * n * 0.1 * 0.9**4 for n in (0, 2, 5)], rtol=1e-5)


def test_second_derivatives_pass_a_truncation_as_first_ones_do(x64):
    """The last of two steps w - rate w^3, whose input has the start's derivatives, of any order."""
    by = lambda w: maml(lambda w, t: w**4 / 4, optax.sgd(0.1), 2, truncate=1)(w, 0.0)
    before = 0.7 - 0.1 * 0.7**3
    assert_close((jax.grad(by)(0.7), jax.grad(jax.grad(by))(0.7)), (1 - 0.3 * before**2, -0.6 * before))


def test_rules_that_use_the_loss(x64):
    """Polyak's step, whose rate is (value - least) / |gradient|^2, and a line search."""
    loss = lambda w, task: jnp.sum(jnp.array([1.0, 3.0]) * (w - task) ** 2) / 2
    start, task = jnp.array([3.0, -1.0]), jnp.array([1.0, 2.0])

    def polyak(w):
        for _ in range(3):
            value, g = jax.value_and_grad(loss)(w, task)
            w = w - value / jnp.sum(g**2) * g
        return w

    adapt = maml(loss, optax.polyak_sgd(max_learning_rate=10.0, eps=0.0), 3)
    assert_close(adapt(start, task), polyak(start))
    slope = lambda f: jax.grad(lambda w: f(w).sum())(start)
    assert_close(slope(lambda w: adapt(w, task)), slope(polyak))
    searched = maml(loss, optax.lbfgs(linesearch=optax.scale_by_backtracking_linesearch(10)), 5)(start, task)
    assert loss(searched, task) < 1e-3 * loss(start, task)


def test_maml_over_tasks(setting):
    start, _, support, query = setting
    adapt = maml(inner_loss, optax.sgd(0.1), 3)
    tasks = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), (support, query))
    each = lambda start, task: inner_loss(adapt(start, task[0]), task[1])
    together = jax.jit(jax.grad(lambda start: jax.vmap(each, (None, 0))(start, tasks).mean()))(start)
    slope = jax.jit(jax.grad(each))
    alone = [slope(start, jax.tree.map(lambda x, i=i: x[i], tasks)) for i in range(3)]
    assert_close(together, jax.tree.map(lambda *g: sum(g) / 3, *alone))
    assert_close(maml(inner_loss, optax.sgd(0.1), 0)(start, support), start)


def test_a_masked_task_has_finite_meta_gradients(setting):
    start, hyper, support, query = setting
    zero = jax.tree.map(jnp.zeros_like, (start, support))
    for name in ("momentum", "adam"):
        adapt = maml(inner_loss, RULES[name], 3)
        slopes = jax.jit(jax.grad(lambda start, hyper, adapt=adapt: inner_loss(adapt(start, zero[1], hyper), query), (0, 1)))
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes(zero[0], hyper)))


def online(checkpoint="sqrt", **options):
    """A level that descends along a stream of batches, judged by the losses on its way and at its end."""
    level = descent(
        lambda w, x, meta: inner_loss(w, x), lambda meta: RULES["momentum"](meta["hyper"]), start=lambda m: m["w"]
    )
    outer = lambda meta, state, losses, query: losses.mean() + inner_loss(state.params, query)
    return hypergradient(outer, level, checkpoint=checkpoint, **options)


def stream(steps):
    rng = np.random.default_rng(1)
    return tuple(jnp.asarray(rng.normal(size=(steps, 5, n))) for n in (3, 2))


@pytest.mark.parametrize("truncate", [None, 1, 3, 7, 9])
def test_hypergradient_is_a_plain_loop_cut_between_windows(setting, truncate):
    """Seven ticks; windows are counted from the end."""
    start, hyper, _, query = setting
    xs, T = stream(7), 7

    def loop(meta):
        rule, stop = RULES["momentum"](meta["hyper"]), jax.lax.stop_gradient
        first = carry = (meta["w"], rule.init(meta["w"]))
        losses = []
        for t in range(T):
            if truncate and (T - t) % truncate == 0:
                carry = jax.tree.map(lambda a, b: stop(b) + a - stop(a), first, carry)
            params, state = carry
            batch = jax.tree.map(lambda x: x[t], xs)  # noqa: B023
            value, gradient = jax.value_and_grad(inner_loss)(params, batch)
            updates, state = rule.update(gradient, state, params)
            carry = (optax.apply_updates(params, updates), state)
            losses.append(value)
        return sum(losses) / T + inner_loss(carry[0], query)

    meta = {"w": start, "hyper": hyper}
    found = jax.jit(online(truncate=truncate, checkpoint="full"))(meta, xs, query)
    assert_close((found.value, found.gradient), jax.jit(jax.value_and_grad(loop))(meta))


@pytest.mark.parametrize("checkpoint", [3, (2, 1)])
def test_windows_of_two_lengths_take_any_checkpoint(setting, checkpoint):
    start, hyper, _, query = setting
    meta = {"w": start, "hyper": hyper}
    found, expected = (jax.jit(online(truncate=3, checkpoint=c))(meta, stream(7), query) for c in (checkpoint, "none"))
    assert_close(found, expected)


def test_infinities_pass_between_windows():
    """A level that keeps the least it has seen begins at infinity."""
    least = Level(
        lambda slower: {"least": jnp.full((), jnp.inf), "w": slower[0]},
        lambda s, x, slower: ({"least": jnp.minimum(s["least"], (s["w"] * x[0]) ** 2), "w": s["w"] * 0.9}, x[0]),
        period=1,
    )
    outer = lambda meta, state, emitted: state["least"] + state["w"]
    xs = jnp.array([3.0, 2.0, 1.0, 4.0])
    whole, cut = (hypergradient(outer, least, truncate=truncate)(2.0, xs) for truncate in (None, 2))
    assert whole.value == pytest.approx(float(cut.value)) and jnp.isfinite(cut.gradient)


@pytest.mark.parametrize("truncate", [None, 1, 4, 32])
def test_memory_of_a_hypergradient(truncate):
    """Through 256 ticks on a large state, in states: at most some roots of them, whatever the windows."""
    size = 2**14
    level = Level(lambda slower: slower[0] * jnp.ones(size), lambda s, x, slower: (jnp.sin(s) * x[0], None), period=1)

    def used(checkpoint):
        by = hypergradient(lambda meta, s, _: s.sum(), level, truncate=truncate, checkpoint=checkpoint)
        compiled = jax.jit(lambda meta, xs: by(meta, xs)[:2]).lower(0.5, jnp.ones(256)).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * size)

    assert used("sqrt") < 56 and used("none") > 200


def test_memory_of_maml():
    """256 steps of adaptation of a large state, kept or not."""
    size = 2**14

    def used(checkpoint):
        adapt = maml(lambda w, task: jnp.sum(jnp.sin(w * task)), optax.sgd(0.1), 256, checkpoint=checkpoint)
        compiled = jax.jit(jax.grad(lambda w: adapt(w, 1.0).sum())).lower(jnp.ones(size)).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * size)

    assert used("sqrt") < 56 and used("none") > 200


def penalised(steps=400):
    """Ridge regression by gradient descent: its fixed point is a closed form of meta."""
    rng = np.random.default_rng(2)
    x, y, q = (jnp.asarray(rng.normal(size=s)) for s in ((8, 3), (8,), (3,)))
    loss = lambda w, _, meta: jnp.mean((x @ w - y) ** 2) / 2 + jnp.sum(jnp.exp(meta["penalty"]) * w**2) / 2
    outer = lambda meta, state, emitted: jnp.sum((state.params - q) ** 2) + jnp.sum(meta["penalty"] ** 2)

    def solved(meta):
        w = jnp.linalg.solve(x.T @ x / 8 + jnp.diag(jnp.exp(meta["penalty"])), x.T @ y / 8)
        return jnp.sum((w - q) ** 2) + jnp.sum(meta["penalty"] ** 2)

    return loss, outer, solved, {"penalty": jnp.array([0.1, -0.5, 0.3])}, jnp.zeros(steps)


@pytest.mark.parametrize("implicit, rule", [("symmetric", optax.sgd(0.3)), ("general", optax.sgd(0.3, momentum=0.5))])
def test_implicit_hypergradients_are_those_of_the_closed_form(x64, implicit, rule):
    loss, outer, solved, meta, ticks = penalised()
    level = descent(loss, rule, start=lambda meta: jnp.zeros(3))
    found = jax.jit(hypergradient(outer, level, implicit=implicit, tolerance=1e-12))(meta, ticks)
    assert_close((found.value, found.gradient), jax.value_and_grad(solved)(meta), 1e-8)
    assert found.fixed_point_residual < 1e-10 and found.linear_residual < 1e-10
    unrolled = jax.jit(hypergradient(outer, level))(meta, ticks)
    assert_close(found.gradient, unrolled.gradient, 1e-8)


@pytest.mark.parametrize("implicit", ["symmetric", "general"])
def test_residuals_of_an_implicit_hypergradient(x64, implicit):
    """Of the fixed point, after few steps, and of the linear system, after few iterations."""
    loss, outer, _, meta, _ = penalised()
    level = descent(loss, optax.sgd(0.3), start=lambda meta: jnp.zeros(3))
    for steps, options, settled, solved in [
        (2, {}, False, True),
        (400, {"iterations": 1}, True, False),
        (400, {"tolerance": 0.5}, True, False),
        (2, {"iterations": 1}, False, False),
    ]:
        found = jax.jit(hypergradient(outer, level, implicit=implicit, **{"tolerance": 1e-10} | options))(
            meta, jnp.zeros(steps)
        )
        assert (found.fixed_point_residual < 1e-10, found.linear_residual < 1e-8) == (settled, solved)
        assert settled or found.fixed_point_residual > 1e-2
        assert solved or found.linear_residual > 1e-3


def test_an_implicit_hypergradient_of_parameters_of_two_types():
    """A bfloat16 and a float32 part; two constants of one equation, each the mean of target and meta."""
    wide = lambda w: jnp.stack([w["a"].astype(jnp.float32), w["b"]])
    loss = lambda w, _, meta: jnp.sum((wide(w) - meta["w"]) ** 2 + (wide(w) - 1) ** 2)
    start = lambda meta: {"a": jnp.zeros((), jnp.bfloat16), "b": jnp.zeros(())}
    outer = lambda meta, state, _: wide(state.params).sum()
    level = descent(loss, optax.sgd(0.25), start=start)
    for implicit in ("symmetric", "general"):
        found = jax.jit(hypergradient(outer, level, implicit=implicit))({"w": 2.0}, jnp.zeros(20))
        assert found.value == pytest.approx(3.0, abs=1e-2) and found.gradient["w"] == pytest.approx(1.0, abs=1e-2)


def test_implicit_maml(x64):
    """A start that only its nearness to the fast weights connects to them: (H + lambda)^-1 lambda v."""
    x, y = jnp.asarray(np.random.default_rng(3).normal(size=(2, 6, 3)))
    fit = lambda w: jnp.mean((x @ w - y.sum(1)) ** 2) / 2
    level = descent(lambda w, _, meta: fit(w) + jnp.sum((w - meta) ** 2), optax.sgd(0.2))
    found = hypergradient(lambda meta, state, _: state.params.sum(), level, implicit="symmetric", tolerance=1e-12)
    expected = 2 * jnp.linalg.solve(x.T @ x / 6 + 2 * jnp.eye(3), jnp.ones(3))
    assert_close(jax.jit(found)(jnp.ones(3), jnp.zeros(300)).gradient, expected, 1e-9)


def test_invalid_arguments_are_refused():
    with pytest.raises(UserError, match="maml: steps=-1"):
        maml(inner_loss, optax.sgd(0.1), -1)
    with pytest.raises(UserError, match="maml: steps=3, truncate=4"):
        maml(inner_loss, optax.sgd(0.1), 3, truncate=4)
    for steps, truncate in [(2.5, None), (True, None), ("3", None), (3, 1.5), (3, True), (3, -1), (3, float("nan"))]:
        with pytest.raises(UserError, match="maml: steps=.*, truncate=.*: give whole numbers"):
            maml(inner_loss, optax.sgd(0.1), steps, truncate=truncate)
    with pytest.raises(UserError, match="maml: 0.1 is no optax transformation"):
        maml(inner_loss, 0.1, 3)
    with pytest.raises(UserError, match="a function of hyper: give adapt"):
        maml(lambda w, t: (w - t) ** 2, optax.sgd, 3)(1.0, 2.0)
    with pytest.raises(UserError, match=r"maml: parameters\['n'\] is int32: make it a float"):
        maml(lambda w, t: (w["w"] - t) ** 2, optax.sgd(0.1), 3)({"w": 1.0, "n": 3}, 2.0)
    with pytest.raises(UserError, match="hypergradient: .* is no Level"):
        hypergradient(lambda *_: 0.0, optax.sgd(0.1))
    level = descent(inner_loss, optax.sgd(0.1))
    with pytest.raises(UserError, match=r"hypergradient: meta\['p'\] is int32"):
        hypergradient(lambda *_: 0.0, level)({"p": 1}, jnp.ones(3))
    wrong = [{"iterations": n} for n in (0, -1, 2.5, True)] + [{"tolerance": t} for t in (-1.0, float("nan"), float("inf"))]
    for options in wrong:
        with pytest.raises(UserError, match="hypergradient: iterations=.*, tolerance="):
            hypergradient(lambda *_: 0.0, level, implicit="symmetric", **options)
    with pytest.raises(UserError, match="implicit 'yes' is unknown"):
        hypergradient(lambda *_: 0.0, level, implicit="yes")
    four = Level(lambda slower: slower[0], lambda s, x, slower: (s + x.sum(), s), period=4, name="four")
    for options in ({"truncate": 1}, {"implicit": "general"}):
        with pytest.raises(UserError, match="6 data points end inside a tick of level 'four', whose period is 4"):
            hypergradient(lambda meta, state, emitted: state, four, **options)(0.0, jnp.ones(6))
    for truncate in (0, 2.5, True):
        with pytest.raises(UserError, match="truncate="):
            hypergradient(lambda *_: 0.0, level, truncate=truncate)
