"""Self-modifying Titans against a plain token loop; starts that learn; rates."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rare import cases

from nested_jax.memory import reference
from nested_jax.memory.deep import Deep, Rule, broadcast_start
from nested_jax.memory.self_modifying import SelfModifyingTitans

D, H = 8, 2
EXACT = Rule(errors="exact", step="normalised")
HOPE = Rule(errors="exact", step="normalised", features="boundary")
PAPER = Rule("memory", "raw", retention="zero", read="boundary", surprise=math.inf, damped=False)
EVERYTHING = ("retention", "queries", "rates", "values", "keys")


def layer_and_weights(key=0, **options):
    layer = SelfModifyingTitans(D, H, 3, **options)
    weights = layer.init_weights(jax.random.key(key))
    noise = iter(jax.random.split(jax.random.key(key + 1), 99))
    jitter = lambda w: w + 0.3 * jax.random.normal(next(noise), w.shape)
    weights = jax.tree.map(lambda w: jitter(w).astype(jnp.float64), weights)
    return layer, {**weights, "retention_bias": jnp.linspace(1.0, 3.0, H)}


def read(layer, weights, x, **keywords):
    state = layer.init_state(weights, len(x))
    return layer(weights, state, x, 0, **keywords)[1]


@pytest.mark.parametrize(
    ("options", "length"),
    [
        pytest.param(dict(chunk=1, momentum=False, rule=Rule(retention="zero")), 13, marks=pytest.mark.slow),
        pytest.param(dict(chunk=4, projection_chunk=8), 13, marks=pytest.mark.slow),
        (dict(chunk=4, rates="own", rule=HOPE), 13),
        pytest.param(dict(chunk=4, rates="own", rule=HOPE, projection_chunk=8), 16, marks=pytest.mark.slow),
        pytest.param(dict(chunk=4, rule=Rule(read="before", features="boundary")), 13, marks=pytest.mark.slow),
        pytest.param(dict(chunk=1, projection_chunk=4, generated=EVERYTHING), 13, marks=pytest.mark.slow),
        (dict(chunk=4, projection_chunk=8, rule=PAPER, targets="raw", max_rate=0.3, generated=("queries", "retention")), 16),
        *(
            pytest.param(dict(chunk=4) | options, 13, marks=pytest.mark.slow)
            for options in (
                dict(rule=PAPER, targets="raw", max_rate=0.3, projection_chunk=8, generated=EVERYTHING),
                dict(rule=Rule("memory", read="boundary"), momentum=False, rates="own"),
                dict(rule=Rule(damped=False), projection_chunk=8, generated=("keys",)),
                dict(rule=Rule(retention="none", read="boundary"), projection_chunk=12, generated=("values", "rates")),
                dict(rule=Rule("memory", "normalised", "exact", read="boundary"), generated=("rates", "retention")),
                dict(rule=Rule("none", retention="none"), targets="rms", generated=(), projection_chunk=8),
                dict(rule=Rule("memory", errors="exact", retention="none"), rates="own", generated=()),
            )
        ),
        pytest.param(dict(chunk=4, rule=Rule(surprise=0.3)), 13, marks=pytest.mark.slow),
        pytest.param(dict(chunk=4, rule=Rule(read="before")), 13, marks=pytest.mark.slow),
        pytest.param(dict(chunk=4, projection_chunk=8, rates="own", rule=EXACT, max_rate=0.9), 13, marks=pytest.mark.slow),
        pytest.param(
            dict(chunk=3, momentum=False, rule=Rule(erase="none", step="raw", read="before"), max_rate=0.3, targets="rms"),
            13,
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_layer_is_its_reference(x64, options, length):
    """Values, and gradients with respect to all weights and inputs; 13 tokens are no multiple of a chunk."""
    layer, weights = layer_and_weights(**options)
    x = jax.random.normal(jax.random.key(9), (1, length, D), jnp.float64)
    with jax.default_matmul_precision("highest"):
        fast = jax.jit(jax.value_and_grad(lambda w, x: jnp.sum(jnp.sin(read(layer, w, x))), (0, 1)))(weights, x)
        slow = jax.jit(
            jax.value_and_grad(lambda w, x: jnp.sum(jnp.sin(reference.self_modifying_titans(layer, w, x[0]))), (0, 1))
        )(weights, x)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(slow), jax.tree.leaves(fast), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-12, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("options", cases([dict(chunk=4), dict(chunk=4, projection_chunk=8)], [dict(chunk=4)]), ids=str)
def test_every_start_gets_an_outer_gradient(x64, options):
    layer, _ = layer_and_weights(**options, generated=EVERYTHING)
    weights = layer.init_weights(jax.random.key(0))  # as a new model has them
    x = jax.random.normal(jax.random.key(9), (2, 24, D))
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(read(layer, w, x) ** 2)))(weights)["start"]
    for part, g in gradient.items():
        for name, of_memory in zip(layer.memories, g.swapaxes(0, 1), strict=True):
            assert float(jnp.max(jnp.abs(of_memory))) > 1e-8, (part, name)


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        (dict(), 3 / 64),
        (dict(projection_chunk=256), 3 / 256),
        (dict(chunk=1), 0.5),
        (dict(chunk=1, max_rate=0.2), 0.1),
        (dict(chunk=4, rule=HOPE), 1 / 16),
        (dict(chunk=256, rule=HOPE, max_rate=0.1), 0.05),
    ],
    ids=str,
)
def test_rates_start_at_three_over_the_period_or_half_the_largest(options, rate):
    """The rates that a new layer's own memories give its tokens."""
    layer = SelfModifyingTitans(32, 2, 8, **options)
    weights = layer.init_weights(jax.random.key(0))
    projections = jax.tree.map(lambda w: w[:, :, :-1], broadcast_start(Deep(**weights["start"]), 1))
    x, momentum = jax.random.normal(jax.random.key(1), (1, 2, 256, 16)), jnp.full((1, 2, 256), 0.5)
    given = layer.generate(weights, projections, x, {"queries": x}, momentum).strengths.rate
    np.testing.assert_allclose(given, rate, rtol=0.5)
    assert float(given.mean()) == pytest.approx(rate, rel=0.1)


