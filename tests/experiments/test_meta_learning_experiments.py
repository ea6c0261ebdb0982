"""Small runs of sine.py and deep_momentum.py: distributions of tasks, and errors on held-out points."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

FOLDER = "meta_learning"


def test_sines_have_their_distribution(load):
    """Amplitude, phase and inputs fill their ranges; shots and queries are different points of one sine."""
    sine, settings = load("sine"), load("config")
    config = settings.Sine()
    keys = jax.random.split(jax.random.key(0), 500)
    shots, queries = jax.vmap(lambda key: sine.draw(config, 10, 30, key))(keys)
    assert shots.x.shape == (500, 10) and queries.x.shape == (500, 30)
    assert (jnp.abs(shots.x) <= 5).all() and shots.x.min() < -4.9 and shots.x.max() > 4.9
    assert not (shots.x[:, :, None] == queries.x[:, None, :]).any()
    # y = a sin(x - phase) is linear in (sin x, cos x): fitted by the shots it is the queries, and gives a and phase.
    basis = lambda x: np.stack([np.sin(x), np.cos(x)], -1).astype(np.float64)
    amplitudes, phases = [], []
    for x, y, other, wanted in zip(*map(np.asarray, (*shots, *queries)), strict=True):
        (s, c), *_ = np.linalg.lstsq(basis(x), y, rcond=None)
        np.testing.assert_allclose(basis(other) @ (s, c), wanted, atol=1e-4)
        amplitudes.append(np.hypot(s, c))
        phases.append(np.arctan2(-c, s))
    for found, (low, high) in ((amplitudes, config.amplitude), (phases, config.phase)):
        assert low - 1e-4 <= min(found) < low + 0.1 and high - 0.1 < max(found) <= high + 1e-4


def test_held_out_sines_are_not_trained_on(load):
    """Training, tuning and test tasks of two seeds are all different."""
    sine, settings = load("sine"), load("config")
    config = settings.Sine(test_tasks=200, tuning_tasks=200, shots=(1, 10), batch_size=4, iterations=50)
    key = jax.random.fold_in(jax.random.key(0), 1)
    trained = [jax.random.split(jax.random.fold_in(key, i), config.batch_size) for i in range(config.iterations)]
    trained = jax.vmap(lambda key: sine.draw(config, 10, 10, key))(jnp.concatenate(trained))
    several = [trained, *(sine.held_out(config, seed, tuning) for seed in (0, 1) for tuning in (True, False))]
    firsts = np.concatenate([shots.x[:, 0] for shots, _ in several])
    assert len(firsts) == 5 * 200 and len(np.unique(firsts)) == len(firsts)
    assert several[1][0].x.shape == (200, 10)


def test_the_error_is_on_queries(load):
    """Steps are optax's steps on the shots alone; the error is that of the queries."""
    sine, settings = load("sine"), load("config")
    config = settings.Sine(hidden=(5,), steps=4)
    start = sine.init(config, jax.random.key(1))
    shots, queries = sine.draw(config, 3, 20, jax.random.key(2))
    params, rule, expected = start, optax.sgd(0.03), []
    for _ in range(config.steps + 1):
        expected.append(sine.error(params, queries))
        updates, _ = rule.update(jax.grad(sine.error)(params, shots), rule.init(params))
        params = optax.apply_updates(params, updates)
    found = sine.descend(config, start, jnp.log(0.03), shots, queries)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert abs(found[-1] - sine.error(params, shots)) > 1e-2
    moved = queries._replace(y=queries.y + 1.0)  # queries do not change the parameters
    steps = lambda q: sine.descend(config, start, jnp.log(0.03), shots, q)
    shift = steps(moved) - steps(queries)  # (p - y - 1)^2 - (p - y)^2, of predictions from the same parameters
    again, each = start, []
    for _ in range(config.steps + 1):
        each.append(sine.error(again, moved) - sine.error(again, queries))
        again = optax.apply_updates(again, rule.update(jax.grad(sine.error)(again, shots), rule.init(again))[0])
    np.testing.assert_allclose(shift, each, rtol=1e-3, atol=1e-5)


