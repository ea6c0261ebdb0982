"""What every layer built on a parametric memory keeps: definitions, splits, causality, rows, documents, types, bounds."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rare import cases

from nested_jax.errors import UserError
from nested_jax.memory import reference
from nested_jax.memory.deep import Deep, Rule, broadcast_start
from nested_jax.memory.linear import LinearMemory
from nested_jax.memory.omega import OmegaMemory
from nested_jax.memory.projections import project_in
from nested_jax.memory.self_modifying import SelfModifyingTitans
from nested_jax.memory.stream import convolve
from nested_jax.memory.titans import Titans

D, H, F = 8, 2, 3
T = 13  # a multiple of no chunk but 1
BOUNDARY = 8  # of every chunk grid
EXACT = Rule(errors="exact", step="normalised", read="before")
HOPE = Rule(errors="exact", step="normalised", features="boundary")
PAPER = Rule("memory", "raw", retention="zero", read="boundary", surprise=math.inf, damped=False)
LAYERS = {
    "linear": LinearMemory(D, H, "linear", chunk=4),
    "delta": LinearMemory(D, H, "delta", chunk=4),
    "gated-delta": LinearMemory(D, H, "gated-delta", chunk=4),
    "gated-delta-2": LinearMemory(D, H, "gated-delta", 2.0, chunk=4),
    "delta-unit": LinearMemory(D, H, "delta", values="unit", chunk=4),
    "oja": LinearMemory(D, H, "oja", chunk=4),
    "linear-attention": LinearMemory(D, H, "linear", gated=False, chunk=4),
    "lp-4": OmegaMemory(D, H, "lp", 1, chunk=4),
    "lp-1.5-1": OmegaMemory(D, H, "lp", 1, chunk=1, power=1.5),
    "huber-4": OmegaMemory(D, H, "huber", 1, chunk=4, threshold=0.5),
    "omega-4": OmegaMemory(D, H, "l2", 3, "polynomial", chunk=4),
    "omega-2-7": OmegaMemory(D, H, "l2", 7, chunk=2, surprise=0.5),
    "omega-raw-4": OmegaMemory(D, H, "l2", 3, values="raw", chunk=4),
    "titans-1": Titans(D, H, F, chunk=1, momentum=False),
    "titans-4": Titans(D, H, F, chunk=4),
    "titans-exact-4": Titans(D, H, F, chunk=4, rule=Rule(errors="exact", features="boundary", surprise=0.1)),
    "titans-paper-4": Titans(D, H, F, chunk=4, max_rate=0.3, rule=PAPER, values="raw"),
    "titans-undecayed-4": Titans(D, H, F, chunk=4, rule=Rule(damped=False, retention="none", read="before")),
    "self-modifying-4": SelfModifyingTitans(D, H, F, chunk=4),
    "self-modifying-exact-4": SelfModifyingTitans(D, H, F, chunk=4, max_rate=0.9, rule=EXACT),
    "self-modifying-hope-4": SelfModifyingTitans(D, H, F, chunk=4, rates="own", rule=HOPE),
    "self-modifying-4-8": SelfModifyingTitans(D, H, F, chunk=4, projection_chunk=8, momentum=False, rates="own", rule=HOPE),
    "self-modifying-momentum-4-8": SelfModifyingTitans(D, H, F, chunk=4, projection_chunk=8),
    "self-modifying-paper-4-8": SelfModifyingTitans(
        D, H, F, chunk=4, projection_chunk=8, max_rate=0.3, targets="raw", generated=("queries", "rates"), rule=PAPER
    ),
    "self-modifying-fixed-4": SelfModifyingTitans(D, H, F, chunk=4, generated=(), rates="own"),
}
REFERENCES = {
    LinearMemory: reference.linear_memory,
    OmegaMemory: reference.omega_memory,
    Titans: reference.titans,
}  # self-modifying Titans': test_self_modifying.py
RARE = (
    "gated-delta-2",
    "titans-exact-4",
    "self-modifying-exact-4",
    "self-modifying-hope-4",
    "self-modifying-momentum-4-8",
    "lp-4",
    "lp-1.5-1",
    "omega-2-7",
    "titans-1",
    "titans-paper-4",
    "titans-undecayed-4",
    "self-modifying-paper-4-8",
    "self-modifying-fixed-4",
    "omega-raw-4",
    "delta-unit",
    "delta",
    "self-modifying-4",
)
every_layer = pytest.mark.parametrize("name", cases(LAYERS, LAYERS.keys() - set(RARE)))


def random_weights(layer):
    """Float64 weights around the initial ones, with gates that are far from their ends."""
    weights = layer.init_weights(jax.random.key(0))
    leaves, tree = jax.tree.flatten(weights)
    rng = np.random.default_rng(1)
    weights = jax.tree.unflatten(tree, [np.asarray(w, np.float64) + 0.3 * rng.normal(size=w.shape) for w in leaves])
    for name in ("gates_bias", "retention_bias"):
        if name in weights:
            weights[name] = np.linspace(-1.0, 2.0, len(weights[name]))
    return jax.tree.map(jnp.asarray, weights)


def inputs(batch=2, seed=2):
    return jax.random.normal(jax.random.key(seed), (batch, T, D), jnp.float64)


@functools.cache
def jitted(layer):
    """The layer's call with the state traced."""
    return jax.jit(layer.__call__)


