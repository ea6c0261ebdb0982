"""What every transformation keeps: types, shapes, compilation, company, stacked layers, derivatives; what it refuses."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax import optim
from nested_jax.errors import UserError

RULES = {
    "momentum": optim.momentum,
    "preconditioned momentum": optim.preconditioned_momentum,
    "feature momentum": optim.feature_momentum,
    "delta momentum": optim.delta_momentum,
    "delta momentum, preconditioned": functools.partial(optim.delta_momentum, preconditioner=optax.scale_by_rms()),
    "deep momentum": optim.deep_momentum,
    "deep momentum, l2": functools.partial(optim.deep_momentum, objective="l2", target=optim.newton_schulz, scale="rms"),
    "non-linear momentum": optim.nonlinear_momentum,
    "adam memory": optim.adam_memory,
    "adam memory, sums": functools.partial(optim.adam_memory, average=False, penalty=0.1),
    "adagrad memory": optim.adagrad_memory,
    "adagrad memory, full": functools.partial(optim.adagrad_memory, form="full"),
    "delta gradient descent": optim.delta_gradient_descent,
    "generalized gradient descent": functools.partial(optim.generalized_gradient_descent, window=2),
    "m3": functools.partial(optim.m3, slow_period=2),
    "m3, sums": functools.partial(optim.m3, slow_period=2, average=False),
    "continuum": functools.partial(optim.continuum, periods=2),
}
every_rule = pytest.mark.parametrize("name", RULES)
PARAMS = {"dense": {"kernel": (4, 3), "bias": (3,)}, "scale": ()}


def tree(seed, dtype=jnp.float32, shapes=PARAMS):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), dtype), shapes, is_leaf=lambda s: isinstance(s, tuple))


def extra(name, params=None):
    """What a rule needs beside gradients."""
    if name != "delta gradient descent":
        return {}
    rng = np.random.default_rng(7)
    kernels = {"dense/kernel": (5, 4)} if params is None else params
    return {"inputs": {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in kernels.items()}}


def run(rule, params, gradients, **more):
    """Parameters and state after some updates, to which the state is donated."""
    rule = optax.with_extra_args_support(rule)
    update, state = jax.jit(rule.update, donate_argnums=1), rule.init(params)
    for gradient in gradients:
        updates, state = update(gradient, state, params, **more)
        params = optax.apply_updates(params, updates)
    assert update._cache_size() == 1
    return params, state


def memory_types(state):
    """Of the memories in the rules' own states, without those that parts of optax keep there."""
    own = lambda x: type(x).__module__.startswith("nested_jax.optim")
    states = filter(own, jax.tree.leaves(state, is_leaf=own))
    memories = [getattr(x, f) for x in states for f in x._fields if f not in ("inner", "preconditioner")]
    return {x.dtype for x in jax.tree.leaves(memories) if jnp.issubdtype(x.dtype, jnp.floating)}


@every_rule
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_types_and_shapes_stay_and_nothing_compiles_twice(name, dtype):
    """Memories are float32 with bfloat16 parameters too, and remember what those could not hold."""
    params, rule = tree(0, dtype), RULES[name](0.1)
    moved, state = run(rule, params, [tree(i, dtype) for i in range(4)], **extra(name))
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(state) == shapes(jax.eval_shape(rule.init, params))
    assert shapes(moved) == shapes(params)
    assert memory_types(state) == (set() if name == "delta gradient descent" else {jnp.dtype("float32")})
    pairs = zip(*map(jax.tree.leaves, (moved, params)), strict=True)
    assert all(jnp.isfinite(x).all() and (x != y).any() for x, y in pairs)


