"""CMS that learns in context against a plain loop of `jax.grad` per segment."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rare import cases
from tiny import config, differentiable, model, read, tokens, without_rates

from nested_jax.cms import MATRICES, inner_rule
from nested_jax.errors import UserError
from nested_jax.models import reference

CASES = {
    "two levels": dict(periods=(8, 4)),
    "last block": dict(periods=(8, 4), blocks=1),
    "one block": dict(periods=(8, 4), layers=1),
    "one of two levels": dict(periods=(4,), activation="swiglu"),
    "three levels": dict(hidden=(5, 4, 3), periods=(16, 8, 4), mixer="sliding-window"),
    "nested": dict(hidden=(4, 4, 4), periods=(16, 8, 4), variant="nested"),
    "independent": dict(periods=(8, 8), variant="independent", rule="momentum", mixer="linear"),
    "first order": dict(periods=(8, 4), blocks=1, meta_gradient="first-order", rule="adam"),
    "self-modifying": dict(periods=(8, 4), mixer="self-modifying"),
    "shorter than a chunk": dict(periods=(6, 2), mixer="titans", clip=0.0),
    "attention": dict(periods=(8, 4), mixer="attention"),
    "two of three blocks": dict(periods=(8, 4), blocks=2, layers=3),
    "segments across chunks": dict(periods=(12, 6), mixer="self-modifying"),
    "nested, with momentum": dict(hidden=(4, 4), periods=(8, 4), variant="nested", rule="momentum", mixer="delta", layers=1),
    "titans": dict(periods=(8, 4), mixer="titans"),
    "huber": dict(periods=(8, 4), mixer="huber", huber_threshold=0.3),
    "shared by the batch": dict(periods=(8, 4), scope="batch", activation="swiglu"),
}


@pytest.fixture(autouse=True)
def attention_in_float64(monkeypatch):
    """JAX's own has its softmax in float32, whose rounding depends on the number of keys."""

    def attend(q, k, v, mask=None, is_causal=False, implementation=None):
        scores = jnp.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
        mask = jnp.tri(q.shape[1], dtype=bool)[None, None] if is_causal else mask
        return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1), v)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)


def by_reference(made, text, learn=None):
    rules = (inner_rule(made.config.cms),) * len(made.config.cms.periods)
    return reference.language_model(made.config, made.weights, rules, text, learn)


@pytest.mark.parametrize("case", cases(CASES, ["nested, with momentum"]))
def test_equals_a_loop_of_gradients(x64, case):
    """Logits, which depend on every update before them."""
    made = model(config(**CASES[case]))
    text = tokens(2 if made.config.cms.scope == "batch" else 1, 20)
    fast = jax.jit(lambda: read(made, text, 40)[0])()
    np.testing.assert_allclose(fast, by_reference(made, text), rtol=1e-10, atol=1e-12)
    net, weights = differentiable(made)
    still = jax.jit(lambda w: read(nnx.merge(net, w), text, 40)[0])(without_rates(weights))
    assert not np.allclose(fast, still)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one block", "nested", "shared by the batch"])
def test_learns_from_the_tokens_that_it_is_told(x64, case):
    """In one call, and in pieces that end inside of segments; from none it learns nothing."""
    made = model(config(**CASES[case]))
    text = tokens(2 if made.config.cms.scope == "batch" else 1, 20)
    learn = jax.random.bernoulli(jax.random.key(1), 0.6, text.shape)
    want = by_reference(made, text, learn)
    np.testing.assert_allclose(jax.jit(lambda: read(made, text, 40, learn=learn)[0])(), want, rtol=1e-10, atol=1e-12)
    state, parts = made.init_state(len(text), max_length=40), []
    for begin, end in ((0, 3), (3, 8), (8, 9), (9, 20)):
        logits, state = made(text[:, begin:end], state, learn=learn[:, begin:end])
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), want, rtol=1e-10, atol=1e-12)
    (net, weights), none = differentiable(made), jnp.zeros_like(learn)
    still = jax.jit(lambda w: read(nnx.merge(net, w), text, 40)[0])(without_rates(weights))
    np.testing.assert_allclose(jax.jit(lambda: read(made, text, 40, learn=none)[0])(), still, rtol=1e-10, atol=1e-12)
    with pytest.raises(UserError, match="learn bool\\[3\\]: give bools"):
        made(text, made.init_state(len(text)), learn=jnp.ones(3, bool))


OF_GRADIENTS = ("one block", "last block", "first order", "nested", "two of three blocks")