@functools.cache
def whole(layer):
    """(weights, x, reset=None) -> (state, y) from a fresh state, position known while tracing."""
    return jax.jit(lambda weights, x, reset=None: layer(weights, layer.init_state(weights, len(x)), x, 0, reset=reset))


@functools.cache
def gradients(layer):
    """(weights, x) -> value and gradients of a read-out of all outputs that no normalisation makes constant."""

    def loss(weights, x):
        return jnp.sum(jnp.sin(layer(weights, layer.init_state(weights, len(x)), x, 0)[1]))

    return jax.jit(jax.value_and_grad(loss, (0, 1)))


def assert_close(got, expected, rtol=1e-12):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=rtol, atol=1e-12, err_msg=jax.tree_util.keystr(path))


RARELY_COMPARED = {"lp-1.5-1", "omega-2-7", "titans-1", "titans-4", "titans-paper-4", "titans-undecayed-4", "delta-unit"}
WITH_REFERENCE = [name for name, layer in LAYERS.items() if type(layer) in REFERENCES]


@pytest.mark.parametrize("name", cases(WITH_REFERENCE, set(WITH_REFERENCE) - RARELY_COMPARED))
def test_layer_is_its_reference(x64, name):
    """Values, and gradients with respect to all weights and inputs."""
    layer = LAYERS[name]
    weights, x = random_weights(layer), inputs(1)
    slow = jax.jit(jax.value_and_grad(lambda w, x: jnp.sum(jnp.sin(REFERENCES[type(layer)](layer, w, x[0]))), (0, 1)))
    assert_close(gradients(layer)(weights, x), slow(weights, x))


@pytest.mark.parametrize("name", cases(LAYERS, LAYERS.keys() - set(RARE) | {"titans-paper-4"}))
@pytest.mark.parametrize("pieces", [(1,) * T, (3, 1, 6, 3)], ids=["tokens", "pieces"])
def test_any_split(x64, name, pieces):
    """Outputs and the final state, wherever pieces begin and end."""
    layer = LAYERS[name]
    weights, x = random_weights(layer), inputs()
    state, parts, start = layer.init_state(weights, 2), [], 0
    for piece in pieces:
        state, y = jitted(layer)(weights, state, x[:, start : start + piece], jnp.int32(start))
        parts.append(y)
        start += piece
    expected = whole(layer)(weights, x)
    assert_close(jnp.concatenate(parts, 1), expected[1])
    assert_close(state, expected[0])


