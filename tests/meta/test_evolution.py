"""Evolution strategies on linear inner loops with quadratic losses, where mean and covariance have closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.errors import UserError
from nested_jax.meta import es_grad, pes_grad

WINDOWS, STEPS, DECAY, SCALE = 3, 2, 0.8, 0.1
META, START, TARGET = (jnp.asarray(x) for x in ([0.5, -0.3], [1.0, 2.0], [-1.0, 0.5]))


def window(meta, state):
    """Two steps of s <- decay s + meta, and the sum of |s - target|^2 / 2 after each."""
    loss = 0.0
    for _ in range(STEPS):
        state = DECAY * state + meta
        loss += jnp.sum((state - TARGET) ** 2) / 2
    return state, loss


def parts(metas):
    """The loss of each window, with a meta of its own for each: (WINDOWS,)."""
    state, losses = START, []
    for meta in metas:
        state, loss = window(meta, state)
        losses.append(loss)
    return jnp.stack(losses)


def slopes():
    """d loss_w / d meta of window v: (w, v, 2). Differences of quadratic losses are linear, so nothing else counts."""
    return jax.jacobian(parts)(jnp.stack([META] * WINDOWS))


def covariance(slope, count):
    """Of e_p (slope . e) / scale^2, where e_p is the sum of `count` of the perturbations e; by Isserlis' theorem."""
    total = slope[:count].sum(0)
    return count * jnp.sum(slope**2) * jnp.eye(2) + jnp.outer(total, total)


def assert_mean(estimates, expected, variance):
    """Independent estimates agree with their expectation, to four standard errors of the mean, and with their variance."""
    count = len(estimates)
    assert np.all(np.abs(estimates.mean(0) - expected) < 4 * np.sqrt(variance / count))
    np.testing.assert_allclose(estimates.var(0), variance, rtol=0.15)


def test_es_has_the_mean_and_variance_of_its_closed_form(x64):
    """Of the whole loop; with more pairs, the variance is divided by their number."""
    whole = lambda meta: parts(jnp.stack([meta] * WINDOWS)).sum()
    expected = jax.grad(whole)(META)
    variance = jnp.diag(covariance(expected[None], 1))
    for pairs in (1, 4):
        by = jax.jit(jax.vmap(es_grad(whole, scale=SCALE, pairs=pairs), (None, 0)))
        found = by(META, jax.random.split(jax.random.key(pairs), 4000))
        assert_mean(found.gradient, expected, variance / pairs)
    np.testing.assert_allclose(found.value.mean(), whole(META), rtol=0.02)


def test_pes_is_unbiased_where_windows_alone_are_biased(x64):
    """Window by window: each estimate has the mean of the whole loop's gradient, and the variance of its closed form."""
    pes, keys = pes_grad(window, scale=SCALE, pairs=1), jax.random.split(jax.random.key(0), (4000, WINDOWS))

    @jax.jit
    @jax.vmap
    def through(keys):
        particles, gradients = pes.init(META, START), []
        for key in keys:
            estimate, particles = pes.update(META, key, particles)
            gradients.append(estimate.gradient)
        return jnp.stack(gradients)

    found, slope = through(keys), slopes()
    for w in range(WINDOWS):
        assert_mean(found[:, w], slope[w].sum(0), jnp.diag(covariance(slope[w, : w + 1], w + 1)))

    # The same number of evaluations, without what meta has done to the state.
    before = START
    for _ in range(WINDOWS - 1):
        before, _ = window(META, before)
    alone = es_grad(lambda meta: window(meta, before)[1], scale=SCALE, pairs=1)
    short = jax.jit(jax.vmap(alone, (None, 0)))(META, keys[:, 0]).gradient
    truncated, exact = slope[-1, -1], slope[-1].sum(0)
    assert_mean(short, truncated, jnp.diag(covariance(truncated[None], 1)))
    bias = np.abs(short.mean(0) - exact)
    assert np.all(bias > 10 * np.abs(found[:, -1].mean(0) - exact)) and np.all(bias > 0.2 * np.abs(exact))
    assert np.all(short.var(0) < found[:, -1].var(0))  # what the bias buys


def test_one_window_of_pes_is_es(x64):
    one = pes_grad(window, scale=SCALE, pairs=3)
    estimate, particles = one.update(META, jax.random.key(1), one.init(META, START))
    plain = es_grad(lambda meta: window(meta, START)[1], scale=SCALE, pairs=3)(META, jax.random.key(1))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), estimate, plain)
    ends = jax.vmap(jax.vmap(lambda meta: window(meta, START)[0]))(
        META[None, None] + jnp.stack([particles.perturbation, -particles.perturbation])
    )
    np.testing.assert_allclose(particles.state, ends, rtol=1e-12)


def test_types_and_random_keys():
    """A bfloat16 leaf among float32, accumulated in float32; a key among the others is the same for all particles."""
    meta = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.zeros(())}
    step = lambda m, s, key: (s + m["a"].sum(), (s + m["b"]) * jax.random.normal(key))
    pes = pes_grad(step, pairs=5, scale=0.1)
    update = jax.jit(pes.update)
    particles = pes.init(meta, jnp.zeros((), jnp.bfloat16))
    for i in range(2):
        estimate, particles = update(meta, jax.random.key(i), particles, jax.random.key(9))
    assert update._cache_size() == 1
    assert jax.tree.map(lambda x: x.dtype, estimate.gradient) == {"a": jnp.bfloat16, "b": jnp.float32}
    assert particles.perturbation["a"].dtype == jnp.float32 and particles.state.shape == (2, 5)
    assert jnp.isfinite(estimate.gradient["b"])
    # With one key, d loss / d b is the same normal for every particle; with others it would not be exactly odd.
    es = es_grad(lambda b, key: b * jax.random.normal(key), pairs=1, scale=0.1)(0.0, jax.random.key(0), jax.random.key(9))
    assert es.value == 0


def test_invalid_arguments_are_refused():
    for make in (es_grad, pes_grad):
        for options in ({"scale": 0.0}, {"scale": float("nan")}, {"pairs": 0}, {"pairs": 2.5}):
            with pytest.raises(UserError, match=f"{make.__name__}: scale=.*, pairs=.*: give a positive scale"):
                make(lambda *_: 0.0, **options)
    with pytest.raises(UserError, match=r"es_grad: meta\['n'\] is int32"):
        es_grad(lambda meta: 0.0)({"n": 3}, jax.random.key(0))
    with pytest.raises(UserError, match=r"pes_grad: meta\['n'\] is int32"):
        pes_grad(lambda meta, s: (s, 0.0)).init({"n": 3}, 0.0)
