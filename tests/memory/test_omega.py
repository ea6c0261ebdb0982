"""The Omega rule with a window of one token is the recurrence of all memories; its largest rate does not overshoot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rare import cases

from nested_jax.memory import objective
from nested_jax.memory.omega import OmegaMemory
from nested_jax.memory.projections import project_in
from nested_jax.memory.recurrence import Gates, MemoryState, chunked
from nested_jax.memory.stream import Chunk, convolve, project_out
from nested_jax.numerics import l2norm

D, H, C = 8, 2, 4


def weights_of(layer, start):
    """Initial weights in float64, but for a random start of that size."""
    weights = jax.tree.map(lambda w: w.astype(jnp.float64), layer.init_weights(jax.random.key(0)))
    return {**weights, "start": start * jax.random.normal(jax.random.key(1), weights["start"].shape, jnp.float64)}


def projected(layer, weights, x, recent=None):
    """What the level reads, (B, H, T, ...)."""
    recent = layer.init_state(weights, 1).recent if recent is None else recent
    return [part.swapaxes(1, 2) for part in project_in(weights, convolve(weights["taps"], recent, x)[1], H)]


def inputs(length):
    return jax.random.normal(jax.random.key(2), (1, length, D), jnp.float64)


@pytest.mark.parametrize(
    ("layer", "bias"),
    [
        (OmegaMemory(D, H, "l2", 1, chunk=C), objective.l2()),
        (OmegaMemory(D, H, "lp", 1, chunk=C, power=1.5), objective.lp(1.5)),
        (OmegaMemory(D, H, "huber", 1, chunk=C, threshold=0.5), objective.huber(0.5)),
    ],
    ids=["l2", "lp", "huber"],
)
def test_a_window_of_one_token_is_the_recurrence_of_all_memories(x64, layer, bias):
    """Without an erase, with the objective's errors at every chunk's start."""
    weights, x = weights_of(layer, 0.5), inputs(3 * C)
    q, k, v, rate, retain = projected(layer, weights, x)
    memory, outputs = MemoryState(weights["start"][None]), []
    for start in range(0, 3 * C, C):
        cut = lambda part, start=start: part[:, :, start : start + C]
        errors = bias.error(cut(k) @ memory.weights.swapaxes(-1, -2), l2norm(cut(v)))
        write = 2 / (C + 1) * cut(rate)
        memory, y = jax.jit(chunked)(memory, cut(k), errors, Gates(write, 0 * write, cut(retain)), cut(q))
        outputs.append(y.swapaxes(1, 2))
    state, y = jax.jit(lambda: layer(weights, layer.init_state(weights, 1), x, 0))()
    np.testing.assert_allclose(y, project_out(weights, jnp.concatenate(outputs, 1), x.dtype), rtol=1e-10)
    np.testing.assert_allclose(state.memory.weights, memory.weights, rtol=1e-10)


@pytest.mark.parametrize("window", cases([1, 3], [3]))
def test_what_an_empty_slot_holds_does_not_matter(x64, window):
    """State and reads are those of the chunk without it."""
    layer = OmegaMemory(D, H, "l2", window, chunk=C)
    weights = weights_of(layer, 0.5)
    state, _ = jax.jit(lambda: layer(weights, layer.init_state(weights, 1), inputs(6), 0))()
    tokens = projected(layer, weights, inputs(C), state.recent)
    full = jnp.array([False, False, True, False])  # the memory has read 2 tokens of a chunk
    learn = jax.jit(layer.learn)
    after, y = learn(state.memory, Chunk(tokens, full, None))
    expected, alone = learn(state.memory, Chunk([part[:, :, 2:3] for part in tokens], None, None))
    close = lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-15)
    jax.tree.map(close, (expected, alone), (after, y[:, :, 2:3]))


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("options", [("l2",), ("huber",), ("lp",), ("l2", 3, "polynomial")], ids=str)
def test_a_pair_shown_again_and_again_is_learned_at_the_largest_rate(x64, options, chunk):
    """From chunk to chunk, with nothing forgotten, the error gets smaller; the first chunk moves it by a third or more."""
    layer = OmegaMemory(D, H, *(options if len(options) > 1 else (*options, 1)), chunk=chunk)
    weights, x = weights_of(layer, 0.1), jnp.repeat(inputs(1), 8 * chunk, axis=1)
    weights["gates_bias"] = jnp.full_like(weights["gates_bias"], 30.0)
    _, key, value, *_ = (part[:, :, 0] for part in projected(layer, weights, x[:, :1]))
    state, errors = layer.init_state(weights, 1), []
    call = jax.jit(layer.__call__)
    for i, piece in enumerate(jnp.split(x, 8, axis=1)):
        held = jnp.einsum("bhvk,bhk->bhv", state.memory.weights, layer.lift(key))
        errors.append(held - l2norm(value))
        state, _ = call(weights, state, piece, jnp.int32(i * chunk))
    norms = [jnp.linalg.norm(error, axis=-1) for error in errors]
    for before, after in zip(norms, norms[1:], strict=False):
        assert (after < jnp.maximum(before, 1e-9)).all()
    assert (jnp.linalg.norm(errors[1] - errors[0], axis=-1) > 0.3 * norms[0]).all()
