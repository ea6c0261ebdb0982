"""One update: what it computes, and that it stays what it is."""

import dataclasses
import functools
import math
import re
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rare import cases
from tiny_run import small_model

from nested_jax.cms import fast_weights
from nested_jax.data import Batch
from nested_jax.level import Level, run
from nested_jax.models.language_model import apply, init_state
from nested_jax.train import state as states
from nested_jax.train.config import Optimizer, TrainConfig
from nested_jax.train.optimizer import MATRICES, decayed, learning_rate, optimizer
from nested_jax.train.step import Metrics, assert_healthy, cross_entropy, train_step
from nested_jax.train.stopping import NonFinite

NAMES = ("tiny-transformer", "tiny-hope")
RUNS = ("tiny-transformer carry", "tiny-transformer", "tiny-hope carry", "tiny-hope")


@functools.cache
def _started(config, x64):
    return jax.jit(lambda: states.init_train_state(config))()


def start(config):
    """The state before the first update, compiled once a config and precision; a copy, which may be donated."""
    return jax.tree.map(jnp.copy, _started(config, jax.config.jax_enable_x64))


@functools.cache
def updating(config):
    """The jitted update of a config, compiled once."""
    return jax.jit(train_step(config.model, optimizer(config), accumulate=config.accumulate))


def make(name="tiny-transformer", **fields):
    sizes = {"window": 32, "batch_size": 4, "steps": 10, "warmup": 2, "model": small_model(name)}
    config = TrainConfig.from_preset(name, **(sizes | fields))
    rule = optimizer(config)
    return config, config.model, train_step(config.model, rule, accumulate=config.accumulate)


def batches(config, number=1, seed=0):
    random = np.random.default_rng(seed)
    shape = (config.batch_size, config.window)
    for _ in range(number):
        tokens = random.integers(1, 256, (config.batch_size, config.window + 1)).astype(np.int32)
        reset = np.zeros(shape, bool)
        reset[:, 0] = True
        reset[1, 16] = True
        weights = np.ones(shape, np.float32)
        weights[2, 20:] = 0
        yield Batch(tokens[:, :-1], tokens[:, 1:], weights, reset)


def to_float64(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_mean_over_targets(name):
    config, net, _ = make(name)
    state, batch = start(config), next(batches(config))
    _, metrics = updating(config)(state, batch)
    total, _ = jax.jit(lambda params: cross_entropy(net, params, None, batch))(state.params)
    chex.assert_trees_all_close(metrics.loss, total / batch.weights.sum(), rtol=1e-6)
    assert metrics.loss.dtype == jnp.float32
    assert metrics.bits == pytest.approx(metrics.loss / math.log(2))
    assert metrics.loss == pytest.approx(math.log(256), rel=0.05)
    assert_healthy(1, metrics, config.model)


@pytest.mark.parametrize("run", cases(RUNS, RUNS[:1]))
def test_accumulation_gives_the_gradient_of_the_whole_batch(x64, run):
    name, carry = run.split()[0], run.endswith("carry")
    gradients = []
    for accumulate in (1, 2, 4):
        config, net, _ = make(name, accumulate=accumulate, carry=carry)
        step = train_step(net, optax.sgd(1.0), accumulate=accumulate)
        params = to_float64(states.init_params(config.model, 0))
        state = start(config)._replace(params=params, optimizer=optax.sgd(1.0).init(params))
        state = state._replace(fast=to_float64(state.fast))
        after, metrics = jax.jit(step)(state, next(batches(config)))
        gradients.append((metrics.loss, jax.tree.map(jnp.subtract, params, after.params)))
        if carry:
            assert jax.tree.leaves(after.fast)[0].shape[0] == accumulate
    chex.assert_trees_all_close(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name):
    config, _, _ = make(name)
    state, update = start(config), updating(config)
    after, _ = update(state, next(batches(config)))
    still = [
        jax.tree_util.keystr(path)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(state.optimizer[1][0].mu),
            jax.tree.leaves(after.optimizer[1][0].mu),
            strict=True,
        )
        if not jnp.any(a != b)
    ]
    assert still == []
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(after.optimizer[1][0].mu))


