"""Inner loops: equal values and gradients for every checkpoint and rule; memory, forward passes, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rare import cases

from nested_jax import Level, optim, run
from nested_jax.errors import UserError
from nested_jax.meta import mixflow_grad, unroll

CHECKPOINTS = ("full", "sqrt", "log", 3, (3, 2), 13)
RULES = {
    "sgd": lambda rate: optax.sgd(rate),
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "adam": lambda rate: optax.adam(rate, eps_root=1e-8),
    "delta momentum": lambda rate: optim.delta_momentum(rate),
    "deep momentum": lambda rate: optim.deep_momentum(rate, hidden=3),
    "m3": lambda rate: optim.m3(rate, slow_period=2, second_moment=False),  # which would amplify rounding
}
T = 13


def tasks(seed=0):
    """Inputs and targets of every step."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(T, 5, 3))), jnp.asarray(rng.normal(size=(T, 5, 2)))


def start(seed=1):
    rng = np.random.default_rng(seed)
    return {"up": jnp.asarray(rng.normal(size=(3, 4))), "down": jnp.asarray(rng.normal(size=(4, 2)))}


def inner_loss(params, task):
    x, target = task
    return jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"] - target) ** 2)


def outer(params, rate, xs, name="sgd", gradient=jax.grad, loop=unroll, **keywords):
    """The loss on the first task after learning from all, and the losses on the way."""
    rule = RULES[name](rate)

    def step(carry, task):
        params, state = carry
        updates, state = rule.update(gradient(inner_loss)(params, task), state, params)
        return (optax.apply_updates(params, updates), state), inner_loss(params, task)

    (params, _), losses = loop(step, (params, rule.init(params)), xs, **keywords)
    return inner_loss(params, jax.tree.map(lambda x: x[0], xs)) + jnp.sum(losses * jnp.linspace(0.5, 1.5, T))


def differentiated(**keywords):
    return jax.jit(jax.value_and_grad(functools.partial(outer, **keywords), (0, 1, 2)))


def assert_close(got, expected, rtol=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12), got, expected)


@pytest.mark.parametrize("name", cases(RULES, RULES.keys() - {"deep momentum", "m3", "adam", "momentum"}))
def test_gradients_are_those_of_a_plain_scan(x64, name):
    """With respect to the start, the rate and every task, for every checkpoint, with either gradient inside."""
    expected = differentiated(name=name, loop=jax.lax.scan)(start(), 0.1, tasks())
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))
    for checkpoint in CHECKPOINTS if name == "adam" else ("sqrt",):
        assert_close(differentiated(name=name, checkpoint=checkpoint)(start(), 0.1, tasks()), expected)
    assert_close(differentiated(name=name, gradient=mixflow_grad)(start(), 0.1, tasks()), expected)


def test_gradients_are_finite_differences(x64):
    by_rate = jax.jit(jax.value_and_grad(lambda rate: outer(start(), rate, tasks(), "momentum")))
    slope = (by_rate(0.1 + 1e-6)[0] - by_rate(0.1 - 1e-6)[0]) / 2e-6
    assert float(by_rate(0.1)[1]) == pytest.approx(float(slope), rel=1e-7)


@pytest.mark.parametrize("checkpoint", ["sqrt", (2, 2, 2)])
def test_derivatives_by_inputs_of_steps_that_do_not_split_evenly(x64, checkpoint):
    """By reverse mode, and by forward mode over it; among the inputs are integers and keys, which have no derivative."""
    xs = {"x": jnp.linspace(0.5, 1.5, T), "i": jnp.arange(T), "key": jax.random.split(jax.random.key(0), T)}

    def step(w, x):
        w = jnp.sin(w * x["x"]) + 0.1 * x["i"] + jax.random.normal(x["key"])
        return w, w**2

    def value(w, x, loop):
        w, ys = loop(step, w, xs | {"x": x})
        return w + jnp.sum(ys * jnp.linspace(0.5, 1.5, T))

    def derivatives(loop):
        slope = jax.grad(functools.partial(value, loop=loop), (0, 1))
        return jax.jit(lambda w, x: jax.jvp(slope, (w, x), (w, x)))(0.3, xs["x"])

    assert_close(derivatives(functools.partial(unroll, checkpoint=checkpoint)), derivatives(jax.lax.scan))


