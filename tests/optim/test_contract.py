"""What holds for every transformation: types, shapes, compilation, composition, stacked layers, derivatives, errors."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from rare import cases
from rule_runs import RULES, VARIANTS, last, trajectory

from nested_jax import optim
from nested_jax.errors import UserError

every_rule = pytest.mark.parametrize("name", RULES)
ALIKE = ("adam memory", "adagrad memory", "preconditioned momentum", "feature momentum", "delta momentum")  # their state
OTHERS = ("continuum", "adagrad memory, full", "non-linear momentum", "generalized gradient descent")
others_are_slow = pytest.mark.parametrize("name", cases(RULES, RULES.keys() - {*VARIANTS, *ALIKE, *OTHERS}))
PARAMS = {"dense": {"kernel": (4, 3), "bias": (3,)}, "scale": ()}


def tree(seed, dtype=jnp.float32, shapes=PARAMS):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), dtype), shapes, is_leaf=lambda s: isinstance(s, tuple))


def extra(name, shapes=None):
    """Extra arguments of a rule's update."""
    if name != "delta gradient descent":
        return {}
    rng = np.random.default_rng(7)
    shapes = {"dense/kernel": (5, 4)} if shapes is None else shapes
    return {"inputs": {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}}


def run(rule, params, gradients, **more):
    """Parameters after the last update; every update keeps the state's types."""
    return last(trajectory(rule, params, gradients, [more] * len(gradients))[1])


def run_donated(rule, params, gradients, **more):
    """Parameters and state after updates to which the state is donated, all by one compiled function."""
    rule = optax.with_extra_args_support(rule)
    update, state = jax.jit(rule.update, donate_argnums=1), rule.init(params)
    for gradient in gradients:
        updates, state = update(gradient, state, params, **more)
        params = optax.apply_updates(params, updates)
    assert update._cache_size() == 1
    return params, state


def assert_close(a, b, rtol=1e-6, atol=1e-9):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def memory_types(state):
    """Of all that a rule remembers in numbers that are not whole, also in optax's parts."""
    return {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}


@every_rule
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_types_and_shapes_stay_and_nothing_compiles_twice(name, dtype, tmp_path):
    """Memories are float32 with bfloat16 parameters too. Orbax saves and restores the state."""
    params, rule = tree(0, dtype), RULES[name](0.1)
    after, state = run_donated(rule, params, [tree(i, dtype) for i in range(4)], **extra(name))
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(state) == shapes(jax.eval_shape(rule.init, params))
    assert shapes(after) == shapes(params)
    assert memory_types(state) == (set() if name == "delta gradient descent" else {jnp.dtype("float32")})
    pairs = zip(*map(jax.tree.leaves, (after, params)), strict=True)
    assert all(jnp.isfinite(x).all() and (x != y).any() for x, y in pairs)
    if dtype == jnp.float32:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(rule.init, params))
        chex.assert_trees_all_equal(restored, state)


def test_a_fresh_state_of_numpy_parameters_can_be_saved(tmp_path):
    """Numbers of NumPy make arrays of JAX, and no state has arrays of no size."""
    params = {"kernel": np.ones((2, 2), np.float32), "scale": np.float32(2)}
    rules = [optim.generalized_gradient_descent(0.1)]
    rules += [optax.inject_hyperparams(optim.momentum)(learning_rate=np.float32(0.1), decay=np.array(0.5))]
    states = [rule.init(params) for rule in rules]
    assert all(isinstance(leaf, jax.Array) and leaf.size for leaf in jax.tree.leaves(states))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", states)


