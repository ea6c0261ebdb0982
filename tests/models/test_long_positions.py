"""A model goes on where an int32 ends: the CMS closes its segments, chunks and documents keep their grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rare import cases
from tiny import config, differentiable, model, tokens

from nested_jax import CMSConfig, ModelConfig
from nested_jax.errors import UserError

CASES = {
    "learning": dict(mixer="gated-delta", periods=(12, 6), chunk=3, blocks=1),
    "self-modifying": dict(mixer="self-modifying", periods=(12, 6), chunk=3, blocks=1),
    "attention": dict(mixer="attention", periods=(8, 4)),
    "titans": dict(mixer="titans", periods=(8, 4), variant="nested"),
}
FAR = (2**20, 2**24, 2**31 - 1)


KNOWN = [(name, False) for name in CASES] + [("learning", True)]


@pytest.mark.parametrize("case", cases(KNOWN, KNOWN[-1:]), ids=str)
def test_reading_goes_on(x64, case):
    """From 2^20, 2^24 and just below 2^31 tokens on, across the end of a segment: logits, state and gradients."""
    name, known = case  # the position, while tracing
    made, text = model(config(**CASES[name])), tokens(2, 18)
    net, weights = differentiable(made)
    grid = made.config.alignment
    _, state = jax.jit(lambda: made(text[:, :10], made.init_state(2, max_length=18)))()

    def read(weights, position):
        at = state._replace(position=np.int32(position) if known else position)
        logits, after = nnx.merge(net, weights)(text[:, 10:], at)
        return jnp.sin(logits).sum(), (logits, after._replace(position=after.position % grid))

    call = jax.jit(jax.grad(read, has_aux=True), static_argnums=1 if known else ())
    near = call(weights, 10)
    for far in FAR[2:] if known else FAR:
        beyond = call(weights, 10 + (far - 10) // grid * grid)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), beyond, near)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(near[0]))


def test_what_positions_cannot_count_is_refused():
    with pytest.raises(UserError, match="have 1099510579200 as least common multiple: give numbers"):
        ModelConfig(chunk=2**20 - 1, cms=CMSConfig(hidden=(4,), periods=(2**20,)))