def test_steps_without_inputs():
    double = lambda w, x: (2 * w, x)
    for checkpoint in ("none", "full", "sqrt", (2, 2)):
        assert unroll(double, 1.0, length=7, checkpoint=checkpoint) == (128.0, None)
    assert unroll(double, jnp.ones(()), None, 7, debug=True)[0] == 128.0
    assert unroll(double, 1.0, jnp.ones(7), 7)[0] == 128.0
    with pytest.raises(UserError, match="length=6 of a stream of 7"):
        unroll(double, 1.0, jnp.ones(7), length=6)
    for length in (0, -1, 2.5, True):
        with pytest.raises(UserError, match="length=.*: give a whole number of steps from 1"):
            unroll(double, 1.0, length=length)


@pytest.mark.slow
def test_third_derivatives(x64):
    """Two derivatives, in reverse, of a loop with inner gradients."""
    third = lambda **how: jax.jit(jax.grad(jax.grad(lambda rate: outer(start(), rate, tasks(), **how))))(0.1)
    expected = third(loop=jax.lax.scan)
    for gradient in (jax.grad, mixflow_grad):
        assert_close(third(gradient=gradient), expected, 1e-9)


def test_forward_mode_and_vmap(x64):
    by_rate = lambda rate, xs, loop=unroll: outer(start(), rate, xs, "momentum", loop=loop)
    slope = jax.jit(jax.grad(by_rate))
    expected = slope(0.1, tasks())
    assert_close(jax.jit(lambda rate: jax.jvp(lambda rate: by_rate(rate, tasks()), (rate,), (1.0,))[1])(0.1), expected)
    both = jax.tree.map(lambda *x: jnp.stack(x), tasks(0), tasks(7))
    each = jax.jit(jax.vmap(jax.grad(by_rate), (None, 0)))(0.1, both)
    assert_close(each, jnp.stack([expected, slope(0.1, tasks(7))]))


def test_mixflow_is_for_reverse_mode():
    gradient = mixflow_grad(lambda w: jnp.sum(w**3))
    for forward in (lambda w: jax.jvp(gradient, (w,), (w,)), jax.jit(lambda w: jax.jvp(gradient, (w,), (w,)))):
        with pytest.raises(TypeError, match="forward-mode .* custom_vjp"):
            forward(jnp.ones(2))


def test_a_loss_whose_own_rule_has_no_forward_mode():
    """Its forward rule calls the function itself, which `jax.grad` takes and `mixflow_grad` does not."""
    square = jax.custom_vjp(lambda w: w**2)
    square.defvjp(lambda w: (square(w), w), lambda w, v: (2 * w * v,))
    twice = lambda gradient: jax.grad(gradient(lambda w: square(w) * w))(3.0)
    assert twice(jax.grad) == pytest.approx(18.0)
    with pytest.raises(TypeError, match="forward-mode .* custom_vjp"):
        twice(mixflow_grad)


def test_mixflow_stores_no_inner_backward_pass():
    """Temporary memory of eight layers, each computed again, that 256 tokens pass."""
    w, x = jnp.ones((8, 64, 64)) / 8, jnp.ones((256, 64))

    def outer(gradient, w):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), prevent_cse=False)
        inner = lambda w: jnp.mean(jax.lax.scan(layer, x, w)[0] ** 2)
        return jnp.sum(gradient(inner)(w) ** 2)

    def used(gradient):
        compiled = jax.jit(jax.grad(functools.partial(outer, gradient))).lower(w).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert used(jax.grad) > 1.25 * used(mixflow_grad)  # 1.9 by the compiler of JAX 0.10, 1.4 by that of 0.12