@others_are_slow
def test_composes_with_optax(x64, name):
    """In a chain with clipping and weight decay, partitioned, masked, accumulated, with a schedule, with injected rates."""
    params, gradients = tree(0, jnp.float64), [tree(i, jnp.float64) for i in range(1, 5)]
    make, more = RULES[name], extra(name)
    _, path, _ = trajectory(make(0.1), params, gradients, [more] * 4)
    plain, first = last(path), jax.tree.map(lambda x: x[0], path)

    clipped = optax.chain(optax.clip_by_global_norm(1e9), make(optax.constant_schedule(0.1)))
    assert_close(run(clipped, params, gradients, **more), plain)
    decayed = run(optax.chain(make(0.1), optax.add_decayed_weights(-0.01)), params, gradients[:1], **more)
    assert_close(decayed, jax.tree.map(lambda w, start: w - 0.01 * start, first, params))
    sizes = ("window",) if name.startswith("generalized") else ("target",) if name == "deep momentum, l2" else ()
    injected = optax.inject_hyperparams(make, sizes)(learning_rate=0.1)
    assert_close(run(injected, params, gradients, **more), plain)

    labels = {"dense": {"kernel": "a", "bias": "a"}, "scale": "b"}
    parts = run(optax.partition({"a": make(0.1), "b": optax.sgd(0.1)}, labels), params, gradients, **more)
    if name != "generalized gradient descent":  # it solves for all its parameters at once, to the solver's tolerance
        assert_close(parts["dense"], plain["dense"])
    mask = {"dense": {"kernel": True, "bias": False}, "scale": False}
    masked = run(optax.masked(make(0.1), mask), params, gradients, **more)
    assert_close(masked["dense"]["bias"], params["dense"]["bias"] + sum(g["dense"]["bias"] for g in gradients))

    halves = [jax.tree.map(lambda x: x / 2, g) for g in gradients for _ in (0, 1)]
    multiple = optax.MultiSteps(make(0.1), 2, use_grad_mean=False, accumulator_dtype=jnp.float64)
    accumulated = optax.GradientTransformationExtraArgs(multiple.init, multiple.update)
    if name == "delta gradient descent":  # each half has inputs of its own, and MultiSteps passes on the last one's alone
        with pytest.raises(UserError, match="optax.MultiSteps sums gradients of several steps and passes on inputs"):
            run(accumulated, params, halves, **more)
    else:
        assert_close(run(accumulated, params, halves, **more), plain)


def test_rules_that_need_the_inputs_of_every_step_are_not_given_sums():
    """Inside a chain too; alone, and where nothing is summed, the same arguments are right."""
    params, gradient, more = tree(0), tree(1), extra("delta gradient descent")
    delta = optim.delta_gradient_descent(0.1)
    objective = lambda weights, gradients, labels: optax.tree.vdot(weights, gradients) * labels
    general, labels = optim.generalized_gradient_descent(0.1, objective), {"labels": jnp.ones(())}
    chain = optax.chain(optax.clip_by_global_norm(1.0), delta)
    remedy = "of the last step alone: average the gradients, concatenate .* of all steps, and call update once"
    for rule, arguments, message in [
        (optax.MultiSteps(chain, 2), more, "delta_gradient_descent: optax.MultiSteps sums .* inputs " + remedy),
        (optim.scale_by_continuum(chain, 2), more, "delta_gradient_descent: continuum with period 2 sums .*" + remedy),
        (optax.MultiSteps(general, 2), labels, "generalized_gradient_descent: optax.MultiSteps .* the objective's labels"),
    ]:
        with pytest.raises(UserError, match=message):
            jax.eval_shape(lambda rule=rule, more=arguments: rule.update(gradient, rule.init(params), params, **more))
    expected, _ = delta.update(gradient, delta.init(params), params, **more)
    every = optim.scale_by_continuum(delta, 1)
    assert_close(every.update(gradient, every.init(params), params, **more)[0], expected)
    ignoring = optax.MultiSteps(optim.generalized_gradient_descent(0.1), 1)  # its default objective takes no labels
    jax.eval_shape(lambda: ignoring.update(gradient, ignoring.init(params), params, **labels))


HAS_MATRICES = pytest.mark.parametrize(
    "name", [n for n, make in RULES.items() if "dimension_numbers" in inspect.signature(make).parameters]
)
STACKED = {"blocks": {"up": (3, 4, 5), "norm": (3, 4)}, "embedding": (6, 4)}


@HAS_MATRICES
def test_stacked_layers_are_independent(x64, name):
    """By path: (L, in, out) is L matrices, (L, D) is no matrix, and an embedding is a matrix only if its path matches."""
    params, gradients = tree(0, jnp.float64, STACKED), [tree(i, jnp.float64, STACKED) for i in range(1, 5)]
    numbers, more = optim.matrices("blocks/up"), extra(name, {"blocks/up": (3, 7, 4)})
    starts = optim.deep_momentum_start(params, dimension_numbers=numbers)  # drawn for all layers at once
    make = lambda start, **options: RULES[name](0.1, **options, **({"start": start} if name.startswith("deep") else {}))
    together = run(make(starts, dimension_numbers=numbers), params, gradients, **more)

    @jax.jit
    def alone(i):
        layer = lambda tree: {"up": jax.tree.map(lambda x: x[i], tree["blocks"]["up"]), "norm": tree["blocks"]["norm"][i]}
        inputs = {"inputs": {"up": more["inputs"]["blocks/up"][i]}} if more else {}
        start = {"up": layer(starts | {"blocks": starts["blocks"] | {"norm": jnp.zeros(3)}})["up"], "norm": None}
        return run(make(start), layer(params), list(map(layer, gradients)), **inputs), layer(together)

    for i in range(3):
        own, layer = alone(i)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), layer, own)