@every_rule
def test_company(x64, name):
    """In a chain with clipping and weight decay, by parts, masked, accumulated, with a schedule, with injected rates."""
    params, gradients = tree(0, jnp.float64), [tree(i, jnp.float64) for i in range(1, 5)]
    make, more = RULES[name], extra(name)
    plain, _ = run(make(0.1), params, gradients, **more)
    close = lambda a, b: jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9), a, b)

    close(run(make(optax.constant_schedule(0.1)), params, gradients, **more)[0], plain)
    close(run(optax.chain(optax.clip_by_global_norm(1e9), make(0.1)), params, gradients, **more)[0], plain)
    decayed, _ = run(optax.chain(make(0.1), optax.add_decayed_weights(-0.01)), params, gradients[:1], **more)
    close(decayed, jax.tree.map(lambda w, start: w - 0.01 * start, run(make(0.1), params, gradients[:1], **more)[0], params))
    injected = optax.inject_hyperparams(make, static_args=_static(make))(learning_rate=0.1)
    close(run(injected, params, gradients, **more)[0], plain)

    labels = {"dense": {"kernel": "a", "bias": "a"}, "scale": "b"}
    parts, _ = run(optax.partition({"a": make(0.1), "b": optax.sgd(0.1)}, labels), params, gradients, **more)
    if name != "generalized gradient descent":  # which solves for all of its parameters at once, to the solver's tolerance
        close(parts["dense"], plain["dense"])
    mask = {"dense": {"kernel": True, "bias": False}, "scale": False}
    masked, _ = run(optax.masked(make(0.1), mask), params, gradients, **more)
    close(masked["dense"]["bias"], params["dense"]["bias"] + sum(g["dense"]["bias"] for g in gradients))

    halves = [jax.tree.map(lambda x: x / 2, g) for g in gradients for _ in (0, 1)]
    multiple = optax.MultiSteps(make(0.1), 2, use_grad_mean=False, accumulator_dtype=jnp.float64)
    accumulated = optax.GradientTransformationExtraArgs(multiple.init, multiple.update)
    close(run(accumulated, params, halves, **more)[0], plain)


def _static(make):
    function = make.func if isinstance(make, functools.partial) else make
    numeric = ("decay", "erase", "rate", "first", "second", "penalty", "fast", "slow", "slow_weight", "eps", "weight_decay")
    return tuple(set(inspect.signature(function).parameters) - {"learning_rate", *numeric})


HAS_MATRICES = pytest.mark.parametrize(
    "name", [n for n, make in RULES.items() if "dimension_numbers" in inspect.signature(make).parameters]
)
STACKED = {"blocks": {"up": (3, 4, 5), "norm": (3, 4)}, "embedding": (6, 4)}


@HAS_MATRICES
def test_layers_that_are_stacked_are_each_their_own(x64, name):
    """By path: (L, in, out) is L matrices, (L, D) is no matrix, an embedding is what the path says."""
    params, gradients = tree(0, jnp.float64, STACKED), [tree(i, jnp.float64, STACKED) for i in range(1, 5)]
    numbers = optim.matrices("blocks/up")
    more = extra(name, {"blocks/up": (3, 7, 4)})
    together, _ = run(_seeded(name, numbers)(0.1), params, gradients, **more)
    for i in range(3):
        layer = lambda tree, i=i: {"up": tree["blocks"]["up"][i], "norm": tree["blocks"]["norm"][i]}
        own = {"inputs": {"up": more["inputs"]["blocks/up"][i]}} if more else {}
        alone, _ = run(_seeded(name, None, i)(0.1), layer(params), [layer(g) for g in gradients], **own)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), layer(together), alone)


@HAS_MATRICES
def test_axes_may_be_in_any_order(x64, name):
    """Of a leaf (3, 2, 4, 5) axis 1 stacks matrices from the axes 3 and 0 to axis 2: it moves as those matrices do."""
    leaf = {"w": (3, 2, 4, 5)}
    params, gradients = tree(0, jnp.float64, leaf), [tree(i, jnp.float64, leaf) for i in range(1, 5)]
    as_matrices = lambda tree: {"w": jnp.transpose(tree["w"], (1, 3, 0, 2)).reshape(2, 15, 4)}
    more = extra(name, {"w": (2, 7, 15)})
    number = lambda *axes: {"w": optax.contrib.MuonDimensionNumbers(*axes)}
    moved, _ = run(RULES[name](0.1, dimension_numbers=number((3, 0), 2)), params, gradients, **more)
    plain = as_matrices(params), list(map(as_matrices, gradients))
    expected, _ = run(RULES[name](0.1, dimension_numbers=number(-2, -1)), *plain, **more)
    np.testing.assert_allclose(as_matrices(moved)["w"], expected["w"], rtol=1e-9, atol=1e-12)


def test_numbers_by_path_are_optaxs_too(x64):
    """Of stacked layers, Muon's updates are ours."""
    params, gradients = tree(0, jnp.float64, STACKED), [tree(i, jnp.float64, STACKED) for i in range(1, 5)]
    numbers = optim.matrices("blocks/up")
    own, _ = run(optim.nonlinear_momentum(0.1, dimension_numbers=numbers), params, gradients)
    theirs, _ = run(optax.contrib.muon(0.1, muon_weight_dimension_numbers=numbers), params, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), own, theirs)


def test_a_start_that_is_given_is_kept():
    """Its state is donated; the start is the user's."""
    params = tree(0)
    start = optim.deep_momentum_start(params)
    run(optim.deep_momentum(0.1, start=start), params, [params, params])
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((start, params)))