@pytest.mark.parametrize(
    ("rule", "first", "others", "main"), [(Rule(), 3 / 4096, 3 / 1024, 3 / 64), (HOPE, 1 / 1024, 1 / 256, 3 / 16)], ids=str
)
def test_own_rates_start_small_but_that_of_the_main_memory(rule, first, others, main):
    """r / 64 of first layers, r / 16 of the projections' second ones; of the main memory's r, or 3 r of exact errors."""
    weights = SelfModifyingTitans(32, 2, 8, chunk=64, rates="own", rule=rule).init_weights(jax.random.key(0))
    expected = [first, *[others] * 4, main]
    np.testing.assert_allclose(jax.nn.sigmoid(weights["rate_bias"]), [expected] * 2, rtol=1e-5)


@pytest.mark.parametrize("generated", cases([EVERYTHING, ("keys",), ("rates",), ()], [()]), ids=str)
def test_what_no_memory_generates_starts_like_what_one_does(generated):
    """Unit keys, values and queries, retention near one and the same rates; the other weights are the default's."""
    layer, default = (SelfModifyingTitans(32, 2, 8, **more) for more in ({"generated": generated}, {}))
    weights, others = (made.init_weights(jax.random.key(0)) for made in (layer, default))
    for name in weights.keys() & others.keys() - {"start"}:
        np.testing.assert_array_equal(weights[name], others[name], err_msg=name)
    assert weights["start"]["first"].shape[1] == len(layer.memories) == 1 + len(generated)
    x, fixed, theta = layer.project(weights, jax.random.normal(jax.random.key(1), (1, 256, 32)))
    by_head = lambda part: part.swapaxes(1, 2)
    projections = jax.tree.map(lambda w: w[:, :, :-1], broadcast_start(Deep(**weights["start"]), 1))
    made = layer.generate(weights, projections, by_head(x), jax.tree.map(by_head, fixed), by_head(theta))
    for vectors in made[:3]:
        np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=-1), 1, rtol=1e-4)
    np.testing.assert_allclose(made.strengths.rate, 3 / 64, rtol=0.5)
    assert made.strengths.retain.min() > 0.98