@pytest.mark.parametrize("case", cases(OF_GRADIENTS, OF_GRADIENTS[:1]))
def test_outer_gradient_equals_that_of_the_loop(x64, case):
    """For every weight: the starts of all levels, their rates, the sequence layers."""
    made = model(config(**CASES[case]))
    text, (net, weights) = tokens(1, 18 if case == "nested" else 10), differentiable(made)

    def outer(read):
        loss = lambda w: optax.softmax_cross_entropy_with_integer_labels(read(nnx.merge(net, w))[:, :-1], text[:, 1:]).mean()
        return jax.grad(loss)

    fast = jax.jit(outer(lambda made: read(made, text, 40)[0]))(weights)
    slow = outer(lambda made: by_reference(made, text))(weights)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(slow), jax.tree.leaves(fast), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-8, atol=1e-11, err_msg=jax.tree_util.keystr(path))
    rates = [level["rate"][...] for level in fast["blocks"]["cms"].values()]
    assert all(jnp.abs(rate[-1]) > 0 for rate in rates)


@pytest.mark.parametrize(("options", "used"), [({}, True), ({"meta_gradient": "first-order"}, False)])
def test_inner_gradients_of_the_full_meta_gradient_are_mixflows(x64, options, used):
    """By the name that it has in the program."""
    made = model(config(periods=(8, 4), **options))
    program = str(jax.make_jaxpr(lambda text: read(made, text, 40)[0])(tokens(1, 20)))
    assert ("mixflow_gradient" in program) == used


@pytest.mark.parametrize("case", cases(["two levels", "nested", "independent", "self-modifying"], ["nested"]))
def test_rates_of_zero_are_the_frozen_model(x64, case):
    """The same weights read by the same architecture with no period at all; levels of a nested CMS are then equal."""
    made = model(config(**CASES[case] | {"rate": 0.0}))
    net, weights = differentiable(made)
    weights = without_rates(weights)
    variant = "sequential" if case == "nested" else made.config.cms.variant
    frozen_net, _ = differentiable(model(config(**CASES[case] | {"variant": variant, "periods": ()})))
    given = nnx.to_pure_dict(weights)
    levels = given["blocks"]["cms"]
    shared = {k: w for k, w in levels["level1"].items() if k in MATRICES} if case == "nested" else {}
    still = lambda level: {k: w for k, w in (shared | level).items() if k != "rate"}
    given["blocks"]["cms"] = {k: still(v) if k != "mix" else v for k, v in levels.items()}
    frozen = nnx.State(given)
    text = tokens(2, 19)
    fast = jax.jit(lambda: read(nnx.merge(net, weights), text, 40)[0])()
    np.testing.assert_allclose(fast, jax.jit(lambda: read(nnx.merge(frozen_net, frozen), text, 40)[0])(), rtol=1e-11)


@pytest.mark.parametrize("fields", cases([dict(layers=1), dict(blocks=1)], [dict(layers=1)]), ids=str)
def test_outer_gradients_are_finite_at_a_zero_inner_gradient(x64, fields):
    """With adam inside, and a zero inner gradient (the head is zero), outer gradients are finite."""
    made = model(config(periods=(8, 4), rule="adam", tie_embeddings=False, **fields))
    text, (net, weights) = tokens(1, 20), differentiable(made)
    weights["head"] = jax.tree.map(jnp.zeros_like, weights["head"])
    loss = lambda w: optax.softmax_cross_entropy_with_integer_labels(
        read(nnx.merge(net, w), text, 40)[0][:, :-1], text[:, 1:]
    ).mean()
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(jax.jit(jax.grad(loss))(weights)))


@pytest.mark.slow
def test_any_optax_rule_for_any_level(x64):
    """One rule a level; rate 1 and sgd are the config's own rule without a clip."""
    settings = config(periods=(8, 4), blocks=1, clip=0.0)
    text = tokens(1, 20)
    own = jax.jit(lambda: read(model(settings), text, 40)[0])()
    given = jax.jit(lambda: read(model(settings, rule=[optax.sgd(1.0), optax.sgd(1.0)]), text, 40)[0])()
    np.testing.assert_allclose(given, own, rtol=1e-12)
    other = jax.jit(lambda: read(model(settings, rule=[optax.sgd(1.0), optax.lion(0.1)]), text, 40)[0])()
    assert not np.allclose(other, own)
    with pytest.raises(UserError, match="3 inner rules for the 2 levels"):
        model(settings, rule=[optax.sgd(1.0)] * 3)