@pytest.mark.parametrize("prefix", [True, False], ids=["by layer", "by leaf"])
def test_inputs_of_masked_kernels_are_left_alone(x64, prefix):
    """By parts with two rates, and masked, each kernel moves as it does alone."""
    shapes = {"a": {"kernel": (4, 3)}, "b": {"kernel": (4, 3)}}
    params, gradient = tree(0, jnp.float64, shapes), tree(1, jnp.float64, shapes)
    inputs = {
        f"{layer}/kernel": x["kernel"] for layer, x in tree(2, jnp.float64, {k: {"kernel": (5, 4)} for k in "ab"}).items()
    }
    make, rates = optim.delta_gradient_descent, {"a": 0.1, "b": 0.3}

    def alone(layer):
        own = {"inputs": {f"{layer}/kernel": inputs[f"{layer}/kernel"]}}
        return run(make(rates[layer]), {layer: params[layer]}, [{layer: gradient[layer]}], **own)[0]

    close = lambda a, b: jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10), a, b)
    label = lambda of: {layer: of(layer) if prefix else {"kernel": of(layer)} for layer in "ab"}
    parts = optax.partition({layer: make(rate) for layer, rate in rates.items()}, label(str))
    close(run(parts, params, [gradient], inputs=inputs)[0], alone("a") | alone("b"))
    one = optax.masked(make(0.1), label("a".__eq__))
    close(
        run(one, params, [gradient], inputs=inputs)[0], alone("a") | {"b": jax.tree.map(jnp.add, params["b"], gradient["b"])}
    )
    with pytest.raises(UserError, match="there are inputs for c/kernel, which is no parameter"):
        run(parts, params, [gradient], inputs=inputs | {"c/kernel": jnp.ones((5, 4))})


def test_a_start_of_all_parameters_serves_some_of_them(x64):
    """By parts, by leaf or by layer, and masked."""
    shapes = PARAMS | {"head": {"kernel": (3, 2)}}
    params, gradients = tree(0, jnp.float64, shapes), [tree(i, jnp.float64, shapes) for i in range(1, 5)]
    start = optim.deep_momentum_start(params, 5, seed=3)
    make = functools.partial(optim.deep_momentum, 0.1, start=start)
    close = lambda a, b: jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10), a, b)
    whole, _ = run(make(), params, gradients)
    for dense in ("a", {"kernel": "a", "bias": "b"}):
        labels = {"dense": dense, "scale": "b", "head": {"kernel": "b"}}
        close(run(optax.partition({"a": make(), "b": make()}, labels), params, gradients)[0], whole)
        mask = jax.tree.map("a".__eq__, labels)
        moved, _ = run(optax.masked(make(), mask), params, gradients)
        close(moved["dense"]["kernel"], whole["dense"]["kernel"])
        close(moved["head"]["kernel"], params["head"]["kernel"] + sum(g["head"]["kernel"] for g in gradients))
        with pytest.raises(UserError, match="there is a start for tail and no such parameter"):
            optax.masked(make(start=start | {"tail": None}), mask).init(params)


def _seeded(name, numbers, layer=None):
    """Deep momentum's starts are drawn for all layers at once."""
    make = functools.partial(RULES[name], dimension_numbers=numbers)
    if not name.startswith("deep"):
        return make
    params = tree(0, jnp.float64, STACKED)
    start = optim.deep_momentum_start(params, dimension_numbers=optim.matrices("blocks/up"))
    if layer is None:
        return functools.partial(make, start=start)
    return functools.partial(make, start={"up": jax.tree.map(lambda w: w[layer], start["blocks"]["up"]), "norm": None})