def test_a_split_at_a_known_position(x64):
    """Known while tracing, and off the grid of chunks."""
    layer = LAYERS["titans-4"]
    weights, x = random_weights(layer), inputs()
    state, first = layer(weights, layer.init_state(weights, 2), x[:, :4], 0)
    after, second = jax.jit(lambda w, state, x: layer(w, state, x, 4))(weights, state, x[:, 4:7])
    last, third = jax.jit(lambda w, state, x: layer(w, state, x, 7))(weights, after, x[:, 7:])
    expected = whole(layer)(weights, x)
    assert_close(jnp.concatenate([first, second, third], 1), expected[1])
    assert_close(last, expected[0])


@every_layer
def test_causal_and_rows_apart(x64, name):
    """What comes later changes nothing, and neither does the other row."""
    layer = LAYERS[name]
    weights, x = random_weights(layer), inputs()
    y = whole(layer)(weights, x)[1]
    for cut in (1, 6, 8):
        changed = whole(layer)(weights, x.at[:, cut:].set(inputs(seed=3)[:, cut:]))[1]
        assert_close(changed[:, :cut], y[:, :cut])
        assert jnp.min(jnp.max(jnp.abs(changed - y)[:, cut:], axis=-1)) > 1e-3
    for row in (0, 1):
        assert_close(whole(layer)(weights, x[row : row + 1])[1], y[row : row + 1])


@every_layer
def test_reset_starts_a_document(x64, name):
    """At a chunk boundary of one row: the rest is that of a fresh call. The other row does not notice."""
    layer = LAYERS[name]
    weights, x = random_weights(layer), inputs()
    reset = jnp.zeros((2, T), bool).at[1, BOUNDARY].set(True)
    _, y = whole(layer)(weights, x, reset)
    without = whole(layer)(weights, x)[1]
    fresh = whole(layer)(weights, jnp.roll(x, -BOUNDARY, axis=1))[1]
    assert_close(y[0], without[0])
    assert_close(y[1, :BOUNDARY], without[1, :BOUNDARY])
    assert_close(y[1, BOUNDARY:], fresh[1, : T - BOUNDARY])
    assert jnp.max(jnp.abs(y - without)[1, BOUNDARY]) > 1e-3


def test_a_convolution_is_split_after_a_document_starts(x64):
    """One and two tokens after: the next piece does not see the document before."""
    taps, x = jax.random.normal(jax.random.key(0), (4, 2)), jax.random.normal(jax.random.key(1), (1, 8, 2))
    reset, none = jnp.zeros((1, 8), bool).at[0, 4].set(True), jnp.zeros((1, 3, 2))
    recent, whole = convolve(taps, none, x, reset)
    for cut in (5, 6):
        before, first = convolve(taps, none, x[:, :cut], reset[:, :cut])
        after, second = convolve(taps, before, x[:, cut:], reset[:, cut:])
        assert_close(jnp.concatenate([first, second], 1), whole)
        assert_close(after, recent)


@pytest.mark.parametrize("name", cases(LAYERS, ["gated-delta", "self-modifying-4-8"]))
def test_reset_inside_a_piece_off_the_grid(x64, name):
    """Three tokens, then the rest with its position traced: a document starts in it, on the grid, in one row."""
    layer = LAYERS[name]
    weights, x = random_weights(layer), inputs()
    reset = jnp.zeros((2, T), bool).at[1, BOUNDARY].set(True)
    state, y = whole(layer)(weights, x, reset)
    begun, _ = whole(layer)(weights, x[:, :3])
    after, rest = jitted(layer)(weights, begun, x[:, 3:], jnp.int32(3), reset=reset[:, 3:])
    assert_close(rest, y[:, 3:])
    jax.tree.map(assert_close, after, state)


