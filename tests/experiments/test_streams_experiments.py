"""Small runs of initial_memory.py and rates.py: streams, tasks, gradients, held-out data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory.recurrence import Gates, MemoryState, tokenwise

FOLDER = "meta_learning"


def jit(function, *static):
    """A compiled function whose arguments at these places are constants."""
    return jax.jit(function, static_argnums=static)


def changed(a, b):
    """Whether any entry of a token differs, (T,)."""
    return np.any(np.asarray(a != b), axis=tuple(range(1, a.ndim)))


@pytest.fixture
def worlds(load):
    rates = load("rates")
    config = rates.Rates(tokens=64, periods=(16, 8, 4), width=3, hidden=5, fits=2, held_out=2, steps=2, batch_size=2)
    return (
        rates,
        config,
        lambda scales, seed=0: rates.World(jax.random.normal(jax.random.key(seed), (2, 3)), jnp.ones(3), jnp.array(scales)),
    )


def random_weights(rates, config, world):
    """Slow weights that are not fitted, float64 under `x64`."""
    shapes, draw = jax.eval_shape(lambda: rates.fit_start(config, world, jax.random.key(0))), np.random.default_rng(0)
    return jax.tree.map(lambda w: jnp.asarray(draw.normal(size=w.shape)), shapes)


def test_maps_change_at_their_periods(worlds):
    """The fixed component never, the others at their periods; streams start at different places of a period."""
    rates, config, world = worlds
    phases = []
    for key in jax.random.split(jax.random.key(0), 6):
        fixed, first, second = rates.maps(config, world((8, 32)), key)
        np.testing.assert_array_equal(fixed, np.broadcast_to(world((8, 32)).fixed, fixed.shape))
        for part, period in ((first, 8), (second, 32)):
            (at,) = np.nonzero(changed(part[1:], part[:-1]))
            assert (np.diff(at) == period).all() and len(at) in (64 // period - 1, 64 // period)
        phases.append(int(np.nonzero(changed(first[1:], first[:-1]))[0][0]))
    assert len(set(phases)) > 1
    _, *still = rates.maps(config, world((rates.NEVER, rates.NEVER)), jax.random.key(1))
    assert not any(changed(part[1:], part[:-1]).any() for part in still)
    alone = rates.draw_world(config, "fixed part alone", jax.random.key(0))
    assert not rates.maps(config, alone, jax.random.key(1))[1:].any()


@pytest.mark.parametrize("name", ["rates", "initial_memory"])
def test_keys_differ_by_seed_and_purpose(load, name):
    """Training, tuning and held-out data are drawn from different keys, of all seeds."""
    keys = jax.vmap(load(name).keys_of)(jnp.arange(8))
    assert len(np.unique(jax.random.key_data(keys).reshape(40, -1), axis=0)) == 40


@pytest.mark.parametrize("variant", ["independent", "nested"])
def test_a_cms_predicts_before_it_learns(worlds, variant):
    """A class changes predictions only after its segment; with rates of zero, none."""
    rates, config, world = worlds
    config = rates.Rates(**{**vars(config), "variant": variant})
    weights = random_weights(rates, config, world((8, 32)))
    context = jit(rates.segments, 0, 2)(config, world((8, 32)), 2, jax.random.key(4))
    other = context._replace(targets=context.targets.at[5, :, 1].set(1 - context.targets[5, :, 1]))  # token 21
    predict = jax.jit(lambda value, context: rates.predictions(config, weights, jnp.full(3, value), context))
    for value in (0.3, 0.0):
        before, after = predict(value, context), predict(value, other)
        (at,) = np.nonzero(changed(*(x.swapaxes(1, 2).reshape(64, -1) for x in (before, after))))
        assert (not len(at)) if value == 0 else at[0] == 24  # the segment of 4 tokens starts at 20
    outputs = rates.cms.apply(config.cms, weights["cms"], (), context.inputs.reshape(-1, 4, 3))
    np.testing.assert_allclose(before.reshape(-1, 4, 2), outputs @ weights["head"], atol=1e-5)


def test_the_gradient_of_a_rate_is_a_difference_quotient(worlds, x64):
    """Of all three levels, through all updates."""
    rates, config, world = worlds
    world = world((8, 32))
    weights = random_weights(rates, config, world)
    context = jit(rates.segments, 0, 2)(config, world, 2, jax.random.key(4))
    meta = jnp.log(jnp.array([0.2, 0.1, 0.3]))
    found = jax.jit(rates.slope(config, weights, 2))(meta, context)

    @jax.jit
    def loss(meta):
        guess = rates.predictions(config, weights, jnp.exp(meta), context)
        return -jnp.take_along_axis(jax.nn.log_softmax(guess), context.targets[..., None], -1).mean()

    assert abs(loss(meta) - found.value) < 1e-12
    for i, step in enumerate(1e-5 * jnp.eye(3)):
        assert abs(found.gradient[i]) > 1e-4
        np.testing.assert_allclose(found.gradient[i], (loss(meta + step) - loss(meta - step)) / 2e-5, rtol=1e-6)


def test_rates_are_measured(load, written):
    """A short run: rates move downhill, no stream is used twice, choices are made on tuning streams."""
    rates = load("rates")
    config = rates.Rates(
        conditions=("16 and 256", "fixed part alone"), tokens=64, periods=(16, 8, 4), hidden=5, fits=2, held_out=2,
        steps=2, batch_size=2, seeds=(0, 1), grid=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1e30),
        starts=((0.1, 0.1, 0.1), (1e9, 1e9, 1e9)),
    )  # fmt: skip
    kept, shown = written(rates, config)
    row = kept["rows"][0]
    path = np.array(row["path"])
    assert path.shape == (2, 2, 2, 3) and (path[:, 0] != 0.1).all()
    assert (path[:, 1] < 1e9).all()  # where the CMS overflows and meta-gradients are not finite
    assert set(kept["transfer"]) == {"16 and 256", "fixed part alone"} and "| 16 and 256 | 2 of 2 overflow |" in shown

    seeds = jnp.array(config.seeds)
    worlds = jax.vmap(lambda seed: rates.draw_world(config, "16 and 256", rates.keys_of(seed)[0]))(seeds)
    weights, *drawn = rates.prepare(config, worlds, seeds)
    firsts = np.concatenate([np.asarray(part.inputs)[..., 0, :, 0, 0].ravel() for part in drawn])
    assert len(firsts) == len(np.unique(firsts)) == 2 * (2 * 2 + 2 + 2)
    meta, tuning, held_out = drawn
    first = jax.tree.map(lambda x: x[:, 0], meta)  # streams of the first meta-update
    bits = lambda values, streams=first: np.asarray(rates.evaluate(config, weights, values, streams)["bits"])
    for level, step in enumerate(0.1 * np.eye(3)):
        up, down = (bits(jnp.asarray(np.full((2, 3), 0.1) * np.exp(sign * step), jnp.float32)) for sign in (1, -1))
        assert (np.abs(up - down) > 1e-5).all()
        np.testing.assert_array_equal(np.sign(path[:, 0, 0, level] - np.float32(0.1)), -np.sign(up - down))

    # Each seed's rate is its best on tuning streams; the result is on held-out ones.
    bits = lambda value, streams: rates.evaluate(config, weights, jnp.outer(value, jnp.array([0, 0, 1])), streams)["bits"]
    on = lambda streams: np.array([bits(jnp.full(2, rate), streams) for rate in config.grid])
    tried, other = on(tuning), on(held_out)
    np.testing.assert_allclose(np.array(row["tried"]["fast alone"], float), tried, rtol=1e-5)
    assert row["tried"]["fast alone"][-1] == [None, None]  # not JSON's NaN
    best = [config.grid[i] for i in np.nanargmin(tried, 0)]
    assert row["chosen"]["fast alone"] == best != [config.grid[i] for i in np.nanargmin(other, 0)]
    np.testing.assert_allclose(row["bits"]["fast alone"], bits(jnp.array(best), held_out), rtol=1e-5)
    np.testing.assert_allclose(row["bits"]["frozen"], bits(jnp.zeros(2), held_out), rtol=1e-5)


def test_a_start_is_fitted(worlds):
    """Frozen, it predicts streams of the fixed component better after more updates; zero weights need one bit a token."""
    rates, config, _ = worlds
    world = rates.draw_world(config, "fixed part alone", jax.random.key(0))
    one = lambda tree: jax.tree.map(lambda x: x[None], tree)
    streams = one(jit(rates.segments, 0, 2)(config, world, 8, jax.random.key(1)))
    fit_start = jit(rates.fit_start, 0)
    starts = [fit_start(rates.Rates(**{**vars(config), "fits": n}), world, jax.random.key(2)) for n in (1, 100)]
    nothing = jax.tree.map(jnp.zeros_like, starts[0])
    bits = [float(rates.evaluate(config, one(start), jnp.zeros((1, 3)), streams)["bits"][0]) for start in (nothing, *starts)]
    assert bits[0] == pytest.approx(1, rel=1e-5) and bits[2] < 0.5 < bits[1]


def test_a_seed_that_overflows_from_one_start_is_counted(load):
    rates = load("rates")
    assert rates.overflows([[0.5, 0.6, 2.5], [0.5, 0.5, 0.5], [None, 0.5, 0.5]]).tolist() == [True, False, True]
    assert rates.overflows([0.5, None]).tolist() == [False, True]


@pytest.fixture
def tasks(load):
    memory = load("initial_memory")
    config = memory.InitialMemory(
        width=4, hidden=9, pairs=16, chunk=8, batch_size=2, tuning=3, held_out=4, steps=2, seeds=(0, 1)
    )

    def draw(name, count=3):
        family = jit(memory.draw_family, 0, 1)(config, name, jax.random.key(0))
        return family, jit(memory.draw_tasks, 0, 2)(config, family, count, jax.random.key(1))

    return memory, config, draw


def test_values_have_one_size_and_a_family_its_mean(tasks):
    """|y|^2 is 1 on average in every family; the mean has its share, or none."""
    memory, config, draw = tasks
    for name in memory.FAMILIES:
        squares = []
        for i in range(40):
            family = memory.draw_family(config, name, jax.random.key(i))
            pairs = memory.draw_tasks(config, family, 200, jax.random.key(100 + i))
            squares.append([jnp.mean(jnp.sum(pairs.targets**2, -1)), jnp.sum(family.mean**2) / config.width])
        whole, mean = np.mean(squares, 0)
        assert abs(whole - 1) < 0.1
        assert abs(mean - (config.shared if name == "common mean" else 0)) < 0.1
    np.testing.assert_allclose(jnp.linalg.norm(pairs.keys, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(jnp.mean(jnp.sum((pairs.values - pairs.targets) ** 2, -1)), config.noise**2, rtol=0.1)


@pytest.mark.parametrize("kind", ["linear", "deep"])
def test_a_memory_predicts_before_it_reads(tasks, kind):
    """A value changes predictions only after its own; the first prediction is the start's."""
    memory, config, draw = tasks
    _, pairs = draw("common mean")
    meta = {"start": memory.draw_start(config, kind, "random", jax.random.key(2)), "rate": 0.0, "retain": 3.0}
    predict = jax.jit(lambda pairs: memory.predictions(config, kind, 1.0, meta, pairs))
    before, after = predict(pairs), predict(pairs._replace(values=pairs.values.at[9].add(1.0)))
    np.testing.assert_array_equal(changed(before, after).argmax(), 10)
    np.testing.assert_allclose(before[:10], after[:10], atol=1e-6)
    x, w = pairs.keys[0], meta["start"]
    first = x @ w.T if kind == "linear" else x + jax.nn.silu(x @ w["first"].T) @ w["second"].T
    np.testing.assert_allclose(before[0], first, atol=1e-6)