def test_mixflow_is_grad_in_all_its_forms(x64):
    """Several arguments, auxiliary output, integers among the arguments."""
    rng = np.random.default_rng(0)
    w, b, x = (jnp.asarray(rng.normal(size=s)) for s in ((4, 3), (3,), (5, 4)))

    def loss(w, tree, i):
        y = jnp.tanh(tree["x"] @ w + tree["b"][None])
        return jnp.sum(y[i] ** 3), {"mean": y.mean(), "place": y[:, 0].argmax(), "first": y[0] * w[0]}

    def total(of, argnums, has_aux):
        def value(w, b, x):
            one = loss if has_aux else lambda *a: loss(*a)[0]
            out = of(one, argnums, has_aux)(w, {"b": b, "x": x}, jnp.array([0, 2]))
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out))

        return jax.jit(jax.value_and_grad(value, (0, 1, 2)))(w, b, x)

    for argnums in (0, 1, (0, 1), (1, 0)):
        for has_aux in (False, True):
            assert_close(total(mixflow_grad, argnums, has_aux), total(jax.grad, argnums, has_aux))


def test_mixflow_differentiates_what_its_loss_closes_over(x64):
    """A rate from an outer gradient, twice, and integers that are traced."""

    def value(of, rate, i):
        w = jnp.array([0.3, -0.5, 0.7])
        return jnp.sum(of(lambda w: jnp.sum(jnp.tanh(rate * w) ** 3) * w[i])(w) ** 2)

    twice = lambda of: jax.jit(jax.value_and_grad(jax.grad(functools.partial(value, of))))(1.3, 1)
    assert_close(twice(mixflow_grad), twice(jax.grad))


@pytest.mark.parametrize(
    ("name", "gradient"),
    [
        ("momentum", jax.grad),
        ("momentum", mixflow_grad),
        ("adam", jax.grad),
        ("adam", mixflow_grad),
        pytest.param("m3", mixflow_grad, marks=pytest.mark.slow),
        pytest.param("deep momentum", jax.grad, marks=pytest.mark.slow),
        pytest.param("deep momentum", mixflow_grad, marks=pytest.mark.slow),
        pytest.param("m3", jax.grad, marks=pytest.mark.slow),
    ],
)
def test_derivatives_are_finite_at_zero_gradients(name, gradient):
    """A layer of zeros and a masked task: all inner gradients are exactly zero."""
    params = jax.tree.map(jnp.zeros_like, start())
    slopes = jax.jit(jax.grad(functools.partial(outer, name=name, gradient=gradient), (0, 1, 2)))
    got = slopes(params, 0.1, jax.tree.map(jnp.zeros_like, tasks()))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


def test_mixflow_is_called_as_grad_is(x64):
    """Keywords, arguments that are no arrays, argument numbers of NumPy's."""
    w = jnp.array([0.3, -0.5, 0.7])
    loss = lambda how, w, *, power: jnp.sum(getattr(jnp, how)(w) ** power)
    value = lambda of, w: jnp.sum(of(loss, np.int64(1))("tanh", w, power=3) ** 2)
    assert_close(jax.grad(lambda w: value(mixflow_grad, w))(w), jax.grad(lambda w: value(jax.grad, w))(w))


@pytest.mark.parametrize("argnums", [2, -3, (0, 2), ()])
def test_mixflow_of_missing_arguments(argnums):
    with pytest.raises(UserError, match=r"mixflow_grad: argnums=.* of 2 arguments"):
        mixflow_grad(lambda w, b: w * b, argnums)(1.0, 2.0)


def test_mixflow_takes_random_keys_and_the_last_argument_by_minus_one(x64):
    loss = lambda key, w: jnp.sum(jnp.tanh(w * jax.random.normal(key, (3,))) ** 3)
    value = lambda of, w: jnp.sum(of(loss, -1)(jax.random.key(0), w) ** 2)
    w = jnp.array([0.3, -0.5, 0.7])
    assert_close(jax.grad(lambda w: value(mixflow_grad, w))(w), jax.grad(lambda w: value(jax.grad, w))(w))


