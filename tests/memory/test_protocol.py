"""The contract of sequence layers: what the protocol asks for, and what is refused where an object is made."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import pytest

from nested_jax import CMSConfig, Level, ModelConfig, memory
from nested_jax.errors import UserError
from nested_jax.level import nest
from nested_jax.memory import Attention, LinearMemory, OmegaMemory, Rule, SelfModifyingTitans, SequenceLayer, Titans

LAYERS = [
    Attention(8, 2),
    LinearMemory(8, 2, chunk=4),
    OmegaMemory(8, 2, chunk=4),
    Titans(8, 2, 3, chunk=4),
    SelfModifyingTitans(8, 2, 3, chunk=4),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_every_layer_has_the_protocols_methods(layer):
    """By name and by parameters; a state per row, levels, and an output of the input's shape."""
    assert isinstance(layer, SequenceLayer)
    for name in ("init_weights", "init_state", "__call__", "levels"):
        own, protocol = (list(inspect.signature(getattr(kind, name)).parameters) for kind in (type(layer), SequenceLayer))
        assert own[: len(protocol)] == protocol, name
    weights = layer.init_weights(jax.random.key(0))
    shapes = jax.eval_shape(lambda x: layer(weights, layer.init_state(weights, 3), x, 0), jnp.ones((3, 5, 8)))
    assert shapes[1].shape == (3, 5, 8)
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(shapes[0]) if leaf.ndim)
    assert all(isinstance(level, Level) for level in layer.levels(weights, 3))


def test_what_the_package_exports_is_documented():
    for name in memory.__all__:
        assert inspect.getdoc(getattr(memory, name)), name
        assert f"`{name}`" in memory.__doc__, name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearMemory(8, 2, "gated_delta_typo"), "LinearMemory: rule 'gated_delta_typo': give one of linear, delta"),
        (lambda: LinearMemory(8.0, 2), "LinearMemory: width 8.0: give a whole number of at least 1"),
        (lambda: LinearMemory(8, 3), "LinearMemory: width 8 is not a multiple of heads 3: change one"),
        (
            lambda: LinearMemory(8, 2, checkpoint="half"),
            "checkpoint 'half': give one of none, full, sqrt, log",
        ),
        (lambda: Rule(erase="layers"), "Rule: erase 'layers': give one of layer, memory, none"),
        (lambda: Rule(surprise=0.0), "Rule: surprise 0.0: give a number above 0"),
        (lambda: OmegaMemory(8, 2, objective="foo"), "OmegaMemory: objective 'foo': give one of l2, lp, huber"),
        (lambda: OmegaMemory(8, 2, window=0), "OmegaMemory: window 0: give a whole number of at least 1"),
        (
            lambda: OmegaMemory(8, 2, "lp", power=0.5),
            "OmegaMemory: power 0.5: give a finite number of at least 1 and at most 8",
        ),
        (lambda: Titans(8, 3, 4), "Titans: width 8 is not a multiple of heads 3: change one"),
        (
            lambda: Titans(8, 2, 4, max_rate=-1.0),
            "Titans: max_rate -1.0: give a finite number of at least 1e-06 and at most 1000000 or None",
        ),
        (lambda: Titans(8, 2, 4, rule="raw"), "Titans: rule 'raw': give a Rule"),
        (
            lambda: SelfModifyingTitans(8, 2, 4, projection_chunk=6, chunk=4),
            "projection_chunk 6 is not a multiple of chunk 4",
        ),
        (lambda: SelfModifyingTitans(8, 2, 4, targets="L2"), "targets 'L2': give one of l2, rms, raw"),
        (lambda: Attention(8, 3), "Attention: width 8 is not a multiple of heads 3: change one"),
        (lambda: Attention(8, 2, window=True), "Attention: window True: give a whole number of at least 1 or None"),
        (lambda: CMSConfig(periods=64), "model.cms.periods 64: give a tuple, each a whole number of at least 1"),
        (lambda: CMSConfig(hidden=()), r"model.cms.hidden \(\) has no level"),
        (lambda: CMSConfig(rate=float("nan")), "model.cms.rate nan: give a finite number of at least 0"),
        (lambda: ModelConfig(chunk=2.5), "model.chunk 2.5: give a whole number of at least 1"),
        (lambda: ModelConfig(layers="4"), "model.layers '4': give a whole number of at least 1"),
        (lambda: ModelConfig(cms=None), "model.cms None: give a CMSConfig"),
        (lambda: ModelConfig(momentum=1), "model.momentum 1: give True or False"),
        (lambda: Level(None, None, period=2.0), "level 'level': period 2.0: give a whole number of at least 1"),
        (lambda: Level(None, None, period=1, tokens=0), "level 'level': tokens 0: give a whole number of at least 1"),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_made(make, message):
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_levels_of_other_data_points_do_not_nest():
    made = lambda period, tokens: Level(lambda slower: 0.0, lambda s, x, slower: (s, x), period, tokens=tokens)
    with pytest.raises(UserError, match="data points of 4 tokens, the faster level 'level' of 2: give both the same"):
        nest(made(1, 2), made(2, 4))


def test_a_replaced_field_is_checked_too():
    with pytest.raises(UserError, match="model.heads 0"):
        dataclasses.replace(ModelConfig(), heads=0)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_what_a_layer_cannot_read_is_refused(layer):
    """Shapes, types and, where they are known, documents that start off its grid."""
    weights = layer.init_weights(jax.random.key(0))
    state, x, name = layer.init_state(weights, 2), jnp.ones((2, 5, 8)), type(layer).__name__
    for wrong in (x[:, :0], x[..., :7], x[0], x.astype(int)):
        with pytest.raises(UserError, match=rf"{name}: x is .*: give floats \(B, T, 8\), at least one token"):
            layer(weights, state, wrong, 0)
    with pytest.raises(UserError, match=f"{name}: 1 rows of tokens, 2 of the state: give init_state batch_size=1"):
        layer(weights, state, x[:1], 0)
    for reset in (jnp.zeros((2, 4), bool), jnp.zeros((2, 5))):
        with pytest.raises(UserError, match=rf"{name}: reset is .*: give bools \[2, 5\]"):
            layer(weights, state, x, 0, reset=reset)
    if not isinstance(layer, Attention):
        with pytest.raises(
            UserError, match=rf"{name}: reset at token 7: give documents that start on multiples of 4 tokens"
        ):
            layer(weights, state, x, 4, reset=jnp.zeros((2, 5), bool).at[1, 3].set(True))
