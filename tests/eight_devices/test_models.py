"""Every family on a mesh: loss and gradients of one device; weights, memories and state are in parts."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rare import cases

from nested_jax import preset
from nested_jax.data import Batch
from nested_jax.models.language_model import apply, init_state, init_weights
from nested_jax.numerics import nats
from nested_jax.parallel import hlo, rules
from nested_jax.parallel.mesh import MeshShape, make_mesh
from nested_jax.train.config import TrainConfig
from nested_jax.train.optimizer import optimizer
from nested_jax.train.state import init_train_state, places_of
from nested_jax.train.step import train_step

FAMILIES = (
    *("hope", "hope-attention", "transformer", "titans", "omega"),
    *("gated-delta", "delta", "linear", "oja", "lp", "huber"),
)
MESHES = {
    "8 rows": MeshShape(data=8),
    "2x2x2": MeshShape(data=2, fsdp=2, tensor=2),
    "1x4x2": MeshShape(fsdp=4, tensor=2),
    "sequence": MeshShape(fsdp=2, tensor=2, sequence=2),
}
DEFAULT = {"hope": ("2x2x2",), "transformer": ("sequence",)}
B, T, V = 8, 64, 32


def small(family):
    """Of a family every part; as wide as the preset, which decides how XLA splits; a CMS that learns has two levels."""
    whole = preset(f"tiny-{family}")
    sizes = {"hidden": (16,) * len(whole.cms.hidden), "periods": (32, 16) if whole.cms.periods else ()}
    changes = {"layers": 2, "vocabulary": V, "chunk": 8, "memory_hidden": 4}
    return dataclasses.replace(whole, **changes, cms=dataclasses.replace(whole.cms, **sizes))


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(V, size=(B, T + 1)).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], rng.random((B, T)).astype(np.float32), np.zeros((B, T), bool))


def as_double(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, tree)


def meshes():
    """Families with the meshes of one test, which has one program for one device: first those of the default tests."""
    rest = {family: tuple(name for name in MESHES if name not in DEFAULT.get(family, ())) for family in FAMILIES}
    return cases([*DEFAULT.items(), *rest.items()], [*DEFAULT.items()])


@pytest.mark.parametrize("case", meshes(), ids=lambda case: f"{case[0]} on {', '.join(case[1])}")
def test_a_mesh_changes_no_number(x64, case):
    """Of inner gradients XLA's partitioner swaps rows of two devices where rows lie along (data, fsdp): so fsdp is first."""
    family, names = case
    model, given = small(family), batch()
    weights = as_double(jax.jit(partial(init_weights, model))(jax.random.key(0)))

    def loss(weights, given):
        logits, _ = apply(model, weights, given.tokens, init_state(model, weights, B, max_length=T), multiple=T)
        return (nats(logits, given.targets) * given.weights).mean()

    expected = jax.jit(jax.value_and_grad(loss))(weights, given)
    close = 1e-6 if family == "hope-attention" else 1e-9  # JAX's softmax attention is float32, and is learned from
    for name in names:
        mesh = make_mesh(MESHES[name])
        places, rows = rules.weight_shardings(mesh, weights), rules.row_sharding(mesh)
        with jax.set_mesh(mesh):
            compiled = jax.jit(jax.value_and_grad(loss), in_shardings=(places, rows), out_shardings=(None, places))
            got = compiled(weights, given)
        say = partial(np.testing.assert_allclose, rtol=close, err_msg=name)
        jax.tree.map(lambda a, b, say=say: say(a, b, atol=close * np.abs(b).max()), got, expected)