@every_layer
def test_gradients_from_initial_weights(x64, name):
    """Every learned leaf gets one, every memory's start too; they are finite where the input is zero."""
    layer = LAYERS[name]
    weights = jax.tree.map(lambda w: w.astype(jnp.float64), layer.init_weights(jax.random.key(0)))
    x = inputs(1) if type(layer) in REFERENCES else jnp.tile(inputs(1)[:, :BOUNDARY], (1, 2, 1))  # whole chunks compile fast
    for path, g in jax.tree_util.tree_leaves_with_path(gradients(layer)(weights, x)[1]):
        each = g.swapaxes(0, 1) if g.ndim == 4 else g[None]  # starts of deep memories are (H, M, ., .)
        for i, part in enumerate(each):
            assert jnp.max(jnp.abs(part)) > 1e-8, (jax.tree_util.keystr(path), i)
    for leaf in jax.tree.leaves(gradients(layer)(weights, 0 * x)):
        assert jnp.isfinite(leaf).all()


@every_layer
def test_bfloat16_in_and_out_with_a_float32_state(name):
    """The second call continues from the first without another trace."""
    layer = LAYERS[name]
    weights = layer.init_weights(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 2, 1, D))
    traces = []
    call = jax.jit(lambda *arguments: traces.append(1) or layer(*arguments))
    state = layer.init_state(weights, 2)
    types = jax.tree.map(lambda s: (s.shape, s.dtype), state)
    for position, piece in enumerate(x.astype(jnp.bfloat16)):
        state, y = call(weights, state, piece, position)
        assert y.dtype == jnp.bfloat16 and jnp.isfinite(y).all()
        assert jax.tree.map(lambda s: (s.shape, s.dtype), state) == types
    assert {s.dtype for s in jax.tree.leaves(state)} - {jnp.dtype("int32")} == {jnp.dtype("float32")}
    assert len(traces) == 1


def retentions(layer, weights, x):
    """Every token's alpha (T, B, H), the memories at their starts."""
    if isinstance(layer, SelfModifyingTitans):
        projections = jax.tree.map(lambda w: w[:, :, :-1], broadcast_start(Deep(**weights["start"]), len(x)))
        z = x.reshape(*x.shape[:2], H, -1).swapaxes(1, 2)
        fixed = dict.fromkeys(("keys", "values", "queries"), z)
        return jnp.moveaxis(layer.generate(weights, projections, z, fixed, jnp.zeros(z.shape[:3])).strengths.retain, 2, 0)
    x = convolve(weights["taps"], layer.init_state(weights, len(x)).recent, x)[1]
    if isinstance(layer, Titans) and layer.rule.retention == "none":
        return jnp.ones((T, len(x), H))
    _, _, _, *gates = (part.swapaxes(0, 1) for part in project_in(weights, x, H))
    return gates[1] if len(gates) > 1 else jnp.ones((T, len(x), H))


def running(memory):
    """Leaves that are weights now, and not of a snapshot."""
    leaves = jax.tree_util.tree_leaves_with_path(memory)
    return [w for path, w in leaves if path[-1].name == "weights"]