@HAS_MATRICES
def test_axes_may_be_in_any_order(x64, name):
    """For a leaf (3, 2, 4, 5), axis 1 stacks matrices whose rows are the axes 3 and 0 and whose columns are axis 2."""
    leaf = {"w": (3, 2, 4, 5)}
    params, gradients = tree(0, jnp.float64, leaf), [tree(i, jnp.float64, leaf) for i in range(1, 5)]
    as_matrices = lambda tree: {"w": jnp.transpose(tree["w"], (1, 3, 0, 2)).reshape(2, 15, 4)}
    more = extra(name, {"w": (2, 7, 15)})
    rule = lambda *axes: RULES[name](0.1, dimension_numbers={"w": optax.contrib.MuonDimensionNumbers(*axes)})
    after = run(rule((3, 0), 2), params, gradients, **more)
    expected = run(rule(-2, -1), as_matrices(params), list(map(as_matrices, gradients)), **more)
    np.testing.assert_allclose(as_matrices(after)["w"], expected["w"], rtol=1e-9, atol=1e-12)


def test_numbers_by_path_are_those_of_optax(x64):
    """Muon's updates of stacked layers."""
    params, gradients = tree(0, jnp.float64, STACKED), [tree(i, jnp.float64, STACKED) for i in range(1, 5)]
    numbers = optim.matrices("blocks/up")
    own = run(optim.nonlinear_momentum(0.1, dimension_numbers=numbers), params, gradients)
    theirs = run(optax.contrib.muon(0.1, muon_weight_dimension_numbers=numbers), params, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), own, theirs)


def test_matrices_of_parameters_hidden_by_a_partition():
    """The part of the tree that a rule is given need not have any."""
    numbers, params = optim.matrices("up"), {"up": jnp.ones((2, 2)), "down": jnp.ones((2, 2))}
    rules = {name: optim.nonlinear_momentum(0.1, dimension_numbers=numbers) for name in params}
    rule = optax.partition(rules, {name: name for name in params})
    updates, _ = rule.update(params, rule.init(params), params)
    assert not jnp.allclose(updates["up"], updates["down"])  # that of a vector


def test_a_given_start_is_not_donated():
    """The state is donated; the start stays the user's."""
    params = tree(0)
    start = optim.deep_momentum_start(params)
    run_donated(optim.deep_momentum(0.1, start=start), params, [params, params])
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((start, params)))


@pytest.mark.parametrize("prefix", [True, False], ids=["by layer", "by leaf"])
def test_inputs_of_masked_kernels_are_ignored(x64, prefix):
    """Partitioned with two rates, and masked, each kernel is updated as it is alone."""
    shapes = {"a": {"kernel": (4, 3)}, "b": {"kernel": (4, 3)}}
    params, gradient = tree(0, jnp.float64, shapes), tree(1, jnp.float64, shapes)
    inputs = {
        f"{layer}/kernel": x["kernel"] for layer, x in tree(2, jnp.float64, {k: {"kernel": (5, 4)} for k in "ab"}).items()
    }
    make, rates = optim.delta_gradient_descent, {"a": 0.1, "b": 0.3}

    def alone(layer):
        own = {"inputs": {f"{layer}/kernel": inputs[f"{layer}/kernel"]}}
        return run(make(rates[layer]), {layer: params[layer]}, [{layer: gradient[layer]}], **own)

    close = functools.partial(assert_close, rtol=1e-10, atol=0)
    label = lambda of: {layer: of(layer) if prefix else {"kernel": of(layer)} for layer in "ab"}
    parts = optax.partition({layer: make(rate) for layer, rate in rates.items()}, label(str))
    close(run(parts, params, [gradient], inputs=inputs), alone("a") | alone("b"))
    one = optax.masked(make(0.1), label("a".__eq__))
    unmasked = {"b": jax.tree.map(jnp.add, params["b"], gradient["b"])}
    close(run(one, params, [gradient], inputs=inputs), alone("a") | unmasked)
    with pytest.raises(UserError, match="there are inputs for c/kernel, which is no parameter"):
        run(parts, params, [gradient], inputs=inputs | {"c/kernel": jnp.ones((5, 4))})