@pytest.mark.parametrize("run", cases(RUNS, RUNS[1:2]))
def test_the_second_update_compiles_nothing_and_donates(run):
    fields = {"carry": True, "accumulate": 2} if run.endswith("carry") else {}
    config, _, step = make(run.split()[0], **fields)
    state, update = start(config), jax.jit(step, donate_argnums=0)
    for batch in batches(config, 3):
        before = state
        state, _ = update(state, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    assert update._cache_size() == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.eval_shape(lambda: states.init_train_state(config)))


def test_carried_state_is_used_until_a_reset():
    config, _, _ = make(carry=True)
    update, state = updating(config), start(config)
    batch = next(batches(config))
    state, _ = update(state, batch)
    goes_on = batch._replace(reset=np.zeros_like(batch.reset))
    starts = batch._replace(reset=np.eye(1, config.window, dtype=bool).repeat(config.batch_size, 0))
    plain = updating(make()[0])
    carried, fresh = update(state, goes_on)[1].loss, update(state, starts)[1].loss
    alone = plain(state._replace(fast=None), starts)[1].loss
    assert abs(carried - fresh) > 1e-5
    assert fresh == pytest.approx(float(alone), rel=1e-5)


@pytest.mark.slow
def test_a_period_longer_than_the_window_comes_due_where_state_is_carried(x64):
    """Four windows of a document, the parameters at rest, are one reading of it; a level of two windows' period steps."""
    model = small_model("tiny-hope", mixer="gated-delta")
    model = dataclasses.replace(model, cms=dataclasses.replace(model.cms, periods=(64, 16)))
    config, net, _ = make("tiny-hope", model=model, carry=True, batch_size=2)
    rest = optax.sgd(0.0)
    params, state = to_float64(states.init_params(model, 0)), start(config)
    state = state._replace(params=params, optimizer=rest.init(params), fast=to_float64(state.fast))
    text = np.random.default_rng(0).integers(1, 256, (2, 129)).astype(np.int32)
    reset = np.zeros((2, 128), bool)
    reset[:, 0] = True
    document = Batch(text[:, :-1], text[:, 1:], np.ones((2, 128)), reset)

    update, losses, slowest = jax.jit(train_step(net, rest)), [], []
    for begin in range(0, 128, 32):
        state, metrics = update(state, jax.tree.map(lambda x, begin=begin: x[:, begin : begin + 32], document))
        losses.append(metrics.loss)
        slowest.append(fast_weights(state.fast.learning.levels)[0].matrices["up"])
    alone = lambda: apply(net, params, document.tokens, init_state(net, params, 2), reset=document.reset)
    logits, _ = jax.jit(alone)()
    each = optax.softmax_cross_entropy_with_integer_labels(logits, document.targets)
    np.testing.assert_allclose(losses, each.reshape(2, 4, 32).mean(axis=(0, 2)), rtol=1e-6)
    assert jnp.array_equal(slowest[0], slowest[1]) and not jnp.allclose(slowest[1], slowest[2])


def test_training_is_the_slowest_level():
    """The loop of updates, written as a Level that reads batches, makes the same parameters."""
    config, _, step = make(clip=0.0)
    stream = list(batches(config, 3))
    looped = start(config)
    for batch in stream:
        looped, _ = jax.jit(step)(looped, batch)
    level = Level(
        init=lambda slower: start(config),
        step=lambda state, context, slower: step(state, jax.tree.map(lambda x: x[0], context)),
        period=1,
        name="pre-training",
    )
    nested, metrics = run(level, None, jax.tree.map(lambda *x: np.stack(x), *stream))
    chex.assert_trees_all_close(nested, looped, rtol=1e-5, atol=1e-6)
    assert metrics.loss.shape == (3,)


