"""Every family on a mesh: loss and gradients of one device; weights, memories and state are in parts."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rare import cases

from nested_jax import preset
from nested_jax.data import Batch
from nested_jax.models.language_model import apply, init_state, init_weights
from nested_jax.numerics import nats
from nested_jax.parallel import rules
from nested_jax.parallel.mesh import MeshShape, make_mesh
from nested_jax.train.config import TrainConfig
from nested_jax.train.optimizer import optimizer
from nested_jax.train.state import init_train_state, places_of
from nested_jax.train.step import cross_entropy, train_step

FAMILIES = ("hope", "hope-attention", "transformer", "titans", "omega", "gated-delta", "delta", "linear")
MESHES = {
    "8 rows": MeshShape(data=8),
    "2x2x2": MeshShape(data=2, fsdp=2, tensor=2),
    "1x4x2": MeshShape(fsdp=4, tensor=2),
    "sequence": MeshShape(fsdp=2, tensor=2, sequence=2),
}
DEFAULT = [("hope", "2x2x2"), ("transformer", "sequence")]
B, T = 8, 64


def small(family):
    """A model of every part of its family; a CMS that learns in context has two levels."""
    whole = preset(f"tiny-{family}")
    sizes = {"hidden": (16,) * len(whole.cms.hidden), "periods": (32, 16) if whole.cms.periods else ()}
    changes = {"layers": 2, "width": 16, "vocabulary": 32, "chunk": 8, "memory_hidden": 4}
    return dataclasses.replace(whole, **changes, cms=dataclasses.replace(whole.cms, **sizes))


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(32, size=(B, T + 1)).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], rng.random((B, T)), np.zeros((B, T), bool))


def as_double(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, tree)


@pytest.mark.parametrize("case", cases([(f, m) for f in FAMILIES for m in MESHES], DEFAULT), ids=" on ".join)
def test_a_mesh_changes_no_number(x64, case):
    """With rows on (data, fsdp) and heads on tensor XLA's partitioner swaps rows of inner gradients, so fsdp comes first."""
    family, name = case
    model, mesh, given = small(family), make_mesh(MESHES[name]), batch()
    weights = as_double(jax.jit(partial(init_weights, model))(jax.random.key(0)))

    def loss(weights, given):
        logits, _ = apply(model, weights, given.tokens, init_state(model, weights, B, max_length=T), multiple=T)
        return (nats(logits, given.targets) * given.weights).mean()

    expected = jax.jit(jax.value_and_grad(loss))(weights, given)
    places, rows = rules.weight_shardings(mesh, weights), rules.row_sharding(mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(loss), in_shardings=(places, rows), out_shardings=(None, places))
        got = compiled(weights, given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.abs(b).max()), got, expected)