@every_rule
@pytest.mark.parametrize("zeros", [True, False], ids=["zero gradients", "gradients"])
def test_meta_gradients(x64, name, zeros):
    """Through three updates, with respect to start, rate and a scale of all gradients, against finite differences."""
    rule = optax.with_extra_args_support(optax.inject_hyperparams(RULES[name], static_args=_static(RULES[name]))(0.1))
    more, target = extra(name), tree(3, jnp.float64)

    @jax.jit
    def outer(params, rate, scale):
        state = rule.init(params)
        state.hyperparams["learning_rate"] = rate
        for _ in range(3):
            loss = lambda p: (
                scale * sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (p, target)), strict=True))
            )
            gradients = jax.grad(loss)(params)
            updates, state = rule.update(gradients, state, params, **more)
            params = optax.apply_updates(params, updates)
        return sum(jnp.sum(jnp.sin(p)) for p in jax.tree.leaves(params))

    arguments = tree(0, jnp.float64), jnp.asarray(0.1), jnp.asarray(0.0 if zeros else 0.5)
    slopes = jax.grad(outer, (0, 1, 2))(*arguments)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    if not zeros:
        step, still = 1e-6, jax.tree.map(jnp.zeros_like, arguments)
        for i, direction in enumerate((tree(5, jnp.float64), jnp.ones(()), jnp.ones(()))):
            along = (*still[:i], direction, *still[i + 1 :])
            moved = lambda by, along=along: outer(*jax.tree.map(lambda a, d: a + by * d, arguments, along))
            slope = optax.tree.vdot(slopes, along)
            np.testing.assert_allclose(slope, (moved(step) - moved(-step)) / (2 * step), rtol=1e-3, atol=1e-6)


@every_rule
def test_meta_gradients_at_tiny_gradients(name):
    """In float32, with respect to gradients and their scale, both of which parameters have: against float64.

    Multiplied by what they are taken with respect to, they are of the size of updates. Below 1e-15 squares are denormal, and
    derivatives are finite.
    """

    def slopes(dtype, exponents):
        params, gradients, weights = (tree(i, dtype) for i in range(3))
        start = jax.tree.map(lambda w: w.astype(dtype), optim.deep_momentum_start(tree(0)))  # of the same random numbers
        more = jax.tree.map(lambda x: x.astype(dtype), extra(name))
        rule = optax.with_extra_args_support(RULES[name](1.0, **({"start": start} if name.startswith("deep") else {})))

        @jax.jit
        @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
        def both(gradients, scale, params):
            state, total = rule.init(params), 0.0
            for _ in range(2):
                updates, state = rule.update(jax.tree.map(lambda g: scale * g, gradients), state, params, **more)
                total += optax.tree.vdot(updates, weights)
            return total, jax.tree.map(lambda u: jnp.max(jnp.abs(u)), updates)

        for exponent in exponents:
            scale = 10.0**exponent
            found, sizes = both(gradients, jnp.asarray(scale, dtype), jax.tree.map(lambda w, s=scale: s * w, params))
            times = lambda slope, x: np.multiply(slope, x, dtype=np.float64)
            yield (
                jax.tree.leaves(jax.tree.map(times, found, (gradients, scale))),
                [*jax.tree.leaves(sizes), optax.tree.max(sizes)],
            )

    for found, _ in slopes(jnp.float32, (-18, -17, -16)):
        assert all(np.isfinite(leaf).all() for leaf in found)
    exponents = (-15, -12, -9)
    single = list(slopes(jnp.float32, exponents))
    with jax.enable_x64(True):
        for exponent, (found, _), (expected, sizes) in zip(exponents, single, slopes(jnp.float64, exponents), strict=True):
            for a, b, size in zip(found, expected, sizes, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * float(size), err_msg=f"1e{exponent}")


@every_rule
def test_rates_that_are_not_finite_are_refused(name):
    for rate in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"learning_rate {rate} is not finite"):
            RULES[name](rate)


@pytest.mark.parametrize(
    ("make", "said"),
    [
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
def test_hyperparameters_that_cannot_be_are_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()


def test_what_fits_no_parameter_is_named():
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
    for broken, said in [
        (start | {"scale": start["dense"]["kernel"]}, "the start of parameter scale must be None: it is no matrix"),
        ({"dense": {"kernel": None, "bias": None}, "scale": None}, "start of parameter dense/kernel must be a DeepMemory"),
        (
            optim.deep_momentum_start({**params, "dense": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}}, 5),
            "give .4, 5. and",
        ),
    ]:
        with pytest.raises(UserError, match=said):
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
    for inputs, said in [
        (None, r"inputs are missing: call update\(gradients, state, params, inputs="),
        ({"dense": jnp.ones((5, 4))}, "there are inputs for dense, which is no parameter"),
        ({"dense/bias": jnp.ones((5, 3))}, "inputs of parameter dense/bias, which is no matrix"),
        ({"dense/kernel": jnp.ones((5, 3))}, r"inputs of dense/kernel have shape \[5, 3\]: give one that .* ends with 4"),
    ]:
        with pytest.raises(UserError, match=said):
            delta.update(params, delta.init(params), params, **({} if inputs is None else {"inputs": inputs}))
    for rule in (delta, optim.generalized_gradient_descent(0.1)):
        with pytest.raises(UserError, match="params are missing"):
            rule.update(params, rule.init(params))
