"""Tasks split over devices by `jax.shard_map`: each device adapts to its own, from a start and a rate that all share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from nested_jax.meta import descent, hypergradient, maml, mixflow_grad

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
