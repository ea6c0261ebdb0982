"""Memories' kernels, interpreted, against the form that XLA compiles, which the token loops are tests of."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax.memory import kernels as choice
from nested_jax.memory.deep import Rule
from nested_jax.memory.linear import LinearMemory
from nested_jax.memory.pallas import recurrence, scan, tiles
from nested_jax.memory.self_modifying import SelfModifyingTitans
from nested_jax.memory.titans import Titans
from nested_jax.parallel.plan import devices_of

D, C = 8, 8
EXACT = Rule(errors="exact", step="normalised", features="boundary")
PAPER = Rule("memory", "raw", retention="zero", read="boundary", surprise=jnp.inf, damped=False)
HOPE = dict(momentum=False, rates="own", rule=EXACT)


def hope(heads=1, *, width=D, hidden=4, chunk=C, **options):
    return SelfModifyingTitans(width, heads, hidden, chunk=chunk, **options)


LAYERS = {
    "hope": hope(**HOPE),
    "hope, two heads": hope(2, **HOPE),
    "hope, errors of the boundary": hope(),
    "hope, by the paper": hope(rule=PAPER, max_rate=0.02),
    "hope, exact errors and momentum": hope(rule=dataclasses.replace(EXACT, features="token")),
    "hope, queries alone": hope(generated=("queries",), targets="rms", rule=Rule("none", read="before", retention="none")),
    "titans": Titans(D, 1, 4, chunk=C),
    "titans, two heads": Titans(D, 2, 4, False, chunk=C, rule=EXACT, values="raw"),
    "linear attention": LinearMemory(D, 1, "linear", gated=False, chunk=C),
    "linear": LinearMemory(D, 1, "linear", chunk=C),
    "delta": LinearMemory(D, 2, "delta", chunk=C, values="unit"),
    "gated delta, rates to 2": LinearMemory(D, 1, "gated-delta", chunk=C, max_rate=2.0),
}


def weights_of(layer, dtype):
    keys = iter(jax.random.split(jax.random.key(1), 99))
    jitter = lambda w: (w + 0.2 * jax.random.normal(next(keys), w.shape)).astype(dtype)
    return jax.tree.map(jitter, layer.init_weights(jax.random.key(0)))


def kernels(layer):
    return dataclasses.replace(layer, implementation="pallas")


def tokens(length, dtype, batch=2):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, length, D)), dtype)


def result(layer, reset=None):
    """Outputs, states and the gradients of a function of both, jitted."""

    def loss(weights, x, start):
        state = layer.init_state(weights, len(x))
        scaled = lambda leaf: leaf * (1 + start) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        state, y = layer(weights, jax.tree.map(scaled, state), x, 0, reset=reset)
        leaves = [y, *(leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating))]
        return sum(jnp.sum(jnp.sin(leaf + jnp.arange(leaf.size).reshape(leaf.shape))) for leaf in leaves), (state, y)

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))


def assert_close(got, expected, rtol):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all(), path
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(np.abs(b).max(), 1e-30), err_msg=str(path))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("hope", "delta") else pytest.mark.slow) for name in LAYERS]
)
def test_kernels_are_the_same_memory(x64, name):
    """Outputs, states, and gradients by weights, tokens and the first state: whole chunks, a rest, a document's start."""
    layer = LAYERS[name]
    weights, x = weights_of(layer, jnp.float64), tokens(3 * C + 3, jnp.float64)
    reset = jnp.zeros(x.shape[:2], bool).at[0, C].set(True)
    got, expected = (result(form, reset)(weights, x, jnp.asarray(0.1)) for form in (kernels(layer), layer))
    assert_close(got, expected, 1e-11)


