"""Every leaf of every model's weights, optimizer state and fast state has a rule, and one without is an error."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from nested_jax import UserError, preset
from nested_jax.models.config import PRESETS
from nested_jax.parallel.mesh import MeshShape
from nested_jax.parallel.rules import fast_spec, memory_spec, state_shardings, weight_shardings, weight_spec
from nested_jax.paths import path_name
from nested_jax.train.config import Optimizer, TrainConfig
from nested_jax.train.state import init_train_state


def mesh(**sizes):
    return AbstractMesh(MeshShape(**sizes), MeshShape._fields, axis_types=(AxisType.Auto,) * 4)


def changed(name):
    """A preset with everything on that has state of its own."""
    model = preset(name)
    cms = dataclasses.replace(model.cms, rule="adam", scope="batch", blocks=None) if model.cms.periods else model.cms
    momentum = True if model.mixer in ("self-modifying", "titans") else model.momentum
    return dataclasses.replace(model, cms=cms, momentum=momentum)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("tiny-")])
@pytest.mark.parametrize("make", [preset, changed])
def test_every_leaf_has_a_rule(name, make):
    config = TrainConfig.from_preset(name, model=make(name), carry=True, batch_size=8)
    state = jax.eval_shape(lambda: init_train_state(config))
    placed = state_shardings(mesh(data=2, fsdp=2, tensor=2), state)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    big = [(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True) if a.size >= 2**14]
    for leaf, place in big:
        assert 2 * jax.tree.reduce(lambda a, b: a * b, place.shard_shape(leaf.shape)) <= leaf.size


@pytest.mark.parametrize("rule", typing.get_args(Optimizer))
def test_every_memory_lies_where_its_weight_lies(rule):
    config = TrainConfig(optimizer=rule)
    state = jax.eval_shape(lambda: init_train_state(config))
    placed = state_shardings(mesh(fsdp=2, tensor=2), state)
    named = lambda tree: {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    weights, places, spec = map(named, (state.params, placed.optimizer, placed.params))
    found = {
        path: weight
        for path, leaf in named(state.optimizer).items()
        for weight in weights
        if path.endswith("/" + weight) and leaf.shape == weights[weight].shape
    }
    assert len({*found.values()}) >= 16 and all(places[path] == spec[found[path]] for path in found)


def test_what_has_no_rule_is_an_error():
    with pytest.raises(
        UserError, match="parameter blocks/mixer/new has no rule for a mesh: add one to parallel.rules.WEIGHTS"
    ):
        weight_spec("blocks/mixer/new")
    with pytest.raises(UserError, match="fast state mixers/new of 3 axes has no rule"):
        fast_spec("mixers/new", 3)
    with pytest.raises(UserError, match="fast state mixers/memory/weights of 2 axes has no rule"):
        fast_spec("mixers/memory/weights", 2)
    with pytest.raises(UserError, match="optimizer state 0/mu/blocks/norm of 3 axes is that of no parameter"):
        memory_spec("0/mu/blocks/norm", 3, {"blocks/norm": 2})
    with pytest.raises(UserError, match=r"--mesh tensor=3 does not divide head \[4, 8\]"):
        weight_shardings(mesh(tensor=3), {"head": jnp.ones((4, 8))})