@pytest.mark.parametrize("anchored", [0.0, 1.0])
def test_the_linear_memory_is_the_delta_rule(tasks, x64, anchored):
    """Against a plain loop, and against `tokenwise` where retention decays to zero."""
    memory, config, draw = tasks
    _, pairs = draw("mean zero")
    start = memory.draw_start(config, "linear", "random", jax.random.key(2)).astype(jnp.float64)
    meta = {"start": start, "rate": jnp.asarray(-0.3), "retain": jnp.asarray(2.0)}
    got = memory.predictions(config, "linear", anchored, meta, pairs)
    rate, retain = 1 / (1 + np.exp(0.3)), 1 / (1 + np.exp(-2.0))
    for b in range(3):
        w = start
        for t, (x, v) in enumerate(zip(pairs.keys[:, b], pairs.values[:, b], strict=True)):
            np.testing.assert_allclose(got[t, b], w @ x, atol=1e-12)
            w = anchored * start + retain * (w - anchored * start)
            w = w + rate * jnp.outer(v - w @ x, x)
    if not anchored:
        gate = lambda value: jnp.full((1, config.pairs), value)
        state = MemoryState(jnp.repeat(start[None], 3, axis=0))
        keys, values = pairs.keys.swapaxes(0, 1), pairs.values.swapaxes(0, 1)
        _, after = tokenwise(state, keys, -values, Gates(gate(rate), gate(rate * retain), gate(retain)), keys)
        np.testing.assert_allclose(after[2, -1], w @ keys[2, -1], atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "deep"])
