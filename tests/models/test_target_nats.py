"""The loss of a model's targets, with some of the logits in memory at once."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
from rare import cases

from nested_jax import CMSConfig, ModelConfig
from nested_jax.models.language_model import apply, init_state, init_weights, target_nats


@pytest.mark.parametrize("length", cases([12, 7], [7]))
def test_nats_of_targets_need_few_logits_at_once(x64, monkeypatch, length):
    """Values and gradients of parts of the tokens, the memory of these; seven tokens have seven parts."""
    config = ModelConfig(vocabulary=50, width=8, layers=1, heads=2, mixer="linear", chunk=4, cms=CMSConfig(hidden=(8,)))
    weights = jax.tree.map(lambda w: w.astype(float), init_weights(config, jax.random.key(0)))
    tokens, targets = jax.random.randint(jax.random.key(1), (2, 2, length), 0, 50)

    def whole(weights):
        logits = apply(config, weights, tokens, init_state(config, weights, 2))[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    def parts(weights):
        return target_nats(config, weights, tokens, targets, init_state(config, weights, 2))[0]

    def logits_outside_loops():
        equations = jax.make_jaxpr(lambda weights: parts(weights))(weights).eqns
        return {v.aval.shape for equation in equations for v in equation.outvars if v.aval.shape[2:] == (50,)}

    assert logits_outside_loops() == {(2, length, 50)}
    monkeypatch.setattr("nested_jax.models.language_model._LOGITS", 2 * 50 * 4)
    assert not logits_outside_loops()
    assert_same = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    assert_same(parts(weights), whole(weights))
    jax.tree.map(assert_same, *(jax.grad(lambda w, f=f: (f(w) ** 2).sum())(weights) for f in (parts, whole)))