@pytest.mark.parametrize("name", ["delta", pytest.param("hope", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "pieces",
    [(3, 2 * C, C), *(pytest.param(p, marks=pytest.mark.slow) for p in ((2 * C, C + 3), (C, 1, 2 * C + 2)))],
    ids=str,
)
def test_any_split(x64, name, pieces):
    """Pieces on the grid by kernels, others by XLA's form, from states of either."""
    layer = LAYERS[name]
    weights, x = weights_of(layer, jnp.float64), tokens(sum(pieces), jnp.float64)
    whole = layer(weights, layer.init_state(weights, 2), x, 0)
    state, position, outputs = layer.init_state(weights, 2), 0, []
    for length in pieces:
        part = x[:, position : position + length]
        state, y = kernels(layer)(weights, state, part, position)
        position += length
        outputs.append(y)
    assert_close((state, jnp.concatenate(outputs, axis=1)), whole, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gated delta, rates to 2"])
def test_other_derivatives_are_those_of_the_twin(x64, name):
    """Forward mode, forward over reverse, reverse over reverse, and all of it for several streams at once."""
    layer = LAYERS[name]
    weights, x = weights_of(layer, jnp.float64), tokens(2 * C, jnp.float64, batch=1)
    way = jax.random.normal(jax.random.key(3), x.shape, jnp.float64)
    several = jnp.stack([x, way])

    def every(layer):
        def loss(weights, x):
            state, y = layer(weights, layer.init_state(weights, 1), x, 0)
            return jnp.sum(jnp.sin(y + jnp.arange(y.size).reshape(y.shape)))

        gradient = jax.grad(loss, (0, 1))
        return jax.jit(
            lambda weights, x: (
                jax.jvp(loss, (weights, x), (weights, way)),
                jax.jvp(gradient, (weights, x), (weights, way)),
                jax.grad(lambda weights, x: jnp.vdot(gradient(weights, x)[1], way), (0, 1))(weights, x),
                jax.vmap(gradient, (None, 0))(weights, several),
                jax.grad(lambda weights: jnp.sum(jnp.sin(jax.vmap(loss, (None, 0))(weights, several))))(weights),
                jax.vmap(lambda way: jax.jvp(loss, (weights, x), (weights, way)))(several),
            )
        )

    assert_close(every(kernels(layer))(weights, x), every(layer)(weights, x), 1e-10)


@pytest.mark.slow
def test_products_of_float32_are_in_full():
    """Within 1e-5 of the form that XLA compiles, tokens of float32."""
    for name in ("gated delta, rates to 2", "titans, two heads"):
        layer = LAYERS[name]
        weights, x = weights_of(layer, jnp.float32), tokens(2 * C, jnp.float32)
        got, expected = (result(form)(weights, x, jnp.asarray(0.1)) for form in (kernels(layer), layer))
        assert_close(got, expected, 1e-5)


def test_products_on_a_tpu():
    """A CPU computes all products in full: what a TPU is asked for, in derivatives too."""
    square = lambda a, b, fast: tiles.dot(a, b, 1, 0, fast).sum()
    for fast in (False, True):
        text = str(jax.make_jaxpr(jax.grad(partial(square, fast=fast), (0, 1)))(jnp.ones((2, 3)), jnp.ones((3, 4))))
        assert text.count("dot_general[") >= 2 and text.count("HIGHEST") == (0 if fast else 2 * text.count("dot_general["))
        assert ("bf16[3,4]" in text) == fast


@pytest.mark.slow
def test_heads_of_several_programs(x64, monkeypatch):
    """Each reads its own head's tokens, weights and states."""
    monkeypatch.setattr(scan, "heads_at_once", lambda *_: 1)
    layer = LAYERS["hope, two heads"]
    weights, x = weights_of(layer, jnp.float64), tokens(2 * C, jnp.float64)
    reset = jnp.zeros(x.shape[:2], bool).at[1, C].set(True)
    got, expected = (result(form, reset)(weights, x, jnp.asarray(0.1)) for form in (kernels(layer), layer))
    assert_close(got, expected, 1e-11)


@pytest.mark.parametrize(
    ("name", "inverted"),
    [
        ("hope", [6, 6, 4]),
        ("titans", []),
        ("titans, two heads", [2, 2, 1]),
        ("linear", []),
        ("delta", [1, 1, 1]),
        ("gated delta, rates to 2", [1, 1]),
    ],
)
def test_inverses_that_the_forward_kernel_keeps(monkeypatch, name, inverted):
    """Those no larger than the map, and of strengths that turn signs, are not made again by the backward kernel, whose
    program comes after that of shapes alone and the forward kernel's."""
    layer, found = kernels(LAYERS[name]), []
    counted = lambda lowers, *options: found.append(len(lowers)) or tiles.inverses(lowers, *options)
    monkeypatch.setattr(recurrence, "inverses", counted)
    jax.make_jaxpr(result(layer))(weights_of(layer, jnp.float32), tokens(2 * C, jnp.float32), jnp.asarray(0.1))
    assert found == inverted


@pytest.mark.parametrize(("strength", "turns", "bound"), [(1.0, False, 5e-4), (2.0, True, 5e-2)])
def test_inverses_of_bfloat16_products(strength, turns, bound):
    """Of keys that are equal, nearly so, and random, kept for long: the systems of a chunk of 128."""
    rng, (i, j) = np.random.default_rng(0), np.indices((128, 128))
    for spread, keep in itertools.product((0.0, 0.05, 10.0), (0.99, 1.0)):
        keys = 1 + spread * rng.normal(size=(128, 32))
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
        lower = np.where(i > j, strength * (1 + keep) / 2 * keep ** np.maximum(i - 1.0 - j, 0) * (keys @ keys.T), 0)
        (found,) = tiles.inverses([jnp.asarray(lower, jnp.float32)], [turns], True)
        assert np.abs(found - np.linalg.inv(np.eye(128) + lower)).max() < bound, (spread, keep)


@pytest.mark.slow
def test_a_repeated_key_does_not_grow_at_rates_of_2():
    """Rounded keys are longer than 1: with their own length what is held stays as large."""
    layer = kernels(LinearMemory(32, 1, "delta", chunk=64, max_rate=2.0))
    read = jax.jit(lambda weights, state, x: layer(weights, state, x, 0)[0])
    for seed in range(3):
        weights = layer.init_weights(jax.random.key(seed)) | {"gates_bias": jnp.full(1, 30.0)}
        x = jnp.asarray(np.random.default_rng(seed).normal(size=(1, 1, 32)).repeat(1024, axis=1), jnp.bfloat16)
        state, largest = layer.init_state(weights, 1), []
        for _ in range(8):
            state = read(weights, state, x)
            largest.append(float(jnp.abs(state.memory.weights).max()))
        assert max(largest) < 2 * max(largest[:2]) + 1, seed


def errors(layer, weights, x, expected):
    """Largest relative distance of outputs and states from those of float64."""
    state, y = jax.jit(lambda weights, x: layer(weights, layer.init_state(weights, len(x)), x, 0))(weights, x)
    leaves = jax.tree.leaves((y, state.memory))
    distance = lambda a, b: np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
    return max(distance(a, b) for a, b in zip(leaves, expected, strict=True) if b.ndim)


@pytest.mark.parametrize("keys", ["random", "equal", "nearly equal"])
def test_bfloat16_tokens_are_read_within_two_per_cent(x64, keys):
    """Outputs and states at erase strengths of 1, also where a chunk's keys are equal, and its system worst."""
    layer = LinearMemory(32, 1, "gated-delta", chunk=64)
    weights = layer.init_weights(jax.random.key(0))
    weights = weights | {"gates_bias": jnp.array([8.0, 9.0])}
    draws = np.random.default_rng(0).normal(size=(1, 128, 32))
    x = {"random": draws, "equal": draws[:, :1] + 0 * draws, "nearly equal": draws[:, :1] + 0.01 * draws}[keys]
    x = jnp.asarray(x, jnp.bfloat16)
    wide = jax.tree.map(lambda w: w.astype(jnp.float64), weights)
    state, y = layer(wide, layer.init_state(wide, 1), x.astype(jnp.float64), 0)
    expected = list(map(np.asarray, jax.tree.leaves((y, state.memory))))
    single = jax.tree.map(lambda w: w.astype(jnp.float32), weights)
    assert errors(kernels(layer), single, x, expected) < 0.02


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (LinearMemory(256, 2, "oja"), "Oja's rule"),
        (LinearMemory(256, 2, "delta", implementation="xla"), "implementation is xla"),
        (LinearMemory(256, 2, "delta", checkpoint="sqrt"), "checkpoint 'sqrt' keeps fewer states than kernels do"),
        (LinearMemory(256, 2, "delta", chunk=24), "chunk 24 is no multiple of 16"),
        (LinearMemory(256, 2, "delta", chunk=128), "64 tokens are no chunk of 128"),
        (LinearMemory(12, 3, "delta", chunk=16), "heads of 4 are narrower than 8"),
        (hope(25, width=1600, hidden=64, chunk=16), "25 heads of 64 together would fill lanes: too many"),
        (hope(2, width=256, hidden=1024, chunk=16), "its states and chunks need"),
        (LinearMemory(96, 2, "delta", chunk=16), None),
        (LinearMemory(144, 3, "delta", chunk=16), None),
        (hope(projection_chunk=2 * C), "projection_chunk 16 is not chunk 8"),
        (Titans(256, 2, 12, chunk=16), "hidden width 12 is no multiple of 8"),
        (Titans(256, 2, 16, chunk=16), None),
    ],
    ids=str,
)
def test_what_reads_a_layer_on_a_tpu(monkeypatch, layer, why):
    monkeypatch.setattr(choice, "tpu_kind", lambda: "TPU v5 lite")
    form = choice.kernel_of(layer, (2, 64, layer.width), jnp.bfloat16)
    assert why in form if why else not isinstance(form, str), form
    assert "float64" in choice.kernel_of(LAYERS["hope"], (2, 64, D), jnp.float64)
    monkeypatch.setattr(choice, "tpu_kind", lambda: "TPU v4")
    assert (
        choice.kernel_of(LinearMemory(256, 2, chunk=16), (2, 64, 256), jnp.bfloat16) == "a TPU v4 has too little fast memory"
    )


def test_without_a_tpu_xla_reads():
    assert choice.kernel_of(LAYERS["hope"], (2, 64, D), jnp.float32) == "there is no TPU"


@pytest.mark.parametrize(
    ("heads", "width", "maps", "together"),
    [(6, 128, 6, 1), (12, 64, 1, 6), (12, 64, 2, 4), (3, 64, 1, 3), (16, 96, 6, 4), (8, 128, 1, 8)],
)
def test_heads_of_a_program_fill_lanes_and_registers(heads, width, maps, together):
    assert choice.heads_at_once(heads, width, maps) == together


@pytest.mark.slow
def test_kernels_are_compiled_for_tpus_inside_shard_map():
    """With JAX's check of what is the same on all devices; rows have their own kernels, forward and backward."""
    pytest.importorskip("libtpu", reason='compiles for TPUs: pip install "nested-jax[tpu]"')
    layer = SelfModifyingTitans(256, 2, 32, chunk=64, **HOPE)
    mesh = jax.sharding.Mesh(np.array(devices_of("v5e:2x2")[:2]), ("rows",))
    rows, weights = jax.P("rows"), jax.eval_shape(layer.init_weights, jax.random.key(0))

    def loss(weights, x, reset):
        _, y = layer(weights, layer.init_state(weights, len(x)), x, 0, reset=reset)
        return jnp.square(y.astype(jnp.float32)).sum()

    step = jax.shard_map(jax.grad(loss, (0, 1)), mesh=mesh, in_specs=(jax.P(), rows, rows), out_specs=(jax.P(), rows))
    x, reset = jax.ShapeDtypeStruct((2, 128, 256), jnp.bfloat16), jax.ShapeDtypeStruct((2, 128), bool)
    with jax.set_mesh(mesh):
        text = jax.jit(step).lower(weights, x, reset).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
