"""AdaTransformer: an MLP block and a linear-attention block differ in the level of one weight (NL sections 5-6).

    y_t = M phi(W_q x_t)

is an MLP if M is a slow weight, as W_q is. It is linear attention if M is a state that starts from the slow M in every
sequence and learns from each token on -<M phi(W_k x_t), W_v x_t>.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nested_jax import CMSConfig, Level, cms, nest, run
from nested_jax.memory.linear import LinearMemory
from nested_jax.memory.objective import dot_product
from nested_jax.memory.projections import project_in
from nested_jax.memory.stream import project_out
from nested_jax.numerics import l2norm, rms_norm

D, F, T = 6, 6, 10


def block(phi, fast):
    """One token of the block, (x, rate, retention): each weight is read from the fastest level that holds it.

    Emits the output, the token and the weights that were read.
    """

    def init(slower):
        return {"M": slower[0]["M"]} if fast else {}

    def step(state, context, slower):
        (slow, *_), token = slower, jax.tree.map(lambda part: part[0], context)
        x, rate, retain = token
        if fast:
            objective = lambda M: dot_product().loss(M @ phi(slow["key"] @ x), slow["value"] @ x)
            state = {"M": retain * state["M"] - rate * jax.grad(objective)(state["M"])}
        weights = {**slow, **state}
        return state, (weights["M"] @ phi(weights["query"] @ x), token, weights)

    return Level(init, step, period=1, name="block")


def pre_training(phi, fast):
    """The slowest level: a step of gradient descent for every sequence, here towards its inputs shifted by one token."""

    def step(slow, emitted, slower):
        context = emitted[1]
        loss = lambda slow: jnp.mean((read(phi, fast, slow, context)[:-1] - context[0][1:]) ** 2)
        return jax.tree.map(lambda w, g: w - 0.1 * g, slow, jax.grad(loss)(slow)), emitted

    return Level(lambda slower: draw_weights(), step, period=T, name="pre-training")


def read(phi, fast, slow, context):
    """Outputs of one sequence."""
    return run(block(phi, fast), None, context, slower=(slow,))[1][0]


def draw_weights():
    shapes, rng = {"query": (F, D), "key": (F, D), "value": (D, D), "M": (D, F)}, np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape) / 2) for name, shape in shapes.items()}


def stream(length=T, rate=0.5, retain=0.9):
    x = np.random.default_rng(1).normal(size=(length, D))
    return jnp.asarray(x), jnp.full(length, rate), jnp.full(length, retain)


def assert_same(one, other, *arguments):
    """Values, and gradients with respect to the arguments."""
    read_out = lambda f: jax.jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(f(*a))), range(len(arguments))))
    compare = lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-10, atol=1e-12)
    jax.tree.map(compare, read_out(one)(*arguments), read_out(other)(*arguments))


@pytest.mark.parametrize("fast", [False, True], ids=["slow", "fast, at rate 0"])
def test_with_a_slow_weight_it_is_the_mlp_block(x64, fast):
    """That of the models: a CMS with one frozen level."""
    slow, (x, rate, retain) = draw_weights(), stream(rate=0.0, retain=1.0)

    def mlp(up, down):
        level = {"up": up.T, "down": down.T, "norm": jnp.ones(D)}
        return cms.apply(CMSConfig(hidden=(F,)), {"level1": level}, (), x[None])[0]

    def own(up, down):
        context = rms_norm(jnp.ones(D), x), rate, retain
        return x + read(jax.nn.gelu, fast, {**slow, "query": up, "M": down}, context)

    assert_same(mlp, own, slow["query"], slow["M"])


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "slow"])
def test_with_a_fast_weight_it_is_the_linear_memory(x64, fast):
    """At the rates and retentions of its gates. Where these write and forget nothing, it is the block with a slow weight."""
    layer = LinearMemory(D, 1, "linear", chunk=4)
    weights = jax.tree.map(lambda w: w.astype(jnp.float64), layer.init_weights(jax.random.key(0)))
    weights["gates_bias"] = jnp.array([-0.5, 1.0] if fast else [-1e3, 1e3])
    x = stream()[0]

    def memory(start, maps):
        given = {**weights, "start": start, **maps}
        return layer(given, layer.init_state(given, 1), x[None], 0)[1][0]

    def own(start, maps):
        maps = {name: w.T for name, w in maps.items()}
        *_, rate, retain = project_in(weights, x[None], 1)  # the convolution starts as the identity
        y = read(l2norm, fast, {**maps, "M": start[0]}, (x, rate[0, :, 0], retain[0, :, 0]))
        return project_out(weights, y[None, :, None], x.dtype)[0]

    assert_same(memory, own, draw_weights()["M"][None], {name: weights[name] for name in ("query", "key", "value")})


@pytest.mark.parametrize("fast", [False, True], ids=["slow", "fast"])
def test_the_pictures_differ_in_the_level_of_one_weight(x64, fast):
    """How often each weight that the block reads moves, in three sequences."""
    level = nest(block(jax.nn.gelu, fast), pre_training(jax.nn.gelu, fast), reset=True)
    _, (_, _, weights) = jax.jit(lambda context: run(level, None, context))(stream(3 * T))
    moves = lambda w: int((jnp.diff(w.reshape(3 * T, -1), axis=0) != 0).any(axis=1).sum())
    moved = {name: moves(w) for name, w in weights.items()}
    teachers = {name: moved.pop(name) for name in ("key", "value")}  # of a fast M alone
    assert moved == {"query": 2, "M": 3 * T - 1 if fast else 2}
    assert teachers == dict.fromkeys(teachers, 2 if fast else 0)
