"""Tasks split over devices by `jax.shard_map`: each device adapts to its own, from a start and a rate that all share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from nested_jax import Level, nest, run
from nested_jax.meta import descent, hypergradient, maml, mixflow_grad, unroll

TASKS, META = jnp.linspace(-1.5, 2.0, 8), {"w": jnp.asarray(0.7), "rate": jnp.asarray(0.1)}


def loss(w, task):
    return jnp.sum(jnp.cos(w * task))


def adapted(meta, tasks, gradient):
    """Mean loss after adaptation, with a momentum beside the parameters."""
    rule = lambda rate: optax.sgd(rate, momentum=0.9)
    adapt = maml(loss, rule, 5, inner_gradient=gradient)
    return jax.vmap(lambda task: loss(adapt(meta["w"], task, meta["rate"]), task))(tasks).mean()


def streamed(meta, tasks, gradient):
    """The loss after a step on each task, as a level and its hypergradient's value, with a window of one."""
    level = descent(
        lambda w, x, meta: loss(w, x),
        lambda meta: optax.sgd(meta["rate"]),
        start=lambda meta: meta["w"],
        inner_gradient=gradient,
    )
    by = hypergradient(lambda meta, state, losses: losses.mean(), level)
    found = jax.vmap(lambda task: by(meta, jnp.stack([task, task])))(tasks)
    return found.value.mean()


@pytest.mark.parametrize("gradient", [mixflow_grad, jax.grad])
@pytest.mark.parametrize("of", [adapted, streamed])
def test_devices_adapt_apart(of, gradient):
    mesh = jax.make_mesh((4,), ("tasks",), axis_types=(AxisType.Auto,))
    of = functools.partial(of, gradient=gradient)
    split = lambda meta, tasks: jax.lax.pmean(of(meta, tasks), "tasks")
    together = jax.shard_map(split, mesh=mesh, in_specs=(P(), P("tasks")), out_specs=P())
    derivative = jax.value_and_grad if of.func is adapted else lambda f: f
    got, expected = (jax.jit(derivative(f))(META, TASKS) for f in (together, of))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)


def follow(state, chunk, slower):
    """Towards a mean; the count is the same on all devices."""
    total, count = state
    return (total + 0.1 * (chunk.mean() - total), count + 1), total * jnp.cos(total)


def levels(start, stream):
    level = Level(lambda slower: (start, jnp.zeros((), int)), follow, period=2)
    return run(level, None, stream)[1][0]


def nested(start, stream):
    slow = Level(lambda slower: start, lambda state, emitted, slower: (state + emitted.sum(), state), period=4)
    return run(nest(Level(lambda slower: (slower[0], 0.0), follow, period=2), slow), None, stream, checkpoint="sqrt")[1][0]


def unrolled(start, stream, checkpoint):
    return unroll(lambda state, x: follow(state, x[None], ()), (start, 0), stream, checkpoint=checkpoint)[1]


UNROLLED = [functools.partial(unrolled, checkpoint=checkpoint) for checkpoint in ("none", "sqrt", 2, "log")]


@pytest.mark.filterwarnings("ignore:run. level")
@pytest.mark.parametrize("of", [levels, nested, *UNROLLED])
def test_a_start_that_devices_share_reads_the_stream_of_each(of):
    """A user's level or step, which casts nothing."""
    mesh = jax.make_mesh((4,), ("streams",), axis_types=(AxisType.Auto,))
    mean = lambda start, streams: jax.vmap(of, (None, 0))(start, streams).mean()
    split = lambda start, streams: jax.lax.pmean(mean(start, streams), "streams")
    together = jax.shard_map(split, mesh=mesh, in_specs=(P(), P("streams")), out_specs=P())
    streams = jnp.sin(jnp.arange(72.0)).reshape(8, 9)
    got, expected = (jax.jit(jax.value_and_grad(f))(jnp.asarray(0.7), streams) for f in (together, mean))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)


def test_a_level_that_sums_over_devices_stays_the_same_on_all():
    mesh = jax.make_mesh((4,), ("streams",), axis_types=(AxisType.Auto,))
    step = lambda state, chunk, slower: (state + jax.lax.psum(chunk.sum(), "streams"), state * chunk.sum())
    own = lambda stream: run(Level(lambda slower: jnp.zeros(()), step, period=2), None, stream[0])[0]
    total = jax.shard_map(own, mesh=mesh, in_specs=P("streams"), out_specs=P())(jnp.ones((4, 6)))
    assert total == 24
