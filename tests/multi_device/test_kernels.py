"""Memories' kernels, interpreted, on a mesh and inside a user's `jax.shard_map`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory.deep import Rule
from nested_jax.memory.kernels import kernel_of
from nested_jax.memory.linear import LinearMemory
from nested_jax.memory.self_modifying import SelfModifyingTitans
from nested_jax.parallel.mesh import MeshShape, make_mesh

B, T, D = 4, 16, 8
EXACT = Rule(errors="exact", step="normalised", features="boundary")
LAYERS = {
    "gated delta": LinearMemory(D, 2, "gated-delta", chunk=8, implementation="pallas"),
    "hope": SelfModifyingTitans(
        D, 2, 4, momentum=False, rates="own", rule=EXACT, chunk=8, implementation="pallas"
    ),
}  # fmt: skip


def given(layer):
    weights = jax.tree.map(lambda w: w.astype(jnp.float64) + 0.1, layer.init_weights(jax.random.key(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)))
    return weights, x, jnp.zeros((B, T), bool).at[2, 8].set(True)


def result(layer):
    def loss(weights, x, reset):
        state, y = layer(weights, layer.init_state(weights, len(x)), x, 0, reset=reset)
        return jnp.sum(jnp.sin(y + jnp.arange(D)[None, None])), y

    return jax.grad(loss, (0, 1), has_aux=True)


def assert_close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), got, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_every_device_of_a_mesh_has_its_rows_and_heads(x64, name):
    layer = LAYERS[name]
    arguments = given(layer)
    expected = jax.jit(result(dataclasses.replace(layer, implementation="xla")))(*arguments)
    mesh = make_mesh(MeshShape(data=2, tensor=2))
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, jax.P(("fsdp", "data")))
        program = jax.jit(result(layer), in_shardings=(jax.NamedSharding(mesh, jax.P()), rows, rows))
        assert not isinstance(kernel_of(layer, (B, T, D), jnp.float64), str)
        assert "pallas_call" in str(jax.make_jaxpr(result(layer))(*arguments)).partition("shard_map")[2]
        got = program(*arguments)
    assert_close(got, expected)


def test_interpreted_kernels_are_not_used_inside_shard_map():
    layer, seen = LAYERS["gated delta"], []
    mesh = jax.make_mesh((4,), ("rows",))

    def local(x):
        seen.append(kernel_of(layer, x.shape, x.dtype))
        return x

    jax.shard_map(local, mesh=mesh, in_specs=None, out_specs=jax.P("rows"))(jnp.ones((B, T, D)))
    assert "jax.shard_map" in seen[0]