def test_the_gradient_of_a_memory_is_a_difference_quotient(tasks, x64, kind):
    """With respect to the logarithm of its rate, the logit of its retention, and one entry of its start."""
    memory, config, draw = tasks
    _, pairs = draw("common mean")
    start = memory.draw_start(config, kind, "random", jax.random.key(2))
    meta = {"start": start, "rate": jnp.asarray(-0.3), "retain": jnp.asarray(2.0)}
    slope = memory.hypergradient(memory.outer_loss, memory.memory(config, kind, 0.5))
    found = jax.jit(slope)(meta | {"tasks": jnp.zeros(3)}, pairs, pairs.values)
    loss = lambda meta: jnp.mean(jnp.sum((memory.predictions(config, kind, 0.5, meta, pairs) - pairs.values) ** 2, -1))
    loss = jax.jit(loss)
    leaves, structure = jax.tree.flatten(meta)
    gradient = jax.tree.leaves({part: found.gradient[part] for part in meta})
    for i, leaf in enumerate(leaves):
        step = jnp.zeros(leaf.size).at[0].set(1e-5).reshape(leaf.shape)
        ends = [loss(structure.unflatten([*leaves[:i], leaf + sign * step, *leaves[i + 1 :]])) for sign in (1, -1)]
        assert abs(gradient[i].ravel()[0]) > 1e-6
        np.testing.assert_allclose(gradient[i].ravel()[0], (ends[0] - ends[1]) / 2e-5, rtol=1e-6)