def test_schedule_warms_up_and_falls_to_a_tenth():
    rate = learning_rate(TrainConfig(steps=100, warmup=10, learning_rate=1.0))
    values = [float(rate(step)) for step in range(101)]
    assert values[0] > 0 and max(values) == values[10] == 1.0 and values[100] == pytest.approx(0.1)
    assert all(np.isfinite(float(learning_rate(TrainConfig(steps=1, warmup=w))(0))) for w in (0, 1, 5))


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_parameter_is_named(name):
    config, _, _ = make(name)
    state, update = start(config), updating(config)
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    for path, _ in leaves[:: max(1, len(leaves) // 3)]:
        broken = jax.tree_util.tree_map_with_path(
            lambda p, x, path=path: x.at[(0,) * x.ndim].set(jnp.nan) if p == path else x, state.params
        )
        _, metrics = update(state._replace(params=broken), next(batches(config)))
        with pytest.raises(NonFinite) as error:
            assert_healthy(7, metrics, config.model)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert str(error.value) == f"step 7, level pre-training: parameter {name} is not finite"


def test_a_broken_gradient_or_fast_state_is_named():
    config, _, _ = make("tiny-hope")
    _, metrics = updating(config)(start(config), next(batches(config)))
    for kind in ("gradients", "fast", "updated"):
        leaves, tree = jax.tree.flatten(metrics.finite[kind])
        for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(metrics.finite[kind])):
            broken = jax.tree.unflatten(tree, leaves[:i] + [jnp.asarray(False)] + leaves[i + 1 :])
            finite = metrics.finite | {kind: broken}
            with pytest.raises(NonFinite) as error:
                assert_healthy(3, metrics._replace(finite=finite, healthy=False), config.model)
            assert jax.tree_util.keystr(path, simple=True, separator="/") in str(error.value)
            assert ("level pre-training" in str(error.value)) == (kind != "fast")


@pytest.mark.parametrize(
    ("name", "leaf", "level"),
    [
        ("tiny-hope", "mixers/memory/slow/running/first/weights", "memories of the sequence layers, chunk 32"),
        ("tiny-hope", "mixers/memory/fast/running/first/weights", "memories of the sequence layers, chunk 16"),
        ("tiny-hope", "mixers/recent", "memories of the sequence layers, chunk 16"),
        ("tiny-hope", "learning/levels/slow/matrices/up", "CMS level2, period 16"),
        ("tiny-hope", "learning/levels/fast/slow/gradient/down", "CMS level3, period 8"),
        ("tiny-hope", "learning/levels/fast/fast/mixers_at_segment_start/memory/slow/running/second/weights",
         "memories of the sequence layers, chunk 32"),
        ("tiny-hope", "learning/open/inputs", "open segment of the CMS, period 8"),
        ("tiny-hope-attention", "mixers/keys", "caches of the sequence layers"),
        ("tiny-hope-attention", "learning/levels/fast/fast/mixers/values", "caches of the sequence layers"),
    ],
)  # fmt: skip
def test_the_level_of_a_fast_state_is_named_as_users_know_it(name, leaf, level):
    """Of a model with a frozen CMS level, two that learn in two blocks, and memories of two chunk lengths."""
    model = small_model(name, layers=2, projection_chunk=32)
    model = dataclasses.replace(model, cms=dataclasses.replace(model.cms, hidden=(16, 16, 16), blocks=2))
    fast = jax.eval_shape(lambda: init_state(model, states.init_params(model, 0), 1))
    keystr = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    finite = {"fast": jax.tree_util.tree_map_with_path(lambda path, _: keystr(path) != leaf, fast)}
    with pytest.raises(NonFinite) as error:
        assert_healthy(3, Metrics(*[None] * 4, healthy=False, finite=finite), model)
    assert str(error.value) == f"step 3, level {level}: fast state {leaf} is not finite"


@pytest.mark.slow
def test_a_carried_state_that_overflows_is_seen_at_once():
    config, _, _ = make("tiny-titans", carry=True)
    state, update = start(config), updating(config)
    path = jax.tree_util.tree_leaves_with_path(state.fast)
    i = next(i for i, (_, x) in enumerate(path) if jnp.issubdtype(x.dtype, jnp.floating))
    leaves, tree = jax.tree.flatten(state.fast)
    leaves[i] = jnp.full_like(leaves[i], jnp.inf)
    batch = next(batches(config))
    batch = batch._replace(reset=np.zeros_like(batch.reset))
    _, metrics = update(state._replace(fast=jax.tree.unflatten(tree, leaves)), batch)
    with pytest.raises(NonFinite, match="step 1, level memories of the sequence layers, chunk 16: fast state"):
        assert_healthy(1, metrics, config.model)


@pytest.mark.parametrize("name", ["tiny-transformer", pytest.param("tiny-hope-attention", marks=pytest.mark.slow)])
@pytest.mark.parametrize("carry", [False, True])
def test_attention_caches_are_made_only_where_they_are_carried(name, carry):
    """Nothing of the update is written into an array of their shape."""
    config, _, _ = make(name, carry=carry, model=small_model(name, layers=3, width=48, heads=3))
    text = updating(config).lower(start(config), next(batches(config))).as_text()
    written = re.findall(r"stablehlo.scatter.*?-> (\S+)", text, re.DOTALL)
    assert written and ("tensor<4x32x3x16xf32>" in written) == carry


@pytest.mark.parametrize("target", [-1, 256, -100])
def test_a_target_that_is_no_token_is_named_and_one_without_weight_is_none(target):
    config, _, _ = make()
    update, batch = updating(config), next(batches(config))
    odd = batch._replace(targets=batch.targets.copy())
    odd.targets[2, 25] = target  # of weight 0
    expected, got = update(start(config), batch), update(start(config), odd)
    chex.assert_trees_all_equal(expected[0].params, got[0].params)
    assert_healthy(1, got[1], config.model)
    odd.targets[0, 3] = target
    with pytest.raises(NonFinite, match="step 7, level pre-training: a target is no token of the model"):
        assert_healthy(7, update(start(config), odd)[1], config.model)


def test_an_optimizer_state_that_overflows_is_named():
    """Adam's second moment of a finite gradient is infinite: its updates would be zero from then on, without a word."""
    config, _, _ = make()
    state = start(config)
    adam = state.optimizer[1][0]
    broken = adam._replace(nu=adam.nu | {"norm": jnp.full_like(adam.nu["norm"], jnp.inf)})
    state = state._replace(optimizer=(state.optimizer[0], (broken, *state.optimizer[1][1:])))
    _, metrics = updating(config)(state, next(batches(config)))
    with pytest.raises(NonFinite, match="step 2, .*: optimizer state 1/0/nu/norm is not finite after the update"):
        assert_healthy(2, metrics, config.model)


def test_matrices_decay_and_nothing_else():
    params = states.init_params(dataclasses.replace(small_model("tiny-hope"), layers=3, momentum=True), 0)
    decays = {
        jax.tree_util.keystr(path, simple=True, separator="/").removeprefix("blocks/")
        for path, value in jax.tree_util.tree_leaves_with_path(decayed(params))
        if value
    }
    cms = {f"cms/level{level}/{part}" for level in (1, 2) for part in ("up", "down")}
    mixer = {f"mixer/{part}" for part in ("taps", "query", "rate", "retention", "momentum", "out")}
    assert decays == cms | mixer | {"embedding", "head"}


@pytest.mark.parametrize("rule", cases(typing.get_args(Optimizer), ["adamw", "delta-gradient-descent", "m3"]))
def test_every_optimizer_of_the_command_line_trains(rule):
    """A few updates on one batch bring its loss down; matrices stacked over the layers are each their own."""
    sgd = rule in ("momentum", "delta-momentum", "deep-momentum")  # whose updates are of the gradient's size
    model = small_model(layers=2)
    config, _, step = make(model=model, optimizer=rule, slow_period=3, learning_rate=0.3 if sgd else 0.01, warmup=0)
    state, update, batch = start(config), jax.jit(step), next(batches(config))
    losses = []
    for _ in range(9):
        state, metrics = update(state, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.02, losses
    assert update._cache_size() == 1


def test_muons_matrices_are_those_of_blocks():
    """Not embeddings, heads, gates, convolutions or the starts of memories."""
    shapes = jax.eval_shape(
        lambda: states.init_params(dataclasses.replace(small_model("tiny-hope"), layers=3, momentum=True), 0)
    )
    leaves = jax.tree_util.tree_leaves_with_path(MATRICES(shapes), is_leaf=lambda x: isinstance(x, tuple))
    chosen = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}
    cms = {f"blocks/cms/level{level}/{part}" for level in (1, 2) for part in ("up", "down")}
    assert chosen == cms | {"blocks/mixer/query", "blocks/mixer/out"}


@pytest.mark.slow
def test_continuum_moves_the_slow_level_every_so_many_updates():
    hope = small_model("tiny-hope", mixer="attention")
    frozen = dataclasses.replace(hope, cms=dataclasses.replace(hope.cms, periods=(), blocks=None))
    config, _, step = make("tiny-hope", model=frozen, optimizer="continuum", slow_period=3)
    state, update, moved = start(config), jax.jit(step), []
    for batch in batches(config, 6):
        after, _ = update(state, batch)
        levels = [tree.params["blocks"]["cms"] for tree in (state, after)]
        moved.append([not jnp.array_equal(levels[0][name]["up"], levels[1][name]["up"]) for name in ("level1", "level2")])
        state = after
    assert moved == [[False, True], [False, True], [True, True]] * 2


@pytest.mark.parametrize("clip", cases([0.0, 0.5], [0.5]))
def test_the_optimizer_is_clipped_adamw_on_its_schedule(x64, clip):
    """Three updates by large gradients, through the warm-up, against a chain written out."""
    config = TrainConfig(model=small_model("tiny-hope"), steps=9, warmup=2, learning_rate=0.1, weight_decay=0.3, clip=clip)
    params = to_float64(states.init_params(config.model, 0))
    adam = [optax.scale_by_adam(b1=0.9, b2=0.95), optax.add_decayed_weights(0.3, mask=decayed)]
    rates = (0.05, 0.075, 0.1)
    clipped = [optax.clip_by_global_norm(clip)] if clip else []
    own = optimizer(config)
    update = jax.jit(own.update)
    theirs = optax.chain(*clipped, *adam)
    memory, other = own.init(params), theirs.init(params)
    for i, rate in enumerate(rates):
        gradient = jax.tree.map(lambda w, i=i: jnp.cos(w + i), params)
        got, memory = update(gradient, memory, params)
        expected, other = theirs.update(gradient, other, params)
        chex.assert_trees_all_close(got, jax.tree.map(lambda u, rate=rate: -rate * u, expected), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cms", "windows"),
    [
        (dict(periods=(), blocks=None), (256, 512, 1024)),
        (dict(periods=(128, 32), blocks=1), (512, 1024, 2048)),
    ],
    ids=["frozen", "in context"],
)
def test_memory_is_that_of_boundary_states_and_layer_inputs(cms, windows):
    """Temporaries of an update, as XLA counts them, at three lengths: at most twice what has to be kept.

    Of memories that is their state at every chunk's start, of a CMS that learns its state at every segment's.
    """
    model = small_model("tiny-hope", width=64, layers=3 if cms["blocks"] is None else 2, chunk=32)
    model = dataclasses.replace(model, cms=dataclasses.replace(model.cms, hidden=(64, 64), **cms))
    for window in windows:
        config, net, step = make("tiny-hope", model=model, window=window)
        state = jax.eval_shape(lambda config=config: states.init_train_state(config))
        start = jax.eval_shape(lambda p, net=net: init_state(net, p, 4), state.params)
        kept = [start.mixers.memory.running, start.learning.levels if start.learning else ()]
        boundary = sum(leaf.size for leaf in jax.tree.leaves(kept)) * window // 32
        D, levels = model.width, model.cms.hidden
        mixer = 5 * D  # norm, convolution, query map, memories, output map
        layers = model.layers * (mixer + sum(2 * D + F for F in levels)) + 2 * D + model.vocabulary
        allowed = 2 * 4 * (boundary + config.batch_size * window * layers)
        compiled = jax.jit(step, donate_argnums=0).lower(state, next(batches(config))).compile()
        used = compiled.memory_analysis().temp_size_in_bytes
        assert used <= allowed, (window, used, allowed)