def test_debug_is_the_same_loop_in_python(x64):
    steps = []

    def step(w, x):
        steps.append(float(x))  # no tracer is ever seen
        return w * jnp.sin(x), {"w": w}

    xs = jnp.arange(1.0, 6.0)
    got = unroll(step, jnp.asarray(0.7), xs, debug=True)
    assert steps == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert_close(got, unroll(lambda w, x: (w * jnp.sin(x), {"w": w}), jnp.asarray(0.7), xs), 1e-12)
    assert_close(
        jax.grad(lambda w: unroll(lambda w, x: (w * jnp.sin(x), w), w, xs, debug=True)[0])(0.7),
        jax.grad(lambda w: unroll(lambda w, x: (w * jnp.sin(x), w), w, xs)[0])(0.7),
    )


@pytest.mark.parametrize(("checkpoint", "on_host"), [("sqrt", [3]), (5, [4]), ((3, 2), [3, 2]), ("log", [4])])
def test_states_offloaded_to_the_host(x64, checkpoint, on_host):
    """The states before the segments of 17 steps, in every layer of segments; the shorter last one is not recomputed."""
    step = lambda w, x: (jnp.sin(w * x), w)
    xs = jnp.linspace(0.5, 1.5, 17)
    by = lambda w, **keywords: sum(jnp.sum(part) for part in unroll(step, w, xs, **keywords))
    offloaded = jax.jit(jax.value_and_grad(functools.partial(by, checkpoint=checkpoint, offload=True)))
    program = str(jax.make_jaxpr(offloaded)(0.3))
    assert all(f"f64<host>[{states}]" in program for states in on_host)
    assert_close(offloaded(0.3), jax.jit(jax.value_and_grad(by))(0.3))


def test_offload_needs_segments():
    with pytest.raises(UserError, match="offload=True .* give checkpoint='sqrt' or a number, not 'full'"):
        unroll(lambda w, x: (w * x, w), 0.3, jnp.ones(4), checkpoint="full", offload=True)


def test_a_level_takes_the_same(x64):
    """`run(checkpoint=)` and `unroll` of its step."""
    level = Level(lambda slower: jnp.asarray(0.5), lambda s, x, slower: (jnp.sin(s + x[0]), s), period=1)
    xs = jnp.linspace(0.0, 1.0, 37)
    expected = jax.jit(jax.grad(lambda s: jax.lax.scan(lambda s, x: (jnp.sin(s + x), s), s, xs)[0]))(0.5)
    for checkpoint in ("log", (3, 4), (2, 2, 2)):
        assert_close(jax.jit(jax.grad(lambda s, c=checkpoint: run(level, s, xs, checkpoint=c)[0]))(0.5), expected)


@pytest.mark.parametrize(
    ("checkpoint", "states", "slopes"),
    [("sqrt", 8, 8), (16, 16, 4), (33, 33, 2), (50, 50, 2), ((4, 4), 8, 4), ("log", 12, 4)],
)
def test_memory_is_that_of_the_table(checkpoint, states, slopes):
    """Temporary memory of 64 steps on a large state: the states of segments, and the slopes inside the innermost one.

    Segments of two lengths, one step apart, where their number does not divide the steps.
    """
    size = 2**16
    step = lambda s, x: (jnp.sin(s) * x, None)
    value = lambda s: jnp.sum(unroll(step, s, jnp.ones(64), checkpoint=checkpoint)[0])
    used = jax.jit(jax.grad(value)).lower(jnp.ones(size, jnp.float32)).compile().memory_analysis().temp_size_in_bytes
    assert used / (4 * size) <= states + slopes + 6  # the present state, its cotangent, and copies of both


def compiled_for_large_inputs(steps, checkpoint, by):
    """The derivative of a loop whose inputs are of the size of its state, and its temporary memory in states."""
    size = 2**14
    step = lambda s, x: (jnp.sin(s) * x, None)
    value = lambda s, xs: jnp.sum(unroll(step, s, xs, checkpoint=checkpoint)[0])
    lowered = jax.jit(jax.grad(value, by)).lower(jnp.ones(size), jnp.ones((steps, size)))
    return lowered.as_text(), lowered.compile().memory_analysis().temp_size_in_bytes / (4 * size)