def test_a_zero_start_of_the_deep_memory_never_learns(tasks):
    """It is a saddle: each layer's gradient is a product with the other. Half zero learns; zero output starts at 0."""
    memory, config, draw = tasks
    _, pairs = draw("mean zero")
    predict = jax.jit(
        lambda start: memory.predictions(config, "deep", 1.0, {"start": start, "rate": 0.5, "retain": 3.0}, pairs)
    )
    zero, half, output = (
        predict(memory.draw_start(config, "deep", s, jax.random.key(2))) for s in ("zero", "half zero", "zero output")
    )
    np.testing.assert_array_equal(zero, pairs.keys)
    np.testing.assert_array_equal(half[0], pairs.keys[0])
    np.testing.assert_allclose(output[0], 0, atol=1e-6)
    for learns in (half, output):
        assert not np.allclose(learns[-1], learns[0]) and changed(learns[1:], zero[1:]).all()


def test_bayes_is_ridge_regression(tasks, x64):
    """The filter's last prediction is that of the regularised least squares on all pairs before."""
    memory, config, draw = tasks
    family, pairs = draw("common features")
    family, pairs = jax.tree.map(lambda x: x.astype(jnp.float64), (family, pairs))
    guess = memory.bayes(config, family, pairs)
    f, y = memory.features(family, pairs.keys)[:, 0], pairs.values[:, 0]
    w = jnp.linalg.solve(f[:-1].T @ f[:-1] + config.noise**2 * jnp.eye(f.shape[1]), f[:-1].T @ y[:-1])
    np.testing.assert_allclose(guess[-1, 0], f[-1] @ w, atol=1e-9)


