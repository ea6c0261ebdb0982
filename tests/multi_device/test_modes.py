"""Every sequence layer and the model under vmap, export with a symbolic batch and a user's own shard_map, as under jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from rare import cases

from nested_jax import CMSConfig, ModelConfig
from nested_jax.memory import Attention, LinearMemory, OmegaMemory, SelfModifyingTitans, Titans
from nested_jax.memory.deep import Rule
from nested_jax.models.language_model import apply, init_state, init_weights

D, H, C, T = 4, 2, 4, 7
HOPE = Rule(errors="exact", step="normalised", features="boundary")  # the presets'
LAYERS = {
    "attention": Attention(D, H),
    "sliding-window": Attention(D, H, window=3),
    "linear": LinearMemory(D, H, "linear", chunk=C),
    "linear-attention": LinearMemory(D, H, "linear", gated=False, chunk=C),
    "delta": LinearMemory(D, H, "delta", chunk=C),
    "gated-delta": LinearMemory(D, H, "gated-delta", chunk=C),
    "oja": LinearMemory(D, H, "oja", chunk=C),
    "lp": OmegaMemory(D, H, "lp", window=1, chunk=C),
    "huber": OmegaMemory(D, H, "huber", window=1, chunk=C),
    "omega": OmegaMemory(D, H, "l2", window=3, chunk=C),
    "titans": Titans(D, H, 3, chunk=C),
    "self-modifying": SelfModifyingTitans(D, H, 3, chunk=C),
    "self-modifying, two chunks": SelfModifyingTitans(D, H, 3, projection_chunk=2 * C, chunk=C),
    "hope": SelfModifyingTitans(D, H, 3, chunk=C, momentum=False, rates="own", rule=HOPE),
}


def model(mixer, layers=2, **cms):
    cms = CMSConfig(**{"hidden": (3, 3), "periods": (8, 4), "rate": 0.5} | cms)
    return ModelConfig(vocabulary=7, width=D, layers=layers, heads=H, mixer=mixer, chunk=C, memory_hidden=3, cms=cms)


MODELS = {
    "a model that learns": model("gated-delta", layers=1, hidden=(3,), periods=(4,)),
    "a model that learns, in its last block": model("self-modifying", blocks=1),
    "a model that learns, a sum of levels": model("gated-delta", variant="independent"),
    "a model that learns, attention": model("attention", rule="momentum"),  # Adam multiplies the rounding of softmax
    "a model that learns, every block": model("titans", variant="nested", meta_gradient="first-order"),
    "a model that is frozen": model("omega", hidden=(3,), periods=()),
}
CALLS = cases([*LAYERS, *MODELS], ["attention", "hope"])
CLOSE = dict(rtol=2e-4, atol=2e-6)


def layer_call(layer):
    """A call at the start, then one in which documents start, at a position that is not known."""

    def call(weights, x, position):
        state, first = layer(weights, layer.init_state(weights, x.shape[0], 2 * T), x, 0)
        reset = jnp.zeros(x.shape[:2], bool).at[:, 1].set(x[:, 0, 0] > 0)
        state, second = layer(weights, state, x, position, reset=reset)
        return jnp.concatenate([first, second], axis=1), state

    return call


def model_call(made):
    """The same for the model, whose second call reads token by token."""

    def call(weights, x, position):
        tokens = jnp.abs(x[..., 0] * 1e4).astype(jnp.int32) % made.vocabulary
        first, state = apply(made, weights, tokens, init_state(made, weights, x.shape[0], max_length=2 * T))
        second, state = apply(made, weights, tokens[:, :4], state._replace(position=position))
        return jnp.concatenate([first, second], axis=1), state

    return call


def with_gradients(call):
    """Outputs and state, and the gradients of the weights."""

    def both(weights, x, position):
        loss = lambda weights: (lambda y, state: (jnp.sum(jnp.sin(y)), (y, state)))(*call(weights, x, position))
        gradients, (y, state) = jax.grad(loss, has_aux=True)(weights)
        return y, state, gradients

    return both


def make(name):
    key = jax.random.key(0)
    if name in MODELS:
        return model_call(MODELS[name]), init_weights(MODELS[name], key)
    return layer_call(LAYERS[name]), LAYERS[name].init_weights(key)


def specs(leaf, rows):
    """Where a state's rows are, if it has some: counts are all devices'."""
    axes = [i for i, n in enumerate(leaf.shape) if n == rows]
    return P(*[None] * axes[0], "data") if axes else P()


@pytest.mark.parametrize("name", CALLS)
def test_every_mode_is_jit(x64, name):
    """Values, the last state and the gradients of the weights, of 6 rows: as jit has them, row by row."""
    call, weights = make(name)
    weights = jax.tree.map(lambda w: w.astype(jnp.float64), weights)
    x, position = jax.random.normal(jax.random.key(1), (6, T, D)), jnp.int32(T)
    close = lambda a, b: np.testing.assert_allclose(a, b, err_msg=name, **CLOSE)
    expected = jax.jit(with_gradients(call))(weights, x, position)

    # vmap over two batches of three rows
    apart = jax.jit(jax.vmap(lambda x: call(weights, x, position)[0]))(x.reshape(2, 3, T, D))
    close(apart.reshape(expected[0].shape), expected[0])

    # one exported program for any number of rows
    (rows,) = jax.export.symbolic_shape("rows")
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(jnp.shape(w), jnp.result_type(w)), (weights, x, position))
    exported = jax.export.export(jax.jit(call))(shapes[0], shapes[1].update(shape=(rows, T, D)), shapes[2])
    jax.tree.map(close, exported.call(weights, x, position), expected[:2])

    # two devices with three rows each, which do not reach one another
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    where = jax.tree.map(lambda leaf: specs(leaf, 6), expected[1])
    out = (P("data"), where, jax.tree.map(lambda w: P(), weights))
    split = jax.jit(jax.shard_map(with_gradients(call), mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=out))
    alone = split(weights, x, position)
    jax.tree.map(close, alone, expected)
    np.testing.assert_array_equal(split(weights, x.at[3:].add(1.0), position)[0][:3], alone[0][:3])