@pytest.mark.parametrize("family", cases(["hope", "hope-attention", "transformer", "gated-delta"], ["gated-delta"]))
def test_weights_are_gathered_a_block_at_a_time(family):
    """Along fsdp, inside the loop over blocks: no device ever holds all matrices of five, or of four that learn slowly."""
    model = dataclasses.replace(small(family), layers=5)
    config = TrainConfig.from_preset(f"tiny-{family}", model=model, batch_size=B, window=T)
    mesh, update = make_mesh(MESHES["2x2x2"]), train_step(model, optimizer(config))
    state = jax.eval_shape(lambda: init_train_state(config))
    places = places_of(mesh, state, B)
    with jax.set_mesh(mesh):
        step = jax.jit(update, in_shardings=(places.state, places.batch), out_shardings=(places.state, None))
        program = hlo.parse(step.lower(state, batch()).compile().as_text())
    found = [one for one in hlo.collectives(program, MESHES["2x2x2"]) if "fsdp" in one.axes and one.kind == "all-gather"]
    assert any(one.runs >= 4 for one in found)
    single = {leaf.size // 5 for leaf in jax.tree.leaves(state.params["blocks"])} | {V * model.width}  # and the embedding
    assert {one.sent // one.runs // 4 for one in found} <= {size // 4 for size in single}  # halves, of parts along tensor


@pytest.mark.parametrize("rule", cases(["adamw", "m3", "deep-momentum", "delta-gradient-descent"], ["m3"]))
def test_an_update_keeps_everything_in_parts(rule):
    """The same loss and parameters as on one device; each device has its part of weights and memories, before and after."""
    given, finest = batch(), {"learning_rate": 1e-3, "slow_period": 2, "warmup": 0}
    config = TrainConfig.from_preset("tiny-delta", model=small("delta"), batch_size=B, window=T, optimizer=rule, **finest)
    update = train_step(config.model, optimizer(config), accumulate=1)
    alone = jax.jit(lambda: init_train_state(config))()
    once, metrics = jax.jit(update)(alone, given)
    mesh = make_mesh(MESHES["2x2x2"])
    with jax.set_mesh(mesh):
        places = places_of(mesh, alone, B)
        state = jax.jit(lambda: init_train_state(config), out_shardings=places.state)()
        assert_in_parts(state)
        step = jax.jit(
            update, donate_argnums=0, in_shardings=(places.state, places.batch), out_shardings=(places.state, None)
        )
        state, first = step(state, given)
        state, second = step(state, given)
        assert step._cache_size() == 1
    assert_in_parts(state)
    expected, metrics_then = jax.jit(update)(once, given)
    for got, wanted in ((first, metrics), (second, metrics_then)):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4), got, wanted)
    moved = lambda a, b: max(float(jnp.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))
    assert moved(state.params, expected.params) < 0.02 * moved(expected.params, alone.params)


def assert_in_parts(state):
    """A device holds no more than a third of the weights, a quarter and what is not split, and half of any memory."""
    part = lambda leaf: leaf.addressable_shards[0].data.nbytes
    weights = jax.tree.leaves(state.params)
    assert sum(map(part, weights)) < sum(leaf.nbytes for leaf in weights) / 3
    memories = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim > 1 and min(leaf.shape[-2:]) >= 16]
    assert memories and all(2 * part(leaf) <= leaf.nbytes for leaf in memories)


@pytest.mark.parametrize("family", cases(["hope", "hope-attention"], []))
def test_carried_state_lies_in_parts(family):
    """Rows along fsdp and data, heads along tensor; two pieces of a batch, of two windows one after the other."""
    given, model = batch(), small(family)
    config = TrainConfig.from_preset(f"tiny-{family}", model=model, batch_size=B, window=T, accumulate=2, carry=True)
    update = train_step(model, optimizer(config), accumulate=2)
    expected = jax.jit(lambda: init_train_state(config))()
    mesh = make_mesh(MESHES["2x2x2"])
    places = places_of(mesh, expected, B)
    with jax.set_mesh(mesh):
        state = jax.device_put(expected, places.state)
        step = jax.jit(update, in_shardings=(places.state, places.batch), out_shardings=(places.state, None))
        for _ in range(2):
            state, got = step(state, given)
            expected, metrics = jax.jit(update)(expected, given)
            np.testing.assert_allclose(got.loss, metrics.loss, rtol=1e-5)
    rows = [leaf for leaf in jax.tree.leaves(state.fast) if leaf.ndim > 2]
    assert rows and all(leaf.addressable_shards[0].data.nbytes * 4 <= leaf.nbytes for leaf in rows)
