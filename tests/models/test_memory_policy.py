"""One knob for what the backward pass keeps of all that learns while reading: the same gradients, less memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rare import cases

from nested_jax import LanguageModel, ModelConfig
from nested_jax.cms import CMSConfig
from nested_jax.errors import UserError
from nested_jax.models import language_model
from nested_jax.models.block import sequence_layer
from nested_jax.train.config import TrainConfig, difference

MODEL = ModelConfig(
    vocabulary=16, width=8, layers=2, heads=2, memory_hidden=4, chunk=4, mixer="gated-delta",
    cms=CMSConfig(hidden=(8, 8), periods=(8, 4)),
)  # fmt: skip


def differentiated(config: ModelConfig, text):
    """Value and gradients of a batch's loss, compiled, and the parameters."""
    net, weights = nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param)
    weights = jax.tree.map(lambda w: w.astype(jnp.result_type(float)), weights)

    def loss(weights):
        model = nnx.merge(net, weights)
        logits, _ = model(text[:, :-1], model.init_state(len(text)))
        return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()

    return jax.jit(jax.value_and_grad(loss)).lower(weights).compile(), weights


def text(length, rows=2):
    return jnp.asarray(np.random.default_rng(0).integers(0, 16, (rows, length + 1)))


@pytest.mark.slow
def test_gradients_do_not_depend_on_the_policy(x64):
    """A model all of whose blocks learn in context, on five slowest periods, against keeping everything."""
    value = lambda policy: (made := differentiated(dataclasses.replace(MODEL, memory_policy=policy), text(40)))[0](made[1])
    expected = value("none")
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected))
    for policy in ("sqrt", "full", "loops", "blocks", "log", 2, 100):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), value(policy), expected)


@pytest.mark.slow
def test_memory_of_a_model_that_learns_in_context():
    """Of 1,024 tokens, 128 of its slowest periods: everything, a state each, or the root of that many, or a given number.

    128 segments are a state each, 11 nearly the root; quarters in quarters are fewest states.
    """
    used = {
        policy: differentiated(dataclasses.replace(MODEL, memory_policy=policy), text(1024))[0]
        .memory_analysis()
        .temp_size_in_bytes
        for policy in ("none", "full", "sqrt", "log", 11, 128)
    }
    assert used["none"] > 3 * used["full"], used
    assert used["full"] > 2 * used["sqrt"], used
    assert used["log"] < used["sqrt"] and used[128] > 1.2 * used[11], used
    assert 0.8 < used[11] / used["sqrt"] < 1.2, used


@pytest.mark.parametrize("mixer", cases(["self-modifying", "titans", "gated-delta", "omega"], ["gated-delta"]))
def test_every_layer_takes_it(mixer):
    """Temporary memory of a layer's gradient over 256 chunks."""
    config = dataclasses.replace(MODEL, mixer=mixer, cms=CMSConfig(hidden=(8,)))
    x = jax.random.normal(jax.random.key(0), (1, 1024, 8))

    def used(policy):
        layer = sequence_layer(dataclasses.replace(config, memory_policy=policy))
        weights = layer.init_weights(jax.random.key(1))
        total = lambda weights: jnp.sum(layer(weights, layer.init_state(weights, 1), x, 0)[1] ** 2)
        return jax.jit(jax.grad(total)).lower(weights).compile().memory_analysis().temp_size_in_bytes

    everything, states, few = used("none"), used("full"), used("sqrt")
    assert everything > 1.3 * states, (everything, states)
    assert everything > 2 * few, (everything, few)  # the insides of 16 chunks can be more than 256 states


@pytest.mark.parametrize("mixer", cases(["attention", "gated-delta"], ["gated-delta"]))
def test_blocks_keep_what_they_read(mixer):
    """Temporary memory of the gradient of eight blocks, and its values."""
    config = dataclasses.replace(MODEL, mixer=mixer, layers=8, width=16, cms=CMSConfig(hidden=(64,)))
    whole, blocks = (
        differentiated(dataclasses.replace(config, memory_policy=each), text(256)) for each in ("full", "blocks")
    )
    used = [compiled.memory_analysis().temp_size_in_bytes for compiled, _ in (whole, blocks)]
    assert used[0] > 2 * used[1], used
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, *(compiled(weights) for compiled, weights in (whole, blocks)))


def test_loops_are_not_run_again():
    """Turns of the loops over 16 chunks: one forward, one backward, and one more where blocks keep nothing of them."""
    config = dataclasses.replace(MODEL, layers=8, width=16, cms=CMSConfig(hidden=(64,)))
    made = {
        each: differentiated(dataclasses.replace(config, memory_policy=each), text(64))
        for each in ("full", "loops", "blocks")
    }
    turns = {each: compiled.as_text().count('"known_trip_count":{"n":"16"}') for each, (compiled, _) in made.items()}
    assert turns == {"full": 2, "loops": 2, "blocks": 3}
    used = {each: compiled.memory_analysis().temp_size_in_bytes for each, (compiled, _) in made.items()}
    assert used["blocks"] < used["loops"] < used["full"], used
    values = [compiled(weights) for compiled, weights in made.values()]
    jax.tree.map(lambda *each: np.testing.assert_allclose(each[1], each[0], rtol=1e-4, atol=1e-6), *values)


@pytest.mark.slow
def test_loops_keep_inverses(monkeypatch):
    """An inverse of 8 x 8 takes four products; with none kept, those of two rows and two heads are made once more."""
    config = dataclasses.replace(MODEL, width=16, chunk=8, cms=CMSConfig(hidden=(64,)), memory_policy="loops")
    products = lambda: differentiated(config, text(32))[0].cost_analysis()["flops"]
    kept = products()
    monkeypatch.setattr(language_model, "KEPT", "nothing")
    jax.clear_caches()
    assert products() - kept >= 2 * 2 * 4 * 2 * 8**3


def test_it_makes_no_other_run():
    config = TrainConfig.from_preset("tiny-hope")
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, memory_policy="sqrt"))
    assert difference(config, other) is None


@pytest.mark.parametrize("policy", ["half", 0, -1, 2.5, True])
def test_a_policy_that_cannot_be_is_refused(policy):
    with pytest.raises(UserError, match="model.memory_policy .*: give one of none, full, loops, blocks, sqrt, log or "):
        dataclasses.replace(MODEL, memory_policy=policy)