def test_starts_are_measured(tasks, written):
    """A short run: errors are of held-out tasks, only a learned start moves."""
    memory, config, draw = tasks
    config = memory.InitialMemory(**{**vars(config), "families": ("common features",), "memories": ("linear",)})
    kept, shown = written(memory, config)
    assert "| Bayes |" in shown
    draw_family, draw_tasks = jit(memory.draw_family, 0, 1), jit(memory.draw_tasks, 0, 2)
    meta_learn, predictions = jit(memory.meta_learn, 0, 1), jit(memory.predictions, 0, 1)
    for i, seed in enumerate(config.seeds):
        of_family, train, tune, count, begins = memory.keys_of(seed)
        family = draw_family(config, "common features", of_family)
        tuning, held_out = (draw_tasks(config, family, n, key) for n, key in ((3, tune), (4, count)))
        error = lambda guess, pairs: jnp.mean(jnp.sum((guess - pairs.targets) ** 2, -1), 1)
        best = memory.pick(kept, "", "common features", "Bayes")
        np.testing.assert_allclose(best["error"][i], error(memory.bayes(config, family, held_out), held_out), rtol=1e-4)
        learned = memory.pick(kept, "linear", "common features", "learned")
        anchored = float(learned["decays_to"] == "start")
        start = memory.draw_start(config, "linear", "learned", begins)
        meta = meta_learn(config, "linear", family, 1.0, anchored, start, train)
        found = [error(predictions(config, "linear", anchored, meta, pairs), pairs) for pairs in (tuning, held_out)]
        np.testing.assert_allclose(learned["tuning"][learned["decays_to"]][i], found[0].mean(), rtol=1e-4)
        np.testing.assert_allclose(learned["error"][i], found[1], rtol=1e-4)
    start = memory.draw_start(config, "linear", "random", jax.random.key(2))
    for learned in (0.0, 1.0):
        meta = meta_learn(config, "linear", family, learned, 1.0, start, jax.random.key(3))
        assert bool((meta["start"] == start).all()) == (learned == 0)
        assert meta["rate"] != jnp.log(0.5)


def test_the_target_of_retention_is_chosen_on_tuning_tasks(tasks, monkeypatch):
    """And not on held-out tasks."""
    memory, config, _ = tasks
    config = memory.InitialMemory(**{**vars(config), "families": ("mean zero",), "memories": ("linear",)})
    either = lambda zero, start: np.stack([np.full((3, 2), zero), np.full((3, 2), start)], 1)  # starts, decays to, seeds
    each = {"tuning": either(0.1, 0.2), "error": either(0.4, 0.3)[..., None], "rate": either(1, 2), "retain": either(0, 1)}
    monkeypatch.setattr(memory, "measure_seeds", lambda *_: (each, np.zeros((2, 1))))
    rows = [row for row in memory.measure(config)["rows"] if row["memory"]]
    assert [(row["decays_to"], row["error"], row["rate"]) for row in rows] == [("zero", [[0.4], [0.4]], [1, 1])] * 3