def test_a_rate_is_tuned_on_tuning_tasks(load):
    """For every number of steps it is the grid's best, evaluated rate by rate; on test tasks another one is best."""
    sine, settings = load("sine"), load("config")
    config = settings.Sine(
        shots=(2, 3), hidden=(5,), steps=2, test_tasks=6, tuning_tasks=4, queries=5, rates=(0.003, 0.01, 0.02, 0.03, 0.05),
    )  # fmt: skip
    start, seed = sine.init(config, jax.random.key(1)), jnp.array(6)
    errors = {}
    descend = jax.jit(lambda rate, shots, queries: sine.descend(config, start, jnp.log(rate), shots, queries))
    for tuning, count in ((True, 4), (False, 6)):
        shots, queries = sine.held_out(config, seed, tuning)
        assert shots.x.shape == (count, 3)
        tasks = [(sine.Points(*(p[i, :2] for p in shots)), sine.Points(*(p[i] for p in queries))) for i in range(count)]
        each = [[descend(rate, *task) for task in tasks] for rate in config.rates]
        errors[tuning] = np.mean(each, 1)  # rates, steps
    best, other = (errors[tuning].argmin(0) for tuning in (True, False))
    assert (best != other)[1:].all()
    one = jax.tree.map(lambda x: x[None], start)
    found, rates = sine.test_tuned(config, 2, seed[None], one)
    np.testing.assert_allclose(rates[0, 1:], np.array(config.rates)[best[1:]], rtol=1e-6)
    np.testing.assert_allclose(found[0], errors[False][best, range(3)], rtol=1e-4)


def test_sines_are_learned_from_few_points(load, written):
    """A start after a short meta-training is better after a step than before; all other methods run."""
    sine, settings = load("sine"), load("config")
    config = settings.Sine(
        shots=(5,), hidden=(16, 16), iterations=300, meta_rate=0.005, steps=3, test_tasks=60, tuning_tasks=20,
        rates=(0.003, 0.01), seeds=(0, 1),
    )  # fmt: skip
    results, shown = written(sine, config)
    rows = {row["start"]: row for row in results["rows"]}
    assert set(rows) == {sine.RANDOM, sine.PRETRAINED, sine.PUBLISHED, *sine.MAML}
    assert np.shape(rows["MAML"]["errors"]) == (2, 4)
    assert (np.array(rows["MAML"]["errors"])[:, 1] < np.array(rows["MAML"]["errors"])[:, 0]).all()
    assert rows["MAML"]["rate"] == rows["MAML, first order"]["rate"] == pytest.approx([0.01, 0.01])
    assert rows["MAML, learned rate"]["rate"] != pytest.approx([0.01, 0.01], rel=1e-2)
    assert rows["MAML"]["errors"] != rows["MAML, first order"]["errors"]
    assert rows[sine.PRETRAINED]["errors"] != rows["MAML"]["errors"]
    assert "5-shot" in shown and "± " in shown