@every_layer
def test_what_is_stored_decays_by_the_retentions_alone(x64, name):
    """Without writes, by exactly their product. They start above 0.99; the delta rule and linear attention have none."""
    layer = LAYERS[name]
    weights, x = jax.tree.map(lambda w: w.astype(jnp.float64), layer.init_weights(jax.random.key(0))), inputs()
    bias, rates = ("rate_bias", slice(None)) if "rate_bias" in weights else ("gates_bias", slice(H))
    if bias in weights:  # linear attention has no rates, nor erases
        weights[bias] = weights[bias].at[rates].set(-1e3)
    random = np.random.default_rng(4)

    def store(path, w):
        """In the memory that is read, the last of several (B, H, M, ., .)."""
        if path[-1].name != "weights" or "slow" in {getattr(key, "name", None) for key in path}:
            return w
        return w + random.normal(size=w.shape) * (w.ndim == 4 or np.eye(w.shape[2])[-1, :, None, None])

    start = layer.init_state(weights, 2)
    stored = jax.tree_util.tree_map_with_path(store, start)
    after, without = (jitted(layer)(weights, state, x, 0)[0].memory for state in (stored, start))
    added, left = (jax.tree.map(jnp.subtract, *pair) for pair in ((stored.memory, start.memory), (after, without)))
    alpha = retentions(layer, weights, x)
    constant = name in ("delta", "delta-unit", "linear-attention", "titans-undecayed-4")
    assert (alpha.min() == 1) if constant else (0.99 < alpha.min() < alpha.max() < 1)
    kept = lambda w: w * jnp.prod(alpha, axis=0).reshape(2, H, *[1] * (w.ndim - 2))
    assert_close(running(left), [kept(w) for w in running(added)], 1e-11)


def assert_bounded(layer, biases):
    """20,480 random tokens in float32, for each row of the biases."""
    weights = layer.init_weights(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 1, 5_120, 16))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, None))
    def call(more, state, x):
        return layer({**weights, **{name: weights[name] + bias for name, bias in more.items()}}, state, x, 0, aligned=True)

    rows = len(next(iter(biases.values())))
    start = state = jax.tree.map(lambda s: jnp.stack([s] * rows), layer.init_state(weights, 1))
    for piece in x:
        state, y = call(biases, state, piece)
        assert jnp.isfinite(y).all()
        for weights_now in running(state.memory):
            assert jnp.max(jnp.abs(weights_now)) < 10
    for before, after in zip(running(start.memory), running(state.memory), strict=True):
        assert jnp.all(jnp.max(jnp.abs(after - before).reshape(rows, -1), axis=1) > 0.02)  # it learns


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 16, 64, 256])
def test_self_modification_stays_bounded(chunk):
    """As the gates start, with learning rates next to their maximum, and with momentum decays of 0.998 as well."""
    biases = {"rate_bias": jnp.array([[0.0], [12.0], [12.0]]), "momentum_bias": jnp.array([[0.0], [0.0], [6.0]])}
    assert_bounded(SelfModifyingTitans(16, 2, 4, chunk=chunk), biases)


@pytest.mark.parametrize("chunk", cases([16, 64], [64]))
def test_the_presets_memories_stay_bounded(chunk):
    """As the gates start, and with learning rates next to their maximum."""
    layer = SelfModifyingTitans(16, 2, 4, chunk=chunk, momentum=False, rates="own", rule=HOPE)
    assert_bounded(layer, {"rate_bias": jnp.array([0.0, 12.0])[:, None, None] * jnp.ones((2, 2, 6))})


@pytest.mark.parametrize("chunk", cases([16, 64], [64]))
def test_titans_stay_bounded(chunk):
    """The same, though nothing is erased: the largest rate is what a chunk allows."""
    gates = jnp.array([[0.0, 0.0, 0.0], [12.0, 0.0, 0.0], [12.0, 12.0, 6.0]])  # rate, retention, momentum
    assert_bounded(Titans(16, 2, 4, chunk=chunk), {"gates_bias": jnp.repeat(gates, 2, axis=1)})


@pytest.mark.parametrize(
    "layer",
    [
        LinearMemory(16, 2, "oja"),
        LinearMemory(16, 2, values="unit"),
        OmegaMemory(16, 2, "lp", 1),
        OmegaMemory(16, 2, "huber", 1, chunk=1),
        OmegaMemory(16, 2, "l2", 16, "polynomial"),
    ],
    ids=["oja", "gated-delta", "lp", "huber", "omega"],
)
def test_other_biases_stay_bounded(layer):
    """As the gates start, with learning rates next to their maximum, and with retentions and strengths next to 1 as well."""
    kinds = 2 if isinstance(layer, LinearMemory) or layer.window == 1 else 3  # rate, retention, strength
    gates = jnp.array([[0.0, 0.0, 0.0], [12.0, 0.0, 0.0], [12.0, 12.0, 12.0]])[:, :kinds]
    assert_bounded(layer, {"gates_bias": jnp.repeat(gates, 2, axis=1)})