def test_a_start_of_all_parameters_can_be_given_for_some_of_them(x64):
    """Partitioned, by leaf or by layer, and masked."""
    shapes = PARAMS | {"head": {"kernel": (3, 2)}}
    params, gradients = tree(0, jnp.float64, shapes), [tree(i, jnp.float64, shapes) for i in range(1, 5)]
    start = optim.deep_momentum_start(params, 5, seed=3)
    make = functools.partial(optim.deep_momentum, 0.1, start=start)
    close = functools.partial(assert_close, rtol=1e-10, atol=0)
    whole = run(make(), params, gradients)
    for dense in ("a", {"kernel": "a", "bias": "b"}):
        labels = {"dense": dense, "scale": "b", "head": {"kernel": "b"}}
        close(run(optax.partition({"a": make(), "b": make()}, labels), params, gradients), whole)
        mask = jax.tree.map("a".__eq__, labels)
        masked = run(optax.masked(make(), mask), params, gradients)
        close(masked["dense"]["kernel"], whole["dense"]["kernel"])
        close(masked["head"]["kernel"], params["head"]["kernel"] + sum(g["head"]["kernel"] for g in gradients))
        with pytest.raises(UserError, match="there is a start for tail and no such parameter"):
            optax.masked(make(start=start | {"tail": None}), mask).init(params)


@others_are_slow
def test_meta_gradients(x64, name):
    """Through three updates, with respect to start, rate and a scale of all gradients, against finite differences.

    At a scale of zero, with all gradients zero, they are finite.
    """
    more, target = extra(name), tree(3, jnp.float64)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
    def outer(params, rate, scale):
        rule = optax.with_extra_args_support(RULES[name](rate))

        def step(carry, _):
            params, state = carry
            gradients = jax.tree.map(lambda a, b: 2 * scale * (a - b), params, target)  # of scale |params - target|^2
            updates, state = rule.update(gradients, state, params, **more)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, rule.init(params)), length=3)
        return sum(jnp.sum(jnp.sin(p)) for p in jax.tree.leaves(params))

    for scale in (0.0, 0.5):
        arguments = tree(0, jnp.float64), jnp.asarray(0.1), jnp.asarray(scale)
        _, slopes = outer(*arguments)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    step, zeros = 1e-6, jax.tree.map(jnp.zeros_like, arguments)
    for i, direction in enumerate((tree(5, jnp.float64), jnp.ones(()), jnp.ones(()))):
        along = (*zeros[:i], direction, *zeros[i + 1 :])
        value = lambda by, along=along: outer(*jax.tree.map(lambda a, d: a + by * d, arguments, along))[0]
        slope = optax.tree.vdot(slopes, along)
        np.testing.assert_allclose(slope, (value(step) - value(-step)) / (2 * step), rtol=1e-3, atol=1e-6)


@others_are_slow
def test_meta_gradients_at_tiny_gradients(name):
    """In float32, with respect to gradients and their scale, both of which scale the parameters: against float64.

    The derivatives times their arguments are of the size of updates. Below 1e-15 squares are denormal, and derivatives are
    finite.
    """

    def slopes(dtype, exponents):
        params, gradients, weights = (tree(i, dtype) for i in range(3))
        start = jax.tree.map(lambda w: w.astype(dtype), optim.deep_momentum_start(tree(0)))  # of the same random numbers
        more = jax.tree.map(lambda x: x.astype(dtype), extra(name))
        rule = optax.with_extra_args_support(RULES[name](1.0, **({"start": start} if name.startswith("deep") else {})))

        @jax.jit
        @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
        def both(gradients, scale, params):
            def step(state, _):
                updates, state = rule.update(jax.tree.map(lambda g: scale * g, gradients), state, params, **more)
                return state, (optax.tree.vdot(updates, weights), updates)

            _, (values, updates) = jax.lax.scan(step, rule.init(params), length=2)
            return values.sum(), jax.tree.map(lambda u: jnp.max(jnp.abs(u[-1])), updates)

        for exponent in exponents:
            scale = 10.0**exponent
            found, sizes = both(gradients, jnp.asarray(scale, dtype), jax.tree.map(lambda w, s=scale: s * w, params))
            times = lambda slope, x: np.multiply(slope, x, dtype=np.float64)
            yield (
                jax.tree.leaves(jax.tree.map(times, found, (gradients, scale))),
                [*jax.tree.leaves(sizes), optax.tree.max(sizes)],
            )

    exponents = (-15, -12, -9)
    single = list(slopes(jnp.float32, (-18, -17, -16, *exponents)))
    for found, _ in single[:3]:
        assert all(np.isfinite(leaf).all() for leaf in found)
    with jax.enable_x64(True):
        for exponent, (found, _), (expected, sizes) in zip(
            exponents, single[3:], slopes(jnp.float64, exponents), strict=True
        ):
            for a, b, size in zip(found, expected, sizes, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * float(size), err_msg=f"1e{exponent}")


