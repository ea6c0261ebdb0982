"""CMS that learns in context against a plain loop of `jax.grad` per segment; splits, causality, rates of zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import config, differentiable, model, read, tokens

from nested_jax import cms
from nested_jax.models.in_context import definition

CASES = {
    "two levels": dict(periods=(8, 4)),
    "last block": dict(periods=(8, 4), blocks=1),
    "one of two levels": dict(periods=(4,), activation="swiglu"),
    "three levels": dict(hidden=(5, 4, 3), periods=(16, 8, 4)),
    "nested": dict(hidden=(4, 4, 4), periods=(16, 8, 4), variant="nested"),
    "independent": dict(periods=(8, 8), variant="independent", rule="momentum"),
    "first order, adam": dict(periods=(8, 4), meta_gradient="first-order", rule="adam"),
    "self-modifying": dict(periods=(8, 4), mixer="self-modifying"),
    "shorter than a chunk": dict(periods=(6, 2), mixer="titans", clip=0.0),
    "shared by the batch": dict(periods=(8, 4), scope="batch"),
}
SLOW = {"three levels", "nested"}


def slow_read(made, tokens):
    weights = made._weights
    if made.config.cms.scope == "batch":
        return definition(made.config, weights, made._rules, tokens)
    return jnp.concatenate([definition(made.config, weights, made._rules, row[None]) for row in tokens])


@pytest.mark.parametrize("case", CASES)
def test_equals_a_loop_of_gradients(x64, case):
    """Logits, and the outer gradient of every weight: the starts of all levels, their rates, the sequence layers."""
    made, text = model(config(**CASES[case])), tokens(2)
    net, weights = differentiable(made)

    def outer(read):
        loss = lambda w: optax.softmax_cross_entropy_with_integer_labels(read(nnx.merge(net, w))[:, :-1], text[:, 1:]).mean()
        return jax.jit(jax.value_and_grad(loss))(weights)

    fast, slow = outer(lambda made: read(made, text, 40)[0]), outer(lambda made: slow_read(made, text))
    np.testing.assert_allclose(fast[0], slow[0], rtol=1e-12)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(slow[1]), jax.tree.leaves(fast[1]), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-8, atol=1e-11, err_msg=jax.tree_util.keystr(path))
    if made.config.cms.meta_gradient == "full":
        for level in range(made.config.cms.frozen, len(made.config.cms.hidden)):
            assert jnp.abs(fast[1]["blocks"]["cms"][f"level{level + 1}"]["rate"][...][-1]) > 0