def test_regressions_share_their_number_of_covariances(load):
    """One, one of two, or each its own; targets weigh directions equally; the true weights have error zero."""
    deep, settings = load("deep_momentum"), load("config")
    config = settings.DeepMomentum(inputs=4, outputs=3, condition=10.0, noise=0.0)
    keys = jax.random.split(jax.random.key(0), 12)
    for geometries, several in ((1, 1), (2, 2), (2**31 - 1, 12)):
        tasks = jax.vmap(lambda key, n=geometries: deep.draw(config, jnp.array(n), jax.random.key(5), key))(keys)
        covariances = np.asarray(tasks.root @ tasks.root.mT)
        assert len(np.unique(covariances[:, 0, 1].round(5))) == several
        assert len(np.unique(np.asarray(tasks.target)[:, 0, 0])) == 12
        np.testing.assert_allclose(np.linalg.eigvalsh(covariances[0])[[0, -1]], [0.1, 1.0], rtol=1e-4)
    many = jax.random.split(jax.random.key(1), 400)
    many = jax.vmap(lambda key: deep.draw(config, jnp.array(1), jax.random.key(5), key))(many)
    np.testing.assert_allclose(((many.root.mT @ many.target) ** 2).mean((0, 2)), 1, atol=0.2)
    task = jax.tree.map(lambda x: x[0], tasks)
    assert deep.excess(jnp.zeros((4, 3)), task) == 1 and deep.excess(task.target, task) == 0
    x, y = deep.examples(
        settings.DeepMomentum(inputs=4, outputs=3, condition=10.0, noise=0.0, examples=20_000), task, keys[0]
    )
    np.testing.assert_allclose(x.T @ x / 20_000, task.root @ task.root.T, atol=0.03)
    np.testing.assert_allclose(y, x @ task.target, atol=1e-5)
    np.testing.assert_allclose(y.var(), jnp.mean(jnp.sum((task.root.T @ task.target) ** 2, 0)), rtol=0.05)


def test_training_tuning_and_test_tasks_differ(load):
    """They share the covariances of the seed, and no target."""
    deep, settings = load("deep_momentum"), load("config")
    config = settings.DeepMomentum(inputs=4, outputs=2)
    draws = [(deep.TRAINING, 0), (deep.TRAINING, 1), (deep.TUNING, 0), (deep.TEST, 0)]
    tasks = [deep.tasks_of(config, jnp.array(1), seed, which, 6, i)[0] for seed in (0, 1) for which, i in draws]
    targets = np.concatenate([task.target[:, 0, 0] for task in tasks])
    assert len(np.unique(targets)) == len(targets) == 48
    roots = [task.root[0] for task in tasks]
    assert all((root == roots[0]).all() for root in roots[:4]) and not (roots[4] == roots[0]).any()


def test_a_start_is_learned_for_the_tasks_of_a_family(load, monkeypatch):
    """Only what each method names is meta-learned, from tuned rates; a learned start beats the default one."""
    deep, settings = load("deep_momentum"), load("config")
    config = settings.DeepMomentum(
        geometries=(1,), inputs=4, outputs=3, condition=30.0, examples=8, steps=5, long=8, hidden=8, iterations=60,
        batch_size=4, meta_rate=0.03, tuning_tasks=4, test_tasks=16, rates=(0.3, 1.0), decays=(0.0, 0.5),
        deep_rates=(0.3, 1.0), deep_decays=(0.5,), memory_rates=(0.1,), seeds=(0, 1),
    )  # fmt: skip
    seeds, one = jnp.array(config.seeds), jnp.array(1)
    used, tasks_of = [], deep.tasks_of
    monkeypatch.setattr(deep, "tasks_of", lambda *choices: used.append(choices[3]) or tasks_of(*choices))
    tuned = deep.tune(config, deep.DEEP, config.steps, one, seeds)
    assert used == [deep.TUNING]
    assert set(np.asarray(jnp.exp(tuned["log_rate"])).round(3).tolist()) <= {0.3, 1.0}
    rates, _ = deep.learn(config, "deep momentum, meta-learned rates and decay", one, seeds, tuned)
    assert (rates["start"].up == tuned["start"].up).all() and (rates["start"].down == 0).all()
    assert (rates["log_rate"] != tuned["log_rate"]).all()
    learned, losses = deep.learn(config, deep.START, one, seeds, tuned)
    assert (learned["start"].down != 0).any() and losses.shape == (2, 60)
    assert set(used[1:]) == {deep.TRAINING}
    used.clear()
    ends = [deep.test(config, deep.DEEP, one, seeds, metas)[0][:, config.steps] for metas in (tuned, rates, learned)]
    assert (ends[2] < ends[1]).all() and (ends[2] < ends[0]).all() and set(used) == {deep.TEST}

    both, _ = deep.learn(config, deep.BOTH, one, seeds, tuned)
    assert (both["start"].down != 0).any() and (both["outer_decay"] != 0).all()
    frozen, _ = deep.learn(config, deep.FROZEN, one, seeds, tuned)
    assert (frozen["log_memory_rate"] == tuned["log_memory_rate"]).all()


