"""One block's CMS against its equations in NumPy; the inner rule against optax's own transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from models.tiny import cms_forward

from nested_jax import CMSConfig, cms
from nested_jax.cms import chain


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("variant", ["sequential", "independent"])
def test_a_block_is_its_equation(x64, variant, activation):
    config = CMSConfig(hidden=(5, 3), variant=variant, activation=activation)
    weights = cms.init_weights(jax.random.key(0), config, 4)
    noise = iter(jax.random.split(jax.random.key(1), 99))
    weights = jax.tree.map(lambda w: w + 0.3 * jax.random.normal(next(noise), w.shape, jnp.float64), weights)
    x = jax.random.normal(jax.random.key(2), (2, 6, 4), jnp.float64)
    np.testing.assert_allclose(cms.apply(config, weights, (), x), cms_forward(config, weights, np.asarray(x)), rtol=1e-10)


@pytest.mark.parametrize("activation", [chain._gelu, chain._silu])
def test_slopes_are_those_of_finite_differences(x64, activation):
    check_grads(activation, (jnp.linspace(-4.0, 4.0, 17),), order=3, modes=("fwd", "rev"), rtol=1e-4)


@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
def test_the_inner_rule_is_optaxs(x64, rule, clip):
    """Clip by the norm, then the rule, at rate 1: three gradients, larger and smaller than the clip."""
    own = cms.inner_rule(CMSConfig(rule=rule, clip=clip))
    rules = {"sgd": optax.sgd(1.0), "momentum": optax.sgd(1.0, momentum=0.9), "adam": optax.adam(1.0, eps_root=1e-8)}
    theirs = optax.chain(optax.clip_by_global_norm(clip), rules[rule]) if clip else rules[rule]
    weights = {"up": jnp.ones((2, 3)), "down": jnp.ones((3, 2))}
    states = own.init(weights), theirs.init(weights)
    for size in (1.0, 0.01, 0.5):
        gradient = jax.tree.map(lambda w, size=size: size * jnp.arange(1.0, 7.0).reshape(w.shape), weights)
        got, mine = own.update(gradient, states[0], weights)
        expected, other = theirs.update(gradient, states[1], weights)
        states = mine, other
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), got, expected)