@pytest.mark.parametrize("checkpoint", ["sqrt", "log"])
def test_inputs_are_not_copied(checkpoint):
    """Steps that do not split evenly take as much memory as those that do, and the step is compiled at most twice as often.

    By the inputs, there is one copy of their derivative at most, beside the states.
    """
    (even, used), (uneven, more) = (compiled_for_large_inputs(steps, checkpoint, 0) for steps in (64, 79))
    assert used < 30 and more <= used + 4
    assert uneven.count("sine") <= 2 * even.count("sine")
    if checkpoint == "sqrt":
        assert compiled_for_large_inputs(79, checkpoint, 1)[1] < 1.6 * 79


@pytest.mark.parametrize(
    ("checkpoint", "passes"), [("none", 1), ("full", 2), ("sqrt", 2), (16, 2), ((4, 4), 3), ((2, 2, 2), 4), ("log", 4)]
)
def test_forward_passes_are_those_of_the_table(checkpoint, passes):
    """Forward passes of 64 steps under `jax.grad`, log_4 64 = 3."""
    runs = []

    def step(s, x):
        jax.debug.callback(lambda s: runs.append(s), s)
        return jnp.sin(s) * x, None

    jax.jit(jax.grad(lambda s: unroll(step, s, jnp.ones(64), checkpoint=checkpoint)[0]))(0.5).block_until_ready()
    jax.effects_barrier()
    assert len(runs) == 64 * passes


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda s, x: ({"w": s["w"].astype(jnp.float16)}, x), r"state\['w'\] from float32\[3\] to float16\[3\]"),
        (lambda s, x: ({"w": s["w"][:2]}, x), r"state\['w'\] from float32\[3\] to float32\[2\]"),
        (lambda s, x: ({"w": s["w"], "m": x}, x), r"changes the state's structure at state\['m'\]"),
        (lambda s, x: s, r"the step returns PyTreeDef\({'w': \*}\): return \(state, y\)"),
    ],
)
def test_a_step_that_changes_the_state_is_refused_by_path(step, message):
    state = {"w": jnp.ones(3)}
    for checkpoint in ("none", "full", "sqrt"):
        with pytest.raises(UserError, match="unroll: .*" + message):
            unroll(step, state, jnp.ones(4), checkpoint=checkpoint)
        level = Level(lambda slower: slower[0], lambda s, x, slower: step(s, x[0]), 1, "odd")
        with pytest.raises(UserError, match="level 'odd': .*" + message):
            run(level, state, jnp.ones(4), checkpoint=checkpoint)
    if "returns" not in message:
        with pytest.raises(UserError, match="unroll: .*" + message):
            unroll(step, state, jnp.ones(4), debug=True)


def test_a_list_is_no_tuple_and_a_steps_own_error_is_its_own():
    with pytest.raises(UserError, match=r"structure at state, from PyTreeDef\(\[\*\]\) to PyTreeDef\(\(\*,\)\)"):
        unroll(lambda s, x: (tuple(s), x), [jnp.ones(3)], jnp.ones(4))
    with pytest.raises(TypeError, match="unsupported operand") as error:
        unroll(lambda s, x: (s + "a", x), jnp.ones(3), jnp.ones(4))
    assert not isinstance(error.value, UserError)


def test_invalid_arguments_are_refused():
    step = lambda s, x: (s, x)
    with pytest.raises(UserError, match=r"one length of at least 1 along the leading axis, not \[0\]"):
        unroll(step, 0.0, jnp.ones((0, 2)))
    with pytest.raises(UserError, match=r"one length of at least 1 along the leading axis, not \[2, 3\]"):
        unroll(step, 0.0, (jnp.ones(2), jnp.ones(3)))
    with pytest.raises(UserError, match="a stream has arrays with a leading axis, not numbers"):
        unroll(step, 0.0, [1.0, 2.0])
    for checkpoint in (5, 0, -1, True, 2.5, "half", (), (2, 3)):
        for debug in (False, True):
            with pytest.raises(UserError, match="checkpoint=.* a number of segments from 1 to 4"):
                unroll(step, 0.0, jnp.ones(4), checkpoint=checkpoint, debug=debug)