@every_rule
def test_rates_that_are_not_finite_are_refused(name):
    for rate in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"learning_rate {rate} is not finite"):
            RULES[name](rate)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (optim.matrices, "matrices: no pattern: give some"),
        (lambda: optim.matrices(3), "matrices: 3 is no pattern: give strings"),
        (lambda: optim.matrices("up("), r"matrices: 'up\(' is no regular expression"),
        (
            lambda: optim.m3(0.1, dimension_numbers=optim.matrices("bloks/up")).init({"blocks": {"up": jnp.ones((2, 2))}}),
            "matrices: 'bloks/up' matches no parameter: give paths such as blocks/up",
        ),
        (lambda: optim.matrices("up", "dwon")({"up": jnp.ones((2, 2))}), "matrices: 'dwon' matches no parameter"),
        (lambda: optim.newton_schulz(jnp.ones((2, 2), int)), "newton_schulz takes floats, not int32: give x.astype"),
        (lambda: optim.momentum(0.1, 1.5), "momentum: decay 1.5 is out of range: give a number of at least 0 and at most 1"),
        (lambda: optim.clip_by_norm(0.0), "clip_by_norm: max_norm 0.0 is out of range: give a number above 0"),
        (lambda: optim.clip_by_norm(float("nan")), "clip_by_norm: max_norm nan is not finite"),
        (lambda: optim.momentum(0.1, float("nan")), "momentum: decay nan is not finite"),
        (lambda: optim.preconditioned_momentum(0.1, decay=2), "^preconditioned_momentum: decay 2 is out of range"),
        (lambda: optim.nonlinear_momentum(0.1, decay=1.0), "decay 1.0 is out of range.* and below 1"),
        (lambda: optim.nonlinear_momentum(0.1, on="rows"), "on 'rows' is unknown: give one of matrices, leaves"),
        *[
            (functools.partial(optim.nonlinear_momentum, 0.1, on="leaves", **option), "is of matrices and on is 'leaves'")
            for option in ({"vectors": optax.sgd(1)}, {"consistent_rms": 0.2}, {"dimension_numbers": {}})
        ],
        (lambda: optim.delta_momentum(0.1, erase=-1.0), "delta_momentum: erase -1.0"),
        (lambda: optim.deep_momentum(0.1, rate=-1.0), "deep_momentum: rate -1.0"),
        (lambda: optim.deep_momentum(0.1, objective="cosine"), "objective 'cosine' is unknown: give one of dot, l2"),
        (lambda: optim.adam_memory(0.1, b2=1.0), "adam_memory: b2 1.0"),
        (lambda: optim.adagrad_memory(0.1, "whole"), "form 'whole' is unknown: give one of diagonal, full"),
        (lambda: optim.generalized_gradient_descent(0.0), "learning_rate 0.0 is out of range: give a number above 0"),
        (lambda: optim.m3(0.1, slow_period=0), "m3: slow_period 0 is out of range: give a whole number of at least 1"),
        (lambda: optim.m3(0.1, slow_weight=-0.5), "m3: slow_weight -0.5"),
        (lambda: optim.m3(0.1, steps=0), "m3: steps 0 is out of range: give a whole number of at least 1"),
        (lambda: optim.m3(0.1, consistent_rms=float("nan")), "m3: consistent_rms nan is not finite"),
        (
            lambda: optim.nonlinear_momentum(0.1, consistent_rms=-1.0),
            "nonlinear_momentum: consistent_rms -1.0 is out of range",
        ),
        (lambda: optim.deep_momentum(0.1, hidden=0), "deep_momentum: hidden 0 is out of range: give a whole number"),
        (lambda: optim.deep_momentum_start(jnp.ones((2, 2)), 0), "deep_momentum: hidden 0 is out of range"),
        (lambda: optim.momentum(0.1, None), "momentum: decay None is no number: give one"),
        (lambda: optim.momentum(0.1, "0.9"), "momentum: decay '0.9' is no number: give one"),
        (lambda: optim.continuum(0.1, -3), "continuum: period -3 is out of range"),
        (lambda: optim.continuum(0.1, 2.5), "continuum: period 2.5 is out of range"),
        (lambda: optim.continuum(0.1, {"a": 2}), "groups are missing: give the group of every parameter, one of a"),
        (lambda: optim.continuum(0.1, {"a": 2}, {}, inner={"b": optax.sgd(1)}), r"inner has \['b'\] and periods \['a'\]"),
        (lambda: optim.continuum(0.1, 2, {"x": "a"}), "continuum: groups by group with the one period 2: give periods"),
        (lambda: optim.continuum(0.1, 2, inner={"a": optax.sgd(1)}), "continuum: inner by group with the one period 2"),
    ],
)
def test_invalid_hyperparameters_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_errors_name_the_parameter():
    """A matrix rule on a vector, dimension numbers, starts, inputs and features of another shape; what is missing."""
    params = tree(0)
    with pytest.raises(
        UserError, match=r"nonlinear_momentum is for matrices and parameter dense/bias of shape \[3\] is none"
    ):
        optim.scale_by_nonlinear_momentum().init(params)
    with pytest.raises(UserError, match=r"m3 is for matrices and parameter dense/bias"):
        optim.scale_by_m3().init(params)
    wrong = {"dense": {"kernel": optax.contrib.MuonDimensionNumbers(0, 2), "bias": None}, "scale": None}
    with pytest.raises(UserError, match=r"dimension_numbers of parameter dense/kernel do not fit its shape \[4, 3\]"):
        run(optim.delta_momentum(0.1, dimension_numbers=wrong), params, [params])
    with pytest.raises(UserError, match="dimension_numbers lack parameter scale"):
        run(optim.delta_momentum(0.1, dimension_numbers={"dense": None}), params, [params])
    start = optim.deep_momentum_start(params, 5)
    for broken, message in [
        (start | {"scale": start["dense"]["kernel"]}, "the start of parameter scale must be None: it is no matrix"),
        ({"dense": {"kernel": None, "bias": None}, "scale": None}, "start of parameter dense/kernel must be a DeepMemory"),
        (
            optim.deep_momentum_start({**params, "dense": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}}, 5),
            "give .4, 5. and",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            optim.deep_momentum(0.1, start=broken).init(params)
    with pytest.raises(UserError, match=r"feature_map makes \[8, 3\] of parameter dense/kernel's gradient"):
        run(optim.feature_momentum(0.1, lambda g: jnp.concatenate([g, g]) if g.ndim == 2 else g), params, [params])
    with pytest.raises(UserError, match=r"preconditioner makes \[2, 4, 3\] of parameter dense/kernel's gradient"):
        doubled = lambda g: jnp.stack([g, g]) if g.ndim == 2 else g
        run(optim.feature_momentum(0.1, preconditioner=doubled), params, [params])
    with pytest.raises(
        UserError, match=r"decay 1 \(give less\) is for matrices and parameter dense/bias of shape .* is none"
    ):
        optim.deep_momentum(0.1, decay=1.0).init(params)
    optim.deep_momentum(0.1, decay=1.0).init({"kernel": params["dense"]["kernel"]})
    labels = {"dense": "a", "scale": "c"}
    for groups in (labels, lambda _: labels):
        with pytest.raises(UserError, match="^continuum: the group of scale, 'c' is unknown: give one of a, b$"):
            optim.continuum(0.1, {"a": 2, "b": 1}, groups).init(params)
    delta = optim.delta_gradient_descent(0.1)
    for inputs, message in [
        (None, r"inputs are missing: call update\(gradients, state, params, inputs="),
        ({"dense": jnp.ones((5, 4))}, "there are inputs for dense, which is no parameter"),
        ({"dense/bias": jnp.ones((5, 3))}, "inputs of parameter dense/bias, which is no matrix"),
        ({"dense/kernel": jnp.ones((5, 3))}, r"inputs of dense/kernel have shape \[5, 3\]: give one that .* ends with 4"),
    ]:
        with pytest.raises(UserError, match=message):
            delta.update(params, delta.init(params), params, **({} if inputs is None else {"inputs": inputs}))
    for rule in (delta, optim.generalized_gradient_descent(0.1)):
        with pytest.raises(UserError, match="params are missing"):
            rule.update(params, rule.init(params))