def test_the_grid_is_searched_on_tuning_tasks(load):
    """The choice is the grid's best, evaluated descent by descent on tuning tasks."""
    deep, settings = load("deep_momentum"), load("config")
    config = settings.DeepMomentum(
        inputs=3, outputs=2, condition=5.0, examples=6, steps=4, tuning_tasks=3, rates=(0.1, 0.7, 5.0), decays=(0.0, 0.5),
    )  # fmt: skip
    tuned = deep.tune(config, deep.MOMENTUM, 4, jnp.array(1), jnp.array([3]))
    tasks, keys = deep.tasks_of(config, jnp.array(1), jnp.array(3), deep.TUNING, 3)
    ends = {}
    descend = jax.jit(lambda meta, task, key: deep.descend(config, deep.MOMENTUM, 4, meta, task, key))
    for rate in config.rates:
        for decay in config.decays:
            meta = {"log_rate": jnp.log(rate), "decay": deep.logit(decay)}
            each = [descend(meta, jax.tree.map(lambda x: x[i], tasks), keys[i]) for i in range(3)]  # noqa: B023
            ends[rate, decay] = np.mean([np.log(errors[-1]) for errors in each])
    rate, decay = min(ends, key=ends.get)
    np.testing.assert_allclose(jnp.exp(tuned["log_rate"]), rate, rtol=1e-5)
    np.testing.assert_allclose(jax.nn.sigmoid(tuned["decay"]), decay, atol=2e-3)


def test_tables_and_figures_are_complete(load, written):
    """Those of deep momentum have every optimizer in every family, with the spread over seeds."""
    deep, settings = load("deep_momentum"), load("config")
    config = settings.DeepMomentum(steps=2, long=4, memory_rates=(0.03, 0.1))
    titles = [f"{name}, tuned for {n} steps" for n in (2, 4) for name in (deep.MOMENTUM, deep.DEEP)] + list(deep.LEARNED)
    row = {"errors": [[1, 0.5, 0.25, 0.2, 0.1], [1, 0.5, 0.35, 0.2, 0.1]], "lost": [0, 0.5], "rate": [1.0, 3.2]}
    row |= {"decay": [0.0, 0.98], "training": None}
    rows = [row | {"geometries": n, "optimizer": title} for n in (1, 4, 0) for title in titles]
    rows[0] = row | {"errors": [[1, 0.6, 0.2, 0.2, 0.2]] * 2, "geometries": 1, "optimizer": titles[0], "training": []}
    rows[1] = row | {"errors": [[1, 0.4, 0.4, 0.4, 0.05]] * 2, "geometries": 1, "optimizer": titles[1]}
    rows[1] |= {"memory_rate": [0.03, 0.03], "memory_decay": [0.0, 0.5]}
    del rows[1]["decay"]
    module = types.SimpleNamespace(measure=lambda _: {"rows": rows}, table=deep.table, figure=deep.figure)
    _, table = written(module, config)
    line = "| 300 ± 70.7 | 100 ± 0 | 25% |  | 2.1 (1 at the edge) | 0.49 (1 at the edge) |  |  |"
    assert table.count(line) == 3 * 10 - 2 and "one of 4 covariances" in table
    assert "| 200 ± 0 | 200 ± 0 | 25% | 4 | 2.1 | 0.49 |  |  |" in table
    assert "| 400 ± 0 | 50 ± 0 | 25% |  | 2.1 (1 at the edge) |  | 0.03 (2 at the edge) | 0.25 |" in table
