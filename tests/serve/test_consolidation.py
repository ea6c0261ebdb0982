"""Consolidation: a model that stands still with a learner's levels, what is distilled, what stays, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rare import cases

from nested_jax import CMSConfig, LanguageModel, ModelConfig, UserError
from nested_jax.cms.in_context import fast_weights, with_level
from nested_jax.models.language_model import apply, init_state
from nested_jax.serve import Learner, Learners, consolidation

SIZES = dict(vocabulary=17, width=16, layers=2, heads=2, chunk=4)
MODELS = {
    "two levels": dict(mixer="gated-delta", cms=CMSConfig(hidden=(6, 5), periods=(24, 8), rate=1.0)),
    "last block": dict(mixer="gated-delta", cms=CMSConfig(hidden=(4, 6, 5), periods=(16, 8), rate=1.0, blocks=1)),
    "nested": dict(mixer="attention", cms=CMSConfig(hidden=(6, 6), periods=(8, 4), rate=1.0, variant="nested")),
    "nested, last block": dict(
        mixer="gated-delta", cms=CMSConfig(hidden=(6, 6), periods=(8, 4), rate=1.0, variant="nested", blocks=1)
    ),
    "shared by the batch": dict(
        mixer="gated-delta", cms=CMSConfig(hidden=(6, 5), periods=(8, 4), rate=1.0, scope="batch", variant="independent")
    ),
}


def made(name):
    return LanguageModel(ModelConfig(**SIZES | MODELS[name]), rngs=nnx.Rngs(0))


def text(length, seed=0):
    return np.resize(np.random.default_rng(seed).integers(17, size=9), length)


def names_of(model):
    frozen = model.config.cms.frozen
    return f"level{frozen + 1}", f"level{frozen + 2}"


@pytest.mark.parametrize("name", cases(MODELS, ["nested, last block"]))
def test_a_model_that_stands_still_is_the_learner_that_does_not_learn(name):
    """The levels of a learner that has read, put into another state that has not, beside the frozen model with them."""
    model, ids = made(name), text(30, 1)
    learner = Learner(model, max_length=64)
    learner.read(text(50))
    state = learner._all._pool.get(0)[0]
    levels = consolidation.matrices_of(state)
    start = init_state(model.config, model.weights, 1, max_length=64)
    assert start.learning is not None
    nest = start.learning.levels
    for i, (own, first) in enumerate(zip(levels, fast_weights(nest), strict=True)):
        assert any(jnp.any(a != b) for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(first.matrices), strict=True))
        nest = with_level(nest, i, first._replace(matrices=own))
    start = start._replace(learning=start.learning._replace(levels=nest))
    expected, _ = apply(model.config, model.weights, ids[None], start, learn=jnp.zeros((1, 30), bool))
    config, weights = consolidation.still(model.config, model.weights, levels)
    found, _ = apply(config, weights, ids[None], init_state(config, weights, 1, max_length=64))
    assert not config.adapting
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", cases(MODELS, ["nested, last block"]))
def test_the_slow_level_takes_over_what_the_fast_one_held(name):
    """The divergence falls; the fast level is at its start, or at the slow one's; all else and all others stay."""
    model = made(name)
    learners, (slow, fast) = Learners(model, 2, max_length=64), names_of(model)
    learners.read({0: text(70), 1: text(70, 2)})
    other = jax.tree.map(np.asarray, learners._pool.get(1))
    before, kept = learners._pool.get(0)
    kept = np.asarray(kept)
    found = learners[0].consolidate(slow, replay=16, tokens=24, steps=80, rate=3e-3)
    assert found.forgotten > 1e-5 and found.distilled < 0.5 * found.forgotten
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, learners._pool.get(1)), other)
    after = learners._pool.get(0)[0]
    jax.tree.map(np.testing.assert_array_equal, after.mixers, before.mixers)
    slow_now, fast_now = consolidation.matrices_of(after)
    fresh = consolidation.matrices_of(learners._pool.start()[0])
    wanted = slow_now if model.config.cms.variant == "nested" else fresh[1]
    jax.tree.map(np.testing.assert_array_equal, fast_now, wanted)
    assert any(
        np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (slow_now, consolidation.matrices_of(before)[0])), strict=True)
    )
    np.testing.assert_array_equal(learners[0].logits, kept)
    learners[0].read(text(30, 3))
    assert np.isfinite(learners[0].logits).all() and learners[0].tokens_read == 100
    assert learners[0].held[f"CMS {fast}"] >= 0


@pytest.mark.slow
def test_texts_may_be_given_and_the_same_seed_dreams_alike():
    model = made("two levels")
    learner = Learner(model, max_length=64)
    learner.read(text(70))
    given = np.stack([text(24, seed) for seed in range(3)])
    one, same, other, texts = (learner.copy() for _ in range(4))
    options = dict(replay=8, tokens=16, steps=5)
    assert one.consolidate("level1", **options) == same.consolidate("level1", **options)
    assert one.consolidate("level1", **options, seed=1) != other.consolidate("level1", **options)
    found = texts.consolidate("level1", replay=given, steps=60, rate=3e-3)
    assert found.distilled < 0.5 * found.forgotten
    before, after = (learner._all._pool.get(0)[0], texts._all._pool.get(0)[0])
    levels, fresh = consolidation.matrices_of(before), consolidation.matrices_of(learner._all._pool.start()[0])

    def chances(levels):
        config, weights = consolidation.still(model.config, model.weights, levels)
        return np.asarray(jax.nn.softmax(apply(config, weights, given, init_state(config, weights, 3))[0]), np.float64)

    own = chances(levels)
    for value, others in (
        (found.forgotten, [levels[0], fresh[1]]),
        (found.distilled, consolidation.matrices_of(after)),
    ):
        assert value == pytest.approx((own * np.log(own / chances(others))).sum(-1).mean(), rel=0.02, abs=1e-7)
    written = consolidation.write(model.config, 4, 6, 3, model.weights, levels, 0)
    assert written.shape == (4, 6) and (written[:, 0] == 3).all() and len({tuple(row) for row in written.tolist()}) == 4


@pytest.mark.parametrize(
    ("told", "options"),
    {
        "consolidate: level 'level2' is unknown: give one of level1": dict(level="level2"),
        "consolidate: replay 0: give": dict(replay=0),
        "consolidate: replay float": dict(replay=np.zeros(3)),
        "token 99 is out of range": dict(replay=np.full((2, 3), 99)),
        "consolidate: tokens 0: give": dict(tokens=0),
        "consolidate: steps 1.5: give": dict(steps=1.5),
        "consolidate: rate 0: give a number above 0": dict(rate=0),
        "consolidate: rate nan: give a number above 0": dict(rate=float("nan")),
        "consolidate: seed -1: give": dict(seed=-1),
    }.items(),
)
def test_wrong_calls_are_told(told, options):
    with pytest.raises(UserError) as error:
        Learner(made("two levels"), max_length=64).consolidate(**{"level": "level1"} | options)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_model_with_nothing_to_consolidate_says_so():
    model = LanguageModel(ModelConfig(**SIZES, mixer="attention", cms=CMSConfig(hidden=(8,))), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="consolidate: level 'level1'"):
        Learner(model, max_length=64).consolidate("level1")