@pytest.mark.parametrize(
    ("rule", "max_rate", "scale"),
    [
        (HOPE, 1.0, 20),  # features so large that proximal steps are nearly 1
        (dataclasses.replace(HOPE, step="proximal"), 1.0, 20),
        (Rule(step="normalised"), 2.0, 20),
        (Rule(step="raw"), 1.0, 1),
    ],
    ids=["exact, normalised", "exact, proximal", "boundary, normalised", "raw"],
)
def test_memories_do_not_grow_at_any_retention(rule, max_rate, scale):
    """At the largest rate, on one token repeated: what is held along its features fades or flips, also where it decays at
    once. With a factor alpha - 2 eta' it grew 1.6 times a token; with raw steps at a rate of 1.5 it overflowed."""
    layer = SelfModifyingTitans(16, 2, 4, chunk=64, momentum=False, rates="own", rule=rule, max_rate=max_rate)
    weights = layer.init_weights(jax.random.key(0))
    weights["start"] = jax.tree.map(lambda w: scale * w, weights["start"])
    x = jnp.tile(jax.random.normal(jax.random.key(1), (1, 1, 16)), (1, 512, 1))

    @jax.jit
    @jax.vmap
    def largest(retention):
        changed = {"rate_bias": jnp.full_like(weights["rate_bias"], 20.0), "retention_bias": jnp.full(2, retention)}
        state, y = layer({**weights, **changed}, layer.init_state(weights, 1), x, 0)
        return jnp.stack([jnp.abs(w).max() for w in running(state.memory)]).max(), jnp.abs(y).max()

    held, outputs = largest(jnp.array([-20.0, -4.0, -1.0, 0.0, 1.0, 20.0]))
    assert (held < 100).all() and (outputs < 100).all()


def test_a_repeated_key_does_not_grow_at_a_rate_of_2():
    """16,384 tokens with gates at exactly 1 in float32. Without the bound some of the 24 outputs grow by 5 %."""
    layer = LinearMemory(32, 2, "delta", 2.0, chunk=64)
    weights = layer.init_weights(jax.random.key(0))
    weights |= {"gates_bias": jnp.full_like(weights["gates_bias"], 20.0)}
    tokens = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (24, 1, 32)), (24, 4_096, 32))
    read, state, held = jax.jit(lambda state: layer(weights, state, tokens, 0)), layer.init_state(weights, 24), []
    for _ in range(4):
        state, y = read(state)
        held.append(jnp.abs(y[:, -64:]).max((1, 2)))
    assert (held[-1] < 1.005 * held[0]).all(), held[-1] / held[0]


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda rate: LinearMemory(D, H, "delta", rate), 2),
        (lambda rate: LinearMemory(D, H, "oja", rate), 1),
        (lambda rate: Titans(D, H, F, max_rate=rate, rule=Rule(erase="none", errors="exact", step="normalised")), 2),
        (lambda rate: SelfModifyingTitans(D, H, F, max_rate=rate, rule=Rule(step="normalised")), 2),
        (lambda rate: SelfModifyingTitans(D, H, F, max_rate=rate, rule=EXACT), 1),
        (
            lambda rate: SelfModifyingTitans(
                D, H, F, momentum=False, max_rate=rate, rule=dataclasses.replace(EXACT, damped=False)
            ),
            1,
        ),
    ],
)
def test_a_rate_with_which_a_memory_grows_is_refused(make, most):
    make(float(most))
    with pytest.raises(UserError, match=f"max_rate {most + 0.5:g}.* grow.*: give at most {most}$"):
        make(most + 0.5)
