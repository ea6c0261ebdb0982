"""Streams of memories that lie along the mesh's sequence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory import attention, splash
from nested_jax.memory.attention import Attention
from nested_jax.memory.linear import LinearMemory
from nested_jax.memory.stream import convolve
from nested_jax.parallel import hlo
from nested_jax.parallel.flops import flops
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


@pytest.mark.parametrize(
    "shape, T, window, kernel",
    [
        pytest.param(MeshShape(sequence=8), 1024, None, False, marks=pytest.mark.slow),
        pytest.param(MeshShape(data=2, tensor=2, sequence=2), 1024, 300, False, marks=pytest.mark.slow),
        (MeshShape(fsdp=2, sequence=4), 1280, 100, False),  # groups of 160, parts of 40
        (MeshShape(data=2, tensor=2, sequence=2), 512, None, True),
        pytest.param(MeshShape(fsdp=4, sequence=2), 1024, 300, True, marks=pytest.mark.slow),  # 512 keys, 256 queries
    ],
    ids=str,
)
def test_each_device_has_its_part_of_the_queries(monkeypatch, shape, T, window, kernel):
    """Of attention, in documents that start anywhere, and of a TPU's kernel: values and gradients, and keys, values and
    queries alone are sent."""
    B, layer, calls = 4, Attention(64, 4, window), []
    rng, weights = np.random.default_rng(0), layer.init_weights(jax.random.key(0))
    x = jnp.asarray(rng.normal(size=(B, T, 64)), jnp.float32)
    reset = jnp.asarray(rng.random((B, T)) < 0.005)

    def loss(weights, x, reset):
        y = layer(weights, layer.init_state(weights, B, T), x, 0, reset=reset)[1]
        return jnp.square(y).mean(), y

    compute = jax.value_and_grad(loss, (0, 1), has_aux=True)
    expected, mesh = jax.jit(compute)(weights, x, reset), make_mesh(shape)
    if kernel:

        def read(*given):
            calls.append(given)
            return splash.splash(*given, interpret=True)

        monkeypatch.setattr(attention, "splash", read)
        monkeypatch.setattr(splash, "on_tpu", lambda: True)
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, jax.P(("fsdp", "data"), "sequence"))
        compute = jax.value_and_grad(loss, (0, 1), has_aux=True)  # traced anew
        program = jax.jit(compute, in_shardings=(None, rows, rows)).lower(weights, x, reset).compile()
        got = program(weights, x, reset)
        if not kernel:  # without `jit` too
            np.testing.assert_allclose(loss(weights, x, reset)[1], expected[0][1], rtol=1e-4, atol=1e-5)
    assert len(calls) == kernel
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()), got, expected)
    sent = [one for one in hlo.collectives(hlo.parse(program.as_text()), shape) if "f32" in one.shape]
    moved = [one for one in sent if one.kind != "all-reduce"]
    assert {one.kind for one in moved} == {"all-gather", "reduce-scatter", "all-to-all"}
    assert {one.axes for one in moved} == {("sequence",)} and len(moved) <= 8


@pytest.mark.parametrize("tokens", [2, 4, 6])
def test_fewer_tokens_than_taps_on_a_device(tokens):
    """Of the short convolution, whose first tokens read what the call before left."""
    rng = np.random.default_rng(0)
    given = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 8), (2, 3, 8), (2, tokens, 8))]
    expected = convolve(*given)
    mesh = make_mesh(MeshShape(sequence=2))
    with jax.set_mesh(mesh):
        places = (None, None, jax.NamedSharding(mesh, jax.P(None, "sequence")))
        got = jax.jit(convolve, in_shardings=places)(*given)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)


def test_products_of_all_devices_are_counted(weights):
    """Under a mesh as without one: what a device does of a stream, and a kernel's inside, are not all."""
    x = jax.ShapeDtypeStruct((B, T, 64), jnp.float32)
    expected = flops(jax.grad(lambda *given: loss(*given)[0]), weights, x)
    with jax.set_mesh(make_mesh(MeshShape(sequence=8))):
        assert "shard_map" in str(jax.make_jaxpr(lambda *given: loss(*given)[0])(weights, x))
        assert flops(jax.grad(lambda *given: loss(*given)[0]), weights, x) == expected
