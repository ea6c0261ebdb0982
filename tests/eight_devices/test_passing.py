"""Streams of memories that lie along the mesh's sequence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory.linear import LinearMemory
from nested_jax.parallel import hlo
from nested_jax.parallel.mesh import MeshShape, make_mesh

B, T, LAYER = 8, 512, LinearMemory(64, 4, "gated-delta", chunk=8)


def loss(weights, x, reset=None):
    state, y = LAYER(weights, LAYER.init_state(weights, B), x, 0, reset=reset)
    return jnp.square(y).sum() + sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(state.memory.weights)), state


def compiled(shape, *given):
    """The loss, state and gradients on a mesh, and the program."""
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, jax.P(("fsdp", "data"), "sequence"))
        places = (jax.NamedSharding(mesh, jax.P()), rows, *(rows for _ in given[2:]))
        program = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), in_shardings=places).lower(*given).compile()
        return program(*given), program


@pytest.fixture
def weights():
    return LAYER.init_weights(jax.random.key(0))


@pytest.mark.parametrize(
    "shape",
    [MeshShape(sequence=8), MeshShape(data=4, sequence=2), MeshShape(data=2, tensor=2, sequence=2), MeshShape(fsdp=8)],
    ids=str,
)
def test_documents_and_states_pass_from_device_to_device(x64, weights, shape):
    """One row a device in a group, several groups, and one; documents start in any part: values, states, gradients."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, 64)))
    reset = jnp.zeros((B, T), bool).at[:, 0].set(True).at[2, 64].set(True).at[5, 8 * np.arange(3, 60, 7)].set(True)
    expected = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(weights, x, reset)
    got, _ = compiled(shape, weights, x, reset)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), got, expected)


def test_a_device_has_its_part_of_the_stream(weights):
    """Along sequence memory falls as along rows, a device's loop turns for its own chunks, and states alone are sent on."""
    x = jnp.ones((B, T, 64))
    _, alone = compiled(MeshShape(data=2), weights, x)
    _, parts = compiled(MeshShape(data=2, sequence=4), weights, x)
    size = lambda program: program.memory_analysis().temp_size_in_bytes
    assert size(parts) < size(alone) / 2
    program = hlo.parse(parts.as_text())
    turns = {hlo.trips(program, line) for lines in program.computations.values() for line in lines if line.opcode == "while"}
    assert T // 8 // 4 in turns and T // 8 not in turns
    sent = [one for one in hlo.collectives(program, MeshShape(data=2, sequence=4)) if "sequence" in one.axes]
    often = [one for one in sent if one.runs > 1]
    assert {(one.kind, one.shape, one.runs) for one in often} == {("collective-permute", "f32[1,4,16,16]", 7)}
    assert "all-to-all" not in {one.kind for one in sent}  # of the short convolution neighbours need three tokens
